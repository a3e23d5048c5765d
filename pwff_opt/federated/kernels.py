"""Compiled loops for what comes between products: attention, norms, activations.

At the size of one batch torch spends more time on moving numbers through these than on arithmetic.
Written out in additions, multiplications and shifts of bits, on sixteen float32 side by side, they
take a third of it.  Sixteen fill a register of AVX-512; elsewhere LLVM takes several.

Every entry runs on one thread and lets other threads run.  Arrays are flat and contiguous, of float32 or
of bfloat16 as uint16; sums are in float32.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, overload, register_model

AVAILABLE = not numba.config.DISABLE_JIT


def flat(x: torch.Tensor) -> Any:
    """Return the memory of a contiguous tensor as kernels take it, [n]."""
    x = x.detach().view(-1)
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


# --- sixteen float32 side by side ----------------------------------------------------------------

LANES = 16
_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_VECTOR, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)
_HALVES = ir.VectorType(ir.IntType(16), LANES)
_LOOSE = ("contract",)  # a product and a sum may become one operation


class _Lanes(types.Type):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__("float32x16")


_lanes = _Lanes()


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


def _all(builder: Any, number: Any) -> Any:
    first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, _INT(0))
    return builder.shuffle_vector(first, first, ir.Constant(_INTS, [0] * LANES))


def _place(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    vector = _HALVES if kind.dtype == types.uint16 else _VECTOR
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def _same(vector: Any, number: int) -> Any:
    return ir.Constant(vector, [number] * LANES)


@intrinsic
def _load(typing: Any, array: Any, index: Any) -> Any:
    """Sixteen numbers of an array, of float32 or of bfloat16 as uint16, from ``index`` on."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[0]
        found = builder.load(_place(context, builder, kind, *args), align=kind.dtype.bitwidth // 8)
        if kind.dtype == types.float32:
            return found
        wide = builder.shl(builder.zext(found, _INTS), _same(_INTS, 16))
        return builder.bitcast(wide, _VECTOR)

    return _lanes(array, types.intp), code


@intrinsic
def _store(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Write sixteen numbers; to bfloat16 rounded to the nearest, of two to the even one."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind, value = signature.args[0], args[2]
        if kind.dtype == types.uint16:
            bits = builder.bitcast(value, _INTS)
            last = builder.and_(builder.lshr(bits, _same(_INTS, 16)), _same(_INTS, 1))
            rounded = builder.add(builder.add(bits, last), _same(_INTS, 0x7FFF))
            none = builder.fcmp_unordered("uno", value, value)  # rounding could make it a zero
            rounded = builder.select(none, _same(_INTS, 0x7FC00000), rounded)
            value = builder.trunc(builder.lshr(rounded, _same(_INTS, 16)), _HALVES)
        place = _place(context, builder, kind, *args[:2])
        builder.store(value, place, align=kind.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(array, types.intp, _lanes), code


@intrinsic
def _scatter(typing: Any, array: Any, index: Any, stride: Any, value: Any) -> Any:
    """Write sixteen numbers ``stride`` apart."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        index = args[1]
        for lane in range(LANES):
            builder.store(builder.extract_element(args[3], _INT(lane)), builder.gep(data, [index]))
            index = builder.add(index, args[2])
        return context.get_dummy_value()

    return types.none(array, types.intp, types.intp, _lanes), code


@intrinsic
def _spread(typing: Any, array: Any, index: Any) -> Any:
    """The number at ``index`` sixteen times. Unlike ``array[index]`` it does not ask for the sign."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[0]
        data = context.make_array(kind)(context, builder, args[0]).data
        found = builder.load(builder.gep(data, [args[1]]))
        if kind.dtype == types.uint16:
            found = builder.bitcast(builder.shl(builder.zext(found, _INT), _INT(16)), _FLOAT)
        return _all(builder, found)

    return _lanes(array, types.intp), code


@intrinsic
def _splat(typing: Any, number: Any) -> Any:
    """One number sixteen times."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _all(builder, args[0])

    return _lanes(types.float32), code


def _define(operation: Callable[..., Any], name: str) -> None:
    """Let Python's operator work on lanes, and on lanes and a number."""

    @intrinsic
    def apply(typing: Any, left: Any, right: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            sides = [
                value if kind == _lanes else _all(builder, value)
                for value, kind in zip(args, signature.args, strict=True)
            ]
            return getattr(builder, name)(*sides, flags=_LOOSE)

        kinds = [kind if kind == _lanes else types.float32 for kind in (left, right)]
        return _lanes(*kinds), code

    @overload(operation)
    def on_lanes(left, right):  # type: ignore[no-untyped-def]
        if _lanes in (left, right):
            return lambda left, right: apply(left, right)
        return None


_define(operator.add, "fadd")
_define(operator.sub, "fsub")
_define(operator.mul, "fmul")
_define(operator.truediv, "fdiv")


@intrinsic
def _unless_below(typing: Any, x: Any, bound: Any, value: Any, other: Any) -> Any:
    """``other`` where x < bound, else (also where x is not a number) ``value``."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        below = builder.fcmp_ordered("<", args[0], _all(builder, args[1]))
        return builder.select(below, args[3], args[2])

    return _lanes(_lanes, types.float32, _lanes, _lanes), code


@intrinsic
def _seen(
    typing: Any, x: Any, at: Any, end: Any, sinks: Any, before: Any, after: Any
) -> Any:
    """Minus infinity in places, counted from ``at``, that are not seen.

    Seen are those below ``end`` if also below ``sinks``, or above ``before`` and below ``after``.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def ints(number: Any) -> Any:
            first = builder.insert_element(ir.Constant(_INTS, ir.Undefined), number, _INT(0))
            return builder.shuffle_vector(first, first, ir.Constant(_INTS, [0] * LANES))

        at, end, sinks, before, after = (ints(builder.trunc(arg, _INT)) for arg in args[1:])
        place = builder.add(at, ir.Constant(_INTS, list(range(LANES))))
        near = builder.and_(
            builder.icmp_signed(">", place, before), builder.icmp_signed("<", place, after)
        )
        seen = builder.and_(
            builder.icmp_signed("<", place, end),
            builder.or_(near, builder.icmp_signed("<", place, sinks)),
        )
        return builder.select(seen, args[0], ir.Constant(_VECTOR, [-math.inf] * LANES))

    return _lanes(_lanes, *(types.intp,) * 5), code


@intrinsic
def _larger(typing: Any, left: Any, right: Any) -> Any:
    """The larger of each two; what is compared with no number may be either."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return _lanes(_lanes, _lanes), code


def _reduction(name: str, start: float | None, *flags: str) -> Any:
    """Return a function from sixteen numbers to one."""

    @intrinsic
    def reduced(typing: Any, value: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            first = [] if start is None else [ir.Constant(_FLOAT, start)]
            kind = ir.FunctionType(_FLOAT, [*(_FLOAT for _ in first), _VECTOR])
            full = f"llvm.vector.reduce.{name}.v{LANES}f32"
            function = builder.module.globals.get(full) or ir.Function(builder.module, kind, full)
            return builder.call(function, [*first, args[0]], fastmath=flags)

        return types.float32(_lanes), code

    return reduced


_sum = _reduction("fadd", -0.0, "reassoc")  # any order of the sixteen, the same at every call
_largest = _reduction("fmax", None)


@intrinsic
def _power_of_two(typing: Any, shifted: Any) -> Any:
    """2^n of n + 1.5 * 2^23, which has n in its lowest bits."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.shl(builder.bitcast(args[0], _INTS), _same(_INTS, 23))
        return builder.bitcast(builder.add(bits, _same(_INTS, 0x3F800000)), _VECTOR)

    return _lanes(_lanes), code


# --- formulas ------------------------------------------------------------------------------------


def _kernel(function: Any) -> Any:
    """Compile, and inline wherever it is called: lanes are passed in registers only."""
    return numba.njit(error_model="numpy", forceinline=True)(function)


def _entry(function: Any) -> Any:
    """Compile a function that Python calls."""
    return numba.njit(error_model="numpy", nogil=True, cache=True)(function)


_ONE, _ZERO = np.float32(1), np.float32(0)
_NEVER = np.float32(-np.inf)
_LOWEST = np.float32(-87.0)  # e^x is subnormal below
_LOG2_E = np.float32(1 / math.log(2))
_SHIFT = np.float32(1.5 * 2**23)  # added and taken off again it rounds to an integer
# ln 2 in two parts: n times the first is exact, so that r = x - n ln 2 loses nothing
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(math.log(2) - 0.693359375)
_E2, _E3, _E4, _E5, _E6, _E7 = (np.float32(1 / math.factorial(n)) for n in range(2, 8))


@_kernel
def _exp(x):
    """e^x for x <= 0, relative error below 2e-7; 0 below -87."""
    bounded = _unless_below(x, _LOWEST, x, _splat(_LOWEST))
    shifted = bounded * _LOG2_E + _SHIFT
    n = shifted - _SHIFT
    r = (bounded - n * _LN2_HIGH) - n * _LN2_LOW
    part = (((((_E7 * r + _E6) * r + _E5) * r + _E4) * r + _E3) * r + _E2) * (r * r) + r
    return _unless_below(x, _LOWEST, (part + _ONE) * _power_of_two(shifted), _splat(_ZERO))


@_kernel
def _product(a, a_at, a_row, a_column, b, b_at, b_row, out, at, out_row, rows, inner, columns, add):
    """out[i, c] = sum_j a[i, j] b[j, c], added to what is there if ``add``.

    Of b and out, rows of ``columns`` numbers, a multiple of sixteen, side by side. Four rows at once:
    as many sums as hide the latency of an addition, with what else is held.
    """
    for i in range(0, rows, 4):
        i1, i2, i3 = min(i + 1, rows - 1), min(i + 2, rows - 1), min(i + 3, rows - 1)
        a0, a1 = a_at + i * a_row, a_at + i1 * a_row
        a2, a3 = a_at + i2 * a_row, a_at + i3 * a_row
        o0, o1, o2, o3 = at + i * out_row, at + i1 * out_row, at + i2 * out_row, at + i3 * out_row
        for c in range(0, columns, 2 * LANES):
            d = min(c + LANES, columns - LANES)
            s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = _splat(_ZERO)
            if add:
                s0, s1 = _load(out, o0 + c), _load(out, o1 + c)
                s2, s3 = _load(out, o2 + c), _load(out, o3 + c)
                t0, t1 = _load(out, o0 + d), _load(out, o1 + d)
                t2, t3 = _load(out, o2 + d), _load(out, o3 + d)
            for j in range(inner):
                left, right = _load(b, b_at + j * b_row + c), _load(b, b_at + j * b_row + d)
                x0, x1 = _spread(a, a0 + j * a_column), _spread(a, a1 + j * a_column)
                x2, x3 = _spread(a, a2 + j * a_column), _spread(a, a3 + j * a_column)
                s0, t0 = s0 + left * x0, t0 + right * x0
                s1, t1 = s1 + left * x1, t1 + right * x1
                s2, t2 = s2 + left * x2, t2 + right * x2
                s3, t3 = s3 + left * x3, t3 + right * x3
            # The last row and column may be written several times: with the same numbers.
            _store(out, o0 + c, s0)
            _store(out, o1 + c, s1)
            _store(out, o2 + c, s2)
            _store(out, o3 + c, s3)
            _store(out, o0 + d, t0)
            _store(out, o1 + d, t1)
            _store(out, o2 + d, t2)
            _store(out, o3 + d, t3)


@_kernel
def _turn(x, at, stride, rows, columns, out, out_row):
    """out[c, i] = x[i, c]; zeros in out's columns beyond ``rows``."""
    for i in range(rows):
        for c in range(0, columns, LANES):
            _scatter(out, c * out_row + i, out_row, _load(x, at + i * stride + c))
    for c in range(columns):
        for i in range(rows, out_row):
            out[c * out_row + i] = _ZERO


# Phi(-z) = e^(-z^2 / 2) t P(t) for z >= 0, t = 1 / (1 + STRETCH z): fitted to scipy's erfcx by
# weighted least squares, relative error 7e-8.
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


@_kernel
def _normal(x):
    """The normal distribution function Phi(x), and its density."""
    bell = _exp(x * x * _HALF)
    t = _ONE / (_larger(x, x * -_ONE) * _STRETCH + _ONE)
    p = _P[8] * t + _P[7]
    p = (((p * t + _P[6]) * t + _P[5]) * t + _P[4]) * t + _P[3]
    tail = bell * t * (((p * t + _P[2]) * t + _P[1]) * t + _P[0])
    return _unless_below(x, _ZERO, _ONE - tail, tail), bell * _DENSITY


# --- activations and norms -----------------------------------------------------------------------


@_entry
def gelu(x, out, slope):
    """Write x Phi(x); and its derivative to ``slope``, unless that is empty.

    As many numbers as are a multiple of sixteen.
    """
    for at in range(0, len(x), LANES):
        value = _load(x, at)
        share, density = _normal(value)
        _store(out, at, value * share)
        if len(slope):
            _store(slope, at, value * density + share)


@_entry
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
        total = _splat(_ZERO)
        for c in range(0, columns, LANES):
            value = _load(x, start + c) + _load(residual, start + c)
            _store(out, start + c, value)
            total = total + value
        mean = _sum(total) / np.float32(columns)
        total = _splat(_ZERO)
        for c in range(0, columns, LANES):
            value = _load(out, start + c) - mean
            total = total + value * value
        deviation = np.sqrt(_sum(total) / np.float32(columns) + epsilon)
        deviations[row] = deviation
        inverse = _ONE / deviation
        for c in range(0, columns, LANES):
            value = (_load(out, start + c) - mean) * inverse
            if len(centred):
                _store(centred, start + c, value)
            value = value * _load(weight, c) + _load(bias, c)
            _store(out, start + c, value)
            if len(low):
                _store(low, start + c, value)


@_entry
def add_norm_back(grad, more, centred, deviations, weight, out, low):
    """Write the gradient of :func:`add_norm`, the same for both inputs, given that of ``out``.

    The latter is the sum of ``grad`` and ``more``, where that is not empty. ``low``: as there.
    """
    columns = len(weight)
    for row in range(len(deviations)):
        start = row * columns
        sums, products = _splat(_ZERO), _splat(_ZERO)
        for c in range(0, columns, LANES):
            value = _load(grad, start + c)
            if len(more):
                value = value + _load(more, start + c)
            value = value * _load(weight, c)
            _store(out, start + c, value)
            sums = sums + value
            products = products + value * _load(centred, start + c)
        mean, slope = _sum(sums) / np.float32(columns), _sum(products) / np.float32(columns)
        inverse = _ONE / deviations[row]
        for c in range(0, columns, LANES):
            value = _load(out, start + c) - mean
            value = (value - _load(centred, start + c) * slope) * inverse
            _store(out, start + c, value)
            if len(low):
                _store(low, start + c, value)


@_entry
def add(x, y):
    """Add y to x, as many numbers as are a multiple of sixteen."""
    for at in range(0, len(x), LANES):
        _store(x, at, _load(x, at) + _load(y, at))


# --- low-rank updates ----------------------------------------------------------------------------


@_entry
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


@_entry
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


# --- attention -----------------------------------------------------------------------------------


def whole(number):
    """Return ``number`` filled up to a multiple of sixteen."""
    return (number + LANES - 1) // LANES * LANES


_whole = _kernel(whole)


@_entry
def attend(
    queries, q_row, keys, k_row, values, v_row, lengths, heads, groups, size,
    scale, causal, width, sinks, out, weights, keep,
):  # fmt: skip
    """Write softmax(scale Q K^T) V of every sequence and head; see :mod:`attention`.

    queries, keys, values : rows of [head x size], ``*_row`` apart; ``size`` a multiple of sixteen.
    lengths : of the sequences.
    groups : heads of queries that share one of keys.
    width, sinks : as in ``attention.Window``.
    out : [row, heads x size].
    weights : the softmax: [query, key], its rows filled up to a multiple of sixteen; with ``keep`` of
        every sequence and head, end to end, for :func:`attend_back`, else of one after the other.
    """
    longest = _whole(lengths.max())
    turned = np.empty(size * longest, np.float32)
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
            for i in range(length):
                line = at + i * keys_held
                seen = i + 1 if causal else length
                peak = _splat(_NEVER)
                for c in range(0, keys_held, LANES):
                    score = _load(weights, line + c) * scale
                    score = _seen(score, c, seen, sinks, i - width, i + width)
                    _store(weights, line + c, score)
                    peak = _larger(peak, score)
                most = _largest(peak)
                total = _splat(_ZERO)
                for c in range(0, keys_held, LANES):
                    each = _exp(_load(weights, line + c) - most)
                    _store(weights, line + c, each)
                    total = total + each
                share = _ONE / _sum(total)
                for c in range(0, keys_held, LANES):
                    _store(weights, line + c, _load(weights, line + c) * share)
            _product(
                weights, at, keys_held, 1, values, row * v_row + shared, v_row,
                out, row * heads * size + own, heads * size, length, length, size, False,
            )  # fmt: skip
            if keep:
                at += length * keys_held
        row += length


@_entry
def attend_back(
    grad, queries, q_row, keys, k_row, values, v_row, lengths, heads, groups, size,
    scale, weights, to_queries, dq_row, to_keys, dk_row, to_values, dv_row, wanted,
):  # fmt: skip
    """Write the gradients of :func:`attend` for its inputs, given that of ``out``.

    to_queries, to_keys, to_values : like queries, keys and values.
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
                    total = _splat(_ZERO)
                    for c in range(0, keys_held, LANES):
                        total = total + _load(scores, line + c) * _load(weights, held + c)
                    mean = _sum(total)
                    for c in range(0, keys_held, LANES):
                        part = (_load(scores, line + c) - mean) * _load(weights, held + c)
                        _store(scores, line + c, part * scale)
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
