"""Frequency division: every device has a band of its own."""

from pwff_solvers.allocation.fdma.scheme import Fdma

__all__ = ["FDMA", "Fdma"]

FDMA = Fdma()
"""Own bands at the same time."""
