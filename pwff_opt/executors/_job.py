"""What crosses the line between a search and a worker, as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pwff_opt.errors import DecisionError
from pwff_opt.evaluation import Evaluation, Evaluator, TrainedRound
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.files import from_resolved, resolved
from pwff_opt.scenario.schedule import Schedule

Make = Callable[[Scenario], Evaluator]
"""Builds the evaluator of a worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One thing for a worker to do; the seed of training is the scenario's."""

    scenario: Scenario
    schedule: Schedule
    task: Literal["train", "test"]

    def __post_init__(self) -> None:
        if self.task not in ("train", "test"):
            raise DecisionError(f"task must be 'train' or 'test', got {self.task!r}")

    def to_json(self) -> str:
        """Return the job as JSON text, which any other process can read."""
        return json.dumps(
            {
                "scenario": resolved(self.scenario),
                "schedule": str(self.schedule),
                "task": self.task,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Return the job that :meth:`to_json` wrote down."""
        values = json.loads(text)
        scenario = from_resolved(values["scenario"])
        schedule = Schedule.parse(values["schedule"], devices=len(scenario.devices))
        return cls(scenario=scenario, schedule=schedule, task=values["task"])


def evaluation_to_json(evaluation: Evaluation) -> str:
    """Return an evaluation as JSON text; NaN and infinity are kept, as Python writes them."""
    rounds = [
        {
            "loss": [float(value) for value in each.loss],
            "accuracy": [float(value) for value in each.accuracy],
            "uplink_bit": [int(value) for value in each.uplink_bit],
            "diverged": [int(value) for value in each.diverged],
            "notes": {name: [float(value) for value in row] for name, row in each.notes.items()},
        }
        for each in evaluation.rounds
    ]
    return json.dumps(
        {
            "key": evaluation.key,
            "schedule": str(evaluation.schedule),
            "devices": len(evaluation.schedule.rounds[0].ranks),
            "rounds": rounds,
            "wall_s": float(evaluation.wall_s),
            "status": evaluation.status,
            "reason": evaluation.reason,
        }
    )


def evaluation_from_json(text: str) -> Evaluation:
    """Return the evaluation that :func:`evaluation_to_json` wrote down."""
    values = json.loads(text)
    rounds = tuple(
        TrainedRound(
            loss=tuple(each["loss"]),
            accuracy=tuple(each["accuracy"]),
            uplink_bit=tuple(each["uplink_bit"]),
            diverged=tuple(each["diverged"]),
            notes={name: tuple(row) for name, row in each["notes"].items()},
        )
        for each in values["rounds"]
    )
    return Evaluation(
        key=values["key"],
        schedule=Schedule.parse(values["schedule"], devices=values["devices"]),
        rounds=rounds,
        wall_s=values["wall_s"],
        status=values["status"],
        reason=values["reason"],
    )


def require_workers(workers: int) -> None:
    """Raise a DecisionError unless ``workers`` is a whole number of at least 1."""
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise DecisionError(f"workers must be a whole number of at least 1, got {workers!r}")
