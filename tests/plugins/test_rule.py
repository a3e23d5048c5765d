"""An aggregation rule from outside the package: one module, named in a scenario like our own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEDIAN = '''
"""Coordinate-wise median: one device that sends nonsense does not move it."""

from pwff_opt.federated.exchange.rules import Case, Factors, LoraRule, Merged
from pwff_opt.registry import RULES


class Median(LoraRule):
    """Give every device the median of A, and that of B, over the senders."""

    equal_ranks = True

    def merged(self, case: Case) -> Merged:
        import torch

        a = torch.stack([own.a for own in case.sent]).median(dim=0).values
        b = torch.stack([own.b for own in case.sent]).median(dim=0).values
        return Merged(factors=tuple(Factors(a=a, b=b, scale=own.scale) for own in case.held))


RULES.add("median", Median())
'''

SCENARIO = """
name = "median"
[cell]
bandwidth_hz = 1e6
downlink_bandwidth_hz = 1e6
downlink_power_w = 1
[devices]
count = 3
distance_m = { disc = [50, 300] }
power_max_w = 0.1
frequency_max_hz = { uniform = [1e9, 2e9] }
frequency_min_hz = 1e8
[model]
source = "MODEL"
max_tokens = 24
pooling = "mean"
[data]
train_per_device = 24
validation_per_device = 10
test_per_device = 12
[peft]
adapter_width = 0
[training]
rounds = 2
local_steps = 2
batch_size = 4
learning_rate = 0.01
[aggregation]
lora = "median"
[decisions]
ranks = [2]
layer_states = ["frozen", "aggregated"]
[search]
population = 4
curve_points = 5
"""

FRONT = """
import json
import sys
from dataclasses import replace
from pathlib import Path

from pwff_opt import Schedule, pareto_front
from pwff_opt.errors import ScenarioError
from pwff_opt.registry import RULES
from pwff_opt.scenario.files import parse_scenario

scenario = parse_scenario(Path("scenario.toml").read_text())
assert "torch" not in sys.modules, "to check a scenario, a rule needs no torch"
refused = []
for table, changes in (
    ("aggregation", {"clip_norm": 1.0, "noise_multiplier": 1.0}),
    ("decisions", {"rank_scope": "per_device"}),
    ("aggregation", {"lora": "medium"}),
):
    try:
        replace(scenario, **{table: replace(getattr(scenario, table), **changes)})
    except ScenarioError as error:
        refused.append(str(error))

import torch

from pwff_opt.federated.training.evaluator import FederatedEvaluator
from pwff_opt.planning.demand import CostModel

evaluator = FederatedEvaluator(scenario, "checkpoints")
front = pareto_front(scenario, evaluator, trainings=2)
schedule = Schedule.parse("2x2:faa", devices=3)
rounds = evaluator.train(schedule).rounds
payload = CostModel(scenario, evaluator.workload).demand(schedule).payload_bit
trainer = evaluator.trainer
held, _ = trainer.round(trainer.initial(), 0, schedule.rounds[0], (True,) * 3)
first, *others = held.devices
names = [name for name in first if name.startswith("lora.")]
print(json.dumps({
    "points": len(front.points),
    "measured": [list(entry.uplink_bit) for entry in rounds],
    "charged": payload.tolist(),
    "common": all(torch.equal(first[name], own[name]) for own in others for name in names),
    "source": RULES.source("median"),
    "refused": refused,
}))
"""


def test_a_median_of_factors_as_one_module(
    small_model: Path, tmp_path: Path, run_with_plugin: Callable[..., Any]
) -> None:
    (tmp_path / "scenario.toml").write_text(SCENARIO.replace("MODEL", str(small_model)))
    told = json.loads(run_with_plugin(FRONT, median_rule=MEDIAN).stdout.splitlines()[-1])
    assert told["points"] >= 1
    assert told["measured"] == told["charged"]
    # Two layers, queries and values, A and B of rank 2 at width 32, in float32.
    assert told["measured"] == [[2 * 2 * 2 * 2 * 32 * 32] * 3] * 2
    assert told["common"]
    assert len(told["source"]) == 64
    noise, scope, unknown = told["refused"]
    assert "noise_multiplier must be 0 for aggregation.lora 'median', which does more" in noise
    assert "rank_scope must be 'common' for aggregation.lora 'median'" in scope
    assert "aggregation.lora must be one of 'fedex', 'fedit', " in unknown
    assert "'median', 'personal', 'raflora', 'rolora', got 'medium'" in unknown


def test_two_plug_ins_of_one_name_are_refused(run_with_plugin: Callable[..., Any]) -> None:
    code = """
from pwff_opt.errors import PluginError
from pwff_opt.registry import RULES
try:
    list(RULES)
except PluginError as error:
    print(error)
"""
    told = run_with_plugin(code, first_rule=MEDIAN, second_rule=MEDIAN).stdout
    assert "aggregation.lora 'median' must be added by one module" in told
    assert "first_rule" in told
    assert "second_rule" in told
    assert "rename one of them" in told


def test_a_plug_in_that_was_edited_has_another_source(run_with_plugin: Callable[..., Any]) -> None:
    code = (
        "from pwff_opt.registry import RULES; print(RULES.source('median'), RULES.source('fedit'))"
    )
    sources = [MEDIAN, MEDIAN, MEDIAN.replace(".median(", ".nanmedian(")]
    told = [run_with_plugin(code, median_rule=source).stdout.split(" ") for source in sources]
    (first, own), (again, _), (edited, _) = told
    assert first == again != edited
    assert own.strip() == ""
