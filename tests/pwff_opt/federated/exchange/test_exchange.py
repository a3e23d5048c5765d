"""What is exchanged in a round, under every rule: sizes, privacy, and nothing lost by a kill."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pwff_opt.costs import Blocks
from pwff_opt.errors import DecisionError, TrainingError
from pwff_opt.federated.exchange import exchange as exchange_module
from pwff_opt.federated.exchange.exchange import Exchange, State
from pwff_opt.federated.exchange.rules import Factors
from pwff_opt.federated.exchange.rules._factors import ideal
from pwff_opt.federated.model.backbone import Stack
from pwff_opt.federated.model.blocks import Tensors
from pwff_opt.federated.text.tokens import Packed
from pwff_opt.federated.training.evaluator import FederatedEvaluator
from pwff_opt.federated.training.trainer import Trainer
from pwff_opt.planning.demand import CostModel
from pwff_opt.registry import RULES
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.schedule import LayerState, Schedule

MERGING = tuple(name for name, rule in RULES.items() if rule.aggregates)
AVERAGING = ("fedit", "ffa", "fedsa", "rolora")
MIXED = ("personal", "hetlora", "hetlora-norm", "flora", "flexlora", "raflora")


def variant(
    scenario: Scenario, peft: dict[str, Any], table: dict[str, Any], *, mixed: bool = False
) -> Scenario:
    """``mixed``: ranks may differ between devices."""
    scope = "per_device" if mixed else "common"
    return replace(
        scenario,
        peft=replace(scenario.peft, **peft),
        aggregation=replace(scenario.aggregation, **table),
        decisions=replace(scenario.decisions, rank_scope=scope),
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
    scenario = variant(small, peft, table | {"lora": rule}, mixed=rule in MIXED)
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


@pytest.mark.on_cpu
@pytest.mark.parametrize("scaling", ["constant", "standard", "rslora"])
def test_a_rank_that_grows_leaves_the_model_as_it_was(
    small: Scenario, tmp_path: Path, scaling: str
) -> None:
    scenario = variant(small, {"lora_scaling": scaling}, {})
    evaluator = FederatedEvaluator(scenario, tmp_path)
    trainer, backbone = evaluator.trainer, evaluator.material.backbone
    state, _ = evaluator._trained(Schedule.parse("1x2:paa", devices=3))
    batch = evaluator.material.shards[1].test
    packed = Packed.of(evaluator.material.stage.tokens, [batch])
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
        public={name: start[name]},
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
        assert evaluator.epsilon is not None
        spent.append(evaluator.epsilon)
    assert 0 < spent[1] < spent[0]
    assert FederatedEvaluator(small, tmp_path / "none").epsilon is None


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


def test_an_upload_beyond_half_precision_has_diverged(small: Scenario, tmp_path: Path) -> None:
    """It fails that device's round, not the training; a personal block may be as large as it likes."""
    scenario = variant(small, {"upload_dtype": "float16"}, {})
    trainer = FederatedEvaluator(scenario, tmp_path).trainer
    (decision,) = Schedule.parse("1x0:paa", devices=3).rounds
    state, _ = trainer.round(trainer.initial(), 0, decision, (True,) * 3)

    def with_large(layer: int, *devices: int) -> State:
        name = f"adapter.{layer}.up.bias"
        large = {name: torch.full_like(state.devices[0][name], 7e4)}
        return replace(
            state,
            devices=tuple(
                own | large if k in devices else own for k, own in enumerate(state.devices)
            ),
        )

    new, report = trainer.round(with_large(1, 1), 1, decision, (True,) * 3)
    assert report.diverged == (1,)
    assert new.devices[1]["adapter.1.up.bias"] is new.devices[0]["adapter.1.up.bias"]
    assert trainer.round(with_large(0, 1), 1, decision, (True,) * 3)[1].diverged == ()
    with pytest.raises(TrainingError, match=r"round 2: .* range of peft\.upload_dtype 'float16'"):
        trainer.round(with_large(1, 0, 1, 2), 1, decision, (True,) * 3)


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


# --- Clipping bounds updates, not what they are updates of -------------------------------------------

NOTHING_MOVES = {"clip_norm": 1e-9}


def played(trainer: Trainer, text: str, state: State | None = None, number: int = 0) -> State:
    """Return the state after the rounds of a schedule, counted from ``number``."""
    state = state or trainer.initial()
    schedule = Schedule.parse(text, devices=3)
    for decision in schedule.rounds:
        state, _ = trainer.round(state, number, decision, (True,) * 3)
        number += 1
    return state


def low_rank(own: Tensors, projection: str, scale: float = 2.0) -> torch.Tensor:
    """Return all that a device adds to a frozen weight."""
    product = scale * own[f"lora.{projection}.B"].double() @ own[f"lora.{projection}.A"].double()
    return product + own.get(f"delta.{projection}", torch.zeros(1)).double()


def truncated(dense: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v_t = torch.linalg.svd(dense, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v_t[:rank]


def close(value: torch.Tensor, expected: torch.Tensor) -> None:
    assert (value - expected).norm() <= 1e-5 * expected.norm()


# Under "hetlora-norm" a device weighs by what it sends, clipped, and by nothing else.
@pytest.mark.parametrize("rule", [rule for rule in MERGING if rule != "hetlora-norm"])
@pytest.mark.parametrize(("before", "after"), [("4", "4"), ("2", "4"), ("4", "2")])
def test_a_tiny_clipping_norm_stops_all_motion_and_nothing_else(
    small: Scenario, tmp_path: Path, rule: str, before: str, after: str
) -> None:
    """Two rounds without it, one with it: whatever the rule, and whether the rank changes."""
    free = FederatedEvaluator(variant(small, {}, {"lora": rule}), tmp_path / "a").trainer
    bound = variant(small, {}, {"lora": rule} | NOTHING_MOVES)
    state = played(free, f"2x{before}:aaa")
    trainer = FederatedEvaluator(bound, tmp_path / "b").trainer
    new = played(trainer, f"1x{after}:aaa", state, 2)
    for own, old in zip(new.devices, state.devices, strict=True):
        close(own["adapter.1.down.weight"], old["adapter.1.down.weight"])
        if rule == "fedsa":
            close(own["lora.1.query.A"][:2], old["lora.1.query.A"][:2])
        elif int(after) < int(before) and rule in ("ffa", "hetlora"):
            close(own["lora.1.query.B"], old["lora.1.query.B"][:, :2])
        else:
            learned = low_rank(old, "1.query")
            shrunk = int(after) < int(before) and rule != "flora"
            delta = old.get("delta.1.query", torch.zeros(1)).double()
            expected = truncated(learned - delta, int(after)) + delta if shrunk else learned
            close(low_rank(own, "1.query"), expected)


@pytest.mark.parametrize("rule", AVERAGING)
@pytest.mark.parametrize(("before", "after"), [("4", "4"), ("2", "4"), ("4", "2")])
def test_where_noise_is_added_updates_begin_at_what_was_released(
    small: Scenario, tmp_path: Path, rule: str, before: str, after: str
) -> None:
    private = {"lora": rule, "clip_norm": 1e-6, "noise_multiplier": 1e-6}
    state = played(
        FederatedEvaluator(variant(small, {}, {"lora": rule}), tmp_path / "a").trainer,
        f"2x{before}:aaa",
    )
    trainer = FederatedEvaluator(variant(small, {}, private), tmp_path / "b").trainer
    decision = Schedule.parse(f"1x{after}:aaa", devices=3).rounds[0]
    public = trainer._public(state.sent, decision, (True,) * 3, 2)
    new = played(trainer, f"1x{after}:aaa", state, 2)
    exchange = Exchange(trainer.scenario, 2, decision)
    sent = [name for name in new.devices[0] if exchange.sends(name)]
    assert any(name.startswith("lora.") for name in sent)
    for name in sent:
        assert (new.devices[0][name] - public[name]).norm() < 2e-6
    # And what was released is what devices hold: the update is that of the round.
    for device, own in enumerate(state.devices):
        prepared = trainer._prepared(own, int(after), (True,) * 3, 2, device)
        for name in sent:
            torch.testing.assert_close(prepared[name], public[name], rtol=0, atol=0)


def test_what_is_public_never_depends_on_what_was_learned_alone(
    small: Scenario, tmp_path: Path
) -> None:
    """After personal rounds an update begins at the common draw where noise is added, else where it was."""
    for table, private in (
        ({"lora": "fedit"}, False),
        ({"lora": "fedit", "noise_multiplier": 1e-6}, True),
    ):
        trainer = FederatedEvaluator(
            variant(small, {}, table | {"clip_norm": 1e-6}), tmp_path / str(private)
        ).trainer
        alone = played(trainer, "2x4:fpp")
        name, factor = "adapter.1.up.weight", "lora.1.query.A"
        assert not torch.equal(alone.devices[0][name], alone.devices[1][name])
        new = played(trainer, "1x4:faa", alone, 2).devices[0]
        drawn = trainer._prepared({}, 4, (False, True, True), 0, 0)
        for block in (name, factor):
            mean = torch.stack([own[block].double() for own in alone.devices]).mean(0)
            expected = drawn[block].double() if private else mean
            assert (new[block] - expected).norm() < 1e-5


def test_a_bound_that_binds_nothing_changes_nothing(small: Scenario, tmp_path: Path) -> None:
    """From wherever updates are measured: the average is that of what was sent, after personal rounds too."""
    states = []
    for bound, noise in ((0.0, 0.0), (1e3, 0.0), (1e3, 1e-12)):
        table = {"lora": "fedit", "clip_norm": bound, "noise_multiplier": noise}
        trainer = FederatedEvaluator(
            variant(small, {}, table), tmp_path / f"{bound}{noise}"
        ).trainer
        states.append(played(trainer, "2x4:fpp 1x4:faa"))
    for state in states[1:]:
        for name, tensor in states[0].devices[0].items():
            torch.testing.assert_close(state.devices[0][name], tensor, rtol=1e-5, atol=1e-6)


def test_the_server_steps_only_from_where_devices_began(small: Scenario, tmp_path: Path) -> None:
    """A layer that was aggregated from the first goes half of the way; one trained alone so far all of it."""
    half = variant(small, {}, {"server_learning_rate": 0.5})
    whole = FederatedEvaluator(small, tmp_path / "whole").trainer
    trainer = FederatedEvaluator(half, tmp_path / "half").trainer
    name = "adapter.2.up.weight"
    drawn = trainer._prepared({}, 0, (True,) * 3, 0, 0)[name]
    close(
        played(trainer, "1x0:ffa").devices[0][name] - drawn,
        0.5 * (played(whole, "1x0:ffa").devices[0][name] - drawn),
    )
    alone = played(trainer, "1x0:ffp")
    ours, mean = (played(one, "1x0:ffa", alone, 1).devices[0][name] for one in (trainer, whole))
    assert torch.equal(ours, mean)


def test_mixed_ranks_are_clipped_from_their_own_start(small: Scenario, tmp_path: Path) -> None:
    for rule in ("hetlora", "flora"):
        scenario = variant(small, {}, {"lora": rule} | NOTHING_MOVES, mixed=True)
        trainer = FederatedEvaluator(scenario, tmp_path / rule).trainer
        state = played(trainer, "1x2,4,4:aaa")
        if rule == "hetlora":
            drawn = trainer._prepared({}, 4, (True,) * 3, 0, 0)["lora.1.query.A"]
            mean = torch.cat([drawn[:2], drawn[2:] * (2 / 3)])  # two of three have the last slices
            for own in state.devices:
                rank = len(own["lora.1.query.A"])
                close(own["lora.1.query.A"], mean[:rank])
        assert low_rank(state.devices[0], "1.query").norm() < 1e-8


@pytest.mark.parametrize("noise", [0.0, 1e-9])
def test_the_bound_holds_to_the_last_digit(
    small: Scenario, monkeypatch: pytest.MonkeyPatch, noise: float
) -> None:
    """Changes of 1e-4 on values of 1e3, which float32 cannot tell apart once they are added up."""
    bound = 1e-4
    seen: list[float] = []
    name = "adapter.2.up.weight"
    generator = torch.Generator().manual_seed(0)
    start = 1e3 * torch.randn(100, 10, generator=generator)
    before = {name: start, "head.bias": torch.zeros(3)}
    after = before | {name: start + torch.randn(100, 10, generator=generator)}
    average = exchange_module.average

    def watched(uploads: list[Tensors], weights: list[float]) -> Tensors:
        seen.extend(
            float((u[name].double() - (0 if noise else start.double())).norm()) for u in uploads
        )
        return average(uploads, weights)

    monkeypatch.setattr(exchange_module, "average", watched)
    (decision,) = Schedule.parse("1x0:ffa", devices=3).rounds
    scenario = variant(small, {}, {"clip_norm": bound, "noise_multiplier": noise})
    Exchange(scenario, 0, decision).merge(
        [before] * 3,
        [after] * 3,
        [True] * 3,
        3,
        [1.0] * 3,
        State(devices=(before,) * 3),
        public={name: start},
        fresh=lambda *_: torch.zeros(0),
    )
    assert len(seen) == 3
    assert all(bound * (1 - 1e-5) <= length <= bound for length in seen)


def test_ranks_that_differ_need_a_scope_that_says_so(small: Scenario, tmp_path: Path) -> None:
    (mixed,) = Schedule.parse("1x4,0,0:aaa", devices=3).rounds
    for rule in RULES:
        scenario = variant(small, {}, {"lora": rule})
        trainer = FederatedEvaluator(scenario, tmp_path).trainer
        with pytest.raises(
            DecisionError,
            match=r"rank_scope must be 'per_device' .* got 'common' and ranks 4, 0, 0",
        ):
            trainer.round(trainer.initial(), 0, mixed, (True,) * 3)
    # A LoRA that is not sent needs no noise, so ranks may differ; what is sent, all devices send.
    noisy = variant(small, {}, {"clip_norm": 1.0, "noise_multiplier": 0.1}, mixed=True)
    trainer = FederatedEvaluator(noisy, tmp_path).trainer
    _, report = trainer.round(trainer.initial(), 0, mixed, (True,) * 3)
    assert len(set(report.uplink_bit)) == 1


# --- What a round leaves behind, and what it must not ------------------------------------------------


@pytest.mark.parametrize("server", ["momentum", "adam"])
def test_a_lora_given_up_leaves_nothing_behind(
    small: Scenario, tmp_path: Path, server: Any
) -> None:
    """Grown again it begins anew: no momentum, reference or residual of old pulls it back."""
    table = {"lora": "fedit", "server": server, "server_learning_rate": 0.1}
    scenario = variant(small, {"upload_dtype": "int8"}, table)
    trainer = FederatedEvaluator(scenario, tmp_path / "a").trainer
    first = played(trainer, "1x4:aaa")
    for held in (first.sent, first.moments, first.residuals[0]):
        assert any("lora." in name for name in held)
    second = played(trainer, "1x0:aaa", first, 1)
    for held in (second.sent, second.moments, *second.residuals):
        assert held
        assert not any("lora." in name for name in held)
    third = played(trainer, "1x4:aaa", second, 2)
    name = "lora.1.query.A"
    drawn = trainer._prepared({}, 4, (True,) * 3, 0, 0)[name]
    assert (third.devices[0][name] - drawn).norm() < 0.2 * drawn.norm()


def test_a_lora_clipped_after_it_was_given_up_stays_where_it_is_drawn(
    small: Scenario, tmp_path: Path
) -> None:
    trainer = FederatedEvaluator(
        variant(small, {}, {"lora": "fedit", "clip_norm": 0.01}), tmp_path
    ).trainer
    new = played(trainer, "1x4:aaa 1x0:aaa 1x4:aaa").devices[0]
    drawn = trainer._prepared({}, 4, (True,) * 3, 2, 0)
    for factor in "AB":
        name = f"lora.1.query.{factor}"
        assert (new[name] - drawn[name]).norm() <= 0.01


def test_moments_go_with_the_rank_and_others_stay(small: Scenario, tmp_path: Path) -> None:
    scenario = variant(small, {}, {"lora": "fedit", "server": "momentum"})
    trainer = FederatedEvaluator(scenario, tmp_path).trainer
    state = played(trainer, "2x4:aaa")
    # There and back while the layer is frozen: the shape is that of before, the basis is not.
    state = played(trainer, "1x2:ffa 1x4:ffa", state, 2)
    kept = [name for name in state.moments if ".0." in name]
    assert kept
    assert not any("lora." in name for name in kept)
    assert state.sent["lora.0.query.A"].shape == (4, 32)
    close(low_rank(state.sent, "0.query"), low_rank(state.devices[0], "0.query"))


@pytest.mark.parametrize("rule", MERGING)
def test_residuals_are_carried_only_where_slices_keep_their_meaning(
    small: Scenario, tmp_path: Path, rule: str
) -> None:
    scenario = variant(small, {"upload_dtype": "int8"}, {"lora": rule})
    trainer = FederatedEvaluator(scenario, tmp_path).trainer
    state = played(trainer, "1x4:aaa")
    carried = rule not in ("flora", "flexlora", "raflora")
    assert any(name.startswith("lora.") for name in state.residuals[0]) == carried
    assert "adapter.1.up.weight" in state.residuals[0]
    # In layers that send nothing this time, what is owed waits, unless the rank has changed meanwhile.
    same, other = (played(trainer, f"1x{rank}:ffa", state, 1) for rank in (4, 2))
    assert any(name.startswith("lora.0.") for name in same.residuals[0]) == carried
    assert not any(name.startswith("lora.0.") for name in other.residuals[0])
    assert "adapter.0.up.weight" in other.residuals[0]


def test_the_a_of_ffa_is_one_draw_whatever_happens(small: Scenario, tmp_path: Path) -> None:
    trainer = FederatedEvaluator(variant(small, {}, {"lora": "ffa"}), tmp_path).trainer
    state, number = trainer.initial(), 0
    drawn = trainer._prepared({}, 4, (True,) * 3, 0, 0)
    for part in ("2x4:fpp", "1x4:aaa", "1x2:apa", "2x4:paa", "1x0:aaa", "1x2:aaa"):
        state = played(trainer, part, state, number)
        number += int(part[0])
        rank = int(part[2])
        for own in state.devices:
            for name in (n for n in own if n.startswith("lora.") and n.endswith("A")):
                assert torch.equal(own[name], drawn[name][:rank])
    # So the average is the ideal one, also after personal rounds.
    (decision,) = Schedule.parse("1x2:aaa", devices=3).rounds
    before = [
        trainer._prepared(own, 2, (True,) * 3, number, k) for k, own in enumerate(state.devices)
    ]
    exchange = Exchange(trainer.scenario, number, decision)
    learned = trainer._local_steps(
        {k: trainer.batches(number, k) for k in range(3)}, before, decision, exchange, number
    )
    after = [own | new.blocks for own, new in zip(before, learned, strict=True)]
    a, b = "lora.1.query.A", "lora.1.query.B"
    expected = ideal([Factors(a=own[a], b=own[b], scale=2.0) for own in after], [1.0] * 3)
    for own in played(trainer, "1x2:aaa", state, number).devices:
        close(low_rank(own, "1.query"), expected)


def test_a_factor_that_is_common_stays_common_when_the_rank_shrinks(
    small: Scenario, tmp_path: Path
) -> None:
    """FedSA: B differs between devices, so an SVD on each would turn their A apart."""
    trainer = FederatedEvaluator(variant(small, {}, {"lora": "fedsa"}), tmp_path).trainer
    state = played(trainer, "2x4:aaa")
    blocks = [trainer._prepared(own, 2, (True,) * 3, 2, k) for k, own in enumerate(state.devices)]
    for own in blocks:
        assert torch.equal(own["lora.1.query.A"], state.devices[0]["lora.1.query.A"][:2])
    assert not torch.equal(blocks[0]["lora.1.query.B"], blocks[1]["lora.1.query.B"])


def test_half_precision_costs_no_more_than_it_must(small: Scenario, tmp_path: Path) -> None:
    """What rounding takes from FedEx's means its residual holds; what is not sent is not rounded."""
    scenario = variant(small, {"upload_dtype": "float16"}, {"lora": "fedex"})
    trainer = FederatedEvaluator(scenario, tmp_path / "fedex").trainer
    state = played(trainer, "1x4:aaa")
    (decision,) = Schedule.parse("1x4:aaa", devices=3).rounds
    before = [trainer._prepared(own, 4, (True,) * 3, 1, k) for k, own in enumerate(state.devices)]
    exchange = Exchange(scenario, 1, decision)
    learned = trainer._local_steps(
        {k: trainer.batches(1, k) for k in range(3)}, before, decision, exchange, 1
    )
    a, b = "lora.1.query.A", "lora.1.query.B"
    sent = [Factors(a=new.blocks[a].half(), b=new.blocks[b].half(), scale=2.0) for new in learned]
    old = state.devices[0]["delta.1.query"].double()
    own = played(trainer, "1x4:aaa", state, 1).devices[0]
    gained, expected = low_rank(own, "1.query") - old, ideal(sent, [1.0] * 3)
    # All that is left is the rounding of the residual itself.
    residual = (own["delta.1.query"].double() - old).norm()
    assert (gained - expected).norm() <= 2.0**-11 * residual + 1e-6 * expected.norm()
    assert residual < 0.5 * expected.norm()
    fedsa = variant(small, {"upload_dtype": "float16"}, {"lora": "fedsa"})
    own = played(FederatedEvaluator(fedsa, tmp_path / "fedsa").trainer, "1x4:aaa").devices[0]
    assert torch.equal(own[a], own[a].half().float())
    assert not torch.equal(own[b], own[b].half().float())
