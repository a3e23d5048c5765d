r"""TDMA (FEDL) by Newton on all devices and the price of time at once, compiled for whole registers.

The formulas are those of ``tdma.py``.  At a price of time ``mu`` every upload is on its own,

.. math:: \psi(z_k) = \mu G_k/B \ \text{within}\ [\psi(z^{\min}_k), \psi(z^{\max}_k)], \qquad
          t_k = \frac{a_k}{B z_k},

and all compute until the largest ``Tc`` with ``W(Tc)/Tc^3 >= mu``, where ``W`` adds up
``2 kappa c^3`` of the devices above their floor.  A sweep takes one Newton step in ``log z_k`` for
each device; if the round is given, ``mu`` takes one in ``log mu`` at the same time, and the next
sweep starts from where the devices should be by then.  The time at a price falls continuously with
it, flat here and there, so the price is kept in a bracket.

Nothing here is trusted: what is infeasible or has not converged is left to ``tdma.py``.  Blocks are
laid out as in ``block.py``; slots without payload are a live device that takes no time.
"""

from __future__ import annotations

import math

import numpy as np

from pwff_solvers.allocation.registers import (
    CLOSE,
    LANES,
    by_lanes,
    cut,
    farthest,
    first_live,
    grow,
    inverse_psi,
    largest,
    psi,
    spread,
    total,
)
from pwff_solvers.allocation.slots import (
    CELL_BAND,
    CELL_DELAY,
    CELL_NOISE,
    DEVICE_F_MAX,
    DEVICE_F_MIN,
    DEVICE_FIXED_ENERGY,
    DEVICE_GAIN,
    DEVICE_KAPPA,
    DEVICE_PAYLOAD,
    DEVICE_POWER_MAX,
    DEVICE_POWER_MIN,
    DEVICE_WORK,
    POINT_BAND,
    POINT_COMPUTE,
    POINT_ENERGY,
    POINT_FREQUENCY,
    POINT_POWER,
    POINT_UPLOAD,
    SCALAR_CONVERGED,
    SCALAR_LAM,
    SCALAR_MU,
    SCALAR_SLOPE,
    SCALAR_TIME,
)
from pwff_solvers.compiled.elementary import cbrt, entry, exp_pair, kernel, log, log1p

__all__ = ["least_energy_tdma", "shortest_tdma", "weighted_tdma"]

_LN2 = math.log(2.0)
_ITERATIONS = 48
_ROUGH = 3  # sweeps without exponential, for the first guess of the price
_STEP = 3.6  # largest step of log mu: then those of log z stay below 1.8
_EDGE = 1e-11  # the shortest round counts as feasible up to here
_SHORTEST, _LEAST, _WEIGHTED = 0, 1, 2

# Fields of a row of slots, each LANES numbers.
SECONDS = 0  # a/B [s], upload time per unit of z; 0 without payload
GAIN = 1  # G/B [1/W]
Z_MIN = 2  # first the limits of the power [W]
Z_MAX = 3
P_MIN = 4  # psi(Z_MIN)
P_MAX = 5
Z = 6
FALL = 7  # dlog z/dlog mu
T = 8
POWER = 9
ROW = 10 * LANES

# Fields of the cell, each LANES numbers.
TIME = 0  # T [s], fixed delay taken off
BAND = 1
MU = 2  # price of time [W]
LEVEL = 3  # its logarithm
STEP = 4  # step of the latter
LOW = 5  # its bracket
HIGH = 6
FIXED = 7  # 1 where the price is not searched
EARLIEST = 8  # max c/f_max [s]
SLOWEST = 9  # max c/f_min [s]
DEADLINE = 10
ABOVE = 11  # W of the devices above their floor
UPPER = 12  # the floor that ends it [s]
TOP = 13  # least price at which everything is as fast as it can
LAM = 14
WORST = 15  # largest step just taken
SUM = 16  # of upload times
SLOPE = 17  # its fall with log mu
LEAST = 18  # upload at full power
MOST = 19  # upload at least power
DOUBT = 20  # what the sum of upload times may be wrong by


# --- in ------------------------------------------------------------------------------------------


@kernel
def _load(block, cells, device, cell, i, lane, joined):
    """Copy an instance into a lane, or into the whole block if ``joined``."""
    devices = device.shape[2]
    stand_in = max(first_live(device, i), 0)
    band = cell[i, CELL_BAND]
    per_watt = 1.0 / (cell[i, CELL_NOISE] * band)
    nats_per_band = _LN2 / band
    slots = (devices + LANES - 1) // LANES * LANES if joined else devices
    for slot in range(slots):
        k = slot if slot < devices and device[i, DEVICE_PAYLOAD, slot] > 0.0 else stand_in
        at = slot // LANES * ROW + slot % LANES if joined else slot * ROW + lane
        block[at + SECONDS * LANES] = (
            device[i, DEVICE_PAYLOAD, k] * nats_per_band if k == slot else 0.0
        )
        block[at + GAIN * LANES] = device[i, DEVICE_GAIN, k] * per_watt
        block[at + Z_MIN * LANES] = device[i, DEVICE_POWER_MIN, k]
        block[at + Z_MAX * LANES] = device[i, DEVICE_POWER_MAX, k]
    earliest = 0.0
    slowest = 0.0
    for k in range(devices):
        work = device[i, DEVICE_WORK, k]
        earliest = max(earliest, work / device[i, DEVICE_F_MAX, k])
        slowest = max(slowest, work / device[i, DEVICE_F_MIN, k] if work > 0.0 else 0.0)
    cells[BAND * LANES + lane] = band
    cells[EARLIEST * LANES + lane] = earliest
    cells[SLOWEST * LANES + lane] = max(slowest, earliest)


@kernel
def _load_floors(supply, device, i, earliest):
    """List where ``W(Tc)`` grows as Tc falls; return the number of steps, and the price for all.

    ``supply[:, j]`` is a floor ``c/f_min``, its cube and W below it; the first is that of the
    devices without floor, after the last is 0.  Floors before ``earliest`` do not matter.
    """
    count = 0
    base = 0.0
    top = 0.0
    for k in range(device.shape[2]):
        work = device[i, DEVICE_WORK, k]
        weight = 2.0 * device[i, DEVICE_KAPPA, k] * work * work * work
        least = device[i, DEVICE_F_MIN, k]
        if work > 0.0 and work / earliest > least:
            top += weight
            if least > 0.0:
                count += 1
                supply[0, count] = work / least
                supply[2, count] = weight
            else:
                base += weight
    gap = count // 2
    while gap > 0:
        for j in range(1 + gap, count + 1):
            floor = supply[0, j]
            weight = supply[2, j]
            at = j
            while at > gap and supply[0, at - gap] < floor:
                supply[0, at] = supply[0, at - gap]
                supply[2, at] = supply[2, at - gap]
                at -= gap
            supply[0, at] = floor
            supply[2, at] = weight
        gap //= 2
    supply[0, 0] = supply[1, 0] = np.inf
    supply[2, 0] = base
    for j in range(1, count + 1):
        supply[1, j] = supply[0, j] * supply[0, j] * supply[0, j]
        supply[2, j] += supply[2, j - 1]
    supply[1, count + 1] = 0.0
    cube = earliest * earliest * earliest
    return count, top / (cube if cube > 0.0 else 1.0)


@kernel
def _limits(row, cell):
    """Derive the limits of z from those of the power; gather the extremes."""
    for l in range(LANES):
        gain = row[GAIN * LANES + l]
        seconds = row[SECONDS * LANES + l]
        least = log1p(row[Z_MIN * LANES + l] * gain)
        most = log1p(row[Z_MAX * LANES + l] * gain)
        least = least if least > 1e-150 else 1e-150
        _, low = exp_pair(least)
        _, high = exp_pair(most)
        low = psi(least, low)
        high = psi(most, high)
        row[Z_MIN * LANES + l] = least
        row[Z_MAX * LANES + l] = most
        row[P_MIN * LANES + l] = low
        row[P_MAX * LANES + l] = high
        row[Z * LANES + l] = most
        row[FALL * LANES + l] = 0.0
        top = cell[TOP * LANES + l]
        high = high / gain if seconds > 0.0 else 0.0
        cell[TOP * LANES + l] = top if top > high else high
        cell[LEAST * LANES + l] += seconds / most
        cell[MOST * LANES + l] += seconds / least
        # for the first guess: all the payload, and with what gain
        cell[SUM * LANES + l] += seconds
        cell[SLOPE * LANES + l] += seconds / math.sqrt(gain)


# --- the iteration ---------------------------------------------------------------------------------


@kernel
def _supply(cells, supply, counts, joined):
    """Find the part of ``W`` that decides the deadline: a bisection, W rises as floors fall."""
    for lane in range(1 if joined else LANES):
        mu = cells[MU * LANES + lane]
        low = 0
        high = counts[lane]
        while low < high:
            middle = (low + high) // 2
            if supply[lane, 2, middle] >= mu * supply[lane, 1, middle + 1]:
                high = middle
            else:
                low = middle + 1
        cells[ABOVE * LANES + lane] = supply[lane, 2, low]
        cells[UPPER * LANES + lane] = supply[lane, 0, low]
    if joined:
        for lane in range(1, LANES):
            cells[ABOVE * LANES + lane] = cells[ABOVE * LANES]
            cells[UPPER * LANES + lane] = cells[UPPER * LANES]


@kernel
def _deadline(cell):
    """Find ``Tc = max(earliest, min(floor, (W/mu)^(1/3)))``; it counts in ``SLOPE`` where it moves."""
    for l in range(LANES):
        free = cbrt(cell[ABOVE * LANES + l] / cell[MU * LANES + l])
        earliest = cell[EARLIEST * LANES + l]
        time = cut(free, earliest, cell[UPPER * LANES + l])
        time = time if time > earliest else earliest
        cell[DEADLINE * LANES + l] = time
        cell[SLOPE * LANES + l] += time * (1 / 3) if time == free else 0.0


@kernel
def _guess(row, cell):
    """Guess the efficiencies within a third."""
    for l in range(LANES):
        wanted = cell[MU * LANES + l] * row[GAIN * LANES + l]
        p = cut(wanted, row[P_MIN * LANES + l], row[P_MAX * LANES + l])
        z = inverse_psi(p)
        z = cut(z, row[Z_MIN * LANES + l], row[Z_MAX * LANES + l])
        t = row[SECONDS * LANES + l] / z
        fall = 1.0 / (2.0 + 0.8 * z)
        fall = fall if p == wanted else 0.0
        row[Z * LANES + l] = z
        row[FALL * LANES + l] = fall
        cell[SUM * LANES + l] += t
        cell[SLOPE * LANES + l] += t * fall


@kernel
def _advance(row, cell):
    """Follow the price, take a Newton step of ``log psi = log(mu G/B)`` in log z, add up the times.

    With ``2 (n-d)/(n+d)`` for the logarithm of ``n/d`` no step is longer than 1.
    """
    for l in range(LANES):
        wanted = cell[MU * LANES + l] * row[GAIN * LANES + l]
        p = cut(wanted, row[P_MIN * LANES + l], row[P_MAX * LANES + l])
        z = row[Z * LANES + l] * grow(row[FALL * LANES + l] * cell[STEP * LANES + l])
        z = z if z < 300.0 else 300.0
        inv_z = 1.0 / z
        e, expm1 = exp_pair(z)
        n = psi(z, expm1)
        over = n * inv_z * inv_z / ((n + p) * e)
        x = 2.0 * (p - n) * over
        fall = (n + p) * over
        fall = fall if p == wanted else 0.0
        t = row[SECONDS * LANES + l] * inv_z * grow(-x)
        row[Z * LANES + l] = z * grow(x)
        row[FALL * LANES + l] = fall
        cell[SUM * LANES + l] += t
        cell[SLOPE * LANES + l] += t * fall
        moved = abs(x) * (1.0 + z)
        cell[DOUBT * LANES + l] += t * abs(x) * moved
        worst = cell[WORST * LANES + l]
        cell[WORST * LANES + l] = worst if worst > moved else moved


@kernel
def _move(cell, rough):
    """Take a Newton step on ``log(time taken/T)`` in ``log mu``, in its bracket.

    ``WORST`` covers the step and, a million times, what it leaves of the logarithm.
    """
    for l in range(LANES):
        taken = cell[SUM * LANES + l] + cell[DEADLINE * LANES + l]
        time = cell[TIME * LANES + l]
        level = cell[LEVEL * LANES + l]
        worst = cell[WORST * LANES + l]
        low = cell[LOW * LANES + l]
        high = cell[HIGH * LANES + l]
        value = log(taken / time)
        slope = cell[SLOPE * LANES + l] / taken
        slope = slope if slope > 1e-300 else 1e-300
        # the bracket may only rely on what the devices' own steps leave certain
        doubt = cell[DOUBT * LANES + l] / taken + 1e-15
        doubt = 1e300 if rough or worst > 1.0 else doubt
        low = level if value > doubt else low
        high = level if value < -doubt else high
        new = level + cut(value / slope, -_STEP, _STEP)
        middle = 0.5 * (low + high)
        middle = middle if low > -1e300 else level - _STEP
        new = new if new > low else middle
        new = new if new < high else middle
        step = cut(new - level, -_STEP, _STEP)
        # and rather waits for devices far behind than to be led astray
        step = 0.0 if worst > 0.5 and abs(value) <= doubt else step
        fixed = cell[FIXED * LANES + l] > 0.0
        step = 0.0 if abs(value) <= 1e-15 or fixed else step
        mu, _ = exp_pair(level + step)
        moved = abs(step) if abs(value) > 1e-13 else 0.0
        left = 1e6 * abs(value - slope * step)
        moved = moved if moved > left else left
        moved = 0.0 if fixed else moved
        cell[LOW * LANES + l] = low
        cell[HIGH * LANES + l] = high
        cell[LEVEL * LANES + l] = level + step
        cell[MU * LANES + l] = mu
        cell[STEP * LANES + l] = step
        cell[WORST * LANES + l] = worst if worst > moved else moved


@kernel
def _clear(cell):
    for l in range(LANES):
        cell[DOUBT * LANES + l] = 0.0
        cell[SUM * LANES + l] = 0.0
        cell[SLOPE * LANES + l] = 0.0
        cell[WORST * LANES + l] = 0.0


@kernel
def _gather(cell, supply, counts, joined):
    """Complete the sums over devices, and add the deadline."""
    if joined:
        total(cell, SUM)
        total(cell, SLOPE)
        total(cell, DOUBT)
        largest(cell, WORST)
    _supply(cell, supply, counts, joined)
    _deadline(cell)


@entry
def _iterate(block, cell, rows, supply, counts, joined, search):
    """Iterate until every lane has converged, or the limit; return the number of sweeps."""
    for _ in range(_ROUGH if search else 1):
        _clear(cell)
        for r in range(rows):
            _guess(block[r * ROW : (r + 1) * ROW], cell)
        _gather(cell, supply, counts, joined)
        if search:
            _move(cell, True)
    sweeps = 0
    while sweeps < _ITERATIONS:
        sweeps += 1
        _clear(cell)
        for r in range(rows):
            _advance(block[r * ROW : (r + 1) * ROW], cell)
        _gather(cell, supply, counts, joined)
        if search:
            _move(cell, False)
        if farthest(cell, WORST) <= CLOSE:
            break
    _supply(cell, supply, counts, joined)
    _deadline(cell)
    return sweeps


@kernel
def _start(cell, kind):
    """Set the price of time, or guess it: what uploads alone, or computing alone, would cost for ``T``."""
    for l in range(LANES):
        time = cell[TIME * LANES + l]
        top = cell[TOP * LANES + l]
        least = cell[LEAST * LANES + l] + cell[EARLIEST * LANES + l]
        slowest = cell[MOST * LANES + l] + cell[SLOWEST * LANES + l]
        searched = least < time and slowest > time
        z = cut(1.4 * cell[SUM * LANES + l] / time, 1e-9, 100.0)
        _, expm1 = exp_pair(z)
        nats = cell[SUM * LANES + l]
        ratio = cell[SLOPE * LANES + l] / (nats if nats > 0.0 else 1.0)  # G/B to the power -1/2
        upload = psi(z, expm1) * ratio * ratio
        compute = 2.7 * cell[ABOVE * LANES + l] / (time * time * time)
        mu = upload if upload > compute else compute
        mu = mu if searched and mu < top else top
        mu = mu if mu > 1e-290 else 1e-290
        mu = cell[MU * LANES + l] if kind == _WEIGHTED else mu
        level = log(mu)
        cell[FIXED * LANES + l] = 0.0 if searched else 1.0
        cell[MU * LANES + l] = mu
        cell[LEVEL * LANES + l] = level
        cell[STEP * LANES + l] = 0.0
        cell[LOW * LANES + l] = -np.inf
        cell[HIGH * LANES + l] = log(top) + 1e-9


# --- out -----------------------------------------------------------------------------------------


@kernel
def _settle(row, cell, kind):
    """Set z where a limit of the round decides it; then upload times, powers and values of band.

    ``dE/dB = -(p + mu) t psi/(B z e^z)`` by the envelope theorem at fixed power.
    """
    for l in range(LANES):
        least = row[Z_MIN * LANES + l]
        most = row[Z_MAX * LANES + l]
        z = row[Z * LANES + l] * grow(row[FALL * LANES + l] * cell[STEP * LANES + l])
        z = cut(z, least, most)
        time = cell[TIME * LANES + l]
        at_end = cell[LEAST * LANES + l] + cell[EARLIEST * LANES + l] >= time
        at_rest = cell[MOST * LANES + l] + cell[SLOWEST * LANES + l] <= time
        z = least if kind == _LEAST and at_rest else z
        z = most if kind == _SHORTEST or (kind == _LEAST and at_end) else z
        e, expm1 = exp_pair(z)
        t = row[SECONDS * LANES + l] / z
        power = expm1 / row[GAIN * LANES + l]
        mu = 0.0 if kind == _LEAST and at_rest else cell[MU * LANES + l]
        row[T * LANES + l] = t
        row[POWER * LANES + l] = power
        cell[SUM * LANES + l] += t
        cell[LAM * LANES + l] += (power + mu) * t * psi(z, expm1) / (z * e)


@kernel
def _take_out(block, cells, device, i, lane, joined, points, scalars, kind):
    """Copy an instance's answers out."""
    upload = cells[SUM * LANES + lane]
    earliest = cells[EARLIEST * LANES + lane]
    slowest = cells[SLOWEST * LANES + lane]
    deadline = cells[DEADLINE * LANES + lane]
    time = upload + deadline
    mu = cells[MU * LANES + lane]
    if kind == _SHORTEST:
        deadline = earliest
        time = upload + deadline
    elif kind == _LEAST:
        time = cells[TIME * LANES + lane]
        # what rounding left goes to the computing part, unless that drowns in it
        spare = time - upload
        deadline = deadline if abs(spare - deadline) <= 1e-13 * time else max(spare, earliest)
        if cells[LEAST * LANES + lane] + earliest >= time:
            deadline = earliest
        if cells[MOST * LANES + lane] + slowest <= time:
            deadline = slowest
            mu = 0.0
    for k in range(device.shape[2]):
        work = device[i, DEVICE_WORK, k]
        f = work / deadline if work > 0.0 else 0.0
        f = max(min(f, device[i, DEVICE_F_MAX, k]), device[i, DEVICE_F_MIN, k])
        energy = device[i, DEVICE_KAPPA, k] * work * f * f + device[i, DEVICE_FIXED_ENERGY, k]
        b = p = t = 0.0
        if device[i, DEVICE_PAYLOAD, k] > 0.0:
            at = k // LANES * ROW + k % LANES if joined else k * ROW + lane
            b = cells[BAND * LANES + lane]
            t = block[at + T * LANES]
            p = block[at + POWER * LANES]
        points[i, POINT_BAND, k] = b
        points[i, POINT_POWER, k] = p
        points[i, POINT_FREQUENCY, k] = f
        points[i, POINT_UPLOAD, k] = t
        points[i, POINT_COMPUTE, k] = work / f if work > 0.0 else 0.0
        points[i, POINT_ENERGY, k] = energy + p * t
    scalars[i, SCALAR_CONVERGED] = 1.0
    scalars[i, SCALAR_TIME] = time
    scalars[i, SCALAR_LAM] = cells[LAM * LANES + lane] / cells[BAND * LANES + lane]
    scalars[i, SCALAR_MU] = mu
    scalars[i, SCALAR_SLOPE] = 0.0


@entry
def _solve(device, cell, target, points, scalars, kind):
    instances, _, devices = device.shape
    cells = np.zeros((DOUBT + 1) * LANES)
    lanes = by_lanes(instances, devices)
    joined = not lanes
    rows = devices if lanes else (devices + LANES - 1) // LANES
    width = LANES if lanes else 1
    block = np.zeros(rows * ROW)
    supply = np.zeros((width, 3, devices + 2))
    counts = np.zeros(width, dtype=np.int64)
    sweeps = 0
    for start in range(0, instances, width):
        cells[:] = 0.0
        for lane in range(width):
            i = min(start + lane, instances - 1)
            _load(block, cells, device, cell, i, lane, joined)
            earliest = cells[EARLIEST * LANES + lane]
            counts[lane], top = _load_floors(supply[lane], device, i, earliest)
            cells[TOP * LANES + lane] = top
            cells[ABOVE * LANES + lane] = supply[lane, 2, counts[lane]]
            time = target[i] - cell[i, CELL_DELAY] if kind == _LEAST else 1.0
            cells[TIME * LANES + lane] = time if time > 0.0 else 1e-300
            cells[MU * LANES + lane] = target[i] if kind == _WEIGHTED else 1.0
        if joined:
            spread(cells)
        for r in range(rows):
            _limits(block[r * ROW : (r + 1) * ROW], cells)
        if joined:
            largest(cells, TOP)
            total(cells, LEAST)
            total(cells, MOST)
            total(cells, SUM)
            total(cells, SLOPE)
        _start(cells, kind)
        if kind == _SHORTEST:
            cells[WORST * LANES : (WORST + 1) * LANES] = 0.0
        else:
            sweeps += _iterate(block, cells, rows, supply, counts, joined, kind == _LEAST) * width
        cells[SUM * LANES : (SUM + 1) * LANES] = 0.0
        for r in range(rows):
            _settle(block[r * ROW : (r + 1) * ROW], cells, kind)
        if joined:
            total(cells, SUM)
            total(cells, LAM)
        for lane in range(min(width, instances - start)):
            i = start + lane
            least = cells[LEAST * LANES + lane] + cells[EARLIEST * LANES + lane]
            time = cells[TIME * LANES + lane]
            fixed = kind == _LEAST and cells[FIXED * LANES + lane] > 0.0
            good = cells[EARLIEST * LANES + lane] > 0.0 or first_live(device, i) >= 0
            good = good and (fixed or cells[WORST * LANES + lane] <= CLOSE)
            if good and (kind != _LEAST or least <= time * (1.0 + _EDGE)):
                _take_out(block, cells, device, i, lane, joined, points, scalars, kind)
            else:
                scalars[i, SCALAR_CONVERGED] = 0.0
    return sweeps


@entry
def shortest_tdma(device, cell, points, scalars):
    """Fill ``points`` [instance, 6, device] and ``scalars`` with the shortest rounds."""
    return _solve(
        device, cell, np.ascontiguousarray(cell[:, CELL_DELAY]), points, scalars, _SHORTEST
    )


@entry
def least_energy_tdma(device, cell, target, points, scalars):
    """Fill ``points`` and ``scalars`` for rounds ``target`` [s], fixed delay included."""
    return _solve(device, cell, target, points, scalars, _LEAST)


@entry
def weighted_tdma(device, cell, target, points, scalars):
    """Fill ``points`` and ``scalars`` for prices of time ``target`` [W]."""
    return _solve(device, cell, target, points, scalars, _WEIGHTED)
