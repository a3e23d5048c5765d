"""Compiled loops for what comes between products: attention, norms, GELU, what devices add.

At the size of one batch torch spends more time on moving numbers through these than on arithmetic.
Written out in additions, multiplications and shifts of bits, on sixteen numbers at a time
(:mod:`pwff_solvers.compiled.lanes`), they take less than half of it.

Every entry runs on one thread and lets other threads run.  Arrays are flat and contiguous, of float32 or
of bfloat16 as uint16; sums are in float32.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pwff_solvers.compiled.lanes import (
    LANES,
    entry,
    kernel,
    larger,
    largest,
    load,
    power_of_two,
    splat,
    spread,
    store,
    total_of,
    turn,
    unless_below,
    where_seen,
)
from pwff_solvers.compiled.switch import COMPILED

AVAILABLE = COMPILED
"""False where numba is switched off; then torch's operations do the same."""


# --- formulas ------------------------------------------------------------------------------------


_ONE, _ZERO = np.float32(1), np.float32(0)
_NEVER = np.float32(-np.inf)
_LOWEST = np.float32(-87.0)  # a little below, e^x is subnormal
_LOG2_E = np.float32(1 / math.log(2))
_SHIFT = np.float32(1.5 * 2**23)  # added and taken off again it rounds to an integer
# ln 2 in two parts: n times the first is exact, so that r = x - n ln 2 loses nothing
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(math.log(2) - 0.693359375)
_E2, _E3, _E4, _E5, _E6, _E7 = (np.float32(1 / math.factorial(n)) for n in range(2, 8))


@kernel
def _exp(x):
    """Return e^x for x <= 0, relative error below 2e-7; 0 below -87."""
    bounded = unless_below(x, _LOWEST, x, splat(_LOWEST))
    shifted = bounded * _LOG2_E + _SHIFT
    n = shifted - _SHIFT
    r = (bounded - n * _LN2_HIGH) - n * _LN2_LOW
    part = (((((_E7 * r + _E6) * r + _E5) * r + _E4) * r + _E3) * r + _E2) * (r * r) + r
    return unless_below(x, _LOWEST, (part + _ONE) * power_of_two(shifted), splat(_ZERO))


@kernel
def _product(a, a_at, a_row, a_column, b, b_at, b_row, out, at, out_row, rows, inner, columns, add):
    """Compute out[i, c] = sum_j a[i, j] b[j, c], added to what is there if ``add``.

    Of b and out, rows of ``columns`` numbers, a multiple of sixteen, side by side. Eight sums at once,
    of four rows and two columns of sixteen, hide the latency of an addition. What is beyond the last
    row or column is the last one again: the same numbers are written there several times.
    """
    if columns == LANES:
        _narrow(a, a_at, a_row, a_column, b, b_at, b_row, out, at, out_row, rows, inner, add)
        return
    for i in range(0, rows, 4):
        i1, i2, i3 = min(i + 1, rows - 1), min(i + 2, rows - 1), min(i + 3, rows - 1)
        a0, a1 = a_at + i * a_row, a_at + i1 * a_row
        a2, a3 = a_at + i2 * a_row, a_at + i3 * a_row
        o0, o1, o2, o3 = at + i * out_row, at + i1 * out_row, at + i2 * out_row, at + i3 * out_row
        for c in range(0, columns, 2 * LANES):
            d = min(c + LANES, columns - LANES)
            s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = splat(_ZERO)
            if add:
                s0, s1 = load(out, o0 + c), load(out, o1 + c)
                s2, s3 = load(out, o2 + c), load(out, o3 + c)
                t0, t1 = load(out, o0 + d), load(out, o1 + d)
                t2, t3 = load(out, o2 + d), load(out, o3 + d)
            for j in range(inner):
                left, right = load(b, b_at + j * b_row + c), load(b, b_at + j * b_row + d)
                x0, x1 = spread(a, a0 + j * a_column), spread(a, a1 + j * a_column)
                x2, x3 = spread(a, a2 + j * a_column), spread(a, a3 + j * a_column)
                s0, t0 = s0 + left * x0, t0 + right * x0
                s1, t1 = s1 + left * x1, t1 + right * x1
                s2, t2 = s2 + left * x2, t2 + right * x2
                s3, t3 = s3 + left * x3, t3 + right * x3
            store(out, o0 + c, s0)
            store(out, o1 + c, s1)
            store(out, o2 + c, s2)
            store(out, o3 + c, s3)
            store(out, o0 + d, t0)
            store(out, o1 + d, t1)
            store(out, o2 + d, t2)
            store(out, o3 + d, t3)


@kernel
def _narrow(a, a_at, a_row, a_column, b, b_at, b_row, out, at, out_row, rows, inner, add):
    """Compute the same for sixteen columns: eight rows at once."""
    last = rows - 1
    for i in range(0, rows, 8):
        i1, i2, i3, i4 = min(i + 1, last), min(i + 2, last), min(i + 3, last), min(i + 4, last)
        i5, i6, i7 = min(i + 5, last), min(i + 6, last), min(i + 7, last)
        a0, a1, a2, a3 = (
            a_at + i * a_row, a_at + i1 * a_row, a_at + i2 * a_row, a_at + i3 * a_row,
        )  # fmt: skip
        a4, a5, a6, a7 = (
            a_at + i4 * a_row, a_at + i5 * a_row, a_at + i6 * a_row, a_at + i7 * a_row,
        )  # fmt: skip
        o0, o1, o2, o3 = at + i * out_row, at + i1 * out_row, at + i2 * out_row, at + i3 * out_row
        o4, o5, o6, o7 = at + i4 * out_row, at + i5 * out_row, at + i6 * out_row, at + i7 * out_row
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = splat(_ZERO)
        if add:
            s0, s1, s2, s3 = load(out, o0), load(out, o1), load(out, o2), load(out, o3)
            s4, s5, s6, s7 = load(out, o4), load(out, o5), load(out, o6), load(out, o7)
        for j in range(inner):
            row, step = load(b, b_at + j * b_row), j * a_column
            s0, s1 = s0 + row * spread(a, a0 + step), s1 + row * spread(a, a1 + step)
            s2, s3 = s2 + row * spread(a, a2 + step), s3 + row * spread(a, a3 + step)
            s4, s5 = s4 + row * spread(a, a4 + step), s5 + row * spread(a, a5 + step)
            s6, s7 = s6 + row * spread(a, a6 + step), s7 + row * spread(a, a7 + step)
        store(out, o0, s0)
        store(out, o1, s1)
        store(out, o2, s2)
        store(out, o3, s3)
        store(out, o4, s4)
        store(out, o5, s5)
        store(out, o6, s6)
        store(out, o7, s7)


@kernel
def _turn(x, at, stride, rows, columns, out, out_row):
    """Set out[c, i] = x[i, c]; zeros in out's columns beyond ``rows``, up to a multiple of sixteen."""
    for i in range(0, rows, LANES):
        for c in range(0, columns, LANES):
            turn(x, at + i * stride + c, stride, rows - 1 - i, out, c * out_row + i, out_row)
    for c in range(columns):
        for i in range(rows, out_row):
            out[c * out_row + i] = _ZERO


# Phi(-z) = e^(-z^2 / 2) t P(t) for z >= 0, t = 1 / (1 + STRETCH z): fitted to scipy's erfcx by
# weighted least squares, relative error 7e-8 but for rounding.
_STRETCH = np.float32(0.36)
_P = tuple(
    np.float32(number)
    for number in (
        0.14362233877182007,
        0.14359734952449799,
        0.12463390082120895,
        0.0935715064406395,
        0.00534484488889575,
        0.09930390864610672,
        -0.21685872972011566,
        0.13643792271614075,
        -0.029653076082468033,
    )
)
_HALF, _DENSITY = np.float32(-0.5), np.float32(1 / math.sqrt(2 * math.pi))


@kernel
def _normal(x):
    """Return the normal distribution function Phi(x), and its density; relative errors 1e-6 above -6.

    Below, that of x^2 is seen in e^(-x^2 / 2): 4e-6 at -12.
    """
    bell = _exp(x * x * _HALF)
    t = _ONE / (larger(x, x * -_ONE) * _STRETCH + _ONE)
    p = _P[8] * t + _P[7]
    p = (((p * t + _P[6]) * t + _P[5]) * t + _P[4]) * t + _P[3]
    tail = bell * t * (((p * t + _P[2]) * t + _P[1]) * t + _P[0])
    return unless_below(x, _ZERO, _ONE - tail, tail), bell * _DENSITY


# --- activations and norms -----------------------------------------------------------------------


@kernel
def _gelu(x, out, slope):
    """Write x Phi(x); and its derivative to ``slope``, unless that is empty.

    As many numbers as are a multiple of sixteen.
    """
    for at in range(0, len(x), LANES):
        value = load(x, at)
        share, density = _normal(value)
        store(out, at, value * share)
        if len(slope):
            store(slope, at, value * density + share)


gelu = entry(_gelu.py_func)


@entry
def add_norm(x, residual, weight, bias, epsilon, out, low, centred, deviations):
    """Write the norm of x + residual (Ba et al. 2016): rows of mean 0 and variance 1, then an affine map.

    x, residual, out : [row, column], columns a multiple of sixteen.
    low : the same in bfloat16; nothing if empty.
    centred : [row, column]: before the affine map, for :func:`add_norm_back`; nothing if empty.
    deviations : [row], what the norm has divided by.
    """
    columns = len(weight)
    for row in range(len(deviations)):
        start = row * columns
        total = splat(_ZERO)
        for c in range(0, columns, LANES):
            value = load(x, start + c) + load(residual, start + c)
            store(out, start + c, value)
            total = total + value
        mean = total_of(total) / np.float32(columns)
        total = splat(_ZERO)
        for c in range(0, columns, LANES):
            value = load(out, start + c) - mean
            total = total + value * value
        deviation = np.sqrt(total_of(total) / np.float32(columns) + epsilon)
        deviations[row] = deviation
        inverse = _ONE / deviation
        for c in range(0, columns, LANES):
            value = (load(out, start + c) - mean) * inverse
            if len(centred):
                store(centred, start + c, value)
            value = value * load(weight, c) + load(bias, c)
            store(out, start + c, value)
            if len(low):
                store(low, start + c, value)


@entry
def add_norm_back(grad, more, centred, deviations, weight, out, low):
    """Write the gradient of :func:`add_norm`, the same for both inputs, given that of ``out``.

    The latter is the sum of ``grad`` and ``more``, where that is not empty. ``low``: as there.
    """
    columns = len(weight)
    for row in range(len(deviations)):
        start = row * columns
        sums, products = splat(_ZERO), splat(_ZERO)
        for c in range(0, columns, LANES):
            value = load(grad, start + c)
            if len(more):
                value = value + load(more, start + c)
            value = value * load(weight, c)
            store(out, start + c, value)
            sums = sums + value
            products = products + value * load(centred, start + c)
        mean, slope = total_of(sums) / np.float32(columns), total_of(products) / np.float32(columns)
        inverse = _ONE / deviations[row]
        for c in range(0, columns, LANES):
            value = load(out, start + c) - mean
            value = (value - load(centred, start + c) * slope) * inverse
            store(out, start + c, value)
            if len(low):
                store(low, start + c, value)


@entry
def multiply(x, y):
    """Multiply x by y, as many numbers as are a multiple of sixteen."""
    for at in range(0, len(x), LANES):
        store(x, at, load(x, at) * load(y, at))


@entry
def add(x, y):
    """Add y to x, as many numbers as are a multiple of sixteen."""
    for at in range(0, len(x), LANES):
        store(x, at, load(x, at) + load(y, at))


# --- low-rank updates ----------------------------------------------------------------------------


@entry
def low_rank(x, a, b, scale, rank, start, stop, out, out_row, out_at, inner):
    """Add scale B A x to the rows from ``start`` to ``stop`` of some columns of ``out``.

    x : [row, hidden]; a : [rank, hidden]; b : [outputs, rank]; outputs a multiple of sixteen.
    out : rows ``out_row`` apart, the columns from ``out_at`` on.
    inner : [stop - start, rank filled up to a multiple of sixteen]: A x is left there.
    """
    hidden, outputs, held = len(a) // rank, len(b) // rank, _whole(rank)
    turned = np.zeros(max(hidden * held, rank * outputs), np.float32)
    for r in range(rank):
        for c in range(hidden):
            turned[c * held + r] = a[r * hidden + c]
    rows = stop - start
    _product(
        x, start * hidden, hidden, 1, turned, 0, held,
        inner, 0, held, rows, hidden, held, False,
    )  # fmt: skip
    for r in range(rank):
        for c in range(outputs):
            turned[r * outputs + c] = b[c * rank + r] * scale
    _product(
        inner, 0, held, 1, turned, 0, outputs,
        out, start * out_row + out_at, out_row, rows, rank, outputs, True,
    )  # fmt: skip


@entry
def low_rank_back(
    grad, grad_row, grad_at, x, inner, a, b, scale, rank, start, stop, to_a, to_b, to_x
):
    """Write the gradients of :func:`low_rank` for a and b, and add that for x, unless it is empty."""
    hidden, outputs, held = len(a) // rank, len(b) // rank, _whole(rank)
    rows, at = stop - start, start * grad_row + grad_at
    wide, back = np.zeros(outputs * held, np.float32), np.empty(rows * held, np.float32)
    for c in range(outputs):
        for r in range(rank):
            wide[c * held + r] = b[c * rank + r] * scale
    _product(grad, at, grad_row, 1, wide, 0, held, back, 0, held, rows, outputs, held, False)
    _product(grad, at, 1, grad_row, inner, 0, held, wide, 0, held, outputs, rows, held, False)
    for c in range(outputs):
        for r in range(rank):
            to_b[c * rank + r] = wide[c * held + r] * scale
    _product(
        back, 0, 1, held, x, start * hidden, hidden,
        to_a, 0, hidden, rank, rows, hidden, False,
    )  # fmt: skip
    if len(to_x):
        _product(
            back, 0, held, 1, a, 0, hidden,
            to_x, start * hidden, hidden, rows, rank, hidden, True,
        )  # fmt: skip


# --- bottleneck adapters -------------------------------------------------------------------------


@entry
def bottleneck(x, start, stop, down, down_bias, up, up_bias, out, inner, slope):
    """Write x + U gelu(D x + d) + u, the rows from ``start`` to ``stop``.

    x, out : [row, hidden], hidden a multiple of sixteen.
    down : [width, hidden]; up : [hidden, width].
    inner : [stop - start, width filled up to a multiple of sixteen]: what goes into U is left there.
    slope : the same, GELU's derivative, for :func:`bottleneck_back`; nothing if empty.
    """
    hidden, width, held, rows = len(up_bias), len(down_bias), _whole(len(down_bias)), stop - start
    turned = np.zeros(hidden * held, np.float32)
    for c in range(width):
        for h in range(hidden):
            turned[h * held + c] = down[c * hidden + h]
    for row in range(rows):
        for c in range(held):
            inner[row * held + c] = down_bias[c] if c < width else _ZERO
    _product(
        x, start * hidden, hidden, 1, turned, 0, held,
        inner, 0, held, rows, hidden, held, True,
    )  # fmt: skip
    _gelu(inner, inner, slope)
    for c in range(width):
        for h in range(hidden):
            turned[c * hidden + h] = up[h * width + c]
    for row in range(start, stop):
        for c in range(0, hidden, LANES):
            place = row * hidden + c
            store(out, place, load(x, place) + load(up_bias, c))
    _product(
        inner, 0, held, 1, turned, 0, hidden,
        out, start * hidden, hidden, rows, width, hidden, True,
    )  # fmt: skip


@entry
def bottleneck_back(
    grad, x, start, stop, down, down_bias, up, up_bias, inner, slope,
    to_down, to_down_bias, to_up, to_up_bias, to_x,
):  # fmt: skip
    """Write the gradients of :func:`bottleneck` for an adapter, given that of ``out``.

    Add that for x, unless it is empty: what came through the adapter, not past it.
    """
    hidden, width, held, rows = len(up_bias), len(down_bias), _whole(len(down_bias)), stop - start
    at = start * hidden
    wide, back = np.zeros(hidden * held, np.float32), np.empty(rows * held, np.float32)
    for h in range(hidden):
        for c in range(width):
            wide[h * held + c] = up[h * width + c]
    _product(grad, at, hidden, 1, wide, 0, held, back, 0, held, rows, hidden, held, False)
    for place in range(0, len(back), LANES):
        store(back, place, load(back, place) * load(slope, place))
    _product(grad, at, 1, hidden, inner, 0, held, wide, 0, held, hidden, rows, held, False)
    for h in range(hidden):
        for c in range(width):
            to_up[h * width + c] = wide[h * held + c]
    _product(
        back, 0, 1, held, x, at, hidden,
        to_down, 0, hidden, width, rows, hidden, False,
    )  # fmt: skip
    _column_sums(grad, at, hidden, rows, to_up_bias)
    _column_sums(back, 0, held, rows, wide[:held])
    to_down_bias[:] = wide[:width]
    if len(to_x):
        _product(back, 0, held, 1, down, 0, hidden, to_x, at, hidden, rows, width, hidden, True)


@kernel
def _column_sums(x, at, stride, rows, out):
    """Write the sums of as many columns as ``out`` has, a multiple of sixteen."""
    for c in range(0, len(out), LANES):
        total = splat(_ZERO)
        for row in range(rows):
            total = total + load(x, at + row * stride + c)
        store(out, c, total)


# --- attention -----------------------------------------------------------------------------------


def whole(number: Any) -> Any:
    """Return ``number`` filled up to a multiple of sixteen."""
    return (number + LANES - 1) // LANES * LANES


_whole = kernel(whole)


@entry
def attend(
    queries, q_row, keys, k_row, values, v_row, lengths, heads, groups, size,
    scale, causal, width, sinks, out, weights, keep,
):  # fmt: skip
    """Write softmax(scale Q K^T) V of every sequence and head; see :mod:`attention`.

    queries, keys, values : rows of [head x size], ``*_row`` apart; ``size`` a multiple of sixteen.
    lengths : of the sequences.
    groups : heads of queries that share one of keys.
    width, sinks : as in ``attention.Window``.
    out : [row, heads x size]; zeros in rows beyond the sequences.
    weights : the softmax: [query, key], its rows filled up to a multiple of sixteen; with ``keep`` of
        every sequence and head, end to end, for :func:`attend_back`, else of one after the other.
    """
    longest = _whole(lengths.max())
    turned = np.empty(size * longest, np.float32)
    of_row = np.empty(longest, np.float32)
    row = at = 0
    for length in lengths:
        keys_held = _whole(length)
        for head in range(heads):
            own, shared = head * size, head // groups * size
            if head % groups == 0:
                _turn(keys, row * k_row + shared, k_row, length, size, turned, keys_held)
            _product(
                queries, row * q_row + own, q_row, 1, turned, 0, keys_held,
                weights, at, keys_held, length, size, keys_held, False,
            )  # fmt: skip
            # Row by row in steps: each step's rows hide one another's latency.
            for i in range(length):
                line = at + i * keys_held
                seen = i + 1 if causal else length
                # Up to here all is seen, so nothing need be asked.
                open_to = -1 if max(i, length - 1 - i) >= width else seen - LANES
                peak = splat(_NEVER)
                for c in range(0, keys_held, LANES):
                    score = load(weights, line + c) * scale
                    if c > open_to:
                        score = where_seen(score, c, seen, sinks, i - width, i + width)
                    store(weights, line + c, score)
                    peak = larger(peak, score)
                of_row[i] = largest(peak)
            for i in range(length):
                line, most = at + i * keys_held, spread(of_row, i)
                total = splat(_ZERO)
                for c in range(0, keys_held, LANES):
                    each = _exp(load(weights, line + c) - most)
                    store(weights, line + c, each)
                    total = total + each
                of_row[i] = total_of(total)
            for i in range(length):
                line, share = at + i * keys_held, splat(_ONE) / spread(of_row, i)
                for c in range(0, keys_held, LANES):
                    store(weights, line + c, load(weights, line + c) * share)
            _product(
                weights, at, keys_held, 1, values, row * v_row + shared, v_row,
                out, row * heads * size + own, heads * size, length, length, size, False,
            )  # fmt: skip
            if keep:
                at += length * keys_held
        row += length
    out[row * heads * size :] = _ZERO


@entry
def attend_back(
    grad, queries, q_row, keys, k_row, values, v_row, lengths, heads, groups, size,
    scale, weights, to_queries, dq_row, to_keys, dk_row, to_values, dv_row, wanted,
):  # fmt: skip
    """Write the gradients of :func:`attend` for its inputs, given that of ``out``.

    to_queries, to_keys, to_values : like queries, keys and values; zeros in rows beyond the sequences.
    wanted : [3], which of them.
    """
    wants_queries, wants_keys, wants_values = wanted
    longest = _whole(lengths.max())
    turned = np.empty(size * longest, np.float32)
    scores = np.empty(lengths.max() * longest, np.float32)
    wide = heads * size
    row = at = 0
    for length in lengths:
        keys_held = _whole(length)
        for head in range(heads):
            own, shared = row * wide + head * size, head // groups * size
            k_at, v_at = row * k_row + shared, row * v_row + shared
            again = head % groups > 0
            if wants_values:
                _product(
                    weights, at, 1, keys_held, grad, own, wide,
                    to_values, row * dv_row + shared, dv_row, length, length, size, again,
                )  # fmt: skip
            if wants_queries or wants_keys:
                if not again:
                    _turn(values, v_at, v_row, length, size, turned, keys_held)
                _product(
                    grad, own, wide, 1, turned, 0, keys_held,
                    scores, 0, keys_held, length, size, keys_held, False,
                )  # fmt: skip
                for i in range(length):
                    line, held = i * keys_held, at + i * keys_held
                    total = splat(_ZERO)
                    for c in range(0, keys_held, LANES):
                        total = total + load(scores, line + c) * load(weights, held + c)
                    mean = total_of(total)
                    for c in range(0, keys_held, LANES):
                        part = (load(scores, line + c) - mean) * load(weights, held + c)
                        store(scores, line + c, part * scale)
            if wants_queries:
                _product(
                    scores, 0, keys_held, 1, keys, k_at, k_row,
                    to_queries, row * dq_row + head * size, dq_row, length, length, size, False,
                )  # fmt: skip
            if wants_keys:
                _product(
                    scores, 0, 1, keys_held, queries, row * q_row + head * size, q_row,
                    to_keys, row * dk_row + shared, dk_row, length, length, size, again,
                )  # fmt: skip
            at += length * keys_held
        row += length
    for rest in range(row, len(grad) // wide):
        if wants_queries:
            to_queries[rest * dq_row : rest * dq_row + wide] = _ZERO
        if wants_keys:
            to_keys[rest * dk_row : rest * dk_row + wide // groups] = _ZERO
        if wants_values:
            to_values[rest * dv_row : rest * dv_row + wide // groups] = _ZERO
