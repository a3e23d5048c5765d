"""The planning API: what a schedule costs and how to allocate it best.

No torch is needed here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pwff_opt.channel import channel_gain
from pwff_opt.costs import Architecture, Workload
from pwff_opt.costs.workload import longest_sequence
from pwff_opt.errors import DecisionError, InfeasibleError, ScenarioError, allocator_refusals
from pwff_opt.planning.demand import CostModel, Demand
from pwff_opt.planning.feasibility import as_schedule, demanded
from pwff_opt.registry import ACCESS
from pwff_opt.rng import stream
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.schedule import Codec, LayerState, RoundDecision, Schedule
from pwff_solvers.allocation import (
    Access,
    Allocation,
    Batch,
    LeastEnergy,
    Objective,
    Shortest,
    Status,
    Weighted,
    least_energy_within,
    solve,
)

FloatArray = NDArray[np.float64]

# Prices of time on a curve, as multiples of (energy / delay) of the fastest allocation. Above the
# first the delay is within a few per cent of the shortest; below the last the energy is flat, CPU
# frequencies having come down by 10^(5/3) and more.
PRICE_DECADES = (1.0, -5.0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Curve:
    """The energy-delay curves of a schedule and of all its prefixes, at the same prices of time.

    Row n - 1 is the schedule cut after n rounds; along a row delay grows and energy falls, from the
    shortest delay there is. Each point is optimal for its price, over bandwidth, power and frequency of
    all devices in all rounds: the rounds share the price, so their sum minimises total energy + price x
    total delay.
    """

    price_of_time_w: FloatArray
    """[point], descending from infinity."""
    energy_j: FloatArray
    """[round, point]."""
    delay_s: FloatArray
    """[round, point]."""
    gap: float
    """Largest relative duality gap of all allocations behind the curve."""

    def __repr__(self) -> str:
        rounds, points = self.energy_j.shape
        delay, energy = self.delay_s[-1], self.energy_j[-1]
        return (
            f"Curve({rounds} rounds x {points} points; after all rounds {delay[0]:.4g} to "
            f"{delay[-1]:.4g} s, {energy[0]:.4g} to {energy[-1]:.4g} J; worst gap {self.gap:.1e})"
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Plan:
    """A schedule with its allocation: instance t of ``allocation`` is round t."""

    schedule: Schedule
    demand: Demand
    """What every round asks of every device: bits, cycles, bytes."""
    allocation: Allocation
    """Bandwidth, power and frequency, [round, device], with their certificates."""
    price_of_time_w: float
    """What a second is worth to every round; 0 where the deadline does not bind (reallocate then by
    the length of the round)."""
    energy_j: float
    """Of all devices in all rounds."""
    delay_s: float
    """Of all rounds."""

    def __repr__(self) -> str:
        return (
            f"Plan({self.schedule}: {self.energy_j:.4g} J, {self.delay_s:.4g} s at "
            f"{self.price_of_time_w:.3g} W; {self.allocation})"
        )


class Planner:
    """Costs, curves and plans of schedules in one scenario.

    Rounds and devices count from 0; device k is the one that the k-th ``[[device]]`` of a scenario file
    sets. A schedule may be given as its text, ``"8x4:ffffaa"``.

    Parameters
    ----------
    scenario : Scenario
    workload : Workload
        From an evaluator, or :meth:`Workload.padded` where no data are at hand.

    Attributes
    ----------
    scenario : Scenario
    gain : array [round, device]
        Channel power gains that the scenario draws for every round.
    access : Access
        How devices share the uplink band.
    costs : CostModel
        What schedules demand of devices, and the allocation problems they pose.
    codec : Codec
        Between schedules and the genomes that a search varies.

    Raises
    ------
    ScenarioError
        If the model is too small for the scenario's ranks or sequences.

    Every method that is asked about a schedule raises a DecisionError if it does not fit the scenario
    and the model, and an InfeasibleError, which names device, need and limit, if a device lacks the
    memory for it.
    """

    def __init__(self, scenario: Scenario, workload: Workload) -> None:
        if not isinstance(scenario, Scenario):
            raise DecisionError(
                f"scenario must be a Scenario (see read_scenario), got {scenario!r}"
            )
        if not isinstance(workload, Workload):
            raise DecisionError(f"workload must be a Workload, got {workload!r}")
        self.scenario = scenario
        self.costs = CostModel(scenario, workload)
        problems = _misfits(scenario, self.costs.architecture)
        if problems:
            raise ScenarioError(f"scenario {scenario.name!r}", problems)
        self.gain = channel_gain(scenario)
        self.access: Access = ACCESS[scenario.cell.access]
        self.codec = Codec(
            space=scenario.decisions,
            devices=len(scenario.devices),
            layers=self.costs.architecture.layers,
            rounds=scenario.training.rounds,
        )

    def curve(self, schedule: Schedule | str, *, points: int | None = None) -> Curve:
        """Return the energy-delay curves of a schedule and its prefixes (no training needed).

        ``points``: on every curve, at least 2; ``search.curve_points`` if not given.
        """
        return self.curves([schedule], points=points)[0]

    @allocator_refusals()
    def curves(
        self, schedules: Sequence[Schedule | str], *, points: int | None = None
    ) -> list[Curve]:
        """Return the curves of many schedules, all their allocations solved together."""
        read = [self._read(schedule) for schedule in schedules]
        if points is None:
            points = self.scenario.search.curve_points
        if not isinstance(points, int) or points < 2:
            raise DecisionError(f"points must be a whole number of at least 2, got {points!r}")
        if not read:
            return []
        problem = self._problem(*read)
        fastest = self._certified(problem, Shortest())
        lengths = [len(schedule) for schedule in read]
        owner = np.repeat(np.arange(len(read)), lengths)
        reference_w = np.bincount(owner, fastest.energy_j) / np.bincount(owner, fastest.round_s)
        prices = reference_w[:, None] * np.logspace(*PRICE_DECADES, points - 1)
        rows = np.repeat(np.arange(len(owner)), points - 1)
        best = self._certified(problem.take(rows), Weighted(prices[owner].ravel()))
        energy_j, delay_s = (
            np.column_stack([first, rest.reshape(len(owner), points - 1)])
            for first, rest in (
                (fastest.energy_j, best.energy_j),
                (fastest.round_s, best.round_s),
            )
        )
        ends = np.cumsum(lengths)
        gap = np.maximum(fastest.gap, best.gap.reshape(len(owner), points - 1).max(axis=1))
        return [
            Curve(
                price_of_time_w=np.concatenate([[np.inf], own]),
                energy_j=energy_j[end - length : end].cumsum(axis=0),
                delay_s=delay_s[end - length : end].cumsum(axis=0),
                gap=float(gap[end - length : end].max()),
            )
            for own, end, length in zip(prices, ends, lengths, strict=True)
        ]

    @allocator_refusals()
    def plan(
        self,
        schedule: Schedule | str,
        *,
        price_of_time_w: float | None = None,
        delay_max_s: float | None = None,
    ) -> Plan:
        """Return the best allocation of every round of a schedule.

        Give a price of time (J/s; infinite: the shortest delay), or the longest total delay: then the
        energy is the least possible within it, all rounds sharing the price of time that the deadline
        amounts to (0 where it does not bind).

        Raises
        ------
        InfeasibleError
            If the deadline is shorter than the shortest total delay.
        DecisionError
            If an argument is not what it must be.
        """
        _one_of(price_of_time_w=price_of_time_w, delay_max_s=delay_max_s)
        schedule = self._read(schedule)
        problem = self._problem(schedule)
        if delay_max_s is None:
            assert price_of_time_w is not None
            allocation = self._certified(problem, _at(price_of_time_w))
        else:
            shortest_s = float(self._certified(problem, Shortest()).round_s.sum())
            if not delay_max_s >= shortest_s:
                raise InfeasibleError(
                    f"delay_max_s must be at least {shortest_s:.6g} s, the shortest total delay of "
                    f"{schedule}, got {delay_max_s:g}"
                )
            within, price_of_time_w = least_energy_within(problem, delay_max_s, self.access)
            allocation = _certified(within, self.access.largest_gap)
        return Plan(
            schedule=schedule,
            demand=demanded(self.costs, schedule),
            allocation=allocation,
            price_of_time_w=price_of_time_w,
            energy_j=float(allocation.energy_j.sum()),
            delay_s=float(allocation.round_s.sum()),
        )

    @allocator_refusals()
    def reallocate(
        self,
        schedule: Schedule | str,
        number: int,
        gain: ArrayLike,
        *,
        price_of_time_w: float | None = None,
        round_s: float | None = None,
    ) -> Allocation:
        """Return the allocation of round ``number`` for gains [device] measured just now.

        Give the price of time of the plan [W], or the length of the round [s]. The allocation, of one
        instance, carries its certificate (``gap``) and, where the round is too short, says so in
        ``status``.

        Raises
        ------
        DecisionError
            If an argument is not what it must be.
        """
        _one_of(price_of_time_w=price_of_time_w, round_s=round_s)
        schedule = self._read(schedule)
        if not isinstance(number, int | np.integer) or not 0 <= number < len(schedule):
            raise DecisionError(
                f"number must be a whole number in 0..{len(schedule) - 1}, got {number!r}"
            )
        gains = _gains(gain, len(self.scenario.devices))
        problem = self.costs.batch(demanded(self.costs, schedule).only(int(number)), gains)
        if price_of_time_w is not None:
            return solve(problem, _at(price_of_time_w), self.access)
        assert round_s is not None
        return solve(problem, LeastEnergy(round_s), self.access)

    def repaired(self, schedule: Schedule) -> Schedule:
        """Return the schedule made to fit every device's memory.

        Ranks come down to the smallest one allowed, then layers freeze from the lowest up; a
        schedule that fits is returned as it is.

        Raises
        ------
        InfeasibleError
            If a device lacks the memory even where all layers are frozen.
        """
        fitting = self._smaller_until_fit(schedule)
        try:
            demanded(self.costs, fitting)
        except InfeasibleError as error:
            raise InfeasibleError(
                f"{error}; nothing asks for less: all layers are frozen"
            ) from None
        return fitting

    def require_attainable(self) -> None:
        """Refuse limits of energy and delay that not even the cheapest schedule can meet.

        That is the one with all layers frozen, cut after the first validated round: every other one
        computes and sends at least as much. Where no layer may be frozen nothing is refused.

        Raises
        ------
        InfeasibleError
            Naming the limit, and the least there is.
        """
        scenario, limits = self.scenario, self.scenario.thresholds
        if "frozen" not in scenario.decisions.layer_states:
            return
        decision = RoundDecision(
            ranks=(min(scenario.decisions.ranks),) * self.codec.devices,
            states=(LayerState.FROZEN,) * self.codec.layers,
        )
        rounds = scenario.training.validated[0]
        cheapest = Schedule(rounds=(decision,) * rounds)
        shortest = self.plan(cheapest, price_of_time_w=math.inf)
        what = f"{cheapest}, which costs least, takes"
        if limits.delay_max_s is not None and limits.delay_max_s < shortest.delay_s:
            raise InfeasibleError(
                f"thresholds.delay_max_s must leave some schedule possible: {what} at least "
                f"{shortest.delay_s:.4g} s, got {limits.delay_max_s:g}"
            )
        if limits.energy_max_j is None:
            return
        # With no limit of its own, so long that waiting longer would save nothing.
        delay_s = limits.delay_max_s or 1e4 * shortest.delay_s
        least = self.plan(cheapest, delay_max_s=delay_s).energy_j
        if limits.energy_max_j < least:
            within = f" within thresholds.delay_max_s {delay_s:g} s" * (
                limits.delay_max_s is not None
            )
            raise InfeasibleError(
                f"thresholds.energy_max_j must leave some schedule possible: {what} at least "
                f"{least:.4g} J{within}, got {limits.energy_max_j:g}"
            )

    def first_generation(self) -> NDArray[np.int64]:
        """Return the genomes the search starts from: plain ways to fine-tune, then random ones.

        Plain are: all layers frozen; adapters of the last layers or of all, aggregated or kept
        personal, at the highest rank or the lowest. Random ones are even in how deep they train.
        """
        space, codec = self.scenario.decisions, self.codec
        layers, groups = codec.layers, len(codec.group_sizes)

        def last(number: int) -> int:
            """Return the layers of the last groups."""
            return layers - codec.boundaries[groups - number]

        allowed = {LayerState[name.upper()] for name in space.layer_states}
        top, bottom = max(space.ranks), min(space.ranks)
        plain: list[tuple[int, LayerState, int]] = [
            (0, LayerState.FROZEN, bottom),
            (layers, LayerState.AGGREGATED, top),
            (last(max(1, groups // 3)), LayerState.AGGREGATED, top),
            (last(max(1, groups // 3)), LayerState.PERSONAL, top),
            (last(max(1, groups // 2)), LayerState.AGGREGATED, bottom),
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

    def _read(self, schedule: Schedule | str) -> Schedule:
        return as_schedule(schedule, devices=len(self.scenario.devices))

    def _problem(self, *schedules: Schedule) -> Batch:
        """Return the allocation problems of all rounds of schedules, one schedule after another."""
        demand = Demand.joined([demanded(self.costs, schedule) for schedule in schedules])
        gain = np.concatenate([self.gain[: len(schedule)] for schedule in schedules])
        return self.costs.batch(demand, gain)

    def _certified(self, problem: Batch, objective: Objective) -> Allocation:
        """Return the optimal allocation of a problem; raise where its certificate does not hold."""
        return _certified(solve(problem, objective, self.access), self.access.largest_gap)

    def _smaller_until_fit(self, schedule: Schedule) -> Schedule:
        """Return the largest that fits; all layers frozen if nothing does."""
        ranks = sorted(self.scenario.decisions.ranks, reverse=True)
        for frozen in self.codec.boundaries:
            for limit in dict.fromkeys(ranks) if frozen == 0 else ranks[-1:]:
                smaller = {  # a decision is mostly that of many rounds
                    decision: RoundDecision(
                        ranks=tuple(min(rank, limit) for rank in decision.ranks),
                        states=(LayerState.FROZEN,) * frozen + decision.states[frozen:],
                    )
                    for decision in dict.fromkeys(schedule.rounds)
                }
                fitting = Schedule(rounds=tuple(smaller[decision] for decision in schedule.rounds))
                if self.costs.fits(self.costs.demand(fitting)):
                    return fitting.canonical()
        return fitting.canonical()


def _misfits(scenario: Scenario, model: Architecture) -> list[str]:
    """Return in what the model is too small for the scenario."""
    problems = []
    length, ranks = longest_sequence(scenario), scenario.decisions.ranks
    if 0 < model.positions < length:  # 0: no table of positions
        problems.append(
            f"model.max_tokens must not exceed the model's table of positions ({model.positions}), "
            f"got {length}"
        )
    if max(ranks) > model.hidden:
        problems.append(
            f"decisions.ranks must not exceed the model's hidden size ({model.hidden}), "
            f"got {max(ranks)}"
        )
    if scenario.decisions.layer_groups > model.layers:
        problems.append(
            f"decisions.layer_groups must not exceed the model's layers ({model.layers}), "
            f"got {scenario.decisions.layer_groups}"
        )
    return problems


def _one_of(**given: float | None) -> None:
    """Raise unless exactly one argument is given, and it is a positive number."""
    names = " or ".join(given)
    values = [(name, value) for name, value in given.items() if value is not None]
    if len(values) != 1:
        raise DecisionError(f"give either {names}, not both and not none")
    name, value = values[0]
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not value > 0:
        raise DecisionError(f"{name} must be a positive number, got {value!r}")


def _gains(gain: ArrayLike, devices: int) -> FloatArray:
    """Return gains [device] as the batch of one that the allocator wants, [1, device]."""
    try:
        values = np.asarray(gain, dtype=float)
    except (TypeError, ValueError) as error:
        raise DecisionError(f"gain must be numbers, one a device, got {gain!r}") from error
    if values.shape != (devices,):
        raise DecisionError(f"gain must have shape [{devices}], got {list(values.shape)}")
    for device, value in enumerate(values):
        if not 0 < value < np.inf:
            raise DecisionError(f"gain[{device}] must be positive and finite, got {value}")
    return values[None, :]


def _at(price_of_time_w: float) -> Objective:
    """Return what to minimise at a price of time; at an infinite one, the delay."""
    return Shortest() if price_of_time_w == np.inf else Weighted(price_of_time_w)


def _certified(allocation: Allocation, largest_gap: float) -> Allocation:
    """Return the allocation if its certificate holds; no figure may rest on an uncertified one."""
    worst = int(np.argmax(np.where(np.isnan(allocation.gap), np.inf, allocation.gap)))
    status = Status(int(allocation.status[worst]))
    if status is Status.INFEASIBLE or not allocation.gap[worst] <= largest_gap:
        raise InfeasibleError(
            f"allocation of instance {worst} must have a duality gap of at most {largest_gap:g}, "
            f"got {allocation.gap[worst]:g}. {status.sentence}"
        )
    return allocation
