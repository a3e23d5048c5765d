r"""What each owner of points adds to the hypervolume of them all, in one sweep.

The contribution of owner :math:`o` of the points :math:`P_o` within the reference :math:`r` is what would
be lost without it,

.. math:: V(\cup_q P_q) - V(\cup_{q \ne o} P_q),

the volume of what its points dominate and no other's do. For two and three objectives the sweep climbs
the third one. In the plane of the first two, each cell between neighbouring first coordinates holds the
lowest second coordinate reached so far, with its owner, and the lowest of any other owner: between two
levels the owner gains (second lowest - lowest) x width of the cell x height. Both lowest coordinates
fall from cell to cell, so a point changes a run of cells that starts at its own and ends at the first
one where it is no lower than the second; each cell is settled when it changes. It is the plane sweep of
the hypervolume (Beume, Fonseca, López-Ibáñez, Paquete and Vahrenhold, IEEE TEVC 13, 2009), with the
runner-up kept besides the leader.

The sweep is for numba, under the same conditions as the allocator's kernels (see
:mod:`pwff_solvers.compiled.elementary`). Without it, and in other numbers of objectives, hypervolumes
are subtracted: the same results, a hundred times slower.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pwff_solvers.compiled.switch import COMPILED
from pwff_solvers.front import hypervolume

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


class Contributions:
    """The hypervolume contributions of owners of points.

    Parameters
    ----------
    points : [point, objective]
    owner : [point]
        Whose each point is, 0 … owners - 1.
    owners : int
    reference : [objective]
        The corner that volumes reach to; points beyond it count for nothing.
    """

    def __init__(
        self, points: FloatArray, owner: IntArray, owners: int, reference: FloatArray
    ) -> None:
        inside = (points < reference).all(axis=1)
        self._points, self._owner, self._reference = points[inside], owner[inside], reference
        self._owners = owners
        self._swept = COMPILED and points.shape[1] in (2, 3)
        if self._swept:
            self._prepare()

    def _prepare(self) -> None:
        """Sort the points for the sweep, by height; in two objectives all lie at height 0, below 1."""
        corner, flat = np.append(self._reference, 1.0), self._points.shape[1] == 2
        height = np.zeros(len(self._points)) if flat else self._points[:, 2]
        order = np.argsort(height)
        first, second = self._points[order, 0], self._points[order, 1]
        along = np.argsort(first)
        cell = np.empty(len(first), dtype=np.int64)
        cell[along] = np.arange(len(first))
        self._arguments = first, second, height[order], self._owner[order], cell, along, corner[:3]

    def of(self, kept: BoolArray) -> FloatArray:
        """Return what each owner contributes among those ``kept`` [owner]; 0 for the others."""
        if self._swept:
            return _sweep(*self._arguments, kept)
        there = kept[self._owner]
        whole = hypervolume(self._points[there], self._reference)
        lost = np.zeros(self._owners)
        for one in np.unique(self._owner[there]):
            rest = self._points[there & (self._owner != one)]
            lost[one] = whole - hypervolume(rest, self._reference)
        return lost


def _sweep(
    first: FloatArray,
    second: FloatArray,
    height: FloatArray,
    owner: IntArray,
    cell: IntArray,
    along: IntArray,
    corner: FloatArray,
    kept: BoolArray,
) -> FloatArray:
    """Return the contribution of every owner; points [point] ascend in height.

    ``along`` sorts them by the first objective, and ``cell`` is the place of each there; ``corner`` [3]
    is the reference.
    """
    # Only points that are kept make cells.
    there = kept[owner[along]]
    width = np.diff(np.append(first[along][there], corner[0]))
    start = (np.cumsum(there) - 1)[cell]
    gained = np.zeros(len(kept))
    lowest, other = np.full(len(width), corner[1]), np.full(len(width), corner[1])
    leader, settled = np.zeros(len(width), dtype=np.int64), np.zeros(len(width))
    for point in range(len(owner)):
        one, low, level = owner[point], second[point], height[point]
        if not kept[one]:
            continue
        for c in range(start[point], len(width)):
            if low >= other[c]:
                break
            gained[leader[c]] += (other[c] - lowest[c]) * width[c] * (level - settled[c])
            settled[c] = level
            if low >= lowest[c]:
                if leader[c] != one:
                    other[c] = low
                continue
            if leader[c] != one:
                other[c] = lowest[c]
            lowest[c], leader[c] = low, one
    for c in range(len(width)):
        gained[leader[c]] += (other[c] - lowest[c]) * width[c] * (corner[2] - settled[c])
    return gained


if COMPILED and not TYPE_CHECKING:
    import numba

    # Not the allocator's ``entry``: that watches the allocator's files for changes, not this one.
    _sweep = numba.njit(nogil=True, cache=True)(_sweep)
