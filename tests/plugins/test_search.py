"""A method of search outside the package, in one module: schedules drawn at random."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

DICE = '''
"""Draw what to train next at random, each schedule once."""

import numpy as np

from pwff_opt.registry import SEARCHES


class Dice:
    reference = None

    def __init__(self, planner):
        self.planner, self.seen = planner, set()
        self.rng = np.random.default_rng(planner.scenario.seeds.search)

    def ask(self, count=1):
        codec, found = self.planner.codec, []
        for _ in range(1000):
            if len(found) == count:
                break
            schedule = self.planner.repaired(codec.decode(self.rng.integers(codec.cardinalities)))
            if str(schedule) not in self.seen:
                self.seen.add(str(schedule))
                found.append(schedule)
        return found

    def tell(self, schedule, evaluation):
        pass

    def worth_going_on(self, schedule, so_far):
        return True

    def accuracy(self, evaluation):
        return np.array([np.mean(entry.accuracy) for entry in evaluation.rounds if entry.accuracy])


class DiceMethod:
    certifies = False

    def build(self, planner):
        return Dice(planner)


SEARCHES.add("dice", DiceMethod())
'''

FORMULA = """
class Formula:
    "An evaluator whose accuracy grows with what is trained."

    def __init__(self, scenario):
        self.scenario, self.workload = scenario, Workload.padded(scenario, classes=3)

    def with_seed(self, seed):
        return self

    def test(self, schedule):
        learned = sum(sum(d.trained) * (1 + d.ranks[0]) for d in schedule.rounds)
        return (1 - 0.6 / (1 + 0.1 * learned),) * len(self.scenario.devices)

    def train(self, schedule):
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
"""

FRONT = f"""
import json
from dataclasses import replace

from pwff_opt import Evaluation, TrainedRound, Workload, pareto_front, read_scenario
from pwff_opt.errors import ScenarioError
from pwff_opt.registry import SEARCHES
from pwff_opt.runs.identity import learning_key
from pwff_opt.scenario.files import from_resolved, resolved

{FORMULA}

base = read_scenario("hutto")
scenario = replace(
    base,
    devices=base.devices[:3],
    training=replace(base.training, rounds=2, validate_after=()),
    decisions=replace(base.decisions, phases=1),
    search=replace(base.search, method="dice"),
)
assert from_resolved(resolved(scenario)) == scenario
front = pareto_front(scenario, Formula(scenario), trainings=5, batch=2)
again = pareto_front(scenario, Formula(scenario), trainings=5, batch=2)
try:
    replace(base, search=replace(base.search, method="cards"))
except ScenarioError as error:
    refusal = error.problems[0]
print(json.dumps({{
    "known": list(SEARCHES),
    "refusal": refusal,
    "trained": len(front.evaluations),
    "points": len(front.points),
    "same": front.points.equals(again.points),
}}))
"""


def test_a_method_of_search_is_one_module(run_with_plugin: Callable[..., Any]) -> None:
    found = json.loads(run_with_plugin(FRONT, dice=DICE).stdout)
    assert found["known"] == ["dice", "evolution", "surrogate"]
    assert found["refusal"] == (
        "search.method must be one of 'dice', 'evolution', 'surrogate', got 'cards'"
    )
    assert found["trained"] == 5
    assert found["points"] > 0
    assert found["same"]
