"""Curves, plans and fronts: physics without torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pwff_opt import Planner, Scenario, Schedule, Workload
from pwff_opt.channel import rate_bps
from pwff_opt.errors import DecisionError, InfeasibleError, ScenarioError
from pwff_solvers.allocation import LeastEnergy, Shortest, Status, solve


@pytest.fixture(scope="module", params=["fdma", "tdma"])
def planner(small: Scenario, request: pytest.FixtureRequest) -> Planner:
    scenario = replace(small, cell=replace(small.cell, access=request.param))
    return Planner(scenario, Workload.padded(scenario, classes=3))


SCHEDULES = ["3x4:aaa", "3x0:fff", "1x4:ffa 2x2:faa", "3x2:ppp"]


@pytest.mark.parametrize("text", SCHEDULES)
def test_curves_are_convex_and_end_at_the_shortest(planner: Planner, text: str) -> None:
    schedule = Schedule.parse(text, devices=3)
    curve = planner.curve(schedule, points=40)
    assert curve.gap < 1e-8
    assert (np.diff(curve.delay_s, axis=1) >= -1e-9 * curve.delay_s[:, 1:]).all()
    assert (np.diff(curve.energy_j, axis=1) <= 1e-9 * curve.energy_j[:, 1:]).all()
    # Each point minimises energy + price x delay over the whole curve: a lower envelope.
    for row in range(3):
        costs = curve.energy_j[row] + curve.price_of_time_w[1:, None] * curve.delay_s[row]
        assert (costs[:, 1:].diagonal() <= costs.min(axis=1) * (1 + 1e-9)).all()
    problem = planner.costs.batch(planner.costs.demand(schedule), planner.gain)
    shortest = solve(problem, Shortest(), planner.scenario.cell.access).round_s.cumsum()
    assert curve.delay_s[:, 0] == pytest.approx(shortest, rel=1e-12)
    assert curve.price_of_time_w[0] == np.inf
    plan = planner.plan(text, price_of_time_w=np.inf)
    assert plan.delay_s == pytest.approx(curve.delay_s[-1, 0], rel=1e-12)
    assert plan.energy_j == pytest.approx(curve.energy_j[-1, 0], rel=1e-9)


def test_curves_of_many_schedules_are_those_of_each(planner: Planner) -> None:
    texts = [*SCHEDULES, "2x4:aaf"]
    for text, curve in zip(texts, planner.curves(texts), strict=True):
        alone = planner.curve(text)
        np.testing.assert_allclose(curve.energy_j, alone.energy_j, rtol=1e-9)
        np.testing.assert_allclose(curve.delay_s, alone.delay_s, rtol=1e-9)
    assert planner.curves([]) == []


@pytest.mark.parametrize("text", SCHEDULES)
def test_a_prefix_has_the_curve_of_its_rows(planner: Planner, text: str) -> None:
    schedule = Schedule.parse(text, devices=3)
    whole, cut = planner.curve(schedule), planner.curve(schedule.prefix(2))
    # The prices differ, the curves do not: interpolate one in the other's prices.
    prices = cut.price_of_time_w[1:-1]
    for values, own in ((whole.delay_s[1], cut.delay_s[1]), (whole.energy_j[1], cut.energy_j[1])):
        again = np.interp(-np.log(prices), -np.log(whole.price_of_time_w), np.log(values))
        assert np.exp(again) == pytest.approx(own[1:-1], rel=0.35)
    same = planner.plan(schedule.prefix(2), price_of_time_w=float(whole.price_of_time_w[2]))
    assert same.energy_j == pytest.approx(whole.energy_j[1, 2], rel=1e-7)
    assert same.delay_s == pytest.approx(whole.delay_s[1, 2], rel=1e-7)


@pytest.mark.parametrize("text", SCHEDULES)
def test_a_plan_meets_its_constraints_and_its_own_sums(planner: Planner, text: str) -> None:
    schedule = Schedule.parse(text, devices=3)
    fastest = float(planner.curve(schedule).delay_s[-1, 0])
    plan = planner.plan(schedule, delay_max_s=1.7 * fastest)
    assert plan.delay_s == pytest.approx(1.7 * fastest, rel=1e-6)
    a, cell, devices = plan.allocation, planner.scenario.cell, planner.scenario.devices
    band = a.bandwidth_hz if cell.access == "fdma" else np.full_like(a.power_w, cell.bandwidth_hz)
    rate = rate_bps(
        bandwidth_hz=band,
        power_w=a.power_w,
        gain=planner.gain,
        noise_psd_w_per_hz=cell.noise_psd_w_per_hz,
    )
    np.testing.assert_allclose(rate * a.upload_s, plan.demand.payload_bit, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(a.compute_s * a.frequency_hz, plan.demand.work_cycles, rtol=1e-9)
    if cell.access == "fdma":
        assert (a.bandwidth_hz.sum(axis=1) <= cell.bandwidth_hz * (1 + 1e-9)).all()
    broadcast_s = plan.demand.broadcast_bit / rate_bps(
        bandwidth_hz=cell.downlink_bandwidth_hz,
        power_w=cell.downlink_power_w,
        gain=planner.gain.min(axis=1),
        noise_psd_w_per_hz=cell.noise_psd_w_per_hz,
    )
    receive_j = broadcast_s[:, None] * np.array([d.receive_power_w for d in devices])
    kappa = np.array([d.kappa for d in devices])
    energy = (
        kappa * plan.demand.work_cycles * a.frequency_hz**2 + a.power_w * a.upload_s + receive_j
    )
    assert plan.energy_j == pytest.approx(energy.sum(), rel=1e-9)


def test_sharing_one_price_beats_any_other_split_of_the_deadline(planner: Planner) -> None:
    schedule = Schedule.parse("1x4:ffa 2x2:faa", devices=3)
    fastest = float(planner.curve(schedule).delay_s[-1, 0])
    plan = planner.plan(schedule, delay_max_s=2 * fastest)
    problem = planner.costs.batch(planner.costs.demand(schedule), planner.gain)
    rng = np.random.default_rng(0)
    for _ in range(20):
        split = plan.allocation.round_s * rng.uniform(0.8, 1.2, 3)
        split *= 2 * fastest / split.sum()
        other = solve(problem, LeastEnergy(split), planner.scenario.cell.access)
        feasible = other.status != Status.INFEASIBLE
        assert not feasible.all() or other.energy_j.sum() >= plan.energy_j * (1 - 1e-9)


def test_reallocation_is_the_plan_while_the_channel_is_as_planned(planner: Planner) -> None:
    schedule = Schedule.parse("3x4:aaa", devices=3)
    plan = planner.plan(schedule, price_of_time_w=1.0)
    now = planner.reallocate(schedule, 1, planner.gain[1], price_of_time_w=1.0)
    assert now.round_s[0] == pytest.approx(plan.allocation.round_s[1], rel=1e-9)
    worse = planner.reallocate(schedule, 1, planner.gain[1] / 100, price_of_time_w=1.0)
    assert worse.energy_j[0] + worse.round_s[0] > now.energy_j[0] + now.round_s[0]
    assert worse.gap[0] < 1e-8
    hopeless = planner.reallocate(schedule, 1, planner.gain[1], round_s=1e-3)
    assert hopeless.status[0] == Status.INFEASIBLE


def test_questions_that_make_no_sense_are_refused(planner: Planner) -> None:
    schedule = Schedule.parse("3x4:aaa", devices=3)
    with pytest.raises(InfeasibleError, match=r"delay_max_s must be at least .* got 0.001"):
        planner.plan(schedule, delay_max_s=0.001)
    with pytest.raises(DecisionError, match="not both and not none"):
        planner.plan(schedule)
    with pytest.raises(DecisionError, match=r"at most training.rounds \(3\)"):
        planner.curve(Schedule.parse("4x4:aaa", devices=3))
    with pytest.raises(DecisionError, match="3 layers a state, got 2"):
        planner.curve(Schedule.parse("3x4:aa", devices=3))
    with pytest.raises(DecisionError, match="3 devices a rank, got 2"):
        planner.curve(Schedule.parse("3x4:aaa", devices=2))
    with pytest.raises(DecisionError, match=r"gain must have shape \[3\], got \[2\]"):
        planner.reallocate(schedule, 0, np.ones(2), round_s=1.0)
    with pytest.raises(DecisionError, match=r"gain\[1\] must be positive and finite, got nan"):
        planner.reallocate(schedule, 0, [1e-9, np.nan, 1e-9], round_s=1.0)
    with pytest.raises(DecisionError, match=r"number must be a whole number in 0\.\.2, got 1.5"):
        planner.reallocate(schedule, 1.5, np.ones(3), round_s=1.0)  # type: ignore[arg-type]
    for name, value in (("delay_max_s", np.nan), ("delay_max_s", "a"), ("price_of_time_w", -1)):
        with pytest.raises(DecisionError, match=f"{name} must be a positive number, got {value!r}"):
            planner.plan(schedule, **{name: value})  # type: ignore[arg-type]
    for points in (0, -1, 2.5):
        with pytest.raises(DecisionError, match="points must be a whole number of at least 2"):
            planner.curve(schedule, points=points)  # type: ignore[arg-type]
    # the allocator's own refusals are errors of this package, too
    with pytest.raises(DecisionError, match="price_of_time_w must be between"):
        planner.plan(schedule, price_of_time_w=1e200)
    with pytest.raises(DecisionError, match="delay_max_s must be finite, got inf"):
        planner.plan(schedule, delay_max_s=np.inf)
    with pytest.raises(DecisionError, match="round_s must be finite, got inf"):
        planner.reallocate(schedule, 0, planner.gain[0], round_s=np.inf)
    with pytest.raises(DecisionError, match="schedule must be a Schedule or its text, got 7"):
        planner.curve(7)  # type: ignore[arg-type]
    with pytest.raises(DecisionError, match="must read like"):
        planner.curve("4:ffz")
    with pytest.raises(DecisionError, match="scenario must be a Scenario"):
        Planner("mine.toml", planner.costs.workload)  # type: ignore[arg-type]
    with pytest.raises(DecisionError, match="workload must be a Workload, got 3"):
        Planner(planner.scenario, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"classes": 1}, "classes must be a whole number of at least 2, got 1"),
        ({"classes": "3"}, "classes must be a whole number of at least 2, got '3'"),
        ({"mean_tokens": np.array([1.0, -2.0, 3.0])}, "mean_tokens must be positive and finite"),
        ({"mean_squared_tokens": np.array([np.nan] * 3)}, "mean_squared_tokens must be positive"),
    ],
)
def test_a_workload_that_cannot_be_is_refused(
    small: Scenario, values: dict[str, object], message: str
) -> None:
    with pytest.raises(DecisionError, match=message):
        replace(Workload.padded(small, classes=3), **values)


@pytest.mark.parametrize("name", ["mean_tokens", "mean_squared_tokens"])
def test_a_workload_of_other_devices_is_refused(small: Scenario, name: str) -> None:
    short = replace(Workload.padded(small, classes=3), **{name: [9.0, 9.0]})
    message = rf"workload.{name} must have shape \[3\], got \[2\]"
    with pytest.raises(DecisionError, match=message):
        Planner(small, short)


def test_plans_and_curves_say_in_one_line_what_they_are(planner: Planner) -> None:
    plan = planner.plan("3x4:aaa", price_of_time_w=1.0)
    assert repr(plan).startswith(
        f"Plan(3x4:aaa: {plan.energy_j:.4g} J, {plan.delay_s:.4g} s at 1 W;"
    )
    assert repr(plan).endswith(f"{plan.allocation!r})")
    assert repr(planner.curve("3x4:aaa")).startswith("Curve(3 rounds x 5 points; after all rounds ")


def test_a_deadline_that_does_not_bind_costs_the_least_energy(planner: Planner) -> None:
    schedule = Schedule.parse("3x4:aaa", devices=3)
    curve = planner.curve(schedule)
    plan = planner.plan(schedule, delay_max_s=1e9)
    assert plan.energy_j <= curve.energy_j[-1, -1]
    assert plan.delay_s <= 1e9


def test_schedules_are_made_to_fit_the_memory(small: Scenario) -> None:
    free = Planner(small, Workload.padded(small, classes=3))
    schedule = Schedule.parse("3x4:aaa", devices=3)
    assert free.repaired(schedule) == schedule
    most = free.costs.demand(schedule).memory_byte.max()
    least = free.costs.demand(Schedule.parse("3x0:fff", devices=3)).memory_byte.max()
    for limit in np.linspace(least, most, 6):
        devices = tuple(replace(device, memory_byte=float(limit)) for device in small.devices)
        tight = Planner(replace(small, devices=devices), Workload.padded(small, classes=3))
        fitting = tight.repaired(schedule)
        assert tight.costs.demand(fitting).memory_byte.max() <= limit
        assert (fitting == schedule) == (limit >= most)
        tight.codec.encode(fitting)
    # The limit on ranks is common to all decisions; what is below it stays.
    expected = Schedule.parse("1x0:ffa 2x2:aaa", devices=3)
    limit = float(free.costs.demand(expected).memory_byte.max())
    devices = tuple(replace(device, memory_byte=limit) for device in small.devices)
    tight = Planner(replace(small, devices=devices), Workload.padded(small, classes=3))
    assert tight.repaired(Schedule.parse("1x0:ffa 2x4:aaa", devices=3)) == expected
    # Two schedules that come down to the same thing are one: the rank of no LoRA is 0.
    high = replace(small.decisions, ranks=(2, 4))
    devices = tuple(replace(device, memory_byte=float(least)) for device in small.devices)
    poor = replace(small, devices=devices, decisions=high)
    tight = Planner(poor, Workload.padded(small, classes=3))
    assert str(tight.repaired(schedule)) == "3x0:fff"
    devices = tuple(replace(device, memory_byte=0.9 * float(least)) for device in small.devices)
    needed = rf"devices\[0\]\.memory_byte must be at least {least:.0f} .*"
    with pytest.raises(InfeasibleError, match=f"{needed} .*all layers are frozen"):
        Planner(replace(small, devices=devices), Workload.padded(small, classes=3)).repaired(
            schedule
        )


def test_what_a_device_cannot_hold_is_not_planned(small: Scenario) -> None:
    schedule = Schedule.parse("1x0:fff 2x4:aaa", devices=3)
    workload = Workload.padded(small, classes=3)
    first, *_, need = Planner(small, workload).costs.demand(schedule).memory_byte.max(axis=1)

    def with_memory(limit: float) -> Planner:
        devices = (*small.devices[:2], replace(small.devices[2], memory_byte=limit))
        return Planner(replace(small, devices=devices), workload)

    enough = with_memory(float(need))
    assert enough.plan(schedule, price_of_time_w=1.0).demand.memory_byte.max() == need
    poor = with_memory(float(0.5 * (first + need)))
    message = rf"devices\[2\]\.memory_byte must be at least {need:.0f} .*"
    for ask in (
        lambda: poor.curve(schedule),
        lambda: poor.plan(schedule, price_of_time_w=1.0),
        lambda: poor.plan(str(schedule), delay_max_s=1e6),
        lambda: poor.reallocate(schedule, 0, poor.gain[0], price_of_time_w=1.0),
    ):
        with pytest.raises(InfeasibleError, match=message):
            ask()
    poor.plan(schedule.prefix(1), price_of_time_w=1.0)


@pytest.mark.parametrize("rule", ["fedit", "ffa", "fedsa", "rolora", "fedex", "hetlora"])
def test_ranks_that_a_rule_cannot_merge_are_not_planned(small: Scenario, rule: Any) -> None:
    scenario = replace(small, aggregation=replace(small.aggregation, lora=rule))
    planner = Planner(scenario, Workload.padded(scenario, classes=3))
    planner.plan("3x4:faa", price_of_time_w=1.0)
    if rule == "hetlora":
        planner.plan("3x4,2,4:faa", price_of_time_w=1.0)
        return
    with pytest.raises(DecisionError, match=f"ranks must be common .* {rule!r}.* got 3x4,2,4:faa"):
        planner.plan("3x4,2,4:faa", price_of_time_w=1.0)


def test_a_model_too_small_for_the_scenario_is_refused(small: Scenario) -> None:
    """The small model has a hidden size of 32 and 64 positions."""
    least = replace(
        small,
        model=replace(small.model, max_tokens=64),
        decisions=replace(small.decisions, ranks=(0, 32)),
    )
    Planner(least, Workload.padded(least, classes=3))
    more = replace(
        small,
        model=replace(small.model, max_tokens=65),
        decisions=replace(small.decisions, ranks=(0, 33)),
    )
    with pytest.raises(ScenarioError) as caught:
        Planner(more, Workload.padded(more, classes=3))
    assert caught.value.problems == (
        "model.max_tokens must not exceed the model's table of positions (64), got 65",
        "decisions.ranks must not exceed the model's hidden size (32), got 33",
    )


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys, pwff_opt, pwff_opt.runs.records, pwff_opt.report.figures, pwff_opt.cli\n"
        "heavy = {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
