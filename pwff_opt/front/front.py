"""The energy-delay-accuracy front of a scenario: search, test, confirm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, replace
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import t

from pwff_opt.errors import DecisionError, InfeasibleError
from pwff_opt.evaluation import Evaluation, Evaluator
from pwff_opt.planning.planner import Curve, Planner
from pwff_opt.registry import SEARCHES
from pwff_opt.rng import stream
from pwff_opt.scenario import Scenario, Thresholds
from pwff_opt.scenario.schedule import Schedule
from pwff_opt.search.reference import Reference
from pwff_opt.search.searcher import Method, Searcher
from pwff_opt.search.table import candidates, objectives
from pwff_solvers.front import knee, nondominated

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
P = ParamSpec("P")
T = TypeVar("T")

DRAWS = 500
"""Number of draws of accuracies for the probability that a point belongs to the front: an error of 0.02.

That is the standard error."""


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
    probability_nondominated the share of draws of all accuracies in which no other point of the front
    is better in energy, delay and accuracy. In them, cuts of one training err together as far as they
    did with the fresh seeds. One fresh seed says nothing of errors: the last two columns are not there
    then, nor where all trainings failed. What data were drawn is the same for all seeds.
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
    executor: Executor | None = None,
    batch: int = 1,
) -> Front:
    """Search for the front of total energy, total delay and error over schedules.

    What a schedule costs is solved exactly; what it learns has to be trained. A training contributes
    the exact energy-delay curve of the schedule cut after each of its validated rounds (training is
    nested, so that prefix has been trained too). The search sees validation accuracy; the front reports
    test accuracy. ``scenario.search.method`` says how schedules are chosen (:mod:`pwff_opt.search.methods`).

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
        Told before every training and every test is handed out.
    executor : concurrent.futures.Executor
        Where the evaluator trains and tests: a pool of threads for one that talks to other machines,
        dask's ``client.get_executor()``, and so on; in this thread if not given. Several workers then
        use the evaluator at once: it must bear that (the trainer of this machine uses its cores by
        itself, and does not), and one worker must find what another has trained.
    batch : int
        How many schedules are chosen at a time, to be trained side by side. The front depends on it,
        since a choice then knows less, but not on which training is done first.

    Raises
    ------
    InfeasibleError
        If nothing that was trained meets the scenario's thresholds; before anything is trained, if
        nothing can.
    """
    for name, value, least in (
        ("trainings", trainings, 1),
        ("confirm", confirm, 0),
        ("batch", batch, 1),
    ):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
            raise DecisionError(f"{name} must be a whole number of at least {least}, got {value!r}")
    executor = executor or _Here()
    planner = Planner(scenario, evaluator.workload)
    planner.require_attainable()
    method: Method = SEARCHES[scenario.search.method]
    searcher = method.build(planner)
    budget = _Rounds(trainings, scenario.training.rounds)
    found: list[tuple[Evaluation, Curve]] = []
    while asked := searcher.ask(min(batch, budget.trainings_left)):
        for schedule in asked:
            progress(budget.progress(str(schedule)))
        for schedule, evaluation in zip(
            asked, _trained(asked, evaluator, searcher, scenario, executor), strict=True
        ):
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
    points = _tested(points, evaluator, scenario, progress, executor)
    if confirm:
        points = _confirmed(points, evaluator, scenario, confirm, progress, executor)
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

    def __init__(self, trainings: int, rounds: int) -> None:
        self._total, self._rounds = trainings * rounds, rounds
        self._trained: set[str] = set()

    @property
    def spent(self) -> int:
        return len(self._trained)

    @property
    def trainings_left(self) -> int:
        """Schedules, the last of which may need more rounds than are left."""
        return max(0, -((self.spent - self._total) // self._rounds))

    def spend(self, evaluation: Evaluation) -> None:
        whole = evaluation.schedule
        self._trained |= {str(whole.prefix(number + 1)) for number in range(len(whole))}

    def progress(self, text: str) -> Progress:
        return Progress(
            stage="train", done=min(self.spent, self._total), total=self._total, text=text
        )


class _Here(Executor):
    """Does what is submitted at once, in this thread."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _trained(
    schedules: Sequence[Schedule],
    evaluator: Evaluator,
    searcher: Searcher,
    scenario: Scenario,
    executor: Executor,
) -> list[Evaluation]:
    """Train schedules side by side, with ``search.stop_early`` each only as far as it is worth it.

    Whether one goes on depends on what was told before all of them, not on which is done first.
    """
    marks = scenario.training.validated if scenario.search.stop_early else ()
    cuts = [[mark for mark in marks if mark < len(one)] + [len(one)] for one in schedules]
    running: dict[Future[Evaluation], int] = {}
    done: dict[int, Evaluation] = {}

    def go_on(number: int) -> None:
        cut = schedules[number].prefix(cuts[number].pop(0))
        running[executor.submit(_tried_twice, cut, evaluator)] = number

    try:
        for number in range(len(schedules)):
            go_on(number)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number = running.pop(future)
                done[number] = so_far = future.result()
                if (
                    cuts[number]
                    and so_far.status == "done"
                    and searcher.worth_going_on(schedules[number], so_far)
                ):
                    go_on(number)
    finally:
        _cancel(running)
    return [done[number] for number in range(len(schedules))]


def _results(futures: Sequence[Future[T]]) -> list[T]:
    """Return the results, in order."""
    try:
        return [future.result() for future in futures]
    finally:
        _cancel(futures)


def _cancel(futures: Iterable[Future[Any]]) -> None:
    """Let go of what has not begun, where one of several went wrong."""
    for future in futures:
        future.cancel()


def _tried_twice(schedule: Schedule, evaluator: Evaluator) -> Evaluation:
    """Train a schedule; a failure may have been one of the moment (memory was short, say)."""
    evaluation = _checked(evaluator.train(schedule))
    return _checked(evaluator.train(schedule)) if evaluation.status == "failed" else evaluation


def _checked(evaluation: Evaluation) -> Evaluation:
    """Return the evaluation, failed if it has an accuracy that is none.

    Raises
    ------
    DecisionError
        If it is not one of the whole schedule and of all devices: its evaluator is at fault.
    """
    schedule, devices = evaluation.schedule, len(evaluation.schedule.rounds[0].ranks)
    if evaluation.status == "done" and len(evaluation.rounds) != len(schedule):
        raise DecisionError(
            f"evaluator.train must return {len(schedule)} rounds for {schedule}, "
            f"got {len(evaluation.rounds)}"
        )
    for entry in evaluation.rounds:
        if len(entry.accuracy) not in (0, devices):
            raise DecisionError(
                f"evaluator.train must return no accuracy or one a device ({devices}) for a round, "
                f"got {len(entry.accuracy)}"
            )
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
    executor: Executor,
) -> pd.DataFrame:
    """Return the front with the accuracy on test data, its order, and the knee marked."""
    schedules = list(dict.fromkeys(points["schedule"]))
    futures = []
    for done, text in enumerate(schedules):
        progress(Progress(stage="test", done=done, total=len(schedules), text=text))
        futures.append(executor.submit(evaluator.test, _parsed(text, scenario)))
    tests = dict(zip(schedules, map(np.array, _results(futures)), strict=True))
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
    executor: Executor,
) -> pd.DataFrame:
    """Return the front with what trainings with fresh seeds make of it."""
    schedules = list(dict.fromkeys(points["schedule"]))
    parsed = [_parsed(text, scenario) for text in schedules]
    training = _trainings(parsed)
    total = seeds * len(schedules)
    tasks: list[tuple[int, IntArray]] = []
    futures = []
    for number in range(seeds):
        fresh = evaluator.with_seed(scenario.seeds.training + 1 + number)
        for whole in dict.fromkeys(training.tolist()):
            # The whole first: cut earlier, it has then been trained too.
            own = np.flatnonzero(training == whole)
            own = own[np.argsort([-len(parsed[cut]) for cut in own], kind="stable")]
            done = sum(len(before) for _, before in tasks)
            progress(Progress(stage="confirm", done=done, total=total, text=schedules[whole]))
            tasks.append((number, own))
            futures.append(executor.submit(_scores, [parsed[cut] for cut in own], fresh))
    scores = np.empty((seeds, len(schedules)))
    for (number, own), values in zip(tasks, _results(futures), strict=True):
        scores[number, own] = values
    progress(Progress(stage="confirm", done=total, total=total, text=""))
    spread = _Spread.of(scores, training)
    place = points["schedule"].map({text: n for n, text in enumerate(schedules)}).to_numpy()
    points = points.assign(accuracy_confirmed=spread.mean[place])
    if not spread.freedom:  # nothing says how seeds differ
        return points
    return points.assign(
        accuracy_confirmed_error=spread.half_width[place],
        probability_nondominated=_probability(points, spread, place, scenario),
    )


def _scores(cuts: Sequence[Schedule], evaluator: Evaluator) -> list[float]:
    """Return the mean test accuracy of every cut, NaN where its training failed."""
    return [
        float(np.mean(evaluator.test(cut)))
        if _tried_twice(cut, evaluator).status == "done"
        else np.nan
        for cut in cuts
    ]


def _trainings(schedules: Sequence[Schedule]) -> IntArray:
    """Return for every schedule the longest that begins with it: they share a training."""
    longest = sorted(range(len(schedules)), key=lambda n: -len(schedules[n]))
    return np.array(
        [next(n for n in longest if schedules[n].prefix(len(one)) == one) for one in schedules]
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Spread:
    r"""What trainings with several seeds say of the accuracies of cuts.

    The error of a cut with one seed is taken to be the sum of what that seed does to all trainings, to
    all cuts of one training, and to the cut alone: normal, and of the same sizes everywhere. Products
    of residuals, pooled over pairs of cuts, estimate the variances (negative estimates count as 0).

    The variance of a cut has, by Satterthwaite (Biometrics Bulletin 2, 1946), about
    :math:`(\sum_c f_{cc})^2 / \sum_{cd} \rho_{cd}^2 f_{cd}` degrees of freedom, where
    :math:`f_{cd}` are those of a pair and :math:`\rho_{cd}` is its correlation: cuts that err together
    say the same thing twice.
    """

    mean: FloatArray
    """[cut]; NaN where no seed succeeded."""
    seeds: IntArray
    """[cut]: how many succeeded."""
    training: IntArray
    """[cut]: which training it belongs to."""
    common: float
    """Variance of what a seed does to all trainings."""
    together: float
    """Of what it does to all cuts of a training."""
    alone: float
    """Of what it does to a cut."""
    freedom: float
    """0 where no cut has two seeds."""

    @classmethod
    def of(cls, scores: FloatArray, training: IntArray) -> _Spread:
        """Return what scores [seed, cut] say, NaN where a training failed."""
        there = np.isfinite(scores)
        seeds = there.sum(axis=0)
        known = np.where(there, scores, 0.0)
        mean = np.where(seeds > 0, known.sum(axis=0) / np.maximum(seeds, 1), np.nan)
        rest = np.where(there, known - mean, 0.0)
        products = rest.T @ rest
        # The means took one degree of freedom.
        pairs = np.maximum(there.T.astype(float) @ there - 1.0, 0.0)
        same = np.eye(len(training), dtype=bool)
        alike = (training[:, None] == training) & ~same
        apart = ~alike & ~same
        common, own, whole = (
            float(products[which].sum() / max(pairs[which].sum(), 1.0))
            for which in (apart, alike, same)
        )
        common = min(max(common, 0.0), whole)
        own = min(max(own, common), whole)
        covariance = common * apart + own * alike + whole * same
        correlation = covariance / whole if whole > 0 else same
        return cls(
            mean=mean,
            seeds=seeds,
            training=training,
            common=common,
            together=own - common,
            alone=whole - own,
            freedom=float(np.trace(pairs) ** 2 / max((correlation**2 * pairs).sum(), 1.0)),
        )

    @property
    def half_width(self) -> FloatArray:
        """Half the 95 % interval of the mean, [cut]; NaN where no seed succeeded."""
        std = np.sqrt(self.common + self.together + self.alone)
        error = std / np.sqrt(np.maximum(self.seeds, 1))
        return np.where(self.seeds > 0, t.ppf(0.975, self.freedom) * error, np.nan)

    def draws(self, count: int, rng: np.random.Generator) -> FloatArray:
        """Return accuracies as they may be, [draw, cut]: multivariate t around the means."""
        shape = count, len(self.mean)
        error = (
            np.sqrt(self.common) * rng.standard_normal((count, 1))
            + np.sqrt(self.together) * rng.standard_normal(shape)[:, self.training]
            + np.sqrt(self.alone) * rng.standard_normal(shape)
        )
        size = np.sqrt(self.freedom / rng.chisquare(self.freedom, (count, 1)))
        return np.asarray(self.mean + size * error / np.sqrt(np.maximum(self.seeds, 1)))


def _probability(
    points: pd.DataFrame, spread: _Spread, place: IntArray, scenario: Scenario
) -> FloatArray:
    """Return how often a point is not dominated when accuracies vary as they seem to, [point].

    NaN where no seed succeeded: those points compete with none.
    """
    share = np.full(len(points), np.nan)
    there = np.isfinite(spread.half_width[place])
    values = objectives(points)[there]
    kept = np.zeros(len(values))
    if len(values):
        for accuracy in spread.draws(DRAWS, stream(scenario.seeds.search, "confirm")):
            values[:, 2] = 1.0 - accuracy[place[there]]
            kept += nondominated(values)
    share[there] = kept / DRAWS
    return share


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
