"""Certificates: what a point is worth, from the point and its multipliers alone.

Nothing here is shared with the iteration that found the point but the elementary functions.  What
the access schemes have in common is here; their bounds are in ``fdma/certificate.py`` and
``tdma/certificate.py``.

Every formula works on arrays [instance, device].
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pwff_solvers.allocation.batch import Batch, FloatArray
from pwff_solvers.allocation.slots import (
    CELL_BAND,
    CELL_DELAY,
    CELL_NOISE,
    DEVICE_F_MAX,
    DEVICE_F_MIN,
    DEVICE_GAIN,
    DEVICE_PAYLOAD,
    DEVICE_POWER_MAX,
    DEVICE_POWER_MIN,
    DEVICE_WORK,
    POINT_BAND,
    POINT_FREQUENCY,
    POINT_POWER,
    POINT_UPLOAD,
    PRIMAL,
)
from pwff_solvers.compiled.elementary import (
    entry,
    kernel,
    log1p,
    select,
)
from pwff_solvers.compiled.switch import COMPILED

__all__ = [
    "GAP_TOLERANCE",
    "VIOLATION_TOLERANCE",
    "Multipliers",
    "Primal",
    "box",
    "columns",
    "compute_minimum",
    "computing_prices",
    "split",
    "variable_energy",
    "violation",
    "violation_of",
]

_LN2 = math.log(2.0)
# What a point must keep to be called optimal.
GAP_TOLERANCE = 1e-8
VIOLATION_TOLERANCE = 1e-9


class Primal:
    """A point: decisions [instance, device] and the round [instance], fixed delay included.

    ``decision`` [instance, 4 or more, device] holds bandwidth, power, frequency and upload time.
    """

    __slots__ = ("decision", "round_s")

    def __init__(
        self,
        *,
        bandwidth_hz: FloatArray,
        power_w: FloatArray,
        frequency_hz: FloatArray,
        upload_s: FloatArray,
        round_s: FloatArray,
    ) -> None:
        self.decision = np.stack([bandwidth_hz, power_w, frequency_hz, upload_s], axis=1)
        self.round_s = round_s

    @classmethod
    def packed(cls, decision: FloatArray, round_s: FloatArray) -> Primal:
        """Return the point whose decisions are in one array already."""
        point = object.__new__(cls)
        point.decision, point.round_s = decision, round_s
        return point

    @property
    def frequency_hz(self) -> FloatArray:
        """Return the frequencies [instance, device]."""
        return self.decision[:, POINT_FREQUENCY]

    @property
    def upload_s(self) -> FloatArray:
        """Return the upload times [instance, device]."""
        return self.decision[:, POINT_UPLOAD]

    @property
    def power_w(self) -> FloatArray:
        """Return the powers [instance, device]."""
        return self.decision[:, POINT_POWER]

    @property
    def bandwidth_hz(self) -> FloatArray:
        """Return the bandwidths [instance, device]."""
        return self.decision[:, POINT_BAND]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Multipliers:
    """Prices [instance]; with TDMA only the price of time is used."""

    bandwidth_j_per_hz: FloatArray
    time_w: FloatArray


@kernel
def _worse1(one: Any, other: Any) -> Any:
    """Return the larger of two; NaN where ``other`` is NaN."""
    return select(one > other, one, other)


@kernel
def _violation_terms(
    payload: Any, work: Any, gain: Any, power_max: Any, power_min: Any, f_min: Any, f_max: Any,
    b: Any, p: Any, f: Any, t: Any, noise: Any,
) -> Any:  # fmt: skip
    """Return a device's largest relative violation, and when it has computed and is done."""
    live = payload > 0.0
    a = select(live, payload * _LN2, 1.0)
    b1 = select(live, b, 1.0)
    t1 = select(live, t, 1.0)
    wait = select(work > 0.0, work / select(f > 0.0, f, 1e-300), 0.0)
    x = p * gain / (noise * b1)
    sent = t1 * b1 * log1p(select(x > 0.0, x, 0.0))
    worst = select(live, a / select(sent > 0.0, sent, 1e-300) - 1.0, 0.0)
    worst = _worse1(worst, p / power_max - 1.0)
    least = select(power_min > 0.0, power_min, 1.0)
    worst = _worse1(worst, select(live & (power_min > 0.0), 1.0 - p / least, 0.0))
    worst = _worse1(worst, f / f_max - 1.0)
    least = select(f_min > 0.0, f_min, 1.0)
    worst = _worse1(worst, select(f_min > 0.0, 1.0 - f / least, 0.0))
    sane = (b1 > 0.0) & (t >= 0.0) & (p >= 0.0) & (f >= 0.0)
    return select(sane, worst, np.inf), wait, wait + t


@kernel
def violation_of(d: Any, q: Any, cell: Any, time: Any, in_turn: Any, s: Any) -> Any:
    """Return the largest violation in one instance, the cell's own limits included."""
    one, two, three = s[0], s[1], s[2]
    s_, c_, h_, p_, m_, l_, u_ = (
        d[DEVICE_PAYLOAD],
        d[DEVICE_WORK],
        d[DEVICE_GAIN],
        d[DEVICE_POWER_MAX],
        d[DEVICE_POWER_MIN],
        d[DEVICE_F_MIN],
        d[DEVICE_F_MAX],
    )
    b_, w_, f_, t_ = q[POINT_BAND], q[POINT_POWER], q[POINT_FREQUENCY], q[POINT_UPLOAD]
    noise = cell[CELL_NOISE]
    for k in range(one.size):
        one[k], two[k], three[k] = _violation_terms(
            s_[k], c_[k], h_[k], p_[k], m_[k], l_[k], u_[k], b_[k], w_[k], f_[k], t_[k], noise
        )
    most = 0.0
    wait = 0.0
    end = 0.0
    band = 0.0
    wide = 0.0
    for k in range(one.size):
        most = _worse1(most, one[k])
        wait = _worse1(wait, two[k])
        end = _worse1(end, three[k])
        band += b_[k]
        wide = _worse1(wide, b_[k])
    if in_turn:
        end = wait + t_.sum()
        band = wide
    most = _worse1(most, band / cell[CELL_BAND] - 1.0)
    late = end / time - 1.0 if time > 0.0 else np.inf
    return _worse1(most, late if end > 0.0 else 0.0)


@entry
def _violations(device: Any, cell: Any, point: Any, time: Any, in_turn: bool) -> Any:
    """Return the largest violations of a batch, [instance]."""
    worst = np.empty(device.shape[0])
    room = np.empty((3, device.shape[2]))
    for i in range(worst.size):
        worst[i] = violation_of(device[i], point[i], cell[i], time[i], in_turn, room)
    return worst


def split(packed: Any, rows: Iterable[int]) -> list[Any]:
    """Return some quantities [instance, device] of a packed array [instance, quantity, device]."""
    return [packed[:, row] for row in rows]


if not COMPILED:
    # compiled code does not warn
    @np.errstate(all="ignore")
    def _violations(device: Any, cell: Any, point: Any, time: Any, in_turn: bool) -> Any:
        order = (
            DEVICE_PAYLOAD,
            DEVICE_WORK,
            DEVICE_GAIN,
            DEVICE_POWER_MAX,
            DEVICE_POWER_MIN,
            DEVICE_F_MIN,
            DEVICE_F_MAX,
        )
        worst, wait, end = _violation_terms(
            *[*split(device, order), *split(point, PRIMAL), cell[:, CELL_NOISE, None]]
        )
        band = point[:, POINT_BAND].max(1) if in_turn else point[:, POINT_BAND].sum(1)
        last = wait.max(1) + point[:, POINT_UPLOAD].sum(1) if in_turn else end.max(1)
        late = np.where(last > 0, np.where(time > 0, last / time - 1.0, np.inf), 0.0)
        return np.maximum.reduce([worst.max(1), band / cell[:, CELL_BAND] - 1.0, late, 0.0 * late])


def columns(batch: Batch) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Return payload [nat], G [Hz/W], bandwidth and fixed delay as columns."""
    nats = batch.payload_bit * np.log(2.0)
    g = batch.gain / batch.noise_psd_w_per_hz[:, None]
    return nats, g, batch.bandwidth_hz[:, None], batch.fixed_delay_s[:, None]


def compute_minimum(batch: Batch, mu: FloatArray) -> FloatArray:
    """Return ``min over f of kappa c f^2 + mu c / f``."""
    with np.errstate(divide="ignore", invalid="ignore"):
        priced = (mu > 0) & (batch.work_cycles > 0)
        f = np.cbrt(np.where(priced, mu / (2.0 * batch.kappa), 0.0))
        f = np.clip(f, batch.frequency_min_hz, batch.frequency_max_hz)
        wait = np.where(priced, mu * batch.work_cycles / f, 0.0)
    least: FloatArray = batch.kappa * batch.work_cycles * f**2 + wait
    return least


def box(gradient: FloatArray, below: FloatArray, above: FloatArray) -> FloatArray:
    """Return the least value of ``gradient * step`` for ``-below <= step <= above``."""
    return np.minimum(-gradient * below, 0.0) + np.minimum(gradient * above, 0.0)


def computing_prices(
    batch: Batch,
    f: FloatArray,
    deadline: FloatArray,
    part: NDArray[np.bool_],
    total: FloatArray,
) -> FloatArray:
    """Return the prices of time of devices that only compute, as near ``total`` as optimality allows.

    A device that finishes at the deadline above its least frequency has price ``2 kappa f^3``; at
    the least frequency anything up to that; at the largest anything from that.  The tolerances
    forgive rounding; they cannot spoil the bound, which holds for any prices.
    """
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


def violation(batch: Batch, point: Primal, *, in_turn: bool) -> FloatArray:
    """Return the largest relative violation of any constraint, [instance]; 0 when none.

    ``in_turn``: whether devices upload one after another, each in the whole band.
    """
    result: FloatArray = _violations(
        batch.device, batch.cell, point.decision, point.round_s - batch.cell[:, CELL_DELAY], in_turn
    )
    return result
