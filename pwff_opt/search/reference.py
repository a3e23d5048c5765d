"""The corner from which a front is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pwff_opt.evaluation import Evaluation
from pwff_opt.planning.planner import Planner
from pwff_opt.scenario.schedule import LayerState, RoundDecision, Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The worst the user would accept: the corner from which a front is measured."""

    energy_j: float
    delay_s: float
    accuracy: float
    sentence: str
    """Where it comes from."""

    @classmethod
    def of(cls, planner: Planner, first: Sequence[Evaluation]) -> Reference:
        """Return the thresholds; in place of those not given, what all layers cost and what scores least.

        ``first``: the evaluations of the first generation.
        """
        scenario, layers = planner.scenario, planner.codec.layers
        thresholds = scenario.thresholds
        all_layers = RoundDecision(
            ranks=(max(scenario.decisions.ranks),) * len(scenario.devices),
            states=(LayerState.AGGREGATED,) * layers,
        )
        rounds = scenario.training.rounds
        most = planner.curve(planner.repaired(Schedule(rounds=(all_layers,) * rounds)))
        worst = min(
            (
                float(np.mean(entry.accuracy))
                for done in first
                for entry in done.rounds
                if entry.accuracy
            ),
            default=0.0,
        )
        given = {
            "energy_max_j": thresholds.energy_max_j,
            "delay_max_s": thresholds.delay_max_s,
            "accuracy_min": thresholds.accuracy_min,
        }
        values = {
            "energy_max_j": float(most.energy_j.max()),
            "delay_max_s": float(most.delay_s.max()),
            "accuracy_min": worst,
        }
        missing = [name for name, value in given.items() if value is None]
        values |= {name: value for name, value in given.items() if value is not None}
        sentence = (
            f"fronts are measured against {values['energy_max_j']:.4g} J, {values['delay_max_s']:.4g} s "
            f"and accuracy {values['accuracy_min']:.3f}"
        )
        if missing:
            sentence += (
                f"; [thresholds] {', '.join(missing)} not given, so what training all layers costs (as far "
                "as they fit into memory) and the least accuracy of the first generation stand for what "
                "you would accept: give them, and no training is spent where you would not go"
            )
        return cls(
            energy_j=values["energy_max_j"],
            delay_s=values["delay_max_s"],
            accuracy=values["accuracy_min"],
            sentence=sentence,
        )
