"""pwff_opt: plan personalised federated fine-tuning of language models over a wireless cell.

The planning API, which needs no torch. What trains is in :mod:`pwff_opt.federated`. A name is imported when
it is first used, so that a planner loads neither pandas nor what only a search needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    "costs": ("Workload",),
    "errors": ("PwffError",),
    "evaluation": ("Evaluation", "Evaluator", "TrainedRound"),
    "front.front": ("Front", "pareto_front"),
    "planning.planner": ("Curve", "Plan", "Planner"),
    "scenario": ("Scenario",),
    "scenario.files": ("read_scenario",),
    "scenario.schedule": ("LayerState", "RoundDecision", "Schedule"),
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module that it is defined in."""
    for module, names in _HOMES.items():
        if name in names:
            globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, imported or not."""
    return sorted({*globals(), *__all__})
