"""Problems around the allocation: selection, outage, resource blocks, broadcast, and an oracle."""

from pwff_solvers.extras.downlink import broadcast
from pwff_solvers.extras.oracle import OracleSolution, solve_cvxpy
from pwff_solvers.extras.outage import outage_bound, outage_probability, solve_outage
from pwff_solvers.extras.resource_blocks import BlockAllocation, round_to_blocks
from pwff_solvers.extras.selection import Selection, drop_out, most_devices, serve

__all__ = [
    "BlockAllocation",
    "OracleSolution",
    "Selection",
    "broadcast",
    "drop_out",
    "most_devices",
    "outage_bound",
    "outage_probability",
    "round_to_blocks",
    "serve",
    "solve_cvxpy",
    "solve_outage",
]
