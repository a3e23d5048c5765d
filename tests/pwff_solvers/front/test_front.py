"""Non-dominated sets and hypervolume against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pwff_solvers.front import hypervolume, knee, nondominated

points_of = arrays(
    float, st.tuples(st.integers(1, 12), st.integers(2, 3)), elements=st.integers(0, 4)
)


@given(points_of)
def test_nondominated_is_the_definition(points: np.ndarray) -> None:
    kept = nondominated(points)
    for i, point in enumerate(points):
        dominated = any((q <= point).all() and (q < point).any() for q in points)
        first = not any((q == point).all() for q in points[:i])
        assert kept[i] == (not dominated and first)


@given(points_of)
def test_hypervolume_counts_the_cells_of_a_grid(points: np.ndarray) -> None:
    dimensions = points.shape[1]
    cells = np.stack(np.meshgrid(*[np.arange(5)] * dimensions), -1).reshape(-1, 1, dimensions)
    covered = (points[None] <= cells).all(axis=2).any(axis=1).sum()
    assert hypervolume(points, np.full(dimensions, 5.0)) == pytest.approx(float(covered))


def test_knee_is_where_the_front_bends() -> None:
    front = np.array([[0.0, 1.0], [0.1, 0.2], [0.5, 0.12], [1.0, 0.0]])
    assert knee(front) == 1
    assert knee(front * [1000.0, 1e-6] + [5.0, -3.0]) == 1
    assert knee(np.array([[3.0, 4.0]])) == 0


def test_nan_and_emptiness_are_refused() -> None:
    with pytest.raises(ValueError, match=r"points\[1\] must not be NaN"):
        nondominated(np.array([[0.0, 1.0], [np.nan, 0.0]]))
    with pytest.raises(ValueError, match=r"shape \[point, objective\]"):
        hypervolume(np.zeros(3), np.ones(3))
    with pytest.raises(ValueError, match="at least one point"):
        knee(np.zeros((0, 2)))
    assert nondominated(np.zeros((0, 3))).shape == (0,)
