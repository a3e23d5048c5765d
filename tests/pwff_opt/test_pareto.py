"""Fronts: what is trained, what is reported, and how sure it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pwff_opt import Evaluation, Planner, Scenario, Schedule, TrainedRound, Workload, pareto_front
from pwff_opt.errors import DecisionError, InfeasibleError
from pwff_opt.front.front import Progress, _probability, _Spread
from pwff_opt.runs.identity import learning_key
from pwff_solvers.front import hypervolume


class Formula:
    """An evaluator whose accuracy is a formula of the schedule, for tests of the search alone."""

    def __init__(
        self,
        scenario: Scenario,
        fail: Callable[[Schedule], bool] = lambda _: False,
        noise: float = 0.0,
    ) -> None:
        self.scenario, self.fail, self.noise = scenario, fail, noise
        self.workload = Workload.padded(scenario, classes=3)
        self.trained: list[str] = []

    def with_seed(self, seed: int) -> Formula:
        seeds = replace(self.scenario.seeds, training=seed)
        return Formula(replace(self.scenario, seeds=seeds), self.fail, self.noise)

    def _accuracy(self, schedule: Schedule) -> tuple[float, ...]:
        learned = sum(sum(d.trained) * (1 + d.ranks[0]) for d in schedule.rounds)
        key = int(learning_key(self.scenario, schedule), 16)
        luck = self.noise * np.random.default_rng(key).standard_normal()
        return tuple(1 - 0.6 / (1 + 0.1 * learned) - 0.01 * k + luck for k in range(3))

    def train(self, schedule: Schedule) -> Evaluation:
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


@pytest.fixture(params=["surrogate", "evolution"])
def either(small: Scenario, request: pytest.FixtureRequest) -> Scenario:
    return replace(small, search=replace(small.search, method=request.param))


def test_a_front_is_nondominated_and_made_of_what_was_trained(either: Scenario) -> None:
    small = either
    evaluator = Formula(small)
    seen: list[Progress] = []
    front = pareto_front(small, evaluator, trainings=10, progress=seen.append)
    assert len(set(evaluator.trained)) == len(evaluator.trained) == len(front.evaluations) == 10
    table = front.points
    values = np.column_stack([table["energy_j"], table["delay_s"], 1 - table["accuracy_chosen_by"]])
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
        accuracy_min=float(free["accuracy_chosen_by"].median()),
        energy_max_j=float(free["energy_j"].quantile(0.8)),
        delay_max_s=float(free["delay_s"].quantile(0.9)),
    )
    cut = pareto_front(replace(small, thresholds=limits), Formula(small), trainings=8).points
    assert len(cut) > 0
    assert cut["accuracy_chosen_by"].min() >= limits.accuracy_min
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
    for entry in failed:
        assert half.trained.count(str(entry.schedule)) == 2, "once more, and no more"
    assert not set(front.points["evaluation"]) & {entry.key for entry in failed}
    with pytest.raises(InfeasibleError, match="every training failed: broke"):
        pareto_front(small, Formula(small, fail=lambda _: True), trainings=4)
    stops = replace(small, search=replace(small.search, stop_early=True))
    begun = Formula(stops, fail=lambda _: True)
    with pytest.raises(InfeasibleError, match="every training failed: broke"):
        pareto_front(stops, begun, trainings=1)
    assert {len(Schedule.parse(text, devices=3)) for text in begun.trained} == {1}


@pytest.mark.parametrize("states", [("frozen",), ("frozen", "personal")])
def test_small_spaces_are_exhausted(small: Scenario, states: tuple[str, ...]) -> None:
    tiny = replace(small.decisions, ranks=(0,), layer_states=states)
    evaluator = Formula(replace(small, decisions=tiny))
    front = pareto_front(evaluator.scenario, evaluator, trainings=50)
    assert len(front.evaluations) == len(states) ** 3


def test_an_accuracy_that_is_none_is_a_failure(small: Scenario) -> None:
    class Broken(Formula):
        def _accuracy(self, schedule: Schedule) -> tuple[float, ...]:
            good = super()._accuracy(schedule)
            return (np.nan, *good[1:]) if schedule.rounds[0].ranks[0] == 4 else good

    front = pareto_front(
        small, Broken(small, fail=lambda s: s.rounds[0].ranks[0] == 4), trainings=8
    )
    assert not front.points["schedule"].str.contains("x4:").any()
    front = pareto_front(small, Broken(small, fail=lambda _: False), trainings=3)
    assert {entry.status for entry in front.evaluations} == {"failed", "done"}


def test_rounds_that_begin_alike_are_paid_once(small: Scenario) -> None:
    phases = replace(small.decisions, phases=3, ranks=(0,), layer_states=("frozen", "aggregated"))
    scenario = replace(small, decisions=phases)
    front = pareto_front(scenario, Formula(scenario), trainings=6)
    prefixes = {str(entry.schedule.prefix(n)) for entry in front.evaluations for n in (1, 2, 3)}
    assert len(front.evaluations) > 6
    assert 18 <= len(prefixes) <= 20
    assert front.rounds_trained == len(prefixes)
    assert front.rounds_asked == 3 * len(front.evaluations)


def test_early_stops_spare_rounds_and_no_front(small: Scenario) -> None:
    limits = replace(small.thresholds, energy_max_j=2.0)
    whole = replace(small, thresholds=limits)
    stops = replace(whole, search=replace(whole.search, stop_early=True))
    all_of_it = pareto_front(whole, Formula(whole), trainings=200)
    cut = pareto_front(stops, Formula(stops), trainings=200)
    assert sum(len(e.rounds) for e in cut.evaluations) < sum(
        len(e.rounds) for e in all_of_it.evaluations
    )
    worth = [
        hypervolume(
            np.column_stack([np.log(p["energy_j"]), np.log(p["delay_s"]), 1 - p["accuracy"]]),
            np.array([np.log(2.0), np.log(100.0), 1.0]),
        )
        for p in (cut.points, all_of_it.points)
    ]
    assert worth[0] >= 0.999 * worth[1]


def test_a_front_is_confirmed_with_fresh_seeds(small: Scenario) -> None:
    noise, trials, covered, total = 0.02, 12, 0, 0
    for trial in range(trials):
        scenario = replace(small, seeds=replace(small.seeds, training=100 * trial))
        front = pareto_front(scenario, Formula(scenario, noise=noise), trainings=8, confirm=3)
        exact = Formula(scenario)
        own = front.points.drop_duplicates("schedule")
        truth = np.array(
            [np.mean(exact.test(Schedule.parse(text, devices=3))) for text in own["schedule"]]
        )
        error = (own["accuracy_confirmed"] - truth).abs()
        covered += int((error <= own["accuracy_confirmed_error"]).sum())
        total += len(own)
        assert own["accuracy_confirmed_error"].iloc[0] == pytest.approx(
            1.96 * noise / np.sqrt(3), rel=0.8
        )
        share = front.points["probability_nondominated"]
        assert ((share >= 0) & (share <= 1)).all()
    # binomial: 95 % of `total` of them, give or take four standard deviations
    assert covered >= total * 0.95 - 4 * np.sqrt(total * 0.95 * 0.05)
    exactly = replace(small, search=replace(small.search, method="evolution"))
    sure = pareto_front(exactly, Formula(exactly), trainings=8, confirm=2).points
    assert (sure["probability_nondominated"] == 1.0).all()
    np.testing.assert_allclose(sure["accuracy_confirmed"], sure["accuracy"])


class Slow(Formula):
    """Takes its time, as chance has it; knows how many trainings there were at once."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        super().__init__(scenario, noise=0.02)
        self.rng, self.lock = np.random.default_rng(seed), threading.Lock()
        self.now = self.most = 0

    def with_seed(self, seed: int) -> Formula:
        return Slow(replace(self.scenario, seeds=replace(self.scenario.seeds, training=seed)), seed)

    def train(self, schedule: Schedule) -> Evaluation:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            seconds = 0.03 * self.rng.random()
        time.sleep(seconds)
        with self.lock:
            self.now -= 1
            return super().train(schedule)


@pytest.mark.parametrize("stop_early", [False, True])
def test_fronts_do_not_depend_on_which_training_is_done_first(
    either: Scenario, stop_early: bool
) -> None:
    limits = replace(either.thresholds, energy_max_j=2.0)
    scenario = replace(
        either, thresholds=limits, search=replace(either.search, stop_early=stop_early)
    )
    for batch in (1, 4):
        alone = pareto_front(
            scenario, Formula(scenario, noise=0.02), trainings=14, confirm=2, batch=batch
        )
        for seed in (0, 1):
            slow = Slow(scenario, seed)
            with ThreadPoolExecutor(4) as pool:
                front = pareto_front(
                    scenario, slow, trainings=14, confirm=2, executor=pool, batch=batch
                )
            assert front.points.equals(alone.points)
            assert [str(e.schedule) for e in front.evaluations] == [
                str(e.schedule) for e in alone.evaluations
            ]
            assert (slow.most > 1) == (batch > 1)


def test_a_batch_is_as_large_as_the_budget(small: Scenario) -> None:
    front = pareto_front(small, Formula(small), trainings=10, batch=4)
    assert len(front.evaluations) == 10
    with pytest.raises(DecisionError, match="batch must be a whole number of at least 1, got 0"):
        pareto_front(small, Formula(small), trainings=10, batch=0)


def test_what_goes_wrong_in_a_worker_is_raised_and_the_rest_let_go(small: Scenario) -> None:
    class Wrong(Formula):
        def train(self, schedule: Schedule) -> Evaluation:
            if self.trained:
                time.sleep(0.2)  # time to let go of what waits
            super().train(schedule)
            raise OSError("no route to the other machine")

    wrong = Wrong(small)
    with ThreadPoolExecutor(1) as pool, pytest.raises(OSError, match="no route"):
        pareto_front(small, wrong, trainings=10, executor=pool, batch=4)
    assert len(wrong.trained) <= 2


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            {"delay_max_s": 1e-3},
            r"delay_max_s must .*: 1x0:fff, which costs least, .* s, got 0\.001",
        ),
        (
            {"energy_max_j": 1e-6},
            r"energy_max_j must .*: 1x0:fff, .* takes at least .* J, got 1e-06",
        ),
        (
            {"energy_max_j": 1e-6, "delay_max_s": 1e3},
            r"takes at least .* J within thresholds.delay_max_s 1000 s, got 1e-06",
        ),
    ],
)
def test_costs_that_nothing_can_meet_are_refused_before_anything_is_trained(
    small: Scenario, limits: dict[str, float], message: str
) -> None:
    def untouched(schedule: Schedule) -> bool:
        raise AssertionError("it was trained")

    tight = replace(small, thresholds=replace(small.thresholds, **limits))
    with pytest.raises(InfeasibleError, match=message):
        pareto_front(tight, Formula(tight, untouched), trainings=4)


def test_the_least_that_is_named_can_be_met(small: Scenario) -> None:
    """Limits a little above what the message names are met by the schedule that it names."""
    planner = Planner(small, Formula(small).workload)
    for name, sign in (("delay_max_s", "s"), ("energy_max_j", "J")):
        tight = replace(small, thresholds=replace(small.thresholds, **{name: 1e-6}))
        with pytest.raises(InfeasibleError) as refusal:
            Planner(tight, planner.costs.workload).require_attainable()
        least = float(str(refusal.value).split("at least ")[1].split(f" {sign}")[0])
        loose = replace(small, thresholds=replace(small.thresholds, **{name: 1.001 * least}))
        Planner(loose, planner.costs.workload).require_attainable()
        curve = planner.curve("1x0:fff")
        values = curve.delay_s if name == "delay_max_s" else curve.energy_j
        assert values.min() == pytest.approx(least, rel=2e-2)


def test_a_schedule_that_fails_to_confirm_leaves_the_others_confirmed(small: Scenario) -> None:
    class Unlucky(Formula):
        def with_seed(self, seed: int) -> Formula:
            seeds = replace(self.scenario.seeds, training=seed)
            return Formula(replace(self.scenario, seeds=seeds), lambda s: len(s) == 2, noise=0.01)

    table = pareto_front(small, Unlucky(small), trainings=8, confirm=2).points
    failed = table["rounds"] == 2
    assert failed.any()
    for name in ("accuracy_confirmed", "accuracy_confirmed_error", "probability_nondominated"):
        assert (table[name].isna() == failed).all(), name
    single = pareto_front(small, Formula(small), trainings=8, confirm=1).points
    assert single["accuracy_confirmed"].notna().all()
    assert not {"accuracy_confirmed_error", "probability_nondominated"} & set(single)


def scores(
    rng: np.random.Generator, truth: np.ndarray, training: np.ndarray, std: tuple[float, ...]
) -> np.ndarray:
    """Three seeds' scores [seed, cut]: errors common to all, to a training, and of a cut alone."""
    shape = 3, len(truth)
    return (
        truth
        + std[0] * rng.standard_normal((3, 1))
        + std[1] * rng.standard_normal(shape)[:, training]
        + std[2] * rng.standard_normal(shape)
    )


@pytest.mark.parametrize("std", [(0, 0, 0.02), (0, 0.018, 0.009), (0.018, 0, 0.009)])
def test_intervals_hold_what_they_promise(std: tuple[float, ...]) -> None:
    """Also where errors are common to cuts of one training, or to all trainings of one seed."""
    rng, training = np.random.default_rng(5), np.repeat(np.arange(0, 24, 3), 3)
    truth, held = rng.uniform(0.5, 0.7, 24), []
    for _ in range(400):
        spread = _Spread.of(scores(rng, truth, training, std), training)
        held.append(np.abs(spread.mean - truth) <= spread.half_width)
    assert np.mean(held) == pytest.approx(0.95, abs=0.025)


def test_what_errs_together_is_told_apart(small: Scenario) -> None:
    """Two cuts of one training, the dearer 0.02 better; a seed moves both by about that."""
    rng, training = np.random.default_rng(6), np.array([0, 0, 2, 2, 4, 4, 6, 6])
    truth = np.array([0.60, 0.62, 0.65, 0.67, 0.70, 0.72, 0.75, 0.77])
    points = pd.DataFrame({"energy_j": [1.0, 2.0], "delay_s": [1.0, 2.0]})
    points["accuracy_chosen_by"] = truth[:2]
    kept = {}
    for name, std in (("together", (0.0, 0.02, 0.002)), ("alone", (0.0, 0.0, 0.02))):
        kept[name] = np.mean(
            [
                _probability(
                    points, _Spread.of(scores(rng, truth, training, std), training), np.array([0, 1]),
                    small,
                )[1]
                for _ in range(20)
            ]
        )  # fmt: skip
    assert kept["together"] > 0.98
    assert kept["alone"] < 0.95


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"trainings": 2.5}, r"trainings must be a whole number of at least 1, got 2\.5"),
        ({"trainings": 0}, "trainings must be .* at least 1, got 0"),
        ({"trainings": 2, "confirm": -1}, "confirm must be .* at least 0, got -1"),
        ({"trainings": 2, "batch": True}, "batch must be .* got True"),
    ],
)
def test_numbers_must_be_whole(small: Scenario, arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(DecisionError, match=problem):
        pareto_front(small, Formula(small), **arguments)


def test_an_evaluator_that_returns_too_little_is_told_so(small: Scenario) -> None:
    class Short(Formula):
        def train(self, schedule: Schedule) -> Evaluation:
            done = super().train(schedule)
            return replace(done, rounds=done.rounds[:1])

    class Few(Formula):
        def _accuracy(self, schedule: Schedule) -> tuple[float, ...]:
            return super()._accuracy(schedule)[:2]

    with pytest.raises(DecisionError, match=r"must return 3 rounds for .*, got 1"):
        pareto_front(small, Short(small), trainings=2)
    with pytest.raises(DecisionError, match=r"one a device \(3\) for a round, got 2"):
        pareto_front(small, Few(small), trainings=2)
