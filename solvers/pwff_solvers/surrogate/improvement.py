r"""Expected hypervolume improvement where two objectives are known curves and the third is uncertain.

A candidate (a training) offers several *cuts* (the rounds after which it may end).  A cut is a curve in the
plane of the two known objectives, x and y, and an error z that is known up to a normal distribution.
All are minimised.  Areas are measured on cells of x; along z the integral is in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from pwff_solvers.front import nondominated

FloatArray = NDArray[np.float64]

_CHUNK = 2_000_000
"""Numbers in a temporary array: it stays within the cache of a few MB a core."""


def on_grid(x: FloatArray, y: FloatArray, edges: FloatArray, reference: float) -> FloatArray:
    """Return the least y that a curve reaches by the middle of every cell of x, [..., cell].

    Parameters
    ----------
    x, y : [..., point]
        Points of curves that fall from left to right (x ascending, y descending); between them they
        are interpolated.
    edges : [cell + 1]
        Ascending.
    reference : float
        What counts where a curve has not begun, and the most that is returned.
    """
    middle = 0.5 * (edges[1:] + edges[:-1])
    shape = x.shape[:-1]
    rows = [
        np.interp(middle, own_x, own_y, left=np.inf)
        for own_x, own_y in zip(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), strict=True)
    ]
    return np.minimum(np.array(rows).reshape(*shape, len(middle)), reference)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attained:
    """The least y at every level of error and cell of x that has been reached, within a reference.

    Between ``levels[k - 1]`` and ``levels[k]`` of error row k holds; row 0 is below all errors, where
    nothing is attained.
    """

    levels: FloatArray
    """[level]: errors, ascending; the last is the reference's."""
    least: FloatArray
    """[level, cell]"""
    width: FloatArray
    """[cell]"""
    reference: float
    """Reference value of y."""

    @classmethod
    def of(
        cls,
        curves: FloatArray,
        errors: FloatArray,
        edges: FloatArray,
        reference: tuple[float, float],
    ) -> Attained:
        """Return what curves [cut, cell] (see :func:`on_grid`) with known errors [cut] attain.

        ``reference``: of y and of the error.
        """
        order = np.argsort(errors, kind="stable")
        order = order[errors[order] < reference[1]]
        nothing = np.full((1, len(edges) - 1), reference[0])
        least = np.minimum.accumulate(np.vstack([nothing, curves[order]]), axis=0)
        # A cut that lowers y nowhere bounds no level of its own.
        new = np.concatenate([[True], (least[1:] < least[:-1]).any(axis=1)])
        levels = np.concatenate([errors[order][new[1:]], [reference[1]]])
        return cls(
            levels=levels, least=least[new], width=np.diff(edges), reference=float(reference[0])
        )

    @property
    def hypervolume(self) -> float:
        """Return the hypervolume that is dominated within the reference and the cells."""
        heights = np.diff(self.levels)
        areas = (self.reference - self.least[1:]) @ self.width
        return float(areas @ heights)

    def points(self, edges: FloatArray) -> FloatArray:
        """Return the corners of what is attained, [point, (x, y, error)], none dominated."""
        level, cell = np.nonzero(self.least[1:] < self.reference)
        corners = np.column_stack(
            [edges[cell], self.least[1:][level, cell], self.levels[:-1][level]]
        )
        return corners[nondominated(corners)]


def expected_improvement(
    attained: Attained, curves: FloatArray, mean: FloatArray, std: FloatArray
) -> FloatArray:
    r"""Return the expected gain in hypervolume of every candidate, [candidate].

    Parameters
    ----------
    attained : Attained
    curves : [candidate, cut, cell]
    mean, std : [candidate, cut]
        Of the errors; with a standard deviation of 0 it is the improvement of the mean.

    Notes
    -----
    For one cut, with :math:`A_k` the area by which the candidate's curve lowers row k and
    :math:`\psi(b) = (b-\mu)\Phi(\frac{b-\mu}{s}) + s\,\varphi(\frac{b-\mu}{s})`,

    .. math:: \mathrm{EHVI} = \sum_k A_k\,(\psi(z_{k+1}) - \psi(z_k)),

    since :math:`\int_a^b P(z' \le z)\,dz = \psi(b) - \psi(a)`.  Several cuts are taken to err
    together: their errors are :math:`\mu_m + s_m \varepsilon` with one :math:`\varepsilon`.  Then the
    cuts below a level z are nested, those with the largest :math:`(z-\mu_m)/s_m` first. That order
    changes where two of them are equal, at :math:`z = (\mu_a s_b - \mu_b s_a)/(s_b - s_a)`: between
    those z and the levels the integral is again a sum of :math:`\psi`, exactly.
    """
    count, cuts, cells = curves.shape
    intervals = len(attained.levels) + cuts * (cuts - 1) // 2
    gains = np.empty(count)
    size = max(1, _CHUNK // (intervals * cells))
    for start in range(0, count, size):
        part = slice(start, start + size)
        gains[part] = _gains(attained, curves[part], mean[part], np.maximum(std[part], 1e-12))
    return gains


def _gains(attained: Attained, curves: FloatArray, mean: FloatArray, std: FloatArray) -> FloatArray:
    ends = _ends(attained.levels, mean, std)
    # psi at the ends of every interval, [candidate, interval, cut]; nothing lies below the first.
    t = (ends[:, :, None] - mean[:, None]) / std[:, None]
    psi = std[:, None] * (t * ndtr(t) + np.exp(-0.5 * t * t) / np.sqrt(2.0 * np.pi))
    mass = np.diff(psi, axis=1, prepend=0.0)
    inside = np.column_stack([ends[:, :1] - 1.0, 0.5 * (ends[:, 1:] + ends[:, :-1])])
    order = np.argsort((mean[:, None] - inside[:, :, None]) / std[:, None], axis=2)
    mass = np.take_along_axis(mass, order, axis=2)
    before = attained.least[np.searchsorted(attained.levels, inside)]
    total = np.zeros(len(mean))
    rows = np.arange(len(mean))[:, None]
    least = np.full_like(before, attained.reference)
    for place in range(mean.shape[1]):
        np.minimum(least, curves[rows, order[:, :, place]], out=least)
        area = np.maximum(before - least, 0.0) @ attained.width
        after = mass[:, :, place + 1] if place + 1 < mean.shape[1] else 0.0
        total += (area * np.maximum(mass[:, :, place] - after, 0.0)).sum(axis=1)
    return total


def _ends(levels: FloatArray, mean: FloatArray, std: FloatArray) -> FloatArray:
    """Return where, along the error, levels or the order of cuts change, [candidate, interval]."""
    one, other = np.triu_indices(mean.shape[1], 1)
    apart = std[:, other] - std[:, one]
    crossing = mean[:, one] * std[:, other] - mean[:, other] * std[:, one]
    crossing = np.where(apart == 0.0, levels[-1], crossing / np.where(apart == 0.0, 1.0, apart))
    everywhere = np.broadcast_to(levels, (len(mean), len(levels)))
    # What changes beyond the reference changes nothing.
    return np.sort(np.column_stack([everywhere, np.minimum(crossing, levels[-1])]), axis=1)
