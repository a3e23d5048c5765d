r"""Certificates: what a point is worth, from the point and its multipliers alone.

Nothing here is shared with the iteration that found the point.

Least energy, FDMA.  Relax ``sum b <= B`` with ``lam >= 0``, the power limit
``q_k = a/t - b log(1 + PG/b) <= 0`` with ``nu_k >= 0`` and the round with ``mu_k >= 0``.  The
Lagrangian splits by device into a convex function of (b, t) and a function of f.  For *any*
multipliers its minimum is a lower bound on the optimum (weak duality).  The convex part is bounded
from below by its tangent at the point returned, minimised over the box ``0 <= b <= B``:

.. math:: D = \sum_k \Big[F_k + \nu_k q_k + \lambda b_k + \mu_k t_k
   + \min_{0\le\beta\le B} g_k(\beta - b_k)
   + \min_{f}\big(\kappa_k c_k f^2 + \mu_k c_k/f\big)\Big] - \lambda B - T\sum_k\mu_k

with ``g_k = F_b + lam + nu q_b``; ``nu_k = max(0, F_b + lam)/|q_b|`` and
``mu_k = -(F_t + nu q_t)`` make the tangent flat wherever the point is optimal, and the box keeps
the bound valid wherever it is not.  ``Weighted`` adds ``w T`` and minimises over T too.

Shortest round, FDMA.  With ``mu_k >= 0`` summing to 1 the same argument bounds T from below.

Every formula works on arrays [instance, device].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pwff_solvers.allocation.batch import Batch, FloatArray

__all__ = ["Multipliers", "Primal", "energy_bound", "shortest_bound", "violation"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Primal:
    """A point: decisions [instance, device] and the round [instance], fixed delay included."""

    bandwidth_hz: FloatArray
    power_w: FloatArray
    frequency_hz: FloatArray
    upload_s: FloatArray
    round_s: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Multipliers:
    """Prices [instance]; with TDMA only the price of time is used."""

    bandwidth_j_per_hz: FloatArray
    time_w: FloatArray


def _psi(z: FloatArray) -> FloatArray:
    """Return ``1 + (z-1)e^z``; by its power series where the closed form cancels."""
    small = np.minimum(z, 0.25)
    series = np.zeros_like(z)
    term = small * small
    for n in range(12):
        series = series + term / (n + 2)
        term = term * small / (n + 1)
    return np.where(z < 0.25, series, z * np.exp(z) - np.expm1(z))


def _capacity_slope(x: FloatArray) -> FloatArray:
    """Return ``log(1+x) - x/(1+x)``, the slope in b of ``b log(1 + PG/b)`` at ``x = PG/b``."""
    small = np.minimum(x, 0.02)
    series = np.zeros_like(x)
    term = small * small
    for n in range(2, 12):
        series = series + term * ((n - 1) / n)
        term = -term * small
    return np.where(x < 0.02, series, np.log1p(x) - x / (1.0 + x))


def _columns(batch: Batch) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Payload [nat], G [Hz/W], bandwidth and fixed delay as columns."""
    nats = batch.payload_bit * np.log(2.0)
    g = batch.gain / batch.noise_psd_w_per_hz[:, None]
    return nats, g, batch.bandwidth_hz[:, None], batch.fixed_delay_s[:, None]


def _compute_minimum(batch: Batch, mu: FloatArray) -> FloatArray:
    """Return ``min over f of kappa c f^2 + mu c / f``."""
    with np.errstate(divide="ignore", invalid="ignore"):
        f = np.cbrt(np.where(mu > 0, mu / (2.0 * batch.kappa), 0.0))
        f = np.clip(f, batch.frequency_min_hz, batch.frequency_max_hz)
        wait = np.where(mu > 0, mu * batch.work_cycles / f, 0.0)
    least: FloatArray = batch.kappa * batch.work_cycles * f**2 + wait
    return least


def _box(gradient: FloatArray, below: FloatArray, above: FloatArray) -> FloatArray:
    """Return the least value of ``gradient * step`` for ``-below <= step <= above``."""
    return np.minimum(-gradient * below, 0.0) + np.minimum(gradient * above, 0.0)


def _computing_prices(
    batch: Batch,
    point: Primal,
    deadline: FloatArray,
    part: NDArray[np.bool_],
    total: FloatArray,
) -> FloatArray:
    """Prices of time of devices that only compute, as near to ``total`` as optimality lets them.

    A device that finishes at the deadline above its least frequency has price ``2 kappa f^3``; at
    the least frequency anything up to that; at the largest anything from that.  The tolerances
    forgive rounding; they cannot spoil the bound, which holds for any prices.
    """
    f = point.frequency_hz
    with np.errstate(divide="ignore", invalid="ignore"):
        end = np.where(batch.work_cycles > 0, batch.work_cycles / f, 0.0)
    tight = part & (batch.work_cycles > 0) & (end >= deadline * (1.0 - 1e-9))
    slope = np.where(tight, 2.0 * batch.kappa * f**3, 0.0)
    price = np.where(f > batch.frequency_min_hz * (1.0 + 1e-9), slope, 0.0)
    missing = np.maximum(total - price.sum(1, keepdims=True), 0.0)
    room = slope - price
    share = np.minimum(missing / np.maximum(room.sum(1, keepdims=True), 1e-300), 1.0)
    price = price + room * share
    missing = np.maximum(total - price.sum(1, keepdims=True), 0.0)
    open_end = tight & (f >= batch.frequency_max_hz * (1.0 - 1e-12))
    number = np.maximum(open_end.sum(1, keepdims=True), 1)
    result: FloatArray = price + np.where(open_end, missing / number, 0.0)
    return result


def variable_energy(batch: Batch, point: Primal) -> FloatArray:
    """Return the energy [J] without its fixed part, [instance]."""
    compute = batch.kappa * batch.work_cycles * point.frequency_hz**2
    total: FloatArray = (point.power_w * point.upload_s + compute).sum(axis=1)
    return total


def energy_bound(
    batch: Batch,
    point: Primal,
    multipliers: Multipliers,
    price_of_time_w: FloatArray | None,
    access: str,
) -> FloatArray:
    """Return a lower bound [J] on the least variable energy, or on energy + price x round.

    Parameters
    ----------
    price_of_time_w : array [instance] or None
        The objective's own price of time; None for least energy within ``point.round_s``.
    """
    if access == "tdma":
        return _tdma_energy_bound(batch, point, multipliers, price_of_time_w)
    a, g, band, delay = _columns(batch)
    live = a > 0
    lam = multipliers.bandwidth_j_per_hz[:, None]
    time = point.round_s[:, None] - delay
    b = np.where(live, point.bandwidth_hz, 1.0)
    t = np.where(live, point.upload_s, 1.0)
    z = a / (b * t)
    wide = batch.power_max_w * g
    value = _psi(z) / g
    slope = _capacity_slope(wide / b)
    energy = b * t * np.expm1(z) / g
    nu = np.maximum(lam - t * value, 0.0) / slope
    over = a / t - b * np.log1p(wide / b)
    mu = b * value + nu * a / t**2
    gradient = lam - t * value - nu * slope
    part = energy + nu * over + lam * b + mu * t + _box(gradient, b, band - b)
    part = np.where(live, part, 0.0)
    mu = np.where(live, mu, 0.0)
    wanted = np.zeros_like(lam) if price_of_time_w is None else price_of_time_w[:, None]
    mu = mu + _computing_prices(batch, point, time, ~live, wanted - mu.sum(1, keepdims=True))
    part = part + _compute_minimum(batch, mu)
    total_mu = mu.sum(1)
    bound: FloatArray = part.sum(1) - lam[:, 0] * band[:, 0]
    if price_of_time_w is None:
        result: FloatArray = bound - total_mu * time[:, 0]
        return result
    # T is free: what mu leaves of w is charged at the least or at the largest T worth a thought
    ends = batch.work_cycles / batch.frequency_max_hz + a / wide
    return bound + _free_time(batch, point, price_of_time_w, total_mu, ends.max(1))


def _free_time(
    batch: Batch, point: Primal, price: FloatArray, total_mu: FloatArray, least: FloatArray
) -> FloatArray:
    """Return ``min over T of (w - sum mu) T + w delay`` on the range that can hold the optimum."""
    delay = batch.fixed_delay_s
    most = (variable_energy(batch, point) + price * (point.round_s - delay)) / price
    left = price - total_mu
    result: FloatArray = left * np.where(left >= 0, least, most) + price * delay
    return result


def _tdma_energy_bound(
    batch: Batch, point: Primal, multipliers: Multipliers, price_of_time_w: FloatArray | None
) -> FloatArray:
    """Lower bound with TDMA: one multiplier, the price of time, split over the computing."""
    a, g, band, delay = _columns(batch)
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
        + _box(gradient, np.maximum(t - shortest, 0), np.maximum(np.minimum(longest, most) - t, 0))
    )
    share = _computing_prices(batch, point, deadline, np.ones_like(live), mu)
    total = share.sum(1, keepdims=True)
    share = share * np.minimum(mu / np.where(total > 0, total, 1.0), 1.0)
    bound: FloatArray = (np.where(live, upload, 0.0) + _compute_minimum(batch, share)).sum(1)
    # price that no device takes up still pays for the earliest deadline there is
    earliest = (batch.work_cycles / batch.frequency_max_hz).max(1)
    bound = bound + np.maximum(mu[:, 0] - share.sum(1), 0.0) * earliest
    if price_of_time_w is None:
        result: FloatArray = bound - mu[:, 0] * (point.round_s - delay[:, 0])
        return result
    return bound + price_of_time_w * delay[:, 0]


def shortest_bound(batch: Batch, point: Primal, access: str) -> FloatArray:
    r"""Return a lower bound [s] on the shortest round, fixed delay included, [instance].

    FDMA: minimise T subject to ``a/t - b log(1+PG/b) <= 0`` (nu), ``t + c/f <= T`` (mu) and
    ``sum b <= B`` (eta).  Stationarity gives ``eta = nu slope_k`` and ``mu = nu a/t^2``; the
    common eta is whatever makes ``sum mu = 1``.  TDMA: the times simply add up.
    """
    a, g, band, delay = _columns(batch)
    live = a > 0
    wide = batch.power_max_w * g
    fast = batch.work_cycles / batch.frequency_max_hz
    if access == "tdma":
        upload = np.where(live, a / (band * np.log1p(wide / band)), 0.0)
        total: FloatArray = upload.sum(1) + fast.max(1) + delay[:, 0]
        return total
    # no device can beat what it would do with the whole band to itself
    alone: FloatArray = (fast + a / (band * np.log1p(wide / band))).max(1) + delay[:, 0]
    b = np.where(live, point.bandwidth_hz, 1.0)
    t = np.where(live, point.upload_s, 1.0)
    slope = _capacity_slope(wide / b)
    ratio = np.where(live, a / (slope * t**2), 0.0)
    total_ratio = ratio.sum(1, keepdims=True)
    eta = 1.0 / np.where(total_ratio > 0, total_ratio, 1.0)
    nu, mu = eta / slope, eta * ratio
    part = mu * (t + fast) + nu * (a / t - b * np.log1p(wide / b)) + eta * b
    bound: FloatArray = np.where(live, part, 0.0).sum(1) - eta[:, 0] * band[:, 0] + delay[:, 0]
    bound = np.where(total_ratio[:, 0] > 0, bound, -np.inf)
    result: FloatArray = np.fmax(bound, alone)
    return result


def violation(batch: Batch, point: Primal, access: str) -> FloatArray:
    """Return the largest relative violation of any constraint, [instance]; 0 when none."""
    a, g, band, delay = _columns(batch)
    live = a > 0
    b, t = np.where(live, point.bandwidth_hz, 1.0), np.where(live, point.upload_s, 1.0)
    p, f = point.power_w, point.frequency_hz
    time = point.round_s - delay[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        wait = np.where(batch.work_cycles > 0, batch.work_cycles / f, 0.0)
        sent = t * b * np.log1p(p * g / b)
        parts = [
            np.where(live, a / sent - 1.0, 0.0),
            p / batch.power_max_w - 1.0,
            np.where(live & (batch.power_min_w > 0), 1.0 - p / batch.power_min_w, 0.0),
            f / batch.frequency_max_hz - 1.0,
            np.where(batch.frequency_min_hz > 0, 1.0 - f / batch.frequency_min_hz, 0.0),
            np.where((b > 0) & (point.upload_s >= 0) & (p >= 0) & (f >= 0), 0.0, np.inf),
        ]
        if access == "tdma":
            used = wait.max(1) + point.upload_s.sum(1)
            band_use = (point.bandwidth_hz / band).max(1) - 1.0
        else:
            used = (wait + point.upload_s).max(1)
            band_use = (point.bandwidth_hz / band).sum(1) - 1.0
        late = np.where(used > 0, used / time - 1.0, 0.0)
    worst = np.maximum.reduce([x.max(1) for x in parts] + [band_use, late])
    result: FloatArray = np.maximum(worst, 0.0)
    return result
