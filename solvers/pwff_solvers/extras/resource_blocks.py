r"""Bandwidth in whole resource blocks of a flat channel: exact by marginal greedy.

With ``b_k = n_k B/N`` and ``E_k(n)`` the least energy of device k in n blocks,

.. math:: \min_{n}\ \sum_k E_k(n_k)\quad\text{s.t.}\quad \sum_k n_k \le N,\ n_k \in \{1,2,\dots\}.

``E_k`` is the minimum over t of a function that is jointly convex in (b, t), hence convex in b; it
falls with b.  The saving of one more block therefore shrinks from block to block, and of all
savings the ``N - sum n_least`` largest are always some devices' first ones.  No integer split can
save more than they do: the greedy choice is optimal (Gross 1956; Fox, Management Science 1966).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pwff_solvers.allocation import FDMA, certificate
from pwff_solvers.allocation.allocation import Status
from pwff_solvers.allocation.batch import Batch, FloatArray
from pwff_solvers.allocation.checks import as_array, check, per_instance
from pwff_solvers.allocation.fdma.bracketed import Cell
from pwff_solvers.allocation.fdma.devices import Devices, limits
from pwff_solvers.allocation.objectives import LeastEnergy
from pwff_solvers.allocation.solve import VIOLATION_TOLERANCE, solve
from pwff_solvers.allocation.transforms import log_inverse_psi

__all__ = ["BlockAllocation", "round_to_blocks"]

_NEWTON_LIMIT = 100


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockAllocation:
    """Allocations in whole resource blocks; NaN (0 blocks) where infeasible.

    Attributes
    ----------
    blocks : array of int [instance, device]
        Blocks of each device; 0 without payload.
    bandwidth_hz, power_w, frequency_hz, upload_s : array [instance, device]
        The decision, as in :class:`Allocation`; ``bandwidth_hz = blocks * B / N``.
    device_energy_j : array [instance, device]
        Energy of each device [J], fixed energy included.
    energy_j : array [instance]
        Total energy [J], the least that whole blocks allow.
    bound_j : array [instance]
        Lower bound [J] from the continuous relaxation's certificate; NaN where the relaxation
        itself is infeasible.
    rounding_price : array [instance]
        ``energy_j / bound_j - 1``: what whole blocks cost (0 where both are 0).
    status : array of int [instance]
        OPTIMAL; INFEASIBLE where the least blocks exceed those there are, or computing alone
        misses the round; INACCURATE where ``violation`` exceeds 1e-9.
    violation : array [instance]
        Largest relative violation of a constraint; NaN where infeasible.
    """

    blocks: NDArray[np.int64]
    bandwidth_hz: FloatArray
    power_w: FloatArray
    frequency_hz: FloatArray
    upload_s: FloatArray
    device_energy_j: FloatArray
    energy_j: FloatArray
    bound_j: FloatArray
    rounding_price: FloatArray
    status: NDArray[np.int8]
    violation: FloatArray


def round_to_blocks(batch: Batch, round_s: ArrayLike, blocks: ArrayLike) -> BlockAllocation:
    r"""Return the least energy within a round when bandwidth comes in whole resource blocks.

    Parameters
    ----------
    batch : Batch
        Instances [instance] of devices [device]; FDMA, flat channel.
    round_s : array_like [instance]
        Length of the round [s], fixed delay included; positive.
    blocks : array_like of int [instance]
        Number N of blocks of ``B/N`` [Hz] each, at least 1.

    Returns
    -------
    BlockAllocation
        The exact optimum, with the continuous relaxation's bound; infeasible instances never raise.

    Raises
    ------
    InvalidInputError
        If ``round_s`` is not positive, ``blocks`` is no whole number from 1, or shapes disagree.

    Notes
    -----
    *Greedy is exact.*  A device's least energy is convex in its bandwidth, so the saving of one more
    block shrinks from block to block, and the largest savings of all are always some devices' first
    ones: no other split saves more (Fox, Management Science 1966).  It starts from the *least*
    blocks of each device, not from the floor of the continuous optimum, which an optimal integer
    split may well undercut.  Costs O(devices x blocks) one-dimensional convex problems, all solved at once.

    Examples
    --------
    >>> batch = Batch(payload_bit=2e5, work_cycles=1e9, gain=[1e-10, 1e-11, 1e-12],
    ...               power_max_w=0.1, frequency_min_hz=0.0, frequency_max_hz=2e9, kappa=1e-28,
    ...               bandwidth_hz=1e6, noise_psd_w_per_hz=4e-21)
    >>> plan = round_to_blocks(batch, 1.0, 12)
    >>> plan.blocks.tolist(), plan.status.tolist()
    ([[3, 4, 5]], [0])
    >>> bool(0 < plan.rounding_price[0] < 0.01)
    True
    """
    relaxed = solve(batch, LeastEnergy(round_s))
    number = _whole("blocks", blocks, batch.instances)
    wanted = per_instance("round_s", round_s, batch.instances)
    time = wanted - batch.fixed_delay_s
    shape = (batch.instances, batch.devices)
    n = np.zeros(shape, dtype=np.int64)
    t, rest = np.full(shape, np.nan), np.full(shape, np.nan)
    with np.errstate(all="ignore"):
        cell = Cell(batch, slice(None))
        lim = limits(cell.d, np.where(time > 0, time, np.nan))
        # rounding of the limit must not cost a whole block
        need = np.ceil(lim.b_least.T / (batch.bandwidth_hz / number)[:, None] * (1.0 - 1e-12))
        need = np.where(batch.payload_bit > 0, np.maximum(need, 1.0), 0.0)
        # the relaxation knows of the devices that only compute; NaN is not enough either
        good = (need.sum(1) <= number) & (relaxed.status != Status.INFEASIBLE)
        for i in np.flatnonzero(good):
            d = cell.d.take(np.array([i]))
            n[i] = _greedy(d, time[i], need[i].astype(np.int64), int(number[i]))
            band = np.maximum(n[i, :, None], 1) * (batch.bandwidth_hz[i] / number[i])
            t[i], rest[i] = (x[:, 0] for x in _best_time(d, time[i], band))
        live = n > 0
        t = np.where(good[:, None], np.where(live, t, 0.0), np.nan)
        rest = np.where(live, rest, np.where(good, time, np.nan)[:, None])
        bandwidth = n * (batch.bandwidth_hz / number)[:, None] + 0.0 * t
        z = np.where(live, batch.payload_bit * np.log(2.0) / (bandwidth * t), 0.0)
        power = bandwidth * np.expm1(z) * batch.noise_psd_w_per_hz[:, None] / batch.gain
        f = np.where(batch.work_cycles > 0, batch.work_cycles / rest, 0.0 * t)
        f = np.clip(f, batch.frequency_min_hz, batch.frequency_max_hz)
        energy = power * t + batch.kappa * batch.work_cycles * f**2 + batch.fixed_energy_j
        point = certificate.Primal(
            bandwidth_hz=bandwidth, power_w=power, frequency_hz=f, upload_s=t,
            round_s=np.where(good, wanted, np.nan),
        )  # fmt: skip
        violation = np.where(good, FDMA.violation(batch, point), np.nan)
        total = energy.sum(1)
        variable = relaxed.energy_j - batch.fixed_energy_j.sum(1)
        bound = relaxed.energy_j - np.maximum(relaxed.gap, 0.0) * variable
        price = np.where(bound > 0, total / np.where(bound > 0, bound, 1.0) - 1.0, 0.0 * total)
    status = np.where(violation <= VIOLATION_TOLERANCE, Status.OPTIMAL, Status.INACCURATE)
    return BlockAllocation(
        blocks=n,
        bandwidth_hz=bandwidth,
        power_w=power,
        frequency_hz=f,
        upload_s=t,
        device_energy_j=energy,
        energy_j=total,
        bound_j=bound,
        rounding_price=price,
        status=np.where(good, status, Status.INFEASIBLE).astype(np.int8),
        violation=violation,
    )


def _greedy(d: Devices, time: float, need: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """Return the blocks [device] of one instance: the least ones and those with the largest savings."""
    spare = number - int(need.sum())
    live = need > 0
    if spare == 0 or not live.any():
        return need
    columns = need[:, None] + np.arange(spare + 1)
    band = np.where(live[:, None], columns, 1) * (d.bandwidth / number)
    t, rest = _best_time(d, time, band)
    z = d.a / (band * t)
    energy = d.a_over_g * np.expm1(z) / z + 0.5 * d.twice_c / rest**2
    saving = np.where(live[:, None], energy[:, :-1] - energy[:, 1:], -np.inf)
    # convexity makes savings fall; rounding must not break the order in which blocks are taken
    saving = np.minimum.accumulate(saving, axis=1)
    # a stable sort takes each device's equal savings in the order of its blocks
    best = np.argsort(-saving, axis=None, kind="stable")[:spare]
    more: NDArray[np.int64] = np.bincount(best // spare, minlength=need.size)
    return need + more


def _best_time(d: Devices, time: float, band: FloatArray) -> tuple[FloatArray, FloatArray]:
    r"""Return the best upload time t and ``T - t``, [device, case], of one instance in given bandwidths.

    ``(b/G) psi(z) = 2C/(T-t)^3`` with ``z = a/(bt)``; in ``y = log(t/(T-t))`` it reads
    ``X(log(2CG/b) - 3 log(T-t)) + log t - log(a/b) = 0``, X the inverse of log psi.  The left side
    rises with y: Newton inside a bracket that the limits of power and frequency provide.
    """
    t_low = d.a / (band * np.log1p(d.wide / band))
    t_low = np.maximum(t_low, np.maximum(time - d.slow, 0.0))
    t_high = np.broadcast_to(time - d.fast, band.shape)
    t_low = np.minimum(t_low, t_high)
    # 600 stands for no limit at all, and for devices whose answer is not in the bracket
    y_low = np.clip(np.log(t_low / (time - t_low)), -600.0, 600.0)
    y_high = np.clip(np.log(t_high / np.where(d.priced, d.fast, 0.0)), -600.0, 600.0)
    level = np.log(np.where(d.priced, d.twice_c, 1.0) * d.a / (d.a_over_g * band))
    goal = np.log(d.a / band)

    def excess(y: FloatArray) -> tuple[FloatArray, FloatArray]:
        log_t = np.log(time) - np.log1p(np.exp(-y))
        log_rest = np.log(time) - np.log1p(np.exp(y))
        x, slope = log_inverse_psi(level - 3.0 * log_rest)
        share = np.exp(log_t) / time
        return x + log_t - goal, 3.0 * slope * share + 1.0 - share

    # without a price of computing, upload at leisure
    top = np.broadcast_to(~d.priced, band.shape) | (excess(y_high)[0] <= 0)
    bottom = ~top & (excess(y_low)[0] >= 0)
    inside = ~(top | bottom)
    lo, hi = y_low.copy(), y_high.copy()
    y = np.clip(0.0 * band, lo, hi)
    for _ in range(_NEWTON_LIMIT):
        value, slope = excess(y)
        lo, hi = np.where(value < 0, y, lo), np.where(value < 0, hi, y)
        new = y - value / slope
        new = np.where((new > lo) & (new < hi), new, 0.5 * (lo + hi))
        moved = np.abs(new - y)[inside]
        y = new
        # the energy is flat here: an error of 1e-8 in y costs 1e-16 of it
        if (moved <= 1e-8 * (1.0 + np.abs(y[inside]))).all():
            break
    share = 1.0 / (1.0 + np.exp(-y))
    t = np.where(top, t_high, np.where(bottom, t_low, time * share))
    rest = np.where(top, d.fast, np.where(bottom, time - t_low, time / (1.0 + np.exp(y))))
    # without work nothing remains of the round, and nothing is computed in it
    return t, np.where(rest > 0, rest, time)


def _whole(name: str, value: ArrayLike, instances: int) -> FloatArray:
    """Check a positive whole number and broadcast it to [instance]."""
    array = per_instance(name, value, instances)
    check(name, as_array(name, value), ("a whole number", lambda x: x == np.floor(x)))
    return array
