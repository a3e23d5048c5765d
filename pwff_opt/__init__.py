"""pwff_opt: plan personalised federated fine-tuning of language models over a wireless cell.

The planning API, which needs no torch. What trains is in :mod:`pwff_opt.federated`.
"""

from pwff_opt.costs import Workload
from pwff_opt.errors import PwffError
from pwff_opt.evaluation import Evaluation, Evaluator, TrainedRound
from pwff_opt.front.front import Front, pareto_front
from pwff_opt.planning.planner import Curve, Plan, Planner
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.files import read_scenario
from pwff_opt.scenario.schedule import LayerState, RoundDecision, Schedule

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
