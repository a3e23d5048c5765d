"""Elementary functions that LLVM can vectorise, under numba or in plain numpy.

Numba from PyPI has no vector library of mathematics, so a loop that calls ``math.exp`` stays scalar.
Written out in additions, multiplications and shifts of bits, ``exp`` and ``log`` run on whole
registers.  Formulas that use only the functions of this module are written once: under numba they
are compiled for numbers inside loops, without it the same source works on arrays.

The compiled ``log`` and ``log1p`` are for positive normal numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pwff_solvers.compiled.stamp import stamp, stamped
from pwff_solvers.compiled.switch import COMPILED

__all__ = [
    "FloatArray",
    "cbrt",
    "entry",
    "exp_pair",
    "kernel",
    "log",
    "log1p",
    "select",
]

FloatArray = NDArray[np.float64]

_Function = TypeVar("_Function", bound=Callable[..., Any])

_LN2 = math.log(2.0)
_INVERSE_LN2 = 1.0 / _LN2
# ln 2 in two parts: n times the first is exact, so that r = x - n ln 2 loses nothing
_LN2_HIGH = 6.93147180369123816490e-01
_LN2_LOW = 1.90821492927058770002e-10
# Added and taken off again it rounds to an integer, which it leaves in the lowest bits.
_ROUND = 6755399441055744.0  # 1.5 * 2^52
_SQRT2 = math.sqrt(2.0)
_E = tuple(1.0 / math.factorial(n) for n in range(13))
# log m = 2 artanh s = 2 s (1 + s^2/3 + s^4/5 + ...), s = (m-1)/(m+1), |s| < 0.172
_L = tuple(2.0 / (2 * n + 1) for n in range(11))


if COMPILED and not TYPE_CHECKING:
    import numba
    from llvmlite import ir
    from numba.core import types
    from numba.extending import intrinsic

    _STAMP = stamp("compiled", "allocation", "allocation/fdma", "allocation/tdma")

    def _compiled(function: _Function, **options: Any) -> _Function:
        """Compile; contraction (fused multiply-add) is allowed, reordering is not.

        So results do not depend on how a loop was cut.
        """
        dispatcher = numba.njit(
            fastmath={"contract", "nsz"}, error_model="numpy", cache=True, **options
        )(function)
        return stamped(dispatcher, _STAMP)

    def kernel(function: _Function) -> _Function:
        """Compile, and inline wherever it is called: a call would stop vectorisation."""
        return _compiled(function, forceinline=True)

    def entry(function: _Function) -> _Function:
        """Compile a function that Python calls; it lets other threads run."""
        return _compiled(function, nogil=True)

    @intrinsic
    def _bits(typing: Any, real: Any) -> Any:
        """Return the 64 bits of a number, as an unsigned integer."""

        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], ir.IntType(64))

        return types.uint64(types.float64), code

    @intrinsic
    def _real(typing: Any, bits: Any) -> Any:
        """Return the number with these 64 bits."""

        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], ir.DoubleType())

        return types.float64(types.uint64), code

    _SHIFT = np.uint64(52)
    _MANTISSA = np.uint64((1 << 52) - 1)
    _ONE_BITS = np.uint64(0x3FF << 52)
    _BIG = 4503599627370496.0  # 2^52
    _BIG_BITS = np.uint64(0x433 << 52)

    @kernel
    def select(condition, yes, no):
        return yes if condition else no

    @kernel
    def exp_pair(x):
        x = x if x < 700.0 else 700.0
        x = x if x > -700.0 else -700.0
        rounded = x * _INVERSE_LN2 + _ROUND
        n = rounded - _ROUND
        r = (x - n * _LN2_HIGH) - n * _LN2_LOW
        q = r * r
        q4 = q * q
        low = (_E[2] + r * _E[3]) + q * (_E[4] + r * _E[5])
        middle = (_E[6] + r * _E[7]) + q * (_E[8] + r * _E[9])
        high = (_E[10] + r * _E[11]) + q * _E[12]
        part = r + q * (low + q4 * (middle + q4 * high))
        scale = _real((_bits(rounded) << _SHIFT) + _ONE_BITS)
        return scale + scale * part, scale * part + (scale - 1.0)

    @kernel
    def log(x):
        bits = _bits(x)
        exponent = _real((bits >> _SHIFT) | _BIG_BITS) - _BIG - 1023.0
        m = _real((bits & _MANTISSA) | _ONE_BITS)
        large = m > _SQRT2
        m = 0.5 * m if large else m
        exponent = exponent + (1.0 if large else 0.0)
        s = (m - 1.0) / (m + 1.0)
        q = s * s
        q4 = q * q
        low = (_L[1] + q * _L[2]) + q4 * (_L[3] + q * _L[4])
        high = (_L[5] + q * _L[6]) + q4 * (_L[7] + q * (_L[8] + q * (_L[9] + q * _L[10])))
        series = s * (_L[0] + q * (low + q4 * q4 * high))
        return exponent * _LN2_HIGH + (exponent * _LN2_LOW + series)

    @kernel
    def rough_log(x):
        # the bits of a number are nearly its logarithm; the parabola mends the mantissa
        bits = _bits(x)
        level = _real((bits >> np.uint64(12)) | _BIG_BITS) - _BIG
        m = _real((bits & _MANTISSA) | _ONE_BITS) - 1.0
        return (level * 2.0**-40 - 1023.0 + 0.3437 * m * (1.0 - m)) * _LN2

    @kernel
    def rough_exp(x):
        x = x if x < 690.0 else 690.0
        x = x if x > -690.0 else -690.0
        level = (x * _INVERSE_LN2 + 1023.0) * 2.0**20
        return _real(_bits(level + _BIG) << np.uint64(32))

    @kernel
    def log1p(x):
        u = 1.0 + x
        # what rounding of 1 + x lost, to first order
        return log(u) + (x - (u - 1.0)) / u

    @kernel
    def cbrt(x):
        y, _ = exp_pair(log(x) * (1.0 / 3.0))
        y = y - (y - x / (y * y)) * (1.0 / 3.0)
        return y if x > 1e-300 else 0.0

else:

    def kernel(function: _Function) -> _Function:
        """Leave as it is: the source works on arrays."""
        return function

    def entry(function: _Function) -> _Function:
        """Leave as it is: slow, but right."""
        return function

    def select(condition: Any, yes: Any, no: Any) -> FloatArray:
        """Return ``yes`` where the condition holds, else ``no``."""
        result: FloatArray = np.where(condition, yes, no)
        return result

    def exp_pair(x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return ``e^x`` and ``e^x - 1``, x cut to [-700, 700]; both to a few units in the last place."""
        x = np.clip(x, -700.0, 700.0)
        return np.exp(x), np.expm1(x)

    def log(x: FloatArray) -> FloatArray:
        """Return the logarithm of a positive normal number."""
        result: FloatArray = np.log(x)
        return result

    rough_log = log

    def rough_exp(x: FloatArray) -> FloatArray:
        """Return ``e^x`` within a tenth: for first guesses."""
        result: FloatArray = exp_pair(x)[0]
        return result

    def log1p(x: FloatArray) -> FloatArray:
        """Return ``log(1 + x)`` for x >= 0."""
        result: FloatArray = np.log1p(x)
        return result

    def cbrt(x: FloatArray) -> FloatArray:
        """Return the cube root of a number that is not negative."""
        result: FloatArray = np.cbrt(x)
        return result
