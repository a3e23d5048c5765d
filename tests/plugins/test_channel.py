"""A channel model outside the package: Nakagami-m fading, in one module."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

NAKAGAMI = '''
"""Nakagami fading of shape m = 2: milder than Rayleigh's, which is m = 1."""

from pwff_opt.registry import CHANNELS

M = 2.0


class Nakagami:
    def gain(self, count, *, radio, rng):
        """Return power gains, which follow a gamma law of mean 1 and variance 1 / m."""
        return rng.gamma(M, 1.0 / M, count)


CHANNELS.add("nakagami2", Nakagami())
'''

FRONT = """
import json
from dataclasses import replace

import numpy as np

from pwff_opt import Evaluation, Planner, TrainedRound, Workload, pareto_front, read_scenario
from pwff_opt.channel import channel_gain, mean_gain
from pwff_opt.errors import ScenarioError
from pwff_opt.registry import CHANNELS
from pwff_opt.runs.identity import learning_key
from pwff_opt.scenario.files import from_resolved, resolved


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


base = read_scenario("hutto")
radio = replace(base.radio, fading="nakagami2", shadowing_std_db=0.0)
scenario = replace(
    base,
    radio=radio,
    devices=base.devices[:3],
    training=replace(base.training, rounds=2, validate_after=()),
    decisions=replace(base.decisions, phases=1),
)
assert from_resolved(resolved(scenario)) == scenario
evaluator = Formula(scenario)
front = pareto_front(scenario, evaluator, trainings=4).points

many = replace(
    scenario,
    devices=base.devices[:1] * 40,
    training=replace(scenario.training, rounds=500),
)
gain = channel_gain(many) / mean_gain(base.devices[0].distance_m, radio=radio)
try:
    replace(base, radio=replace(radio, fading="nakagami3"))
except ScenarioError as error:
    refusal = error.problems[0]
print(json.dumps({
    "known": list(CHANNELS),
    "refusal": refusal,
    "points": len(front),
    "delay_s": front["delay_s"].tolist(),
    "planned": (Planner(scenario, evaluator.workload).gain == channel_gain(scenario)).all().item(),
    "mean": gain.mean(),
    "variance": gain.var(),
    "different": len(np.unique(gain)),
}))
"""


def test_a_channel_model_is_one_module(run_with_plugin: Callable[..., Any]) -> None:
    found = json.loads(run_with_plugin(FRONT, nakagami=NAKAGAMI).stdout)
    assert found["known"] == ["nakagami2", "none", "rayleigh", "rician"]
    assert found["refusal"] == (
        "radio.fading must be one of 'nakagami2', 'none', 'rayleigh', 'rician', got 'nakagami3'"
    )
    assert found["points"] > 0
    assert min(found["delay_s"]) > 0
    assert found["planned"]
    assert found["different"] == 40 * 500
    # Of 20,000 gains, the mean errs by 0.005 and the variance by 0.008 (standard deviations).
    assert abs(found["mean"] - 1.0) < 0.02
    assert abs(found["variance"] - 0.5) < 0.04
