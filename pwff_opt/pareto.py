"""The energy-delay-accuracy front of a scenario: search, test, confirm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import t

from pwff_opt.decision import Schedule
from pwff_opt.errors import DecisionError, InfeasibleError
from pwff_opt.evaluation import Evaluation, Evaluator
from pwff_opt.planning import Curve, Planner
from pwff_opt.rng import stream
from pwff_opt.scenario import Scenario, Thresholds
from pwff_opt.search import (
    Evolution,
    Reference,
    Searcher,
    Surrogate,
    candidates,
    objectives,
)
from pwff_solvers.front import knee, nondominated

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

DRAWS = 500
"""Of accuracies, for the probability that a point belongs to the front: a standard error of 0.02."""
SEARCHERS: dict[str, Callable[[Planner], Searcher]] = {
    "surrogate": Surrogate,
    "evolution": Evolution,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Front:
    """An energy-delay-accuracy front, and everything that was trained to find it.

    ``points`` has a row a point, least accurate first: energy_j, delay_s, accuracy (mean over
    devices, on test data), accuracy_worst_device, accuracy_std_devices, accuracy_validation (measured in
    the search), accuracy_chosen_by (what the search takes it to be), price_of_time_w, rounds, schedule,
    evaluation (key of the training) and knee. No point is dominated in energy, delay and
    accuracy_chosen_by; in test accuracy, which chose nothing, one may be.

    A front that was confirmed has three columns more. Its schedules were trained again with fresh
    seeds, which chose nothing: accuracy_confirmed is their mean test accuracy, accuracy_confirmed_error
    the half width of its 95 % interval, by the variance between seeds, pooled over schedules;
    probability_nondominated the share of draws from those normal distributions in which no other point of
    the front is better in energy, delay and accuracy. What data were drawn is the same for all seeds.
    """

    points: pd.DataFrame
    evaluations: tuple[Evaluation, ...]
    gap: float
    """Largest relative duality gap of an allocation behind it."""
    reference: Reference | None
    """The corner that improvements were measured from, where the search has one."""
    rounds_asked: int
    """Of all schedules that the search has picked, to their ends."""
    rounds_trained: int
    """Of those: not the ones that another schedule had begun with, nor those after an early stop."""

    @property
    def knee(self) -> pd.Series:
        """The point that gives most for what it gives up; see :func:`pwff_solvers.front.knee`."""
        return self.points[self.points["knee"]].iloc[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a search stands: ``stage`` names what it does, ``done`` of ``total`` are finished."""

    stage: Literal["train", "test", "confirm"]
    done: int
    total: int
    text: str


def pareto_front(
    scenario: Scenario,
    evaluator: Evaluator,
    *,
    trainings: int,
    confirm: int = 0,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Front:
    """Search for the front of total energy, total delay and error over schedules.

    What a schedule costs is solved exactly; what it learns has to be trained. A training contributes
    the exact energy-delay curve of the schedule cut after each of its validated rounds (training is
    nested, so that prefix has been trained too). The search sees validation accuracy; the front reports
    test accuracy. ``scenario.search.method`` says how schedules are chosen (:mod:`pwff_opt.search`).

    Parameters
    ----------
    scenario : Scenario
    evaluator : Evaluator
        Trains schedules; one that keeps a journal makes the search resumable.
    confirm : int
        Seeds with which every schedule of the front is trained afresh; see :class:`Front`.
    trainings : int
        How much to train, in schedules of ``training.rounds`` rounds. One that is stopped early, or
        begins like one that was trained, costs only the rounds that are new.
    progress : callable
        Told before every training and every test.

    Raises
    ------
    InfeasibleError
        If nothing that was trained meets the scenario's thresholds.
    """
    if trainings < 1:
        raise DecisionError(f"trainings must be at least 1, got {trainings}")
    planner = Planner(scenario, evaluator.workload)
    searcher = SEARCHERS[scenario.search.method](planner)
    budget = _Rounds(trainings * scenario.training.rounds)
    found: list[tuple[Evaluation, Curve]] = []
    while budget.left > 0 and (schedule := searcher.ask()) is not None:
        progress(budget.progress(str(schedule)))
        evaluation = _trained(schedule, evaluator, searcher, scenario)
        budget.spend(evaluation)
        searcher.tell(schedule, evaluation)
        found.append((evaluation, planner.curve(evaluation.schedule)))
    progress(budget.progress(""))
    tables = [
        candidates(evaluation, curve, searcher.accuracy(evaluation), scenario.thresholds)
        for evaluation, curve in found
    ]
    points = pd.concat(tables, ignore_index=True)
    if not len(points):
        raise InfeasibleError(_nothing_acceptable(scenario.thresholds, found))
    points = points[nondominated(objectives(points))].reset_index(drop=True)
    points = _tested(points, evaluator, scenario, progress)
    if confirm:
        points = _confirmed(points, evaluator, scenario, confirm, progress)
    return Front(
        points=points,
        evaluations=tuple(evaluation for evaluation, _ in found),
        gap=max(curve.gap for _, curve in found),
        reference=searcher.reference,
        rounds_asked=len(found) * scenario.training.rounds,
        rounds_trained=budget.spent,
    )


class _Rounds:
    """What is left to train: a round that begins like one trained before is free."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._trained: set[str] = set()

    @property
    def spent(self) -> int:
        return len(self._trained)

    @property
    def left(self) -> int:
        return self._total - self.spent

    def spend(self, evaluation: Evaluation) -> None:
        whole = evaluation.schedule
        self._trained |= {str(whole.prefix(number + 1)) for number in range(len(whole))}

    def progress(self, text: str) -> Progress:
        return Progress(
            stage="train", done=min(self.spent, self._total), total=self._total, text=text
        )


def _trained(
    schedule: Schedule, evaluator: Evaluator, searcher: Searcher, scenario: Scenario
) -> Evaluation:
    """Train a schedule, with ``search.stop_early`` only as far as it is worth it."""
    marks = scenario.training.validated if scenario.search.stop_early else ()
    for cut in [mark for mark in marks if mark < len(schedule)]:
        begun = _tried_twice(schedule.prefix(cut), evaluator)
        if begun.status == "failed" or not searcher.worth_going_on(schedule, begun):
            return begun
    return _tried_twice(schedule, evaluator)


def _tried_twice(schedule: Schedule, evaluator: Evaluator) -> Evaluation:
    """Train a schedule; a failure may have been one of the moment (memory was short, say)."""
    evaluation = _checked(evaluator.train(schedule))
    return _checked(evaluator.train(schedule)) if evaluation.status == "failed" else evaluation


def _checked(evaluation: Evaluation) -> Evaluation:
    """Return the evaluation, failed if it has an accuracy that is none."""
    accuracies = [value for entry in evaluation.rounds for value in entry.accuracy]
    if all(0.0 <= value <= 1.0 for value in accuracies):  # NaN is not
        return evaluation
    reason = "accuracies must be between 0 and 1, and not NaN"
    return replace(evaluation, rounds=(), status="failed", reason=reason)


def _tested(
    points: pd.DataFrame,
    evaluator: Evaluator,
    scenario: Scenario,
    progress: Callable[[Progress], None],
) -> pd.DataFrame:
    """Return the front with the accuracy on test data, its order, and the knee marked."""
    schedules = list(dict.fromkeys(points["schedule"]))
    tests = {}
    for done, text in enumerate(schedules):
        progress(Progress(stage="test", done=done, total=len(schedules), text=text))
        tests[text] = np.array(evaluator.test(_parsed(text, scenario)))
    progress(Progress(stage="test", done=len(schedules), total=len(schedules), text=""))
    accuracy = [tests[text] for text in points["schedule"]]
    tested = points.assign(
        accuracy=[scores.mean() for scores in accuracy],
        accuracy_worst_device=[scores.min() for scores in accuracy],
        accuracy_std_devices=[scores.std() for scores in accuracy],
    )
    # Chosen on what the search saw: test data must not steer any choice.
    tested["knee"] = np.arange(len(tested)) == knee(objectives(tested))
    first = ["energy_j", "delay_s", "accuracy", "accuracy_worst_device", "accuracy_std_devices"]
    first += [
        "accuracy_validation",
        "accuracy_chosen_by",
        "price_of_time_w",
        "rounds",
        "schedule",
        "evaluation",
        "knee",
    ]
    tested = tested[first + [name for name in tested if name not in first]]
    return tested.sort_values(["accuracy_chosen_by", "delay_s"], ignore_index=True)


def _confirmed(
    points: pd.DataFrame,
    evaluator: Evaluator,
    scenario: Scenario,
    seeds: int,
    progress: Callable[[Progress], None],
) -> pd.DataFrame:
    """Return the front with what trainings with fresh seeds make of it."""
    schedules = list(dict.fromkeys(points["schedule"]))
    # The longest first: cut earlier, a schedule has then been trained too.
    longest = sorted(schedules, key=lambda text: -len(_parsed(text, scenario)))
    scores: dict[str, list[float]] = {text: [] for text in schedules}
    total = seeds * len(schedules)
    for number in range(seeds):
        fresh = evaluator.with_seed(scenario.seeds.training + 1 + number)
        for before, text in enumerate(longest):
            done = number * len(schedules) + before
            progress(Progress(stage="confirm", done=done, total=total, text=text))
            schedule = _parsed(text, scenario)
            if _tried_twice(schedule, fresh).status == "done":
                scores[text].append(float(np.mean(fresh.test(schedule))))
    progress(Progress(stage="confirm", done=total, total=total, text=""))
    counts = np.array([len(scores[text]) for text in schedules])
    means = np.array([np.mean(scores[text]) if scores[text] else np.nan for text in schedules])
    freedom = int(np.maximum(counts - 1, 0).sum())
    squares = sum(
        float(np.square(np.subtract(own, np.mean(own))).sum()) for own in scores.values() if own
    )
    std = np.sqrt(squares / freedom) if freedom else np.nan
    error = std / np.sqrt(np.maximum(counts, 1))
    place = points["schedule"].map({text: n for n, text in enumerate(schedules)}).to_numpy()
    return points.assign(
        accuracy_confirmed=means[place],
        accuracy_confirmed_error=(t.ppf(0.975, freedom) if freedom else np.nan) * error[place],
        probability_nondominated=_probability(points, means, error, place, scenario),
    )


def _probability(
    points: pd.DataFrame, means: FloatArray, error: FloatArray, place: IntArray, scenario: Scenario
) -> FloatArray:
    """Return how often a point is not dominated when accuracies vary as they seem to, [point]."""
    if not np.isfinite(means).all() or not np.isfinite(error).all():
        return np.full(len(points), np.nan)
    rng = stream(scenario.seeds.search, "confirm")
    values = objectives(points)
    kept = np.zeros(len(points))
    for _ in range(DRAWS):
        values[:, 2] = 1.0 - (means + error * rng.standard_normal(len(means)))[place]
        kept += nondominated(values)
    return kept / DRAWS


def _parsed(text: str, scenario: Scenario) -> Schedule:
    return Schedule.parse(text, devices=len(scenario.devices))


def _nothing_acceptable(thresholds: Thresholds, found: list[tuple[Evaluation, Curve]]) -> str:
    """Return what the thresholds ask and the best that was found for each alone."""
    good = [(evaluation, curve) for evaluation, curve in found if evaluation.rounds]
    if not good:
        reasons = sorted({evaluation.reason for evaluation, _ in found})
        return f"every training failed: {'; '.join(reasons)}"
    accuracy = max(
        np.mean(entry.accuracy)
        for evaluation, _ in good
        for entry in evaluation.rounds
        if entry.accuracy
    )
    energy = min(curve.energy_j.min() for _, curve in good)
    delay = min(curve.delay_s.min() for _, curve in good)
    return (
        "nothing that was trained meets all thresholds; asked: "
        f"accuracy_min {thresholds.accuracy_min}, energy_max_j {thresholds.energy_max_j}, "
        f"delay_max_s {thresholds.delay_max_s}; the best of each alone: accuracy {accuracy:.3f}, "
        f"energy {energy:.4g} J, delay {delay:.4g} s. Loosen [thresholds] or train more schedules"
    )
