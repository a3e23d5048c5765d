"""Blocks of slots: what the compiled iterations work on, and how instances get in and out.

A *block* has rows of ``LANES`` slots.  Either a lane is an instance and a row a device (few
devices), or the whole block is one instance, its devices laid out row by row; then every lane of
the *cell* holds the same numbers.  Slots without a device, and devices without payload, take the
constants of a live device with weight 0: they converge with the others and count for nothing.

Loops over lanes have a constant length and no branches, so that LLVM turns them into vector code;
row and cell are flat arrays, so that it can tell which of their parts do not overlap.
"""

from __future__ import annotations

import math

from pwff_solvers.allocation.slots import (
    CELL_BAND,
    CELL_NOISE,
    DEVICE_F_MAX,
    DEVICE_F_MIN,
    DEVICE_FIXED_ENERGY,
    DEVICE_GAIN,
    DEVICE_KAPPA,
    DEVICE_PAYLOAD,
    DEVICE_POWER_MAX,
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
from pwff_solvers.compiled.elementary import exp_pair, kernel, log, rough_log

# Fewer than 16 and LLVM takes the loop for one not worth vectorising.
LANES = 16
# log-steps are cut here, well inside the range of the rational exponential below
CUT = 1.8
# The last step taken; quadratic convergence leaves about its square.
CLOSE = 3e-6
_LN2 = math.log(2.0)
# A block of instances waits for its slowest, which costs about this factor.
_LANES_COST = 1.2

# Fields of a row of slots, each LANES numbers.
WEIGHT = 0  # 1 for a device with payload, else 0
A = 1  # payload [nat]
G = 2  # gain over noise density [Hz/W]
LEAST = 3  # a/(PG) [s], upload time at full power in unlimited bandwidth
TWICE_C = 4  # 2 kappa c^3 [W s^3]
FAST = 5  # c/f_max [s]
SLOW = 6  # c/f_min [s]
Z = 7
INV_Z = 8
W = 9  # (T-t)/t
W_MIN = 10
W_MAX = 11
# the step: dx = X + X_L dl + X_T dlogT - X_Y dy,  dy = Y + Y_L dl + Y_T dlogT
X = 12
X_L = 13
X_T = 14
X_Y = 15
Y = 16
COST = 15  # only for the start: 2 kappa c^3 G/(a T^2)
W_MOST = 16  # only for the start: what leaves a device time to make do with a part of the band
SPARE = 16  # only for the shortest round: its floor less fast and least [s]
Y_L = 17
Y_T = 18
FIELDS = 19
ROW = FIELDS * LANES

# Fields of the cell, each LANES numbers.
TIME = 0  # T [s], fixed delay taken off
BAND = 1
LAM = 2  # price of bandwidth [J/Hz]
WANTED = 3  # price of time to be met [W]; free time only
FLOOR = 4  # T is above this [s]; free time only
INV_T = 5
PRICE = 6  # lam/T
DL = 7
DT = 8  # step of log T
WORST = 9  # largest step just taken
BOUND = 10  # bandwidth of devices that do not answer to the price
BOUND_T = 11
B = 12  # bandwidth of the others, and its change with the step
B_0 = 13
B_L = 14
B_T = 15
M = 16  # price of time, and its change with the step
M_0 = 17
M_L = 18
M_T = 19
ABOVE = 3  # only for the shortest round: T above its floor
CELL = 20


@kernel
def cut(x, low, high):
    x = x if x > low else low
    return x if x < high else high


@kernel
def grow(d):
    """Return ``e^d`` to third order, for |d| < 2."""
    return (2.0 + d) / (2.0 - d)


@kernel
def psi(z, expm1):
    series = z * z * (0.5 + z * (1 / 3 + z * (0.125 + z * (1 / 30 + z * (1 / 144)))))
    closed = z + (z - 1.0) * expm1
    return series if z < 0.02 else closed


@kernel
def inverse_psi(p):
    """Return z with ``psi(z) = p``, within 2 %, for z <= 300: a start."""
    # z = s - s^2/3 + ..., s^2 = 2p; log p - log log p + ...; the numbers make the error even
    root = math.sqrt(2.0 * p)
    small = root / (1.0 + root * (0.31417 - 0.01483 * root))
    level = rough_log(p + 1.718)
    large = level - 1.0504 * rough_log(level) + 0.5934
    return small if p < 8.0 else large


@kernel
def inverse_phi(excess):
    """Return z with ``phi(z) = 1 + excess``, within 8 %, for 1e-6 <= z <= 300: a start."""
    level = rough_log(1.0 + (excess if excess > 1e-9 else 1e-9))
    return 0.944 * level + 1.2 * rough_log(1.0 + level)


# --- in ------------------------------------------------------------------------------------------


@kernel
def by_lanes(instances, devices):
    """Return whether a lane should be an instance, rather than a block."""
    groups = (instances + LANES - 1) // LANES
    rows = (devices + LANES - 1) // LANES
    return _LANES_COST * groups * devices < instances * rows


@kernel
def first_live(device, i):
    """Return the first device with payload, -1 if there is none."""
    for k in range(device.shape[2]):
        if device[i, DEVICE_PAYLOAD, k] > 0.0:
            return k
    return -1


@kernel
def load(block, cells, device, cell, i, lane, joined):
    """Copy an instance into a lane, or into the whole block if ``joined``."""
    devices = device.shape[2]
    stand_in = max(first_live(device, i), 0)
    per_noise = 1.0 / cell[i, CELL_NOISE]
    slots = (devices + LANES - 1) // LANES * LANES if joined else devices
    for slot in range(slots):
        k = slot if slot < devices else stand_in
        live = slot < devices and device[i, DEVICE_PAYLOAD, k] > 0.0
        k = k if live else stand_in
        at = slot // LANES * ROW + slot % LANES if joined else slot * ROW + lane
        block[at + WEIGHT * LANES] = 1.0 if live else 0.0
        block[at + A * LANES] = device[i, DEVICE_PAYLOAD, k] * _LN2
        block[at + G * LANES] = device[i, DEVICE_GAIN, k] * per_noise
        block[at + LEAST * LANES] = device[i, DEVICE_POWER_MAX, k]
        block[at + TWICE_C * LANES] = device[i, DEVICE_KAPPA, k]
        block[at + FAST * LANES] = device[i, DEVICE_F_MAX, k]
        block[at + SLOW * LANES] = device[i, DEVICE_F_MIN, k]
        block[at + X * LANES] = device[i, DEVICE_WORK, k]
    if joined:
        for other in range(LANES):
            cells[BAND * LANES + other] = cell[i, CELL_BAND]
    else:
        cells[BAND * LANES + lane] = cell[i, CELL_BAND]


@kernel
def derive(row, cell, wanted):
    """Turn what was loaded into the constants of the iteration; gather what a start needs.

    ``FLOOR`` becomes the least time there is.  If ``wanted``, ``M``, ``M_0`` and ``M_L`` become the
    sums of 2 kappa c^3, a and a/G, and ``M_T`` the longest that a device takes with the whole band.
    """
    for l in range(LANES):
        weight = row[WEIGHT * LANES + l]
        a = row[A * LANES + l]
        g = row[G * LANES + l]
        power = row[LEAST * LANES + l]
        f_min = row[SLOW * LANES + l]
        work = row[X * LANES + l]
        least = a / (power * g)
        fast = work / row[FAST * LANES + l]
        slow = work / (f_min if f_min > 0.0 else 1e-300)
        twice_c = 2.0 * row[TWICE_C * LANES + l] * work * work * work
        row[LEAST * LANES + l] = least
        row[TWICE_C * LANES + l] = twice_c
        row[FAST * LANES + l] = fast
        row[SLOW * LANES + l] = slow
        end = weight * (fast + least)
        floor = cell[FLOOR * LANES + l]
        cell[FLOOR * LANES + l] = floor if floor > end else end
        if wanted:
            band = cell[BAND * LANES + l]
            alone = weight * (fast + a / (band * log(1.0 + power * g / band)))
            longest = cell[M_T * LANES + l]
            cell[M * LANES + l] += weight * twice_c
            cell[M_0 * LANES + l] += weight * a
            cell[M_L * LANES + l] += weight * a / g
            cell[M_T * LANES + l] = longest if longest > alone else alone


@kernel
def total(cell, field):
    """Let every lane of a sum become the sum over lanes: they hold parts of one instance."""
    value = 0.0
    for l in range(LANES):
        value += cell[field * LANES + l]
    for l in range(LANES):
        cell[field * LANES + l] = value


@kernel
def largest(cell, field):
    """Let every lane become the largest."""
    value = cell[field * LANES]
    for l in range(LANES):
        value = max(value, cell[field * LANES + l])
    for l in range(LANES):
        cell[field * LANES + l] = value


@kernel
def take_in(block, cell, rows, joined, wanted):
    """Derive all rows."""
    for l in range(LANES):
        cell[FLOOR * LANES + l] = 0.0
    for l in range(LANES * BOUND, LANES * CELL):
        cell[l] = 0.0
    for r in range(rows):
        derive(block[r * ROW : (r + 1) * ROW], cell, wanted)
    if joined:
        largest(cell, FLOOR)
        if wanted:
            total(cell, M)
            total(cell, M_0)
            total(cell, M_L)
            largest(cell, M_T)


@kernel
def farthest(cell, field):
    """Return the largest of all lanes.  NaN is passed over: waiting does not mend such a lane, and
    its own number tells that it has not converged."""
    value = 0.0
    for l in range(LANES):
        value = cell[field * LANES + l] if cell[field * LANES + l] > value else value
    return value


@kernel
def spread(cells):
    """Let every lane become the first: the lanes hold one instance."""
    for field in range(CELL):
        for lane in range(1, LANES):
            cells[field * LANES + lane] = cells[field * LANES]


@kernel
def all_close(cells):
    """Return whether every lane has converged; NaN has not."""
    for lane in range(LANES):
        if not cells[WORST * LANES + lane] <= CLOSE:
            return False
    return True


# --- out -----------------------------------------------------------------------------------------

# The fields of the step become those of the answer.
OUT_B = X
OUT_T = X_L
OUT_REST = X_Y  # T - t
OUT_P = Y
OUT_E = Y_L  # energy of sending


@kernel
def answer_row(row, cell):
    """Find bandwidth, times and price of time of a row of devices, from ``Z`` and ``W``; add up.

    The price of time is that of uploading, ``lam a e^z/(psi t^2) - P`` or ``lam a/(z t^2)``: one
    formula, whose two parts are not negative.  Inside the limits of t it is that of computing too.
    """
    for l in range(LANES):
        time = cell[TIME * LANES + l]
        w = row[W * LANES + l]
        z = row[Z * LANES + l]
        share = 1.0 / (1.0 + w)
        t = time * share
        e, expm1 = exp_pair(z)
        p = psi(z, expm1)
        over = cell[LAM * LANES + l] * row[G * LANES + l] / (p * t) - 1.0
        over = over if over > 0.0 else 0.0
        weight = row[WEIGHT * LANES + l]
        b = weight * row[A * LANES + l] / (z * t)
        row[OUT_B * LANES + l] = b
        row[OUT_T * LANES + l] = t
        row[OUT_REST * LANES + l] = time * (w * share)
        cell[B * LANES + l] += b
        price = row[A * LANES + l] / (row[G * LANES + l] * t) * (over * e + p / z)
        cell[M * LANES + l] += weight * price
        # dmu/dlog lam at a fixed point is mu + P
        power = row[A * LANES + l] / (row[G * LANES + l] * row[LEAST * LANES + l])
        cell[M_L * LANES + l] += weight * (price + power)


@kernel
def fill_row(row, cell):
    """Spread the bandwidth to the last bit, and find the power that goes with it."""
    for l in range(LANES):
        b = row[OUT_B * LANES + l] * cell[B * LANES + l]
        t = row[OUT_T * LANES + l]
        z = row[A * LANES + l] / ((b if b > 0.0 else 1.0) * t)
        _, expm1 = exp_pair(z)
        p = b * expm1 / row[G * LANES + l]
        row[OUT_B * LANES + l] = b
        row[OUT_P * LANES + l] = p
        row[OUT_E * LANES + l] = p * t


@kernel
def finish(block, cell, rows, joined):
    """Turn a converged block into answers; ``B``, ``M``, ``M_L`` of the cell become their sums."""
    for l in range(LANES * BOUND, LANES * CELL):
        cell[l] = 0.0
    for r in range(rows):
        answer_row(block[r * ROW : (r + 1) * ROW], cell)
    if joined:
        total(cell, B)
        total(cell, M)
        total(cell, M_L)
    for l in range(LANES):
        cell[B * LANES + l] = cell[BAND * LANES + l] / cell[B * LANES + l]
    for r in range(rows):
        fill_row(block[r * ROW : (r + 1) * ROW], cell)


@kernel
def take_out(block, cells, device, i, lane, joined, points, scalars):
    """Copy an instance's answers out; devices without payload compute at leisure."""
    time = cells[TIME * LANES + lane]
    mu = cells[M * LANES + lane]
    b_, p_, f_, t_ = (
        points[i, POINT_BAND],
        points[i, POINT_POWER],
        points[i, POINT_FREQUENCY],
        points[i, POINT_UPLOAD],
    )
    compute_, energy_ = points[i, POINT_COMPUTE], points[i, POINT_ENERGY]
    for k in range(device.shape[2]):
        work = device[i, DEVICE_WORK, k]
        f_min = device[i, DEVICE_F_MIN, k]
        f_max = device[i, DEVICE_F_MAX, k]
        rest = time
        if device[i, DEVICE_PAYLOAD, k] > 0.0:
            at = k // LANES * ROW + k % LANES if joined else k * ROW + lane
            b_[k] = block[at + OUT_B * LANES]
            p_[k] = block[at + OUT_P * LANES]
            t_[k] = block[at + OUT_T * LANES]
            energy_[k] = block[at + OUT_E * LANES]
            rest = block[at + OUT_REST * LANES]
        else:
            b_[k] = 0.0
            p_[k] = 0.0
            t_[k] = 0.0
            energy_[k] = 0.0
            # to the right of a kink the device has stopped slowing down: time has no price
            if work / time > f_min:
                mu += 2.0 * device[i, DEVICE_KAPPA, k] * (work / time) ** 3
        f = work / rest if work > 0.0 else f_min
        f = max(min(f, f_max), f_min)
        f_[k] = f
        compute_[k] = work / f if work > 0.0 else 0.0
        energy_[k] += device[i, DEVICE_KAPPA, k] * work * f * f + device[i, DEVICE_FIXED_ENERGY, k]
    scalars[i, SCALAR_CONVERGED] = 1.0
    scalars[i, SCALAR_TIME] = time
    scalars[i, SCALAR_LAM] = cells[LAM * LANES + lane]
    scalars[i, SCALAR_MU] = mu
    scalars[i, SCALAR_SLOPE] = cells[M_L * LANES + lane]
