r"""Whole energy-delay curves, with bounds from both sides, and rounds that share one deadline.

``V(T)``, the least energy at round length ``T``, is convex and falls.  Two things are known of it
wherever the allocator has been asked:

* a point ``(T_i, E_i)`` that some allocation attains; by convexity the chord of two such points
  lies above ``V``;
* for the price of time ``w`` a certified bound ``D(w) <= min_T V(T) + w T``; so for *every* T

  .. math:: V(T) \ge D(w) - w\,T ,

  a line that supports the curve where the answer is optimal, and lies lower where it is not.

Between neighbouring points both together make a triangle that holds the curve.  Where it is too
high the allocator is asked for the slope of the chord, the price at which the curve is farthest
below it (sandwich algorithm; Rote, Computing 48, 1992: the error falls like 1/points^2); where two
points will do but one will not, for two prices at equal ratios.

Without hurry.  Uploading slowly in a given band costs ``A = s ln2 N_0/h`` at least, and computing
costs ``kappa c f_min^2``.  The sum over devices is the infimum of ``V`` and ends the curve.

Rounds that share a total delay.  ``W(D) = min sum_r V_r(T_r)`` subject to ``sum_r T_r = D`` is
solved by one price of time for all rounds (Lagrangian duality), so points and lines of W are sums
of points and lines of the V_r at equal prices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq

from pwff_solvers.allocation import certificate
from pwff_solvers.allocation.access import Access
from pwff_solvers.allocation.allocation import Allocation
from pwff_solvers.allocation.batch import Batch, FloatArray
from pwff_solvers.allocation.checks import POSITIVE, Rule, number
from pwff_solvers.allocation.objectives import LeastEnergy, Shortest, Weighted
from pwff_solvers.allocation.solve import GAP_TOLERANCE, VIOLATION_TOLERANCE, named, solve
from pwff_solvers.errors import InvalidInputError

__all__ = ["EnergyDelayCurve", "energy_delay_curve", "least_energy_within"]

IntArray = NDArray[np.int64]

_TOLERANCE: Rule = ("from 1e-07 to 0.5", lambda x: (x >= 1e-7) & (x <= 0.5))
# The infimum may be 0, and no tolerance is small relative to that: below this part of the energy of
# the shortest round errors count relative to it.
_NEGLIGIBLE = 1e-6
# Far more than any curve takes (they double their points each time), unless certificates fail.
_SWEEPS = 40
# A deadline this close (relative) to the shortest delay is the shortest, as in `solve`.
_EDGE = 1e-11
# Near the shortest round the price may be so high that the energy changes within the last digits
# of the delay.  A gap g of E + w T, far above E then, moves a line by g T in time; what `solve`
# calls optimal has g up to this, and no energies are told apart within it.
_BLUR = GAP_TOLERANCE


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class EnergyDelayCurve:
    r"""Least energy against delay: points on the curve, and lines below it.

    Attributes
    ----------
    delay_s, energy_j : array [point]
        Delay [s], ascending from the shortest, and least energy [J], falling; fixed parts included.
        Together they are convex.
    price_of_time_w : array [point]
        -dV/dT [W] there, descending; at the shortest delay its limit from longer ones.  At a kink,
        one of the slopes that support it.
    round_s, round_energy_j : array [round, point]
        The rounds' own shares of ``delay_s`` and ``energy_j``; one round unless the curve is shared.
    least_energy_j : float
        Infimum of the energy over all delays [J].
    gap : float
        Largest relative duality gap of the allocations behind the curve.
    error : float
        Largest certified ``(upper(T') - lower(T)) / energy`` over all delays T from the shortest
        on; ``energy`` is ``upper(T')``, or a millionth of ``energy_j[0]`` where that is more, and
        ``T' = T (1 + 1e-8)`` is T to the precision that certificates have.
    line_price_w, line_j : array [line]
        The lines ``line_j - line_price_w * delay`` [J], none of which exceeds the curve; the first
        is ``least_energy_j``.
    """

    delay_s: FloatArray
    energy_j: FloatArray
    price_of_time_w: FloatArray
    round_s: FloatArray
    round_energy_j: FloatArray
    least_energy_j: float
    gap: float
    error: float
    line_price_w: FloatArray
    line_j: FloatArray

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                value.setflags(write=False)

    def __repr__(self) -> str:
        return (
            f"EnergyDelayCurve({self.delay_s.size} points: {self.delay_s[0]:.4g} to "
            f"{self.delay_s[-1]:.4g} s, {self.energy_j[0]:.4g} to {self.energy_j[-1]:.4g} J; "
            f"error {self.error:.1e}, worst gap {self.gap:.1e})"
        )

    def upper_j(self, delay_s: ArrayLike) -> FloatArray:
        """Return an energy [J] that is enough: the chord; NaN below the shortest delay."""
        delay = self._known(delay_s)
        return np.asarray(np.interp(delay, self.delay_s, self.energy_j), dtype=np.float64)

    def lower_j(self, delay_s: ArrayLike) -> FloatArray:
        """Return an energy [J] that is needed: the highest line; NaN below the shortest delay."""
        return _highest(self.line_price_w, self.line_j, self._known(delay_s))

    def price_w(self, delay_s: ArrayLike) -> FloatArray:
        """Return the price of time [W], linear between the points; NaN below the shortest delay.

        Beyond the last point it is the price of that point: the energy left to save is negligible.
        """
        delay = self._known(delay_s)
        return np.asarray(np.interp(delay, self.delay_s, self.price_of_time_w), dtype=np.float64)

    def _known(self, delay_s: ArrayLike) -> FloatArray:
        """Return the delays, NaN below the shortest one, which itself may have lost its last digits."""
        delay = np.asarray(delay_s, dtype=np.float64)
        shortest = self.delay_s[0]
        known = np.where(delay >= shortest * (1.0 - _EDGE), np.maximum(delay, shortest), np.nan)
        return np.asarray(known, dtype=np.float64)


def energy_delay_curve(
    batch: Batch, tolerance: float = 1e-3, access: str | Access = "fdma", *, shared: bool = False
) -> tuple[EnergyDelayCurve, ...]:
    r"""Return the whole curve of least energy against delay of every instance.

    .. math:: V(T) = \min \{\text{energy} : \text{round} \le T\}, \qquad
              W(D) = \min \Big\{\sum_r V_r(T_r) : \sum_r T_r \le D\Big\}

    Parameters
    ----------
    batch : Batch
        Instances [instance]; with ``shared`` they are the rounds of one schedule.
    tolerance : float
        Largest relative distance between upper and lower bound, from 1e-7 to 0.5.  Points grow
        like ``1/sqrt(tolerance)``.
    access : {"fdma", "tdma"} or Access
        As for :func:`~pwff_solvers.allocation.solve`.
    shared : bool
        Whether the instances share their total delay: then one curve, W.

    Returns
    -------
    tuple of EnergyDelayCurve
        V of each instance, or W alone.  The first point is the shortest delay; the last one is
        within ``tolerance`` of the least energy there is.  ``error`` is at most ``tolerance``
        unless certificates fail, and is rigorous even then.

    Raises
    ------
    InvalidInputError
        If the tolerance is out of range, a shared batch is empty, or ``solve`` refuses the batch.

    Notes
    -----
    *Method.*  V and W are convex.  Every allocation is a point on or above the curve, so chords of
    points bound it from above; the certificate of a price w is a line of slope -w that bounds it
    from below, at every delay.  Where the triangle between chord and lines is too high, ``solve``
    is asked for the price at which the curve is farthest below the chord (sandwich algorithm; Rote,
    Computing 48, 1992).  All points of all curves that one sweep asks for are one call.

    Examples
    --------
    >>> from pwff_solvers.allocation import Batch
    >>> batch = Batch(payload_bit=2e5, work_cycles=[1e9, 2e9], gain=[1e-10, 1e-11],
    ...               power_max_w=0.1, frequency_min_hz=0.0, frequency_max_hz=2e9, kappa=1e-28,
    ...               bandwidth_hz=1e6, noise_psd_w_per_hz=4e-21)
    >>> (curve,) = energy_delay_curve(batch, tolerance=1e-2)
    >>> delay_s = 2 * curve.delay_s[0]
    >>> bool(curve.lower_j(delay_s) <= curve.upper_j(delay_s) <= 1.011 * curve.lower_j(delay_s))
    True
    """
    tolerance = number("tolerance", tolerance, _TOLERANCE)
    rows = np.arange(batch.instances)[None, :] if shared else np.arange(batch.instances)[:, None]
    if not rows.size:
        if shared:
            raise InvalidInputError("batch must have at least one round to share a delay, got 0")
        return ()
    first = _ask(batch, rows, None, access)
    leisure = _Leisure(batch)
    curves = [_Sandwich(first.take([i]), leisure, row, tolerance) for i, row in enumerate(rows)]
    for _ in range(_SWEEPS):
        wanted = [curve.wanted() for curve in curves]
        owner = np.repeat(np.arange(len(curves)), [len(prices) for prices in wanted])
        if not owner.size:
            break
        found = _ask(batch, rows[owner], np.concatenate(wanted), access)
        for i in np.unique(owner):
            curves[i].add(found.take(owner == i))
    return tuple(curve.result() for curve in curves)


def least_energy_within(
    batch: Batch, delay_max_s: float, access: str | Access = "fdma"
) -> tuple[Allocation, float]:
    r"""Return the least-energy allocation of rounds that share a deadline, and their price of time.

    .. math:: \min \sum_r E_r \quad\text{s.t.}\quad \sum_r T_r \le D

    Parameters
    ----------
    batch : Batch
        The rounds [instance].
    delay_max_s : float
        ``D``, the longest total delay [s], fixed delays included.
    access : {"fdma", "tdma"} or Access
        As for :func:`~pwff_solvers.allocation.solve`.

    Returns
    -------
    allocation : Allocation
        Instance r is round r; ``round_s`` adds up to the deadline wherever that binds.
    price_of_time_w : float
        What one more second would save [W], the same for all rounds; 0 where the deadline does not
        bind.  A round at its shortest, or at a kink, has a price of its own in the allocation.

    Raises
    ------
    InvalidInputError
        If the deadline is not positive or shorter than the shortest total delay, or the batch is
        empty or refused by ``solve``.

    Notes
    -----
    The total delay falls with the price.  Between two prices next to each other the rounds are
    interpolated: that meets the deadline exactly, costs at most ``(w' - w)(D - D')/4`` more
    than the optimum, and is itself optimal where the delay jumps at one price (a kink or a straight
    piece of some V), since both ends are optimal for that price and V is convex.

    Examples
    --------
    >>> from pwff_solvers.allocation import Batch
    >>> batch = Batch(payload_bit=[[1e5], [4e5]], work_cycles=1e9, gain=1e-11,
    ...               power_max_w=0.1, frequency_min_hz=0.0, frequency_max_hz=2e9, kappa=1e-28,
    ...               bandwidth_hz=1e6, noise_psd_w_per_hz=4e-21)
    >>> plan, price_of_time_w = least_energy_within(batch, 5.0)
    >>> round(float(plan.round_s.sum()), 9), bool(plan.round_s[0] < plan.round_s[1])
    (5.0, True)
    >>> bool(abs(plan.price_of_time_w / price_of_time_w - 1).max() < 1e-6)
    True
    """
    delay_max_s = number("delay_max_s", delay_max_s, POSITIVE)
    if not batch.instances:
        raise InvalidInputError("batch must have at least one round to share a delay, got 0")
    fastest = solve(batch, Shortest(), access)
    shortest_s, steepest_w = float(fastest.round_s.sum()), float(fastest.price_of_time_w.max())
    if delay_max_s < shortest_s * (1.0 - _EDGE):
        raise InvalidInputError(
            f"delay_max_s must be at least {shortest_s!r} s, the shortest total delay, "
            f"got {delay_max_s!r}"
        )
    if delay_max_s <= shortest_s * (1.0 + _EDGE):
        return fastest, steepest_w
    leisure = _Leisure(batch)
    if leisure.reached_s.sum() <= delay_max_s:
        return solve(batch, LeastEnergy(_positive(leisure.reached_s)), access), 0.0

    tried: list[tuple[float, float, FloatArray]] = []

    def excess(log_price: float) -> float:
        """Return the logarithm of the total delay over the deadline; it falls with the price."""
        round_s = solve(batch, Weighted(math.exp(log_price)), access).round_s
        total_s = float(round_s.sum())
        tried.append((total_s, log_price, round_s))
        return math.log(total_s / delay_max_s)

    high = math.log(steepest_w) + 1e-9  # every round at its shortest, but for rounding
    while excess(high) > 0:
        high += 1.0
    low = min(math.log(max(leisure.price_at(delay_max_s), 1e-9 * steepest_w)), high)
    while excess(low) < 0:
        # the time above the shortest is a power of the price, with an exponent of -1/2 or -1/3
        ratio = (tried[-1][0] - shortest_s) / (delay_max_s - shortest_s)
        high, low = low, low + math.log(min(max(0.5 * ratio**3, 1e-4), 0.5))
    brentq(excess, low, high, xtol=1e-11)
    longer = max((x for x in tried if x[0] >= delay_max_s), key=lambda x: x[1])
    quicker = min((x for x in tried if x[0] <= delay_max_s), key=lambda x: x[1])
    span = longer[0] - quicker[0]
    share = (delay_max_s - quicker[0]) / span if span > 0 else 0.0
    round_s = quicker[2] + share * (longer[2] - quicker[2])
    # a deadline is a deadline: rounding of the sum comes off the longest round
    round_s[np.argmax(round_s)] -= 2.0 * max(float(round_s.sum()) - delay_max_s, 0.0)
    price = math.exp(quicker[1] + share * (longer[1] - quicker[1]))
    return solve(batch, LeastEnergy(_positive(round_s)), access), price


def _positive(round_s: FloatArray) -> FloatArray:
    """Return positive rounds: one with nothing to do takes no time, but a given one must be positive."""
    return np.maximum(round_s, np.finfo(np.float64).tiny)


def _highest(price_w: FloatArray, line_j: FloatArray, delay_s: FloatArray) -> FloatArray:
    """Return the highest of the lines ``line_j - price_w * delay_s`` at every delay."""
    highest: FloatArray = (line_j - price_w * delay_s[..., None]).max(axis=-1)
    return highest


def _lower_hull(x: FloatArray, y: FloatArray) -> IntArray:
    """Return the indices of the lower convex hull of points, in ascending x."""
    hull: list[int] = []
    last = -np.inf
    for i in np.lexsort((y, x)).tolist():
        if x[i] == last:
            continue
        last = x[i]
        while len(hull) > 1:
            j, k = hull[-2:]
            if (y[k] - y[j]) * (x[i] - x[j]) < (y[i] - y[j]) * (x[k] - x[j]):
                break
            hull.pop()
        hull.append(i)
    return np.array(hull, dtype=np.int64)


class _Leisure:
    """What each instance does when time costs nothing, or next to nothing; all [instance].

    For large T the energy exceeds its infimum by ``C/T + K/T^2``: transmitting by
    ``sum_k a_k^2/(2 G_k b_k T)``, least for ``b_k ~ a_k/sqrt(G_k)``, and the same with TDMA, where
    time is shared instead; computing, where frequencies may go to 0, by ``sum_k kappa_k c_k^3/T^2``.
    """

    def __init__(self, batch: Batch) -> None:
        nats = batch.payload_bit * np.log(2.0)
        gain, band = batch.gain / batch.noise_psd_w_per_hz[:, None], batch.bandwidth_hz[:, None]
        work, floor = batch.work_cycles, batch.frequency_min_hz
        costly = batch.kappa * work > 0
        with np.errstate(divide="ignore", invalid="ignore"):
            # at the least power (TDMA only), or ever more slowly
            upload_s = nats / (band * np.log1p(batch.power_min_w * gain / band))
            upload_s = np.where(nats > 0, upload_s, 0.0)
            compute_s = work / np.where(costly, floor, batch.frequency_max_hz)
            compute_s = np.where(work > 0, compute_s, 0.0)
            upload_j = np.where(np.isinf(upload_s), nats / gain, batch.power_min_w * upload_s)
        self.least_j: FloatArray = (
            upload_j + batch.kappa * work * floor**2 + batch.fixed_energy_j
        ).sum(1)
        self.reached_s: FloatArray = upload_s.sum(1) + compute_s.max(1) + batch.fixed_delay_s
        endless = np.where(np.isinf(upload_s), nats / np.sqrt(2.0 * gain), 0.0)
        self.root_c: FloatArray = endless.sum(1) / np.sqrt(batch.bandwidth_hz)
        self.root_k: FloatArray = np.cbrt(np.where(floor == 0, batch.kappa * work**3, 0.0).sum(1))

    def price_at(self, delay_s: float) -> float:
        """Return the price [W] at which all instances take about ``delay_s``, if that is long."""
        c, k = self.root_c.sum(), self.root_k.sum()
        return float((c / delay_s) ** 2 + 2.0 * (k / delay_s) ** 3)

    def price_for(self, rows: IntArray, excess_j: float) -> float:
        """Return a price [W] at which some instances are about ``excess_j`` above their infimum."""
        c, k = self.root_c[rows].sum(), self.root_k[rows].sum()
        reached = self.reached_s[rows]
        # the infimum itself is worth w reached_s: at a lower price no more can be left
        finite = reached[np.isfinite(reached)].sum()
        with np.errstate(divide="ignore"):
            return float(min((excess_j / c) ** 2, 2.0 * (excess_j / k) ** 1.5, excess_j / finite))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Answers:
    """What the allocator said: [answer] or [answer, round]."""

    price_w: FloatArray  # asked for; at the shortest delay the price from there on
    line_j: FloatArray  # certified bound on energy + price x delay; -inf at the shortest delay
    round_s: FloatArray
    round_energy_j: FloatArray  # inf where the allocation breaks a constraint
    gap: FloatArray

    def take(self, which: ArrayLike) -> _Answers:
        """Return some of the answers."""
        index = np.asarray(which)
        return _Answers(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def join(self, other: _Answers) -> _Answers:
        """Return both."""
        names = [f.name for f in fields(self)]
        return _Answers(**{n: np.concatenate([getattr(self, n), getattr(other, n)]) for n in names})


def _ask(
    batch: Batch, rows: IntArray, price_w: FloatArray | None, access: str | Access
) -> _Answers:
    """Solve instances ``rows`` [answer, round] at prices [answer], or for the shortest round."""
    part = batch.take(rows.ravel())
    shape = rows.shape
    if price_w is None:
        found = solve(part, Shortest(), access)
        price = found.price_of_time_w.reshape(shape).max(1)
        line = np.full(shape, -np.inf)
        energy = found.energy_j
    else:
        price = price_w
        each = np.repeat(price_w, shape[1])
        found = solve(part, Weighted(each), access)
        # not from `gap`, which at the shortest round may be that of the round
        point = certificate.Primal(
            bandwidth_hz=found.bandwidth_hz,
            power_w=found.power_w,
            frequency_hz=found.frequency_hz,
            upload_s=found.upload_s,
            round_s=found.round_s,
        )
        prices = certificate.Multipliers(
            bandwidth_j_per_hz=found.price_of_bandwidth_j_per_hz, time_w=found.price_of_time_w
        )
        with np.errstate(all="ignore"):
            bound = named(access).energy_bound(part, point, prices, each)
        line = np.where(np.isnan(bound), -np.inf, bound + part.fixed_energy_j.sum(1))
        energy = np.where(found.violation <= VIOLATION_TOLERANCE, found.energy_j, np.inf)
    return _Answers(
        price_w=price,
        line_j=line.reshape(shape).sum(1),
        round_s=found.round_s.reshape(shape),
        round_energy_j=energy.reshape(shape),
        gap=found.gap.reshape(shape).max(1),
    )


class _Sandwich:
    """One curve while it is being refined."""

    def __init__(
        self, first: _Answers, leisure: _Leisure, rows: IntArray, tolerance: float
    ) -> None:
        self.known, self.tolerance = first, tolerance
        self.leisure, self.rows = leisure, rows
        self.least_j = float(leisure.least_j[rows].sum())
        self.negligible_j = _NEGLIGIBLE * float(first.round_energy_j.sum())
        self._update()

    def add(self, answers: _Answers) -> None:
        """Take in new points and lines."""
        self.known = self.known.join(answers)
        self._update()

    def _update(self) -> None:
        """Find the points on the lower hull, the highest lines, and the errors between them."""
        delay, energy = self.known.round_s.sum(1), self.known.round_energy_j.sum(1)
        delay = np.maximum(delay, delay[0])  # rounding
        usable = np.flatnonzero(np.isfinite(energy) & np.isfinite(delay))
        hull = usable[_lower_hull(delay[usable], energy[usable])]
        # the curve ends where it is as good as flat, at the lowest point if it never is
        scale = max(self.least_j, self.negligible_j)
        flat = energy[hull] - self.least_j <= self.tolerance * scale
        self.hull = hull[: (np.argmax(flat) if flat.any() else np.argmin(energy[hull])) + 1]
        self.delay, self.energy = delay[self.hull], energy[self.hull]
        price = np.append(0.0, self.known.price_w[1:])
        line = np.append(self.least_j, self.known.line_j[1:])
        usable = np.flatnonzero(np.isfinite(line))
        top = usable[_lower_hull(price[usable], -line[usable])]
        self.price, self.line = price[top], line[top]
        self.errors = self._errors()

    def _errors(self) -> FloatArray:
        """Return the largest relative error after each point [point]; the last one is the tail's.

        Along a piece of the chord and of the highest line the relative error is monotone, so that
        it is largest where one of the two bends.
        """
        delay, energy = self.delay, self.energy
        bend = np.diff(self.line) / np.diff(self.price)
        small = np.interp(self.negligible_j, energy[::-1], delay[::-1])
        late = np.append(delay, small) / (1.0 + _BLUR)
        at = np.clip(np.concatenate([delay, late, bend]), delay[0], delay[-1])
        upper = np.append(np.interp(at * (1.0 + _BLUR), delay, energy), energy[-1])
        lower = np.append(_highest(self.price, self.line, at), self.least_j)
        scale = np.maximum(upper, self.negligible_j)
        error = np.maximum(upper - lower, 0.0) / np.where(scale > 0, scale, 1.0)
        interval = np.clip(np.searchsorted(delay, at, side="right") - 1, 0, max(delay.size - 2, 0))
        largest = np.zeros(delay.size)
        np.maximum.at(largest, interval, error[:-1])
        # beyond the last point the energy falls to the infimum at most
        largest[-1] = max(largest[-1], error[-1])
        return largest

    def wanted(self) -> FloatArray:
        """Return the prices [W] to ask for next; none when all errors are small."""
        slope = np.append(self.known.price_w[0], self.known.price_w[self.hull[1:]])
        time = np.diff(self.delay)
        chord = -np.diff(self.energy) / time
        # what exact lines would leave open: a loose certificate is not mended by more points
        open_j = (chord - slope[1:]) * time
        scale = np.maximum(self.energy[1:], self.negligible_j)
        split = (self.errors[:-1] > self.tolerance) & (open_j > 0.1 * self.tolerance * scale)
        prices = self._new(self._tail())
        for i in np.flatnonzero(split & (time > _BLUR * self.delay[1:])):
            third: list[float] = []
            # an error falls like the square of the number of pieces: halve, unless three will do
            if 4.0 < self.errors[i] / self.tolerance <= 9.0 and np.isfinite(slope[i]):
                third = self._new(np.geomspace(slope[i], slope[i + 1], 4)[1:-1].tolist())
            prices += third or self._new([float(chord[i])])
        return np.array(prices, dtype=np.float64)

    def _new(self, prices: list[float]) -> list[float]:
        """Return the prices that were not asked for before."""
        asked = self.known.price_w[1:]
        return [w for w in prices if w > 0 and not (np.abs(asked - w) <= 1e-9 * w).any()]

    def _tail(self) -> list[float]:
        """Return the price of a last point near the infimum, if there is none yet."""
        if self.errors[-1] <= self.tolerance:
            return []
        # a little less than allowed, for the price is an estimate
        goal = 0.9 * self.tolerance * max(self.least_j, self.negligible_j)
        lowest = float(np.fmin.reduce(self.known.price_w))
        estimate = self.leisure.price_for(self.rows, goal)
        if self.known.price_w.size == 1 and estimate < lowest:
            return [estimate]
        # V - infimum falls at least like sqrt(w), as far as it falls like a power at all
        return [lowest * (goal / (self.energy[-1] - self.least_j)) ** 2]

    def result(self) -> EnergyDelayCurve:
        """Return the curve as far as it is known."""
        price = self.known.price_w[self.hull]
        price[0] = self.known.price_w[0]  # whichever price led there again
        return EnergyDelayCurve(
            delay_s=self.delay,
            energy_j=self.energy,
            price_of_time_w=price,
            round_s=self.known.round_s[self.hull].T.copy(),
            round_energy_j=self.known.round_energy_j[self.hull].T.copy(),
            least_energy_j=self.least_j,
            gap=float(self.known.gap.max()),
            error=float(self.errors.max()),
            line_price_w=self.price,
            line_j=self.line,
        )
