r"""Two functions of the spectral efficiency ``z`` [nat/s/Hz] and their inverses.

.. math:: \psi(z) = 1 + (z-1)e^z = \sum_{n\ge0} \frac{z^{n+2}}{n!\,(n+2)},\qquad
          \varphi(z) = (e^z-1)/z .

``psi`` is the marginal value of bandwidth, ``phi`` the power needed per nat.
"""

from __future__ import annotations

import math

import numpy as np

from pwff_solvers.allocation.batch import FloatArray

__all__ = ["inverse_phi", "log_inverse_psi", "psi"]

# Below this, z e^z - (e^z - 1) loses more than two digits and the series takes over.
_SMALL = 0.1
_SERIES = tuple(1.0 / (math.factorial(n) * (n + 2)) for n in range(9))


def psi(z: FloatArray, expm1: FloatArray) -> FloatArray:
    """Return ``psi(z)`` given ``expm1 = e^z - 1``; full relative precision for z > 0."""
    value = z + (z - 1.0) * expm1
    small = z < _SMALL
    if small.any():
        s = z[small]
        series = np.full_like(s, _SERIES[-1])
        for coefficient in _SERIES[-2::-1]:
            series *= s
            series += coefficient
        value[small] = series * s * s
    return value


# Cubic Hermite table of log z against w = log psi(z).  The function is smooth with slope between
# 1/z and 1/2, so the table is good to about 1e-9 and one Newton step to machine precision.
_STEP = 1.0 / 16.0
_FIRST = -48.0
_LAST = 700.0


def _table() -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    w = np.arange(_FIRST, _LAST + _STEP / 2, _STEP)
    # log psi ~ 2 log z - log 2 for small z and z + log z for large z
    z = np.where(w < 0, np.sqrt(2.0) * np.exp(w / 2), np.maximum(w, 1.0))
    x = np.log(z)
    for _ in range(12):
        z = np.exp(x)
        expm1 = np.expm1(z)
        p = psi(z, expm1)
        x = x - (np.log(p) - w) * (p / (expm1 + 1.0)) / (z * z)
    z = np.exp(x)
    expm1 = np.expm1(z)
    slope = psi(z, expm1) / (expm1 + 1.0) / (z * z) * _STEP
    rise = x[1:] - x[:-1]
    left, right = slope[:-1], slope[1:]
    return x[:-1], left, 3 * rise - 2 * left - right, left + right - 2 * rise


_C0, _C1, _C2, _C3 = _table()


def log_inverse_psi(w: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return ``log z`` with ``log psi(z) = w`` (to about 1e-9) and its slope in ``w``.

    Beyond ``w = 700`` the argument is cut: ``e^z`` ends there in double precision.
    """
    u = (w - _FIRST) * (1.0 / _STEP)
    np.clip(u, 0.0, _C0.size - 1e-9, out=u)
    i = np.where(u == u, u, 0.0).astype(np.int64)  # NaN goes on as NaN, not as an index
    u -= i
    c1, c2, c3 = _C1[i], _C2[i], _C3[i]
    x = _C0[i] + u * (c1 + u * (c2 + u * c3))
    slope = (c1 + u * (2.0 * c2 + 3.0 * u * c3)) * (1.0 / _STEP)
    low = w < _FIRST
    if low.any():
        x = np.where(low, 0.5 * (w + math.log(2.0)), x)
    return x, slope


def inverse_phi(excess: FloatArray) -> FloatArray:
    """Return ``z > 0`` with ``phi(z) = 1 + excess``; full relative precision, NaN if excess < 0.

    Newton on ``log phi``, whose slope in z stays between 1/2 and 1, from a start that is exact in
    both limits; four steps reach machine precision everywhere.
    """
    target = np.log1p(excess)
    z: FloatArray = target + np.log1p(target)
    for _ in range(4):
        decay = -np.expm1(-z)  # 1 - e^-z
        ratio = decay / z
        value = z + np.log(ratio)
        slope = 1.0 / decay - 1.0 / z
        small = z < 0.3
        if small.any():
            s = z[small]
            q = s * s
            value[small] = s / 2 + q * (1 / 24 - q * (1 / 2880 - q * (1 / 181440 - q / 9676800)))
            slope[small] = 0.5 + s * (1 / 12 - q * (1 / 720 - q * (1 / 30240 - q / 1209600)))
        z = np.maximum(z - (value - target) / slope, 0.25 * z)
    return z
