r"""TDMA (FEDL): uploads follow one another at full bandwidth once all devices have computed.

``T = max_k c_k/f_k + sum_k t_k``.  For a price of time ``mu`` the problem splits into two with
closed forms (Dinh et al., IEEE/ACM ToN 2021, arXiv 1910.13067):

* upload: ``psi(z_k) = mu G_k / B``, with z clipped to the power limits, ``t_k = a_k/(B z_k)``;
* computing: the common deadline ``Tc`` solves ``sum_{k: f_k > f_min} 2 kappa_k c_k^3/Tc^3 = mu``.

A round length is met by a bracketed Newton search on ``log mu``.  Arrays are [device, instance].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pwff_solvers.allocation.batch import Batch, FloatArray
from pwff_solvers.allocation.point import Point
from pwff_solvers.allocation.transforms import log_inverse_psi, psi

__all__ = ["TdmaCell", "least_energy", "shortest", "weighted"]

_LIMIT = 200
_EDGE = 1e-11


class TdmaCell:
    """Constants of a chunk of instances."""

    def __init__(self, batch: Batch, rows: slice) -> None:
        def turn(array: FloatArray) -> FloatArray:
            return np.ascontiguousarray(array[rows].T)

        noise = batch.noise_psd_w_per_hz[rows]
        self.band = batch.bandwidth_hz[rows].copy()
        s, self.c, self.kappa = (
            turn(batch.payload_bit), turn(batch.work_cycles), turn(batch.kappa)
        )  # fmt: skip
        self.f_min, self.f_max = turn(batch.frequency_min_hz), turn(batch.frequency_max_hz)
        self.live = s > 0
        self.seconds = s * np.log(2.0) / self.band  # upload time per unit of z
        self.g_over_b = turn(batch.gain) / noise / self.band
        self.z_max = np.log1p(turn(batch.power_max_w) * self.g_over_b)
        self.z_min = np.log1p(turn(batch.power_min_w) * self.g_over_b)
        self.earliest = (self.c / self.f_max).max(0)
        # floors in descending order: the devices above their floor at Tc are the first few
        with np.errstate(divide="ignore", invalid="ignore"):
            floor = np.where(self.c > 0, self.c / self.f_min, 0.0)
        order = np.argsort(-floor, axis=0)
        self.floor = np.take_along_axis(floor, order, 0)
        self.weight = np.cumsum(np.take_along_axis(2 * self.kappa * self.c**3, order, 0), axis=0)

    def efficiency(self, log_mu: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return z [nat/s/Hz] at a price of time, and -d log t / d log mu."""
        w = log_mu + np.log(self.g_over_b)
        x, slope = log_inverse_psi(w)
        z = np.exp(x)
        expm1 = np.expm1(z)
        p = psi(z, expm1)
        z *= 1.0 + np.where(w < 699.0, (w - np.log(p)) * p / (z * z * (expm1 + 1.0)), 0.0)
        inside = (z > self.z_min) & (z < self.z_max)
        return np.clip(z, self.z_min, self.z_max), np.where(inside, slope, 0.0)

    def upload(self, z: FloatArray) -> FloatArray:
        """Return upload times at ``z``."""
        return np.where(self.live, self.seconds / np.where(self.live, z, 1.0), 0.0)

    def deadline(self, mu: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the common deadline of computing and -d log Tc / d log mu.

        The supply of price, ``W(Tc)/Tc^3`` with W over devices above their floor, falls with Tc
        and jumps where a device meets its floor; the largest Tc at which it still reaches mu is
        ``max_j min(floor_j, (W_j/mu)^(1/3))``, floors in descending order.
        """
        free = np.cbrt(np.where(self.weight > 0, self.weight / mu, 0.0))
        best = np.minimum(self.floor, free)
        index = np.argmax(best, axis=0)[None, :]
        time = np.take_along_axis(best, index, 0)[0]
        moving = np.take_along_axis(free < self.floor, index, 0)[0] & (time > self.earliest)
        return np.maximum(time, self.earliest), np.where(moving, 1 / 3, 0.0)

    def demand(self, log_mu: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the time taken at a price and its derivative in ``log mu``."""
        z, fall = self.efficiency(log_mu)
        t = self.upload(z)
        deadline, bend = self.deadline(np.exp(log_mu))
        return t.sum(0) + deadline, -(t * fall).sum(0) - deadline * bend

    def point(self, z: FloatArray, deadline: FloatArray, time: FloatArray, mu: FloatArray) -> Point:
        """Return the solution with the given efficiencies and deadline."""
        t = self.upload(z)
        share = np.where(deadline > 0, deadline, 1.0)
        f = np.clip(np.where(self.c > 0, self.c / share, 0.0), self.f_min, self.f_max)
        # envelope theorem at fixed power: dE/dB = (p + mu) dt/dB, also at the power limits
        over_g = np.expm1(z) / self.g_over_b  # power
        value = np.where(z < 0.1, psi(z, np.expm1(z)) * np.exp(-z), z + np.expm1(-z))
        lam = (over_g + mu) * t * value / (self.band * np.where(z > 0, z, 1.0))
        lam = np.where(self.live, lam, 0.0)
        bad = np.isnan(time)
        band = np.where(self.live, self.band, 0.0)
        z = np.where(self.live, z, 0.0)
        nan = np.where(bad, np.nan, 0.0)
        return Point(
            b=band + nan,
            z=z + nan,
            t=t + nan,
            f=f + nan,
            time=time,
            price_of_bandwidth=lam.sum(0) + nan,
            price_of_time=mu + nan,
            shortest=np.full(time.size, np.nan),
            binding=np.full(time.size, -1, dtype=np.int64),
        )


def _shortest_time(cell: TdmaCell) -> FloatArray:
    time: FloatArray = cell.upload(cell.z_max).sum(0) + cell.earliest
    return time


def _highest_price(cell: TdmaCell) -> FloatArray:
    """Return the least price at which everything happens as fast as it can."""
    upload = psi(cell.z_max, np.expm1(cell.z_max)) / cell.g_over_b
    busy = (cell.f_min < cell.c / np.where(cell.earliest > 0, cell.earliest, np.inf)) & (cell.c > 0)
    f = np.where(busy, cell.c / np.where(cell.earliest > 0, cell.earliest, 1.0), 0.0)
    compute = (2.0 * cell.kappa * f**3).sum(0)
    high: FloatArray = np.maximum(np.where(cell.live, upload, 0.0).max(0), compute)
    return high


def shortest(cell: TdmaCell) -> Point:
    """Return everything as fast as it can; computing no faster than the slowest device allows."""
    mu = _highest_price(cell)
    return cell.point(cell.z_max, cell.earliest, _shortest_time(cell), mu)


def weighted(cell: TdmaCell, price: FloatArray) -> Point:
    """Return the solution of the two FEDL sub-problems at the price of time."""
    z, _ = cell.efficiency(np.log(price))
    deadline, _ = cell.deadline(price)
    return cell.point(z, deadline, cell.upload(z).sum(0) + deadline, price)


def least_energy(cell: TdmaCell, time: FloatArray, blur: FloatArray | float = 0.0) -> Point:
    """Search the price of time that meets the round, which is uncertain by ``blur``."""
    least = _shortest_time(cell)
    feasible = least <= time * (1.0 + _EDGE) + blur
    top = _highest_price(cell)
    hi = np.log(np.maximum(top, 1e-300)) + 1e-9
    lo = np.full(time.size, -np.inf)
    # without any price everything runs at its floor, which may meet the round already
    slowest = cell.upload(cell.z_min).sum(0) + np.maximum(cell.floor[0], cell.earliest)
    idle = slowest <= time
    level = hi - 1.0
    done: NDArray[np.bool_] = idle | ~feasible | (least >= time)
    level = np.where(least >= time, hi, level)
    for _ in range(_LIMIT):
        if done.all():
            break
        taken, change = cell.demand(level)
        value = np.log(taken / time)
        lo = np.where(value > 0, level, lo)
        hi = np.where(value > 0, hi, level)
        rate = np.minimum(change / taken, -1e-300)
        new = level - np.clip(value / rate, -12.0, 12.0)
        middle = np.where(np.isfinite(lo), 0.5 * (lo + hi), level - 6.0)
        new = np.where((new > lo) & (new < hi), new, middle)
        small = np.abs(new - level) <= 4e-16 * (4.0 + np.abs(level))
        done |= (np.abs(value) <= 1e-15) | small | (hi < -690.0)
        level = np.where(done, level, new)
    mu = np.where(idle, 0.0, np.exp(level))
    z, _ = cell.efficiency(level)
    z = np.where(idle, cell.z_min, np.where(least >= time, cell.z_max, z))
    deadline, _ = cell.deadline(np.where(mu > 0, mu, 1.0))
    deadline = np.where(idle, np.maximum(cell.floor[0], cell.earliest), deadline)
    deadline = np.where(least >= time, cell.earliest, deadline)
    # what rounding left goes to the computing part; but in a round so long that computing drowns in
    # the rounding of the uploads, the price knows its time better than the difference does
    spare = time - cell.upload(z).sum(0)
    exact = idle | (least >= time) | (np.abs(spare - deadline) <= 1e-13 * time)
    deadline = np.where(exact, deadline, np.maximum(spare, cell.earliest))
    point = cell.point(z, deadline, np.where(feasible, time, np.nan), mu)
    late = np.argmax(
        np.where(cell.live, cell.upload(cell.z_max), 0.0)
        + np.where(cell.c / cell.f_max >= cell.earliest, cell.earliest, 0.0),
        axis=0,
    )
    point.shortest[:] = np.where(feasible, np.nan, least)
    point.binding[:] = np.where(feasible, -1, late)
    return point
