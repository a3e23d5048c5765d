"""Evolutionary search by ask and tell, and its operators."""

from pwff_solvers.evolution.nsga2 import SetSearch
from pwff_solvers.evolution.operators import crossed, mutated

__all__ = ["SetSearch", "crossed", "mutated"]
