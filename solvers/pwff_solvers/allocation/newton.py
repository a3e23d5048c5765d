r"""FDMA by one Newton iteration on all unknowns at once, compiled for whole registers.

Unknowns of a device are ``x = log z`` (spectral efficiency) and ``y = log(t/(T-t))``; those of an
instance are ``l = log lam`` (price of bandwidth) and, for ``Weighted``, ``T``.  With ``u = (T-t)/T``,
``psi(z) = 1 + (z-1)e^z`` and ``phi(z) = (e^z-1)/z`` a device satisfies two equations, written as
logarithms of ratios:

.. math::
    \text{free:}\quad  & \psi(z)\,t = \lambda G, &
        2\kappa c^3 z\,t^2/(T-t)^3 &= \lambda a, \\
    \text{at full power:}\quad & \varphi(z)\,a/(PG) = t, &
        \big(2\kappa c^3/(T-t)^3 + P\big)\,\psi(z)\,t^2 &= \lambda a\,e^z,

or ``t`` sits at ``T - c/f_max`` or ``T - c/f_min`` and only the first holds.  ``sum b = B`` and
``sum mu = w`` close the system.  Eliminating the two unknowns of each device leaves one or two
equations, so an iteration is one sweep over the devices and a handful of scalars.  In logarithms
the system is nearly linear: six or seven iterations from the start below are typical.

Nothing here is trusted: an instance that has not converged, or whose certificate is not
perfect, is solved again by the bracketed search in ``fdma.py``.

A *block* has ``LANES`` columns and some rows of slots.  Either a column is an instance and a row
a device (few devices), or the whole block is one instance, its devices laid out row by row.
"""

from __future__ import annotations

import math

import numpy as np

from pwff_solvers.allocation.elementary import entry, exp_pair, kernel, log

__all__ = ["LANES", "SCALARS", "least_energy", "shortest", "weighted", "weighted_carefully"]

LANES = 16
# Scalars of a solution: converged, time, price of bandwidth, price of time, slope of the latter.
SCALARS = 5
# The last step taken; quadratic convergence leaves about its square.
_CLOSE = 1e-5
_ITERATIONS = 24
_CAREFUL = 600
# log-steps are cut here, well inside the range of the rational exponential below
_CUT = 1.8
_LN2 = math.log(2.0)
# A block of instances waits for its slowest, which costs about this factor.
_LANES_COST = 1.35

# Fields of a row of slots, each LANES numbers.
_WEIGHT = 0  # 1 for a device with payload, else 0
_A = 1  # payload [nat]
_G = 2  # gain over noise density [Hz/W]
_LEAST = 3  # a/(PG) [s], upload time at full power in unlimited bandwidth
_TWICE_C = 4  # 2 kappa c^3 [W s^3]
_FAST = 5  # c/f_max [s]
_SLOW = 6  # c/f_min [s]
_Z = 7
_INV_Z = 8
_W = 9  # (T-t)/t
_W_MIN = 10
_W_MAX = 11
# the step: dx = X + X_L dl + X_T dlogT - X_Y dy,  dy = Y + Y_L dl + Y_T dlogT
_X = 12
_X_L = 13
_X_T = 14
_X_Y = 15
_Y = 16
_SPARE = 16  # only for the shortest round: its floor less fast and least [s]
_Y_L = 17
_Y_T = 18
_FIELDS = 19
_ROW = _FIELDS * LANES


@kernel
def _cut(x, low, high):
    x = x if x > low else low
    return x if x < high else high


@kernel
def _grow(d):
    """Return ``e^d`` to third order, for |d| < 2."""
    return (2.0 + d) / (2.0 - d)


@kernel
def _psi(z, expm1):
    series = z * z * (0.5 + z * (1 / 3 + z * (0.125 + z * (1 / 30 + z * (1 / 144)))))
    closed = z + (z - 1.0) * expm1
    return series if z < 0.02 else closed


@kernel
def _inverse_psi(p):
    """Return z with ``psi(z) = p``, within a third or so: a start."""
    root = math.sqrt(2.0 * p)
    level = log(p + 1.718)
    large = level - log(level)
    large = large if large > 1.0 else 1.0
    return root / (1.0 + root * (1 / 3)) if p < 1.0 else large


@kernel
def _inverse_phi(excess):
    """Return z with ``phi(z) = 1 + excess``, within a fifth or so: a start."""
    level = log(1.0 + (excess if excess > 1e-9 else 1e-9))
    return level + log(1.0 + level)


# Fields of the cell, each LANES numbers.
_TIME = 0  # T [s], fixed delay taken off
_BAND = 1
_LAM = 2  # price of bandwidth [J/Hz]
_WANTED = 3  # price of time to be met [W]; free time only
_FLOOR = 4  # T is above this [s]; free time only
_INV_T = 5
_PRICE = 6  # lam/T
_DL = 7
_DT = 8  # step of log T
_WORST = 9  # largest step just taken
_BOUND = 10  # bandwidth of devices that do not answer to the price
_BOUND_T = 11
_B = 12  # bandwidth of the others, and its change with the step
_B_0 = 13
_B_L = 14
_B_T = 15
_M = 16  # price of time, and its change with the step
_M_0 = 17
_M_L = 18
_M_T = 19
_ABOVE = 3  # only for the shortest round: T above its floor
_CELL = 20


@kernel
def _limits(row, cell):
    """Set the limits of ``(T-t)/t`` that the CPU frequencies imply."""
    for l in range(LANES):
        inv_t = cell[_INV_T * LANES + l]
        fast = row[_FAST * LANES + l] * inv_t
        slow = row[_SLOW * LANES + l] * inv_t
        low = fast / (1.0 - fast)
        low = low if low > 1e-18 else 1e-18
        high = slow / (1.0 - slow) if slow < 1.0 else 1e300
        row[_W_MIN * LANES + l] = low
        row[_W_MAX * LANES + l] = high if high > low else low


@kernel
def _start_times(row, cell):
    """First guess of the split of time, and what it asks of the common price.

    Computing alone would want ``((T-t)/T)^3 = 2 kappa c^3 G/(a T^2)``; uploading must leave a
    device enough time to make do with a part of the band.
    """
    for l in range(LANES):
        inv_t = cell[_INV_T * LANES + l]
        a = row[_A * LANES + l]
        g = row[_G * LANES + l]
        least = row[_LEAST * LANES + l]
        ratio = row[_TWICE_C * LANES + l] * g / a * inv_t * inv_t
        w, _ = exp_pair(log(ratio + 1e-300) * (1 / 3))
        band = cell[_BAND * LANES + l]
        alone = a / (band * log(1.0 + a / (least * band)))
        most = 1.0 / (1.5 * alone * inv_t) - 1.0
        w = _cut(w if w < most else most, row[_W_MIN * LANES + l], row[_W_MAX * LANES + l])
        need = row[_WEIGHT * LANES + l] * a * inv_t * (1.0 + w)
        row[_W * LANES + l] = w
        cell[_B * LANES + l] += need
        cell[_B_L * LANES + l] -= need * (log(1.0 + w) + log(g))


@kernel
def _start_rates(row, cell):
    """First guess of z: what the price asks, but no more than full power allows."""
    for l in range(LANES):
        stretch = 1.0 + row[_W * LANES + l]  # T/t
        priced = _inverse_psi(cell[_PRICE * LANES + l] * row[_G * LANES + l] * stretch)
        least = row[_LEAST * LANES + l] * cell[_INV_T * LANES + l] * stretch
        powered = _inverse_phi(1.0 / least - 1.0)
        z = priced if priced < powered else powered
        row[_Z * LANES + l] = z
        row[_INV_Z * LANES + l] = 1.0 / z


@kernel
def _evaluate(row, cell, free_time):
    """Find the step of a row of devices as a linear function of the cell's, and add up."""
    for l in range(LANES):
        inv_t = cell[_INV_T * LANES + l]
        z = row[_Z * LANES + l]
        w = row[_W * LANES + l]
        inv_z = row[_INV_Z * LANES + l]
        least = row[_LEAST * LANES + l] * inv_t
        target = cell[_PRICE * LANES + l] * row[_G * LANES + l]  # psi t/T of a free device
        e, expm1 = exp_pair(z)
        p = _psi(z, expm1)
        stretch = 1.0 + w
        share = 1.0 / stretch  # t/T
        rest = w * share  # (T-t)/T
        share2 = share * share
        rest3 = rest * rest * rest
        # compute/P = cost/rest^3, with compute = 2 kappa c^3/(T-t)^3
        cost = row[_TWICE_C * LANES + l] * row[_G * LANES + l] / row[_A * LANES + l]
        cost = cost * inv_t * inv_t * least
        # the equation nearer to being violated holds: psi t = lam G or phi least = t
        full = share2 * p * z < least * expm1 * target
        inverse = 1.0 / (p * expm1)
        rho = z * z * e * expm1 * inverse  # dlog psi/dx
        grow = p * p * inverse  # dlog phi/dx
        n1 = least * expm1 if full else p * share
        d1 = share * z if full else target
        n2 = ((cost + rest3) * p if full else cost * z) * share2
        d2 = target * least * rest3 * (e if full else 1.0)
        s1 = n1 + d1
        s2 = n2 + d2
        over = 2.0 / (s1 * s2)
        r1 = (n1 - d1) * s2 * over
        r2 = (n2 - d2) * s1 * over
        part = cost / (cost + rest3)
        j11 = grow if full else rho
        j12 = -rest if full else rest
        j21 = rho - z if full else 1.0
        j22 = 2.0 * rest + 3.0 * share * (part if full else 1.0)
        l1 = 0.0 if full else 1.0
        t1 = 1.0 if full else -1.0
        t2 = 3.0 * part - 2.0 if full else 1.0
        determinant = j11 * j22 - j12 * j21
        inverse2 = 1.0 / (j11 * determinant)
        inv_11 = determinant * inverse2
        inv_det = j11 * inverse2
        y = (r1 * j21 - r2 * j11) * inv_det
        y_l = (j11 - l1 * j21) * inv_det
        # where the step runs into a limit of t the device will sit there
        y = _cut(y, -_CUT, _CUT)
        w_min = row[_W_MIN * LANES + l]
        w_max = row[_W_MAX * LANES + l]
        to_high = w * (2.0 - y) <= w_min * (2.0 + y)
        to_low = w * (2.0 - y) >= w_max * (2.0 + y)
        pinned = to_high or to_low
        bound = w_min if to_high else w_max
        bound = bound if pinned else w
        y = 2.0 * (w - bound) / (w + bound) if pinned else y
        y_l = 0.0 if pinned else y_l
        x = -r1 * inv_11
        x_l = l1 * inv_11
        x_y = j12 * inv_11
        row[_X * LANES + l] = x
        row[_X_L * LANES + l] = x_l
        row[_X_Y * LANES + l] = x_y
        row[_Y * LANES + l] = y
        row[_Y_L * LANES + l] = y_l
        step = x - x_y * y
        step_l = x_l - x_y * y_l
        b = row[_WEIGHT * LANES + l] * row[_A * LANES + l] * inv_t * stretch * inv_z
        b_0 = _cut(-(step + rest * y), -_CUT, _CUT)
        b_l = -(step_l + rest * y_l)
        held = b_l == 0.0
        cell[_BOUND * LANES + l] += b * _grow(b_0) if held else 0.0
        cell[_B * LANES + l] += 0.0 if held else b
        cell[_B_0 * LANES + l] += 0.0 if held else b * b_0
        cell[_B_L * LANES + l] += b * b_l
        if free_time:
            x_t = t1 * inv_11
            y_t = (t2 * j11 - t1 * j21) * inv_det
            y_t = stretch if pinned else y_t
            row[_X_T * LANES + l] = x_t
            row[_Y_T * LANES + l] = y_t
            step_t = x_t - x_y * y_t
            b_t = -(step_t + rest * y_t + 1.0)
            cell[_BOUND_T * LANES + l] += b * b_t if held else 0.0
            cell[_B_T * LANES + l] += 0.0 if held else b * b_t
            # price of time: lam a/(z t^2), at full power lam a e^z/(psi t^2) - P
            q = cell[_PRICE * LANES + l] * row[_A * LANES + l] * inv_t * stretch * stretch
            q = q * (e * expm1 * inverse if full else inv_z) * row[_WEIGHT * LANES + l]
            power = row[_WEIGHT * LANES + l] * row[_A * LANES + l]
            power = power / (row[_G * LANES + l] * row[_LEAST * LANES + l])
            q_x = z - rho if full else -1.0
            cell[_M * LANES + l] += q - (power if full else 0.0)
            cell[_M_0 * LANES + l] += q * (q_x * step - 2.0 * rest * y)
            cell[_M_L * LANES + l] += q * (1.0 + q_x * step_l - 2.0 * rest * y_l)
            cell[_M_T * LANES + l] += q * (q_x * step_t - 2.0 * rest * y_t - 2.0)


@kernel
def _advance(row, cell, free_time):
    """Take the step."""
    for l in range(LANES):
        dl = cell[_DL * LANES + l]
        dt = cell[_DT * LANES + l]
        y = row[_Y * LANES + l] + row[_Y_L * LANES + l] * dl
        x = row[_X * LANES + l] + row[_X_L * LANES + l] * dl
        if free_time:
            y = y + row[_Y_T * LANES + l] * dt
            x = x + row[_X_T * LANES + l] * dt
        y = _cut(y, -_CUT, _CUT)
        w = row[_W * LANES + l]
        new = _cut(w * _grow(-y), row[_W_MIN * LANES + l], row[_W_MAX * LANES + l])
        y = 2.0 * (w - new) / (w + new)
        x = _cut(x - row[_X_Y * LANES + l] * y, -_CUT, _CUT)
        row[_W * LANES + l] = new
        scale = 1.0 / (4.0 - x * x)
        z = row[_Z * LANES + l] * (2.0 + x) * (2.0 + x) * scale
        inv_z = row[_INV_Z * LANES + l] * (2.0 - x) * (2.0 - x) * scale
        # beyond 300 nat/s/Hz the products above would overflow
        row[_Z * LANES + l] = z if z < 300.0 else 300.0
        row[_INV_Z * LANES + l] = inv_z if z < 300.0 else 1.0 / 300.0
        moved = abs(x) if abs(x) > abs(y) else abs(y)
        worst = cell[_WORST * LANES + l]
        cell[_WORST * LANES + l] = worst if worst > moved else moved


@kernel
def _total(cell, field):
    """Every lane of a sum becomes the sum over lanes: they hold parts of one instance."""
    total = 0.0
    for l in range(LANES):
        total += cell[field * LANES + l]
    for l in range(LANES):
        cell[field * LANES + l] = total


@kernel
def _move_cell(cell, free_time):
    """Find the step of the price of bandwidth, and of the time, and take it."""
    for l in range(LANES):
        b = cell[_B * LANES + l]
        b_l = cell[_B_L * LANES + l]
        b_l = b_l if b_l < -1e-300 else -1e-300
        # the logarithm of the demand is nearly linear in that of the price
        room = cell[_BAND * LANES + l] - cell[_BOUND * LANES + l]
        room = room if room > 1e-3 * b else 1e-3 * b
        missing = 2.0 * (room - b) / (room + b) * b - cell[_B_0 * LANES + l]
        dt = 0.0
        if free_time:
            b_t = cell[_B_T * LANES + l] + cell[_BOUND_T * LANES + l]
            m = cell[_M * LANES + l]
            wanted = cell[_WANTED * LANES + l]
            lacking = 2.0 * (wanted - m) / (wanted + m) * m if m > 0.0 else wanted
            lacking = lacking - cell[_M_0 * LANES + l]
            # dl = (missing - b_t dt)/b_l
            turn = cell[_M_L * LANES + l] / b_l
            slope = cell[_M_T * LANES + l] - turn * b_t
            slope = slope if slope < -1e-300 else -1e-300
            dt = (lacking - turn * missing) / slope
            time = cell[_TIME * LANES + l]
            above = time - cell[_FLOOR * LANES + l]
            dv = _cut(dt * time / above, -_CUT, _CUT)
            new = cell[_FLOOR * LANES + l] + above * _grow(dv)
            dt = 2.0 * (new - time) / (new + time)
            missing = missing - b_t * dt
            cell[_TIME * LANES + l] = new
            cell[_INV_T * LANES + l] = 1.0 / new
            cell[_DT * LANES + l] = dt
            dt = dv
        dl = _cut(missing / b_l, -_CUT, _CUT)
        cell[_DL * LANES + l] = dl
        cell[_LAM * LANES + l] *= _grow(dl)
        cell[_PRICE * LANES + l] = cell[_LAM * LANES + l] * cell[_INV_T * LANES + l]
        cell[_WORST * LANES + l] = abs(dl) if abs(dl) > abs(dt) else abs(dt)


@kernel
def _restart(block, cell, rows, joined):
    """First guess of every unknown but the time."""
    for field in (_B, _B_L):
        for l in range(LANES):
            cell[field * LANES + l] = 0.0
    for l in range(LANES):
        cell[_INV_T * LANES + l] = 1.0 / cell[_TIME * LANES + l]
        cell[_DT * LANES + l] = 0.0
    for r in range(rows):
        row = block[r * _ROW : (r + 1) * _ROW]
        _limits(row, cell)
        _start_times(row, cell)
    if joined:
        _total(cell, _B)
        _total(cell, _B_L)
    for l in range(LANES):
        # the price at which devices of one and the same z would fill the band
        need = cell[_B * LANES + l]
        z = need / cell[_BAND * LANES + l]
        z = _cut(z, 1e-9, 100.0)
        _, expm1 = exp_pair(z)
        mean, _ = exp_pair(cell[_B_L * LANES + l] / need)
        price = _psi(z, expm1) * mean
        cell[_PRICE * LANES + l] = price
        cell[_LAM * LANES + l] = price * cell[_TIME * LANES + l]
    for r in range(rows):
        _start_rates(block[r * _ROW : (r + 1) * _ROW], cell)


@kernel
def _iterate(block, cell, rows, joined, free_time):
    """Iterate until every lane has converged, or the limit; return the number of sweeps."""
    _restart(block, cell, rows, joined)
    sweeps = 0
    while sweeps < _ITERATIONS:
        sweeps += 1
        for l in range(LANES * (_BOUND), LANES * _CELL):
            cell[l] = 0.0
        for r in range(rows):
            _evaluate(block[r * _ROW : (r + 1) * _ROW], cell, free_time)
        if joined:
            for field in range(_BOUND, _CELL if free_time else _B_T):
                _total(cell, field)
        _move_cell(cell, free_time)
        for r in range(rows):
            row = block[r * _ROW : (r + 1) * _ROW]
            if free_time:
                _limits(row, cell)
            _advance(row, cell, free_time)
        worst = 0.0
        for l in range(LANES):
            # not the built-in max: NaN must not pass for converged
            worst = worst if worst > cell[_WORST * LANES + l] else cell[_WORST * LANES + l]
        if worst <= _CLOSE:
            break
    return sweeps


@entry
def _iterate_fixed(block, cell, rows, joined):
    return _iterate(block, cell, rows, joined, False)


@entry
def _iterate_free(block, cell, rows, joined):
    return _iterate(block, cell, rows, joined, True)


@kernel
def _load(block, slot, device, cell, i, k, live):
    """Copy a device into a slot; ``live`` is False for a stand-in that only fills the register."""
    row = slot // LANES * _ROW
    lane = slot % LANES
    a = device[i, 0, k] * _LN2
    work = device[i, 1, k]
    g = device[i, 2, k] / cell[i, 1]
    f_min = device[i, 4, k]
    block[row + _WEIGHT * LANES + lane] = 1.0 if live else 0.0
    block[row + _A * LANES + lane] = a
    block[row + _G * LANES + lane] = g
    block[row + _LEAST * LANES + lane] = a / (device[i, 3, k] * g)
    block[row + _TWICE_C * LANES + lane] = 2.0 * device[i, 6, k] * work * work * work
    block[row + _FAST * LANES + lane] = work / device[i, 5, k]
    block[row + _SLOW * LANES + lane] = _slow(work, f_min)


@kernel
def _slow(work, f_min):
    """Time of computing at the least frequency; for ever where that is 0."""
    if work <= 0.0:
        return 0.0
    return work / f_min if f_min > 0.0 else 1e300


@kernel
def _spread(cells):
    """Every lane becomes the first: the lanes hold one instance."""
    for field in range(_CELL):
        for lane in range(1, LANES):
            cells[field * LANES + lane] = cells[field * LANES]


@kernel
def _all_close(cells):
    """Return whether every lane has converged; NaN has not."""
    for lane in range(LANES):
        if not cells[_WORST * LANES + lane] <= _CLOSE:
            return False
    return True


@kernel
def _first_live(device, i):
    for k in range(device.shape[2]):
        if device[i, 0, k] > 0.0:
            return k
    return -1


@kernel
def _first_time(device, cell, i, price, floor):
    """Return a first guess [s] of the time that a price of time asks for.

    Computing alone would take ``(sum 2 kappa c^3/w)^(1/3)``, uploading alone what devices of one
    and the same spectral efficiency z take with ``psi(z) = w sum a/(B sum a/G)``.
    """
    compute = 0.0
    nats = 0.0
    nats_over_g = 0.0
    longest = 0.0
    for k in range(device.shape[2]):
        work = device[i, 1, k]
        if device[i, 0, k] > 0.0:
            a = device[i, 0, k] * _LN2
            g = device[i, 2, k] / cell[i, 1]
            wide = device[i, 3, k] * g / cell[i, 0]
            longest = max(longest, work / device[i, 5, k] + a / (cell[i, 0] * log(1.0 + wide)))
            compute += 2.0 * device[i, 6, k] * work * work * work
            nats += a
            nats_over_g += a / g
    z = _inverse_psi(price * nats / (cell[i, 0] * nats_over_g))
    guess = (compute / price) ** (1 / 3) + nats / (cell[i, 0] * z)
    return max(guess, 1.2 * longest, 1.0001 * floor)


@kernel
def _prepare(device, cell, target, i, lane, scalars, cells, free_time):
    """Set a lane of the cell; return False where this iteration is not for the instance."""
    first = _first_live(device, i)
    floor = 0.0
    idle = 0.0
    has_idle = False
    for k in range(device.shape[2]):
        fast = device[i, 1, k] / device[i, 5, k]
        if device[i, 0, k] > 0.0:
            a = device[i, 0, k] * _LN2
            least = a * cell[i, 1] / (device[i, 3, k] * device[i, 2, k])
            floor = max(floor, fast + least)
        elif device[i, 1, k] > 0.0:
            idle = max(idle, fast)
            has_idle = True
    good = first >= 0
    if free_time:
        # the price of time of devices that only compute is left to the search
        good = good and not has_idle
        time = _first_time(device, cell, i, target[i], floor) if good else 1.0
    else:
        time = target[i] - cell[i, 2]
        good = good and time > floor and time >= idle
        time = time if good else 1.0
    cells[_TIME * LANES + lane] = time
    cells[_FLOOR * LANES + lane] = floor if good else 0.0
    cells[_BAND * LANES + lane] = cell[i, 0]
    cells[_WANTED * LANES + lane] = target[i]
    scalars[i, 0] = 1.0 if good else 0.0
    return good


@kernel
def _store(block, cells, device, cell, i, first, stride, lane, points, scalars):
    """Turn a converged instance into decisions that keep every limit, and price it.

    ``first`` and ``stride`` say where its slots are.
    """
    devices = device.shape[2]
    time = cells[_TIME * LANES + lane]
    lam = cells[_LAM * LANES + lane]
    band = cell[i, 0]
    noise = cell[i, 1]
    b_, p_, f_, t_ = points[i, 0], points[i, 1], points[i, 2], points[i, 3]
    compute_, energy_ = points[i, 4], points[i, 5]
    total = 0.0
    mu = 0.0
    for k in range(devices):
        slot = first + k * stride
        row = slot // LANES * _ROW
        at = row + slot % LANES
        work = device[i, 1, k]
        if device[i, 0, k] > 0.0:
            w = block[at + _W * LANES]
            t = time / (1.0 + w)
            rest = time * (w / (1.0 + w))
            b = block[at + _A * LANES] * block[at + _INV_Z * LANES] / t
            f = work / rest if work > 0.0 else 0.0
            price = 2.0 * device[i, 6, k] * f * f * f
            if w <= block[at + _W_MIN * LANES] or w >= block[at + _W_MAX * LANES]:
                # at a limit of the frequency the price of time is that of uploading
                z = block[at + _Z * LANES]
                e, expm1 = exp_pair(z)
                a_over_g = block[at + _A * LANES] / block[at + _G * LANES]
                # lam a e^z/(psi t^2) - P, or lam a/(z t^2): the same where the power is free
                p = _psi(z, expm1)
                over = lam * block[at + _G * LANES] / (p * t) - 1.0
                price = a_over_g / t * (max(over, 0.0) * e + p / z)
            mu += price
        else:
            b = 0.0
            t = 0.0
            f = work / time
            price = 2.0 * device[i, 6, k] * f * f * f
            # to the right of a kink the device has stopped slowing down
            mu += price if f > device[i, 4, k] else 0.0
        total += b
        b_[k] = b
        t_[k] = t
        f_[k] = min(max(f, device[i, 4, k]), device[i, 5, k])
    fill = band / total
    for k in range(devices):
        b = b_[k] * fill
        t = t_[k]
        work = device[i, 1, k]
        live = device[i, 0, k] > 0.0
        z = device[i, 0, k] * _LN2 / (b * t if live else 1.0)
        _, expm1 = exp_pair(z)
        f = f_[k]
        p = b * expm1 * noise / device[i, 2, k]
        b_[k] = b
        p_[k] = p
        compute_[k] = work / f if work > 0.0 else 0.0
        energy_[k] = p * t + device[i, 6, k] * work * f * f + device[i, 8, k]
    scalars[i, 1] = time
    scalars[i, 2] = lam
    scalars[i, 3] = mu


@kernel
def _solve(device, cell, target, points, scalars, free_time):
    instances = device.shape[0]
    devices = device.shape[2]
    rows = (devices + LANES - 1) // LANES
    groups = (instances + LANES - 1) // LANES
    cells = np.zeros(_CELL * LANES)
    sweeps = 0
    # a block of one instance wastes its last slots instead
    if _LANES_COST * groups * devices < instances * rows:
        block = np.zeros(devices * _ROW)
        for group in range(groups):
            for lane in range(LANES):
                i = min(group * LANES + lane, instances - 1)
                _prepare(device, cell, target, i, lane, scalars, cells, free_time)
                stand_in = max(_first_live(device, i), 0)
                for k in range(devices):
                    live = device[i, 0, k] > 0.0
                    _load(block, k * LANES + lane, device, cell, i, k if live else stand_in, live)
            if free_time:
                sweeps += LANES * _iterate_free(block, cells, devices, False)
            else:
                sweeps += LANES * _iterate_fixed(block, cells, devices, False)
            for lane in range(min(LANES, instances - group * LANES)):
                i = group * LANES + lane
                if scalars[i, 0] > 0.0 and cells[_WORST * LANES + lane] <= _CLOSE:
                    _store(block, cells, device, cell, i, lane, LANES, lane, points, scalars)
                else:
                    scalars[i, 0] = 0.0
        return sweeps
    block = np.zeros(rows * _ROW)
    for i in range(instances):
        if not _prepare(device, cell, target, i, 0, scalars, cells, free_time):
            continue
        _spread(cells)
        stand_in = _first_live(device, i)
        for slot in range(rows * LANES):
            k = min(slot, devices - 1)
            live = slot < devices and device[i, 0, k] > 0.0
            _load(block, slot, device, cell, i, k if live else stand_in, live)
        if free_time:
            sweeps += _iterate_free(block, cells, rows, True)
        else:
            sweeps += _iterate_fixed(block, cells, rows, True)
        if _all_close(cells):
            _store(block, cells, device, cell, i, 0, 1, 0, points, scalars)
        else:
            scalars[i, 0] = 0.0
    return sweeps


# --- a price of time, bracketed --------------------------------------------------------------------


@kernel
def _idle_price(device, i, time):
    """Price of time of devices that only compute, and its derivative in log T."""
    price = 0.0
    for k in range(device.shape[2]):
        work = device[i, 1, k]
        if device[i, 0, k] <= 0.0 and work > 0.0 and work / time > device[i, 4, k]:
            f = work / time
            price += 2.0 * device[i, 6, k] * f * f * f
    return price, -3.0 * price


@kernel
def _bracket(block, cell, rows, device, i, low):
    """Solve ``sum mu(T) = w`` for T > low, where mu falls with T, abruptly here and there.

    The bandwidth is brought into balance at every T before the price of time there is believed,
    so the bracket holds the root.  Return False where no T meets the price to rounding.
    """
    high = np.inf
    _restart(block, cell, rows, True)
    settled = 0
    for _ in range(_CAREFUL):
        for l in range(LANES * _BOUND, LANES * _CELL):
            cell[l] = 0.0
        for r in range(rows):
            _evaluate(block[r * _ROW : (r + 1) * _ROW], cell, True)
        for field in range(_BOUND, _CELL):
            _total(cell, field)
        b = cell[_B * LANES]
        b_l = min(cell[_B_L * LANES], -1e-300)
        room = max(cell[_BAND * LANES] - cell[_BOUND * LANES], 1e-3 * b)
        missing = 2.0 * (room - b) / (room + b) * b - cell[_B_0 * LANES]
        time = cell[_TIME * LANES]
        new = time
        settled += 1
        if (cell[_WORST * LANES] <= 1e-8 and abs(missing) <= 1e-8 * abs(b_l)) or settled > 40:
            settled = 0
            idle, idle_t = _idle_price(device, i, time)
            m = cell[_M * LANES] + idle
            wanted = cell[_WANTED * LANES]
            if m > wanted:
                low = max(low, time)
            else:
                high = min(high, time)
            floor = cell[_FLOOR * LANES]
            turn = cell[_M_L * LANES] / b_l
            slope = cell[_M_T * LANES] + idle_t
            slope -= turn * (cell[_B_T * LANES] + cell[_BOUND_T * LANES])
            # Newton on log mu in log(T - floor)
            above = time - floor
            step = (
                math.log(m / wanted) * m / max(-slope * above / time, 1e-300) if m > 0.0 else -1.0
            )
            new = floor + above * math.exp(_cut(step, -3.0, 3.0))
            if not low < new < high:
                if high == np.inf:
                    new = floor + 8.0 * above
                else:
                    new = floor + math.sqrt(
                        max(low - floor, 1e-3 * (high - floor)) * (high - floor)
                    )
                    if not low < new < high:
                        new = 0.5 * (low + high)
            if abs(new - time) <= 4e-16 * time or abs(step) * above <= 1e-15 * time:
                return True
            if high - low <= 4e-16 * time:
                return False
        dt = 2.0 * (new - time) / (new + time)
        missing = missing - (cell[_B_T * LANES] + cell[_BOUND_T * LANES]) * dt
        dl = _cut(missing / b_l, -_CUT, _CUT)
        for l in range(LANES):
            cell[_TIME * LANES + l] = new
            cell[_INV_T * LANES + l] = 1.0 / new
            cell[_DT * LANES + l] = dt
            cell[_DL * LANES + l] = dl
            cell[_LAM * LANES + l] *= _grow(dl)
            cell[_PRICE * LANES + l] = cell[_LAM * LANES + l] / new
            cell[_WORST * LANES + l] = abs(dl)
        for r in range(rows):
            row = block[r * _ROW : (r + 1) * _ROW]
            _limits(row, cell)
            _advance(row, cell, True)
        worst = 0.0
        for l in range(LANES):
            worst = worst if worst > cell[_WORST * LANES + l] else cell[_WORST * LANES + l]
        for l in range(LANES):
            cell[_WORST * LANES + l] = worst
    return False


@entry
def weighted_carefully(device, cell, target, shortest_s, points, scalars):
    """As ``weighted``, slower, and stopped by little; ``shortest_s`` without the fixed delay."""
    devices = device.shape[2]
    rows = (devices + LANES - 1) // LANES
    cells = np.zeros(_CELL * LANES)
    block = np.zeros(rows * _ROW)
    for i in range(device.shape[0]):
        stand_in = _first_live(device, i)
        scalars[i, 0] = 0.0
        if stand_in < 0:
            continue
        for slot in range(rows * LANES):
            k = min(slot, devices - 1)
            live = slot < devices and device[i, 0, k] > 0.0
            _load(block, slot, device, cell, i, k if live else stand_in, live)
        floor = shortest_s[i]
        cells[_FLOOR * LANES] = floor
        cells[_TIME * LANES] = _first_time(device, cell, i, target[i], floor)
        cells[_BAND * LANES] = cell[i, 0]
        cells[_WANTED * LANES] = target[i]
        cells[_WORST * LANES] = 1.0
        _spread(cells)
        _bracket(block, cells, rows, device, i, floor)
        _store(block, cells, device, cell, i, 0, 1, 0, points, scalars)
        scalars[i, 0] = 1.0


# --- the shortest round: every device at full power and full frequency -----------------------------


@kernel
def _evaluate_shortest(row, cell):
    """As ``_evaluate``, for ``phi(z) least = T - fast`` alone; T is carried as time above the floor."""
    for l in range(LANES):
        z = row[_Z * LANES + l]
        least = row[_LEAST * LANES + l]
        t = least + (row[_SPARE * LANES + l] + cell[_ABOVE * LANES + l])
        e, expm1 = exp_pair(z)
        p = _psi(z, expm1)
        n1 = least * expm1
        d1 = t * z
        over = 1.0 / (p * (n1 + d1))
        shrink = expm1 * (n1 + d1) * over  # 1/(dlog phi/dx)
        r = 2.0 * (n1 - d1) * p * over
        x = -r * shrink
        x_t = shrink * cell[_ABOVE * LANES + l] / t
        row[_X * LANES + l] = x
        row[_X_T * LANES + l] = x_t
        # b = PG/(e^z - 1)
        b = row[_WEIGHT * LANES + l] * row[_A * LANES + l] / (least * expm1)
        turn = -z * e / expm1
        cell[_B * LANES + l] += b
        cell[_B_0 * LANES + l] += b * _cut(turn * x, -_CUT, _CUT)
        cell[_B_T * LANES + l] += b * turn * x_t


@kernel
def _advance_shortest(row, cell):
    for l in range(LANES):
        x = row[_X * LANES + l] + row[_X_T * LANES + l] * cell[_DT * LANES + l]
        x = _cut(x, -_CUT, _CUT)
        z = row[_Z * LANES + l] * _grow(x)
        row[_Z * LANES + l] = z if z < 300.0 else 300.0
        moved = abs(x)
        worst = cell[_WORST * LANES + l]
        cell[_WORST * LANES + l] = worst if worst > moved else moved


@kernel
def _iterate_shortest_rows(block, cell, rows, joined):
    for r in range(rows):
        row = block[r * _ROW : (r + 1) * _ROW]
        for l in range(LANES):
            t = row[_LEAST * LANES + l] + row[_SPARE * LANES + l] + cell[_ABOVE * LANES + l]
            row[_Z * LANES + l] = _inverse_phi(t / row[_LEAST * LANES + l] - 1.0)
    sweeps = 0
    while sweeps < _ITERATIONS:
        sweeps += 1
        for l in range(LANES * _BOUND, LANES * _CELL):
            cell[l] = 0.0
        for r in range(rows):
            _evaluate_shortest(block[r * _ROW : (r + 1) * _ROW], cell)
        if joined:
            _total(cell, _B)
            _total(cell, _B_0)
            _total(cell, _B_T)
        worst = 0.0
        for l in range(LANES):
            b = cell[_B * LANES + l]
            band = cell[_BAND * LANES + l]
            missing = 2.0 * (band - b) / (band + b) * b - cell[_B_0 * LANES + l]
            b_t = cell[_B_T * LANES + l]
            dt = _cut(missing / (b_t if b_t < -1e-300 else -1e-300), -_CUT, _CUT)
            cell[_DT * LANES + l] = dt
            cell[_ABOVE * LANES + l] *= _grow(dt)
            cell[_WORST * LANES + l] = abs(dt)
        for r in range(rows):
            _advance_shortest(block[r * _ROW : (r + 1) * _ROW], cell)
        for l in range(LANES):
            worst = worst if worst > cell[_WORST * LANES + l] else cell[_WORST * LANES + l]
        if worst <= _CLOSE:
            break
    return sweeps


@entry
def _iterate_shortest(block, cell, rows, joined):
    return _iterate_shortest_rows(block, cell, rows, joined)


@kernel
def _prepare_shortest(device, cell, i, lane, cells):
    """Set a lane of the cell; return the floor of T, negative where there is nothing to upload.

    The start lies between what the neediest device takes alone and in an even share of the band.
    """
    floor = -1.0
    low = 0.0
    high = 0.0
    number = 0.0
    for k in range(device.shape[2]):
        number += 1.0 if device[i, 0, k] > 0.0 else 0.0
    share = cell[i, 0] / number
    for k in range(device.shape[2]):
        if device[i, 0, k] > 0.0:
            a = device[i, 0, k] * _LN2
            fast = device[i, 1, k] / device[i, 5, k]
            wide = device[i, 3, k] * device[i, 2, k] / cell[i, 1]
            floor = max(floor, fast + a / wide)
            low = max(low, fast + a / (cell[i, 0] * log(1.0 + wide / cell[i, 0])))
            high = max(high, fast + a / (share * log(1.0 + wide / share)))
    low = max(low - floor, 1e-12 * floor)
    high = max(high - floor, low)
    cells[_ABOVE * LANES + lane] = math.sqrt(low * high)
    cells[_BAND * LANES + lane] = cell[i, 0]
    return floor


@kernel
def _set_spare(block, slot, floor):
    at = slot // LANES * _ROW + slot % LANES
    ends = block[at + _FAST * LANES] + block[at + _LEAST * LANES]
    block[at + _SPARE * LANES] = max(floor - ends, 0.0)


@kernel
def _store_shortest(block, cells, device, cell, i, first, stride, lane, floor, points, scalars):
    """Decisions at the shortest round, and the least prices that support it.

    The least price of bandwidth makes every device want the least band and full speed:
    ``lam G = psi t (1 + n)`` with ``n e^z`` at least what computing at full speed costs.
    Return False where a device without payload ends last: the others then have time to spare.
    """
    devices = device.shape[2]
    above = cells[_ABOVE * LANES + lane]
    band = cell[i, 0]
    b_, p_, f_, t_ = points[i, 0], points[i, 1], points[i, 2], points[i, 3]
    compute_, energy_ = points[i, 4], points[i, 5]
    time = floor + above
    total = 0.0
    lam = 0.0
    for k in range(devices):
        slot = first + k * stride
        at = slot // LANES * _ROW + slot % LANES
        if device[i, 0, k] > 0.0:
            z = block[at + _Z * LANES]
            e, expm1 = exp_pair(z)
            p = _psi(z, expm1)
            least = block[at + _LEAST * LANES]
            g = block[at + _G * LANES]
            t = least + (block[at + _SPARE * LANES] + above)
            b = block[at + _A * LANES] / (least * expm1)
            steep = 2.0 * device[i, 6, k] * device[i, 5, k] ** 3
            if device[i, 4, k] >= device[i, 5, k] or device[i, 1, k] <= 0.0:
                steep = 0.0
            extra = max(steep * t * g / block[at + _A * LANES] - p / z, 0.0) / e
            lam = max(lam, t * p * (1.0 + extra) / g)
        else:
            b = 0.0
            t = 0.0
            if device[i, 1, k] / device[i, 5, k] > time:
                return False
        total += b
        b_[k] = b
        t_[k] = t
    fill = band / total
    mu = 0.0
    whole = 0.0  # dmu/dlog lam
    for k in range(devices):
        slot = first + k * stride
        at = slot // LANES * _ROW + slot % LANES
        work = device[i, 1, k]
        f = device[i, 5, k] if work > 0.0 else device[i, 4, k]
        p = 0.0
        if device[i, 0, k] > 0.0:
            z = block[at + _Z * LANES]
            e, expm1 = exp_pair(z)
            g = block[at + _G * LANES]
            a_over_g = block[at + _A * LANES] / g
            value = _psi(z, expm1)
            over = max(lam * g / (t_[k] * value) - 1.0, 0.0)
            share = a_over_g / t_[k] * (over * e + value / z)
            mu += share
            whole += share + device[i, 3, k]
            b = b_[k] * fill
            z = device[i, 0, k] * _LN2 / (b * t_[k])
            _, expm1 = exp_pair(z)
            b_[k] = b
            p = b * expm1 * cell[i, 1] / device[i, 2, k]
        elif work > 0.0:
            f = min(max(work / time, device[i, 4, k]), device[i, 5, k])
            mu += 2.0 * device[i, 6, k] * f * f * f if work / time > device[i, 4, k] else 0.0
        p_[k] = p
        f_[k] = f
        compute_[k] = work / f if work > 0.0 else 0.0
        energy_[k] = p * t_[k] + device[i, 6, k] * work * f * f + device[i, 8, k]
    scalars[i, 1] = time
    scalars[i, 2] = lam
    scalars[i, 3] = mu
    scalars[i, 4] = whole
    return True


@entry
def shortest(device, cell, points, scalars):
    instances = device.shape[0]
    devices = device.shape[2]
    rows = (devices + LANES - 1) // LANES
    groups = (instances + LANES - 1) // LANES
    cells = np.zeros(_CELL * LANES)
    floors = np.zeros(LANES)
    sweeps = 0
    by_lanes = _LANES_COST * groups * devices < instances * rows
    block = np.zeros((devices if by_lanes else rows) * _ROW)
    for group in range(groups if by_lanes else instances):
        # by lanes a lane is an instance, else every lane is this instance
        for lane in range(LANES if by_lanes else 1):
            i = min(group * LANES + lane, instances - 1) if by_lanes else group
            floors[lane] = _prepare_shortest(device, cell, i, lane, cells)
            stand_in = max(_first_live(device, i), 0)
            for slot in range(devices if by_lanes else rows * LANES):
                k = min(slot, devices - 1)
                live = slot < devices and device[i, 0, k] > 0.0
                place = slot * LANES + lane if by_lanes else slot
                _load(block, place, device, cell, i, k if live else stand_in, live)
                _set_spare(block, place, floors[lane])
        if not by_lanes:
            _spread(cells)
        sweeps += _iterate_shortest(block, cells, devices if by_lanes else rows, not by_lanes) * (
            LANES if by_lanes else 1
        )
        if by_lanes:
            for lane in range(min(LANES, instances - group * LANES)):
                i = group * LANES + lane
                good = floors[lane] >= 0.0 and cells[_WORST * LANES + lane] <= _CLOSE
                good = good and _store_shortest(
                    block, cells, device, cell, i, lane, LANES, lane, floors[lane], points, scalars
                )
                scalars[i, 0] = 1.0 if good else 0.0
        else:
            good = floors[0] >= 0.0 and _all_close(cells)
            good = good and _store_shortest(
                block, cells, device, cell, group, 0, 1, 0, floors[0], points, scalars
            )
            scalars[group, 0] = 1.0 if good else 0.0
    return sweeps


@entry
def least_energy(device, cell, target, points, scalars):
    return _solve(device, cell, target, points, scalars, False)


@entry
def weighted(device, cell, target, points, scalars):
    return _solve(device, cell, target, points, scalars, True)
