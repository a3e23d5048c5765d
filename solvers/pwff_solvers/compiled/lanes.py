"""Sixteen float32 side by side, for numba: what its loops cannot be relied on to become.

They fill a register of AVX-512; elsewhere LLVM takes several.  A value of this kind lives in registers and
is never seen by Python; ``+ - * /`` work on two of them, or on one and a number.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, overload, register_model

from pwff_solvers.compiled.stamp import stamp, stamped

LANES = 16
_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_VECTOR, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)
_HALVES = ir.VectorType(ir.IntType(16), LANES)
_LOOSE = ("contract",)  # a product and a sum may become one operation


class _Lanes(types.Type):
    def __init__(self) -> None:
        super().__init__("float32x16")


_lanes = _Lanes()


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


def _all(builder: Any, number: Any, vector: Any = _VECTOR) -> Any:
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), number, _INT(0))
    return builder.shuffle_vector(first, first, ir.Constant(_INTS, [0] * LANES))


def _place(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    vector = _HALVES if kind.dtype == types.uint16 else _VECTOR
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def _same(vector: Any, number: int) -> Any:
    return ir.Constant(vector, [number] * LANES)


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """Return sixteen numbers of an array, of float32 or of bfloat16 as uint16, from ``index`` on."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[0]
        found = builder.load(_place(context, builder, kind, *args), align=kind.dtype.bitwidth // 8)
        if kind.dtype == types.float32:
            return found
        wide = builder.shl(builder.zext(found, _INTS), _same(_INTS, 16))
        return builder.bitcast(wide, _VECTOR)

    return _lanes(array, types.intp), code


@intrinsic
def store(typing: Any, array: Any, index: Any, value: Any) -> Any:
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
def turn(
    typing: Any, array: Any, index: Any, stride: Any, last: Any, out: Any, place: Any, row: Any
) -> Any:
    """Write sixteen rows' sixteen numbers by columns: out[place + c row + i] = array[index + i stride + c].

    Rows after the ``last`` are that one again.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, index, stride, last, out, place, row = args
        rows = []
        for lane in range(LANES):
            own = ir.Constant(last.type, lane)
            own = builder.select(builder.icmp_signed("<", own, last), own, last)
            at = builder.add(index, builder.mul(own, stride))
            rows.append(
                builder.load(_place(context, builder, signature.args[0], array, at), align=4)
            )
        # Blocks of 1, 2, 4 and 8 numbers change places across the diagonal.
        width = 1
        while width < LANES:
            for upper in (lane for lane in range(LANES) if not lane & width):
                lower = upper | width
                low = [c if not c & width else LANES + c - width for c in range(LANES)]
                high = [c + width if not c & width else LANES + c for c in range(LANES)]
                pair = rows[upper], rows[lower]
                rows[upper], rows[lower] = (
                    builder.shuffle_vector(*pair, ir.Constant(_INTS, order))
                    for order in (low, high)
                )
            width *= 2
        for turned in rows:
            builder.store(turned, _place(context, builder, signature.args[4], out, place), align=4)
            place = builder.add(place, row)
        return context.get_dummy_value()

    return types.none(array, *(types.intp,) * 3, out, types.intp, types.intp), code


@intrinsic
def spread(typing: Any, array: Any, index: Any) -> Any:
    """Return the number at ``index`` sixteen times. Unlike ``array[index]`` it does not ask for the sign."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[0]
        data = context.make_array(kind)(context, builder, args[0]).data
        found = builder.load(builder.gep(data, [args[1]]))
        if kind.dtype == types.uint16:
            found = builder.bitcast(builder.shl(builder.zext(found, _INT), _INT(16)), _FLOAT)
        return _all(builder, found)

    return _lanes(array, types.intp), code


@intrinsic
def splat(typing: Any, number: Any) -> Any:
    """Return one number sixteen times."""

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
def unless_below(typing: Any, x: Any, bound: Any, value: Any, other: Any) -> Any:
    """Return ``other`` where x < bound, else (also where x is not a number) ``value``."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        below = builder.fcmp_ordered("<", args[0], _all(builder, args[1]))
        return builder.select(below, args[3], args[2])

    return _lanes(_lanes, types.float32, _lanes, _lanes), code


@intrinsic
def where_seen(typing: Any, x: Any, at: Any, end: Any, sinks: Any, before: Any, after: Any) -> Any:
    """Return minus infinity in places, counted from ``at``, that are not seen.

    Seen are those below ``end`` if also below ``sinks``, or above ``before`` and below ``after``.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at, end, sinks, before, after = (
            _all(builder, builder.trunc(arg, _INT), _INTS) for arg in args[1:]
        )
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
def larger(typing: Any, left: Any, right: Any) -> Any:
    """Return the larger of each two; what is compared with no number may be either."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return _lanes(_lanes, _lanes), code


@intrinsic
def total_of(typing: Any, value: Any) -> Any:
    """Return the sum of sixteen, in an order that is the same at every call."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        name = f"llvm.vector.reduce.fadd.v{LANES}f32"
        kind = ir.FunctionType(_FLOAT, [_FLOAT, _VECTOR])
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        return builder.call(function, [ir.Constant(_FLOAT, -0.0), args[0]], fastmath=("reassoc",))

    return types.float32(_lanes), code


@intrinsic
def largest(typing: Any, value: Any) -> Any:
    """Return the largest of sixteen, compared as :func:`larger` does."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (value,) = args
        for step in (8, 4, 2, 1):
            order = ir.Constant(_INTS, [(lane + step) % LANES for lane in range(LANES)])
            other = builder.shuffle_vector(value, value, order)
            value = builder.select(builder.fcmp_ordered(">", value, other), value, other)
        return builder.extract_element(value, _INT(0))

    return types.float32(_lanes), code


@intrinsic
def power_of_two(typing: Any, shifted: Any) -> Any:
    """Return 2^n of n + 1.5 * 2^23, which has n in its lowest bits."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.shl(builder.bitcast(args[0], _INTS), _same(_INTS, 23))
        return builder.bitcast(builder.add(bits, _same(_INTS, 0x3F800000)), _VECTOR)

    return _lanes(_lanes), code


# --- compilation ---------------------------------------------------------------------------------

_STAMP = stamp("compiled/lanes.py", "compiled/transformer.py")


def kernel(function: Any) -> Any:
    """Compile, and inline wherever it is called: sixteen numbers are passed in registers only."""
    return numba.njit(error_model="numpy", forceinline=True)(function)


def entry(function: Any) -> Any:
    """Compile a function that Python calls; it lets other threads run."""
    dispatcher = numba.njit(error_model="numpy", nogil=True, cache=True)(function)
    return stamped(dispatcher, _STAMP)
