"""The gate that is hard to pass by luck: every device permutes the labels of the same kind of text.

No shared model can serve devices that call the same sentiment by different names; a personal part can.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pwff_opt.data.corpora import load_corpus
from pwff_opt.federated.training.evaluator import FederatedEvaluator
from pwff_opt.scenario import Data
from pwff_opt.scenario.files import read_scenario
from pwff_opt.scenario.schedule import Schedule

PERMUTATIONS = np.array([[0, 1, 2], [1, 2, 0], [2, 0, 1]])


def accuracy(folder: Path, schedule: str, head: Any) -> float:
    corpus = load_corpus(Data(), folder=folder)
    # One domain for all, so that nothing in the text tells a device from another.
    pd.DataFrame({"text": corpus.texts, "label": corpus.labels}).to_csv(folder / "all.csv")
    scenario = read_scenario("hutto")
    scenario = replace(
        scenario,
        folder=str(folder),
        devices=scenario.devices[:3],
        peft=replace(scenario.peft, head=head),
        data=Data(
            source="file",
            path="all.csv",
            label_dirichlet=1000.0,
            train_per_device=300,
            validation_per_device=10,
            test_per_device=200,
        ),
        training=replace(
            scenario.training,
            rounds=5,
            local_steps=10,
            validate_after=(5,),
            head_learning_rate=3e-3,
        ),
    )
    evaluator = FederatedEvaluator(scenario, folder / head)
    for device, shard in enumerate(evaluator.material.shards):
        own = np.concatenate([shard.train, shard.validation, shard.test])
        evaluator.material.labels[own] = PERMUTATIONS[device][evaluator.material.labels[own]]
    return float(np.mean(evaluator.test(Schedule.parse(schedule, devices=3))))


def test_shared_alone_fails_and_shared_with_personal_passes(tmp_path: Path) -> None:
    """The head is shared in both arms: they differ by the personal LoRA and nothing else.

    Measured: 0.288 against 0.588 (0.600 with a personal head alone); a model for one labelling
    reaches some 0.65 with as much data.
    """
    shared = accuracy(tmp_path, "5x0:ffffaa", "shared")
    personal = accuracy(tmp_path, "5x8:ffffaa", "shared")
    # Whatever a shared model says is right for about one device in three.
    assert shared < 0.42
    assert personal > 0.5
    assert personal - shared > 0.12
