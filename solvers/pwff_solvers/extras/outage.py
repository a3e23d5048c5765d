r"""Packet errors: the outage of any allocation, and the least energy under a limit on it (FDMA).

A packet sent at power ``p`` in the band ``b`` over Rayleigh fading of mean gain ``h`` is lost with
probability (Chen et al., IEEE TWC 2021; m is the waterfall threshold, I the interference)

.. math:: q = 1 - \exp\!\Big(-\frac{m\,(I + N_0 b)}{p\,h}\Big) .

*The limit.*  With a tight rate constraint the mean signal-to-noise ratio is ``e^z - 1``,
``z = a/(b t)``, ``a = s ln 2``; so ``q <= q_max`` at ``I = 0`` reads ``z >= z_min``,

.. math:: z_{\min} = \ln\Big(1 + \frac{m}{-\ln(1-q_{\max})}\Big)
   \quad\Longleftrightarrow\quad b\,t \le a/z_{\min} :

narrow bands lose few packets.  In (b, t) this is not a convex set, but in (log b, log t) it is a
half-plane, transmit energy ``A phi(z)`` with ``phi(z) = (e^z-1)/z``, ``A = a N_0/h``, and the power
limit ``A phi(z)/t <= P`` are log-log convex (``d log phi/d log z`` rises with z), and ``c/f + t <=
T``, ``sum b <= B`` are posynomial: a generalised geometric program.  More is true.  A device need
not use all of its band.  With the best part of it, transmit energy is ``max(A phi(z), A
phi(z_min))``, which *is* convex in (b, t), and all that remains of the outage limit is ``t >= t_q =
A phi(z_min)/P``.  So the problem is convex without logarithms, and is certified as such.
Sending with more power than the rate needs also meets the limit, but a narrower band is cheaper.

*Feasibility.*  A device needs ``t_q + c/f_max <= T`` and at least the band ``b`` with
``a/t = b ln(1 + P G/b)`` at ``t = T - c/f_max`` (``G = h/N_0``); these must sum to at most B.  The
second condition is that of the problem without outage, so a limit below 1 lengthens the shortest
round to ``max(shortest, max_k t_q + c/f_max)`` and is never infeasible at every round length.

*Solution.*  At a price ``lam`` of bandwidth and given t the device takes ``psi(z) = lam G/t``,
clipped to ``z_min <= z <= phi^{-1}(P t/A)``.  The envelope theorem gives its price of time

.. math:: \mu = \frac{\lambda b}{t} + P\,\Big[\frac{\lambda G}{t\,\psi(z)} - 1\Big]_+

(bracket only at the power limit), which t balances against that of computing, ``2 kappa
c^3/(T-t)^3``.  The largest demand, at a vanishing price, is finite: where it fits into B the
price is zero.  Otherwise ``sum b(lam) = B`` is solved inside a bracket known in closed form.

Retransmission until success costs ``1/(1-q)`` times as much, and ``1/(1-q)``, ``E/(1-q)`` are
log-log convex as well; such expected costs are not handled here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pwff_solvers.allocation import FDMA, certificate
from pwff_solvers.allocation.allocation import Allocation, Status
from pwff_solvers.allocation.batch import Batch, FloatArray
from pwff_solvers.allocation.checks import (
    NOT_NEGATIVE,
    POSITIVE,
    Rule,
    filled,
    per_instance,
)
from pwff_solvers.allocation.objectives import LeastEnergy, Shortest
from pwff_solvers.allocation.solve import GAP_TOLERANCE, VIOLATION_TOLERANCE, solve
from pwff_solvers.allocation.transforms import inverse_phi, log_inverse_psi, psi
from pwff_solvers.errors import InvalidInputError
from pwff_solvers.extras.resource_blocks import BlockAllocation

__all__ = ["outage_bound", "outage_probability", "solve_outage"]

# Relative excess of the least bandwidths, or of t_q, that passes for rounding of the round length.
_EDGE = 1e-10
_PROPER: Rule = ("above 0 and below 1", lambda x: (x > 0) & (x < 1))


def outage_probability(
    batch: Batch,
    allocation: Allocation | BlockAllocation,
    *,
    waterfall: ArrayLike = 1.08,
    interference_w: ArrayLike = 0.0,
) -> FloatArray:
    r"""Return the probability that a device's upload is lost, [instance, device].

    .. math:: q_k = 1 - \exp\!\Big(-\frac{m\,(I_k + N_0 b_k)}{p_k h_k}\Big)

    Parameters
    ----------
    batch : Batch
        The cells; ``gain`` is the mean channel gain :math:`h`.
    allocation : Allocation or BlockAllocation
        Any allocation of the batch, FDMA or TDMA (there b is the whole band).
    waterfall : float or array [instance, device]
        Threshold :math:`m`, positive, without unit.
    interference_w : float or array [instance, device]
        Interference power :math:`I` in the device's band [W], at least 0.

    Returns
    -------
    array [instance, device]
        0 for a device that sends nothing; NaN where the instance is infeasible.

    Raises
    ------
    InvalidInputError
        If an argument is out of range or the shapes disagree.

    Notes
    -----
    Source: Chen et al., IEEE TWC 2021 (m = 1.08 there).  The model enters no objective of
    ``solve``, which counts every upload as received.

    Examples
    --------
    >>> from pwff_solvers.allocation import Batch, Shortest, solve
    >>> batch = Batch(payload_bit=[2e5, 0.0], work_cycles=1e9, gain=[1e-10, 1e-11],
    ...               power_max_w=0.1, frequency_min_hz=0.0, frequency_max_hz=2e9, kappa=1e-28,
    ...               bandwidth_hz=1e6, noise_psd_w_per_hz=4e-21)
    >>> outage_probability(batch, solve(batch, Shortest())).round(6).tolist()
    [[0.000432, 0.0]]
    """
    m = _per_device(batch, "waterfall", waterfall, POSITIVE)
    interference = _per_device(batch, "interference_w", interference_w, NOT_NEGATIVE)
    if not isinstance(allocation, Allocation | BlockAllocation):
        raise InvalidInputError(
            f"allocation must be an Allocation or BlockAllocation, got {type(allocation).__name__}"
        )
    b, p = allocation.bandwidth_hz, allocation.power_w
    if b.shape != batch.gain.shape:
        raise InvalidInputError(
            f"allocation must have shape {list(batch.gain.shape)} like the batch, "
            f"got shape {list(b.shape)}"
        )
    return _outage(batch, b, p, m, interference)


def _outage(
    batch: Batch, b: FloatArray, p: FloatArray, m: FloatArray, interference_w: FloatArray
) -> FloatArray:
    silent = p == 0
    received = np.where(silent, 1.0, p * batch.gain)
    noise = interference_w + batch.noise_psd_w_per_hz[:, None] * b
    return np.where(silent, 0.0, -np.expm1(-m * noise / received))


def solve_outage(
    batch: Batch, round_s: ArrayLike, outage_max: ArrayLike, *, waterfall: ArrayLike = 1.08
) -> Allocation:
    r"""Return the least energy within a round whose uploads are rarely lost, with certificate.

    The problem of ``solve(batch, LeastEnergy(round_s))`` (FDMA) with the further limits

    .. math:: q_k = 1 - \exp\!\Big(-\frac{m\,N_0 b_k}{p_k h_k}\Big) \le q^{\max}_k .

    Parameters
    ----------
    batch : Batch
        Instances [instance] of devices [device]; ``gain`` is the mean channel gain.
    round_s : float or array [instance]
        Length of the round [s], fixed delay included, positive.
    outage_max : float or array [instance, device]
        Largest outage probability, above 0 and below 1.
    waterfall : float or array [instance, device]
        Threshold :math:`m`, positive, without unit.

    Returns
    -------
    Allocation
        As ``solve`` returns it.  ``violation`` includes the outage limits;
        ``price_of_bandwidth_j_per_hz`` is 0 where they leave bandwidth unused.  An infeasible
        instance has NaN arrays; its ``shortest_round_s`` obeys the outage limits, and its
        ``binding_device`` is the one whose limit on outage (together with power and frequency)
        takes that long alone, or else the one that ``solve`` names.

    Raises
    ------
    InvalidInputError
        If an argument is out of range, shapes disagree, or ``power_min_w`` is used.

    Notes
    -----
    *Convexity.*  With ``a = s ln 2``, ``z = a/(b t)``, ``phi(z) = (e^z - 1)/z`` and ``A = a N_0/h``
    the limit reads ``z >= z_min = ln(1 - m/ln(1 - q_max))``.  A device need not use all of its band:
    with the best part of it, transmit energy is ``max(A phi(z), A phi(z_min))``, convex in (b, t),
    and what remains of the limit is ``t >= t_q = A phi(z_min)/P``.

    *Feasibility.*  So the limits lengthen the shortest round to ``max_k t_q + c/f_max + d`` where
    that is more than the shortest round without them; no limit is infeasible at every round.

    *Certificate.*  The gap is that of weak duality, see :func:`outage_bound`; status is OPTIMAL only
    where |gap| <= 1e-8 and violation <= 1e-9.  Range as for ``solve``: spectral efficiencies up to
    690 nat/s/Hz.

    Source: own derivation; packet error model of Chen et al., IEEE TWC 2021.

    Examples
    --------
    >>> from pwff_solvers.allocation import Batch
    >>> batch = Batch(payload_bit=2e5, work_cycles=[1e9, 2e9], gain=[1e-10, 1e-11],
    ...               power_max_w=0.1, frequency_min_hz=0.0, frequency_max_hz=2e9, kappa=1e-28,
    ...               bandwidth_hz=1e6, noise_psd_w_per_hz=4e-21)
    >>> plan = solve_outage(batch, 3.0, [0.5, 0.01])
    >>> plan.status.tolist(), bool(plan.gap[0] < 1e-8)
    ([0], True)
    >>> outage_probability(batch, plan).round(6).tolist()
    [[0.005737, 0.01]]
    """
    q_max = _per_device(batch, "outage_max", outage_max, _PROPER)
    m = _per_device(batch, "waterfall", waterfall, POSITIVE)
    target = per_instance("round_s", round_s, batch.instances)
    if (batch.power_min_w > 0).any():
        i, k = (int(v) for v in np.argwhere(batch.power_min_w > 0)[0])
        raise InvalidInputError(
            f"power_min_w[{i}, {k}] must be 0 with FDMA, where it is not a convex limit, "
            f"got {batch.power_min_w[i, k]}"
        )
    z_min = np.log1p(m / -np.log1p(-q_max))
    cell = _Cell(batch, target, z_min)
    infeasible = ~cell.feasible()
    some = np.flatnonzero(~infeasible)
    found = _Cell(batch.take(some), target[some], z_min[some]).solve()
    b, t, f, p, lam, mu = (_spread(array, some, batch.instances) for array in found)
    point = certificate.Primal(
        bandwidth_hz=b,
        power_w=p,
        frequency_hz=f,
        upload_s=t,
        round_s=np.where(infeasible, np.nan, target),
    )
    value = certificate.variable_energy(batch, point)
    bound = outage_bound(batch, point, lam, q_max, waterfall=m)
    gap = _relative(value, bound)
    alone = cell.alone()
    q = _outage(batch, b, p, m, np.zeros_like(m))
    violation = np.maximum(FDMA.violation(batch, point), (q / q_max).max(1) - 1.0)
    shortest = np.full(batch.instances, np.nan)
    binding = np.full(batch.instances, -1, dtype=np.int64)
    rows = np.flatnonzero(infeasible)
    if rows.size:
        shortest[rows], binding[rows], gap[rows] = _shortest(batch.take(rows), alone[rows])
    good = (np.abs(gap) <= GAP_TOLERANCE) & (violation <= VIOLATION_TOLERANCE)
    status = np.where(good, Status.OPTIMAL, Status.INACCURATE)
    energy = p * t + batch.kappa * batch.work_cycles * f**2 + batch.fixed_energy_j
    return Allocation(
        bandwidth_hz=b,
        power_w=p,
        frequency_hz=f,
        upload_s=t,
        compute_s=batch.work_cycles / np.where(batch.work_cycles > 0, f, 1.0) + 0.0 * f,
        device_energy_j=energy,
        energy_j=energy.sum(1),
        round_s=point.round_s,
        price_of_bandwidth_j_per_hz=lam,
        price_of_time_w=mu,
        status=np.where(infeasible, Status.INFEASIBLE, status).astype(np.int8),
        shortest_round_s=shortest,
        binding_device=binding,
        gap=gap,
        violation=np.where(infeasible, np.nan, violation),
    )


def outage_bound(
    batch: Batch,
    point: certificate.Primal,
    price_of_bandwidth_j_per_hz: FloatArray,
    outage_max: ArrayLike,
    *,
    waterfall: ArrayLike = 1.08,
) -> FloatArray:
    r"""Return a lower bound [J] on the least variable energy within ``point.round_s``, [instance].

    Transmit energy is at least ``theta F + (1 - theta) F_min`` for any theta in [0, 1], with ``F =
    A phi(z)`` and ``F_min = A phi(z_min)``.  Relax ``sum b <= B`` with ``lam >= 0``, the power
    limit ``r_k = a/t - b log(1 + PG/b) <= 0`` with ``nu_k >= 0`` and ``t + c/f <= T`` with
    ``mu_k >= 0``; the Lagrangian is convex in (b, t) and lies above its tangent at the point:

    .. math:: D = \lambda\Big(\sum_k b_k - B\Big) + \sum_k \Big[\theta_k F_k
       + (1-\theta_k) F^{\min}_k + \nu_k r_k - \mu_k (T - t_k)
       + \min_{b, t} \text{(gradient . step)} + \min_f (\kappa_k c_k f^2 + \mu_k c_k/f)\Big]

    over the box ``0 <= b <= B``, ``t_q <= t <= T - c/f_max``.  Any multipliers give a bound.
    ``theta = min(1, lam/|F_b|)`` and ``nu = (lam - |F_b|)_+ / |r_b|`` make the tangent flat in b;
    ``mu`` is the better of that which makes it flat in t and of ``2 kappa f^3``.

    Parameters
    ----------
    point : Primal
        Any point whose upload times lie in the box.
    price_of_bandwidth_j_per_hz : array [instance]
        ``lam``; any number that is not negative.
    batch, outage_max, waterfall
        As for :func:`solve_outage`.

    Raises
    ------
    InvalidInputError
        If ``outage_max`` or ``waterfall`` is out of range or has the wrong shape.

    Examples
    --------
    >>> from pwff_solvers.allocation import Batch, LeastEnergy, certificate, solve
    >>> batch = Batch(payload_bit=2e5, work_cycles=[1e9, 2e9], gain=[1e-10, 1e-11],
    ...               power_max_w=0.1, frequency_min_hz=0.0, frequency_max_hz=2e9, kappa=1e-28,
    ...               bandwidth_hz=1e6, noise_psd_w_per_hz=4e-21)
    >>> plan = solve_outage(batch, 3.0, 0.005)
    >>> point = certificate.Primal(
    ...     bandwidth_hz=plan.bandwidth_hz, power_w=plan.power_w, frequency_hz=plan.frequency_hz,
    ...     upload_s=plan.upload_s, round_s=plan.round_s)
    >>> bound = outage_bound(batch, point, plan.price_of_bandwidth_j_per_hz, 0.005)
    >>> bool(abs(1 - bound / plan.energy_j) < 1e-8)
    True
    >>> bool(solve(batch, LeastEnergy(3.0)).energy_j < bound)  # without the limits
    True
    """
    q_max = _per_device(batch, "outage_max", outage_max, _PROPER)
    z_min = np.log1p(_per_device(batch, "waterfall", waterfall, POSITIVE) / -np.log1p(-q_max))
    a, g, band, delay = certificate.columns(batch)
    live = a > 0
    c, kappa, power = batch.work_cycles, batch.kappa, batch.power_max_w
    lam = price_of_bandwidth_j_per_hz[:, None]
    time = point.round_s[:, None] - delay
    b, t = np.where(live, point.bandwidth_hz, 1.0), np.where(live, point.upload_s, 1.0)
    f, wide = point.frequency_hz, power * g
    with np.errstate(invalid="ignore", over="ignore"):
        z = a / (b * t)
        value = psi(z, np.expm1(z)) / g  # -F_b = value t, -F_t = value b
        capacity = np.log1p(wide / b)
        slope = capacity + np.expm1(-capacity)  # -r_b
        theta = np.minimum(lam / np.where(live, value * t, 1.0), 1.0)
        nu = np.maximum(lam - value * t, 0.0) / slope
        least = a / g * np.expm1(z_min) / z_min
        sent = theta * (b * t * np.expm1(z) / g) + (1.0 - theta) * least
        sent = sent + nu * (a / t - b * capacity)
        sent = sent + certificate.box(lam - theta * value * t - nu * slope, b, band - b)
        below = np.maximum(t - least / power, 0.0)
        above = np.maximum(time - c / batch.frequency_max_hz - t, 0.0)
        flat = theta * value * b + nu * a / t**2
        slower = np.where(f > batch.frequency_min_hz, 2.0 * kappa * f**3, 0.0)
        parts = [
            certificate.compute_minimum(batch, mu)
            - mu * (time - t)
            + certificate.box(mu - flat, below, above)
            for mu in (flat, np.where(c > 0, slower, 0.0))
        ]
        # without a payload there is nothing to relax
        idle = np.clip(
            c / np.where(time > 0, time, np.inf), batch.frequency_min_hz, batch.frequency_max_hz
        )
        part = np.where(live, sent + np.maximum(*parts), kappa * c * idle**2)
        shared = np.where(live, b, 0.0).sum(1) - batch.bandwidth_hz
    bound: FloatArray = part.sum(1) + price_of_bandwidth_j_per_hz * shared
    return bound


class _Cell:
    """The problem at a given round, [instance, device]; only here is anything searched."""

    def __init__(self, batch: Batch, target: FloatArray, z_min: FloatArray) -> None:
        a, g, band, delay = certificate.columns(batch)
        self.batch, self.target, self.z_min, self.band = batch, target, z_min, band[:, 0]
        self.live = a > 0
        self.left = target[:, None] - delay
        # devices without payload get a stand-in without work, whose answers are erased
        self.a, self.g = np.where(self.live, a, 1.0), g
        self.time = np.where(self.live, self.left, 1.0)
        work = np.where(self.live, batch.work_cycles, 0.0)
        self.steep, self.fast = 2.0 * batch.kappa * work**3, work / batch.frequency_max_hz
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            slow = np.where(work > 0, work / batch.frequency_min_hz, 0.0)
            self.t_q = self.a / g * (np.expm1(z_min) / z_min) / batch.power_max_w
            self.t_high = self.time - self.fast
            # computing slower than f_min saves nothing; nor does anything if computing is free
            floored = self.time - slow >= self.t_q
            rest = np.where(floored, slow, self.time - self.t_q)
            short = (self.steep > 0) & (rest > self.fast)
            self.held = short & ~floored
            self.rest_low = np.where(short, rest, self.fast)
            self.t_low = np.where(short, np.where(floored, self.time - slow, self.t_q), self.t_high)
            self.y_low = np.log(self.t_low / self.rest_low)
            self.y_high = np.log(self.t_high / self.fast)

    def alone(self) -> FloatArray:
        """Return the round [s] a device needs in unlimited bandwidth, fixed delay included."""
        ends = self.batch.work_cycles / self.batch.frequency_max_hz
        ends = ends + np.where(self.live, self.t_q, 0.0)
        result: FloatArray = ends + self.batch.fixed_delay_s[:, None]
        return result

    def feasible(self) -> NDArray[np.bool_]:
        """Return whether every device, and all of them together, can meet the round."""
        with np.errstate(all="ignore"):
            idle = self.batch.work_cycles <= self.batch.frequency_max_hz * self.left * (1.0 + _EDGE)
            fits = np.where(self.live, self.t_q <= self.t_high * (1.0 + _EDGE), idle)
            least = self.a / (self._full_power(self.t_high) * self.t_high)
            needed = np.where(self.live, least, 0.0).sum(1)
            result: NDArray[np.bool_] = fits.all(1) & (needed <= self.band * (1.0 + _EDGE))
        return result

    def solve(self) -> tuple[FloatArray, ...]:
        """Return b, t, f, p and the prices of bandwidth and time."""
        batch, live = self.batch, self.live
        with np.errstate(all="ignore"):
            low, high = self._bracket()
            scarce = self._demand(low) > self.band
            level = _root(lambda x: np.log(self._demand(x) / self.band), low, high)
            level = np.where(scarce, level, low)
            t, rest, b, mu = self._answer(level)
            b = np.where(live, b, 0.0)
            b = b * np.minimum(self.band / b.sum(1), 1.0)[:, None]
            lam = np.where(scarce, np.exp(level), 0.0)
            rest = np.where(live, rest, self.left)
            f = np.clip(
                np.where(batch.work_cycles > 0, batch.work_cycles / rest, 0.0),
                batch.frequency_min_hz,
                batch.frequency_max_hz,
            )
            # what time is worth to the sender; at t_q, and without payload, to the processor
            mu = np.where(scarce[:, None], mu, 0.0)
            mu = np.where(self.held & (t <= self.t_low), self.steep / rest**3, mu)
            slower = (f > batch.frequency_min_hz) & (batch.work_cycles > 0)
            mu = np.where(live, mu, np.where(slower, 2.0 * batch.kappa * f**3, 0.0))
        # z from the band and time returned, so that the rate is met to the last bit
        z = np.where(live, self.a / np.where(live, b * t, 1.0), 0.0)
        power = b * np.expm1(z) / self.g
        return b, np.where(live, t, 0.0), f, power, lam, mu.sum(1)

    def _full_power(self, t: FloatArray) -> FloatArray:
        """Return z at full power, at least ``z_min``: rounding may put it just below at t_q."""
        excess = self.batch.power_max_w * self.g * t / self.a - 1.0
        result: FloatArray = np.fmax(inverse_phi(excess), self.z_min)
        return result

    def _bracket(self) -> tuple[FloatArray, FloatArray]:
        """Return the log prices below and above which no device changes its answer."""
        t, z = self.t_low, self.z_min
        low = t * psi(z, np.expm1(z)) / self.g  # z leaves z_min
        pull = self.steep / self.rest_low**3 * z * t * t / self.a  # t leaves t_low
        low = np.where(self.t_low < self.t_high, np.minimum(low, pull), low)
        t, z = self.t_high, self._full_power(self.t_high)
        scaled = z + np.expm1(-z)  # psi e^-z
        high = t * psi(z, np.expm1(z)) / self.g
        drop = np.where(self.steep > 0, self.steep / self.fast**3, 0.0)
        high = np.maximum(high, (self.batch.power_max_w + drop) * t * t * scaled / self.a)
        # wider by what rounding may do; rows without any payload get an empty bracket
        floor = np.where(self.live, low, np.inf).min(1) * (1.0 - 1e-9)
        ceiling = np.where(self.live, high, 0.0).max(1) * (1.0 + 1e-9)
        some = self.live.any(1)
        return np.log(np.where(some, floor, 1.0)), np.log(np.where(some, ceiling, 1.0))

    def _demand(self, log_price: FloatArray) -> FloatArray:
        """Return the bandwidth [Hz] taken at a price, [instance]."""
        total: FloatArray = np.where(self.live, self._answer(log_price)[2], 0.0).sum(1)
        return total

    def _answer(
        self, log_price: FloatArray
    ) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """Return t, T - t, b and the price of time of every device at a price of bandwidth."""

        def imbalance(y: FloatArray) -> FloatArray:
            _, rest, _, mu = self._at(y, log_price)
            value: FloatArray = np.log(mu) - np.log(self.steep / rest**3)
            return value

        return self._at(_root(imbalance, self.y_low, self.y_high), log_price)

    def _at(
        self, y: FloatArray, log_price: FloatArray
    ) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """Return the same at ``y = log(t/(T-t))``; T - t is carried apart, for it may be far below t."""
        e = np.exp(-y)
        low, high = y <= self.y_low, y >= self.y_high
        t = np.where(high, self.t_high, np.where(low, self.t_low, self.time / (1.0 + e)))
        rest = np.where(high, self.fast, np.where(low, self.rest_low, self.time * (e / (1.0 + e))))
        w = log_price[:, None] + np.log(self.g) - np.log(t)
        z = np.exp(log_inverse_psi(w)[0])
        p = psi(z, np.expm1(z))
        # one Newton step on log psi makes the table exact; large z needs no more than the cut
        z = z * (1.0 + np.where(w < 699.0, (w - np.log(p)) * p / (z * z * np.exp(z)), 0.0))
        full = self._full_power(t)
        limited = z > full
        z = np.clip(z, self.z_min, full)
        b = self.a / (z * t)
        over = np.where(limited, np.exp(w) / psi(z, np.expm1(z)) - 1.0, 0.0)
        mu = np.exp(log_price)[:, None] * b / t + self.batch.power_max_w * np.maximum(over, 0.0)
        return t, rest, b, mu


def _root(
    function: Callable[[FloatArray], FloatArray], low: FloatArray, high: FloatArray
) -> FloatArray:
    """Return the roots of falling functions, elementwise; an end where the sign does not change.

    Chandrupatla's method (Advances in Engineering Software 28, 1997): inverse quadratic steps
    where they can be trusted, bisection elsewhere.
    """
    f_low, f_high = function(low), function(high)
    inside = (f_low > 0) & (f_high < 0)
    end = np.where(f_high >= 0, high, low)
    x1, x2 = np.where(inside, low, 0.0), np.where(inside, high, 0.0)
    f1, f2 = np.where(inside, f_low, 0.0), f_high
    best, share = x1, np.full_like(x1, 0.5)
    for _ in range(200):
        x = x1 + share * (x2 - x1)
        f = np.where(inside, function(x), 0.0)
        same = np.sign(f) == np.sign(f1)
        x3, f3 = np.where(same, x1, x2), np.where(same, f1, f2)
        x2, f2 = np.where(same, x2, x1), np.where(same, f2, f1)
        x1, f1 = x, f
        best = np.where(np.abs(f1) < np.abs(f2), x1, x2)
        width = np.abs(x2 - x1)
        tolerance = 4e-16 * np.abs(best) + 1e-300
        active = inside & (f1 != 0) & (f2 != 0) & (width > 2.0 * tolerance)
        if not active.any():
            break
        xi, phi = (x1 - x2) / (x3 - x2), (f1 - f2) / (f3 - f2)
        trusted = (1.0 - np.sqrt(1.0 - xi) < phi) & (phi < np.sqrt(xi))
        step = f1 / (f2 - f1) * f3 / (f2 - f3)
        step = step + (x3 - x1) / (x2 - x1) * f1 / (f3 - f1) * f2 / (f3 - f2)
        share = np.where(trusted, step, 0.5)
        edge = tolerance / width
        share = np.where(active, np.clip(share, edge, 1.0 - edge), 0.0)
    return np.where(inside, best, end)


def _spread(array: FloatArray, rows: NDArray[np.int64], instances: int) -> FloatArray:
    """Put instances back into their rows; NaN elsewhere."""
    full = np.full((instances, *array.shape[1:]), np.nan)
    full[rows] = array
    return full


def _shortest(part: Batch, alone: FloatArray) -> tuple[FloatArray, NDArray[np.int64], FloatArray]:
    """Return the shortest round [s] under the outage limits, the device that holds it, and its gap."""
    base = solve(part, Shortest())
    late = alone.max(1)
    held = late >= base.round_s
    # solve names the binding device of any round that is too short
    other = solve(part, LeastEnergy(0.5 * base.round_s)).binding_device
    gap = np.where(base.violation <= VIOLATION_TOLERANCE, base.gap, np.inf)
    return (
        np.maximum(late, base.round_s),
        np.where(held, alone.argmax(1), other),
        np.where(held, 0.0, gap),
    )


def _relative(value: FloatArray, bound: FloatArray) -> FloatArray:
    """Return the relative gap; 0 where both are equal, as where there is nothing to do."""
    result: FloatArray = np.where(
        value == bound, 0.0, (value - bound) / np.where(value > 0, value, 1.0)
    )
    return result


def _per_device(batch: Batch, name: str, value: ArrayLike, rule: Rule) -> FloatArray:
    """Check an argument and broadcast it to [instance, device]."""
    if not isinstance(batch, Batch):
        raise InvalidInputError(f"batch must be a Batch, got {type(batch).__name__}")
    return filled(name, value, rule, (batch.instances, batch.devices))
