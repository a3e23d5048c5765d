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

Where every device has but one frequency, ``t = T - c/f`` is known: a device keeps one unknown, z,
and its first equation.  Blocks of such instances have a start and a sweep of their own.

A *block* has ``LANES`` columns and some rows of slots.  Either a column is an instance and a row
a device (few devices), or the whole block is one instance, its devices laid out row by row.
"""

from __future__ import annotations

import math

import numpy as np

from pwff_solvers.allocation.registers import (
    B_0,
    B_L,
    B_T,
    BAND,
    BOUND,
    BOUND_T,
    CELL,
    CLOSE,
    COST,
    CUT,
    DL,
    DT,
    FAST,
    FLOOR,
    INV_T,
    INV_Z,
    LAM,
    LANES,
    LEAST,
    M_0,
    M_L,
    M_T,
    PRICE,
    ROW,
    SLOW,
    TIME,
    TWICE_C,
    W_MAX,
    W_MIN,
    W_MOST,
    WANTED,
    WEIGHT,
    WORST,
    X_L,
    X_T,
    X_Y,
    Y_L,
    Y_T,
    A,
    B,
    G,
    M,
    W,
    X,
    Y,
    Z,
    all_close,
    by_lanes,
    cut,
    farthest,
    finish,
    first_live,
    grow,
    inverse_phi,
    inverse_psi,
    load,
    psi,
    spread,
    take_in,
    take_out,
    total,
)  # fmt: skip
from pwff_solvers.allocation.slots import (
    CELL_DELAY,
    DEVICE_F_MAX,
    DEVICE_F_MIN,
    DEVICE_KAPPA,
    DEVICE_PAYLOAD,
    DEVICE_WORK,
    SCALAR_CONVERGED,
)
from pwff_solvers.compiled.elementary import entry, exp_pair, kernel, log, rough_exp, rough_log

__all__ = ["least_energy", "weighted", "weighted_carefully"]

_ITERATIONS = 40
_CAREFUL = 600
_GUESSES = 2
_PINNED_GUESSES = 3


@kernel
def _limits(row, cell):
    """Set the limits of ``(T-t)/t`` that the CPU frequencies imply."""
    for l in range(LANES):
        inv_t = cell[INV_T * LANES + l]
        fast = row[FAST * LANES + l] * inv_t
        slow = row[SLOW * LANES + l] * inv_t
        low = fast / (1.0 - fast)
        low = low if low > 1e-18 else 1e-18
        high = slow / (1.0 - slow) if slow < 1.0 else 1e300
        row[W_MIN * LANES + l] = low
        row[W_MAX * LANES + l] = high if high > low else low


@kernel
def _least_need(row, cell):
    """Return bandwidth times z that is needed even if every device computes at full speed."""
    for l in range(LANES):
        left = cell[TIME * LANES + l] - row[FAST * LANES + l]
        cell[B * LANES + l] += row[WEIGHT * LANES + l] * row[A * LANES + l] / left


@kernel
def _start_times(row, cell):
    """Guess the split of time, and what it asks of the common price.

    The balance of a free device is ``w^3/(1+w)^2 = 2 kappa c^3 G/(a T^2) z/psi(z)`` with
    ``w = (T-t)/t``, here with the z of all devices in ``cell[M]``; besides, uploading must leave it
    enough time to make do with a part of the band.
    """
    for l in range(LANES):
        inv_t = cell[INV_T * LANES + l]
        a = row[A * LANES + l]
        g = row[G * LANES + l]
        least = row[LEAST * LANES + l]
        cost = row[TWICE_C * LANES + l] * g / a * inv_t * inv_t
        root = rough_exp(rough_log(cost * cell[M_0 * LANES + l] + 1e-300) * (1 / 3))
        w = root * (1.0 + root * (2 / 3 + 0.5 * root))
        band = cell[BAND * LANES + l]
        alone = a / (band * rough_log(1.0 + a / (least * band)))
        most = 1.0 / (1.5 * alone * inv_t) - 1.0
        w = cut(w if w < most else most, row[W_MIN * LANES + l], row[W_MAX * LANES + l])
        need = row[WEIGHT * LANES + l] * a * inv_t * (1.0 + w)
        row[W * LANES + l] = w
        row[W_MOST * LANES + l] = most
        row[COST * LANES + l] = cost
        row[Z * LANES + l] = cell[M * LANES + l]
        cell[B * LANES + l] += need
        cell[B_L * LANES + l] -= need * rough_log((1.0 + w) * g)


@kernel
def _start_answers(row, cell):
    """Guess what each device does at the price, and how the sum answers to it.

    With ``psi(z) = lam G/t`` the balance of a free device is ``w^3/(1+w) = 2 kappa c^3 z/(lam a T)``,
    where z, hardly moved by w, is that of the pass before.  Full power allows no more z than
    ``phi(z) least = t``.
    """
    for l in range(LANES):
        inv_t = cell[INV_T * LANES + l]
        target = cell[PRICE * LANES + l] * row[G * LANES + l]
        a = row[A * LANES + l]
        w = row[W * LANES + l]
        z = row[Z * LANES + l]
        third = rough_log(row[COST * LANES + l] * z / target * (1.0 + w) + 1e-300)
        w = rough_exp(third * (1 / 3))
        w = w if w < row[W_MOST * LANES + l] else row[W_MOST * LANES + l]
        w = cut(w, row[W_MIN * LANES + l], row[W_MAX * LANES + l])
        stretch = 1.0 + w  # T/t
        priced = inverse_psi(target * stretch)
        powered = inverse_phi(1.0 / (row[LEAST * LANES + l] * inv_t * stretch) - 1.0)
        z = priced if priced < powered else powered
        inverse = 1.0 / (z * (2.0 + z))
        inv_z = (2.0 + z) * inverse
        b = row[WEIGHT * LANES + l] * a * inv_t * stretch * inv_z
        row[W * LANES + l] = w
        row[Z * LANES + l] = z
        row[INV_Z * LANES + l] = inv_z
        cell[B * LANES + l] += b
        # log z answers to log psi with a slope near 1/(2+z), where the power does not hold it
        cell[B_L * LANES + l] += b * z * inverse if priced < powered else 0.0


@kernel
def _evaluate(row, cell, free_time):
    """Find the step of a row of devices as a linear function of the cell's, and add up."""
    for l in range(LANES):
        inv_t = cell[INV_T * LANES + l]
        z = row[Z * LANES + l]
        w = row[W * LANES + l]
        inv_z = row[INV_Z * LANES + l]
        least = row[LEAST * LANES + l] * inv_t
        target = cell[PRICE * LANES + l] * row[G * LANES + l]  # psi t/T of a free device
        e, expm1 = exp_pair(z)
        p = psi(z, expm1)
        stretch = 1.0 + w
        share = 1.0 / stretch  # t/T
        rest = w * share  # (T-t)/T
        share2 = share * share
        rest3 = rest * rest * rest
        # compute/P = cost/rest^3, with compute = 2 kappa c^3/(T-t)^3
        cost = row[TWICE_C * LANES + l] * row[G * LANES + l] / row[A * LANES + l]
        cost = cost * inv_t * inv_t * least
        # the equation nearer to being violated holds: psi t = lam G or phi least = t
        full = share2 * p * z < least * expm1 * target
        inverse = 1.0 / (p * expm1)
        psi_slope = z * z * e * expm1 * inverse  # dlog psi/dx
        phi_slope = p * p * inverse  # dlog phi/dx
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
        j11 = phi_slope if full else psi_slope
        j12 = -rest if full else rest
        j21 = psi_slope - z if full else 1.0
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
        y = cut(y, -CUT, CUT)
        w_min = row[W_MIN * LANES + l]
        w_max = row[W_MAX * LANES + l]
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
        row[X * LANES + l] = x
        row[X_L * LANES + l] = x_l
        row[X_Y * LANES + l] = x_y
        row[Y * LANES + l] = y
        row[Y_L * LANES + l] = y_l
        step = x - x_y * y
        step_l = x_l - x_y * y_l
        b = row[WEIGHT * LANES + l] * row[A * LANES + l] * inv_t * stretch * inv_z
        b_0 = cut(-(step + rest * y), -CUT, CUT)
        b_l = -(step_l + rest * y_l)
        held = b_l == 0.0
        cell[BOUND * LANES + l] += b * grow(b_0) if held else 0.0
        cell[B * LANES + l] += 0.0 if held else b
        cell[B_0 * LANES + l] += 0.0 if held else b * b_0
        cell[B_L * LANES + l] += b * b_l
        if free_time:
            x_t = t1 * inv_11
            y_t = (t2 * j11 - t1 * j21) * inv_det
            y_t = stretch if pinned else y_t
            row[X_T * LANES + l] = x_t
            row[Y_T * LANES + l] = y_t
            step_t = x_t - x_y * y_t
            b_t = -(step_t + rest * y_t + 1.0)
            cell[BOUND_T * LANES + l] += b * b_t if held else 0.0
            cell[B_T * LANES + l] += 0.0 if held else b * b_t
            # price of time: lam a/(z t^2), at full power lam a e^z/(psi t^2) - P
            q = cell[PRICE * LANES + l] * row[A * LANES + l] * inv_t * stretch * stretch
            q = q * (e * expm1 * inverse if full else inv_z) * row[WEIGHT * LANES + l]
            power = row[WEIGHT * LANES + l] * row[A * LANES + l]
            power = power / (row[G * LANES + l] * row[LEAST * LANES + l])
            q_x = z - psi_slope if full else -1.0
            cell[M * LANES + l] += q - (power if full else 0.0)
            cell[M_0 * LANES + l] += q * (q_x * step - 2.0 * rest * y)
            cell[M_L * LANES + l] += q * (1.0 + q_x * step_l - 2.0 * rest * y_l)
            cell[M_T * LANES + l] += q * (q_x * step_t - 2.0 * rest * y_t - 2.0)


@kernel
def _advance(row, cell, free_time):
    """Take the step."""
    for l in range(LANES):
        dl = cell[DL * LANES + l]
        dt = cell[DT * LANES + l]
        y = row[Y * LANES + l] + row[Y_L * LANES + l] * dl
        x = row[X * LANES + l] + row[X_L * LANES + l] * dl
        if free_time:
            y = y + row[Y_T * LANES + l] * dt
            x = x + row[X_T * LANES + l] * dt
        y = cut(y, -CUT, CUT)
        w = row[W * LANES + l]
        new = cut(w * grow(-y), row[W_MIN * LANES + l], row[W_MAX * LANES + l])
        y = 2.0 * (w - new) / (w + new)
        # a step of log z by 1/z multiplies the signal-to-noise ratio by e
        most = CUT * row[INV_Z * LANES + l]
        most = most if most < CUT else CUT
        x = cut(x - row[X_Y * LANES + l] * y, -most, most)
        row[W * LANES + l] = new
        scale = 1.0 / (4.0 - x * x)
        z = row[Z * LANES + l] * (2.0 + x) * (2.0 + x) * scale
        inv_z = row[INV_Z * LANES + l] * (2.0 - x) * (2.0 - x) * scale
        # beyond 300 nat/s/Hz the products above would overflow
        row[Z * LANES + l] = z if z < 300.0 else 300.0
        row[INV_Z * LANES + l] = inv_z if z < 300.0 else 1.0 / 300.0
        x = abs(x) * (1.0 + z)  # in the power
        moved = x if x > abs(y) else abs(y)
        worst = cell[WORST * LANES + l]
        cell[WORST * LANES + l] = worst if worst > moved else moved


@kernel
def _move_cell(cell, free_time):
    """Find the step of the price of bandwidth, and of the time, and take it."""
    for l in range(LANES):
        b = cell[B * LANES + l]
        b_l = cell[B_L * LANES + l]
        b_l = b_l if b_l < -1e-300 else -1e-300
        # the logarithm of the demand is nearly linear in that of the price
        room = cell[BAND * LANES + l] - cell[BOUND * LANES + l]
        room = room if room > 1e-3 * b else 1e-3 * b
        missing = 2.0 * (room - b) / (room + b) * b - cell[B_0 * LANES + l]
        dt = 0.0
        if free_time:
            b_t = cell[B_T * LANES + l] + cell[BOUND_T * LANES + l]
            m = cell[M * LANES + l]
            wanted = cell[WANTED * LANES + l]
            lacking = 2.0 * (wanted - m) / (wanted + m) * m if m > 0.0 else wanted
            lacking = lacking - cell[M_0 * LANES + l]
            # dl = (missing - b_t dt)/b_l
            turn = cell[M_L * LANES + l] / b_l
            slope = cell[M_T * LANES + l] - turn * b_t
            slope = slope if slope < -1e-300 else -1e-300
            dt = (lacking - turn * missing) / slope
            time = cell[TIME * LANES + l]
            above = time - cell[FLOOR * LANES + l]
            dv = cut(dt * time / above, -CUT, CUT)
            new = cell[FLOOR * LANES + l] + above * grow(dv)
            dt = 2.0 * (new - time) / (new + time)
            missing = missing - b_t * dt
            cell[TIME * LANES + l] = new
            cell[INV_T * LANES + l] = 1.0 / new
            cell[DT * LANES + l] = dt
            dt = dv
        dl = cut(missing / b_l, -CUT, CUT)
        if b <= 0.0:
            # nobody answers to the price: move it until somebody does
            dl = -CUT if room > 1e-12 * cell[BAND * LANES + l] else CUT
        cell[DL * LANES + l] = dl
        cell[LAM * LANES + l] *= grow(dl)
        cell[PRICE * LANES + l] = cell[LAM * LANES + l] * cell[INV_T * LANES + l]
        cell[WORST * LANES + l] = abs(dl) if abs(dl) > abs(dt) else abs(dt)


@kernel
def _price_alike(cell, field):
    """Set the price, in ``field``, at which devices of one and the same z would fill the band.

    ``B``: what they need of it times z; ``B_L``: the mean logarithm of psi per price with that weight.
    """
    for l in range(LANES):
        z = cut(cell[B * LANES + l] / cell[BAND * LANES + l], 1e-9, 100.0)
        _, expm1 = exp_pair(z)
        mean, _ = exp_pair(cell[B_L * LANES + l] / cell[B * LANES + l])
        cell[field * LANES + l] = psi(z, expm1) * mean


@kernel
def _missed(cell):
    """Return how far, relatively, the first guesses of any lane are from filling its band."""
    worst = 0.0
    for l in range(LANES):
        far = abs(cell[B * LANES + l] / cell[BAND * LANES + l] - 1.0)
        worst = far if far > worst else worst
    return worst


@kernel
def _reprice(cell):
    """Move the price by what the first guesses miss of the band, at the slope they answer with."""
    for l in range(LANES):
        b = cell[B * LANES + l]
        far = log(b / cell[BAND * LANES + l])
        step, _ = exp_pair(cut(far * b / (cell[B_L * LANES + l] + 0.02 * b), -4.0, 4.0))
        cell[PRICE * LANES + l] *= step
        cell[LAM * LANES + l] *= step


@kernel
def _restart(block, cell, rows, joined):
    """Guess every unknown but the time."""
    for l in range(LANES):
        cell[INV_T * LANES + l] = 1.0 / cell[TIME * LANES + l]
        cell[DT * LANES + l] = 0.0
        cell[B * LANES + l] = 0.0
    for r in range(rows):
        row = block[r * ROW : (r + 1) * ROW]
        _limits(row, cell)
        _least_need(row, cell)
    if joined:
        total(cell, B)
    # The z that all devices would share: the more crowded the band, the more of the time goes to
    # uploading, so need/B falls with z.  Secant on log(need/(B z)) in log z, from the least need on.
    for l in range(LANES):
        cell[M * LANES + l] = cell[B * LANES + l] / cell[BAND * LANES + l]
    for guess in range(2):
        for l in range(LANES):
            z = cut(cell[M * LANES + l], 1e-9, 100.0)
            _, expm1 = exp_pair(z)
            cell[M * LANES + l] = z
            cell[M_0 * LANES + l] = z / psi(z, expm1)
            cell[B * LANES + l] = 0.0
            cell[B_L * LANES + l] = 0.0
        for r in range(rows):
            _start_times(block[r * ROW : (r + 1) * ROW], cell)
        if joined:
            total(cell, B)
            total(cell, B_L)
        far = 0.0
        for l in range(LANES):
            z = cell[M * LANES + l]
            level = log(z)
            gap = log(cell[B * LANES + l] / (cell[BAND * LANES + l] * z))
            slope = -2.0
            if guess > 0:
                slope = (gap - cell[M_T * LANES + l]) / (level - cell[M_L * LANES + l])
                slope = slope if slope < -1.0 else -1.0
            step, _ = exp_pair(cut(-gap / slope, -4.0, 4.0))
            cell[M_L * LANES + l] = level
            cell[M_T * LANES + l] = gap
            cell[M * LANES + l] = z * step
            far = abs(gap) if abs(gap) > far else far
        if far < 0.3:
            break
    _price_alike(cell, PRICE)
    for l in range(LANES):
        cell[LAM * LANES + l] = cell[PRICE * LANES + l] * cell[TIME * LANES + l]
    for guess in range(_GUESSES):
        for l in range(LANES):
            cell[B * LANES + l] = 0.0
            cell[B_L * LANES + l] = 0.0
        for r in range(rows):
            _start_answers(block[r * ROW : (r + 1) * ROW], cell)
        if joined:
            total(cell, B)
            total(cell, B_L)
        if guess > 0 and _missed(cell) < 0.05:
            break
        if guess < _GUESSES - 1:
            _reprice(cell)


@kernel
def _iterate(block, cell, rows, joined, free_time):
    """Iterate until every lane has converged, or the limit; return the number of sweeps."""
    _restart(block, cell, rows, joined)
    sweeps = 0
    while sweeps < _ITERATIONS:
        sweeps += 1
        for l in range(LANES * (BOUND), LANES * CELL):
            cell[l] = 0.0
        for r in range(rows):
            _evaluate(block[r * ROW : (r + 1) * ROW], cell, free_time)
        if joined:
            for field in range(BOUND, CELL if free_time else B_T):
                total(cell, field)
        _move_cell(cell, free_time)
        for r in range(rows):
            row = block[r * ROW : (r + 1) * ROW]
            if free_time:
                _limits(row, cell)
            _advance(row, cell, free_time)
        if farthest(cell, WORST) <= CLOSE:
            break
    return sweeps


@entry
def _iterate_fixed(block, cell, rows, joined):
    return _iterate(block, cell, rows, joined, False)


@entry
def _iterate_free(block, cell, rows, joined):
    return _iterate(block, cell, rows, joined, True)


# --- frequencies given -----------------------------------------------------------------------------

# Fields that this iteration uses otherwise.
_NEED = X_T  # a/t, bandwidth times z; 0 without payload
_RATE = X_Y  # G/t
_FILL = Y  # a/(PG t), share of t that full power needs in unlimited bandwidth


@kernel
def _pinned(block, rows):
    """Return whether every device has but one frequency, to rounding: then t = T - c/f is known."""
    for r in range(rows):
        row = block[r * ROW : (r + 1) * ROW]
        free = 0.0
        for l in range(LANES):
            fast = row[FAST * LANES + l]
            free += row[WEIGHT * LANES + l] if row[SLOW * LANES + l] > fast * (1.0 + 1e-15) else 0.0
        if free > 0.0:
            return False
    return True


@kernel
def _start_pinned(row, cell):
    """Set what does not change; gather ``sum a/t`` and the mean of ``log(t/G)`` with that weight."""
    for l in range(LANES):
        time = cell[TIME * LANES + l]
        fast = row[FAST * LANES + l]
        t = time - fast
        t = t if t > 1e-18 * time else 1e-18 * time
        inv_t = 1.0 / t
        w = fast * inv_t
        need = row[WEIGHT * LANES + l] * row[A * LANES + l] * inv_t
        rate = row[G * LANES + l] * inv_t
        row[W * LANES + l] = w if w > 1e-18 else 1e-18
        row[_NEED * LANES + l] = need
        row[_RATE * LANES + l] = rate
        row[_FILL * LANES + l] = row[LEAST * LANES + l] * inv_t
        cell[B * LANES + l] += need
        cell[B_L * LANES + l] -= need * rough_log(rate)


@kernel
def _answer_pinned(row, cell):
    """Guess each z at the price, and how the sum of bandwidths answers to it."""
    for l in range(LANES):
        priced = inverse_psi(cell[LAM * LANES + l] * row[_RATE * LANES + l])
        powered = inverse_phi(1.0 / row[_FILL * LANES + l] - 1.0)
        z = priced if priced < powered else powered
        inverse = 1.0 / (z * (2.0 + z))
        inv_z = (2.0 + z) * inverse
        b = row[_NEED * LANES + l] * inv_z
        row[Z * LANES + l] = z
        row[INV_Z * LANES + l] = inv_z
        cell[B * LANES + l] += b
        cell[B_L * LANES + l] += b * z * inverse if priced < powered else 0.0


@kernel
def _evaluate_pinned(row, cell):
    """Evaluate as ``_evaluate`` does, where t is known: one unknown a device."""
    for l in range(LANES):
        z = row[Z * LANES + l]
        e, expm1 = exp_pair(z)
        p = psi(z, expm1)
        target = cell[LAM * LANES + l] * row[_RATE * LANES + l]
        filled = row[_FILL * LANES + l] * expm1
        # the equation nearer to being violated holds: psi t = lam G or phi a/(PG) = t
        full = p * z < filled * target
        n = filled if full else p
        d = z if full else target
        # slope of the logarithm in x
        up = p if full else z * z * e
        down = expm1 if full else p
        turn = down / ((n + d) * up)
        x = 2.0 * (d - n) * turn
        x_l = 0.0 if full else (n + d) * turn
        row[X * LANES + l] = x
        row[X_L * LANES + l] = x_l
        b = row[_NEED * LANES + l] * row[INV_Z * LANES + l]
        b_0 = cut(-x, -1.0, 1.0)
        cell[BOUND * LANES + l] += b * (1.0 + b_0 + 0.5 * b_0 * b_0) if full else 0.0
        cell[B * LANES + l] += 0.0 if full else b
        cell[B_0 * LANES + l] += 0.0 if full else b * b_0
        cell[B_L * LANES + l] -= b * x_l


@kernel
def _advance_pinned(row, cell):
    """Take the step, as ``_advance`` does."""
    for l in range(LANES):
        x = row[X * LANES + l] + row[X_L * LANES + l] * cell[DL * LANES + l]
        inv_z = row[INV_Z * LANES + l]
        most = CUT * inv_z
        most = most if most < CUT else CUT
        x = cut(x, -most, most)
        scale = 1.0 / (4.0 - x * x)
        z = row[Z * LANES + l] * (2.0 + x) * (2.0 + x) * scale
        inv_z = inv_z * (2.0 - x) * (2.0 - x) * scale
        row[Z * LANES + l] = z if z < 300.0 else 300.0
        row[INV_Z * LANES + l] = inv_z if z < 300.0 else 1.0 / 300.0
        moved = abs(x) * (1.0 + z)
        worst = cell[WORST * LANES + l]
        cell[WORST * LANES + l] = worst if worst > moved else moved


@entry
def _iterate_pinned(block, cell, rows, joined):
    """Iterate as ``_iterate`` does, for least energy where every t is known."""
    for l in range(LANES):
        cell[INV_T * LANES + l] = 1.0 / cell[TIME * LANES + l]
        cell[B * LANES + l] = 0.0
        cell[B_L * LANES + l] = 0.0
    for r in range(rows):
        _start_pinned(block[r * ROW : (r + 1) * ROW], cell)
    if joined:
        total(cell, B)
        total(cell, B_L)
    _price_alike(cell, LAM)
    for guess in range(_PINNED_GUESSES):
        for l in range(LANES):
            cell[B * LANES + l] = 0.0
            cell[B_L * LANES + l] = 0.0
        for r in range(rows):
            _answer_pinned(block[r * ROW : (r + 1) * ROW], cell)
        if joined:
            total(cell, B)
            total(cell, B_L)
        if guess == _PINNED_GUESSES - 1 or _missed(cell) < 0.1:
            break
        _reprice(cell)
    sweeps = 0
    while sweeps < _ITERATIONS:
        sweeps += 1
        for l in range(LANES * BOUND, LANES * CELL):
            cell[l] = 0.0
        for r in range(rows):
            _evaluate_pinned(block[r * ROW : (r + 1) * ROW], cell)
        if joined:
            total(cell, BOUND)
            total(cell, B)
            total(cell, B_0)
            total(cell, B_L)
        _move_cell(cell, False)
        for r in range(rows):
            _advance_pinned(block[r * ROW : (r + 1) * ROW], cell)
        if farthest(cell, WORST) <= CLOSE:
            break
    return sweeps


@kernel
def _first_times(cell):
    """Guess the times that the prices of time ask for, from the sums of ``derive``.

    Computing alone would take ``(sum 2 kappa c^3/w)^(1/3)``, uploading alone what devices of one
    and the same spectral efficiency z take with ``psi(z) = w sum a/(B sum a/G)``.
    """
    for l in range(LANES):
        price = cell[WANTED * LANES + l]
        nats = cell[M_0 * LANES + l]
        band = cell[BAND * LANES + l]
        z = inverse_psi(price * nats / (band * cell[M_L * LANES + l]))
        compute, _ = exp_pair(log(cell[M * LANES + l] / price + 1e-300) * (1 / 3))
        guess = compute + nats / (band * z)
        longest = 1.2 * cell[M_T * LANES + l]
        floor = 1.0001 * cell[FLOOR * LANES + l]
        guess = guess if guess > longest else longest
        cell[TIME * LANES + l] = guess if guess > floor else floor


@kernel
def _suits(device, i, time, free_time):
    """Return whether the iteration is for the instance.

    The price of time of devices that only compute is left to the bracketed search, and no time at
    all to the search for the shortest.
    """
    live = False
    for k in range(device.shape[2]):
        if device[i, DEVICE_PAYLOAD, k] > 0.0:
            live = True
        elif device[i, DEVICE_WORK, k] > 0.0 and (
            free_time or device[i, DEVICE_WORK, k] > time * device[i, DEVICE_F_MAX, k]
        ):
            return False
    return live and time > 0.0


@kernel
def _solve(device, cell, target, points, scalars, free_time):
    instances, _, devices = device.shape
    cells = np.zeros(CELL * LANES)
    lanes = by_lanes(instances, devices)
    rows = devices if lanes else (devices + LANES - 1) // LANES
    block = np.zeros(rows * ROW)
    sweeps = 0
    width = LANES if lanes else 1
    for start in range(0, instances, width):
        any_suits = False
        for lane in range(width):
            i = min(start + lane, instances - 1)
            load(block, cells, device, cell, i, lane, not lanes)
            wanted = target[i] if free_time else target[i] - cell[i, CELL_DELAY]
            good = _suits(device, i, wanted, free_time)
            scalars[i, SCALAR_CONVERGED] = 1.0 if good else 0.0
            any_suits = any_suits or good
            cells[(WANTED if free_time else TIME) * LANES + lane] = wanted if wanted > 0.0 else 1.0
        if not any_suits:
            continue
        if not lanes:
            spread(cells)
        take_in(block, cells, rows, not lanes, free_time)
        if free_time:
            _first_times(cells)
            sweeps += _iterate_free(block, cells, rows, not lanes) * width
        elif _pinned(block, rows):
            sweeps += _iterate_pinned(block, cells, rows, not lanes) * width
        else:
            sweeps += _iterate_fixed(block, cells, rows, not lanes) * width
        if not lanes and not all_close(cells):
            scalars[start, SCALAR_CONVERGED] = 0.0
            continue
        finish(block, cells, rows, not lanes)
        for lane in range(min(width, instances - start)):
            i = start + lane
            time = cells[TIME * LANES + lane]
            close = cells[WORST * LANES + lane] <= CLOSE and time > cells[FLOOR * LANES + lane]
            if scalars[i, SCALAR_CONVERGED] > 0.0 and close:
                take_out(block, cells, device, i, lane, not lanes, points, scalars)
            else:
                scalars[i, SCALAR_CONVERGED] = 0.0
    return sweeps


@entry
def least_energy(device, cell, target, points, scalars):
    """Fill ``points`` [instance, 6, device] and ``scalars`` for rounds ``target`` [s]."""
    return _solve(device, cell, target, points, scalars, False)


@entry
def weighted(device, cell, target, points, scalars):
    """Fill ``points`` and ``scalars`` for prices of time ``target`` [W]."""
    return _solve(device, cell, target, points, scalars, True)


# --- a price of time, bracketed --------------------------------------------------------------------


@kernel
def _idle_price(device, i, time):
    """Return the price of time of devices that only compute, and its derivative in log T."""
    price = 0.0
    for k in range(device.shape[2]):
        work = device[i, DEVICE_WORK, k]
        if (
            device[i, DEVICE_PAYLOAD, k] <= 0.0
            and work > 0.0
            and work / time > device[i, DEVICE_F_MIN, k]
        ):
            f = work / time
            price += 2.0 * device[i, DEVICE_KAPPA, k] * f * f * f
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
        for l in range(LANES * BOUND, LANES * CELL):
            cell[l] = 0.0
        for r in range(rows):
            _evaluate(block[r * ROW : (r + 1) * ROW], cell, True)
        for field in range(BOUND, CELL):
            total(cell, field)
        b = cell[B * LANES]
        b_l = min(cell[B_L * LANES], -1e-300)
        room = max(cell[BAND * LANES] - cell[BOUND * LANES], 1e-3 * b)
        missing = 2.0 * (room - b) / (room + b) * b - cell[B_0 * LANES]
        time = cell[TIME * LANES]
        new = time
        settled += 1
        if (cell[WORST * LANES] <= 1e-8 and abs(missing) <= 1e-8 * abs(b_l)) or settled > 40:
            settled = 0
            idle, idle_t = _idle_price(device, i, time)
            m = cell[M * LANES] + idle
            wanted = cell[WANTED * LANES]
            if m > wanted:
                low = max(low, time)
            else:
                high = min(high, time)
            floor = cell[FLOOR * LANES]
            turn = cell[M_L * LANES] / b_l
            slope = cell[M_T * LANES] + idle_t
            slope -= turn * (cell[B_T * LANES] + cell[BOUND_T * LANES])
            # Newton on log mu in log(T - floor)
            above = time - floor
            step = (
                math.log(m / wanted) * m / max(-slope * above / time, 1e-300) if m > 0.0 else -1.0
            )
            new = floor + above * math.exp(cut(step, -3.0, 3.0))
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
        missing = missing - (cell[B_T * LANES] + cell[BOUND_T * LANES]) * dt
        dl = cut(missing / b_l, -CUT, CUT)
        if b <= 0.0:
            # nobody answers to the price, as in _move_cell
            dl = -CUT if room > 1e-12 * cell[BAND * LANES] else CUT
        for l in range(LANES):
            cell[TIME * LANES + l] = new
            cell[INV_T * LANES + l] = 1.0 / new
            cell[DT * LANES + l] = dt
            cell[DL * LANES + l] = dl
            cell[LAM * LANES + l] *= grow(dl)
            cell[PRICE * LANES + l] = cell[LAM * LANES + l] / new
            cell[WORST * LANES + l] = abs(dl)
        for r in range(rows):
            row = block[r * ROW : (r + 1) * ROW]
            _limits(row, cell)
            _advance(row, cell, True)
        worst = 0.0
        for l in range(LANES):
            worst = worst if worst > cell[WORST * LANES + l] else cell[WORST * LANES + l]
        for l in range(LANES):
            cell[WORST * LANES + l] = worst
    return False


@entry
def weighted_carefully(device, cell, target, shortest_s, points, scalars):
    """Solve as ``weighted`` does, slower, and stopped by little; ``shortest_s`` without the fixed delay."""
    instances, _, devices = device.shape
    rows = (devices + LANES - 1) // LANES
    cells = np.zeros(CELL * LANES)
    block = np.zeros(rows * ROW)
    for i in range(instances):
        scalars[i, SCALAR_CONVERGED] = 0.0
        if first_live(device, i) < 0:
            continue
        load(block, cells, device, cell, i, 0, True)
        cells[WANTED * LANES] = target[i]
        spread(cells)
        take_in(block, cells, rows, True, True)
        cells[FLOOR * LANES] = shortest_s[i]
        cells[WORST * LANES] = 1.0
        spread(cells)
        _first_times(cells)
        _bracket(block, cells, rows, device, i, shortest_s[i])
        finish(block, cells, rows, True)
        take_out(block, cells, device, i, 0, True, points, scalars)
