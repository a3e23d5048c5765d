"""How a schedule gets its accuracy: what a training gives, and the protocol of what trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from pwff_opt.costs import Workload
from pwff_opt.scenario.schedule import Schedule


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
