"""Masked pre-training of encoders against plain transformers and peft."""

from __future__ import annotations

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
from plain_language import assert_equals_plain, plain_device, row
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM

import pwff_opt.federated.export.peft_bottleneck  # noqa: F401  (peft then knows bottleneck adapters)
from pwff_opt import Planner, Workload
from pwff_opt.costs import masked
from pwff_opt.data.models import model_source
from pwff_opt.errors import ModelError
from pwff_opt.federated.learning import Masked
from pwff_opt.federated.model.backbone import load_language_model
from pwff_opt.federated.text.encoding import MaskedTexts, encode_masked
from pwff_opt.federated.text.tokens import tokenise
from pwff_opt.federated.training.evaluator import FederatedEvaluator
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.schedule import Schedule

MASK = 103


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of three small layers with its head, and MiniLM's tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    AutoTokenizer.from_pretrained(model_source("minilm")).save_pretrained(folder)
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        initializer_range=0.1,
    )
    model = BertForMaskedLM(config)
    with torch.no_grad():  # biases and norms are born as zeros and ones, and would hide an error
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def scenario(small: Scenario, encoder: Path) -> Scenario:
    return replace(
        small,
        model=replace(small.model, source=str(encoder), pooling="model"),
        data=replace(small.data, train_per_device=8, validation_per_device=3, test_per_device=4),
        training=replace(small.training, stage="pretraining"),
    )


def stage_of(evaluator: FederatedEvaluator) -> Masked:
    assert isinstance(evaluator.material.stage, Masked)
    return evaluator.material.stage


def labels(stage: Masked, sequence: int) -> torch.Tensor:
    """Return a text's targets as transformers reads them, [1, token]."""
    start, stop = stage.tokens.offsets[sequence : sequence + 2]
    own = torch.from_numpy(stage._targets[start:stop])[None]
    return own.masked_fill(own < 0, -100)


def masked_loss(evaluator: FederatedEvaluator) -> Callable[[Any, int, Sequence[int]], torch.Tensor]:
    stage = stage_of(evaluator)

    def loss(model: Any, _device: int, batch: Sequence[int]) -> torch.Tensor:
        each = [model(row(stage.tokens, i), labels=labels(stage, i)).loss for i in batch]
        return torch.stack(each).mean()

    return loss


@pytest.mark.parametrize(
    ("text", "peft", "table"),
    [
        ("3x2:fpa", {}, {}),
        ("2x2:aaa", {}, {"lora": "fedit", "proximal": 0.1}),
        ("1x2:paa 1x4:aff", {"lora_scaling": "rslora"}, {"lora": "flora"}),
    ],
)
def test_equals_plain_peft_one_device_after_another(
    scenario: Scenario, tmp_path: Path, text: str, peft: dict[str, Any], table: dict[str, Any]
) -> None:
    changed = replace(
        scenario,
        peft=replace(scenario.peft, **peft),
        aggregation=replace(scenario.aggregation, **table),
    )
    evaluator = FederatedEvaluator(changed, tmp_path)
    schedule = Schedule.parse(text, devices=3)
    ours = assert_equals_plain(changed, evaluator, schedule, masked_loss(evaluator))
    for own in ours.devices:
        assert all(t.any() for name, t in own.items() if name.endswith(("up.weight", "up.bias")))


def test_measures_are_those_of_transformers(scenario: Scenario, tmp_path: Path) -> None:
    evaluator = FederatedEvaluator(scenario, tmp_path)
    schedule = Schedule.parse("2x2:fpa", devices=3)
    state, _ = evaluator._trained(schedule)
    stage = stage_of(evaluator)
    for device, measured in enumerate(evaluator.measures(schedule)):
        model, _ = plain_device(scenario, state.devices[device], 2)
        right, total, count = 0, 0.0, 0
        with torch.no_grad():
            for i in evaluator.material.shards[device].test:
                told, wanted = model(row(stage.tokens, i)).logits[0], labels(stage, i)[0]
                asked = wanted >= 0
                right += int((told.argmax(-1) == wanted)[asked].sum())
                total += float(
                    torch.nn.functional.cross_entropy(told[asked], wanted[asked], reduction="sum")
                )
                count += int(asked.sum())
        assert measured["accuracy"] == right / count
        assert measured["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_costs_are_of_the_masked_tokens(scenario: Scenario, tmp_path: Path) -> None:
    evaluator = FederatedEvaluator(scenario, tmp_path)
    stage = stage_of(evaluator)
    for device, shard in enumerate(evaluator.material.shards):
        asked = [int((labels(stage, i) >= 0).sum()) for i in shard.train]
        assert evaluator.workload.mean_scored_tokens is not None
        assert evaluator.workload.mean_scored_tokens[device] == pytest.approx(np.mean(asked))
        assert stage.learned[shard.train].tolist() == asked


def test_no_bit_hangs_on_the_number_of_workers(scenario: Scenario, tmp_path: Path) -> None:
    schedule = Schedule.parse("2x2:fpa", devices=3)
    one, _ = FederatedEvaluator(scenario, tmp_path / "a", workers=1)._trained(schedule)
    two, _ = FederatedEvaluator(scenario, tmp_path / "b", workers=2)._trained(schedule)
    for own, other in zip(one.devices, two.devices, strict=True):
        assert all(torch.equal(tensor, other[name]) for name, tensor in own.items())


def test_an_encoder_without_its_head_is_refused(scenario: Scenario, tmp_path: Path) -> None:
    headless = replace(scenario, model=replace(scenario.model, source="minilm"))
    message = r"an encoder with its head .* 'pretraining'; 'minilm' has none"
    with pytest.raises(ModelError, match=message):
        FederatedEvaluator(headless, tmp_path)
    with pytest.raises(ModelError, match=message):  # and so without torch
        Planner(headless, Workload.padded(headless))


def test_a_language_model_that_lacks_weights_is_refused(encoder: Path, tmp_path: Path) -> None:
    """They would be drawn anew, and nothing would ever train them."""
    shutil.copytree(encoder, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    kept = {name: t for name, t in load_file(weights).items() if "transform.dense" not in name}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"with its head .* lacks cls\.predictions\.transform\.dense"
    ):
        load_language_model(str(tmp_path / "model"))


def test_pooling_means_nothing_to_a_language_model(scenario: Scenario, tmp_path: Path) -> None:
    """It was refused, by a message that named no key."""
    pooled = replace(scenario, model=replace(scenario.model, pooling="mean"))
    schedule = Schedule.parse("1x2:fpa", devices=3)
    one, other = (
        FederatedEvaluator(own, tmp_path / name).train(schedule)
        for own, name in ((scenario, "a"), (pooled, "b"))
    )
    assert other.status == "done", other.reason
    assert other.rounds == one.rounds


@pytest.mark.parametrize("text", ["2x2:fpa", "1x0:fff"])
def test_a_saved_model_says_the_same_with_plain_peft(
    scenario: Scenario, tmp_path: Path, text: str
) -> None:
    evaluator = FederatedEvaluator(scenario, tmp_path / "checkpoints")
    schedule = Schedule.parse(text, devices=3)
    state, _ = evaluator._trained(schedule)
    stage = stage_of(evaluator)
    for device in range(3):
        folder = tmp_path / f"device{device}"
        evaluator.save_device(schedule, device, folder)
        model = AutoModelForMaskedLM.from_pretrained(evaluator.material.source)
        model = PeftModel.from_pretrained(model, folder / "lora").merge_and_unload()
        model = PeftModel.from_pretrained(model, folder / "bottleneck").eval()
        plain, _ = plain_device(scenario, state.devices[device], 2 if state.devices[device] else 0)
        with torch.inference_mode():
            for i in evaluator.material.shards[device].test:
                ids = row(stage.tokens, i)
                torch.testing.assert_close(
                    model(input_ids=ids).logits, plain(ids).logits, rtol=2e-5, atol=2e-5
                )


# -- which tokens are masked ------------------------------------------------------------------------

WORDS = ["river", "stone", "bread", "winter", "letter", "garden", "silver", "engine"]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = np.random.default_rng(2)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 40))) for _ in range(600)] + [""]


def encoded(texts: list[str], *, seed: int = 1, max_tokens: int = 32) -> MaskedTexts:
    tokenizer = AutoTokenizer.from_pretrained(model_source("minilm"))
    return encode_masked(texts, tokenizer, max_tokens=max_tokens, pad_id=0, seed=seed)


def test_a_share_of_every_text_is_masked(texts: list[str]) -> None:
    found = encoded(texts)
    tokenizer = AutoTokenizer.from_pretrained(model_source("minilm"))
    plain = tokenise(texts, tokenizer, max_tokens=32, pad_id=0)
    assert (found.tokens.offsets == plain.offsets).all()
    inner = plain.lengths - 2  # without [CLS] and [SEP], of which none is ever asked for
    learned = np.add.reduceat((found.targets >= 0).astype(int), plain.offsets[:-1])
    assert learned.tolist() == [masked(int(n)) if n else 0 for n in inner]
    assert found.texts_cut == sum(len(text.split()) > 30 for text in texts)
    asked = found.targets >= 0
    assert (found.targets[asked] == plain.ids[asked]).all()
    assert (found.tokens.ids[~asked] == plain.ids[~asked]).all()
    assert not np.isin(plain.ids[asked], [101, 102]).any()


def test_masks_are_of_three_kinds(texts: list[str]) -> None:
    """80, 10 and 10 % of more than a thousand: within four standard errors."""
    found = encoded(texts)
    asked = found.targets >= 0
    read, was = found.tokens.ids[asked], found.targets[asked]
    assert len(read) > 1000
    shares = [np.mean(read == MASK), np.mean(read == was), np.mean((read != MASK) & (read != was))]
    for share, expected in zip(shares, (0.8, 0.1, 0.1), strict=True):
        assert abs(share - expected) <= 4 * math.sqrt(expected * (1 - expected) / len(read))
    drawn = read[(read != MASK) & (read != was)]
    assert len(set(drawn)) > 0.9 * len(drawn)  # of the whole vocabulary
    assert not np.isin(drawn, [0, 100, 101, 102, 103]).any()


def test_masks_hang_on_the_seed_and_the_place(texts: list[str]) -> None:
    first = encoded(texts)
    assert (encoded(texts).targets == first.targets).all()
    assert (encoded(texts, seed=2).targets != first.targets).any()
    fewer = encoded(texts[:10])  # not on how many come after
    assert (fewer.targets == first.targets[: len(fewer.targets)]).all()


def test_a_tokenizer_without_a_mask_is_refused() -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_source("minilm"))
    tokenizer.mask_token = None
    with pytest.raises(ModelError, match="must have a mask"):
        encode_masked(["a"], tokenizer, max_tokens=8, pad_id=0, seed=1)
