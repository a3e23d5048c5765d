"""The set search against enumeration, and its manners."""

from __future__ import annotations

from itertools import product

import moocore
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pwff_solvers.evolution import SetSearch, contribution, crossed, mutated
from pwff_solvers.evolution.contribution import Contributions
from pwff_solvers.evolution.nsga2 import rank_sets, survivors
from pwff_solvers.front import hypervolume

CARDINALITIES = np.array([4, 5, 3, 3, 3, 3])
ORDINAL = np.array([True, True, False, False, False, False])


def curve(genome: np.ndarray) -> np.ndarray:
    """Return a curve of points in three objectives; deeper and richer genomes are better and dearer."""
    trained = genome[2:][len(genome[2:]) - min(int(genome[1]), 4) :]
    cost = 1.0 + genome[1] + 0.2 * genome[0] + (trained == 2).sum() * 0.5
    error = 1.0 / (1.0 + 0.5 * genome[0] + trained.sum() + 0.1 * genome[1])
    price = np.linspace(-1.0, 1.0, 7)
    return np.column_stack([np.log(cost) + price, np.log(cost) - price, np.full(7, error)])


def start(seed: int) -> SetSearch:
    # As the planner does: the two ends of the scale, and random genomes between them.
    initial = np.random.default_rng(seed).integers(0, CARDINALITIES, (8, 6))
    initial[0], initial[1] = 0, CARDINALITIES - 1
    return SetSearch(
        CARDINALITIES, ORDINAL, initial, key=lambda genome: tuple(genome.tolist()), seed=seed
    )


def asked(seed: int, generations: int) -> list[np.ndarray]:
    search, genomes = start(seed), []
    for _ in range(generations):
        new = search.ask()
        genomes += list(new)
        search.tell([curve(genome) for genome in new])
    return genomes


def test_finds_the_enumerated_front_with_a_tenth_of_its_evaluations() -> None:
    reference = np.array([4.0, 4.0, 1.1])
    everything = np.concatenate([curve(np.array(g)) for g in product(*map(range, CARDINALITIES))])
    exact = hypervolume(everything, reference)
    ratios = []
    for seed in range(5):
        found = np.concatenate([curve(genome) for genome in asked(seed, 20)])
        ratios.append(hypervolume(found, reference) / exact)
        random = np.random.default_rng(100 + seed).integers(0, CARDINALITIES, (160, 6))
        assert ratios[-1] > hypervolume(np.concatenate([*map(curve, random)]), reference) / exact
    assert min(ratios) > 0.98


def test_nearly_attains_the_enumerated_front_within_a_third_of_the_space() -> None:
    reference = np.array([4.0, 4.0, 1.1])
    everything = [curve(np.array(genome)) for genome in product(*map(range, CARDINALITIES))]
    exact = hypervolume(np.concatenate(everything), reference)
    for seed in range(3):
        genomes = asked(seed, len(everything) // 3 // 8)
        assert len(genomes) <= len(everything) / 3
        found = hypervolume(np.concatenate([*map(curve, genomes)]), reference)
        assert found >= 0.995 * exact


def test_every_genome_is_keyed_once() -> None:
    keyed: list[tuple[int, ...]] = []

    def key(genome: np.ndarray) -> int:
        keyed.append(tuple(genome.tolist()))
        return int(genome[0])

    initial = np.array([[0, 0], [1, 0], [2, 0]])
    search = SetSearch(np.array([5, 3]), np.full(2, True), initial, key=key, seed=0)
    genes = []
    while len(new := search.ask()):
        genes += new[:, 0].tolist()
        search.tell([genome[None].astype(float) for genome in new])
    assert sorted(genes) == list(range(5))
    assert len(set(keyed)) == len(keyed) == 15


def lost(points: np.ndarray, owner: np.ndarray, kept: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """Return the hypervolume lost without each owner [owner], 0 for owners not kept."""
    there = kept[owner]
    whole = hypervolume(points[there], corner)
    rest = [hypervolume(points[there & (owner != one)], corner) for one in range(len(kept))]
    return np.where(kept, whole - np.array(rest), 0.0)


@pytest.mark.parametrize("swept", [True, False])
@pytest.mark.parametrize("objectives", [2, 3, 4])
@given(data=st.data())
def test_contributions_are_differences_of_hypervolumes(
    swept: bool, objectives: int, data: st.DataObject
) -> None:
    count, owners = data.draw(st.integers(0, 30)), data.draw(st.integers(1, 6))
    grid = arrays(float, (count, objectives), elements=st.integers(0, 6))  # many ties
    even = arrays(float, (count, objectives), elements=st.floats(0.0, 6.0))
    points = data.draw(st.one_of(grid, even))
    owner = data.draw(arrays(np.int64, count, elements=st.integers(0, owners - 1)))
    kept = data.draw(arrays(bool, owners))
    corner = np.full(objectives, 5.5)  # some points lie beyond
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contribution, "COMPILED", swept)
        found = Contributions(points, owner, owners, corner).of(kept)
    np.testing.assert_allclose(found, lost(points, owner, kept, corner), atol=1e-9)


@pytest.mark.parametrize("swept", [True, False])
@given(st.integers(0, 2**32 - 1), st.integers(2, 3), st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_the_last_rank_is_thinned_one_by_one(
    swept: bool, seed: int, objectives: int, count: int
) -> None:
    rng = np.random.default_rng(seed)
    sets = [rng.random((rng.integers(0, 5), objectives)) for _ in range(12)]
    sets += sets[:2]  # of two alike neither adds anything, and yet one must stay
    sizes = [len(own) for own in sets]
    points, owner = np.concatenate(sets), np.repeat(np.arange(len(sets)), sizes)
    scaled = (points - points.min(axis=0)) / np.ptp(points, axis=0)
    levels = moocore.pareto_rank(scaled)
    ranks, _ = rank_sets(sets)
    kept = np.full(len(sets), True)
    while kept.sum() > count:
        last = np.flatnonzero(kept & (ranks == ranks[kept].max()))
        level = levels == ranks[last[0]]
        worth = lost(scaled[level], owner[level], kept, np.full(objectives, 1.1)).round(12)
        kept[last[worth[last].argmin()]] = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contribution, "COMPILED", swept)
        found, _, _ = survivors(sets, count)
    assert found.tolist() == np.flatnonzero(kept).tolist()


def test_never_asks_twice_and_repeats_itself_exactly() -> None:
    first = asked(3, 12)
    assert len({tuple(genome.tolist()) for genome in first}) == len(first)
    assert all((a == b).all() for a, b in zip(first, asked(3, 12), strict=True))
    assert any((a != b).any() for a, b in zip(first, asked(4, 12), strict=False))


def test_asks_nothing_once_everything_was_asked() -> None:
    search = SetSearch(
        np.array([2, 2]),
        np.array([True, True]),
        np.array([[0, 0], [0, 1]]),
        key=lambda genome: tuple(genome.tolist()),
        seed=0,
    )
    seen = 0
    while len(new := search.ask()):
        seen += len(new)
        search.tell([np.array([[float(g.sum()), -float(g.sum())]]) for g in new])
        assert seen <= 4
    assert seen == 4


@pytest.mark.parametrize("seed", range(4))
def test_small_spaces_are_asked_to_the_last_genome(seed: int) -> None:
    cardinalities = np.array([2, 3, 2, 2])
    initial = np.random.default_rng(seed).integers(0, cardinalities, (4, 4))
    search = SetSearch(
        cardinalities, np.full(4, True), initial, key=lambda g: tuple(g.tolist()), seed=seed
    )
    seen = 0
    while len(new := search.ask()):
        seen += len(new)
        search.tell([np.array([[float(g.sum()), -float(g[0])]]) for g in new])
    assert seen == 24


def test_failures_and_nans_never_win() -> None:
    sets = [np.array([[1.0, 2.0]]), np.zeros((0, 2)), np.array([[2.0, 3.0]])]
    ranks, contributions = rank_sets(sets)
    assert ranks[0] == 0
    assert ranks[2] == 1
    assert ranks[1] > 1
    assert contributions[1] == 0
    search = start(0)
    new = search.ask()
    search.tell([np.full((1, 3), np.nan) for _ in new])  # all failed: the search goes on
    assert len(search.ask())


@given(
    st.lists(
        arrays(float, st.tuples(st.integers(0, 4), st.just(2)), elements=st.integers(0, 5)),
        min_size=1,
        max_size=6,
    )
)
def test_rank_is_that_of_the_best_point(sets: list[np.ndarray]) -> None:
    ranks, contributions = rank_sets(sets)
    points = [(owner, point) for owner, own in enumerate(sets) for point in own]
    level = 0
    expected = np.full(len(sets), np.iinfo(np.int64).max)
    while points:
        best = [
            (o, p)
            for o, p in points
            if not any((q <= p).all() and (q < p).any() for _, q in points)
        ]
        for owner, _ in best:
            expected[owner] = min(expected[owner], level)
        kept = {(o, tuple(p)) for o, p in best}
        points = [(o, p) for o, p in points if (o, tuple(p)) not in kept]
        level += 1
    assert ranks.tolist() == expected.tolist()
    assert (contributions >= -1e-12).all()


def test_operators_stay_in_bounds_and_step() -> None:
    rng = np.random.default_rng(0)
    genomes = rng.integers(0, CARDINALITIES, (2000, 6))
    changed = mutated(genomes, CARDINALITIES, ORDINAL, rng)
    assert ((changed >= 0) & (changed < CARDINALITIES)).all()
    assert (np.abs(changed - genomes)[:, ORDINAL] <= 1).all()
    assert 0.7 < (changed != genomes).sum(axis=1).mean() < 1.3
    parents = np.stack([np.zeros((500, 6), int), np.ones((500, 6), int)])
    children = crossed(parents, rng)
    assert (children[0] + children[1] == 1).all()
    assert children[0].mean() == pytest.approx(0.5, abs=0.05)


def test_bad_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="initial must hold genes"):
        SetSearch(CARDINALITIES, ORDINAL, np.full((8, 6), 9), key=str, seed=0)
    with pytest.raises(ValueError, match="initial must have shape"):
        SetSearch(CARDINALITIES, ORDINAL, np.zeros((8, 2), int), key=str, seed=0)
    with pytest.raises(ValueError, match="answer the last ask"):
        start(0).tell([])
