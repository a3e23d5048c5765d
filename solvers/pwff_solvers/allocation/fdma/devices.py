r"""One device's best answer to a price of bandwidth, for whole arrays of devices.

Given the price ``lam`` [J/Hz] and the time ``T`` [s] for computing and uploading, device k solves

.. math:: \min_{b,t}\; \tfrac1G\,b\,t\,(e^{z}-1) + \frac{C}{(T-t)^2} + \lambda b,\qquad
          z = \frac{a}{b t},\; a = s\ln2,\; G = h/N_0,\; C = \kappa c^3

within ``T - c/f_min <= t <= T - c/f_max`` and ``p = b(e^z-1)/G <= P``.  Three kinds of answers:

* free: ``psi(z) t = lam G`` and ``2 C t^2 z = A lam G (T-t)^3`` with ``A = a/G``.  Eliminating z
  leaves one equation in ``y = log(t/(T-t))`` whose slope lies between 3/2 and 3, so that Newton
  converges from anywhere;
* at a CPU limit: t is known, ``psi(z) = lam G / t``;
* at the power limit: ``phi(z) = P G t / a`` ties z to t, and ``lam a e^z/(t^2 psi) =
  P + 2C/(T-t)^3`` is solved in log z by Newton inside a bracket.

The problem is convex, so a device is at its power limit if and only if the answer that ignores
the limit violates it.

Arrays have shape [device, instance] here: sums over devices then run along contiguous memory.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pwff_solvers.allocation.batch import FloatArray
from pwff_solvers.allocation.transforms import inverse_phi, log_inverse_psi, psi

__all__ = ["Answer", "Devices", "Limits", "answer", "limits"]

BoolArray = NDArray[np.bool_]
_NEWTON_LIMIT = 60


class _Columns:
    """Records of arrays whose last axis is the instance."""

    __slots__ = ()

    def take(self, columns: NDArray[np.int64] | BoolArray) -> Self:
        """Return the record of some instances."""
        # dataclasses.fields of a subclass; every field is an array with instances last
        names = [f.name for f in fields(self)]  # type: ignore[arg-type]
        return type(self)(**{name: getattr(self, name)[..., columns] for name in names})

    def put(self, columns: NDArray[np.int64], other: Self) -> None:
        """Overwrite some instances."""
        for f in fields(self):  # type: ignore[arg-type]
            getattr(self, f.name)[..., columns] = getattr(other, f.name)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Devices(_Columns):
    """Constants of the devices, [device, instance]; ``bandwidth`` is [instance].

    ``wide`` is P G [Hz], the bandwidth at which noise equals the largest received power; ``least``
    is a/(P G) [s], the upload time at full power in unlimited bandwidth.
    """

    live: BoolArray  # has a payload
    priced: BoolArray  # computing has a price: C > 0
    a: FloatArray
    a_over_g: FloatArray
    log_g: FloatArray
    log_half: FloatArray  # log(a / 2C)
    twice_c: FloatArray
    power: FloatArray
    wide: FloatArray
    least: FloatArray
    fast: FloatArray  # c / f_max [s]
    slow: FloatArray  # c / f_min [s]
    steep: FloatArray  # 2 kappa f_max^3 [W], zero without work
    bandwidth: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Limits(_Columns):
    """What the round length implies, [device, instance]; ``time``, ``log_high`` [instance]."""

    time: FloatArray
    t_low: FloatArray
    t_high: FloatArray
    x_low: FloatArray  # log z at full power and t_low
    x_high: FloatArray  # log z at full power and t_high
    b_least: FloatArray  # least bandwidth that meets the round
    log_high: FloatArray  # log of a price at which every device takes its least bandwidth


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer(_Columns):
    """Answers [device, instance]: with ``l = log lam``, ``db_dl`` = d log b / dl, and so on."""

    b: FloatArray
    t: FloatArray
    rest: FloatArray  # T - t, carried apart because it may be far smaller than t
    mu: FloatArray  # price of time of the device, -(d/dT) of its least cost [W]
    db_dl: FloatArray
    db_dt: FloatArray
    dmu_dl: FloatArray
    dmu_dt: FloatArray
    y: FloatArray  # root of the free equation, CPU limits ignored: next start
    dy_dl: FloatArray
    x: FloatArray  # log z: next start at the power limit


def limits(d: Devices, time: FloatArray, slack: FloatArray | None = None) -> Limits:
    """Return what the round length implies.

    ``slack`` is ``T - c/f_max - a/(P G)`` where the caller knows it better than by subtraction.
    NaN in ``b_least`` marks a device that cannot meet the round in any bandwidth.
    """
    t_high = time - d.fast
    t_low = np.maximum(time - d.slow, 0.0)
    excess = (t_high - d.least if slack is None else slack) / d.least
    z = inverse_phi(np.where(excess > 0, excess, np.nan))
    expm1 = np.expm1(z)
    p = psi(z, expm1)
    b_least = np.where(d.live, d.wide / expm1, 0.0)
    # least price at which t_high is best: solve the power-limited condition there for lam
    extra = np.maximum(d.steep * t_high / d.a_over_g - p / z, 0.0) / (expm1 + 1.0)
    log_high = np.log(t_high * p * (1.0 + extra)) - d.log_g
    x_high = np.log(z)
    x_low = x_high - 40.0
    floored = (t_low > d.least * (1 + 1e-15)) & d.live
    if floored.any():
        x_low[floored] = np.minimum(
            np.log(inverse_phi(t_low[floored] / d.least[floored] - 1.0)), x_high[floored]
        )
    return Limits(
        time=time,
        t_low=t_low,
        t_high=t_high,
        x_low=x_low,
        x_high=x_high,
        b_least=b_least,
        # any number will do where no device has a payload
        log_high=np.where(d.live, log_high, np.where(d.live.any(0), -np.inf, 0.0)).max(0),
    )


def answer(d: Devices, lim: Limits, log_price: FloatArray, start: Answer | None) -> Answer:
    """Return every device's answer to the price ``exp(log_price)`` [instance]."""
    price_g = log_price + d.log_g
    y, y_slope = _free_root(d, lim, log_price, price_g, None if start is None else start.y)
    e = np.exp(-y)
    share = 1.0 / (1.0 + e)
    t = lim.time * share
    rest = lim.time * (e * share)
    inside = np.ones(t.shape, dtype=np.bool_)
    high = (rest <= d.fast) | ~d.priced
    if high.any():
        np.copyto(t, lim.t_high, where=high)
        np.copyto(rest, d.fast, where=high)
        inside &= ~high
    low = t < lim.t_low
    if low.any():
        np.copyto(t, lim.t_low, where=low)
        np.copyto(rest, d.slow, where=low)
        inside &= ~low
    w = price_g - np.log(t)
    x, slope = log_inverse_psi(w)
    z = np.exp(x)
    expm1 = np.expm1(z)
    p = psi(z, expm1)
    exp_z = expm1 + 1.0
    # one Newton step on log psi makes the table exact; large z needs no more than the cut
    dx = np.where(w < 699.0, (w - np.log(p)) * p / (z * z * exp_z), 0.0)
    expm1 += exp_z * z * dx
    z *= 1.0 + dx
    x += dx
    limited = (expm1 * d.least > t * z) & d.live

    b = d.a / (z * t)
    p = np.exp(np.minimum(w, 700.0))
    mu = d.a_over_g * p / (z * t)
    # derivatives: l = log price, tau = T; dt is that of t
    scarce = np.where(inside, 3.0 / rest, 0.0)
    bottom = np.where(inside, (2.0 - slope) / t + scarce, 1.0)
    dt_dl = np.where(inside, (1.0 - slope) / bottom, 0.0)
    dt_dt = np.where(inside, scarce / bottom, 1.0)
    dx_dl = (1.0 - dt_dl / t) * slope
    dx_dt = -dt_dt / t * slope
    out = Answer(
        b=b,
        t=t,
        rest=rest,
        mu=mu,
        db_dl=-dx_dl - dt_dl / t,
        db_dt=-dx_dt - dt_dt / t,
        # log mu = log psi - log z - log t + const and log psi = l + log G - log t
        dmu_dl=mu * (1.0 - 2.0 * dt_dl / t - dx_dl),
        dmu_dt=mu * (-2.0 * dt_dt / t - dx_dt),
        y=y,
        dy_dl=y_slope,
        x=np.minimum(x, lim.x_high) if start is None else start.x.copy(),
    )
    if limited.any():
        _power_limited(d, lim, log_price, np.nonzero(limited), out, x)
    dead = ~d.live
    if dead.any():
        for array in (out.b, out.t, out.mu, out.db_dl, out.db_dt, out.dmu_dl, out.dmu_dt):
            array[dead] = 0.0
    return out


def _free_root(
    d: Devices,
    lim: Limits,
    log_price: FloatArray,
    price_g: FloatArray,
    start: FloatArray | None,
) -> tuple[FloatArray, FloatArray]:
    """Return the root y, and dy / dlog lam, of ``X(log(lam G/t)) - log(A lam G/2C) - log t + 3 y = 0``.

    X is the logarithm of the inverse of psi.
    """
    offset = log_price + d.log_half
    log_time = np.log(lim.time)
    if start is None:
        # the equation at t = T/2, solved for the y in 3 y
        x, _ = log_inverse_psi(price_g - log_time)
        y = np.clip((offset + log_time - x) / 3.0, -30.0, 30.0)
    else:
        y = start
    slope = rise = np.ones_like(y)
    for _ in range(_NEWTON_LIMIT):
        e = np.exp(-y)
        log_t = log_time - np.log1p(e)
        x, slope = log_inverse_psi(price_g - log_t)
        value = x - offset - log_t + 3.0 * y
        rise = 3.0 - (1.0 + slope) * (e / (1.0 + e))
        step = value / rise
        # exp(600) is still a number; further out t or T - t is zero for every purpose
        new = np.clip(y - step, -600.0, 600.0)
        moved = np.abs(new - y).max(initial=0.0)
        y = new
        if moved < 1e-7:  # quadratic: the step just taken left about 1e-14
            break
    return y, (1.0 - slope) / rise


def _power_limited(
    d: Devices,
    lim: Limits,
    log_price: FloatArray,
    where: tuple[NDArray[np.int64], ...],
    out: Answer,
    x_free: FloatArray,
) -> None:
    """Overwrite the answers of the devices at their power limit."""
    a, a_over_g, log_g = d.a[where], d.a_over_g[where], d.log_g[where]
    power, least, twice_c = d.power[where], d.least[where], d.twice_c[where]
    time, t_low, t_high = lim.time[where[1]], lim.t_low[where], lim.t_high[where]
    lo, hi = lim.x_low[where], lim.x_high[where]
    x_low, x_high = lo.copy(), hi.copy()
    log_lam = log_price[where[1]]
    log_cost = log_lam + np.log(a)
    x = np.clip(out.x[where], lo, hi)
    # without a price of computing the best is to compute at full speed and upload at leisure
    x = np.where(d.priced[where], x, hi)
    at_high = ~d.priced[where] | (lo >= hi)
    at_low = np.zeros_like(at_high)
    done = at_high.copy()
    tried_lo = np.zeros_like(at_high)
    tried_hi = np.zeros_like(at_high)
    for _ in range(2 * _NEWTON_LIMIT):
        z = np.exp(x)
        expm1 = np.expm1(z)
        p = psi(z, expm1)
        grow = p / expm1  # d log t / dx
        t = expm1 / z * least
        rest = np.maximum(time - t, 1e-300)
        compute = twice_c / (rest * rest * rest)
        value = log_cost + z - 2.0 * np.log(t) - np.log(p) - np.log(power + compute)
        fall = 2.0 * grow + z / grow + compute / (power + compute) * 3.0 * t * grow / rest
        at_high |= ~done & (x >= x_high) & (value >= 0)
        at_low |= ~done & (x <= x_low) & (value <= 0)
        done |= at_high | at_low
        up = value > 0
        lo = np.where(up, x, lo)
        hi = np.where(up, hi, x)
        tried_lo |= up | (x <= x_low)
        tried_hi |= ~up | (x >= x_high)
        step = value / fall
        # quadratic, on the scale on which T - t changes: this step leaves about its square.  To be
        # asked before the bracket has a say, for rounding can put the root just outside it.
        close = np.abs(step) * (1.0 + 3.0 * t * grow / rest) < 3e-9
        new = x + step
        middle = 0.5 * (lo + hi)
        new = np.where(new >= hi, np.where(tried_hi, middle, hi), new)
        new = np.where(new <= lo, np.where(tried_lo, middle, lo), new)
        new = np.where(close, np.clip(x + step, x_low, x_high), new)
        new = np.where(done | np.isnan(new), x, new)
        done |= close | (new == x)
        x = new
        if done.all():
            break
    z = np.exp(x)
    expm1 = np.expm1(z)
    p = psi(z, expm1)
    exp_z = expm1 + 1.0
    grow = p / expm1
    t = np.where(at_high, t_high, np.where(at_low, t_low, expm1 / z * least))
    rest = np.where(at_high, d.fast[where], np.where(at_low, d.slow[where], time - t))
    inside = ~(at_high | at_low)
    # mu = Q - P with Q = lam a e^z/(t^2 psi), written as a sum of terms that are not negative
    over = np.maximum(np.exp(log_lam + log_g - np.log(t)) / p - 1.0, 0.0)
    mu = a_over_g / t * (over * exp_z + p / z)
    whole = mu + power
    scarce = np.where(inside, 3.0 / rest, 0.0) * mu
    bottom = np.where(inside, whole * (2.0 * grow + z / grow) + scarce * t * grow, 1.0)
    dx_dl = np.where(inside, whole / bottom, 0.0)
    dx_dt = np.where(inside, scarce / bottom, 1.0 / (t * grow))
    turn = 2.0 * grow + z / grow
    out.b[where] = d.wide[where] / expm1
    out.t[where] = t
    out.rest[where] = rest
    out.mu[where] = mu
    out.db_dl[where] = -(1.0 + grow) * dx_dl
    out.db_dt[where] = -(1.0 + grow) * dx_dt
    out.dmu_dl[where] = whole * (1.0 - turn * dx_dl)
    out.dmu_dt[where] = -whole * turn * dx_dt
    out.x[where] = x
