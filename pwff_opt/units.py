"""Conversions of units; everything past the radio model's decibels is SI and linear."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def linear_from_db(ratio_db: ArrayLike) -> NDArray[np.float64]:
    """Power ratio from dB: ``10**(dB/10)``."""
    return np.asarray(10.0 ** (np.asarray(ratio_db, dtype=float) / 10.0))


BITS_PER_BYTE = 8
