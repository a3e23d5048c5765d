"""TDMA certificates: lower bounds on the least energy and on the shortest round."""

from __future__ import annotations

import numpy as np

from pwff_solvers.allocation.batch import Batch, FloatArray
from pwff_solvers.allocation.certificate import (
    Multipliers,
    Primal,
    box,
    columns,
    compute_minimum,
    computing_prices,
    variable_energy,
)

__all__ = ["energy_bound", "shortest_bound"]


def _psi(z: FloatArray) -> FloatArray:
    """Return ``1 + (z-1)e^z``; by its power series where the closed form cancels."""
    small = np.minimum(z, 0.25)
    series = np.zeros_like(z)
    term = small * small
    for n in range(12):
        series = series + term / (n + 2)
        term = term * small / (n + 1)
    return np.where(z < 0.25, series, z * np.exp(z) - np.expm1(z))


def energy_bound(
    batch: Batch, point: Primal, multipliers: Multipliers, price_of_time_w: FloatArray | None
) -> FloatArray:
    """Return a lower bound by one multiplier, the price of time, split over the computing."""
    a, g, band, delay = columns(batch)
    live = a > 0
    mu = (multipliers.time_w if price_of_time_w is None else price_of_time_w)[:, None]
    t = np.where(live, point.upload_s, 1.0)
    z = a / (band * t)
    energy = band * t * np.expm1(z) / g
    with np.errstate(divide="ignore", invalid="ignore"):
        shortest = np.where(live, a / (band * np.log1p(batch.power_max_w * g / band)), 0.0)
        longest = np.where(live, a / (band * np.log1p(batch.power_min_w * g / band)), 0.0)
        end = np.where(batch.work_cycles > 0, batch.work_cycles / point.frequency_hz, 0.0)
    deadline = end.max(1, keepdims=True)
    if price_of_time_w is None:
        most = point.round_s[:, None] - delay
    else:
        worth = variable_energy(batch, point) / price_of_time_w
        most = worth[:, None] + point.round_s[:, None] - delay
    gradient = mu - band * _psi(z) / g
    upload = (
        energy
        + mu * t
        + box(gradient, np.maximum(t - shortest, 0), np.maximum(np.minimum(longest, most) - t, 0))
    )
    share = computing_prices(batch, point.frequency_hz, deadline, np.ones_like(live), mu)
    total = share.sum(1, keepdims=True)
    share = share * np.minimum(mu / np.where(total > 0, total, 1.0), 1.0)
    bound: FloatArray = (np.where(live, upload, 0.0) + compute_minimum(batch, share)).sum(1)
    # price that no device takes up still pays for the earliest deadline there is
    earliest = (batch.work_cycles / batch.frequency_max_hz).max(1)
    bound = bound + np.maximum(mu[:, 0] - share.sum(1), 0.0) * earliest
    if price_of_time_w is None:
        result: FloatArray = bound - mu[:, 0] * (point.round_s - delay[:, 0])
        return result
    return bound + price_of_time_w * delay[:, 0]


def shortest_bound(batch: Batch) -> FloatArray:
    """Return the shortest round [s], fixed delay included, [instance]: the times simply add up."""
    a, g, band, delay = columns(batch)
    live = a > 0
    wide = batch.power_max_w * g
    fast = batch.work_cycles / batch.frequency_max_hz
    upload = np.where(live, a / (band * np.log1p(wide / band)), 0.0)
    total: FloatArray = upload.sum(1) + fast.max(1) + delay[:, 0]
    return total
