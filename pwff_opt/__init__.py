"""pwff_opt: plan personalised federated fine-tuning of language models over a wireless cell.

The planning API, which needs no torch. What trains is in :mod:`pwff_opt.federated`.
"""

from pwff_opt.costs import Workload
from pwff_opt.decision import LayerState, RoundDecision, Schedule
from pwff_opt.errors import PwffError
from pwff_opt.evaluation import Evaluation, Evaluator, TrainedRound
from pwff_opt.pareto import Front, pareto_front
from pwff_opt.planning import Curve, Plan, Planner
from pwff_opt.scenario import Scenario
from pwff_opt.scenario_io import read_scenario

__all__ = [
    "Curve",
    "Evaluation",
    "Evaluator",
    "Front",
    "LayerState",
    "Plan",
    "Planner",
    "PwffError",
    "RoundDecision",
    "Scenario",
    "Schedule",
    "TrainedRound",
    "Workload",
    "pareto_front",
    "read_scenario",
]
