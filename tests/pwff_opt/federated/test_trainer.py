"""The trainer against plain peft, one device after another, and against itself run otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import inject_adapter_in_model

from pwff_opt.costs import Blocks, CostModel, uplink_payload_bit
from pwff_opt.decision import LayerState, Schedule
from pwff_opt.federated.adapters import attach_adapters, pool_by_mean, transformer_layers
from pwff_opt.federated.backbone import load_classifier, lora_config
from pwff_opt.federated.blocks import Tensors, fresh_lora, layer_of, resize_lora
from pwff_opt.federated.evaluator import FederatedEvaluator
from pwff_opt.scenario import Scenario


def close(a: Tensors, b: Tensors) -> None:
    """Relative error of every tensor, in the Euclidean norm (a zero tensor must be zero)."""
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert (tensor - b[name]).norm() <= 1e-5 * b[name].norm(), name


def same(a: list[Tensors], b: list[Tensors]) -> None:
    for own, other in zip(a, b, strict=True):
        assert own.keys() == other.keys()
        for name, tensor in own.items():
            assert torch.equal(tensor, other[name]), name


def plain_device(
    scenario: Scenario, evaluator: FederatedEvaluator, start: Tensors, rank: int, trained: list[int]
) -> tuple[torch.nn.Module, dict[str, torch.nn.Parameter]]:
    """Return an ordinary peft model that holds the tensors of one device, and its parameters by name."""
    model = load_classifier(scenario.model.source, classes=3)
    pool_by_mean(model)
    adapters = attach_adapters(model, scenario.peft.adapter_width)
    if rank:
        inject_adapter_in_model(lora_config("bert", rank, scenario.peft.lora_scale), model)
    model.requires_grad_(False)
    model.eval()
    named: dict[str, torch.nn.Parameter] = {}
    parent, attribute = transformer_layers(model)
    for number, layer in enumerate(getattr(parent, attribute)):
        present = f"adapter.{number}.up.bias" in start
        adapters[number].enabled = present
        for name, parameter in layer.named_parameters():
            if name.startswith("adapter.") and present:
                named[f"adapter.{number}.{name.removeprefix('adapter.')}"] = parameter
            elif ".lora_" in name:
                projection, factor = name.split(".")[2], name.split(".lora_")[1][0]
                if present:
                    named[f"lora.{number}.{projection}.{factor}"] = parameter
                elif factor == "B":
                    assert not parameter.any()
    for part, parameter in model.classifier.named_parameters():
        named[f"head.{part}"] = parameter
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(start[name])
            parameter.requires_grad_(layer_of(name) is None or layer_of(name) in trained)
    return model, named


@pytest.mark.parametrize(
    "text",
    [
        "3x2:aaa",
        "3x4:fpa",
        "3x0:fap",
        "3x0:fff",
        "3x0,2,4:paf",
        "1x2:ffa 2x2:pfa",
        "1x2:aaa 1x4:ffa 1x2:fpf",
    ],
)
@pytest.mark.parametrize("head", ["personal", "shared"])
def test_equals_plain_peft_one_device_after_another(
    small: Scenario, tmp_path: Path, text: str, head: Any
) -> None:
    scenario = replace(small, peft=replace(small.peft, head=head))
    evaluator = FederatedEvaluator(scenario, tmp_path)
    trainer = evaluator.trainer
    schedule = Schedule.parse(text, devices=3)
    states = trainer.initial()
    for number, (decision, present) in enumerate(
        zip(schedule.rounds, schedule.present, strict=True)
    ):
        trained = [n for n, state in enumerate(decision.states) if state is not LayerState.FROZEN]
        expected = []
        for device, state in enumerate(states):
            rank = decision.ranks[device]
            start = trainer._prepared(state, rank, present, number, device)
            model, named = plain_device(scenario, evaluator, start, rank, trained)
            optimiser = torch.optim.AdamW(
                [{"params": [p], "lr": 0.01} for p in named.values() if p.requires_grad],
                weight_decay=scenario.training.weight_decay,
            )
            for batch in trainer.batches(number, device):
                ids, mask, _ = trainer.inputs.batch(batch, 0)
                loss = model(
                    input_ids=ids,
                    attention_mask=mask,
                    labels=torch.from_numpy(evaluator.labels[batch]),
                ).loss
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            expected.append({name: p.detach().clone() for name, p in named.items()})
        for name in expected[0]:
            layer = layer_of(name)
            shared = (
                head == "shared"
                if layer is None
                else (
                    name.startswith("adapter.") and decision.states[layer] is LayerState.AGGREGATED
                )
            )
            if shared:
                mean = torch.stack([device[name] for device in expected]).mean(0)
                for device in expected:
                    device[name] = mean
        states, _ = trainer.round(states, number, decision, present)
        for device in range(3):
            close(states[device], expected[device])


@pytest.fixture
def run(small: Scenario, tmp_path: Path) -> Callable[..., tuple[list[Tensors], Any]]:
    def go(text: str = "1x2:fpa 2x4:paa", **options: Any) -> tuple[list[Tensors], Any]:
        scenario = options.pop("scenario", small)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        evaluator = FederatedEvaluator(scenario, folder, **options)
        return evaluator._trained(Schedule.parse(text, devices=len(scenario.devices)))

    return go


def test_workers_change_nothing(run: Callable[..., Any]) -> None:
    one, three = run(workers=1), run(workers=3)
    same(one[0], three[0])
    assert one[1] == three[1]


def test_the_cache_changes_nothing_but_rounding(small: Scenario, run: Callable[..., Any]) -> None:
    without = replace(small, training=replace(small.training, feature_cache_byte=0.0))
    cached, plain = run("3x2:ffa"), run("3x2:ffa", scenario=without)
    for own, other in zip(cached[0], plain[0], strict=True):
        close(own, other)


def test_another_seed_is_another_training(small: Scenario, run: Callable[..., Any]) -> None:
    other = replace(small, seeds=replace(small.seeds, training=2))
    assert run()[1] != run(scenario=other)[1]
    same(run()[0], run()[0])


def test_goes_on_from_the_last_checkpoint_bit_for_bit(small: Scenario, tmp_path: Path) -> None:
    schedule = Schedule.parse("1x2:fpa 2x4:paa", devices=3)
    whole = FederatedEvaluator(small, tmp_path / "whole")
    expected = whole._trained(schedule)
    assert whole.device_rounds == 9
    FederatedEvaluator(small, tmp_path / "parts")._trained(schedule.prefix(2))
    rest = FederatedEvaluator(small, tmp_path / "parts")
    same(rest._trained(schedule)[0], expected[0])
    assert rest.device_rounds == 3  # the third round only
    other = rest._trained(Schedule.parse("1x2:fpa 2x0:faf", devices=3))
    assert rest.device_rounds == 3 + 6  # the first round is shared
    assert other[1][0] == expected[1][0]
    # A checkpoint cut short counts for nothing: its round is trained again, to the same end.
    newest = max((tmp_path / "parts").iterdir(), key=lambda path: path.stat().st_mtime)
    for path in (tmp_path / "parts").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert newest.stat().st_size == 100
    again = FederatedEvaluator(small, tmp_path / "parts")
    same(again._trained(schedule)[0], expected[0])
    assert again.device_rounds == 9


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("head", ["personal", "shared"])
def test_measured_upload_is_the_payload_of_the_cost_model(
    small: Scenario, tmp_path: Path, dtype: Any, head: Any
) -> None:
    scenario = replace(small, peft=replace(small.peft, upload_dtype=dtype, head=head))
    evaluator = FederatedEvaluator(scenario, tmp_path)
    costs = CostModel(scenario, evaluator.workload)
    schedule = Schedule.parse("1x2:fpa 1x0:aaa 1x2:fff", devices=3)
    rounds = evaluator.train(schedule).rounds
    assert [entry.uplink_bit for entry in rounds] == costs.demand(schedule).payload_bit.tolist()
    bits = {"float32": 32, "float16": 16}[dtype]
    blocks = Blocks(adapter_width=4, bits_per_parameter=bits, head_shared=head == "shared")
    assert rounds[1].uplink_bit == uplink_payload_bit(
        costs.architecture, blocks, schedule.rounds[1].states
    )
    states, _ = evaluator._trained(schedule)
    shared = states[0]["adapter.0.up.weight"]
    assert all(state["adapter.0.up.weight"] is shared for state in states)
    assert torch.equal(shared, shared.to(getattr(torch, dtype)).float())


def test_only_marked_rounds_are_validated(small: Scenario, tmp_path: Path) -> None:
    every = FederatedEvaluator(small, tmp_path / "a").train(Schedule.parse("3x2:ffa", devices=3))
    marked = replace(small, training=replace(small.training, validate_after=(1, 3)))
    some = FederatedEvaluator(marked, tmp_path / "b").train(Schedule.parse("3x2:ffa", devices=3))
    assert [bool(entry.accuracy) for entry in some.rounds] == [True, False, True]
    assert some.rounds[2].accuracy == every.rounds[2].accuracy
    assert [entry.loss for entry in some.rounds] == [entry.loss for entry in every.rounds]


def test_a_training_that_diverges_is_named_and_recorded(small: Scenario, tmp_path: Path) -> None:
    wild = replace(small, training=replace(small.training, learning_rate=1e30))
    evaluation = FederatedEvaluator(wild, tmp_path).train(Schedule.parse("3x2:aaa", devices=3))
    assert evaluation.status == "failed"
    assert "device 0, round" in evaluation.reason
    assert "loss must stay finite" in evaluation.reason
    assert evaluation.rounds == ()


def test_unknown_ranks_are_refused(small: Scenario, tmp_path: Path) -> None:
    evaluation = FederatedEvaluator(small, tmp_path).train(Schedule.parse("1x16:fpa", devices=3))
    assert "must be one of decisions.ranks (2, 4) or 0, got 16" in evaluation.reason


@pytest.mark.parametrize(("old", "new"), [(2, 4), (2, 2), (4, 2), (8, 1)])
def test_a_change_of_rank_keeps_what_was_learned(old: int, new: int) -> None:
    generator = torch.Generator().manual_seed(old * 10 + new)
    a = torch.randn(old, 20, generator=generator)
    b = torch.randn(30, old, generator=generator)
    fresh = fresh_lora(0, new, {"query": (20, 30)}, seed=1, round=0, device=0)["lora.0.query.A"]
    new_a, new_b = resize_lora(a, b, fresh)
    assert new_a.shape == (new, 20)
    assert new_b.shape == (30, new)
    u, s, v = np.linalg.svd((b @ a).numpy())
    best = (u[:, :new] * s[:new]) @ v[:new] if new < old else (b @ a).numpy()
    np.testing.assert_allclose((new_b @ new_a).numpy(), best, atol=1e-4)
