"""The energy-delay-accuracy front of a scenario."""

from pwff_opt.front.front import Front, Progress, pareto_front

__all__ = ["Front", "Progress", "pareto_front"]
