"""An evaluator whose accuracy is a formula of the schedule and the seed; processes of their own import it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pwff_opt import Evaluation, Scenario, Schedule, TrainedRound, Workload
from pwff_opt.errors import ScenarioError, TrainingError
from pwff_opt.runs.identity import learning_key


class Toy:
    """It notes nothing and writes nothing."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario, self.workload = scenario, Workload.padded(scenario, classes=3)

    def with_seed(self, seed: int) -> Toy:
        return Toy(replace(self.scenario, seeds=replace(self.scenario.seeds, training=seed)))

    def test(self, schedule: Schedule) -> tuple[float, ...]:
        learned = sum(sum(d.trained) * (1 + d.ranks[0]) for d in schedule.rounds)
        key = int(learning_key(self.scenario, schedule), 16)
        luck = 0.01 * np.random.default_rng(key).standard_normal()
        return tuple(1 - 0.6 / (1 + 0.1 * learned) - 0.01 * k + luck for k in range(3))

    def train(self, schedule: Schedule) -> Evaluation:
        rounds = tuple(
            TrainedRound(
                loss=(0.0, np.nan, 0.0),
                accuracy=self.test(schedule.prefix(n + 1)),
                uplink_bit=(0,) * 3,
            )
            for n in range(len(schedule))
        )
        key = learning_key(self.scenario, schedule)
        return Evaluation(key=key, schedule=schedule, rounds=rounds, wall_s=0.0)


class Broken(Toy):
    def train(self, schedule: Schedule) -> Evaluation:
        raise TrainingError("round 1, device 2: loss is not finite")

    def test(self, schedule: Schedule) -> tuple[float, ...]:
        raise ScenarioError("there", ["cell must be one", "radio must be one"])
