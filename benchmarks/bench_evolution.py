"""The evolutionary search, physics only: speed and overhead of a generation, and true quality.

A population of 100, 20 devices, 10 rounds; accuracy by a formula that costs nothing.  Ours:
``SetSearch``, each individual a schedule with its whole energy-delay curve after 2, 5 and 10 rounds
(27 points).  The rival is the same problem as most would write it: pymoo's ``MixedVariableGA`` with
non-dominated sorting, over the rank, the state of every layer and the logarithm of the price of time,
each individual one point after 10 rounds, its allocation one call of cvxpy with Clarabel a round (the
joint problem in cones, compiled once with parameters).  Such a generation is a thousand calls: they
are measured on a few individuals, others each generation, and scaled up to all; for the rest our
allocator answers, unmeasured, so that the rival's search goes on as it would.

Both run interleaved in one loop of one process, pinned to one core; figures are medians over
generations, the ratio is the median of their ratios.  *Overhead* is what asking and telling take less
the caller's key (decode and repair), which is evaluation.  In this space of one phase most children
were asked before: the worst there is for asking.

Quality: the share of the exact hypervolume (all schedules of the built-in scenario, enumerated)
that the search attains, and how much of the space it asks for until it stays at the target.

``python benchmarks/bench_evolution.py`` (minutes), ``--quick`` or BENCH_QUICK=1 for a smoke test;
it writes ``benchmarks/results/evolution.json`` (``--quick`` writes nothing unless ``--out`` is given).
"""

# ruff: noqa: E402 -- numpy reads the environment when it is imported
from __future__ import annotations

import os

for _name in ("OMP", "OPENBLAS", "MKL", "NUMBA", "RAYON"):
    os.environ[f"{_name}_NUM_THREADS"] = "1"

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from bench_allocator import pin_to_one_core, verdict
from harness import machine, parser, versions, write
from numpy.typing import NDArray
from pymoo.core.mixed import MixedVariableGA
from pymoo.core.problem import Problem
from pymoo.core.termination import NoTermination
from pymoo.core.variable import Choice, Real
from pymoo.operators.survival.rank_and_crowding import RankAndCrowding
from pymoo.problems.static import StaticProblem

from pwff_opt import Planner, Schedule, Workload, read_scenario
from pwff_opt.planning.planner import Curve
from pwff_opt.scenario.schedule import LayerState, RoundDecision
from pwff_solvers.allocation import Weighted, solve
from pwff_solvers.evolution import SetSearch
from pwff_solvers.extras.oracle import CvxpyJoint
from pwff_solvers.front import hypervolume, nondominated

FloatArray = NDArray[np.float64]

PACKAGES = ("numpy", "numba", "moocore", "pymoo", "cvxpy", "clarabel")
POINTS = 9  # on every curve
TARGET_RATIO = 3
TARGET_OVERHEAD_MS = 10
TARGET_QUALITY = 0.995


@dataclass(frozen=True)
class Size:
    population: int = 100
    generations: int = 15  # timed, after one that compiles
    measured: int = 3  # individuals of a rival's generation that cvxpy allocates
    quality_generations: int = 100
    quality_runs: int = 5


QUICK = Size(population=20, generations=2, measured=1, quality_generations=40, quality_runs=1)


def accuracy(schedule: Schedule) -> float:
    """Accuracy that rises with rounds, layers and rank, and saturates."""
    effort = sum(
        sum(one.trained) * (1 + np.log2(1 + np.mean(one.ranks))) for one in schedule.rounds
    )
    return float(0.4 + 0.5 * (1 - np.exp(-0.08 * effort)))


def points(schedule: Schedule, curve: Curve, marks: tuple[int, ...]) -> FloatArray:
    """Return log10 energy, log10 delay and error [point, 3] of a schedule cut after each mark."""
    return np.concatenate(
        [
            np.column_stack(
                [
                    np.log10(curve.energy_j[mark - 1]),
                    np.log10(curve.delay_s[mark - 1]),
                    np.full(curve.energy_j.shape[1], 1.0 - accuracy(schedule.prefix(mark))),
                ]
            )
            for mark in marks
        ]
    )


class Stopwatch:
    """Seconds between calls."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def __call__(self) -> float:
        now = time.perf_counter()
        passed, self._last = now - self._last, now
        return passed


class Ours:
    """``SetSearch`` over schedules, with what its keys cost measured apart."""

    def __init__(self, planner: Planner, population: int, seed: int) -> None:
        codec = planner.codec
        self._planner, self.key_s = planner, 0.0
        initial = np.random.default_rng(seed).integers(
            0, codec.cardinalities, (population, len(codec.cardinalities))
        )
        self.search = SetSearch(
            codec.cardinalities, codec.ordinal, initial, key=self._key, seed=seed
        )

    def _key(self, genome: NDArray[np.int64]) -> str:
        watch = Stopwatch()
        key = str(self.schedule(genome))
        self.key_s += watch()
        return key

    def schedule(self, genome: NDArray[np.int64]) -> Schedule:
        return self._planner.repaired(self._planner.codec.decode(genome))

    def generations(self) -> Iterator[dict[str, float]]:
        """Run the search; yield the seconds of every generation."""
        marks = self._planner.scenario.training.validated
        while True:
            self.key_s = 0.0
            watch = Stopwatch()
            genomes = self.search.ask()
            asking = watch()
            schedules = [self.schedule(genome) for genome in genomes]
            curves = self._planner.curves(schedules, points=POINTS)
            answers = [
                points(one, curve, marks) for one, curve in zip(schedules, curves, strict=True)
            ]
            evaluating = watch()
            self.search.tell(answers)
            overhead = asking - self.key_s + watch()
            yield {"overhead": overhead, "total": overhead + evaluating + self.key_s}


class Rival:
    """pymoo over rank, layers and price of time, and a call of cvxpy an individual and round."""

    def __init__(self, planner: Planner, size: Size, seed: int) -> None:
        self._planner, self._size = planner, size
        layers, space = planner.codec.layers, planner.scenario.decisions
        typical = planner.curve(Schedule.parse(f"{planner.codec.rounds}x4:{'a' * layers}",
                                               devices=planner.codec.devices))  # fmt: skip
        low, high = np.log10(typical.price_of_time_w[[-1, 1]])
        variables = {"rank": Choice(options=list(space.ranks))}
        variables |= {
            f"layer{n}": Choice(options=[LayerState[name.upper()] for name in space.layer_states])
            for n in range(layers)
        }
        variables["log_price"] = Real(bounds=(float(low), float(high)))
        self._problem = Problem(vars=variables, n_obj=3)
        self._algorithm = MixedVariableGA(
            pop_size=size.population, survival=RankAndCrowding(), seed=seed
        )
        self._algorithm.setup(self._problem, termination=NoTermination())
        self._cvxpy = CvxpyJoint(planner.codec.devices, Weighted)
        self.calls = self.failed = 0
        self.largest_difference = 0.0

    def _schedule(self, asked: dict[str, Any]) -> Schedule:
        codec = self._planner.codec
        decision = RoundDecision(
            ranks=(int(asked["rank"]),) * codec.devices,
            states=tuple(asked[f"layer{n}"] for n in range(codec.layers)),
        )
        return self._planner.repaired(Schedule(rounds=(decision,) * codec.rounds))

    def generations(self) -> Iterator[dict[str, float]]:
        """Run the search; yield the seconds of every generation, and those of pymoo itself."""
        costs, gain = self._planner.costs, self._planner.gain
        rng = np.random.default_rng(0)
        while True:
            watch = Stopwatch()
            asked = self._algorithm.ask()
            searching = watch()
            schedules = [self._schedule(one) for one in asked.get("X")]
            batches = [costs.batch(costs.demand(one), gain[: len(one)]) for one in schedules]
            errors = [1.0 - accuracy(one) for one in schedules]
            evaluating = watch()
            prices = [10.0 ** float(one["log_price"]) for one in asked.get("X")]
            found = [
                solve(batch, Weighted(price)) for batch, price in zip(batches, prices, strict=True)
            ]
            allocating = 0.0
            few = rng.choice(len(batches), min(self._size.measured, len(batches)), replace=False)
            for individual in few:
                for i in range(batches[individual].instances):
                    watch()
                    theirs = self._cvxpy.solve(batches[individual], i, prices[individual])
                    allocating += watch() * len(batches) / len(few)
                    self._compare(theirs, found[individual], i, prices[individual])
            answers = np.array(
                [
                    [np.log10(one.energy_j.sum()), np.log10(one.round_s.sum()), error]
                    for one, error in zip(found, errors, strict=True)
                ]
            )
            self._algorithm.evaluator.eval(StaticProblem(self._problem, F=answers), asked)
            watch()
            self._algorithm.tell(infills=asked)
            searching += watch()
            yield {"search": searching, "total": searching + evaluating + allocating}

    def _compare(self, theirs: Any, ours: Any, i: int, price: float) -> None:
        self.calls += 1
        self.failed += not theirs.found
        if theirs.found:
            cost = theirs.energy_j + price * theirs.round_s
            difference = abs(cost / float(ours.energy_j[i] + price * ours.round_s[i]) - 1.0)
            self.largest_difference = max(self.largest_difference, difference)


def speed(size: Size) -> dict[str, Any]:
    """Seconds of a generation of both, side by side."""
    scenario = read_scenario("hutto")
    scenario = replace(
        scenario,
        devices=scenario.devices * 5,
        training=replace(scenario.training, rounds=10, validate_after=(2, 5, 10)),
    )
    planner = Planner(scenario, Workload.padded(scenario, classes=3))
    ours, rival = Ours(planner, size.population, 1), Rival(planner, size, 1)
    rows = [
        (mine, theirs)
        for _, mine, theirs in zip(
            range(size.generations + 1), ours.generations(), rival.generations(), strict=False
        )
    ][1:]  # the first one compiles
    ratio = float(np.median([theirs["total"] / mine["total"] for mine, theirs in rows]))
    overhead_ms = 1e3 * float(np.median([mine["overhead"] for mine, _ in rows]))
    return {
        "devices": len(scenario.devices),
        "rounds": scenario.training.rounds,
        "population": size.population,
        "generations": size.generations,
        "ours_s": float(np.median([mine["total"] for mine, _ in rows])),
        "overhead_ms": overhead_ms,
        "overhead_met": overhead_ms <= TARGET_OVERHEAD_MS,
        "rival_s": float(np.median([theirs["total"] for _, theirs in rows])),
        "rival_search_ms": 1e3 * float(np.median([theirs["search"] for _, theirs in rows])),
        "rival_measured_individuals": size.measured,
        "rival_calls": rival.calls,
        "rival_failed": rival.failed,
        "rival_largest_difference": rival.largest_difference,
        "ratio": ratio,
        "ratio_met": ratio >= TARGET_RATIO,
    }


def quality(size: Size) -> dict[str, Any]:
    """Share of the exact hypervolume of an enumerated space, generation by generation."""
    scenario = read_scenario("hutto")
    planner = Planner(scenario, Workload.padded(scenario, classes=3))
    genomes = np.array(list(product(*map(range, planner.codec.cardinalities))))
    distinct = np.unique(planner.codec.normalised(genomes), axis=0)
    schedules = {
        str(one): one
        for one in (planner.repaired(planner.codec.decode(genome)) for genome in distinct)
    }
    curves = planner.curves(list(schedules.values()), points=POINTS)
    marks = scenario.training.validated
    known = {
        key: points(one, curve, marks)
        for (key, one), curve in zip(schedules.items(), curves, strict=True)
    }
    everything = np.concatenate(list(known.values()))
    corner = everything.max(axis=0)
    exact = hypervolume(everything, corner)
    runs = []
    for seed in range(size.quality_runs):
        ours = Ours(planner, size.population, seed)
        front, asked, until, ratio = np.zeros((0, 3)), 0, None, 0.0
        for _ in range(size.quality_generations):
            new = [known[str(ours.schedule(genome))] for genome in ours.search.ask()]
            if not new:
                break
            ours.search.tell(new)
            asked += len(new)
            front = np.concatenate([front, *new])
            front = front[nondominated(front)]
            ratio = hypervolume(front, corner) / exact
            if until is None and ratio >= TARGET_QUALITY:
                until = asked
        runs.append({"ratio": ratio, "asked": asked, "asked_until_target": until})
    worst = min(run["ratio"] for run in runs)
    return {
        "genomes": len(genomes),
        "schedules": len(schedules),
        "generations": size.quality_generations,
        "population": size.population,
        "runs": runs,
        "target": TARGET_QUALITY,
        "met": worst >= TARGET_QUALITY,
    }


def show(result: dict[str, Any]) -> None:
    one, true = result["speed"], result["quality"]
    print(
        f"a generation of {one['population']}, {one['devices']} devices, {one['rounds']} rounds, "
        f"medians of {one['generations']}; load {result['load_average']:.1f}"
    )
    print(
        f"  ours                  {one['ours_s']:8.3f} s, of which overhead "
        f"{one['overhead_ms']:.1f} ms (target {TARGET_OVERHEAD_MS}: {verdict(one['overhead_met'])})"
    )
    print(
        f"  pymoo, cvxpy Clarabel {one['rival_s']:8.3f} s, of which search "
        f"{one['rival_search_ms']:.1f} ms; allocation of {one['rival_measured_individuals']} "
        f"individuals a generation, scaled to {one['population']}"
    )
    print(f"  ratio {one['ratio']:.0f} (target {TARGET_RATIO}: {verdict(one['ratio_met'])})")
    print(
        f"  cvxpy failed in {one['rival_failed']} of {one['rival_calls']} calls; energy + price x delay "
        f"differs from ours by at most {one['rival_largest_difference']:.0e}"
    )
    print(
        f"share of the exact hypervolume of {true['schedules']} schedules ({true['genomes']} genomes) "
        f"after up to {true['generations']} generations of {true['population']} "
        f"(target {true['target']}: {verdict(true['met'])})"
    )
    for run in true["runs"]:
        until = run["asked_until_target"]
        reached = (
            f"{true['target']} reached after {until} ({until / true['schedules']:.0%} of the space)"
            if until is not None
            else f"{true['target']} not reached"
        )
        print(f"  {run['ratio']:.5f} after {run['asked']} schedules; {reached}")


def main() -> None:
    given = parser(__doc__).parse_args()
    warnings.simplefilter("ignore")  # cvxpy warns of inaccurate solutions
    size = QUICK if given.quick else Size()
    pinned = pin_to_one_core()
    load = os.getloadavg()[0]
    result = {
        "machine": machine(pinned_to_core=pinned),
        "versions": versions(PACKAGES),
        "load_average": load,
        "quick": given.quick,
        "speed": speed(size),
        "quality": quality(size),
    }
    show(result)
    write(result, given, "evolution")


if __name__ == "__main__":
    main()
