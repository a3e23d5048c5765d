"""Expected improvement of curves against the closed form, moocore and Monte Carlo."""

from __future__ import annotations

import moocore
import numpy as np
import pytest
from scipy.stats import norm

from pwff_solvers.surrogate import Attained, expected_improvement, on_grid

EDGES = np.linspace(0.0, 1.0, 41)
REFERENCE = (1.0, 1.0)


def stairs(rng: np.random.Generator, count: int) -> np.ndarray:
    """Curves [curve, cell] that fall."""
    return np.sort(rng.uniform(0.0, 1.2, (count, 40)), axis=1)[:, ::-1].clip(max=1.0)


def points(curves: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """What dominates exactly what a curve on cells does: a point at the left of every cell."""
    rows = [
        (x, y, error)
        for curve, error in zip(curves, errors, strict=True)
        for x, y in zip(EDGES[:-1], curve, strict=True)
    ]
    return np.array(rows)


def volume(curves: np.ndarray, errors: np.ndarray) -> float:
    return float(moocore.hypervolume(points(curves, errors), ref=(1.0, *REFERENCE)))


def test_hypervolume_is_moocores() -> None:
    rng = np.random.default_rng(1)
    curves, errors = stairs(rng, 12), rng.uniform(0.2, 1.1, 12)
    attained = Attained.of(curves, errors, EDGES, REFERENCE)
    assert attained.hypervolume == pytest.approx(volume(curves, errors), rel=1e-12)
    assert Attained.of(curves[:0], errors[:0], EDGES, REFERENCE).hypervolume == 0.0


def test_improvement_of_the_mean_is_a_difference_of_hypervolumes() -> None:
    rng = np.random.default_rng(2)
    curves, errors = stairs(rng, 10), rng.uniform(0.2, 0.9, 10)
    attained = Attained.of(curves, errors, EDGES, REFERENCE)
    offered, mean = stairs(rng, 12).reshape(4, 3, 40), rng.uniform(0.1, 1.1, (4, 3))
    got = expected_improvement(attained, offered, mean, np.zeros((4, 3)))
    for number in range(4):
        both = volume(np.vstack([curves, offered[number]]), np.concatenate([errors, mean[number]]))
        assert got[number] == pytest.approx(both - volume(curves, errors), abs=1e-12)


def test_one_cut_is_the_closed_form() -> None:
    """EHVI = sum_k A_k (psi(z_{k+1}) - psi(z_k)), summed over the front one point after another."""
    rng = np.random.default_rng(3)
    curves, errors = stairs(rng, 8), np.sort(rng.uniform(0.2, 0.9, 8))
    offered = stairs(rng, 1)[0]
    mean, std = 0.5, 0.15

    def psi(b: float) -> float:
        t = (b - mean) / std
        return float((b - mean) * norm.cdf(t) + std * norm.pdf(t))

    expected, below = 0.0, 0.0
    for k in range(9):
        least = np.vstack([np.ones((1, 40)), curves[:k]]).min(axis=0)
        area = float(np.maximum(least - offered, 0.0).sum() / 40)
        above = psi(errors[k] if k < 8 else 1.0)
        expected += area * (above - below)
        below = above
    got = expected_improvement(
        Attained.of(curves, errors, EDGES, REFERENCE),
        offered[None, None],
        np.array([[mean]]),
        np.array([[std]]),
    )
    assert got[0] == pytest.approx(expected, rel=1e-12)


def test_several_cuts_by_monte_carlo() -> None:
    rng = np.random.default_rng(4)
    curves, errors = stairs(rng, 6), rng.uniform(0.3, 0.9, 6)
    offered = stairs(rng, 3)
    mean, std = np.array([0.7, 0.5, 0.35]), np.array([0.05, 0.12, 0.2])
    got = expected_improvement(
        Attained.of(curves, errors, EDGES, REFERENCE), offered[None], mean[None], std[None]
    )[0]
    before = volume(curves, errors)
    # strata of one common error: quasi-Monte Carlo
    draws = norm.ppf((np.arange(400) + 0.5) / 400)
    gains = [
        volume(np.vstack([curves, offered]), np.concatenate([errors, mean + std * e])) - before
        for e in draws
    ]
    assert got == pytest.approx(np.mean(gains), rel=0.01)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_cuts_that_change_places_within_a_level(count: int) -> None:
    """Cuts of very different certainty: which is better depends on the common error."""
    rng = np.random.default_rng(count)
    for _ in range(5):
        curves, errors = stairs(rng, count), rng.uniform(0.3, 0.9, count)
        attained = Attained.of(curves, errors, EDGES, REFERENCE)
        offered, mean = stairs(rng, 4), rng.uniform(0.4, 0.7, 4)
        std = rng.permutation([0.002, 0.02, 0.1, 0.1])
        got = expected_improvement(attained, offered[None], mean[None], std[None])[0]
        before = volume(curves, errors) if count else 0.0
        draws = norm.ppf((np.arange(1000) + 0.5) / 1000)
        gains = [
            volume(np.vstack([curves, offered]), np.concatenate([errors, mean + std * e])) - before
            for e in draws
        ]
        assert got == pytest.approx(np.mean(gains), rel=2e-3)


def test_curves_on_a_grid() -> None:
    x, y = np.array([[0.25, 0.5, 0.75]]), np.array([[0.8, 0.4, 0.2]])
    edges = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(on_grid(x, y, edges, 1.0), [[1.0, 0.6, 0.3, 0.2]])
