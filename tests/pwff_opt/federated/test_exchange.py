"""What is exchanged in a round, under every rule: sizes, privacy, and nothing lost by a kill."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from pwff_opt.costs import Blocks, CostModel
from pwff_opt.decision import LayerState, Schedule
from pwff_opt.errors import TrainingError
from pwff_opt.federated.backbone import Stack
from pwff_opt.federated.evaluator import FederatedEvaluator
from pwff_opt.federated.exchange import Exchange, State
from pwff_opt.federated.tokens import Packed
from pwff_opt.scenario import Aggregation, Scenario

RULES = get_args(get_type_hints(Aggregation)["lora"])
MIXED = ("personal", "hetlora", "flora", "flexlora", "raflora")


def variant(scenario: Scenario, peft: dict[str, Any], table: dict[str, Any]) -> Scenario:
    return replace(
        scenario,
        peft=replace(scenario.peft, **peft),
        aggregation=replace(scenario.aggregation, **table),
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("peft", "table"),
    [
        ({}, {}),
        ({"upload_dtype": "float16", "head": "shared"}, {"adapter": "personal"}),
        ({"upload_dtype": "int8", "common_lora_rank": 3}, {"devices_per_round": 2}),
        ({"upload_dtype": "int8", "adapter_width": 0, "lora_scaling": "rslora"}, {}),
    ],
)
def test_what_is_uploaded_is_what_the_cost_model_charges(
    small: Scenario, tmp_path: Path, rule: str, peft: dict[str, Any], table: dict[str, Any]
) -> None:
    scenario = variant(small, peft, table | {"lora": rule})
    evaluator = FederatedEvaluator(scenario, tmp_path)
    ranks = "4,0,2" if rule in MIXED else "2"
    schedule = Schedule.parse(f"2x{ranks}:paa 1x{ranks}:faf", devices=3)
    evaluation = evaluator.train(schedule)
    assert evaluation.status == "done", evaluation.reason
    payload = CostModel(scenario, evaluator.workload).demand(schedule).payload_bit
    assert [list(entry.uplink_bit) for entry in evaluation.rounds] == payload.tolist()
    assert all(math.isfinite(value) for value in evaluation.rounds[-1].accuracy)


@pytest.mark.parametrize(
    ("peft", "table"),
    [
        ({"upload_dtype": "int8", "head": "shared"}, {"server": "adam"}),
        ({}, {"lora": "rolora", "server": "momentum", "devices_per_round": 2}),
        ({"lora_scaling": "standard"}, {"lora": "flora"}),
        ({"common_lora_rank": 2}, {"lora": "fedex", "proximal": 0.1}),
        ({}, {"lora": "ffa", "clip_norm": 0.1, "noise_multiplier": 0.5}),
    ],
)
def test_a_killed_training_goes_on_bit_for_bit(
    small: Scenario, tmp_path: Path, peft: dict[str, Any], table: dict[str, Any]
) -> None:
    scenario = variant(small, peft, table)
    schedule = Schedule.parse("3x2:paa", devices=3)
    whole = FederatedEvaluator(scenario, tmp_path / "whole", workers=1)._trained(schedule)
    for rounds in (1, 2):
        FederatedEvaluator(scenario, tmp_path / "parts")._trained(schedule.prefix(rounds))
    rest = FederatedEvaluator(scenario, tmp_path / "parts", workers=3)
    parts = rest._trained(schedule)
    assert rest.device_rounds <= 3
    assert repr(parts[1]) == repr(whole[1])
    for own, other in zip(parts[0].devices, whole[0].devices, strict=True):
        assert own.keys() == other.keys()
        for name, tensor in own.items():
            assert torch.equal(tensor, other[name]), name
    for name, tensor in whole[0].moments.items():
        assert torch.equal(parts[0].moments[name], tensor)


def test_error_feedback_and_the_servers_momentum_do_something(
    small: Scenario, tmp_path: Path
) -> None:
    """What they carry from round to round would be missed."""
    scenario = variant(small, {"upload_dtype": "int8"}, {"server": "momentum"})
    trainer = FederatedEvaluator(scenario, tmp_path).trainer
    (decision,) = Schedule.parse("1x2:faa", devices=3).rounds
    state, _ = trainer.round(trainer.initial(), 0, decision, (False, True, True))
    assert state.residuals[1]["adapter.1.up.weight"].any()
    assert state.moments
    new, _ = trainer.round(state, 1, decision, (False, True, True))
    for lost in (replace(state, residuals=()), replace(state, moments={})):
        other, _ = trainer.round(lost, 1, decision, (False, True, True))
        name = "adapter.1.up.weight"
        assert not torch.equal(new.devices[0][name], other.devices[0][name])


@pytest.mark.parametrize("scaling", ["constant", "standard", "rslora"])
def test_a_rank_that_grows_leaves_the_model_as_it_was(
    small: Scenario, tmp_path: Path, scaling: str
) -> None:
    scenario = variant(small, {"lora_scaling": scaling}, {})
    evaluator = FederatedEvaluator(scenario, tmp_path)
    trainer, backbone = evaluator.trainer, evaluator.backbone
    state, _ = evaluator._trained(Schedule.parse("1x2:paa", devices=3))
    batch = evaluator.shards[1].test
    packed = Packed.of(evaluator.tokens, [batch])
    outputs = []
    for rank in (2, 4):
        blocks = trainer._prepared(state.devices[1], rank, (True,) * 3, 1, 1)
        assert blocks["lora.0.query.A"].shape[0] == rank
        assert blocks["lora.0.query.B"].any()
        with torch.inference_mode():
            stack = Stack([blocks], [trainer._scale(rank)])
            outputs.append(backbone.logits(packed, stack, backbone.embed(packed)))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)


def merged(scenario: Scenario, present: list[bool], after: list[dict[str, torch.Tensor]]) -> Any:
    (decision,) = Schedule.parse("1x0:ffa", devices=3).rounds
    name = "adapter.2.up.weight"
    start = {name: torch.zeros(100, 10), "head.bias": torch.zeros(3)}
    state, _ = Exchange(scenario, 0, decision).merge(
        [start] * 3,
        after,
        present,
        3,
        [1.0, 5.0, 3.0],
        State(devices=(start,) * 3, sent={name: start[name]}),
        fresh=lambda *_: torch.zeros(0),
    )
    return state.devices[0][name]


def test_privacy_bounds_what_one_device_can_do(small: Scenario) -> None:
    """Whatever it sends, and whether its upload arrives: at most clip_norm over the devices."""
    scenario = variant(small, {}, {"clip_norm": 0.5, "noise_multiplier": 1e-9})
    generator = torch.Generator().manual_seed(0)
    usual = [
        {
            "adapter.2.up.weight": torch.randn(100, 10, generator=generator) * size,
            "head.bias": torch.zeros(3),
        }
        for size in (1.0, 1e-4, 1e4)
    ]
    everybody = merged(scenario, [True] * 3, usual)
    without = merged(scenario, [True, True, False], usual)
    for moved in (everybody - without,):
        assert moved.norm() <= 0.5 / 3 * (1 + 1e-5)
        assert moved.norm() >= 0.5 / 3 * (1 - 1e-5)
    noisy = variant(small, {}, {"clip_norm": 0.5, "noise_multiplier": 2.0})
    noise = merged(noisy, [True] * 3, usual) - everybody
    assert float(noise.std()) == pytest.approx(2.0 * 0.5 / 3, rel=0.1)


def test_more_noise_costs_accuracy_and_less_epsilon(small: Scenario, tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    spent = []
    for noise in (1.0, 4.0):
        scenario = variant(small, {}, {"clip_norm": 1.0, "noise_multiplier": noise})
        evaluator = FederatedEvaluator(scenario, tmp_path / str(noise))
        assert evaluator.summary.epsilon is not None
        spent.append(evaluator.summary.epsilon)
    assert 0 < spent[1] < spent[0]
    assert FederatedEvaluator(small, tmp_path / "none").summary.epsilon is None


@pytest.mark.parametrize(
    ("peft", "table", "message"),
    [
        ({}, {"server_learning_rate": 1e45}, "round 0: .* after the server's step"),
        (
            {"upload_dtype": "float16"},
            {"server_learning_rate": 1e9},
            "round 0: .* after the server",
        ),
    ],
)
def test_a_server_that_overshoots_is_told(
    small: Scenario, tmp_path: Path, peft: dict[str, Any], table: dict[str, Any], message: str
) -> None:
    evaluator = FederatedEvaluator(variant(small, peft, table), tmp_path)
    evaluation = evaluator.train(Schedule.parse("1x0:aaa", devices=3))
    assert evaluation.status == "failed"
    assert re.search(message, evaluation.reason)


def test_an_upload_beyond_half_precision_names_the_device(small: Scenario, tmp_path: Path) -> None:
    scenario = variant(small, {"upload_dtype": "float16"}, {})
    trainer = FederatedEvaluator(scenario, tmp_path).trainer
    (decision,) = Schedule.parse("1x0:paa", devices=3).rounds
    state, _ = trainer.round(trainer.initial(), 0, decision, (True,) * 3)
    own = state.devices[1]
    large = own | {"adapter.1.up.bias": torch.full_like(own["adapter.1.up.bias"], 7e4)}
    devices = (state.devices[0], large, state.devices[2])
    with pytest.raises(TrainingError, match=r"device 1, round 1: adapter\.1\.up\.bias .* float16"):
        trainer.round(replace(state, devices=devices), 1, decision, (True,) * 3)


@pytest.mark.parametrize(
    ("peft", "table"),
    [
        ({}, {"lora": "fedit", "clip_norm": 0.1, "noise_multiplier": 0.5}),
        ({"upload_dtype": "int8"}, {"lora": "fedit", "server": "adam"}),
        ({"upload_dtype": "int8"}, {"lora": "hetlora", "server": "momentum"}),
    ],
)
def test_a_change_of_rank_leaves_no_stale_reference(
    small: Scenario, tmp_path: Path, peft: dict[str, Any], table: dict[str, Any]
) -> None:
    evaluator = FederatedEvaluator(variant(small, peft, table), tmp_path)
    evaluation = evaluator.train(Schedule.parse("1x2:paa 2x4:paa", devices=3))
    assert evaluation.status == "done", evaluation.reason


def test_a_diverged_device_and_a_change_of_rank_under_privacy(
    small: Scenario, tmp_path: Path
) -> None:
    scenario = variant(small, {}, {"lora": "fedit", "clip_norm": 0.1, "noise_multiplier": 0.5})
    trainer = FederatedEvaluator(scenario, tmp_path).trainer
    first, second = Schedule.parse("1x2:paa 1x4:paa", devices=3).rounds
    state, _ = trainer.round(trainer.initial(), 0, first, (True,) * 3)
    own = state.devices[1]
    bad = own | {"head.bias": torch.full_like(own["head.bias"], torch.nan)}
    sick = replace(state, devices=(state.devices[0], bad, state.devices[2]))
    new, report = trainer.round(sick, 1, second, (True,) * 3)
    assert report.diverged == (1,)
    assert new.devices[0]["lora.1.query.A"].shape[0] == 4


@pytest.mark.parametrize("rule", RULES)
def test_what_learns_is_what_the_cost_model_takes_for_learning(small: Scenario, rule: str) -> None:
    scenario = variant(small, {}, {"lora": rule})
    (decision,) = Schedule.parse("1x2:fpa", devices=3).rounds
    for number in range(4):
        exchange, blocks = Exchange(scenario, number, decision), Blocks.of(scenario, round=number)
        for layer, state in enumerate(decision.states):
            names = {factor: f"lora.{layer}.query.{factor}" for factor in "AB"}
            learns = "".join(f for f, name in names.items() if exchange.learns(name))
            assert learns == blocks.lora_trained(state)
            if state is LayerState.AGGREGATED:
                sends = "".join(f for f, name in names.items() if exchange.sends(name))
                assert sends == blocks.lora_uploaded
