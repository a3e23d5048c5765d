r"""Which devices to serve, with FDMA: exact, or bounded from both sides.

``most_devices`` is greedy.  The other two are mixed-integer convex problems,

.. math:: \min_{x\in\{0,1\}^K}\ \sum_k x_k e_k(b_k) + (1-x_k) v_k
          \quad\text{s.t.}\quad \sum_k x_k b_k \le B\ \ (\text{and } \textstyle\sum_k x_k = m),

with ``e_k(b)`` the least energy of device k in bandwidth b.  A price ``lam`` on bandwidth separates
the devices, ``g_k(lam) = min_b e_k(b) + lam b``, and for every ``lam >= 0``

.. math:: L(\lambda) = \min_x \sum_k x_k g_k(\lambda) + (1-x_k) v_k\ -\ \lambda B

is a lower bound, concave in lam: choose the devices with ``g_k < v_k`` (or the m with the least
``g_k - v_k``).  L is maximised in every node of a branch-and-bound tree, whole fronts of nodes at
once; on the way it proposes selections, which ``solve`` prices, and reduced costs (what L rises to
when a choice is reversed), which fix devices.

*Bounds that hold in floating point.*  L is evaluated with the tangent bound of ``certificate.py``
for each device by itself, which is valid for any price and any point, hence also where the inner
solution is inexact; what summation may round off is subtracted.  Decided nodes are bounded by the
certificate of ``solve``.  The bound returned is the least one among all closed and open nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pwff_solvers.allocation import FDMA, certificate
from pwff_solvers.allocation.allocation import Allocation, Status
from pwff_solvers.allocation.batch import Batch, FloatArray
from pwff_solvers.allocation.checks import (
    NOT_NEGATIVE,
    Rule,
    as_array,
    check,
    each_instance,
    filled,
    number,
    per_instance,
)
from pwff_solvers.allocation.fdma.bracketed import Cell
from pwff_solvers.allocation.fdma.devices import Answer, Devices, answer, limits
from pwff_solvers.allocation.objectives import LeastEnergy
from pwff_solvers.allocation.solve import GAP_TOLERANCE, VIOLATION_TOLERANCE, solve
from pwff_solvers.errors import InvalidInputError

__all__ = ["Selection", "drop_out", "most_devices", "serve"]

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

# A node this near (relative) to the best selection known is closed; well below GAP_TOLERANCE.
_CLOSE = 1e-9
# ``solve`` takes a round this much (relative) below the shortest for the shortest.
_EDGE = 1e-11
_FRONT = 64  # nodes of one instance that are bounded at once
_OUT, _IN, _FREE = -1, 1, 0
_SEARCH_LIMIT = 80
_NODES: Rule = ("a whole number of at least 1", lambda x: (x >= 1) & (x == np.floor(x)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Selection:
    """The devices served, their allocation, and how good the choice is.

    Attributes
    ----------
    served : array of bool [instance, device]
        Devices that are served; none where infeasible.
    allocation : Allocation
        Optimal allocation of the served devices; the others spend no energy, bandwidth or power.
        Where infeasible: that of a set which would have to be served, with its shortest round.
    value_j : array [instance]
        Value of the objective [J]; NaN where infeasible.
    bound_j : array [instance]
        Lower bound [J] on the objective of *every* selection (``most_devices``: on the energy of
        the selection returned); NaN where infeasible.
    gap : array [instance]
        ``(value_j - bound_j) / value_j``, 0 where both are 0.
    status : array of int [instance]
        Values of :class:`Status`: OPTIMAL where the gap is at most 1e-8 and no constraint is
        violated by more than 1e-9; INACCURATE where the node limit left a gap; INFEASIBLE.
    nodes : array of int [instance]
        Nodes of the branch-and-bound tree that were bounded.
    """

    served: BoolArray
    allocation: Allocation
    value_j: FloatArray
    bound_j: FloatArray
    gap: FloatArray
    status: NDArray[np.int8]
    nodes: IntArray


def most_devices(batch: Batch, round_s: ArrayLike) -> Selection:
    r"""Return the most devices that can meet the round, with their least energy.

    .. math:: \max |S| \quad\text{s.t.}\quad \textstyle\sum_{k\in S} b^{\min}_k(T) \le B

    Parameters
    ----------
    batch : Batch
        Instances [instance] of devices [device].
    round_s : array_like [instance]
        Length of the round [s], fixed delay included; positive.

    Returns
    -------
    Selection
        The devices that need the least bandwidth ``b_min`` [Hz]; ``value_j`` is their energy.
        Another selection of the same size may need less energy: see :func:`serve`.

    Raises
    ------
    InvalidInputError
        If ``round_s`` is not positive or of the wrong shape.

    Notes
    -----
    *Greedy is exact.*  S is feasible if and only if its least bandwidths add up to at most B; of
    all sets of size m the m smallest have the least sum, so if any set of size m fits, they do.
    A device without payload needs no bandwidth, only a CPU that meets the round.

    Examples
    --------
    >>> batch = Batch(payload_bit=2e5, work_cycles=1e9, gain=[1e-12, 1e-10, 1e-11],
    ...               power_max_w=0.1, frequency_min_hz=0.0, frequency_max_hz=2e9, kappa=1e-28,
    ...               bandwidth_hz=6e4, noise_psd_w_per_hz=4e-21)
    >>> most_devices(batch, 1.0).served.tolist()
    [[False, True, True]]
    """
    wanted = _round(batch, round_s)
    need = _least_bandwidth(batch, wanted)
    order = np.argsort(need, axis=1, kind="stable")
    count, plan = _most(batch, wanted, need, order)
    served = _first(order, count)
    loss = np.maximum(plan.gap, 0.0) * (plan.energy_j - _fixed(batch, served))
    nodes = np.zeros(batch.instances, dtype=np.int64)
    return _selection(served, plan, plan.energy_j, plan.energy_j - loss, nodes)


def serve(batch: Batch, round_s: ArrayLike, devices: ArrayLike, nodes: int = 2000) -> Selection:
    r"""Return the least energy that serves a number of devices within the round.

    .. math:: \min_{|S|=m} \min_b \sum_{k\in S} e_k(b_k)
              \quad\text{s.t.}\quad \textstyle\sum_{k\in S} b_k \le B

    Parameters
    ----------
    batch : Batch
        Instances [instance] of devices [device].
    round_s : array_like [instance]
        Length of the round [s], fixed delay included; positive.
    devices : array_like of int [instance]
        Number m of devices to serve, from 0 to the number of devices.
    nodes : int, default 2000
        Most nodes of the branch-and-bound tree of one instance; the gap says if they were enough.

    Returns
    -------
    Selection
        INFEASIBLE where fewer devices than that can be served.  A device that is not served spends
        nothing, its fixed energy included; the fixed delay stays.

    Raises
    ------
    InvalidInputError
        If ``round_s`` is not positive, ``devices`` no whole number from 0 to the number of
        devices, ``nodes`` not positive, or shapes disagree.

    Examples
    --------
    >>> batch = Batch(payload_bit=2e5, work_cycles=[3e9, 1e9, 1e9], gain=[1e-10, 1e-11, 1e-12],
    ...               power_max_w=0.1, frequency_min_hz=0.0, frequency_max_hz=4e9, kappa=1e-28,
    ...               bandwidth_hz=1e6, noise_psd_w_per_hz=4e-21)
    >>> best = serve(batch, 1.0, 2)
    >>> best.served.tolist(), best.status.tolist()
    ([[False, True, True]], [0])
    """
    wanted = _round(batch, round_s)
    count = _number("devices", devices, batch.devices, batch.instances)
    limit = int(number("nodes", nodes, _NODES))
    need = _least_bandwidth(batch, wanted)
    greedy = _first(np.argsort(need, axis=1, kind="stable"), count)
    tree = _Tree(batch, wanted, need, np.zeros_like(need), count)
    return tree.search(greedy, limit)


def drop_out(batch: Batch, round_s: ArrayLike, value_j: ArrayLike, nodes: int = 2000) -> Selection:
    r"""Return the devices worth serving when a dropped device costs ``value_j``.

    .. math:: \min_S\ \min_b\ \sum_{k\in S} e_k(b_k) + \sum_{k\notin S} v_k
              \quad\text{s.t.}\quad \textstyle\sum_{k\in S} b_k \le B

    Parameters
    ----------
    batch : Batch
        Instances [instance] of devices [device].
    round_s : array_like [instance]
        Length of the round [s], fixed delay included; positive.
    value_j : array_like [instance, device]
        Value :math:`v_k` [J] of each device's update, at least 0.
    nodes : int, default 2000
        Most nodes of the branch-and-bound tree of one instance; the gap says if they were enough.

    Returns
    -------
    Selection
        INFEASIBLE only where the round is shorter than its fixed delay.  A dropped device spends
        nothing, its fixed energy included: it costs ``value_j`` alone.

    Raises
    ------
    InvalidInputError
        If ``round_s`` is not positive, ``value_j`` negative or not finite, ``nodes`` not positive,
        or shapes disagree.

    Examples
    --------
    >>> batch = Batch(payload_bit=2e5, work_cycles=1e9, gain=[1e-10, 1e-11, 1e-12],
    ...               power_max_w=0.1, frequency_min_hz=0.0, frequency_max_hz=2e9, kappa=1e-28,
    ...               bandwidth_hz=1e6, noise_psd_w_per_hz=4e-21)
    >>> best = drop_out(batch, 1.0, [0.2, 0.1, 0.2])
    >>> best.served.tolist(), bool(best.gap[0] <= 1e-8)
    ([[True, False, True]], True)
    """
    wanted = _round(batch, round_s)
    shape = (batch.instances, batch.devices)
    value = filled("value_j", value_j, NOT_NEGATIVE, shape)
    limit = int(number("nodes", nodes, _NODES))
    tree = _Tree(batch, wanted, _least_bandwidth(batch, wanted), value, None)
    return tree.search(np.zeros(shape, dtype=np.bool_), limit)


# --- arguments and results --------------------------------------------------------------------


def _round(batch: Batch, round_s: ArrayLike) -> FloatArray:
    """Return the round [s] of every instance, checked."""
    if not isinstance(batch, Batch):
        raise InvalidInputError(f"batch must be a Batch, got {type(batch).__name__}")
    return per_instance("round_s", round_s, batch.instances)


def _number(name: str, value: ArrayLike, most: int, instances: int) -> IntArray:
    """Check a whole number from 0 to ``most`` and broadcast it to [instance]."""
    array = as_array(name, value)
    check(name, array, ("a whole number", lambda x: x == np.floor(x)))
    check(name, array, NOT_NEGATIVE)
    check(name, array, (f"at most the number of devices, {most}", lambda x: x <= most))
    return each_instance(name, array, instances).astype(np.int64)


def _selection(
    served: BoolArray, plan: Allocation, value: FloatArray, bound: FloatArray, nodes: IntArray
) -> Selection:
    """Put the result together; the status follows from the gap and the violation."""
    infeasible = plan.status == Status.INFEASIBLE
    bound = np.minimum(bound, value)
    gap = (value - bound) / np.where(value != 0, np.abs(value), 1.0)
    good = (gap <= GAP_TOLERANCE) & (plan.violation <= VIOLATION_TOLERANCE)
    status = np.where(good, Status.OPTIMAL, Status.INACCURATE)
    return Selection(
        served=served & ~infeasible[:, None],
        allocation=plan,
        value_j=np.where(infeasible, np.nan, value),
        bound_j=np.where(infeasible, np.nan, bound),
        gap=np.where(infeasible, np.nan, gap),
        status=np.where(infeasible, Status.INFEASIBLE, status).astype(np.int8),
        nodes=nodes,
    )


# --- sets of devices --------------------------------------------------------------------------


def _only(batch: Batch, served: BoolArray) -> Batch:
    """Return the batch in which the other devices have nothing to do and spend nothing."""
    names = ("payload_bit", "work_cycles", "fixed_energy_j")
    return batch.replace(**{name: np.where(served, getattr(batch, name), 0.0) for name in names})


def _fixed(batch: Batch, served: BoolArray) -> FloatArray:
    fixed: FloatArray = np.where(served, batch.fixed_energy_j, 0.0).sum(axis=1)
    return fixed


def _first(order: IntArray, count: IntArray) -> BoolArray:
    """Return a mask of the first ``count`` devices of each row of ``order``."""
    mask = np.zeros(order.shape, dtype=np.bool_)
    np.put_along_axis(mask, order, np.arange(order.shape[1]) < count[:, None], axis=1)
    return mask


def _least_bandwidth(batch: Batch, round_s: FloatArray) -> FloatArray:
    """Return the least bandwidth [Hz] of each device, infinite where it cannot be served even alone."""
    time = round_s - batch.fixed_delay_s
    with np.errstate(all="ignore"):
        cell = Cell(batch, slice(None))
        need = limits(cell.d, np.where(time > 0, time, np.nan)).b_least.T
        late = time[:, None] * (1.0 + _EDGE) < cell.idle_fast.T
    never = late | np.isnan(need) | ~(time > 0)[:, None]
    return np.where(never | (need > batch.bandwidth_hz[:, None] * (1.0 + 1e-9)), np.inf, need)


def _most(
    batch: Batch, round_s: FloatArray, need: FloatArray, order: IntArray
) -> tuple[IntArray, Allocation]:
    """Return the largest number of first devices that fit, and their allocation.

    Sums of bandwidths decide but for rounding: when the round is the shortest one of some set,
    ``solve`` has the last word, and so it is asked about one device more first.
    """
    total = np.cumsum(np.take_along_axis(need, order, axis=1), axis=1)
    fits = total <= batch.bandwidth_hz[:, None]
    count = np.minimum(fits.sum(axis=1) + 1, batch.devices)
    while True:
        plan = solve(_only(batch, _first(order, count)), LeastEnergy(round_s))
        fewer = (plan.status == Status.INFEASIBLE) & (count > 0)
        if not fewer.any():
            return count, plan
        count = count - fewer


# --- branch and bound -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Nodes:
    """Open nodes: instance [node], decisions [node, device], bound [node], price to start from."""

    row: IntArray
    state: NDArray[np.int8]
    bound: FloatArray
    price: FloatArray

    def take(self, which: IntArray | BoolArray) -> _Nodes:
        return _Nodes(
            row=self.row[which],
            state=self.state[which],
            bound=self.bound[which],
            price=self.price[which],
        )


def _join(parts: list[_Nodes]) -> _Nodes:
    return _Nodes(
        row=np.concatenate([p.row for p in parts]),
        state=np.concatenate([p.state for p in parts]),
        bound=np.concatenate([p.bound for p in parts]),
        price=np.concatenate([p.price for p in parts]),
    )


class _Tree:
    """Search trees of all instances, their best selections and what closed nodes are worth."""

    def __init__(
        self,
        batch: Batch,
        round_s: FloatArray,
        need: FloatArray,
        value: FloatArray,
        count: IntArray | None,
    ) -> None:
        self.batch, self.round_s, self.value, self.count = batch, round_s, value, count
        self.time = time = round_s - batch.fixed_delay_s
        self.need, self.roomy = need, batch.bandwidth_hz * (1.0 + 1e-9)
        self.possible = np.isfinite(need)
        able = _only(batch, self.possible)
        with np.errstate(all="ignore"):
            cell = Cell(able, slice(None))
            self.d: Devices = cell.d
            self.lim = limits(cell.d, np.where(time > 0, time, np.nan))
            f = np.clip(
                able.work_cycles / time[:, None], batch.frequency_min_hz, batch.frequency_max_hz
            )
        self.frequency = f
        computing = able.kappa * able.work_cycles * f**2
        self.idle = np.where(able.payload_bit > 0, 0.0, computing)
        self.fixed = able.fixed_energy_j
        # every device as an instance of its own, for its own certificate
        size = batch.instances * batch.devices
        self.alone = Batch(
            **{
                name: getattr(able, name).reshape(size, 1)
                for name in ("payload_bit", "work_cycles", "gain", "power_max_w", "kappa",
                             "frequency_min_hz", "frequency_max_hz")
            },
            **{
                name: np.repeat(getattr(able, name), batch.devices)
                for name in ("bandwidth_hz", "noise_psd_w_per_hz")
            },
        )  # fmt: skip
        self.best = np.full(batch.instances, np.inf)
        self.served = np.zeros(value.shape, dtype=np.bool_)
        self.floor = np.full(batch.instances, np.inf)  # least bound of the nodes closed so far
        self.known: dict[tuple[int, bytes], tuple[float, float]] = {}

    # -- selections --

    def price(self, row: IntArray, served: BoolArray) -> tuple[FloatArray, FloatArray]:
        """Return value and lower bound of given selections, infinite where infeasible; keep the best."""
        keys = [(int(i), mask.tobytes()) for i, mask in zip(row, served, strict=True)]
        new = {key: j for j, key in enumerate(keys) if key not in self.known}
        if new:
            self._solve(list(new), np.fromiter(new.values(), np.int64), row, served)
        pairs = np.array([self.known[key] for key in keys]).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def _solve(
        self, keys: list[tuple[int, bytes]], index: IntArray, row: IntArray, served: BoolArray
    ) -> None:
        rows, sets = row[index], served[index]
        part = _only(self.batch.take(rows), sets)
        plan = solve(part, LeastEnergy(self.round_s[rows]))
        infeasible = plan.status == Status.INFEASIBLE
        energy = np.where(infeasible, np.inf, plan.energy_j)
        dropped = np.where(sets, 0.0, self.value[rows]).sum(axis=1)
        variable = energy - part.fixed_energy_j.sum(axis=1)
        low = np.where(infeasible, np.inf, energy - np.maximum(plan.gap, 0.0) * variable)
        usable = infeasible | (plan.violation <= VIOLATION_TOLERANCE)
        total = np.where(usable, energy, np.inf) + dropped
        for j, key in enumerate(keys):
            self.known[key] = (float(total[j]), float(low[j] + dropped[j]))
            if total[j] < self.best[rows[j]]:
                self.best[rows[j]], self.served[rows[j]] = total[j], sets[j]

    # -- the dual --

    def choose(
        self, row: IntArray, state: NDArray[np.int8], weight: FloatArray
    ) -> tuple[BoolArray, FloatArray]:
        """Return the best choice for given weights ``g - v``, and the cost of reversing each device's."""
        w = np.where(state == _IN, -np.inf, np.where(state == _OUT, np.inf, weight))
        if self.count is None:
            chosen: BoolArray = w < 0
            return chosen, np.abs(w)
        count = self.count[row]
        order = np.argsort(w, axis=1, kind="stable")
        chosen = _first(order, count)
        ranked = np.take_along_axis(w, order, axis=1)
        most = w.shape[1] - 1
        last = np.take_along_axis(ranked, np.clip(count - 1, 0, most)[:, None], axis=1)
        after = np.take_along_axis(ranked, np.clip(count, 0, most)[:, None], axis=1)
        return chosen, np.where(chosen, after - w, w - last)

    def cost(self, row: IntArray, now: Answer, d: Devices, price: FloatArray) -> FloatArray:
        """Return ``g_k(lam)`` [node, device] from the answers, fixed energy included."""
        z = d.a / (now.b * now.t)
        computing = np.where(d.priced, 0.5 * d.twice_c / now.rest**2, 0.0)
        total = d.a_over_g * np.expm1(z) / z + computing + price * now.b
        result: FloatArray = np.where(d.live, total, 0.0).T + self.idle[row] + self.fixed[row]
        return result

    def certified(
        self, row: IntArray, now: Answer, price: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Return lower bounds on ``g_k(lam)`` [node, device], and what rounding may take off [node]."""
        many = self.batch.devices
        one = (row[:, None] * many + np.arange(many)).ravel()
        cell = np.repeat(row, many)
        rate = np.repeat(price, many)
        point = certificate.Primal(
            bandwidth_hz=now.b.T.reshape(-1, 1),
            power_w=np.zeros((one.size, 1)),
            frequency_hz=self.frequency.reshape(-1, 1)[one],
            upload_s=now.t.T.reshape(-1, 1),
            round_s=self.time[cell],
        )
        prices = certificate.Multipliers(bandwidth_j_per_hz=rate, time_w=np.zeros(one.size))
        low = FDMA.energy_bound(self.alone.take(one), point, prices, None)
        band = rate * self.batch.bandwidth_hz[cell]
        cost = (low + band).reshape(row.size, many) + self.fixed[row]
        parts = now.mu.sum(axis=0) * self.time[row] + price * self.batch.bandwidth_hz[row] * many
        return cost, 8.0 * np.finfo(np.float64).eps * (parts + np.abs(cost).sum(axis=1))

    def lower(
        self, row: IntArray, state: NDArray[np.int8], price: FloatArray
    ) -> tuple[FloatArray, BoolArray, FloatArray]:
        """Return ``L(lam)`` of nodes as a safe bound, the choice behind it and what reversing costs."""
        now = answer(self.d.take(row), self.lim.take(row), np.log(price), None)
        cost, rounding = self.certified(row, now, price)
        value = self.value[row]
        chosen, reverse = self.choose(row, state, cost - value)
        parts = np.where(chosen, cost, value)
        low = parts.sum(axis=1) - price * self.batch.bandwidth_hz[row]
        low = low - rounding - 8.0 * np.finfo(np.float64).eps * np.abs(parts).sum(axis=1)
        return np.where(np.isfinite(low), low, -np.inf), chosen, reverse

    def maximise(self, nodes: _Nodes) -> tuple[FloatArray, list[BoolArray]]:
        """Return the best price of bandwidth of every node, and the choices on both sides of it.

        L is concave, so its tangents left and right of the maximum meet above it: that point is
        exact at a kink, where two devices are worth the same; Newton on ``sum b = B`` is fast
        where L is smooth; they take turns.  Ends as soon as the node can be closed.
        """
        row, value = nodes.row, self.value[nodes.row]
        d, lim, band = self.d.take(row), self.lim.take(row), self.batch.bandwidth_hz[row]
        enough = self.best[row] * (1.0 - 0.5 * _CLOSE)
        scale = np.where(np.isfinite(enough), enough, 0.0)
        price, factor = nodes.price.copy(), np.full(row.size, 2.0)
        best, best_price = np.full(row.size, -np.inf), price.copy()
        lo, lo_value, lo_slope = np.zeros(row.size), best.copy(), np.zeros(row.size)
        hi, hi_value, hi_slope = np.full(row.size, np.inf), best.copy(), np.zeros(row.size)
        left, right = (np.zeros(nodes.state.shape, dtype=np.bool_) for _ in range(2))
        for step in range(_SEARCH_LIMIT):
            now = answer(d, lim, np.log(price), None)
            cost = self.cost(row, now, d, price)
            chosen, _ = self.choose(row, nodes.state, cost - value)
            taken = np.where(chosen, now.b.T, 0.0).sum(axis=1)
            total = np.where(chosen, cost, value).sum(axis=1) - price * band
            slope = taken - band
            up = slope > 0
            better = total > best
            best, best_price = np.where(better, total, best), np.where(better, price, best_price)
            lo, lo_value = np.where(up, price, lo), np.where(up, total, lo_value)
            hi, hi_value = np.where(up, hi, price), np.where(up, hi_value, total)
            lo_slope, hi_slope = np.where(up, slope, lo_slope), np.where(up, hi_slope, slope)
            left, right = np.where(up[:, None], chosen, left), np.where(up[:, None], right, chosen)
            # where the tangents meet, and how high; on the left of lo = 0 there is nothing
            meet = (lo_slope * lo - hi_slope * hi + hi_value - lo_value) / (lo_slope - hi_slope)
            top = np.where(lo > 0, lo_value + lo_slope * (meet - lo), hi_value - hi_slope * hi)
            top = np.where(np.isfinite(hi), top, np.inf)
            done = (top - best <= 0.1 * _CLOSE * scale) | (best >= enough)
            done |= (hi <= lo * (1.0 + 1e-15)) | (price < 1e-290) | (price > 1e290)
            if done.all():
                break
            bend = np.where(chosen, (now.b * now.db_dl).T, 0.0).sum(axis=1)
            newton = price * np.exp(np.clip(np.log(taken / band) * taken / -bend, -9.0, 9.0))
            inside = (lo > 0) & np.isfinite(hi)
            middle = np.where(step % 4 == 3, np.sqrt(lo * hi), meet)
            middle = np.where((middle > lo) & (middle < hi), middle, np.sqrt(lo * hi))
            newton = np.where((newton > lo) & (newton < hi), newton, middle)
            new = np.where(step % 2 == 0, newton, middle)
            new = np.where(inside, new, np.where(up, price * factor, price / factor))
            factor = np.where(inside, factor, np.minimum(factor * factor, 1e40))
            price = np.where(done, price, new)
        return best_price, [right, left]

    # -- the search --

    def close(self, nodes: IntArray, bound: FloatArray) -> None:
        np.minimum.at(self.floor, nodes, bound)

    def settle(self, nodes: _Nodes) -> _Nodes:
        """Decide the free devices of nodes whose number of devices leaves no choice."""
        if self.count is None or not nodes.row.size:
            return nodes
        count, state = self.count[nodes.row], nodes.state
        sure = (state == _IN).sum(axis=1)
        free = state == _FREE
        state = np.where(free & (sure == count)[:, None], _OUT, state)
        state = np.where(free & (sure + free.sum(axis=1) == count)[:, None], _IN, state)
        return replace(nodes, state=state.astype(np.int8))

    def search(self, start: BoolArray, limit: int) -> Selection:
        """Search from a first selection; where that is infeasible, so is every other."""
        with np.errstate(all="ignore"):
            first, _ = self.price(np.arange(self.batch.instances), start)
            rows = np.flatnonzero(np.isfinite(first))
            used = np.zeros(self.batch.instances, dtype=np.int64)
            high = np.exp(self.lim.log_high[rows])
            nodes = self.settle(
                _Nodes(
                    row=rows,
                    state=np.where(self.possible[rows], _FREE, _OUT).astype(np.int8),
                    bound=np.zeros(rows.size),
                    price=np.where(np.isfinite(high) & (high > 0), high, 1.0),
                )
            )
            while nodes.row.size:
                hopeless = nodes.bound >= self.best[nodes.row] * (1.0 - _CLOSE)
                self.close(nodes.row[hopeless], nodes.bound[hopeless])
                nodes = nodes.take(~hopeless)
                front = self._front(nodes, np.minimum(_FRONT, limit - used))
                if not front.any():
                    break
                used += np.bincount(nodes.row[front], minlength=used.size)
                nodes = _join([nodes.take(~front), *self._expand(nodes.take(front))])
            self.close(nodes.row, nodes.bound)
        served = np.where(np.isfinite(self.best)[:, None], self.served, start)
        plan = solve(_only(self.batch, served), LeastEnergy(self.round_s))
        value = plan.energy_j + np.where(served, 0.0, self.value).sum(axis=1)
        return _selection(served, plan, value, np.minimum(self.floor, self.best), used)

    def _front(self, nodes: _Nodes, width: IntArray) -> BoolArray:
        """Return the nodes with the least bounds, at most ``width`` of every instance."""
        order = np.lexsort((nodes.bound, nodes.row))
        row = nodes.row[order]
        place = np.arange(row.size) - np.searchsorted(row, row)
        front = np.zeros(row.size, dtype=np.bool_)
        front[order] = place < width[row]
        return front

    def _expand(self, nodes: _Nodes) -> list[_Nodes]:
        """Bound nodes, close those that can be closed, and return the children of the others."""
        decided = (nodes.state != _FREE).all(axis=1)
        if decided.any():
            leaf = nodes.take(decided)
            _, low = self.price(leaf.row, leaf.state == _IN)
            self.close(leaf.row, np.maximum(low, leaf.bound))
            nodes = nodes.take(~decided)
        if not nodes.row.size:
            return []
        row = nodes.row
        price, proposals = self.maximise(nodes)
        low, chosen, reverse = self.lower(row, nodes.state, price)
        bound = np.maximum(nodes.bound, low)
        for served in [*proposals, chosen]:
            sound = np.where(served, self.need[row], 0.0).sum(axis=1) <= self.roomy[row]
            if self.count is not None:  # not the empty stand-in of a side never reached
                sound &= served.sum(axis=1) == self.count[row]
            self.price(row[sound], served[sound])
        enough = self.best[row] * (1.0 - _CLOSE)
        closed = bound >= enough
        self.close(row[closed], bound[closed])
        # what it costs to reverse a choice: fix it where that cannot pay
        reversed_ = np.maximum(low[:, None] + reverse, bound[:, None])
        free = nodes.state == _FREE
        fix = free & (reversed_ >= enough[:, None])
        loss = np.where(fix, reversed_, np.inf).min(axis=1)
        self.close(row[~closed], loss[~closed])
        state = np.where(fix, np.where(chosen, _IN, _OUT), nodes.state).astype(np.int8)
        # branch on the device whose choice is the closest call
        rest = np.where(state == _FREE, reversed_, np.inf)
        pick = np.argmin(rest, axis=1)[:, None]
        branch = (state == _FREE).any(axis=1) & ~closed
        same, other = state.copy(), state.copy()
        kept = np.where(np.take_along_axis(chosen, pick, axis=1), _IN, _OUT).astype(np.int8)
        np.put_along_axis(same, pick, kept, axis=1)
        np.put_along_axis(other, pick, -kept, axis=1)
        turned = np.take_along_axis(rest, pick, axis=1)[:, 0]
        # without a free device ``same`` is the state itself, a leaf
        same = np.where(branch[:, None], same, state)
        stay = _Nodes(row=row, state=same, bound=bound, price=price).take(~closed)
        turn = _Nodes(row=row, state=other, bound=turned, price=price).take(branch)
        return [self.settle(stay), self.settle(turn)]
