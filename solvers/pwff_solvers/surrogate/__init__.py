"""A model of the one objective that must be measured, and what measuring it somewhere is worth."""

from pwff_solvers.surrogate.gaussian_process import GaussianProcess
from pwff_solvers.surrogate.improvement import Attained, expected_improvement, on_grid

__all__ = ["Attained", "GaussianProcess", "expected_improvement", "on_grid"]
