"""Every conversion of units, in one place; everything past the scenario file is SI and linear."""

from __future__ import annotations

import math


def watt_from_dbm(power_dbm: float) -> float:
    """Power in W from dBm: ``10**((dBm - 30)/10)``."""
    return math.pow(10.0, (power_dbm - 30.0) / 10.0)


def linear_from_db(ratio_db: float) -> float:
    """Power ratio from dB: ``10**(dB/10)``."""
    return math.pow(10.0, ratio_db / 10.0)


BITS_PER_BYTE = 8
