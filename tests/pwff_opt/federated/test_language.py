"""Pre-training and instruction tuning against plain transformers and peft, one device after another."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from plain_language import (
    answer_loss,
    assert_equals_plain,
    distances,
    plain_device,
    row,
    save_decoder,
)
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import pwff_opt.federated.export.peft_bottleneck  # noqa: F401  (peft then knows bottleneck adapters)
from pwff_opt.errors import DataError
from pwff_opt.federated.learning import Causal
from pwff_opt.federated.model.backbone import Backbone, Stack
from pwff_opt.federated.model.generation import generate
from pwff_opt.federated.model.passes import Passes
from pwff_opt.federated.text.tokens import Indices, Packed, Tokens
from pwff_opt.federated.training.evaluator import FederatedEvaluator
from pwff_opt.planning.demand import CostModel
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.schedule import Schedule

WORDS = [
    "river",
    "stone",
    "bread",
    "winter",
    "letter",
    "garden",
    "silver",
    "engine",
    "mountain",
    "paper",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model, and demonstrations of unequal lengths in two domains."""
    folder = tmp_path_factory.mktemp("language")
    save_decoder(folder / "decoder")
    rng = np.random.default_rng(4)
    rows = ["prompt,answer,domain"]
    for number in range(90):
        asked, told = (" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(2))
        rows.append(f"{number}: {asked}?,{told}.,{'ab'[number % 2]}")
    (folder / "demonstrations.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def pretraining(small: Scenario, folder: Path) -> Scenario:
    """Hutto's sentences, learned as they are."""
    return replace(
        small,
        folder=str(folder),
        model=replace(small.model, source="decoder", pooling="model"),
        data=replace(small.data, train_per_device=8, validation_per_device=3, test_per_device=4),
        training=replace(small.training, stage="pretraining"),
    )


@pytest.fixture
def instruction(pretraining: Scenario) -> Scenario:
    return replace(
        pretraining,
        data=replace(
            pretraining.data, source="file", path="demonstrations.csv", domain_column="domain"
        ),
        training=replace(pretraining.training, stage="instruction"),
    )


@pytest.fixture(params=["pretraining", "instruction"])
def scenario(request: pytest.FixtureRequest) -> Scenario:
    made: Scenario = request.getfixturevalue(request.param)
    return made


def changed(
    scenario: Scenario, peft: dict[str, Any], table: dict[str, Any], schedule: str = ""
) -> Scenario:
    scope: Any = "per_device" if "," in schedule else "common"
    return replace(
        scenario,
        decisions=replace(scenario.decisions, rank_scope=scope),
        peft=replace(scenario.peft, **peft),
        aggregation=replace(scenario.aggregation, **table),
    )


def stage_of(evaluator: FederatedEvaluator) -> Causal:
    assert isinstance(evaluator.material.stage, Causal)
    return evaluator.material.stage


def plain_loss(evaluator: FederatedEvaluator) -> Callable[[Any, int, Sequence[int]], torch.Tensor]:
    """Return the mean over sequences of transformers' loss of the answer."""
    stage = stage_of(evaluator)

    def loss(model: Any, _device: int, batch: Sequence[int]) -> torch.Tensor:
        each = [answer_loss(model, row(stage.tokens, i), int(stage._starts[i])) for i in batch]
        return torch.stack(each).mean()

    return loss


@pytest.mark.parametrize(
    ("stage", "text", "peft", "table"),
    [
        ("pretraining", "3x2:fpa", {}, {}),
        ("instruction", "3x4:aaa", {}, {}),
        ("instruction", "2x2,0,4:ppf", {}, {}),
        ("pretraining", "2x0:fap", {}, {}),
        ("instruction", "1x2:ffa 1x4:paf 1x2:fpf", {}, {"proximal": 0.5}),
        ("pretraining", "2x2:fpa", {"adapter_width": 0, "common_lora_rank": 3}, {}),
        ("instruction", "2x2,4,4:faa", {"lora_scaling": "rslora"}, {"lora": "flora"}),
        ("pretraining", "2x2:paa", {}, {"lora": "fedex"}),
    ],
)
def test_equals_plain_peft_one_device_after_another(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    stage: str,
    text: str,
    peft: dict[str, Any],
    table: dict[str, Any],
) -> None:
    scenario = changed(request.getfixturevalue(stage), peft, table, text)
    evaluator = FederatedEvaluator(scenario, tmp_path)
    schedule = Schedule.parse(text, devices=3)
    ours = assert_equals_plain(scenario, evaluator, schedule, plain_loss(evaluator))
    # and it is what is learned that is equal: no block is as it was drawn
    for own in ours.devices:
        assert all(t.any() for name, t in own.items() if name.endswith(("up.weight", "up.bias")))


@pytest.mark.parametrize(("width", "proximal"), [(0, 0.0), (4, 0.0), (4, 0.1)])
def test_where_all_is_frozen_nothing_is_learned(
    scenario: Scenario, tmp_path: Path, width: int, proximal: float
) -> None:
    frozen = changed(scenario, {"adapter_width": width}, {"proximal": proximal})
    evaluator = FederatedEvaluator(frozen, tmp_path)
    schedule = Schedule.parse("2x2:fff", devices=3)
    state, rounds = evaluator._trained(schedule)
    assert all(not own for own in state.devices)
    model, _ = plain_device(frozen, {}, 0)
    with torch.no_grad():
        for number, entry in enumerate(rounds):
            for device, loss in enumerate(entry.loss):
                batches = evaluator.trainer.batches(number, device)
                plain = [plain_loss(evaluator)(model, device, batch.tolist()) for batch in batches]
                assert loss == pytest.approx(float(torch.stack(plain).mean()), rel=1e-5)
    assert rounds[0].accuracy == rounds[1].accuracy
    assert rounds[0].uplink_bit == (0, 0, 0)
    assert (
        CostModel(frozen, evaluator.workload).demand(schedule).payload_bit.tolist() == [[0] * 3] * 2
    )


def test_measures_are_those_of_transformers(scenario: Scenario, tmp_path: Path) -> None:
    """Shares of tokens and perplexity over all answers' tokens, by a model that has learned."""
    evaluator = FederatedEvaluator(scenario, tmp_path)
    schedule = Schedule.parse("2x2:fpa", devices=3)
    state, _ = evaluator._trained(schedule)
    stage = stage_of(evaluator)
    for device, measured in enumerate(evaluator.measures(schedule)):
        model, _ = plain_device(scenario, state.devices[device], 2)
        right, total, count = 0, 0.0, 0
        with torch.no_grad():
            for i in evaluator.material.shards[device].test:
                ids, start = row(stage.tokens, i), int(stage._starts[i])
                said = model(input_ids=ids).logits[0, start - 1 : -1].argmax(-1)
                right += int((said == ids[0, start:]).sum())
                count += ids.shape[1] - start
                total += float(answer_loss(model, ids, start)) * (ids.shape[1] - start)
        assert measured["accuracy"] == right / count
        assert measured["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


class _Told(Passes):
    """Passes whose last hidden states are leaves, to ask what a loss hangs on."""

    hidden: torch.Tensor

    def own(self, tokens: Tokens, batches: Sequence[Indices]) -> tuple[Packed, torch.Tensor]:
        packed, hidden = super().own(tokens, batches)
        self.hidden = hidden.detach().requires_grad_(True)
        return packed, self.hidden


def test_only_answers_are_learned(instruction: Scenario, tmp_path: Path) -> None:
    """No token of the prompt is asked for: what predicts it has no gradient, and it may be any other."""
    evaluator = FederatedEvaluator(instruction, tmp_path)
    stage, backbone = stage_of(evaluator), evaluator.material.backbone
    batch = evaluator.material.shards[0].train[:4]
    starts, lengths = stage._starts[batch], stage.tokens.lengths[batch]
    assert len(set(starts)) > 1 < len(set(lengths - starts))
    passes = _Told(backbone, [0], Stack([{}], [1.0]))
    (loss,) = stage.losses([batch], passes)
    loss.each.sum().backward()
    assert passes.hidden.grad is not None
    asked = passes.hidden.grad.abs().sum(1) > 0
    expected = [
        start - 1 <= place < length - 1
        for start, length in zip(starts, lengths, strict=True)
        for place in range(length)
    ]
    assert asked.tolist() == expected
    # Layers see the prompt all the same: another first token, another loss.
    ids = stage.tokens.ids.copy()
    ids[stage.tokens.offsets[batch]] = 2000
    other = Causal(backbone, replace(stage.tokens, ids=ids), stage._starts)
    (changed_loss,) = other.losses([batch], Passes(backbone, [0], Stack([{}], [1.0])))
    assert (changed_loss.each != loss.each).all()


def test_bfloat16_learns_much_the_same(instruction: Scenario, tmp_path: Path) -> None:
    halved = replace(instruction, training=replace(instruction.training, base_dtype="bfloat16"))
    schedule = Schedule.parse("2x2:fpa", devices=3)
    exact = FederatedEvaluator(instruction, tmp_path / "a").train(schedule)
    coarse = FederatedEvaluator(halved, tmp_path / "b").train(schedule)
    assert coarse.status == "done", coarse.reason
    for a, b in zip(exact.rounds, coarse.rounds, strict=True):
        assert a.loss != b.loss
        np.testing.assert_allclose(a.loss, b.loss, rtol=1e-2)
        assert a.uplink_bit == b.uplink_bit


def test_out_of_memory_cuts_the_mini_batch_and_goes_on(
    instruction: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    schedule = Schedule.parse("2x2:faa", devices=3)
    expected, _ = FederatedEvaluator(instruction, tmp_path / "a")._trained(schedule)
    through = Backbone.run

    def short_of_memory(self: Backbone, packed: Packed, *rest: Any, **how: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and max(packed.sequence_counts) > 1:
            torch.empty(10**15)  # what torch itself says when memory runs out
        return through(self, packed, *rest, **how)

    monkeypatch.setattr(Backbone, "run", short_of_memory)
    cut, _ = FederatedEvaluator(instruction, tmp_path / "b")._trained(schedule)
    assert "mini-batches are now cut into" in caplog.text
    for own, other in zip(cut.devices, expected.devices, strict=True):
        assert max(distances(own, other).values()) <= 1e-5


def test_killed_and_resumed_ends_at_the_same_bits(scenario: Scenario, tmp_path: Path) -> None:
    schedule = Schedule.parse("1x2:ffa 2x4:fpa", devices=3)
    whole, rounds = FederatedEvaluator(scenario, tmp_path / "a", workers=2)._trained(schedule)
    FederatedEvaluator(scenario, tmp_path / "b")._trained(schedule.prefix(2))
    resumed, again = FederatedEvaluator(scenario, tmp_path / "b", workers=1)._trained(schedule)
    assert again == rounds
    for own, other in zip(resumed.devices, whole.devices, strict=True):
        assert own.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in own.items())


def test_a_device_that_diverges_is_left_out(scenario: Scenario, tmp_path: Path) -> None:
    trainer = FederatedEvaluator(scenario, tmp_path).trainer
    trainer._most_together, trainer._cores = 3, 1
    (decision,) = Schedule.parse("1x2:paa", devices=3).rounds
    present = (True,) * 3
    start, _ = trainer.round(trainer.initial(), 0, decision, present)
    own = start.devices[1]
    bad = own | {"lora.1.q_proj.B": torch.full_like(own["lora.1.q_proj.B"], torch.nan)}
    sick = replace(start, devices=(start.devices[0], bad, start.devices[2]))
    state, report = trainer.round(sick, 1, decision, present)
    assert report.diverged == (1,)
    assert [math.isnan(loss) for loss in report.loss] == [False, True, False]
    assert report.uplink_bit[1] == 0 < report.uplink_bit[0]
    well, _ = trainer.round(start, 1, decision, present)
    for device in (0, 2):
        for name, tensor in state.devices[device].items():
            assert torch.isfinite(tensor).all()
            if name.startswith("lora."):
                torch.testing.assert_close(tensor, well.devices[device][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_measured_upload_is_the_payload_of_the_cost_model(
    scenario: Scenario, tmp_path: Path, dtype: str
) -> None:
    sent = changed(scenario, {"upload_dtype": dtype, "head": "shared"}, {})
    evaluator = FederatedEvaluator(sent, tmp_path)
    schedule = Schedule.parse("1x2:fpa 1x0:aaa 1x2:fff", devices=3)
    rounds = evaluator.train(schedule).rounds
    payload = CostModel(sent, evaluator.workload).demand(schedule).payload_bit
    assert [list(entry.uplink_bit) for entry in rounds] == payload.tolist()


def test_a_perplexity_beyond_floating_point_is_infinite(
    pretraining: Scenario, tmp_path: Path
) -> None:
    """It was an OverflowError, which ended the search."""
    evaluator = FederatedEvaluator(pretraining, tmp_path)
    backbone = evaluator.material.backbone
    with torch.no_grad():
        backbone.ends._base.norm.weight *= 1e4  # a model that is very sure
    passes = Passes(backbone, [0], Stack([{}], [1.0]))
    found = stage_of(evaluator).measures(evaluator.material.shards[0].test, passes)
    assert found["perplexity"] == math.inf
    assert 0 <= found["accuracy"] <= 1


def test_in_a_single_token_there_is_nothing_to_learn(pretraining: Scenario, tmp_path: Path) -> None:
    """It was 0 / 0, which made the device diverge; tokenizers without a start token give such texts."""
    backbone = FederatedEvaluator(pretraining, tmp_path).material.backbone
    ids = np.array([2045, 3899, 2003, 2829, 2045])
    stage = Causal(
        backbone, Tokens(ids=ids, offsets=np.array([0, 4, 5]), pad_id=0), np.ones(2, dtype=int)
    )
    passes = Passes(backbone, [0], Stack([{}], [1.0]))
    both, first = np.array([0, 1]), np.array([0])
    (loss,) = stage.losses([both], passes)
    assert float(loss.each[1]) == 0.0
    assert loss.each[:1].item() == pytest.approx(next(stage.losses([first], passes)).each.item())
    assert stage.measures(both, passes) == pytest.approx(stage.measures(first, passes))


def test_texts_of_single_words_by_a_tokenizer_that_adds_nothing(
    pretraining: Scenario, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "decoder", tmp_path / "decoder")
    source = tmp_path / "decoder" / "tokenizer.json"
    parts = json.loads(source.read_text()) | {"post_processor": None}
    source.write_text(json.dumps(parts))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(source), unk_token="[UNK]", pad_token="[PAD]", eos_token="[SEP]"
    )
    tokenizer.save_pretrained(tmp_path / "decoder")
    table = tmp_path / "texts.csv"
    data = replace(pretraining.data, source="file", path="texts.csv")
    scenario = replace(pretraining, folder=str(tmp_path), data=data)
    table.write_text("\n".join(["text", *map(str, range(90))]))  # each number is a token
    with pytest.raises(
        DataError, match=r"got none in train of device 0 \(data\.train_per_device\)"
    ):
        FederatedEvaluator(scenario, tmp_path / "x")
    table.write_text("\n".join(["text", *(f"{n}\n{n} of {n}" for n in range(45))]))
    evaluator = FederatedEvaluator(scenario, tmp_path / "x")
    assert set(stage_of(evaluator).tokens.lengths) == {1, 3}
    done = evaluator.train(Schedule.parse("3x2:fpa", devices=3))
    assert done.status == "done", done.reason
    assert not done.rounds[-1].diverged


LEFTOVERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "adapters and LoRA": ({}, {}, "2x2:fpa"),
    "unequal ranks, flora": ({}, {"lora": "flora"}, "2x2,4,4:faa"),
    "rsLoRA, fedex": ({"lora_scaling": "rslora", "common_lora_rank": 3}, {"lora": "fedex"}, "2x4:paa"),
    "nothing": ({}, {}, "1x0:fff"),
}  # fmt: skip


@pytest.mark.on_cpu
@pytest.mark.parametrize("case", LEFTOVERS)
def test_a_saved_model_says_the_same_with_plain_peft(
    instruction: Scenario, tmp_path: Path, case: str
) -> None:
    """Logits, and the likeliest answers token by token, by transformers' own ``generate``."""
    peft, table, text = LEFTOVERS[case]
    scenario = changed(instruction, peft, table, text)
    # Large steps, or the answers of a random model are the same whatever was learned.
    scenario = replace(scenario, training=replace(scenario.training, learning_rate=0.05))
    evaluator = FederatedEvaluator(scenario, tmp_path / "checkpoints")
    schedule = Schedule.parse(text, devices=3)
    state, _ = evaluator._trained(schedule)
    stage, backbone = stage_of(evaluator), evaluator.material.backbone
    source = evaluator.material.source
    for device, blocks in enumerate(state.devices):
        folder = tmp_path / f"device{device}"
        evaluator.save_device(schedule, device, folder)
        model = AutoModelForCausalLM.from_pretrained(source)
        model = PeftModel.from_pretrained(model, folder / "lora").merge_and_unload()
        model = PeftModel.from_pretrained(model, folder / "bottleneck").eval()
        scales = [evaluator.trainer._scale(schedule.rounds[-1].ranks[device])]
        stack = Stack([blocks], scales, common_scale=evaluator.trainer._common_scale)
        test = evaluator.material.shards[device].test
        prompts = [row(stage.tokens, i)[:, : stage._starts[i]] for i in test]
        asked = Tokens(
            ids=torch.cat(prompts, 1)[0].numpy(),
            offsets=np.cumsum([0, *stage._starts[test]]),
            pad_id=0,
        )
        answers = generate(backbone, stack, asked, [np.arange(len(test))], longest=6, stop=102)
        with torch.inference_mode():
            for i, prompt, answer in zip(test, prompts, answers, strict=True):
                packed = Packed.of(stage.tokens, [np.array([i])])
                hidden = backbone.run(packed, stack, backbone.embed(packed))
                logits = model(input_ids=row(stage.tokens, i)).logits[0]
                torch.testing.assert_close(logits, backbone.tokens(hidden), rtol=2e-5, atol=2e-5)
                said = model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=6,
                    do_sample=False,
                    eos_token_id=102,
                    pad_token_id=0,
                )
                assert said[0, prompt.shape[1] :].tolist() == answer.tolist()
