"""A search method outside the package: random schedules, in one module."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

RANDOM = '''
"""Random search: the simplest baseline there is."""

from pwff_opt.registry import SEARCHES


class RandomSearcher:
    """Proposes schedules at random, none twice."""

    reference = None

    def __init__(self, planner):
        from pwff_opt.rng import stream

        self._planner, self._asked = planner, set()
        self._rng = stream(planner.scenario.seeds.search, "random-search")

    def ask(self, count=1):
        found, codec = [], self._planner.codec
        while len(found) < count:
            genome = self._rng.integers(0, codec.cardinalities)
            schedule = self._planner.repaired(codec.decode(genome))
            if schedule not in self._asked:
                self._asked.add(schedule)
                found.append(schedule)
        return found

    def tell(self, schedule, evaluation):
        pass

    def worth_going_on(self, schedule, so_far):
        return True

    def accuracy(self, evaluation):
        import numpy as np

        return np.array([np.mean(entry.accuracy) for entry in evaluation.rounds if entry.accuracy])


class Random:
    """Choose at random."""

    certifies = False

    def build(self, planner):
        return RandomSearcher(planner)


SEARCHES.add("random", Random())
'''

FRONT = """
import json
from dataclasses import replace

from pwff_opt import Evaluation, Planner, TrainedRound, Workload, pareto_front, read_scenario
from pwff_opt.runs.identity import learning_key
from pwff_opt.scenario.files import from_resolved, resolved
from pwff_opt.search.searcher import certifier


class Formula:
    "An evaluator whose accuracy grows with what is trained."

    def __init__(self, scenario):
        self.scenario, self.workload = scenario, Workload.padded(scenario, classes=3)
        self.trained = []

    def with_seed(self, seed):
        return self

    def test(self, schedule):
        learned = sum(sum(d.trained) * (1 + d.ranks[0]) for d in schedule.rounds)
        return (1 - 0.6 / (1 + 0.1 * learned),) * len(self.scenario.devices)

    def train(self, schedule):
        self.trained.append(str(schedule))
        each = len(self.scenario.devices)
        rounds = tuple(
            TrainedRound(
                loss=(0.0,) * each,
                accuracy=self.test(schedule.prefix(n + 1)),
                uplink_bit=(0,) * each,
            )
            for n in range(len(schedule))
        )
        key = learning_key(self.scenario, schedule)
        return Evaluation(key=key, schedule=schedule, rounds=rounds, wall_s=0.0)


base = read_scenario("hutto")
scenario = replace(
    base,
    devices=base.devices[:3],
    training=replace(base.training, rounds=2, validate_after=()),
    search=replace(base.search, method="random"),
)
assert from_resolved(resolved(scenario)) == scenario
runs = []
for _ in range(2):
    evaluator = Formula(scenario)
    front = pareto_front(scenario, evaluator, trainings=5)
    runs.append(evaluator.trained)
told = {
    "runs": runs,
    "schedules": sorted({one.split("x", 1)[1] for one in front.points["schedule"]}),
    "reference": front.reference,
    "certifier": type(certifier(Planner(scenario, evaluator.workload))).__name__,
}
print(json.dumps(told))
"""


def test_a_search_method_is_one_module(run_with_plugin: Callable[..., Any]) -> None:
    found = json.loads(run_with_plugin(FRONT, random_search=RANDOM).stdout)
    first, second = found["runs"]
    assert first == second
    assert len(set(first)) == len(first) >= 5
    trained = {one.split("x", 1)[1] for one in first}
    assert found["schedules"]
    assert set(found["schedules"]) <= trained
    assert found["reference"] is None
    # It cannot certify: the model of accuracy does it for what was trained.
    assert found["certifier"] == "Surrogate"
