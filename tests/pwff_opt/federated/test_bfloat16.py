"""A frozen model in bfloat16 trains blocks as good as one in float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pwff_opt.federated.training.evaluator import FederatedEvaluator
from pwff_opt.runs.identity import learning_key
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.files import read_scenario
from pwff_opt.scenario.schedule import Schedule


def test_blocks_stay_float32_and_losses_close(small: Scenario, tmp_path: Path) -> None:
    schedule = Schedule.parse("1x2:fpa 2x4:paa", devices=3)
    half = replace(small, training=replace(small.training, base_dtype="bfloat16"))
    assert learning_key(half, schedule) != learning_key(small, schedule)
    state, rounds = FederatedEvaluator(half, tmp_path / "half")._trained(schedule)
    _, exact = FederatedEvaluator(small, tmp_path / "whole")._trained(schedule)
    assert all(t.dtype == torch.float32 for own in state.devices for t in own.values())
    for entry, other in zip(rounds, exact, strict=True):
        np.testing.assert_allclose(entry.loss, other.loss, rtol=0.02)
    assert rounds != exact  # it is another arithmetic


@pytest.mark.on_cpu
def test_what_is_added_to_a_frozen_weight_is_not_rounded_away(
    small: Scenario, tmp_path: Path
) -> None:
    """A thousandth of the weight is under bfloat16's last digit."""
    half = replace(small, training=replace(small.training, base_dtype="bfloat16"))
    layer = FederatedEvaluator(half, tmp_path).material.backbone.layers[1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 32, generator=generator)
    plain = layer.change({})(x)
    for name in ("query", "value"):
        delta = 2e-5 * torch.randn(32, 32, generator=generator)
        change = layer.change({name: delta})(x) - plain
        gained = dict(zip(layer.widths, change.split([*layer.widths.values()], 1), strict=True))[
            name
        ]
        assert (gained - x @ delta.T).norm() < 0.01 * (x @ delta.T).norm()
        assert layer.project(x).dtype == plain.dtype == torch.float32


@pytest.mark.slow
def test_accuracy_is_the_same_within_noise_on_paired_seeds(tmp_path: Path) -> None:
    """Measured with 6 seeds: see the README."""
    base = read_scenario("hutto")
    schedule = Schedule.parse("8x8:fffpaa", devices=4)
    differences = []
    for seed in range(6):
        pair = []
        for dtype in ("float32", "bfloat16"):
            scenario = replace(
                base,
                training=replace(base.training, base_dtype=dtype, validate_after=(8,)),
                seeds=replace(base.seeds, training=seed, data=seed),
            )
            evaluator = FederatedEvaluator(scenario, tmp_path / f"{dtype}{seed}")
            pair.append(np.mean(evaluator.test(schedule)))
        differences.append(pair[1] - pair[0])
    mean, error = np.mean(differences), np.std(differences, ddof=1) / np.sqrt(len(differences))
    print(f"bfloat16 - float32: {mean:+.4f} +- {error:.4f} ({np.round(differences, 3)})")
    assert abs(mean) < 3 * error + 0.005
