"""Time division: devices use the whole band one after another."""

from pwff_solvers.allocation.tdma.scheme import Tdma

__all__ = ["TDMA", "Tdma"]

TDMA = Tdma()
"""The whole band one after another."""
