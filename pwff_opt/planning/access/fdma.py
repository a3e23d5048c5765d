"""Frequency division: every device has a band of its own."""

from pwff_opt.registry import ACCESS
from pwff_solvers.allocation import FDMA

ACCESS.add("fdma", FDMA)
