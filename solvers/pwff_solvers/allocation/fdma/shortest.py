"""FDMA: the shortest round by Newton on all devices at once, compiled for whole registers.

Every device has full power and full frequency, so ``phi(z) a/(PG) = T - c/f_max`` with
``phi(z) = (e^z-1)/z`` gives its z, ``b = PG/(e^z-1)`` its least bandwidth, and ``sum b = B`` the
round.  T is carried as what lies above its floor ``max_k c/f_max + a/(PG)``, which may be little.
"""

from __future__ import annotations

import math

import numpy as np

from pwff_solvers.allocation.registers import (
    ABOVE,
    B_0,
    B_T,
    BAND,
    BOUND,
    CELL,
    CLOSE,
    CUT,
    DT,
    FAST,
    FLOOR,
    LAM,
    LANES,
    LEAST,
    M_0,
    M_T,
    ROW,
    SLOW,
    SPARE,
    TIME,
    TWICE_C,
    WEIGHT,
    WORST,
    X_T,
    A,
    B,
    G,
    M,
    W,
    X,
    Z,
    all_close,
    by_lanes,
    cut,
    farthest,
    finish,
    first_live,
    grow,
    inverse_phi,
    largest,
    load,
    psi,
    take_in,
    take_out,
    total,
)  # fmt: skip
from pwff_solvers.allocation.slots import (
    DEVICE_F_MAX,
    DEVICE_PAYLOAD,
    DEVICE_WORK,
    SCALAR_CONVERGED,
)
from pwff_solvers.compiled.elementary import entry, exp_pair, kernel, log

__all__ = ["shortest"]

_ITERATIONS = 24


@kernel
def _evaluate(row, cell):
    """Find the step of a row of devices as a function of the step of ``log(T - floor)``; add up."""
    for l in range(LANES):
        z = row[Z * LANES + l]
        least = row[LEAST * LANES + l]
        t = least + (row[SPARE * LANES + l] + cell[ABOVE * LANES + l])
        e, expm1 = exp_pair(z)
        p = psi(z, expm1)
        n1 = least * expm1
        d1 = t * z
        over = 1.0 / (p * (n1 + d1))
        shrink = expm1 * (n1 + d1) * over  # 1/(dlog phi/dx)
        r = 2.0 * (n1 - d1) * p * over
        x = -r * shrink
        x_t = shrink * cell[ABOVE * LANES + l] / t
        row[X * LANES + l] = x
        row[X_T * LANES + l] = x_t
        # b = PG/(e^z - 1)
        b = row[WEIGHT * LANES + l] * row[A * LANES + l] / (least * expm1)
        turn = -z * e / expm1
        cell[B * LANES + l] += b
        cell[B_0 * LANES + l] += b * cut(turn * x, -CUT, CUT)
        cell[B_T * LANES + l] += b * turn * x_t


@kernel
def _advance(row, cell):
    for l in range(LANES):
        x = row[X * LANES + l] + row[X_T * LANES + l] * cell[DT * LANES + l]
        x = cut(x, -CUT, CUT)
        z = row[Z * LANES + l] * grow(x)
        row[Z * LANES + l] = z if z < 300.0 else 300.0
        moved = abs(x)
        worst = cell[WORST * LANES + l]
        cell[WORST * LANES + l] = worst if worst > moved else moved


@kernel
def _iterate_rows(block, cell, rows, joined):
    for r in range(rows):
        row = block[r * ROW : (r + 1) * ROW]
        for l in range(LANES):
            t = row[LEAST * LANES + l] + row[SPARE * LANES + l] + cell[ABOVE * LANES + l]
            row[Z * LANES + l] = inverse_phi(t / row[LEAST * LANES + l] - 1.0)
    sweeps = 0
    while sweeps < _ITERATIONS:
        sweeps += 1
        for l in range(LANES * BOUND, LANES * CELL):
            cell[l] = 0.0
        for r in range(rows):
            _evaluate(block[r * ROW : (r + 1) * ROW], cell)
        if joined:
            total(cell, B)
            total(cell, B_0)
            total(cell, B_T)
        for l in range(LANES):
            b = cell[B * LANES + l]
            band = cell[BAND * LANES + l]
            missing = 2.0 * (band - b) / (band + b) * b - cell[B_0 * LANES + l]
            b_t = cell[B_T * LANES + l]
            dt = cut(missing / (b_t if b_t < -1e-300 else -1e-300), -CUT, CUT)
            cell[DT * LANES + l] = dt
            cell[ABOVE * LANES + l] *= grow(dt)
            cell[WORST * LANES + l] = abs(dt)
        for r in range(rows):
            _advance(block[r * ROW : (r + 1) * ROW], cell)
        if farthest(cell, WORST) <= CLOSE:
            break
    return sweeps


@entry
def _iterate(block, cell, rows, joined):
    return _iterate_rows(block, cell, rows, joined)


@kernel
def _spare(row, cell):
    """Return how much earlier than the last device a device could end, given all the bandwidth there is."""
    for l in range(LANES):
        spare = cell[FLOOR * LANES + l] - (row[FAST * LANES + l] + row[LEAST * LANES + l])
        row[SPARE * LANES + l] = spare if spare > 0.0 else 0.0
        # its time in an even share of the band, where M_0 is the number of devices
        share = cell[BAND * LANES + l] / cell[M_0 * LANES + l]
        a = row[A * LANES + l]
        alone = a / (share * log(1.0 + a / (row[LEAST * LANES + l] * share)))
        end = row[WEIGHT * LANES + l] * (row[FAST * LANES + l] + alone)
        most = cell[M * LANES + l]
        cell[M * LANES + l] = most if most > end else end


@kernel
def _start(block, cell, rows, joined):
    """Guess T - floor: between a device alone and one with an even share of the band."""
    for l in range(LANES):
        cell[M * LANES + l] = 0.0
        cell[M_0 * LANES + l] = 0.0
    for r in range(rows):
        for l in range(LANES):
            cell[M_0 * LANES + l] += block[r * ROW + WEIGHT * LANES + l]
    if joined:
        total(cell, M_0)
    for r in range(rows):
        _spare(block[r * ROW : (r + 1) * ROW], cell)
    if joined:
        largest(cell, M)
    for l in range(LANES):
        floor = cell[FLOOR * LANES + l]
        low = max(cell[M_T * LANES + l] - floor, 1e-12 * floor)
        high = max(cell[M * LANES + l] - floor, low)
        cell[ABOVE * LANES + l] = math.sqrt(low * high)


@kernel
def _price(row, cell):
    """Raise ``LAM`` to where every device wants the least band and full speed; set ``W``.

    ``lam G = psi t (1 + n)`` with ``n e^z`` at least what computing at full speed costs.
    """
    for l in range(LANES):
        least = row[LEAST * LANES + l]
        t = least + (row[SPARE * LANES + l] + cell[ABOVE * LANES + l])
        z = row[Z * LANES + l]
        e, expm1 = exp_pair(z)
        p = psi(z, expm1)
        g = row[G * LANES + l]
        fast = row[FAST * LANES + l]
        steep = row[TWICE_C * LANES + l] / (fast * fast * fast if fast > 0.0 else 1.0)
        # with one frequency only, computing faster is no alternative to paying
        steep = steep if row[SLOW * LANES + l] > fast * (1.0 + 1e-15) else 0.0
        extra = steep * t * g / row[A * LANES + l] - p / z
        extra = (extra if extra > 0.0 else 0.0) / e
        lam = row[WEIGHT * LANES + l] * t * p * (1.0 + extra) / g
        most = cell[LAM * LANES + l]
        cell[LAM * LANES + l] = most if most > lam else lam
        row[W * LANES + l] = fast / t


@kernel
def _idle_end(device, i):
    """Return when the devices without payload have computed, at the earliest."""
    end = 0.0
    for k in range(device.shape[2]):
        if device[i, DEVICE_PAYLOAD, k] <= 0.0:
            end = max(end, device[i, DEVICE_WORK, k] / device[i, DEVICE_F_MAX, k])
    return end


@entry
def shortest(device, cell, points, scalars):
    """Fill ``points`` [instance, 6, device] and ``scalars`` with the shortest rounds.

    The prices are the least that support them.  Where a device without payload ends last the
    others have time to spare: that is for ``least_energy``, and not marked as converged here.
    """
    instances, _, devices = device.shape
    cells = np.zeros(CELL * LANES)
    lanes = by_lanes(instances, devices)
    rows = devices if lanes else (devices + LANES - 1) // LANES
    block = np.zeros(rows * ROW)
    sweeps = 0
    width = LANES if lanes else 1
    for start in range(0, instances, width):
        any_live = False
        for lane in range(width):
            i = min(start + lane, instances - 1)
            load(block, cells, device, cell, i, lane, not lanes)
            live = first_live(device, i) >= 0
            scalars[i, SCALAR_CONVERGED] = 1.0 if live else 0.0
            any_live = any_live or live
        if not any_live:
            continue
        take_in(block, cells, rows, not lanes, True)
        _start(block, cells, rows, not lanes)
        sweeps += _iterate(block, cells, rows, not lanes) * width
        for l in range(LANES):
            cells[TIME * LANES + l] = cells[FLOOR * LANES + l] + cells[ABOVE * LANES + l]
            cells[LAM * LANES + l] = 0.0
        for r in range(rows):
            _price(block[r * ROW : (r + 1) * ROW], cells)
        if not lanes:
            largest(cells, LAM)
        good = lanes or all_close(cells)
        finish(block, cells, rows, not lanes)
        for lane in range(min(width, instances - start)):
            i = start + lane
            close = good and cells[WORST * LANES + lane] <= CLOSE
            late = _idle_end(device, i) > cells[TIME * LANES + lane]
            if scalars[i, SCALAR_CONVERGED] > 0.0 and close and not late:
                take_out(block, cells, device, i, lane, not lanes, points, scalars)
            else:
                scalars[i, SCALAR_CONVERGED] = 0.0
    return sweeps
