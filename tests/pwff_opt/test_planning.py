"""Curves, plans and fronts: physics without torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from pwff_opt import Evaluation, Planner, Scenario, Schedule, TrainedRound, Workload, pareto_front
from pwff_opt.errors import DecisionError, InfeasibleError
from pwff_opt.evaluation import learning_key
from pwff_opt.planning import Progress
from pwff_opt.wireless import rate_bps
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
        costs = curve.energy_j[row] + curve.price_of_time_w[:, None] * curve.delay_s[row]
        assert (costs.diagonal() <= costs.min(axis=1) * (1 + 1e-9)).all()
    problem = planner.costs.batch(planner.costs.demand(schedule), planner.gain)
    shortest = solve(problem, Shortest(), planner.scenario.cell.access).round_s.cumsum()
    assert (curve.delay_s[:, 0] >= shortest * (1 - 1e-9)).all()
    assert curve.delay_s[:, 0] == pytest.approx(shortest, rel=0.1)


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
    with pytest.raises(DecisionError, match="gain must have shape"):
        planner.reallocate(schedule, 0, np.ones(2), round_s=1.0)


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
    # Two schedules that come down to the same thing are one: the rank of no LoRA is 0.
    high = replace(small.decisions, ranks=(2, 4))
    devices = tuple(replace(device, memory_byte=float(least)) for device in small.devices)
    poor = replace(small, devices=devices, decisions=high)
    tight = Planner(poor, Workload.padded(small, classes=3))
    assert str(tight.repaired(schedule)) == "3x0:fff"
    devices = tuple(replace(device, memory_byte=0.9 * float(least)) for device in small.devices)
    with pytest.raises(InfeasibleError, match="memory_byte is too small"):
        Planner(replace(small, devices=devices), Workload.padded(small, classes=3)).repaired(
            schedule
        )


class Formula:
    """An evaluator whose accuracy is a formula of the schedule, for tests of the search alone."""

    def __init__(
        self, scenario: Scenario, fail: Callable[[Schedule], bool] = lambda _: False
    ) -> None:
        self.scenario, self.fail = scenario, fail
        self.workload = Workload.padded(scenario, classes=3)
        self.trained: list[str] = []

    def _accuracy(self, schedule: Schedule) -> tuple[float, ...]:
        learned = sum(sum(d.trained) * (1 + d.ranks[0]) for d in schedule.rounds)
        return tuple(1 - 0.6 / (1 + 0.1 * learned) - 0.01 * k for k in range(3))

    def train(self, schedule: Schedule) -> Evaluation:
        assert str(schedule) not in self.trained
        self.trained.append(str(schedule))
        key = learning_key(self.scenario, schedule)
        if self.fail(schedule):
            return Evaluation(
                key=key, schedule=schedule, rounds=(), wall_s=0.0, status="failed", reason="broke"
            )
        rounds = [
            TrainedRound(
                loss=(0.0,) * 3,
                accuracy=self._accuracy(schedule.prefix(n + 1)),
                uplink_bit=(0,) * 3,
            )
            for n in range(len(schedule))
        ]
        return Evaluation(key=key, schedule=schedule, rounds=tuple(rounds), wall_s=0.0)

    def test(self, schedule: Schedule) -> tuple[float, ...]:
        return self._accuracy(schedule)


def test_a_front_is_nondominated_and_made_of_what_was_trained(small: Scenario) -> None:
    evaluator = Formula(small)
    seen: list[Progress] = []
    front = pareto_front(small, evaluator, trainings=10, progress=seen.append)
    assert len(evaluator.trained) == len(front.evaluations) == 10
    table = front.points
    values = np.column_stack(
        [table["energy_j"], table["delay_s"], 1 - table["accuracy_validation"]]
    )
    for i, point in enumerate(values):
        assert not ((values <= point).all(axis=1) & (values < point).any(axis=1)).any(), i
    assert table["knee"].sum() == 1
    assert front.knee["knee"]
    for row in table.itertuples():
        schedule = Schedule.parse(row.schedule, devices=3)
        assert len(schedule) == row.rounds
        assert row.accuracy == pytest.approx(np.mean(evaluator.test(schedule)))
        assert row.accuracy_worst_device == pytest.approx(min(evaluator.test(schedule)))
    row = table.iloc[len(table) // 2]
    plan = Planner(small, evaluator.workload).plan(
        Schedule.parse(row["schedule"], devices=3), price_of_time_w=row["price_of_time_w"]
    )
    assert plan.energy_j == pytest.approx(row["energy_j"], rel=1e-6)
    assert plan.delay_s == pytest.approx(row["delay_s"], rel=1e-6)
    stages = [step.stage for step in seen]
    assert stages == sorted(stages, reverse=True)
    again = pareto_front(small, Formula(small), trainings=10)
    assert again.points.equals(table)


def test_thresholds_cut_the_front(small: Scenario) -> None:
    free = pareto_front(small, Formula(small), trainings=8).points
    limits = replace(
        small.thresholds,
        accuracy_min=float(free["accuracy_validation"].median()),
        energy_max_j=float(free["energy_j"].quantile(0.8)),
        delay_max_s=float(free["delay_s"].quantile(0.9)),
    )
    cut = pareto_front(replace(small, thresholds=limits), Formula(small), trainings=8).points
    assert len(cut) > 0
    assert cut["accuracy_validation"].min() >= limits.accuracy_min
    assert cut["energy_j"].max() <= limits.energy_max_j
    assert cut["delay_s"].max() <= limits.delay_max_s
    impossible = replace(small.thresholds, accuracy_min=1.0)
    with pytest.raises(InfeasibleError, match=r"nothing that was trained meets .* accuracy 0\."):
        pareto_front(replace(small, thresholds=impossible), Formula(small), trainings=4)


def test_failed_trainings_are_never_on_the_front(small: Scenario) -> None:
    half = Formula(small, fail=lambda schedule: schedule.rounds[0].ranks[0] == 4)
    front = pareto_front(small, half, trainings=12)
    failed = [entry for entry in front.evaluations if entry.status == "failed"]
    assert failed
    assert not set(front.points["evaluation"]) & {entry.key for entry in failed}
    with pytest.raises(InfeasibleError, match="every training failed: broke"):
        pareto_front(small, Formula(small, fail=lambda _: True), trainings=4)


@pytest.mark.parametrize("states", [("frozen",), ("frozen", "personal")])
def test_small_spaces_are_exhausted(small: Scenario, states: tuple[str, ...]) -> None:
    tiny = replace(small.decisions, ranks=(0,), layer_states=states)
    evaluator = Formula(replace(small, decisions=tiny))
    front = pareto_front(evaluator.scenario, evaluator, trainings=50)
    assert len(front.evaluations) == len(states) ** 3


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys, pwff_opt, pwff_opt.records, pwff_opt.figures, pwff_opt.cli\n"
        "heavy = {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
