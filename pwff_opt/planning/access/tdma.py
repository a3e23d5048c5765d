"""Time division: devices use the whole band one after another."""

from pwff_opt.registry import ACCESS
from pwff_solvers.allocation import TDMA

ACCESS.add("tdma", TDMA)
