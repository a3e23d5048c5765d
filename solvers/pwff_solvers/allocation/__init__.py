"""Optimal bandwidth, power and frequency of wireless devices, in batches, with certificates."""

from pwff_solvers.allocation.access import Access
from pwff_solvers.allocation.allocation import Allocation, Status
from pwff_solvers.allocation.batch import Batch
from pwff_solvers.allocation.curve import (
    EnergyDelayCurve,
    energy_delay_curve,
    least_energy_within,
)
from pwff_solvers.allocation.fdma import FDMA
from pwff_solvers.allocation.objectives import LeastEnergy, Objective, Shortest, Weighted
from pwff_solvers.allocation.solve import solve
from pwff_solvers.allocation.tdma import TDMA
from pwff_solvers.errors import InvalidInputError

__all__ = [
    "FDMA",
    "TDMA",
    "Access",
    "Allocation",
    "Batch",
    "EnergyDelayCurve",
    "InvalidInputError",
    "LeastEnergy",
    "Objective",
    "Shortest",
    "Status",
    "Weighted",
    "energy_delay_curve",
    "least_energy_within",
    "solve",
]
