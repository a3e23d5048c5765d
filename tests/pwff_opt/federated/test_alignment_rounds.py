"""Rounds of alignment against plain transformers and peft, and under hard circumstances."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_language import (
    answer_logs,
    assert_equals_plain,
    distances,
    plain_device,
    row,
    save_decoder,
)
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from pwff_opt.errors import ModelError
from pwff_opt.federated.exchange.exchange import Exchange
from pwff_opt.federated.learning import alignment as aligning
from pwff_opt.federated.learning.alignment import Aligned
from pwff_opt.federated.learning.rewards import Pairs, Reader, RewardModel
from pwff_opt.federated.model import products
from pwff_opt.federated.model.backbone import Backbone, Stack
from pwff_opt.federated.model.features import Features, Level
from pwff_opt.federated.model.layers import Ends
from pwff_opt.federated.model.passes import Passes
from pwff_opt.federated.model.workers import one_thread_each
from pwff_opt.federated.text.tokens import Tokens
from pwff_opt.federated.training.evaluator import FederatedEvaluator
from pwff_opt.planning.demand import CostModel
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.participation import participants
from pwff_opt.scenario.schedule import Schedule

PEOPLE = [
    "nurse",
    "teacher",
    "driver",
    "farmer",
    "baker",
    "pilot",
    "lawyer",
    "cook",
    "judge",
    "poet",
]
PLACES = ["town", "village", "harbour", "forest", "market", "school"]
HELPFULNESS = (1.0, 0.4, 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model; pairs of either axis about prompts of their own, answers in several pairs."""
    folder = tmp_path_factory.mktemp("rounds")
    save_decoder(folder / "decoder")
    rows = ["prompt,chosen,rejected,axis"]
    for person in PEOPLE:
        for place in PLACES:
            asked = f"Where is the {person} of the {place}?"
            told = f"Tell of the {place} and its {person}."
            rows.append(f"{asked},At home.,Stones are heavy.,helpfulness")
            rows.append(f"{asked},At home in the {place}.,Stones are heavy.,helpfulness")
            rows.append(f"{told},The {person} was kind.,The {person} was cruel to us.,safety")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def scenario(
    small: Scenario,
    folder: Path,
    small_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> Scenario:
    # Reward models are trained once for all tests of this session.
    monkeypatch.setenv("PWFF_DATA", str(tmp_path_factory.getbasetemp() / "rounds-data"))
    return replace(
        small,
        folder=str(folder),
        model=replace(small.model, source="decoder", pooling="model", max_tokens=40),
        data=replace(
            small.data,
            source="file",
            path="pairs.csv",
            train_per_device=5,
            validation_per_device=2,
            test_per_device=2,
        ),
        devices=tuple(
            replace(device, helpfulness=share)
            for device, share in zip(small.devices, HELPFULNESS, strict=True)
        ),
        training=replace(
            small.training, stage="alignment", local_steps=2, batch_size=2, validate_after=(3,)
        ),
        alignment=replace(
            small.alignment,
            optimiser="dpo",
            reconcile="weighted",
            kl=0.4,
            answer_tokens=5,
            answers=3,
            reward_model=str(small_model),
            reward_steps=3,
        ),
    )


def variant(scenario: Scenario, **alignment: Any) -> Scenario:
    return replace(scenario, alignment=replace(scenario.alignment, **alignment))


def stage_of(evaluator: FederatedEvaluator) -> Aligned:
    assert isinstance(evaluator.material.stage, Aligned)
    return evaluator.material.stage


def plain_loss(
    scenario: Scenario, evaluator: FederatedEvaluator
) -> Callable[[Any, int, Sequence[int]], torch.Tensor]:
    """Return the loss of both axes' pairs, DPO's or MODPO's, as the device's user weighs them."""
    held, settings = stage_of(evaluator)._dialogues, scenario.alignment

    @cache
    def reference(sequence: int, dtype: torch.dtype) -> torch.Tensor:
        with torch.no_grad():
            return answer_logs(base(dtype), row(held.tokens, sequence), int(held.starts[sequence]))

    @cache
    def base(dtype: torch.dtype) -> Any:
        source = evaluator.material.source
        return AutoModelForCausalLM.from_pretrained(source).to(dtype).eval()

    def loss(model: Any, device: int, batch: Sequence[int]) -> torch.Tensor:
        share, total = scenario.devices[device].helpfulness, torch.zeros(())
        for axis, wish in enumerate((share, 1 - share)):
            for example in batch:
                pair = held.pairs[example, axis]
                both = int(held.chosen[pair]), int(held.rejected[pair])
                assert held.prompt_of[both[0]] == held.prompt_of[both[1]]
                better, worse = (
                    answer_logs(model, row(held.tokens, s), int(held.starts[s]))
                    - reference(s, model.dtype)
                    for s in both
                )
                odds = settings.kl * (better - worse)
                if settings.optimiser == "modpo":
                    rewards = evaluator.material.rewards[1 - axis].rewards(
                        [held.prompts[held.prompt_of[both[0]]]] * 2, [held.answers[s] for s in both]
                    )
                    odds = (odds - (1 - wish) * (rewards[0] - rewards[1])) / wish
                total = total - wish * functional.logsigmoid(odds) / len(batch)
        return total

    return loss


@pytest.mark.parametrize(
    ("text", "optimiser", "table"),
    [
        ("3x2:fpa", "dpo", {}),
        ("1x4:aaa", "modpo", {"proximal": 0.5}),
        ("2x2,4,4:faa", "dpo", {"lora": "flora"}),
        ("2x2:ffa", "dpo", {"lora": "fedex"}),
    ],
)
def test_equals_plain_peft_one_device_after_another(
    scenario: Scenario, tmp_path: Path, text: str, optimiser: Any, table: dict[str, Any]
) -> None:
    scope: Any = "per_device" if "," in text else "common"
    users = HELPFULNESS if optimiser == "dpo" else (0.7, 0.4, 0.1)
    scenario = replace(
        scenario,
        alignment=replace(scenario.alignment, optimiser=optimiser),
        decisions=replace(scenario.decisions, rank_scope=scope),
        aggregation=replace(scenario.aggregation, **table),
        devices=tuple(
            replace(device, helpfulness=share)
            for device, share in zip(scenario.devices, users, strict=True)
        ),
    )
    evaluator = FederatedEvaluator(scenario, tmp_path)
    schedule = Schedule.parse(text, devices=3)
    ours = assert_equals_plain(scenario, evaluator, schedule, plain_loss(scenario, evaluator))
    deltas = {name for own in ours.devices for name in own if name.startswith("delta.")}
    assert bool(deltas) == (table.get("lora") in ("flora", "fedex"))


def test_the_reference_is_the_frozen_model_also_in_a_later_session(
    scenario: Scenario, tmp_path: Path
) -> None:
    """What is asked for first when blocks and deltas are there already is not theirs."""
    changed = replace(scenario, aggregation=replace(scenario.aggregation, lora="flora"))
    schedule = Schedule.parse("2x2:faa", devices=3)
    FederatedEvaluator(changed, tmp_path).train(schedule)
    evaluator = FederatedEvaluator(changed, tmp_path)
    stage: Any = evaluator.material.stage
    passes, sequences = (
        evaluator.model(schedule, 1),
        stage.sequences(evaluator.material.shards[1].train),
    )
    assert any(name.startswith("delta.") for name in passes.stack._names)
    assert stage._references.log_probability.isnan().all()
    frozen, _ = plain_device(scenario, {}, 0)
    held = stage._dialogues
    with torch.no_grad():
        expected = [
            answer_logs(frozen, row(held.tokens, s), int(held.starts[s])) for s in sequences
        ]
    torch.testing.assert_close(stage._referred(sequences, passes), torch.stack(expected))


@pytest.mark.on_cpu
@pytest.mark.parametrize("seed", [1, 5])
@pytest.mark.parametrize("text", ["1x2:ppp", "1x2:fpp", "1x2:ppp 1x2:ffp"])
def test_sampled_answers_are_learned_from_as_torch_alone_would(
    scenario: Scenario, tmp_path: Path, seed: int, text: str
) -> None:
    """The weighted sum of both losses, one backward pass and torch's AdamW; losses have a test by hand.

    With another seed the evaluator shares model, data and rewards, and draws other answers. What is below
    the layers that learn is remembered from one update to the next, whether blocks act there or not.
    """
    evaluator = FederatedEvaluator(variant(scenario, optimiser="grpo", updates=2), tmp_path)
    evaluator = evaluator.with_seed(seed)
    trainer, stage = evaluator.trainer, stage_of(evaluator)
    schedule = Schedule.parse(text, devices=3)
    number, decision, present = len(schedule) - 1, schedule.rounds[-1], schedule.present[-1]
    start = trainer.initial()
    for before in range(number):
        start, _ = trainer.round(start, before, schedule.rounds[before], schedule.present[before])
    ours, _ = trainer.round(start, number, decision, present)
    for device, helpfulness in enumerate(HELPFULNESS):
        own = trainer._prepared(start.devices[device], 2, present, number, device)
        exchange = Exchange(scenario, number, decision)
        own = {n: t.clone().requires_grad_(exchange.learns(n)) for n, t in own.items()}
        passes = Passes(evaluator.material.backbone, [device], Stack([own], [2.0]))
        learning = [tensor for tensor in own.values() if tensor.requires_grad]
        assert 0 < len(learning) == (len(own) if number == 0 else len(own) // 3)
        optimiser = torch.optim.AdamW(learning, lr=0.01, weight_decay=0.01)
        with one_thread_each():  # as the trainer: a product split over two threads rounds otherwise
            for step, batch in enumerate(trainer.batches(number, device)):
                lesson, ready = stage.lesson([batch], passes, seed=seed, round=number, step=step)
                for _ in range(2):
                    help_loss, safe_loss = (
                        loss.each.sum() / 2 for loss in lesson.losses(ready, passes)
                    )
                    optimiser.zero_grad()
                    (helpfulness * help_loss + (1 - helpfulness) * safe_loss).backward()
                    optimiser.step()
        learned = {name: tensor.detach() for name, tensor in own.items()}
        assert max(distances(ours.devices[device], learned).values()) <= 1e-4


@pytest.mark.parametrize(
    ("alignment", "again"),
    [({"optimiser": "dpo"}, 2 / 3), ({"optimiser": "grpo", "reconcile": "mgda"}, 1.0)],
)
def test_local_steps_take_the_flops_of_the_cost_model(
    scenario: Scenario,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    alignment: dict[str, Any],
    again: float,
) -> None:
    """Counted by torch, which sees no product of oneDNN; all data are drawn, so means are exact.

    Rows that fill up are our machine's affair, and left out. Attention is padded here, which the plan's
    is not. A second time the reference's passes over pairs, a third of a forward pass with two for
    backward, are known.
    """
    monkeypatch.setattr(products, "_ONEDNN", False)
    monkeypatch.setattr(products, "ROWS", 1)
    scenario = replace(
        variant(scenario, **alignment), data=replace(scenario.data, train_per_device=4)
    )
    evaluator = FederatedEvaluator(scenario, tmp_path)
    trainer, schedule = evaluator.trainer, Schedule.parse("1x2:aaa", devices=3)
    (decision,) = schedule.rounds
    before = [trainer._prepared({}, 2, (True,) * 3, 0, device) for device in range(3)]
    work = CostModel(scenario, evaluator.workload).demand(schedule).work_cycles[0]
    planned = work[1] * scenario.devices[1].flops_per_cycle
    found = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            trainer._local_steps(
                {1: trainer.batches(0, 1)}, before, decision, Exchange(scenario, 0, decision), 0
            )
        found.append(counter.get_total_flops() / planned)
    assert found == pytest.approx([1.0, again], rel=0.015)


@pytest.mark.parametrize("optimiser", ["dpo", "grpo"])
def test_where_all_is_frozen_nothing_is_learned(
    scenario: Scenario, tmp_path: Path, optimiser: str
) -> None:
    done = FederatedEvaluator(variant(scenario, optimiser=optimiser), tmp_path).train(
        Schedule.parse("3x2:fff", devices=3)
    )
    assert done.status == "done", done.reason
    assert done.rounds[-1].accuracy == pytest.approx((0.5,) * 3)
    assert done.rounds[-1].notes["conflict"] == done.rounds[-1].notes["stationarity"] == (0.0,) * 3
    if optimiser == "dpo":
        assert done.rounds[-1].loss == pytest.approx((math.log(2),) * 3, rel=1e-5)


@pytest.mark.parametrize(
    ("optimiser", "reconcile", "table"),
    [
        ("dpo", "mgda", {"clip_norm": 0.1, "noise_multiplier": 0.5, "proximal": 1e-3}),
        ("grpo", "weighted", {"clip_norm": 0.1, "noise_multiplier": 0.5, "proximal": 1e-3}),
        ("dpo", "weighted", {"devices_per_round": 2, "lora": "fedit"}),
        ("grpo", "mgda", {"devices_per_round": 2, "lora": "fedit"}),
    ],
)
def test_users_of_one_wish_and_few_of_them(
    scenario: Scenario, tmp_path: Path, optimiser: str, reconcile: str, table: dict[str, Any]
) -> None:
    """Weights 0 and 1; clipped and noisy, or with a device that is not there."""
    scenario = replace(
        variant(scenario, optimiser=optimiser, reconcile=reconcile),
        aggregation=replace(scenario.aggregation, **table),
    )
    evaluator = FederatedEvaluator(scenario, tmp_path)
    schedule = Schedule.parse("3x2:fpa", devices=3)
    done = evaluator.train(schedule)
    assert done.status == "done", done.reason
    planned = CostModel(scenario, evaluator.workload).demand(schedule).payload_bit
    for number, entry in enumerate(done.rounds):
        here = participants(scenario, number)
        assert [not math.isnan(loss) for loss in entry.loss] == list(here)
        assert [not math.isnan(cosine) for cosine in entry.notes["conflict"]] == list(here)
        assert entry.uplink_bit == tuple(planned[number].tolist())
        if reconcile == "weighted":
            expected = [
                share if k else math.nan for share, k in zip(HELPFULNESS, here, strict=True)
            ]
            np.testing.assert_allclose(entry.notes["weight"], expected, rtol=1e-6)
    assert not done.rounds[-1].diverged


def test_one_device_alone(scenario: Scenario, tmp_path: Path) -> None:
    alone = replace(variant(scenario, optimiser="grpo"), devices=scenario.devices[1:2])
    done = FederatedEvaluator(alone, tmp_path).train(Schedule.parse("3x2:fpa", devices=1))
    assert done.status == "done", done.reason
    assert len(done.rounds[-1].accuracy) == 1


def test_answers_that_say_nothing(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that end at once are all alike: nothing to learn but to stay with the reference."""

    def silent(_backbone: Any, _stack: Any, _prompts: Any, batches: Any, **how: Any) -> Any:
        return [np.array([how["stop"]])] * sum(map(len, batches))

    monkeypatch.setattr(aligning, "generate", silent)
    evaluator = FederatedEvaluator(variant(scenario, optimiser="grpo", updates=1), tmp_path)
    done = evaluator.train(Schedule.parse("3x2:fpa", devices=3))
    assert done.status == "done", done.reason
    assert done.rounds[0].loss == pytest.approx((0.0,) * 3, abs=1e-6)
    assert done.rounds[-1].accuracy == (0.5,) * 3


def test_prompts_longer_than_the_window(scenario: Scenario, tmp_path: Path) -> None:
    tight = replace(scenario, model=replace(scenario.model, max_tokens=8))
    for optimiser in ("dpo", "grpo"):
        evaluator = FederatedEvaluator(variant(tight, optimiser=optimiser), tmp_path / optimiser)
        held = stage_of(evaluator)._dialogues
        assert held.tokens.lengths.max() == held.prompt_tokens.lengths.max() == 8
        assert (held.tokens.lengths > held.starts).all()
        done = evaluator.train(Schedule.parse("3x2:fpa", devices=3))
        assert done.status == "done", done.reason
        assert "cut the beginning of" in " ".join(evaluator.summary.notes)


def test_memory_that_ends_at_a_second_step_on_the_same_answers(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Ratios are to the policy that drew the answers, also in mini-batches that are cut only then."""
    scenario = variant(scenario, optimiser="grpo", updates=3, clip=0.01, kl=0.01)
    (decision,) = Schedule.parse("1x2:aaa", devices=3).rounds
    present, through = (True,) * 3, Backbone.run
    trainers = [FederatedEvaluator(scenario, tmp_path / name, workers=1).trainer for name in "ab"]
    expected, _ = trainers[0].round(trainers[0].initial(), 0, decision, present)
    passes = []

    def short_of_memory(self: Backbone, packed: Any, *rest: Any, **how: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            passes.append(packed)
            if len(passes) == 2:
                torch.empty(10**15)  # what torch itself says when memory runs out
        return through(self, packed, *rest, **how)

    monkeypatch.setattr(Backbone, "run", short_of_memory)
    cut, _ = trainers[1].round(trainers[1].initial(), 0, decision, present)
    assert "mini-batches are now cut into 2" in caplog.text
    for own, other in zip(cut.devices, expected.devices, strict=True):
        assert max(distances(own, other).values()) <= 1e-4  # it was 3e-1


def test_mini_batches_of_one_ask_about_both_axes(scenario: Scenario, tmp_path: Path) -> None:
    evaluator = FederatedEvaluator(variant(scenario, optimiser="grpo"), tmp_path)
    stage, passes = (
        stage_of(evaluator),
        Passes(evaluator.material.backbone, [0], Stack([{}], [1.0])),
    )
    example = evaluator.material.shards[0].train[:1]
    firsts = set()
    for number in range(2):
        lesson, _ = stage.lesson([example], passes, seed=1, round=number, step=0)
        firsts.add(tuple(lesson.tokens.ids[: lesson._starts[0]]))  # type: ignore[attr-defined]
    assert len(firsts) == 2


def test_a_tokenizer_without_an_end_token(scenario: Scenario, folder: Path, tmp_path: Path) -> None:
    """Answers end with the separator, in sampling as in what is learned; it was a TypeError."""
    shutil.copytree(folder / "decoder", tmp_path / "decoder")
    shutil.copy(folder / "pairs.csv", tmp_path)
    path = tmp_path / "decoder" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["eos_token"]
    path.write_text(json.dumps(settings))
    stage = stage_of(FederatedEvaluator(replace(scenario, folder=str(tmp_path)), tmp_path / "x"))
    assert stage._tokenizer.eos_token_id is None
    held = stage._dialogues
    assert (held.tokens.ids[held.tokens.offsets[1:] - 1] == stage._stop).all()


def test_answers_beyond_an_attention_window_are_refused(
    scenario: Scenario, folder: Path, tmp_path: Path
) -> None:
    """Pairs fit into the window, but the answers by which models are measured come after whole prompts."""
    shutil.copytree(folder / "decoder", tmp_path / "decoder")
    shutil.copy(folder / "pairs.csv", tmp_path)
    path = tmp_path / "decoder" / "config.json"
    config = json.loads(path.read_text())
    config |= {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 42,
    }
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"attention window \(42\), unless .*; got 45"):
        FederatedEvaluator(replace(scenario, folder=str(tmp_path)), tmp_path / "x")


def test_another_model_in_the_same_place_is_another_reader(
    small_model: Path, tmp_path: Path
) -> None:
    """Its folder may have the same name; the reward model of the older one is not taken."""
    for name in "ab":
        shutil.copytree(small_model, tmp_path / name / "encoder")
    torch.manual_seed(6)
    config = BertConfig.from_pretrained(small_model)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "b" / "encoder")
    pairs = Pairs(prompts=("Who?", "Where?"), chosen=("I.", "Here."), rejected=("a", "b"))
    first, copied, second = (
        RewardModel.of(
            Reader(str(source)), pairs, pairs, pairs, steps=1, seed=1, folder=tmp_path / "rewards"
        )
        for source in (tmp_path / "a" / "encoder", small_model, tmp_path / "b" / "encoder")
    )
    assert len(list((tmp_path / "rewards").iterdir())) == 2
    assert first.offset == copied.offset != second.offset


def test_a_reward_model_that_gives_no_numbers_is_refused(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Reader(str(small_model))
    pairs = Pairs(prompts=("Who?",), chosen=("I.",), rejected=("a",))
    learned = {
        name: torch.full_like(tensor, torch.nan)
        for name, tensor in reader.learned(pairs, steps=1, seed=1).items()
    }
    monkeypatch.setattr(reader, "learned", lambda *_, **__: learned)
    with pytest.raises(ModelError, match=r"alignment\.reward_model must give finite rewards"):
        RewardModel.of(reader, pairs, pairs, pairs, steps=1, seed=1, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_sequence_is_computed_in_one_company_only(small_model: Path) -> None:
    """Also one that several devices hold, or one device twice: last bits must not hang on who asks first."""
    backbone = Backbone(str(small_model), family="bert", classes=2, pooling="mean", max_tokens=48)
    rng = np.random.default_rng(2)
    lengths = rng.integers(3, 48, 60)
    ids = rng.integers(200, 30000, lengths.sum())
    tokens = Tokens(ids=ids, offsets=np.cumsum([0, *lengths]), pad_id=0)
    parts = [[rng.integers(0, 60, 40)] for _ in range(3)]
    features = Features(backbone, tokens, parts, budget_byte=1e9)
    held = np.unique(np.concatenate([part for (part,) in parts]))
    companies = features.groups(held)
    assert len(companies) > 3
    np.testing.assert_array_equal(np.sort(np.concatenate(companies)), held)
    for device, (part,) in enumerate(parts):
        start = features.start(Level(2), [device], [part], [{}], [1.0], 1.0)
        assert len(start.hidden) == tokens.lengths[part].sum()


def test_the_loss_of_pairs_is_that_of_trl(scenario: Scenario, tmp_path: Path) -> None:
    """By its trainer, with the model's blocks as plain peft has them; only where trl is installed."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    evaluator = FederatedEvaluator(scenario, tmp_path)
    schedule, held = Schedule.parse("2x2:fpa", devices=3), stage_of(evaluator)._dialogues
    state, _ = evaluator._trained(schedule)
    batch, passes = evaluator.material.shards[1].train, evaluator.model(schedule, 1)
    ours = [loss.each.mean().item() for loss in stage_of(evaluator).losses([batch], passes)]
    policy, _ = plain_device(scenario, state.devices[1], 2)
    reference, _ = plain_device(scenario, {}, 0)
    trainer = trl.DPOTrainer(
        model=policy,
        ref_model=reference,
        args=trl.DPOConfig(str(tmp_path / "trl"), beta=0.4, report_to=[], use_cpu=True, bf16=False),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=stage_of(evaluator)._tokenizer,
    )
    for axis in range(2):
        pairs = held.pairs[batch, axis]
        sequences = np.concatenate([held.chosen[pairs], held.rejected[pairs]])
        rows = [row(held.tokens, s)[0] for s in sequences]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        places, starts = torch.arange(ids.shape[1]), torch.from_numpy(held.starts[sequences])
        inside = places < torch.tensor([len(one) for one in rows])[:, None]
        given = {
            "input_ids": ids,
            "attention_mask": inside.long(),
            "completion_mask": (inside & (places >= starts[:, None])).long(),
        }
        with torch.no_grad():
            theirs = float(trainer.compute_loss(trainer.model, given))
        assert ours[axis] == pytest.approx(theirs, rel=1e-5)
        assert abs(theirs - math.log(2)) > 1e-3


@pytest.mark.parametrize(("text", "times"), [("1x2:ffp", 1), ("1x2:ppp 1x2:ffp", 2)])
def test_frozen_layers_read_a_sampled_answer_once(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, times: int
) -> None:
    """For all updates and the reference; where blocks act below, that is another model there."""
    evaluator = FederatedEvaluator(variant(scenario, optimiser="grpo"), tmp_path)
    schedule = Schedule.parse(text, devices=3)
    evaluator.train(schedule)
    passes, stage = evaluator.model(schedule, 0), stage_of(evaluator)
    batch = evaluator.material.shards[0].train[:2]
    lesson, ready = stage.lesson([batch], passes, seed=1, round=0, step=0)
    tokens: Tokens = lesson.tokens  # type: ignore[attr-defined]
    plain = Passes(passes.backbone, passes.devices, passes.stack)
    expected = [plain.own(tokens, ready)[1], plain.base(tokens, ready[0])[1]]
    embedded = []
    through = Ends.embed
    monkeypatch.setattr(Ends, "embed", lambda *own: embedded.append(1) or through(*own))
    for _ in range(3):
        assert torch.equal(passes.own(tokens, ready)[1], expected[0])
    assert torch.equal(passes.base(tokens, ready[0])[1], expected[1])
    assert len(embedded) == times
