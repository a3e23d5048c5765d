"""The planning API: what a schedule costs and how to allocate it best; no torch is needed."""

from pwff_opt.planning.planner import Curve, Plan, Planner

__all__ = ["Curve", "Plan", "Planner"]
