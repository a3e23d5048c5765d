"""Search by evolution, without a model of accuracy."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from pwff_opt.evaluation import Evaluation
from pwff_opt.planning.planner import Planner
from pwff_opt.scenario.schedule import Schedule
from pwff_opt.search.reference import Reference
from pwff_opt.search.table import candidates, measured, objectives
from pwff_solvers.evolution import SetSearch

FloatArray = NDArray[np.float64]
Genome = NDArray[np.int64]


class Evolution:
    """NSGA-II over schedules (:class:`pwff_solvers.evolution.SetSearch`): a model of nothing."""

    def __init__(self, planner: Planner) -> None:
        self.reference: Reference | None = None
        self._planner = planner
        self._texts: dict[bytes, str] = {}
        self._search = SetSearch(
            planner.codec.cardinalities,
            planner.codec.ordinal,
            planner.first_generation(),
            key=self._text,
            seed=planner.scenario.seeds.search,
        )
        self._waiting: deque[Schedule] = deque()
        self._answers: list[FloatArray] = []

    def ask(self, count: int = 1) -> list[Schedule]:
        if not self._waiting:
            if self._answers:
                self._search.tell(self._answers)
                self._answers = []
            self._waiting.extend(
                self._planner.repaired(self._planner.codec.decode(genome))
                for genome in self._search.ask()
            )
        # The next generation needs answers to all of this one.
        return [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]

    def _text(self, genome: Genome) -> str:
        """Return the schedule that a genome comes down to."""
        codec = self._planner.codec
        key = codec.normalised(genome[None]).tobytes()
        if key not in self._texts:
            self._texts[key] = str(self._planner.repaired(codec.decode(genome)))
        return self._texts[key]

    def tell(self, schedule: Schedule, evaluation: Evaluation) -> None:
        table = candidates(
            evaluation,
            self._planner.curve(evaluation.schedule),
            self.accuracy(evaluation),
            self._planner.scenario.thresholds,
        )
        self._answers.append(objectives(table))

    def worth_going_on(self, schedule: Schedule, so_far: Evaluation) -> bool:
        return True

    def accuracy(self, evaluation: Evaluation) -> FloatArray:
        return measured(evaluation)
