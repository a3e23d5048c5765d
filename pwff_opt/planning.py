"""The planning API: what a schedule costs, how to allocate it best, and which schedules to choose.

No torch is needed here: accuracy comes from an :class:`~pwff_opt.evaluation.Evaluator`, and a plan or a
new allocation in a running system needs none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pwff_opt.costs import CostModel, Demand, Workload
from pwff_opt.decision import Codec, LayerState, RoundDecision, Schedule
from pwff_opt.errors import DecisionError, InfeasibleError
from pwff_opt.evaluation import Evaluation, Evaluator
from pwff_opt.rng import stream
from pwff_opt.scenario import Scenario, Thresholds
from pwff_opt.wireless import channel_gain
from pwff_solvers.allocation import (
    Allocation,
    Batch,
    LeastEnergy,
    Shortest,
    Status,
    Weighted,
    least_energy_within,
    solve,
)
from pwff_solvers.evolution import SetSearch
from pwff_solvers.front import knee, nondominated

FloatArray = NDArray[np.float64]

# Prices of time on a curve, as multiples of (energy / delay) of the fastest allocation. Above the
# first the delay is within a few per cent of the shortest; below the last the energy is flat, CPU
# frequencies having come down by 10^(5/3) and more.
PRICE_DECADES = (1.0, -5.0)
LARGEST_GAP = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curve:
    """The energy-delay curves of a schedule and of all its prefixes, at the same prices of time.

    Row n - 1 is the schedule cut after n rounds; along a row delay grows and energy falls. Each point
    is optimal for its price, over bandwidth, power and frequency of all devices in all rounds:
    the rounds share the price, so their sum minimises total energy + price x total delay.
    """

    price_of_time_w: FloatArray
    """[point], descending."""
    energy_j: FloatArray
    """[round, point]."""
    delay_s: FloatArray
    """[round, point]."""
    gap: float
    """Largest relative duality gap of all allocations behind the curve."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """A schedule with its allocation: instance t of ``allocation`` is round t."""

    schedule: Schedule
    demand: Demand
    allocation: Allocation
    price_of_time_w: float
    energy_j: float
    delay_s: float


class Planner:
    """Costs, curves and plans of schedules in one scenario.

    Parameters
    ----------
    scenario : Scenario
    workload : Workload
        From an evaluator, or :meth:`Workload.padded` where no data are at hand.
    """

    def __init__(self, scenario: Scenario, workload: Workload) -> None:
        self.scenario = scenario
        self.costs = CostModel(scenario, workload)
        self.gain = channel_gain(scenario)
        self.codec = Codec(
            space=scenario.decisions,
            devices=len(scenario.devices),
            layers=self.costs.architecture.layers,
            rounds=scenario.training.rounds,
        )

    def curve(self, schedule: Schedule, *, points: int | None = None) -> Curve:
        """Return the energy-delay curves of a schedule and its prefixes (no training needed)."""
        points = points or self.scenario.search.curve_points
        rounds = len(schedule)
        problem = self._problem(schedule)
        access = self.scenario.cell.access
        fastest = _certified(solve(problem, Shortest(), access))
        reference_w = fastest.energy_j.sum() / fastest.round_s.sum()
        prices = reference_w * np.logspace(*PRICE_DECADES, points)
        many = problem.take(np.repeat(np.arange(rounds), points))
        best = _certified(solve(many, Weighted(np.tile(prices, rounds)), access))
        return Curve(
            price_of_time_w=prices,
            energy_j=best.energy_j.reshape(rounds, points).cumsum(axis=0),
            delay_s=best.round_s.reshape(rounds, points).cumsum(axis=0),
            gap=float(max(fastest.gap.max(), best.gap.max())),
        )

    def plan(
        self,
        schedule: Schedule,
        *,
        price_of_time_w: float | None = None,
        delay_max_s: float | None = None,
    ) -> Plan:
        """Return the best allocation of every round of a schedule.

        Give a price of time (J/s), or the longest total delay: then the energy is the least
        possible within it, all rounds sharing the price of time that the deadline amounts to (0 where
        it does not bind).

        Raises
        ------
        InfeasibleError
            If the deadline is shorter than the shortest total delay.
        """
        if (price_of_time_w is None) == (delay_max_s is None):
            raise DecisionError("give either price_of_time_w or delay_max_s, not both and not none")
        problem = self._problem(schedule)
        access = self.scenario.cell.access

        if delay_max_s is None:
            assert price_of_time_w is not None
            allocation = solve(problem, Weighted(price_of_time_w), access)
        else:
            shortest_s = float(_certified(solve(problem, Shortest(), access)).round_s.sum())
            if delay_max_s < shortest_s:
                raise InfeasibleError(
                    f"delay_max_s must be at least {shortest_s:.6g} s, the shortest total delay of "
                    f"{schedule}, got {delay_max_s:g}"
                )
            allocation, price_of_time_w = least_energy_within(problem, delay_max_s, access)
        allocation = _certified(allocation)
        return Plan(
            schedule=schedule,
            demand=self.costs.demand(schedule),
            allocation=allocation,
            price_of_time_w=price_of_time_w,
            energy_j=float(allocation.energy_j.sum()),
            delay_s=float(allocation.round_s.sum()),
        )

    def reallocate(
        self,
        schedule: Schedule,
        number: int,
        gain: FloatArray,
        *,
        price_of_time_w: float | None = None,
        round_s: float | None = None,
    ) -> Allocation:
        """Return the allocation of round ``number`` for gains [device] measured just now.

        Give the price of time of the plan, or the length of the round. The allocation carries its
        certificate (``gap``) and, where the round is too short, says so in ``status``.
        """
        if (price_of_time_w is None) == (round_s is None):
            raise DecisionError("give either price_of_time_w or round_s, not both and not none")
        if not 0 <= number < len(schedule):
            raise DecisionError(f"number must be in 0..{len(schedule) - 1}, got {number}")
        one = self.costs.demand(schedule).only(number)
        problem = self.costs.batch(one, np.asarray(gain, dtype=float)[None, :])
        if price_of_time_w is not None:
            return solve(problem, Weighted(price_of_time_w), self.scenario.cell.access)
        assert round_s is not None
        return solve(problem, LeastEnergy(round_s), self.scenario.cell.access)

    def repaired(self, schedule: Schedule) -> Schedule:
        """Return the schedule made to fit every device's memory.

        Ranks come down to the smallest one allowed, then layers freeze from the lowest up; a
        schedule that fits is returned as it is.

        Raises
        ------
        InfeasibleError
            If a device lacks the memory even to train the head alone.
        """
        fitting = self._smaller_until_fit(schedule)
        if fitting is None:
            raise InfeasibleError(
                "devices.memory_byte is too small on some device to train even the head alone "
                f"at training.batch_size {self.scenario.training.batch_size}"
            )
        return fitting

    def first_generation(self) -> NDArray[np.int64]:
        """Return the genomes the search starts from: plain ways to fine-tune, then random ones.

        Plain are: the head alone; adapters of the last layers or of all, aggregated or kept
        personal, at the highest rank or the lowest. Random ones are even in how deep they train.
        """
        space, codec = self.scenario.decisions, self.codec
        layers = codec.layers
        allowed = {LayerState[name.upper()] for name in space.layer_states}
        top, bottom = max(space.ranks), min(space.ranks)
        plain: list[tuple[int, LayerState, int]] = [
            (0, LayerState.FROZEN, bottom),
            (layers, LayerState.AGGREGATED, top),
            (max(1, layers // 3), LayerState.AGGREGATED, top),
            (max(1, layers // 3), LayerState.PERSONAL, top),
            (max(1, layers // 2), LayerState.AGGREGATED, bottom),
            (layers, LayerState.PERSONAL, top),
        ]
        genomes: dict[str, NDArray[np.int64]] = {}  # by schedule: none twice
        for depth, state, rank in plain:
            states = (LayerState.FROZEN,) * (layers - depth) + (state,) * depth
            if set(states) <= allowed:
                decision = RoundDecision(ranks=(rank,) * codec.devices, states=states)
                schedule = Schedule(rounds=(decision,) * codec.rounds)
                genomes.setdefault(str(self.repaired(schedule)), codec.encode(schedule))
        rng = stream(self.scenario.seeds.search, "first-generation")
        population = self.scenario.search.population
        for _ in range(100 * population):  # a space may hold fewer schedules than that
            if len(genomes) >= population:
                break
            genome = rng.integers(0, codec.cardinalities)
            genomes.setdefault(str(self.repaired(codec.decode(genome))), genome)
        return np.array(list(genomes.values())[:population])

    def _problem(self, schedule: Schedule) -> Batch:
        if len(schedule) > len(self.gain):
            raise DecisionError(
                f"schedule must have at most training.rounds ({len(self.gain)}) rounds, "
                f"got {len(schedule)}"
            )
        return self.costs.batch(self.costs.demand(schedule), self.gain[: len(schedule)])

    def _smaller_until_fit(self, schedule: Schedule) -> Schedule | None:
        ranks = sorted(self.scenario.decisions.ranks, reverse=True)
        layers = self.codec.layers
        limits = [max(ranks), *[rank for rank in ranks if rank < max(ranks)]]
        for frozen in range(layers + 1):
            for limit in limits if frozen == 0 else limits[-1:]:
                smaller = Schedule(
                    rounds=tuple(
                        RoundDecision(
                            ranks=tuple(min(rank, limit) for rank in decision.ranks),
                            states=(LayerState.FROZEN,) * frozen + decision.states[frozen:],
                        )
                        for decision in schedule.rounds
                    )
                )
                if self.costs.fits(self.costs.demand(smaller)):
                    return smaller.canonical()
        return None


def _certified(allocation: Allocation) -> Allocation:
    """Return the allocation if its certificate holds; no figure may rest on an uncertified one."""
    worst = int(np.argmax(np.where(np.isnan(allocation.gap), np.inf, allocation.gap)))
    status = Status(int(allocation.status[worst]))
    if status is Status.INFEASIBLE or not allocation.gap[worst] <= LARGEST_GAP:
        raise InfeasibleError(
            f"allocation of instance {worst} must have a duality gap of at most {LARGEST_GAP:g}, "
            f"got {allocation.gap[worst]:g}. {status.sentence}"
        )
    return allocation


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Front:
    """An energy-delay-accuracy front, and everything that was trained to find it.

    ``points`` has a row a point, least accurate first: energy_j, delay_s, accuracy (mean over
    devices, on test data), accuracy_worst_device, accuracy_std_devices, accuracy_validation (what the
    search saw), price_of_time_w, rounds, schedule, evaluation (key of the training) and knee. No point is
    dominated in energy, delay and *validation* accuracy; in test accuracy, which chose nothing, one may be.
    """

    points: pd.DataFrame
    evaluations: tuple[Evaluation, ...]
    gap: float

    @property
    def knee(self) -> pd.Series:
        """The point that gives most for what it gives up; see :func:`pwff_solvers.front.knee`."""
        return self.points[self.points["knee"]].iloc[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a search stands: ``stage`` names what it does, ``done`` of ``total`` are finished."""

    stage: Literal["train", "test"]
    done: int
    total: int
    text: str


def pareto_front(
    scenario: Scenario,
    evaluator: Evaluator,
    *,
    trainings: int,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Front:
    """Search for the front of total energy, total delay and error over schedules.

    NSGA-II varies discrete schedules; each is trained once, and each of its validated rounds contributes
    the exact energy-delay curve of the schedule cut there (training is nested, so that prefix has
    been trained too). The search sees validation accuracy; the front reports test accuracy.

    Parameters
    ----------
    scenario : Scenario
    evaluator : Evaluator
        Trains schedules; one that keeps a journal makes the search resumable.
    trainings : int
        How many schedules to train.
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
    search = SetSearch(
        planner.codec.cardinalities,
        planner.codec.ordinal,
        planner.first_generation(),
        key=lambda genome: str(planner.repaired(planner.codec.decode(genome))),
        seed=scenario.seeds.search,
    )
    found: dict[str, tuple[Evaluation, Curve]] = {}
    while len(found) < trainings:
        genomes = search.ask()
        if not len(genomes):  # every schedule there is has been trained
            break
        answers = []
        for genome in genomes[: trainings - len(found)]:
            schedule = planner.repaired(planner.codec.decode(genome))
            progress(Progress(stage="train", done=len(found), total=trainings, text=str(schedule)))
            evaluation = evaluator.train(schedule)
            curve = planner.curve(schedule)
            found[str(schedule)] = (evaluation, curve)
            answers.append(_objectives(_candidates(evaluation, curve, scenario.thresholds)))
        if len(answers) < len(genomes):
            break
        search.tell(answers)
    progress(Progress(stage="train", done=len(found), total=trainings, text=""))
    tables = [_candidates(*pair, scenario.thresholds) for pair in found.values()]
    points = pd.concat(tables, ignore_index=True)
    if not len(points):
        raise InfeasibleError(_nothing_acceptable(scenario.thresholds, list(found.values())))
    points = points[nondominated(_objectives(points))].reset_index(drop=True)
    points = _tested(points, evaluator, scenario, progress)
    return Front(
        points=points,
        evaluations=tuple(evaluation for evaluation, _ in found.values()),
        gap=max(curve.gap for _, curve in found.values()),
    )


def _candidates(evaluation: Evaluation, curve: Curve, thresholds: Thresholds) -> pd.DataFrame:
    """Return every point a training offers: each validated round, at each price of time."""
    marks = [n for n, entry in enumerate(evaluation.rounds) if entry.accuracy]
    rows = len(marks)
    accuracy = np.array([np.mean(evaluation.rounds[n].accuracy) for n in marks])
    worst = np.array([np.min(evaluation.rounds[n].accuracy) for n in marks])
    points = len(curve.price_of_time_w)
    table = pd.DataFrame(
        {
            "energy_j": curve.energy_j[marks].ravel(),
            "delay_s": curve.delay_s[marks].ravel(),
            "accuracy_validation": np.repeat(accuracy, points),
            "accuracy_validation_worst_device": np.repeat(worst, points),
            "price_of_time_w": np.tile(curve.price_of_time_w, rows),
            "rounds": np.repeat(np.array(marks, dtype=np.int64) + 1, points),
            "schedule": np.repeat(
                np.array([str(evaluation.schedule.prefix(n + 1)) for n in marks], dtype=object),
                points,
            ),
            "evaluation": evaluation.key,
        }
    )
    keep = np.ones(len(table), dtype=bool)
    if thresholds.accuracy_min is not None:
        keep &= table["accuracy_validation"].to_numpy() >= thresholds.accuracy_min
    if thresholds.energy_max_j is not None:
        keep &= table["energy_j"].to_numpy() <= thresholds.energy_max_j
    if thresholds.delay_max_s is not None:
        keep &= table["delay_s"].to_numpy() <= thresholds.delay_max_s
    return table[keep]


def _objectives(table: pd.DataFrame) -> FloatArray:
    """Return [point, (log10 energy, log10 delay, error)]: both quantities span decades."""
    return np.column_stack(
        [
            np.log10(table["energy_j"].to_numpy(dtype=float)),
            np.log10(table["delay_s"].to_numpy(dtype=float)),
            1.0 - table["accuracy_validation"].to_numpy(dtype=float),
        ]
    )


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
        schedule = Schedule.parse(text, devices=len(scenario.devices))
        tests[text] = np.array(evaluator.test(schedule))
    progress(Progress(stage="test", done=len(schedules), total=len(schedules), text=""))
    accuracy = [tests[text] for text in points["schedule"]]
    tested = points.assign(
        accuracy=[scores.mean() for scores in accuracy],
        accuracy_worst_device=[scores.min() for scores in accuracy],
        accuracy_std_devices=[scores.std() for scores in accuracy],
    )
    # Chosen on what the search saw: test data must not steer any choice.
    tested["knee"] = np.arange(len(tested)) == knee(_objectives(tested))
    first = ["energy_j", "delay_s", "accuracy", "accuracy_worst_device", "accuracy_std_devices"]
    first += ["accuracy_validation", "price_of_time_w", "rounds", "schedule", "evaluation", "knee"]
    tested = tested[first + [name for name in tested if name not in first]]
    return tested.sort_values(["accuracy_validation", "delay_s"], ignore_index=True)


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
