"""Non-dominated sets, hypervolume and the knee; every objective is minimised."""

from __future__ import annotations

import moocore
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def nondominated(points: FloatArray) -> NDArray[np.bool_]:
    """Return which of the points [point, objective] no other point dominates.

    Of equal points the first is kept. NaN is refused: no order is defined for it.
    """
    _check(points)
    if not len(points):
        return np.zeros(0, dtype=bool)
    return np.asarray(moocore.is_nondominated(points, keep_weakly=False), dtype=bool)


def hypervolume(points: FloatArray, reference: FloatArray) -> float:
    """Return the volume that the points dominate within ``reference`` [objective]."""
    _check(points)
    return float(moocore.hypervolume(points, ref=reference)) if len(points) else 0.0


def knee(points: FloatArray) -> int:
    r"""Return the index of the point that gives most for what it gives up.

    .. math:: \arg\min_i \sum_j (z_{ij} - \min z_j) / (\max z_j - \min z_j)

    It lies farthest below the plane through the ends of the axes of the normalised front (Das, "On
    characterizing the 'knee' of the Pareto curve", Structural Optimization 18, 1999). It depends on the
    scale of the objectives: give logarithms of quantities that span decades.
    """
    _check(points)
    if not len(points):
        raise ValueError("points must hold at least one point, got none")
    low = points.min(axis=0)
    spread = np.ptp(points, axis=0)
    normalised = (points - low) / np.where(spread > 0, spread, 1.0)
    return int(normalised.sum(axis=1).argmin())


def _check(points: FloatArray) -> None:
    if points.ndim != 2:
        raise ValueError(f"points must have shape [point, objective], got {points.shape}")
    if np.isnan(points).any():
        row = int(np.flatnonzero(np.isnan(points).any(axis=1))[0])
        raise ValueError(f"points[{row}] must not be NaN, got {points[row]}")
