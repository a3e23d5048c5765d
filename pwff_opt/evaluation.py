"""How a schedule gets its accuracy: the evaluator's protocol, and the journal that never forgets one."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from pwff_opt.costs import CostModel, Demand, Workload
from pwff_opt.decision import RoundDecision, Schedule
from pwff_opt.errors import DecisionError, InfeasibleError
from pwff_opt.models import model_source
from pwff_opt.scenario import AVERAGING, Data, Scenario
from pwff_opt.scenario_io import resolved

# Raised whenever the trainer would learn something else from the same scenario and schedule.
TRAINER_VERSION = 8
# Raised whenever the same pairs of answers would make another reward model.
REWARDS_VERSION = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRound:
    """What one round of training gave, one entry a device."""

    loss: tuple[float, ...]
    """Mean over the local steps; NaN for a device that took no part or diverged."""
    accuracy: tuple[float, ...]
    """On each device's validation data, after the round; empty where it was not validated."""
    uplink_bit: tuple[int, ...]
    """Measured size of what each device uploaded."""
    diverged: tuple[int, ...] = ()
    """Devices whose loss or blocks did not stay finite, on the air in half precision too: left out of the
    averages, their round undone."""
    notes: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """What else there is to tell, [device] each, NaN where there is nothing: of the local steps; "drift",
    the distance of what was uploaded from what aggregation made of it; measured on validation data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One schedule, trained: round by round, or the reason why it failed."""

    key: str
    schedule: Schedule
    rounds: tuple[TrainedRound, ...]
    wall_s: float
    status: Literal["done", "failed"] = "done"
    reason: str = ""


class Evaluator(Protocol):
    """Trains schedules. Same schedule, same answer: whatever is random is keyed by the scenario's seeds."""

    @property
    def workload(self) -> Workload:
        """What the data contribute to the costs."""

    def train(self, schedule: Schedule) -> Evaluation:
        """Train a schedule and return its learning curve on validation data."""

    def test(self, schedule: Schedule) -> tuple[float, ...]:
        """Return every device's accuracy on test data after a schedule that has been trained."""

    def with_seed(self, seed: int) -> Evaluator:
        """Return an evaluator that differs in the seed of training only."""


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
    if mixed and scenario.aggregation.lora in (*AVERAGING, "fedex"):
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


def learning_key(scenario: Scenario, schedule: Schedule) -> str:
    """Return what identifies a training: all that bears on what is learned and recorded.

    Cell, radio and device hardware are not in it: they change what a schedule costs, not what it
    learns. Local files are in it by what they hold and, of a folder, by their names in it, not by where
    they are. The number of rounds is
    that of the schedule, so a prefix has a key of its own.
    """
    everything = resolved(scenario)
    training = dict(everything["training"])
    for irrelevant in ("rounds", "feature_cache_byte", "checkpoint_byte"):
        del training[irrelevant]
    if not scenario.model.attention_window:
        for irrelevant in ("attention_window", "attention_sinks"):
            del everything["model"][irrelevant]
    models = [scenario.model.source]
    if _local_model(scenario.model.source, scenario.folder):
        del everything["model"]["source"]
    if scenario.data.source == "file":
        del everything["data"]["path"]
    users = {}
    if scenario.training.stage == "alignment":
        models.append(scenario.alignment.reward_model)
        if _local_model(scenario.alignment.reward_model, scenario.folder):
            del everything["alignment"]["reward_model"]
        users = {
            "rewards": REWARDS_VERSION,
            "alignment": everything["alignment"],
            "helpfulness": [device.helpfulness for device in scenario.devices],
        }
    relevant: dict[str, Any] = {
        "trainer": TRAINER_VERSION,
        "model": everything["model"],
        "data": everything["data"],
        "files": _digest(tuple(models), scenario.data, scenario.folder),
        "peft": everything["peft"],
        "training": training,
        "aggregation": everything["aggregation"],
        "seeds": {name: everything["seeds"][name] for name in ("data", "training")},
        "devices": len(scenario.devices),
        "schedule": str(schedule),
    } | users
    text = json.dumps(relevant, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _local_model(source: str, folder: str) -> Path | None:
    """Return the folder that a model is read from, None if it is packaged or on the hub."""
    local = Path(folder) / source
    return local if local.is_dir() and model_source(source, folder=folder) == str(local) else None


@cache
def _digest(models: tuple[str, ...], data: Data, folder: str) -> str:
    """Return a digest of the local files that a scenario names, "" if it names none."""
    local = [found for source in models if (found := _local_model(source, folder))]
    # Every file: what a tokenizer reads has no one ending (tokenizer.model, merges.txt, ...).
    paths = [(path, "") for found in local for path in sorted(found.iterdir())]
    if data.source == "file":
        file = Path(folder) / data.path
        inside = sorted(file.rglob("*")) if file.is_dir() else []
        # What a file of several is called can tell what its rows are.
        paths += [(path, str(path.relative_to(file))) for path in inside] or [(file, "")]
    total = hashlib.sha256()
    for path, name in paths:
        if path.is_file():
            total.update(name.encode())
            with path.open("rb") as content:
                total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest() if paths else ""
