"""What a scenario allows: ranks, rounds and memory; everything else is refused in one sentence."""

from __future__ import annotations

import numpy as np

from pwff_opt.errors import DecisionError, InfeasibleError
from pwff_opt.planning.demand import CostModel, Demand
from pwff_opt.registry import RULES
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.schedule import RoundDecision, Schedule


def as_schedule(schedule: Schedule | str, *, devices: int) -> Schedule:
    """Return a schedule that may be given as its text."""
    if isinstance(schedule, str):
        return Schedule.parse(schedule, devices=devices)
    if not isinstance(schedule, Schedule):
        raise DecisionError(f"schedule must be a Schedule or its text, got {schedule!r}")
    return schedule


def check_ranks(scenario: Scenario, *decisions: RoundDecision) -> None:
    """Raise a DecisionError if rounds have ranks that are outside the scenario's decisions."""
    allowed = [rank for rank in scenario.decisions.ranks if rank]
    for decision in dict.fromkeys(decisions):
        for device, rank in enumerate(decision.ranks):
            if rank not in (0, *allowed):
                which = f" of device {device}" if len(set(decision.ranks)) > 1 else ""
                raise DecisionError(
                    f"rank{which} must be one of decisions.ranks ({', '.join(map(str, allowed))}) or 0, "
                    f"got {rank} in {str(decision)!r}"
                )
        if scenario.decisions.rank_scope == "common" and len(set(decision.ranks)) > 1:
            raise DecisionError(
                "decisions.rank_scope must be 'per_device' for ranks that differ between devices, got "
                f"'common' and ranks {', '.join(map(str, decision.ranks))}"
            )


def demanded(costs: CostModel, schedule: Schedule) -> Demand:
    """Return what a schedule demands of the devices, if they and the scenario allow it.

    Raises
    ------
    DecisionError
        It has too many rounds, other layers or devices, or ranks that ``aggregation.lora`` cannot merge.
    InfeasibleError
        A device lacks the memory.
    """
    scenario = costs.scenario
    if len(schedule) > scenario.training.rounds:
        raise DecisionError(
            f"schedule must have at most training.rounds ({scenario.training.rounds}) rounds, "
            f"got {len(schedule)}"
        )
    mixed = any(len(set(decision.ranks)) > 1 for decision in schedule.rounds)
    if mixed and RULES[scenario.aggregation.lora].equal_ranks:
        raise DecisionError(
            f"ranks must be common to all devices for aggregation.lora {scenario.aggregation.lora!r}, "
            f"which averages factors of one and the same rank; got {schedule}"
        )
    demand = costs.demand(schedule)
    if not costs.fits(demand):
        raise InfeasibleError(_lack(costs, demand, str(schedule)))
    return demand


def _lack(costs: CostModel, demand: Demand, what: str) -> str:
    """Return which device lacks memory, how much it has and how much it needs."""
    need = demand.memory_byte.max(axis=0)
    limit = np.array([device.memory_byte for device in costs.scenario.devices])
    short = np.flatnonzero(need > limit)
    first = int(short[0])
    others = f" ({len(short) - 1} more devices lack memory)" if len(short) > 1 else ""
    return (
        f"devices[{first}].memory_byte must be at least {need[first]:.0f} for {what} at "
        f"training.batch_size {costs.scenario.training.batch_size}, got {limit[first]:g}{others}"
    )
