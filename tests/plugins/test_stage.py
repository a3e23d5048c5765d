"""A stage from outside the package: one module, named in a scenario like our own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

SMOOTHED = '''
"""Classification with smoothed labels (Szegedy et al., CVPR 2016, section 7)."""

from dataclasses import replace

from pwff_opt.federated.stages import StageVariant
from pwff_opt.registry import STAGES

SHARE = 0.2


class Smoothed(StageVariant):
    """Learn classes of which a share of the certainty is spread over all others."""

    sources = ("hutto", "file", "hub")
    classifies = True

    def material(self, scenario, workers):
        import numpy as np
        from torch.nn import functional

        from pwff_opt.federated.learning import Loss
        from pwff_opt.federated.learning.classification import Classification
        from pwff_opt.federated.training.material import classification

        class Learned(Classification):
            def losses(self, batches, passes):
                packed, hidden = passes.own(self.tokens, batches)
                logits = self._backbone.classify(hidden, packed, passes.stack)
                labels = self._labels[np.concatenate(batches)].to(logits.device)
                each = functional.cross_entropy(
                    logits, labels, reduction="none", label_smoothing=SHARE
                )
                yield Loss(objective=0, each=each)

        made = classification(scenario, workers)
        return replace(made, stage=Learned(made.backbone, made.stage.tokens, made.labels))


STAGES.add("smoothed", Smoothed())
'''

SCENARIO = """
name = "smoothed"
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
adapter_width = 4
[training]
stage = "smoothed"
rounds = 2
local_steps = 2
batch_size = 4
learning_rate = 0.01
[decisions]
ranks = [2]
layer_states = ["frozen", "aggregated"]
[search]
population = 4
curve_points = 5
"""

CODE = """
import json
from pathlib import Path
from dataclasses import replace
from pwff_opt import Schedule, pareto_front
from pwff_opt.errors import ScenarioError
from pwff_opt.federated.training.evaluator import FederatedEvaluator
from pwff_opt.runs.identity import learning_key
from pwff_opt.scenario.files import parse_scenario

scenario = parse_scenario(Path("scenario.toml").read_text())
plain = replace(scenario, training=replace(scenario.training, stage="classification"))
schedule = Schedule.parse("1x2:ffa", devices=3)
told = dict(key=learning_key(scenario, schedule), plain=learning_key(plain, schedule))
try:
    replace(scenario, data=replace(scenario.data, source="stereoset"))
except ScenarioError as error:
    told["refused"] = str(error)
if Path("front").exists():
    evaluator = FederatedEvaluator(scenario, "checkpoints")
    told["loss"] = evaluator.train(schedule).rounds[0].loss
    told["plain_loss"] = FederatedEvaluator(plain, "plain").train(schedule).rounds[0].loss
    front = pareto_front(scenario, evaluator, trainings=2)
    told["accuracy"] = front.points["accuracy"].tolist()
print(json.dumps(told))
"""


def test_a_stage_from_outside_makes_a_front(
    run_with_plugin: Callable[..., Any], small_model: Path, tmp_path: Path
) -> None:
    text = SCENARIO.replace("MODEL", str(small_model))
    (tmp_path / "scenario.toml").write_text(text)
    (tmp_path / "front").touch()
    first = json.loads(run_with_plugin(CODE, smoothed=SMOOTHED).stdout)
    assert first["accuracy"]
    assert all(0 <= value <= 1 for value in first["accuracy"])
    assert first["loss"] != first["plain_loss"]
    assert "data.source must be one of 'hutto', 'file', 'hub'" in first["refused"]
    assert "'smoothed'" in first["refused"]

    # Who edits the plug-in trains again; who does not, does not. Our own stages keep their keys.
    (tmp_path / "front").unlink()
    again = json.loads(run_with_plugin(CODE, smoothed=SMOOTHED).stdout)
    edited = SMOOTHED.replace("SHARE = 0.2", "SHARE = 0.3")
    other = json.loads(run_with_plugin(CODE, smoothed=edited).stdout)
    assert again["key"] == first["key"] != other["key"]
    assert again["plain"] == first["plain"] == other["plain"]
