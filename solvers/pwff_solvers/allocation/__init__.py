"""Optimal bandwidth, power and frequency of wireless devices, in batches, with certificates."""

from pwff_solvers.allocation.allocation import Allocation, Status
from pwff_solvers.allocation.batch import Batch
from pwff_solvers.allocation.blocks import BlockAllocation, round_to_blocks
from pwff_solvers.allocation.curve import (
    EnergyDelayCurve,
    energy_delay_curve,
    least_energy_within,
)
from pwff_solvers.allocation.downlink import broadcast
from pwff_solvers.allocation.errors import InvalidInputError
from pwff_solvers.allocation.objectives import LeastEnergy, Objective, Shortest, Weighted
from pwff_solvers.allocation.oracle import OracleSolution, solve_cvxpy
from pwff_solvers.allocation.outage import outage_bound, outage_probability, solve_outage
from pwff_solvers.allocation.selection import Selection, drop_out, most_devices, serve
from pwff_solvers.allocation.solve import solve

__all__ = [
    "Allocation",
    "Batch",
    "BlockAllocation",
    "EnergyDelayCurve",
    "InvalidInputError",
    "LeastEnergy",
    "Objective",
    "OracleSolution",
    "Selection",
    "Shortest",
    "Status",
    "Weighted",
    "broadcast",
    "drop_out",
    "energy_delay_curve",
    "least_energy_within",
    "most_devices",
    "outage_bound",
    "outage_probability",
    "round_to_blocks",
    "serve",
    "solve",
    "solve_cvxpy",
    "solve_outage",
]
