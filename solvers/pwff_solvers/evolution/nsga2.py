"""NSGA-II over integer genomes whose individuals bring a set of points each, not one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from typing import Any

import moocore
import numpy as np
from numpy.typing import NDArray
from pymoo.algorithms.moo.nsga2 import NSGA2, binary_tournament
from pymoo.core.duplicate import DuplicateElimination
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.core.survival import Survival
from pymoo.core.termination import NoTermination
from pymoo.operators.selection.tournament import TournamentSelection

from pwff_solvers.evolution.operators import StepMutation, UniformCrossover
from pwff_solvers.front import hypervolume

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


ENUMERABLE = 10_000
"""Spaces up to this size are searched to the last genome."""


class SetSearch:
    """NSGA-II (Deb et al., IEEE TEC 2002) by ask and tell, on pymoo.

    An individual's rank is the best rank among its points when all points of the population are
    sorted together; its crowding is the hypervolume that would be lost without it among the points of
    that rank. With one point each this is NSGA-II with hypervolume contribution in the place of
    crowding distance, as in SMS-EMOA (Beume, Naujoks and Emmerich, EJOR 2007).

    Parameters
    ----------
    cardinalities : [gene]
        Gene g takes the values 0 … cardinalities[g] - 1.
    ordinal : [gene]
        Whether neighbouring values are alike: such a gene mutates by one step.
    initial : [individual, gene]
        The first generation; its size is the population's.
    key : callable
        From genome to what identifies it: no key is ever asked for twice.
    seed : int
        Same seed and same answers, same questions.
    """

    def __init__(
        self,
        cardinalities: IntArray,
        ordinal: NDArray[np.bool_],
        initial: IntArray,
        *,
        key: Callable[[IntArray], Hashable],
        seed: int,
    ) -> None:
        if initial.ndim != 2 or initial.shape[1] != len(cardinalities) or not len(initial):
            raise ValueError(
                f"initial must have shape [at least 1, {len(cardinalities)}], got {initial.shape}"
            )
        if ((initial < 0) | (initial >= cardinalities)).any():
            raise ValueError("initial must hold genes between 0 and cardinalities - 1")
        self._key, self._cardinalities = key, cardinalities
        self._rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
        self._asked: set[Hashable] = set()
        problem = Problem(n_var=len(cardinalities), n_obj=1, xl=0, xu=cardinalities - 1, vtype=int)
        self._algorithm = NSGA2(
            pop_size=max(2, len(initial)),  # two parents are needed to mate
            sampling=initial,
            selection=TournamentSelection(func_comp=binary_tournament),
            crossover=UniformCrossover(),
            mutation=StepMutation(cardinalities, ordinal),
            survival=_SetSurvival(),
            eliminate_duplicates=_Unasked(self._asked, key),
            seed=seed,
        )
        self._algorithm.setup(problem, termination=NoTermination())
        # An individual has no single F: parents are compared by the rank and crowding we set.
        self._algorithm.tournament_type = "comp_by_rank_and_crowding"
        self._pending: Any = None

    def ask(self) -> IntArray:
        """Return new genomes [individual, gene], none of them asked before; none left: no rows.

        Where mating finds nothing new, random genomes fill the generation, and in a small space
        enumeration does: no rows means that every genome was asked.
        """
        self._pending = self._algorithm.ask()
        if self._pending is None:
            self._pending = Population.empty()
        missing = self._algorithm.pop_size - len(self._pending)
        if missing > 0:
            fresh = self._fresh(missing, {self._key(genome) for genome in self._pending.get("X")})
            self._pending = Population.merge(self._pending, Population.new("X", fresh))
        if not len(self._pending):
            return np.zeros((0, len(self._cardinalities)), dtype=np.int64)
        genomes = np.asarray(self._pending.get("X"), dtype=np.int64)
        self._asked.update(self._key(genome) for genome in genomes)
        return genomes

    def _fresh(self, count: int, pending: set[Hashable]) -> IntArray:
        """Return up to ``count`` genomes that were not asked and are not pending."""
        known, found = self._asked | pending, []
        drawn = self._rng.integers(0, self._cardinalities, (100 * count, len(self._cardinalities)))
        size = float(np.prod(self._cardinalities.astype(float)))
        candidates = chain(drawn, np.ndindex(*self._cardinalities) if size <= ENUMERABLE else ())
        for candidate in candidates:
            genome = np.array(candidate, dtype=np.int64)
            if self._key(genome) not in known:
                known.add(self._key(genome))
                found.append(genome)
                if len(found) == count:
                    break
        return np.array(found, dtype=np.int64).reshape(-1, len(self._cardinalities))

    def tell(self, points: Sequence[FloatArray]) -> None:
        """Answer the last question: for every genome its points [point, objective].

        No points (or only non-finite ones) says that the genome failed or is not acceptable.
        """
        if self._pending is None or len(points) != len(self._pending):
            raise ValueError("points must answer the last ask, one array a genome")
        for individual, own in zip(self._pending, points, strict=True):
            individual.set("points", own[np.isfinite(own).all(axis=1)])
            individual.F, individual.G, individual.H = np.zeros(1), np.zeros(0), np.zeros(0)
            individual.evaluated.update("F", "G", "H")
        self._algorithm.tell(infills=self._pending)
        self._pending = None


class _SetSurvival(Survival):  # type: ignore[misc]
    """Keep the individuals of best rank; from the last rank that fits, drop the least one by one.

    One by one, because two individuals with the same points contribute nothing each, and yet
    one of them must stay.
    """

    def __init__(self) -> None:
        super().__init__(filter_infeasible=False)

    def _do(
        self, problem: Any, pop: Any, *args: Any, n_survive: int | None = None, **kwargs: Any
    ) -> Any:
        kept = np.arange(len(pop))
        while True:
            ranks, contributions = rank_sets([pop[index].get("points") for index in kept])
            excess = len(kept) - (len(pop) if n_survive is None else n_survive)
            if excess <= 0:
                break
            last = np.flatnonzero(ranks == ranks.max())
            least = last if len(last) <= excess else last[[contributions[last].argmin()]]
            kept = np.delete(kept, least)
        for index, rank, contribution in zip(kept, ranks, contributions, strict=True):
            pop[index].set("rank", rank)
            pop[index].set("crowding", contribution)
        return pop[kept]


def rank_sets(sets: Sequence[FloatArray]) -> tuple[IntArray, FloatArray]:
    """Return rank and hypervolume contribution of every set of points.

    Empty sets rank last. Contributions are measured within the points of one rank, in objectives
    normalised over all points, with the reference 10 % beyond the worst.
    """
    owner = np.repeat(np.arange(len(sets)), [len(points) for points in sets])
    ranks = np.full(len(sets), np.iinfo(np.int64).max)
    contributions = np.zeros(len(sets))
    if not len(owner):
        return ranks, contributions
    points = np.concatenate([points for points in sets if len(points)])
    spread = np.ptp(points, axis=0)
    points = (points - points.min(axis=0)) / np.where(spread > 0, spread, 1.0)
    reference = np.full(points.shape[1], 1.1)
    point_ranks = moocore.pareto_rank(points)
    np.minimum.at(ranks, owner, point_ranks)
    for rank in np.unique(ranks[np.isin(np.arange(len(sets)), owner)]):
        level = point_ranks == rank
        whole = hypervolume(points[level], reference)
        for index in np.flatnonzero(ranks == rank):
            contributions[index] = whole - hypervolume(points[level & (owner != index)], reference)
    return ranks, contributions


class _Unasked(DuplicateElimination):  # type: ignore[misc]
    """Drops genomes whose key was asked before, in this generation or any earlier one."""

    def __init__(self, asked: set[Hashable], key: Callable[[IntArray], Hashable]) -> None:
        super().__init__()
        self._asked, self._identify = asked, key

    def do(
        self, pop: Any, *others: Any, return_indices: bool = False, to_itself: bool = True
    ) -> Any:
        del to_itself  # always
        keys = {self._identify(np.asarray(x)) for other in others for x in other.get("X")}
        kept = []
        for index, genome in enumerate(pop.get("X")):
            key = self._identify(np.asarray(genome))
            if key not in self._asked and key not in keys:
                kept.append(index)
                keys.add(key)
        result = pop[kept] if kept else Population.empty()
        if return_indices:
            return result, kept, [i for i in range(len(pop)) if i not in set(kept)]
        return result
