r"""FDMA certificates: lower bounds on the least energy and on the shortest round.

Least energy.  Relax ``sum b <= B`` with ``lam >= 0``, the power limit
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

Shortest round.  With ``mu_k >= 0`` summing to 1 the same argument bounds T from below.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pwff_solvers.allocation.batch import Batch, FloatArray
from pwff_solvers.allocation.certificate import (
    GAP_TOLERANCE,
    VIOLATION_TOLERANCE,
    Multipliers,
    Primal,
    computing_prices,
    split,
    violation_of,
)
from pwff_solvers.allocation.slots import (
    CELL_BAND,
    CELL_DELAY,
    CELL_NOISE,
    DEVICE_F_MAX,
    DEVICE_F_MIN,
    DEVICE_GAIN,
    DEVICE_KAPPA,
    DEVICE_PAYLOAD,
    DEVICE_POWER_MAX,
    DEVICE_WORK,
    POINT_BAND,
    POINT_ENERGY,
    POINT_FREQUENCY,
    POINT_POWER,
    POINT_UPLOAD,
    PRIMAL,
)
from pwff_solvers.compiled.elementary import (
    cbrt,
    entry,
    exp_pair,
    kernel,
    log1p,
    select,
)
from pwff_solvers.compiled.switch import COMPILED

__all__ = ["energy_and_bound", "judge", "shortest_bound"]

_LN2 = math.log(2.0)
_ROUNDING = 8.0 * float(np.finfo(np.float64).eps)


@kernel
def _psi1(z: Any, e: Any, expm1: Any) -> Any:
    """Return ``1 + (z-1)e^z``; by its power series where the closed form cancels."""
    small = select(z < 0.25, z, 0.25)
    series: Any = _P[12]
    for n in range(11, -1, -1):
        series = series * small + _P[n]
    return select(z < 0.25, series * small * small, z * e - expm1)


@kernel
def _capacity_slope1(x: Any, logarithm: Any) -> Any:
    """Return ``log(1+x) - x/(1+x)``, the slope in b of ``b log(1 + PG/b)`` at ``x = PG/b``."""
    small = select(x < 0.02, x, 0.02)
    series: Any = _Q[9]
    for n in range(8, -1, -1):
        series = series * small + _Q[n]
    return select(x < 0.02, series * small * small, logarithm - x / (1.0 + x))


# psi(z)/z^2 and (log(1+x) - x/(1+x))/x^2 as power series
_P = tuple(1.0 / (math.factorial(n) * (n + 2)) for n in range(13))
_Q = tuple((-1.0) ** n * (n + 1) / (n + 2) for n in range(10))


@kernel
def _least_compute1(work: Any, kappa: Any, f_min: Any, f_max: Any, mu: Any) -> Any:
    """Return ``min over f of kappa c f^2 + mu c / f``."""
    # no price asks for the least frequency, however small kappa is
    cube = mu / select(kappa > 1e-290, 2.0 * kappa, 2e-290)
    f = cbrt(select(cube < 1e300, cube, 1e300))
    f = select(f > f_min, f, f_min)
    f = select(f < f_max, f, f_max)
    wait = select(mu > 0.0, mu * work / select(f > 0.0, f, 1.0), 0.0)
    return kappa * work * f * f + wait


@kernel
def _box1(gradient: Any, below: Any, above: Any) -> Any:
    """Return the least value of ``gradient * step`` for ``-below <= step <= above``."""
    down = -gradient * below
    up = gradient * above
    return select(down < 0.0, down, 0.0) + select(up < 0.0, up, 0.0)


@kernel
def _energy_terms(
    payload: Any, work: Any, gain: Any, power_max: Any, f_min: Any, f_max: Any, kappa: Any,
    b: Any, p: Any, f: Any, t: Any, band: Any, noise: Any, lam: Any, idle_mu: Any,
) -> Any:  # fmt: skip
    """Return a device's part of the dual bound, its price of time, its energy, and the least of each.

    The last are the energy at leisure, the time at full power in unlimited bandwidth, and the size
    of what was added up, for the rounding.
    """
    live = payload > 0.0
    a = select(live, payload * _LN2, 1.0)
    b = select(live, b, 1.0)
    t1 = select(live, t, 1.0)
    g = gain / noise
    z = a / (b * t1)
    e, expm1 = exp_pair(z)
    value = _psi1(z, e, expm1) / g
    x = power_max * g / b
    logarithm = log1p(x)
    slope = _capacity_slope1(x, logarithm)
    missing = lam - t1 * value
    nu = select(missing > 0.0, missing, 0.0) / slope
    over = a / t1 - b * logarithm
    mu = b * value + nu * a / (t1 * t1)
    gradient = missing - nu * slope
    send = b * t1 * expm1 / g
    part = send + nu * over + lam * b + mu * t1 + _box1(gradient, b, band - b)
    size = select(live, send + 2.0 * nu * a / t1 + lam * b + mu * t1, 0.0)
    mu = select(live, mu, idle_mu)
    compute = _least_compute1(work, kappa, f_min, f_max, mu)
    part = select(live, part, 0.0) + compute
    size = size + compute
    least = select(live, a / g, 0.0) + kappa * work * f_min * f_min  # at leisure
    first = select(live, a / (power_max * g), 0.0) + work / f_max
    return part, mu, p * t + kappa * work * f * f, least, first, size


@kernel
def _shortest_terms(
    payload: Any, work: Any, gain: Any, power_max: Any, f_max: Any, b: Any, t: Any,
    band: Any, noise: Any,
) -> Any:  # fmt: skip
    """Return a device's share in the price of time, its part of the bound, and its time alone."""
    live = payload > 0.0
    a = select(live, payload * _LN2, 1.0)
    b = select(live, b, 1.0)
    t = select(live, t, 1.0)
    wide = power_max * gain / noise
    fast = work / f_max
    logarithm = log1p(wide / b)
    slope = _capacity_slope1(wide / b, logarithm)
    ratio = a / (slope * t * t)
    part = ratio * (t + fast) + (a / t - b * logarithm) / slope + b
    alone = fast + select(live, a / (band * log1p(wide / band)), 0.0)
    return select(live, ratio, 0.0), select(live, part, 0.0), alone


# --- what the sums over devices amount to ----------------------------------------------------------


@kernel
def _energy_bound_of(
    part: Any, mu: Any, energy: Any, least: Any, first: Any, size: Any, lam: Any, band: Any, time: Any,
    price: Any,
) -> Any:  # fmt: skip
    """Return the bound on the energy, or on energy + price x T where there is a price.

    Then T is free: what mu leaves of the price is charged at the least T there is, or at the largest
    worth a thought, which saves no more energy than there is to save.  What rounding can have done to
    the sums is taken off: near the shortest round they are far larger than what they leave.
    """
    bound = part - lam * band - _ROUNDING * (size + lam * band + mu * time)
    left = price - mu
    saving = select(energy > least, energy - least, 0.0)
    most = time + saving / select(price > 0.0, price, 1.0)
    free = bound + left * select(left >= 0.0, first, most)
    return select(price > 0.0, free, bound - mu * time)


@kernel
def _shortest_bound_of(ratio: Any, part: Any, alone: Any, band: Any) -> Any:
    """Return the bound on the shortest time; no device can beat what it does with the whole band."""
    bound = select(ratio > 0.0, (part - band) / select(ratio > 0.0, ratio, 1.0), alone)
    return select(bound > alone, bound, alone)


@kernel
def _gap_of(value: Any, bound: Any) -> Any:
    """Return the relative gap; 0 where both vanish."""
    return (value - bound) / select(value != 0.0, abs(value), 1.0)


# --- one call for a batch: loops where numba compiles them, whole arrays elsewhere ----------------


@kernel
def _energy_of(
    d: Any, q: Any, cell: Any, lam: Any, idle: Any, time: Any, price: Any, s: Any
) -> Any:
    """Return bound, price of time and energy of one instance; ``s`` is room for the terms."""
    one, two, three, four, five, six = s[0], s[1], s[2], s[3], s[4], s[5]
    s_, c_, h_, p_, l_, u_, k_ = (
        d[DEVICE_PAYLOAD],
        d[DEVICE_WORK],
        d[DEVICE_GAIN],
        d[DEVICE_POWER_MAX],
        d[DEVICE_F_MIN],
        d[DEVICE_F_MAX],
        d[DEVICE_KAPPA],
    )
    b_, w_, f_, t_ = q[POINT_BAND], q[POINT_POWER], q[POINT_FREQUENCY], q[POINT_UPLOAD]
    band, noise = cell[CELL_BAND], cell[CELL_NOISE]
    for k in range(one.size):
        one[k], two[k], three[k], four[k], five[k], six[k] = _energy_terms(
            s_[k], c_[k], h_[k], p_[k], l_[k], u_[k], k_[k], b_[k], w_[k], f_[k], t_[k],
            band, noise, lam, idle[k],
        )  # fmt: skip
    mu, energy = two.sum(), three.sum()
    bound = _energy_bound_of(
        one.sum(), mu, energy, four.sum(), five.max(), six.sum(), lam, band, time, price
    )
    return bound, mu, energy


@kernel
def _shortest_of(d: Any, q: Any, cell: Any, s: Any) -> Any:
    """Return the bound on the shortest time of one instance."""
    one, two, three = s[0], s[1], s[2]
    s_, c_, h_, p_, u_ = (
        d[DEVICE_PAYLOAD],
        d[DEVICE_WORK],
        d[DEVICE_GAIN],
        d[DEVICE_POWER_MAX],
        d[DEVICE_F_MAX],
    )
    b_, t_ = q[POINT_BAND], q[POINT_UPLOAD]
    band, noise = cell[CELL_BAND], cell[CELL_NOISE]
    for k in range(one.size):
        one[k], two[k], three[k] = _shortest_terms(
            s_[k], c_[k], h_[k], p_[k], u_[k], b_[k], t_[k], band, noise
        )
    return _shortest_bound_of(one.sum(), two.sum(), three.max(), band)


@entry
def _energies(
    device: Any, cell: Any, point: Any, lam: Any, idle_mu: Any, time: Any, price: Any
) -> Any:
    """Return the bounds, prices of time and energies of a batch, [instance] each."""
    instances, _, devices = device.shape
    bound, mu, energy = np.empty(instances), np.empty(instances), np.empty(instances)
    room = np.empty((6, devices))
    idle = np.zeros(devices)
    for i in range(instances):
        if idle_mu.shape[0] > 0:
            idle = idle_mu[i]
        bound[i], mu[i], energy[i] = _energy_of(
            device[i], point[i], cell[i], lam[i], idle, time[i], price[i], room
        )
    return bound, mu, energy


@entry
def _shortests(device: Any, cell: Any, point: Any) -> Any:
    """Return the bounds on the shortest times of a batch, [instance]."""
    bound = np.empty(device.shape[0])
    room = np.empty((3, device.shape[2]))
    for i in range(bound.size):
        bound[i] = _shortest_of(device[i], point[i], cell[i], room)
    return bound


@entry
def judge(device: Any, cell: Any, point: Any, time: Any, lam: Any, target: Any, kind: int) -> Any:
    """Return gap, violation and energy of FDMA points in one go, [instance] each.

    ``kind`` is 0 for the shortest round, 1 for least energy, 2 for a price of time (``target``).
    Devices that only compute count as if their time had no price, which can but lower the bound.
    """
    instances, _, devices = device.shape
    gap, worst, total = np.empty(instances), np.empty(instances), np.empty(instances)
    room = np.empty((6, devices))
    idle = np.zeros(devices)
    for i in range(instances):
        d, q, c = device[i], point[i], cell[i]
        worst[i] = violation_of(d, q, c, time[i], False, room)
        total[i] = q[POINT_ENERGY].sum()
        if kind == 0:
            value = time[i] + c[CELL_DELAY]
            gap[i] = _gap_of(value, _shortest_of(d, q, c, room) + c[CELL_DELAY])
        else:
            price = target[i] if kind == 2 else 0.0
            bound, _, energy = _energy_of(d, q, c, lam[i], idle, time[i], price, room)
            value = energy + price * (time[i] + c[CELL_DELAY])
            gap[i] = _gap_of(value, bound + price * c[CELL_DELAY])
    perfect = True
    for i in range(instances):
        perfect = perfect and abs(gap[i]) <= GAP_TOLERANCE and worst[i] <= VIOLATION_TOLERANCE
        perfect = perfect and lam[i] < np.inf and total[i] < np.inf
    return gap, worst, total, perfect


if not COMPILED:
    # compiled code does not warn
    @np.errstate(all="ignore")
    def _energies(
        device: Any, cell: Any, point: Any, lam: Any, idle_mu: Any, time: Any, price: Any
    ) -> Any:
        band, noise = cell[:, CELL_BAND, None], cell[:, CELL_NOISE, None]
        idle = idle_mu if idle_mu.shape[0] else 0.0
        order = (
            DEVICE_PAYLOAD,
            DEVICE_WORK,
            DEVICE_GAIN,
            DEVICE_POWER_MAX,
            DEVICE_F_MIN,
            DEVICE_F_MAX,
            DEVICE_KAPPA,
        )
        part, mu, energy, least, first, size = _energy_terms(
            *[*split(device, order), *split(point, PRIMAL), band, noise, lam[:, None], idle]
        )
        mu, energy = mu.sum(1), energy.sum(1)
        bound = _energy_bound_of(
            *[part.sum(1), mu, energy, least.sum(1), first.max(1), size.sum(1)],
            *[lam, cell[:, CELL_BAND], time, price],
        )
        return bound, mu, energy

    @np.errstate(all="ignore")
    def _shortests(device: Any, cell: Any, point: Any) -> Any:
        order = (DEVICE_PAYLOAD, DEVICE_WORK, DEVICE_GAIN, DEVICE_POWER_MAX, DEVICE_F_MAX)
        band, noise = cell[:, CELL_BAND, None], cell[:, CELL_NOISE, None]
        ratio, part, alone = _shortest_terms(
            *[*split(device, order), *split(point, (POINT_BAND, POINT_UPLOAD)), band, noise]
        )
        return _shortest_bound_of(ratio.sum(1), part.sum(1), alone.max(1), cell[:, CELL_BAND])


def energy_and_bound(
    batch: Batch, point: Primal, multipliers: Multipliers, price: FloatArray | None
) -> tuple[FloatArray, FloatArray]:
    """Return the variable energy [J] and the bound of ``Scheme.energy_bound``, [instance] each."""
    lam = multipliers.bandwidth_j_per_hz
    if price is None:
        bound, _, energy = _dual(batch, point, lam, np.zeros_like(lam))
        return energy, bound
    bound, mu, energy = _dual(batch, point, lam, price)
    value = energy + price * point.round_s
    loose = np.flatnonzero(~(value - bound <= GAP_TOLERANCE * value))
    if loose.size:
        part = batch.take(loose)
        there = Primal.packed(point.decision[loose], point.round_s[loose])
        better = _sharper_bound(part, there, lam[loose], mu[loose], price[loose])
        bound[loose] = np.fmax(bound[loose], better)
    return energy, bound


@np.errstate(all="ignore")
def _sharper_bound(
    batch: Batch, point: Primal, lam: FloatArray, mu: FloatArray, price: FloatArray
) -> FloatArray:
    """Return another bound on energy + price x round, [instance], where ``lam`` gives a loose one.

    Near the shortest round, and at a device about to reach full power, the last digit of the point
    decides what prices of time ``mu`` the devices have; what is missing to ``price`` is lost to the
    bound.  So take the ``lam`` at which they add up to it: at full power ``mu`` is linear in it.
    The least energy and the shortest time, each on its own, make a bound that needs no ``lam``.
    """
    _, more, _ = _dual(batch, point, 2.0 * lam, price)
    met = np.maximum(lam * (1.0 + (price - mu) / (more - mu)), 0.0)
    bound, _, _ = _dual(batch, point, met, price)
    sent = batch.payload_bit * _LN2 * batch.noise_psd_w_per_hz[:, None] / batch.gain
    leisure = (sent + batch.kappa * batch.work_cycles * batch.frequency_min_hz**2).sum(1)
    apart = leisure + price * shortest_bound(batch, point)
    better: FloatArray = np.fmax(bound, apart)
    return better


def _dual(
    batch: Batch, point: Primal, lam: FloatArray, price: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return bound, price of time and variable energy at the price ``lam``; ``price`` 0: of least energy."""
    time = point.round_s - batch.cell[:, CELL_DELAY]

    def sums(idle_mu: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        result: tuple[FloatArray, FloatArray, FloatArray] = _energies(
            batch.device, batch.cell, point.decision, lam, idle_mu, time, price
        )
        return result

    bound, mu, energy = sums(_NONE)
    idle = (batch.payload_bit == 0) & (batch.work_cycles > 0)
    if idle.any():
        left = (price - mu)[:, None]
        bound, mu, energy = sums(
            computing_prices(batch, point.frequency_hz, time[:, None], idle, left)
        )
    return bound + price * batch.cell[:, CELL_DELAY], mu, energy


_NONE = np.empty((0, 0))


def shortest_bound(batch: Batch, point: Primal) -> FloatArray:
    r"""Return a lower bound [s] on the shortest round, fixed delay included, [instance].

    Minimise T subject to ``a/t - b log(1+PG/b) <= 0`` (nu), ``t + c/f <= T`` (mu) and
    ``sum b <= B`` (eta).  Stationarity gives ``eta = nu slope_k`` and ``mu = nu a/t^2``; the
    common eta is whatever makes ``sum mu = 1``.
    """
    bound: FloatArray = _shortests(batch.device, batch.cell, point.decision)
    return bound + batch.cell[:, CELL_DELAY]
