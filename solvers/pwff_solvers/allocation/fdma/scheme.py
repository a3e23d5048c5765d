"""FDMA as an access scheme: devices upload at the same time, each in a band of its own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pwff_solvers.allocation import certificate
from pwff_solvers.allocation.batch import Batch, FloatArray
from pwff_solvers.allocation.fdma import bracketed as brackets
from pwff_solvers.allocation.fdma import certificate as bounds
from pwff_solvers.allocation.fdma import newton as kernels
from pwff_solvers.allocation.fdma import shortest as fastest
from pwff_solvers.allocation.objectives import LeastEnergy, Shortest, Weighted
from pwff_solvers.allocation.point import Point
from pwff_solvers.allocation.scheme import Found, Scheme
from pwff_solvers.allocation.slots import (
    CELL_DELAY,
    DEVICE_POWER_MIN,
    POINTS,
    SCALAR_CONVERGED,
    SCALAR_LAM,
    SCALAR_MU,
    SCALAR_SLOPE,
    SCALAR_TIME,
    SCALARS,
)
from pwff_solvers.errors import InvalidInputError

__all__ = ["Fdma"]

_KINDS = {Shortest: 0, LeastEnergy: 1, Weighted: 2}


class Fdma(Scheme):
    """Own bands at the same time."""

    name = "fdma"

    def require(self, batch: Batch) -> None:
        """Refuse least powers: they are not a convex limit here."""
        if not batch.device[:, DEVICE_POWER_MIN].any():
            return
        i, k = (int(v) for v in np.argwhere(batch.power_min_w > 0)[0])
        raise InvalidInputError(
            f"power_min_w[{i}, {k}] must be 0 with access 'fdma', got {batch.power_min_w[i, k]}: "
            "a least power is not a convex limit there; use access 'tdma' or drop it"
        )

    def newton(
        self, batch: Batch, objective: type, target: FloatArray, decision: FloatArray
    ) -> Found:
        """Return solutions by Newton; what has not converged comes with an infinite gap."""
        device, cell = batch.device, batch.cell
        instances = device.shape[0]
        scalars = np.zeros((instances, SCALARS))
        kind = _KINDS[objective]
        if objective is LeastEnergy:
            kernels.least_energy(device, cell, target, decision, scalars)
        elif objective is Weighted:
            kernels.weighted(device, cell, target, decision, scalars)
        else:
            fastest.shortest(device, cell, decision, scalars)
        rest = np.flatnonzero(scalars[:, SCALAR_CONVERGED] == 0)
        if rest.size:
            if objective is Weighted:
                _hard_prices(batch.take(rest), target[rest], rest, decision, scalars)
            elif objective is Shortest:
                _idle_last(batch.take(rest), rest, decision, scalars)
        time, lam, mu = scalars[:, SCALAR_TIME], scalars[:, SCALAR_LAM], scalars[:, SCALAR_MU]
        gap, violation, energy, perfect = bounds.judge(
            device, cell, decision, time, lam, target, kind
        )
        missing = np.full(instances, np.nan)
        found = Found(
            decision=decision,
            energy=energy,
            time=time,
            lam=lam,
            mu=mu,
            shortest=missing,
            binding=missing.copy(),
            gap=gap,
            violation=violation,
            perfect=perfect and not rest.size,
        )
        if not found.perfect:
            converged = scalars[:, SCALAR_CONVERGED] > 0
            # prices of devices that only compute: what the quick judge does not know
            rest = np.flatnonzero(~found.good() & converged)
            gap[~converged] = violation[~converged] = np.inf
            gap[rest], violation[rest] = self.certified(
                batch.take(rest),
                objective,
                target[rest],
                decision[rest],
                time[rest],
                lam[rest],
                mu[rest],
            )
        return found

    def bracketed(
        self, batch: Batch, objective: type, target: FloatArray, blur: FloatArray
    ) -> Point:
        """Return solutions by bracketed searches for the price of bandwidth."""
        cell = brackets.Cell(batch, slice(None))
        if objective is LeastEnergy:
            return brackets.least_energy(cell, target - batch.fixed_delay_s, blur)
        return brackets.weighted(cell, target) if objective is Weighted else brackets.shortest(cell)

    def energy_and_bound(
        self,
        batch: Batch,
        point: certificate.Primal,
        multipliers: certificate.Multipliers,
        price_of_time_w: FloatArray | None,
    ) -> tuple[FloatArray, FloatArray]:
        """Return the variable energy [J] and its bound, [instance] each."""
        return bounds.energy_and_bound(batch, point, multipliers, price_of_time_w)

    def shortest_bound(self, batch: Batch, point: certificate.Primal) -> FloatArray:
        """Return a lower bound [s] on the shortest round, fixed delay included, [instance]."""
        return bounds.shortest_bound(batch, point)

    def violation(self, batch: Batch, point: certificate.Primal) -> FloatArray:
        """Return the largest relative violation of any constraint, [instance]; 0 when none."""
        return certificate.violation(batch, point, in_turn=False)


def _idle_last(
    batch: Batch, rows: NDArray[np.int64], decision: FloatArray, scalars: FloatArray
) -> None:
    """Overwrite ``rows``: a device without payload ends last, the others have time to spare."""
    fast = np.where(batch.payload_bit > 0, 0.0, batch.work_cycles / batch.frequency_max_hz)
    points = np.empty((rows.size, POINTS, batch.devices))
    found = np.zeros((rows.size, SCALARS))
    kernels.least_energy(
        batch.device, batch.cell, fast.max(1) + batch.cell[:, CELL_DELAY], points, found
    )
    found[:, SCALAR_TIME] = fast.max(1)
    decision[rows], scalars[rows] = points, found


def _hard_prices(
    batch: Batch,
    price: FloatArray,
    rows: NDArray[np.int64],
    decision: FloatArray,
    scalars: FloatArray,
) -> None:
    """Overwrite ``rows``: the shortest round where time is that dear, else by a bracketed search.

    Any price of bandwidth above the least one supports that round too, and at a fixed point
    ``dmu_k/dlog lam = mu_k + P_k``: so the wanted price of time is met exactly.
    """
    points = np.empty((rows.size, POINTS, batch.devices))
    edge = np.zeros((rows.size, SCALARS))
    fastest.shortest(batch.device, batch.cell, points, edge)
    stop = (edge[:, SCALAR_CONVERGED] > 0) & (edge[:, SCALAR_MU] <= price)
    edge[:, SCALAR_LAM] *= 1.0 + (price - edge[:, SCALAR_MU]) / edge[:, SCALAR_SLOPE]
    edge[:, SCALAR_MU] = price
    go = np.flatnonzero((edge[:, SCALAR_CONVERGED] > 0) & ~stop)
    if go.size:
        part = batch.take(go)
        inner = np.empty((go.size, POINTS, batch.devices))
        scalar = np.zeros((go.size, SCALARS))
        kernels.weighted_carefully(
            part.device, part.cell, price[go], edge[go, SCALAR_TIME], inner, scalar
        )
        points[go], edge[go] = inner, scalar
    decision[rows] = points
    scalars[rows] = edge
    scalars[rows, SCALAR_CONVERGED] = stop
    scalars[rows[go], SCALAR_CONVERGED] = edge[go, SCALAR_CONVERGED]
