"""A saved device model, loaded by plain transformers and peft, scores what was reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pwff_opt.data.corpora import load_corpus
from pwff_opt.data.models import model_source, portable_name
from pwff_opt.data.partition import partition
from pwff_opt.errors import DataError, DecisionError, InfeasibleError, ModelError
from pwff_opt.federated.export import export
from pwff_opt.federated.export.export import load_device_model
from pwff_opt.federated.model.adapters import pool_by_mean
from pwff_opt.federated.model.backbone import Stack
from pwff_opt.federated.model.blocks import lora_scale
from pwff_opt.federated.text.tokens import Packed
from pwff_opt.federated.training.checkpoint import checkpoint_path, load_checkpoint
from pwff_opt.federated.training.evaluator import FederatedEvaluator
from pwff_opt.runs.identity import learning_key
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.schedule import Schedule


@pytest.mark.parametrize("text", ["3x4:fap", "3x0:paf", "3x0:fff", "1x2:ffa 2x4:paa"])
@pytest.mark.parametrize("pooling", ["mean", "model"])
def test_loads_with_plain_transformers_and_peft(
    small: Scenario, tmp_path: Path, text: str, pooling: Any
) -> None:
    scenario = replace(small, model=replace(small.model, pooling=pooling))
    evaluator = FederatedEvaluator(scenario, tmp_path / "checkpoints")
    schedule = Schedule.parse(text, devices=3)
    reported = evaluator.test(schedule)
    # The device's sentences, found again without the evaluator.
    corpus = load_corpus(scenario.data, folder=Path())
    shards = partition(corpus, scenario.data, devices=3, seed=scenario.seeds.data)
    tokenizer = AutoTokenizer.from_pretrained(scenario.model.source)
    for device in range(3):
        folder = tmp_path / f"device{device}"
        evaluator.save_device(schedule, device, folder)
        for part in ("lora", "bottleneck"):
            assert (folder / part / "adapter_model.safetensors").is_file()
        assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
        model = AutoModelForSequenceClassification.from_pretrained(
            scenario.model.source, num_labels=3, ignore_mismatched_sizes=True
        )
        if pooling == "mean":
            pool_by_mean(model)
        model = PeftModel.from_pretrained(model, folder / "lora").merge_and_unload()
        model = PeftModel.from_pretrained(model, folder / "bottleneck").eval()
        test = shards[device].test
        batch = tokenizer(
            [corpus.texts[i] for i in test],
            truncation=True,
            max_length=scenario.model.max_tokens,
            padding=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            logits = model(**batch).logits
            ours = load_device_model(folder)(**batch).logits
        torch.testing.assert_close(logits, ours)
        right = (logits.argmax(-1) == torch.from_numpy(corpus.labels[test])).double().mean()
        assert right.item() == pytest.approx(reported[device])
        with model.disable_adapter(), torch.inference_mode():
            without = model(**batch).logits
        trained = any(decision.trained != (False,) * 3 for decision in schedule.rounds)
        assert torch.allclose(without, logits, atol=1e-4) != trained


# What a device may be left with: peft, aggregation, schedule, and the kinds of its blocks.
LEFTOVERS: dict[str, tuple[dict[str, Any], dict[str, Any], str, set[str]]] = {
    "common LoRA": ({"common_lora_rank": 3}, {}, "2x2:fpa", {"adapter", "common", "lora"}),
    "common LoRA alone": ({"common_lora_rank": 3}, {}, "2x0:fpa", {"adapter", "common"}),
    "flora": ({}, {"lora": "flora"}, "2x4:faa", {"adapter", "delta", "lora"}),
    "fedex": ({}, {"lora": "fedex"}, "2x4:fpa", {"adapter", "delta", "lora"}),
    "LoRA given up": ({}, {"lora": "flora"}, "1x4:faa 1x0:fpa", {"adapter", "delta"}),
    "ranks change": ({"lora_scaling": "rslora"}, {}, "1x2:ffp 1x4:paf", {"adapter", "lora"}),
    "rsLoRA": (
        {"lora_scaling": "rslora", "common_lora_rank": 3},
        {"lora": "fedex"},
        "2x4:paa",
        {"adapter", "common", "delta", "lora"},
    ),
    "no adapters": ({"adapter_width": 0}, {}, "2x4:fpa", {"lora"}),
    "only a head": ({"adapter_width": 0}, {}, "2x0:fpa", set()),
}


@pytest.mark.on_cpu
@pytest.mark.parametrize("case", LEFTOVERS)
@pytest.mark.parametrize("family", ["small", "llama"])
def test_whatever_training_leaves_loads_with_plain_peft(
    family: str, case: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    peft, aggregation, text, kinds = LEFTOVERS[case]
    scenario: Scenario = request.getfixturevalue(family)
    scenario = replace(
        scenario,
        peft=replace(scenario.peft, **peft),
        aggregation=replace(scenario.aggregation, **aggregation),
    )
    evaluator = FederatedEvaluator(scenario, tmp_path / "checkpoints")
    schedule = Schedule.parse(text, devices=3)
    reported = evaluator.test(schedule)
    key = learning_key(scenario, schedule)
    loaded = load_checkpoint(checkpoint_path(tmp_path / "checkpoints", key))
    assert loaded is not None
    rank, common = schedule.rounds[-1].ranks[0], scenario.peft.common_lora_rank
    for device, blocks in enumerate(loaded[0].devices):
        assert {name.split(".")[0] for name in blocks} == kinds | {"head"}
        assert all(tensor.any() for name, tensor in blocks.items() if name.startswith("delta."))
        folder = tmp_path / f"device{device}"
        evaluator.save_device(schedule, device, folder)
        model = AutoModelForSequenceClassification.from_pretrained(
            scenario.model.source, num_labels=3, ignore_mismatched_sizes=True
        )
        model.config.pad_token_id = evaluator.material.stage.tokens.pad_id
        if scenario.model.pooling == "mean":
            pool_by_mean(model)
        model = PeftModel.from_pretrained(model, folder / "lora").merge_and_unload()
        model = PeftModel.from_pretrained(model, folder / "bottleneck").eval()
        test = evaluator.material.shards[device].test
        packed = Packed.of(evaluator.material.stage.tokens, [test])
        stack = Stack(
            [blocks],
            [lora_scale(scenario.peft, rank) if rank else 1.0],
            common_scale=lora_scale(scenario.peft, common) if common else 1.0,
        )
        mask = torch.arange(packed.width) < packed.lengths[:, None]
        ids = packed.ids[packed.slots].view(mask.shape)
        ids = ids.masked_fill(~mask, evaluator.material.stage.tokens.pad_id)
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask.long()).logits
            expected = evaluator.material.backbone.logits(
                packed, stack, evaluator.material.backbone.embed(packed)
            )
        torch.testing.assert_close(logits, expected.cpu(), atol=2e-5, rtol=2e-5)
        right = logits.argmax(-1) == torch.from_numpy(evaluator.material.labels[test])
        assert right.double().mean().item() == pytest.approx(reported[device])


def test_bad_requests_are_refused(small: Scenario, tmp_path: Path) -> None:
    evaluator = FederatedEvaluator(small, tmp_path)
    with pytest.raises(DataError, match=r"device must be in 0\.\.2, got 3"):
        evaluator.save_device(Schedule.parse("1x0:fff", devices=3), 3, tmp_path / "x")
    with pytest.raises(ModelError, match="must hold a device model"):
        load_device_model(tmp_path / "none")
    mine = tmp_path / "mine"
    for name in ("lora", "thesis"):
        (mine / name).mkdir(parents=True)
        (mine / name / "notes.txt").write_text("mine")
    for place, message in (
        (mine, "must be new, empty or the folder of an older export"),
        (mine / "lora" / "notes.txt", "must be a folder that can be written"),
    ):
        with pytest.raises(ModelError, match=message):
            evaluator.save_device("1x0:fff", 0, place)
    assert sorted(path.name for path in mine.rglob("*.*")) == ["notes.txt", "notes.txt"]
    lost = replace(small, model=replace(small.model, source=str(tmp_path / "no-model")))
    with pytest.raises(ModelError, match="no-model"):
        FederatedEvaluator(lost, tmp_path)


def test_what_cannot_be_trained_is_an_error_and_no_evaluation(
    small: Scenario, tmp_path: Path
) -> None:
    averaged = replace(small, aggregation=replace(small.aggregation, lora="fedit"))
    evaluator = FederatedEvaluator(averaged, tmp_path / "a")
    assert evaluator.train("1x2:ffa").schedule == Schedule.parse("1x2:ffa", devices=3)
    for text, message in {
        "4x2:ffa": r"at most training.rounds \(3\) rounds, got 4",
        "3x4,2,4:ffa": "ranks must be common to all devices for aggregation.lora 'fedit'",
        "3x2:ffaa": "must give 3 layers a state, got 4",
    }.items():
        with pytest.raises(DecisionError, match=message):
            evaluator.train(text)
    with pytest.raises(DecisionError, match="must be a Schedule or its text, got 7"):
        evaluator.train(7)  # type: ignore[arg-type]
    need = float(evaluator._costs.demand(Schedule.parse("3x4:aaa", devices=3)).memory_byte.max())
    devices = (
        small.devices[0],
        replace(small.devices[1], memory_byte=0.9 * need),
        small.devices[2],
    )
    poor = FederatedEvaluator(replace(small, devices=devices), tmp_path / "b", like=evaluator)
    for one in (poor, poor.with_seed(7)):
        for ask in (
            one.train,
            one.test,
            lambda text, it=one: it.save_device(text, 0, tmp_path / "c"),
        ):
            with pytest.raises(
                InfeasibleError, match=rf"devices\[1\]\.memory_byte must be at least {need:.0f} "
            ):
                ask("3x4:aaa")
    assert not (tmp_path / "b").exists()
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("moment", ["_with_bottlenecks", "rename"])
def test_an_export_that_is_killed_leaves_no_mixture(
    small: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """While it computes, the older one stays; while parts are exchanged, nothing loads."""
    evaluator = FederatedEvaluator(small, tmp_path / "checkpoints")
    older, newer = (Schedule.parse(f"{n}x2:faa", devices=3) for n in (1, 2))
    folder = tmp_path / "device"
    evaluator.save_device(older, 0, folder)
    (folder / "notes.txt").write_text("mine")
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    evaluator._trained(newer)
    rename, done = Path.rename, []

    def killed(*arguments: Any) -> Any:
        if moment == "rename" and not done:
            return done.append(rename(*arguments))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((export, moment) if moment.startswith("_") else (Path, moment)), killed)
        with pytest.raises(KeyboardInterrupt):
            evaluator.save_device(newer, 0, folder)
    if moment == "rename":
        with pytest.raises(ModelError, match="must hold a device model"):
            load_device_model(folder)
    else:
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    evaluator.save_device(newer, 0, folder)
    evaluator.save_device(newer, 0, tmp_path / "other")
    for path in (p for p in (tmp_path / "other").rglob("*") if p.is_file()):
        assert (folder / path.relative_to(tmp_path / "other")).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == [
        "bottleneck",
        "device.json",
        "lora",
        "notes.txt",
    ]


def test_a_model_goes_by_a_name_that_holds_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert portable_name("minilm", folder=tmp_path) == "minilm"
    assert portable_name("mine", folder=tmp_path) == str((tmp_path / "mine").resolve())
    assert portable_name("someone/model", folder=tmp_path) == "someone/model"
    for source in ("minilm", "mine"):
        name = portable_name(source, folder=tmp_path)
        assert model_source(name) == str(Path(model_source(source, folder=tmp_path)).resolve())
