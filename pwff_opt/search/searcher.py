"""What every method of search does: it is asked for schedules to train, and told what they gave."""

from __future__ import annotations

from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from pwff_opt.evaluation import Evaluation
from pwff_opt.planning.planner import Planner
from pwff_opt.registry import SEARCHES
from pwff_opt.scenario.schedule import Schedule
from pwff_opt.search.certificate import Certificate
from pwff_opt.search.reference import Reference

FloatArray = NDArray[np.float64]


class Searcher(Protocol):
    """Proposes schedules to train. What it proposes depends on what it was told, in what order."""

    reference: Reference | None
    """What improvements are measured from, where and when that is known."""

    def ask(self, count: int = 1) -> list[Schedule]:
        """Return the next schedules, at most ``count``; none when there is none left.

        All of them are to be told, in their order, before the next are asked for.
        """

    def tell(self, schedule: Schedule, evaluation: Evaluation) -> None:
        """Take what was trained of the schedule: all of its rounds, or the first ones."""

    def worth_going_on(self, schedule: Schedule, so_far: Evaluation) -> bool:
        """Return whether a training that stands after ``so_far`` should go on, by what was told."""

    def accuracy(self, evaluation: Evaluation) -> FloatArray:
        """Return what it takes the mean accuracy to be after every round validated, [mark]."""


class Certifier(Searcher, Protocol):
    """A searcher that can say how far what was trained may be from the front of all schedules."""

    def certificate(self, confidence: float) -> Certificate:
        """Return how far that is, if all is ``confidence`` standard deviations better than modelled."""


class Method(Protocol):
    """A variant of ``search.method``: it makes a searcher, and imports what that needs only then."""

    @property
    def certifies(self) -> bool:
        """Whether its searchers are certifiers."""

    def build(self, planner: Planner) -> Searcher:
        """Return a searcher that has been told nothing yet."""


def certifier(planner: Planner) -> Certifier:
    """Return a searcher that certifies: of the scenario's own method if it can, else of "surrogate"."""
    methods = [planner.scenario.search.method, "surrogate"]
    method: Method = next(SEARCHES[name] for name in methods if SEARCHES[name].certifies)
    return cast("Certifier", method.build(planner))
