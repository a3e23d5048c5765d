r"""FDMA: the market for bandwidth, the shortest round and the market for time.

``sum_k b_k(lam) = B`` is solved for ``log lam`` by Newton inside a bracket that only ever holds
exact answers.  The upper end is known in closed form: the least price at which every device takes
the least bandwidth the round allows.  ``Weighted`` adds a second market, ``sum_k mu_k(T) = w``, in
``log(T - Tmin)``.  Arrays have shape [device, instance] or [instance].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pwff_solvers.allocation.batch import Batch, FloatArray
from pwff_solvers.allocation.fdma.devices import Answer, Devices, Limits, answer, limits
from pwff_solvers.allocation.point import Point
from pwff_solvers.allocation.transforms import inverse_phi, psi

__all__ = ["Cell", "least_energy", "shortest", "weighted"]

IntArray = NDArray[np.int64]
_OUTER_LIMIT = 100
# A round length this close (relative) below the shortest is taken for the shortest: it is what
# comes back when a user asks for the shortest round and then plans with it.
_EDGE = 1e-11


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Shortest:
    """The shortest time [instance], and the least bandwidths that it needs."""

    time: FloatArray
    lim: Limits
    full: NDArray[np.bool_]  # all bandwidth is needed; else a device without payload decides


class Cell:
    """Constants of a chunk of instances."""

    def __init__(self, batch: Batch, rows: slice) -> None:
        def turn(array: FloatArray) -> FloatArray:
            return np.ascontiguousarray(array[rows].T)

        noise = batch.noise_psd_w_per_hz[rows]
        bandwidth = batch.bandwidth_hz[rows].copy()
        s, c = turn(batch.payload_bit), turn(batch.work_cycles)
        g, power = turn(batch.gain) / noise, turn(batch.power_max_w)
        self.c, self.kappa = c, turn(batch.kappa)
        self.f_min, self.f_max = turn(batch.frequency_min_hz), turn(batch.frequency_max_hz)
        live = s > 0
        a = s * np.log(2.0)
        twice_c = 2.0 * self.kappa * c**3
        priced = twice_c > 0
        fast = c / self.f_max
        if not live.all():
            # a stand-in that is always feasible and never at a limit; its answers are erased
            a = np.where(live, a, 1e-3 * bandwidth)
            g = np.where(live, g, 1.0)
            power = np.where(live, power, a * 1e30)
            fast = np.where(live, fast, 0.0)
            priced &= live
        with_work = c > 0
        slow = np.where(with_work & live, c / np.where(self.f_min > 0, self.f_min, np.nan), 0.0)
        slow = np.where(np.isnan(slow), np.inf, slow)
        self.d = Devices(
            live=live,
            priced=priced,
            a=a,
            a_over_g=a / g,
            log_g=np.log(g),
            log_half=np.log(a / np.where(priced, twice_c, a)),
            twice_c=np.where(priced, twice_c, 0.0),
            power=power,
            wide=power * g,
            least=a / (power * g),
            fast=fast,
            slow=slow,
            # with one frequency only, computing faster is no alternative to paying
            steep=np.where(
                with_work & live & (self.f_min < self.f_max), 2.0 * self.kappa * self.f_max**3, 0.0
            ),
            bandwidth=bandwidth,
        )
        dead = ~live
        self.any_dead = bool(dead.any())
        # devices without payload: earliest finish, and the kinks of their price of time
        self.idle_fast = np.where(dead, c / self.f_max, 0.0)
        self.kink = np.where(
            (self.f_min > 0) & with_work, c / np.maximum(self.f_min, 1e-300), np.nan
        )

    def idle_price(self, time: FloatArray, columns: IntArray) -> tuple[FloatArray, FloatArray]:
        """Return the price of time of the devices without payload, right and left of ``time``."""
        if not self.any_dead:
            zero = np.zeros_like(time)
            return zero, zero
        c, f_min = self.c[:, columns], self.f_min[:, columns]
        dead = ~self.d.live[:, columns] & (c > 0)
        f = np.minimum(c / time, self.f_max[:, columns])
        price = 2.0 * self.kappa[:, columns] * f**3
        kink = self.kink[:, columns]
        right = dead & ~(kink <= time) & (f > f_min)
        left = dead & ~(kink < time) & (f >= f_min)
        return np.where(right, price, 0.0).sum(0), np.where(left, price, 0.0).sum(0)


def _total(array: FloatArray) -> FloatArray:
    """Return the sum over devices."""
    total: FloatArray = np.add.reduce(array, axis=0)
    return total


# --- the shortest round -----------------------------------------------------------------------


def _shortest(cell: Cell, columns: IntArray) -> _Shortest:
    """Return the root of ``log sum_k b_least(T) = log B`` in ``log(T - T0)``; T0 is where b_least ends."""
    d = cell.d.take(columns)
    band = d.bandwidth
    number = np.maximum(_total(d.live.astype(np.float64)), 1.0)

    def alone(b: FloatArray) -> FloatArray:
        """Return the time a device needs in the band b."""
        needed = d.fast + d.a / (b * np.log1p(d.wide / b))
        longest: FloatArray = np.max(np.where(d.live, needed, 0.0), axis=0)
        return longest

    ends = np.where(d.live, d.fast + d.least, 0.0)
    origin = ends.max(0)
    spare = origin - ends  # exact zero for the device that decides the end
    idle = cell.idle_fast[:, columns].max(0)
    tiny = 1e-18 * np.maximum(origin, 1e-300)
    lo = np.log(np.maximum(alone(band) - origin, tiny))
    hi = np.log(np.maximum(alone(band / number) - origin, tiny))
    # rounding of the two ends must not shut the root out
    lo -= 1e-9 + np.abs(lo) * 1e-12
    hi += 1e-9 + np.abs(hi) * 1e-12
    v = 0.5 * (lo + hi)
    for _ in range(_OUTER_LIMIT):
        tau = np.exp(v)
        excess = (tau + spare) / d.least
        z = inverse_phi(excess)
        expm1 = np.expm1(z)
        b = np.where(d.live, d.wide / expm1, 0.0)
        t = d.least + tau + spare
        total = np.maximum(_total(b), 1e-300)
        grow = psi(z, expm1) / expm1
        slope = -tau * _total(b * (1.0 + 1.0 / grow) / t) / total
        value = np.log(total / band)
        lo = np.where(value > 0, v, lo)
        hi = np.where(value > 0, hi, v)
        new = v - value / slope
        new = np.where((new > lo) & (new < hi), new, 0.5 * (lo + hi))
        moved = np.abs(new - v)
        v = new
        if (moved < 1e-14 * (1.0 + np.abs(v))).all():
            break
    root = np.where(_total(d.live.astype(np.float64)) > 0, origin + np.exp(v), 0.0)
    time = np.maximum(root, idle)
    full = root >= idle
    slack = np.where(d.live, np.maximum(time - origin, np.where(full, np.exp(v), 0.0)) + spare, 1.0)
    return _Shortest(time=time, lim=limits(d, time, np.where(d.live, slack, d.least)), full=full)


def _edge_prices(
    cell: Cell, columns: IntArray, found: _Shortest, price: FloatArray | None
) -> tuple[FloatArray, FloatArray, Answer]:
    """Return the prices where bandwidth is all used at the shortest round.

    Any price of bandwidth from ``log_high`` upwards supports that point, and the price of time
    rises linearly with it; so a wanted price of time is met exactly.
    """
    d = cell.d.take(columns)
    edge = answer(d, found.lim, found.lim.log_high, None)
    lam = np.where(d.live.any(0), np.exp(found.lim.log_high), 0.0)
    right, _ = cell.idle_price(found.time, columns)
    mu = _total(edge.mu) + right
    if price is not None:
        # at a fixed point dmu_k / dlog lam = mu_k + P_k
        whole = _total(np.where(d.live, edge.mu + d.power, 0.0))
        grow = np.maximum(price - mu, 0.0) / np.where(whole > 0, whole, np.inf)
        lam, mu = lam * (1.0 + grow), np.maximum(mu, price)
    return lam, mu, edge


def _binding(cell: Cell, columns: IntArray, found: _Shortest) -> IntArray:
    """Return the device with the largest share of ``dT/d(...)`` at the shortest round."""
    d, lim = cell.d.take(columns), found.lim
    # mu_k is proportional to (a/t^2) / (d/db)[b log(1 + PG/b)] = (a/t^2) e^z / psi(z)
    z = np.exp(lim.x_high)
    expm1 = np.expm1(z)
    share = d.a / lim.t_high**2 * (expm1 + 1.0) / psi(z, expm1)
    share = np.where(d.live, share, -1.0)
    idle = np.argmax(cell.idle_fast[:, columns], axis=0)
    device: IntArray = np.where(found.full, np.argmax(share, axis=0), idle).astype(np.int64)
    return device


# --- the market for bandwidth -----------------------------------------------------------------


def _first_price(d: Devices, lim: Limits) -> FloatArray:
    """Return the price at which devices of one and the same z would fill the band."""
    need = np.where(d.live, d.a / lim.t_high, 0.0)
    total = np.maximum(_total(need), 1e-300)
    z = np.clip(total / d.bandwidth, 1e-30, 300.0)
    level = np.log(psi(z, np.expm1(z)))
    spread = _total(need * (np.log(lim.t_high) - d.log_g)) / total
    return np.minimum(level + spread, lim.log_high)


def _balance(
    d: Devices, lim: Limits, log_price: FloatArray, start: Answer | None
) -> tuple[FloatArray, Answer]:
    """Solve ``sum b = B`` for the log price; return it and the answers there."""
    instances = log_price.size
    result = log_price.copy()
    final: Answer | None = None
    active = np.arange(instances)
    level = np.minimum(log_price, lim.log_high)
    lo = np.full(instances, -np.inf)
    hi = lim.log_high
    log_band, band, least = np.log(d.bandwidth), d.bandwidth, _total(lim.b_least)
    last = start
    for count in range(_OUTER_LIMIT):
        now = answer(d, lim, level, last)
        total = _total(now.b)
        value = np.log(total) - log_band
        slope = _total(now.b * now.db_dl) / total
        lo = np.where(value > 0, level, lo)
        hi = np.where(value > 0, hi, level)
        # what exceeds the least bandwidths falls like a power of the price, even near the shortest
        # round, where the total itself hardly changes
        excess, room = total - least, band - least
        # (every other step late on is the plain one, which creeps nowhere the first one does)
        near = (excess > 0) & (room > 0) & (count < 4 or count % 2 == 0)
        residual = np.where(near, np.log(excess / room) * excess / total, value)
        step = np.clip(-residual / np.minimum(slope, -1e-300), -12.0, 12.0)
        new = level + step
        middle = np.where(np.isfinite(lo), 0.5 * (lo + hi), level - 4.0)
        # the two kinds of steps may undo each other for ever: halve the bracket now and then
        new = np.where((new > lo) & (new < hi) & (count % 8 < 7), new, middle)
        fixed = np.abs(new - level) <= 4e-16 * (4.0 + np.abs(level))
        done = (np.abs(value) <= 1e-13) | fixed | ~np.isfinite(value)
        if final is None:
            final = now
        else:
            final.put(active[done], now.take(done))
        result[active[done]] = level[done]
        if done.all():
            return result, final
        # finished columns cost as much as the others: drop them once they are many
        if 4 * np.count_nonzero(done) >= done.size:
            keep = ~done
            active, d, lim, now = active[keep], d.take(keep), lim.take(keep), now.take(keep)
            lo, hi, log_band = lo[keep], hi[keep], log_band[keep]
            band, least = band[keep], least[keep]
            level, new, done = level[keep], new[keep], done[keep]
        move = np.where(done, 0.0, new - level)
        level = level + move
        last = replace(now, y=np.clip(now.y + now.dy_dl * np.clip(move, -2.0, 2.0), -600, 600))
    assert final is not None
    result[active] = level
    final.put(active, now)
    return result, final


# --- the three objectives ---------------------------------------------------------------------


def least_energy(cell: Cell, time: FloatArray, blur: FloatArray) -> Point:
    """Return the least energy within ``time`` (fixed delay taken off: it is uncertain by ``blur``)."""
    everyone = np.arange(time.size)
    positive = time > 0
    lim = limits(cell.d, np.where(positive, time, np.nan))
    idle_ok = (cell.idle_fast <= time).all(0)
    # NaN, too much, or so nearly all that the round is the shortest but for rounding
    scarce = ~(_total(lim.b_least) <= (1.0 - 1e-8) * cell.d.bandwidth)
    bad = ~(positive & idle_ok) | scarce
    normal = ~bad
    parts = []
    shortest_time = np.full(time.size, np.nan)
    binding = np.full(time.size, -1, dtype=np.int64)
    if bad.any():
        columns = everyone[bad]
        found = _shortest(cell, columns)
        # products, not ratios: with nothing to do the shortest time is 0, and 0 is enough
        edge_s = _EDGE * time[columns] + blur[columns]
        longer = found.time < time[columns] - edge_s
        edge = (found.time <= time[columns] + edge_s) & ~longer
        normal[columns] = longer
        shortest_time[columns] = np.where(longer, np.nan, found.time)
        binding[columns] = np.where(edge | longer, -1, _binding(cell, columns, found))
        if edge.any():
            kept = _Shortest(time=found.time[edge], lim=found.lim.take(edge), full=found.full[edge])
            parts.append((columns[edge], _at_shortest(cell, columns[edge], kept, None)))
    good = everyone[normal]
    if good.size:
        some = good.size < time.size
        d, lim = (cell.d.take(good), lim.take(good)) if some else (cell.d, lim)
        parts.append((good, _within(cell, good, d, lim)))
    point = _gather(cell, time.size, parts)
    return replace(point, shortest=shortest_time, binding=binding)


def shortest(cell: Cell) -> Point:
    """Return the shortest round, and the least energy in it."""
    everyone = np.arange(cell.d.bandwidth.size)
    found = _shortest(cell, everyone)
    point = _gather(cell, everyone.size, [(everyone, _at_shortest(cell, everyone, found, None))])
    return replace(point, shortest=found.time)


_Part = tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]


def _within(cell: Cell, columns: IntArray, d: Devices, lim: Limits) -> _Part:
    if not d.live.any():
        zero = np.zeros_like(lim.time)
        nothing = np.zeros_like(d.a)
        rest = np.broadcast_to(lim.time, nothing.shape)
        return nothing, nothing, rest, lim.time, zero, cell.idle_price(lim.time, columns)[0]
    log_price, last = _balance(d, lim, _first_price(d, lim), None)
    lam = np.where(d.live.any(0), np.exp(log_price), 0.0)
    mu = _total(last.mu) + cell.idle_price(lim.time, columns)[0]
    return last.b, last.t, last.rest, lim.time, lam, mu


def _at_shortest(
    cell: Cell, columns: IntArray, found: _Shortest, price: FloatArray | None
) -> _Part:
    """Return the solution at the shortest round; ``price`` is the price of time it must support."""
    lam, mu, _ = _edge_prices(cell, columns, found, price)
    d = cell.d.take(columns)
    b, t = found.lim.b_least.copy(), found.lim.t_high.copy()
    rest = np.broadcast_to(d.fast, t.shape).copy()
    loose = np.flatnonzero(~found.full)
    if loose.size:
        # a device without payload decides: the others have bandwidth and frequency to spare
        sub = _within(cell, columns[loose], d.take(loose), found.lim.take(loose))
        b[:, loose], t[:, loose], rest[:, loose] = sub[0], sub[1], sub[2]
        lam[loose], mu[loose] = sub[4], sub[5]
        if price is not None:
            mu[loose] = price[loose]
    return b, t, rest, found.time, lam, mu


def _gather(cell: Cell, instances: int, parts: list[tuple[IntArray, _Part]]) -> Point:
    """Put the parts together and derive f and z; fill the band to the last bit."""
    shape = cell.d.a.shape
    b, t, rest = (np.full(shape, np.nan) for _ in range(3))
    time, lam, mu = (np.full(instances, np.nan) for _ in range(3))
    for columns, part in parts:
        if columns.size == instances:
            b, t, rest, time, lam, mu = part
        else:
            b[:, columns], t[:, columns], rest[:, columns] = part[:3]
            time[columns], lam[columns], mu[columns] = part[3:]
    live = cell.d.live
    total = _total(b)
    b = b * np.where(total > 0, cell.d.bandwidth / np.where(total > 0, total, 1.0), 1.0)
    if cell.any_dead:
        t = np.where(live, t, 0.0 * time)
        rest = np.where(live, rest, time)
    f = np.clip(
        np.where(cell.c > 0, cell.c / np.where(rest > 0, rest, 1.0), 0.0), cell.f_min, cell.f_max
    )
    f = np.where(np.isnan(time), np.nan, f)
    z = np.where(live, cell.d.a / np.where(live, b * t, 1.0), 0.0 * time)
    missing = np.full(instances, np.nan)
    return Point(
        b=np.where(live, b, 0.0 * time),
        z=z,
        t=t,
        f=f,
        time=time,
        price_of_bandwidth=np.where(live.any(0), lam, 0.0 * time),
        price_of_time=mu,
        shortest=missing,
        binding=np.full(instances, -1, dtype=np.int64),
    )


def weighted(cell: Cell, price: FloatArray) -> Point:
    """Return the least ``E + price T``: where the devices' prices of time add up to ``price``."""
    everyone = np.arange(price.size)
    found = _shortest(cell, everyone)
    _, right, _ = _edge_prices(cell, everyone, found, None)
    if not found.full.all():
        loose = np.flatnonzero(~found.full)
        part = _within(cell, loose, cell.d.take(loose), found.lim.take(loose))
        right[loose] = part[5]
    stop = right <= price
    parts = []
    if stop.any():
        columns = everyone[stop]
        kept = _Shortest(time=found.time[stop], lim=found.lim.take(stop), full=found.full[stop])
        parts.append((columns, _at_shortest(cell, columns, kept, price[stop])))
    if not stop.all():
        columns = everyone[~stop]
        start = np.log(right[columns] / price[columns])
        parts.append((columns, _price_of_time(cell, columns, price, found.time[columns], start)))
    point = _gather(cell, price.size, parts)
    return replace(point, shortest=found.time)


def _price_of_time(
    cell: Cell, columns: IntArray, price: FloatArray, floor: FloatArray, excess: FloatArray
) -> _Part:
    """Solve ``sum_k mu_k(T) = price`` for T > floor.

    The price of a device falls abruptly, within about its upload time, once T passes its kink
    ``c/f_min``.  So Newton works in ``log(T - anchor)`` with the last kink (or the floor) below T
    as anchor, and the bracket is split at its middle kink as long as it holds one.
    """
    size = columns.size
    d = cell.d.take(columns)
    out_b, out_t, out_rest = (np.empty(d.a.shape) for _ in range(3))
    out_time, out_lam, out_mu = (np.empty(size) for _ in range(3))
    level_lo, level_hi = np.full(size, np.nan), np.full(size, np.nan)
    before = np.full(size, np.inf)
    active = np.arange(size)
    kinks = cell.kink[:, columns]
    kinks = np.sort(np.where(np.isfinite(kinks) & (kinks > floor), kinks, np.inf), axis=0)
    lo, hi = floor.copy(), np.full(size, np.inf)
    at = floor + floor * np.exp(np.clip(0.3 * excess, 0.0, 10.0) - 1.0)
    log_price: FloatArray | None = None
    start: Answer | None = None
    wanted = price[columns]
    for count in range(_OUTER_LIMIT):
        lim = limits(d, at)
        if d.live.any():
            first = _first_price(d, lim) if log_price is None else log_price
            level, last = _balance(d, lim, np.minimum(first, lim.log_high), start)
        else:
            level = np.full(at.size, -np.inf)
            last = _nothing(d, at)
        right, left = cell.idle_price(at, columns[active])
        mu = _total(last.mu)
        # along sum b = B: dl/dT = -(dS/dT)/(dS/dl)
        turn = -_total(last.b * last.db_dt) / np.minimum(_total(last.b * last.db_dl), -1e-300)
        turn = np.where(d.live.any(0), turn, 0.0)
        slope = _total(last.dmu_dt + turn * last.dmu_dl) - 3.0 * right / at
        high = np.log(np.maximum((mu + left) / wanted, 1e-300))
        low = np.log(np.maximum((mu + right) / wanted, 1e-300))
        value = np.where(low > 0, low, np.where(high < 0, high, 0.0))
        lo = np.where(value > 0, at, lo)
        hi = np.where(value < 0, at, hi)
        level_lo = np.where(value > 0, level, level_lo)
        level_hi = np.where(value < 0, level, level_hi)

        below = np.where(kinks < at, kinks, 0.0).max(0)
        anchor = np.maximum(np.where(below > 0, below, floor), floor)
        relative = np.minimum(slope * (at - anchor) / np.maximum(mu + right, 1e-300), -1e-12)
        step = value / relative
        target = anchor + (at - anchor) * np.exp(-np.clip(step, -6.0, 6.0))
        # a Newton step this small is the answer, whatever rounding made of the bracket
        close = np.abs(step) * (at - anchor) <= 2e-16 * at
        outside = ~((target > lo) & (target < hi))
        # Newton that creeps along a bend is stopped by a split of the bracket
        outside |= (count >= 3) & (np.abs(value) > 0.3 * before)
        before = np.where(outside, np.inf, np.abs(value))
        if outside.any():
            target = np.where(outside, _split(kinks, floor, lo, hi), target)
        done = (np.abs(value) <= 2e-12) | close | (target <= lo) | (target >= hi)
        done |= ~np.isfinite(value) | (count == _OUTER_LIMIT - 1)
        if done.any():
            w = active[done]
            # the time is exact but its price jumps: every device is at a corner, where a range of
            # prices of bandwidth supports the same point
            jump = done & (np.abs(value) > 1e-12) & np.isfinite(level_lo + level_hi)
            if jump.any():
                level[jump] = _support(
                    d.take(jump),
                    lim.take(jump),
                    level_hi[jump],
                    level_lo[jump],
                    (wanted - right)[jump],
                )
            out_b[:, w], out_t[:, w], out_rest[:, w] = (
                x[:, done] for x in (last.b, last.t, last.rest)
            )
            out_time[w], out_lam[w] = at[done], np.exp(level[done])
            out_mu[w] = np.where(jump, wanted, np.clip(wanted, mu + right, mu + left))[done]
            if done.all():
                break
            keep = ~done
            active, d, last, kinks = active[keep], d.take(keep), last.take(keep), kinks[:, keep]
            lo, hi, at, floor = lo[keep], hi[keep], at[keep], floor[keep]
            wanted, target, level, turn = wanted[keep], target[keep], level[keep], turn[keep]
            level_lo, level_hi, before = level_lo[keep], level_hi[keep], before[keep]
        move = np.clip(turn * (target - at), -3.0, 3.0)
        log_price = level + np.where(np.isfinite(move), move, 0.0)
        start, at = last, target
    return out_b, out_t, out_rest, out_time, out_lam, out_mu


def _split(kinks: FloatArray, floor: FloatArray, lo: FloatArray, hi: FloatArray) -> FloatArray:
    """Return a time inside the bracket: its middle kink, else a geometric mean above its anchor."""
    inside = (kinks > lo) & (kinks < hi)
    number = inside.sum(0)
    first = (kinks <= lo).sum(0)  # kinks ascend
    index = np.minimum(first + number // 2, kinks.shape[0] - 1)
    kink = np.take_along_axis(kinks, index[None, :], 0)[0]
    below = np.where(kinks <= lo, kinks, 0.0).max(0)
    anchor = np.maximum(np.where(below > 0, below, floor), floor)
    far = np.where(np.isfinite(hi), hi - anchor, 400.0 * (lo - anchor) + lo)
    mean = anchor + np.sqrt(np.maximum(lo - anchor, 1e-5 * far) * far)
    # very near the end of a search the mean may fall on an end: then halve
    mean = np.where((mean > lo) & (mean < hi), mean, 0.5 * (lo + np.minimum(hi, lo + far)))
    return np.where(number > 0, kink, mean)


def _support(
    d: Devices, lim: Limits, one: FloatArray, other: FloatArray, price: FloatArray
) -> FloatArray:
    """Return the log price of bandwidth, between two, at which ``sum mu`` is ``price``, by bisection."""
    lo, hi = np.minimum(one, other), np.maximum(one, other)
    for _ in range(54):
        middle = 0.5 * (lo + hi)
        above = _total(answer(d, lim, middle, None).mu) > price
        lo, hi = np.where(above, lo, middle), np.where(above, middle, hi)
    return hi


def _nothing(d: Devices, time: FloatArray) -> Answer:
    """Return the answer of devices that all lack a payload."""
    zero = np.zeros_like(d.a)
    rest = np.broadcast_to(time, zero.shape)
    return Answer(
        b=zero, t=zero, rest=rest, mu=zero, db_dl=zero, db_dt=zero, dmu_dl=zero, dmu_dt=zero,
        y=zero, dy_dl=zero, x=zero,
    )  # fmt: skip
