"""NSGA-II over integer genomes whose individuals bring a set of points each, not one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import moocore
import numpy as np
from numpy.typing import NDArray
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.infill import InfillCriterion
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.core.survival import Survival
from pymoo.core.termination import NoTermination

from pwff_solvers.evolution.contribution import Contributions
from pwff_solvers.evolution.operators import crossed, mutated

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


ENUMERABLE = 10_000
"""Spaces up to this size are searched to the last genome."""
CROSSED = 0.9
"""Share of pairs of parents that are crossed; the children of the others are only mutated."""
BROODS = 20
"""Number of broods, each as large as the population, in search of enough genomes not asked before."""


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
        From genome to what identifies it: no key is ever asked for twice. It is called once a genome.
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
        size = max(2, len(initial))  # two parents are needed to mate
        unasked = _Unasked(cardinalities, ordinal, key, np.random.default_rng(seed))
        self._algorithm = NSGA2(
            pop_size=size,
            sampling=unasked.first(initial, size),
            mating=unasked,
            survival=_SetSurvival(),
            eliminate_duplicates=False,
            seed=seed,
        )
        problem = Problem(n_var=len(cardinalities), n_obj=1, xl=0, xu=cardinalities - 1, vtype=int)
        self._algorithm.setup(problem, termination=NoTermination())
        self._genes = len(cardinalities)
        self._pending: Any = None

    def ask(self) -> IntArray:
        """Return new genomes [individual, gene], none of them asked before; none left: no rows.

        Where mating finds nothing new, random genomes fill the generation, and in a small space
        enumeration does: no rows means that every genome was asked.
        """
        self._pending = self._algorithm.ask()
        if self._pending is None:
            self._pending = Population.empty()
        return np.asarray(self._pending.get("X"), dtype=np.int64).reshape(-1, self._genes)

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


class _Unasked(InfillCriterion):  # type: ignore[misc]
    """Finds genomes whose key was not asked: children first, then random ones, at last any."""

    def __init__(
        self,
        cardinalities: IntArray,
        ordinal: NDArray[np.bool_],
        key: Callable[[IntArray], Hashable],
        rng: np.random.Generator,
    ) -> None:
        super().__init__()
        self._cardinalities, self._ordinal, self._rng = cardinalities, ordinal, rng
        self._identify = key
        self._keys: dict[bytes, Hashable] = {}
        self._asked: set[Hashable] = set()

    def do(self, problem: Any, pop: Any, n_offsprings: int, *args: Any, **kwargs: Any) -> Any:
        children = self._children(*pop.get("X", "rank", "crowding"))
        return Population.new("X", self.first(children, n_offsprings))

    def first(self, wanted: Iterable[IntArray], count: int) -> IntArray:
        """Return the first ``count`` new genomes, ``wanted`` ones before others; they are now asked."""
        found: dict[Hashable, IntArray] = {}
        for genome in chain(wanted, self._others(count)):
            key = self._key(genome)
            if key not in self._asked:
                found.setdefault(key, genome)
            if len(found) == count:
                break
        self._asked.update(found)
        genomes = np.array(list(found.values()), dtype=np.int64)
        return genomes.reshape(-1, len(self._cardinalities))

    def _key(self, genome: IntArray) -> Hashable:
        """Return the key of a genome; most are met many times."""
        name = genome.tobytes()
        if name not in self._keys:
            self._keys[name] = self._identify(genome)
        return self._keys[name]

    def _children(
        self, genomes: IntArray, rank: IntArray, crowding: FloatArray
    ) -> Iterator[IntArray]:
        """Breed winners of tournaments of two, by rank, then crowding, then chance."""
        rng, count = self._rng, len(genomes)
        for _ in range(BROODS):
            place = np.empty(count, dtype=np.int64)
            place[np.lexsort((rng.random(count), -crowding, rank))] = np.arange(count)
            rivals = np.concatenate([rng.permutation(count) for _ in range(2)]).reshape(-1, 2)
            best = rivals[np.arange(count), place[rivals].argmin(axis=1)]
            pairs = genomes[best[: count // 2 * 2].reshape(2, -1)]
            cross = rng.random((pairs.shape[1], 1)) < CROSSED
            children = np.concatenate(np.where(cross, crossed(pairs, rng), pairs))
            yield from mutated(children, self._cardinalities, self._ordinal, rng)

    def _others(self, count: int) -> Iterator[IntArray]:
        """Draw random genomes; where the space is small, go through it then."""
        genes = len(self._cardinalities)
        yield from self._rng.integers(0, self._cardinalities, (100 * count, genes))
        if np.prod(self._cardinalities.astype(float)) <= ENUMERABLE:
            yield from map(np.array, np.ndindex(*self._cardinalities))


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
        sets = [individual.get("points") for individual in pop]
        kept, ranks, contributions = survivors(sets, len(pop) if n_survive is None else n_survive)
        for index in kept:
            pop[index].set("rank", ranks[index])
            pop[index].set("crowding", contributions[index])
        return pop[kept]


def survivors(sets: Sequence[FloatArray], count: int) -> tuple[IntArray, IntArray, FloatArray]:
    """Return the indices of the ``count`` sets of points to keep, and ranks and contributions of all.

    Ranks, and the scale that contributions are measured in, are those among all the sets;
    contributions are what the sets kept lose without one of them, 0 for those dropped.
    """
    owner = np.repeat(np.arange(len(sets)), [len(own) for own in sets])
    points = np.concatenate([own for own in sets if len(own)] or [np.zeros((1, 2))])[: len(owner)]
    ranks, point_ranks = np.full(len(sets), np.iinfo(np.int64).max), np.zeros(0, dtype=np.int64)
    if len(points):
        spread = np.ptp(points, axis=0)
        points = (points - points.min(axis=0)) / np.where(spread > 0, spread, 1.0)
        point_ranks = moocore.pareto_rank(points)
        np.minimum.at(ranks, owner, point_ranks)
    reference = np.full(points.shape[1], 1.1)
    kept, contributions = np.full(len(sets), True), np.zeros(len(sets))
    for rank in np.unique(ranks)[::-1]:  # the last one first
        own, excess = np.flatnonzero(ranks == rank), int(kept.sum()) - count
        if excess >= len(own):
            kept[own] = False
            continue
        level = point_ranks == rank
        volumes = Contributions(points[level], owner[level], len(sets), reference)
        for _ in range(excess):
            left = own[kept[own]]
            kept[left[volumes.of(kept)[left].argmin()]] = False
        contributions[own] = volumes.of(kept)[own]
    return np.flatnonzero(kept), ranks, contributions


def rank_sets(sets: Sequence[FloatArray]) -> tuple[IntArray, FloatArray]:
    """Return rank and hypervolume contribution of every set of points.

    Empty sets rank last. Contributions are measured within the points of one rank, in objectives
    normalised over all points, with the reference 10 % beyond the worst.
    """
    _, ranks, contributions = survivors(sets, len(sets))
    return ranks, contributions
