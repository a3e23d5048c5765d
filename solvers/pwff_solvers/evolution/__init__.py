"""Evolutionary search by ask and tell."""

from pwff_solvers.evolution.nsga2 import SetSearch

__all__ = ["SetSearch"]
