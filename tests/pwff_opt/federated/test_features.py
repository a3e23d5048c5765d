"""Cached activations are what a full pass gives, however the blocks below have changed meanwhile."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pwff_opt.federated.model import features
from pwff_opt.federated.model.backbone import Stack
from pwff_opt.federated.model.features import Level, below
from pwff_opt.federated.text.tokens import Packed
from pwff_opt.federated.training.evaluator import FederatedEvaluator
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.schedule import Schedule

SCHEDULES = [
    "1x2:ffa",
    "1x2:paa 2x2:ffa",  # frozen layers with blocks of the device's own below
    "1x2:paa 1x4:ffp",  # whose LoRA changes its rank
    "1x0:paa 2x0:fpa",
    "1x2:paa 2x2:fff",
    "1x2:ffa",
]


def hidden(evaluator: FederatedEvaluator, schedule: Schedule, device: int) -> tuple[Any, Any]:
    """Return the activations that the last round's training starts from, cached and computed."""
    trainer, backbone = evaluator.trainer, evaluator.material.backbone
    state, _ = evaluator._trained(schedule)
    decision = schedule.rounds[-1]
    level = trainer._level(decision)
    own, batch = state.devices[device], evaluator.material.shards[device].validation
    scale = trainer._scale(decision.ranks[device])
    packed = Packed.of(evaluator.material.stage.tokens, [batch], device=backbone.device)
    with torch.inference_mode():
        known = below(own, level)
        cached = trainer.features.start(level, [device], [batch], [known], [scale], 1.0)
        whole = backbone.run(
            packed,
            Stack([trainer._moved(own)], [scale]),
            backbone.embed(packed),
            stop=level.layer,
            completed=level.completed,
        )
    return cached.hidden.cpu(), whole.cpu()


@pytest.mark.parametrize("budget", [4e9, 0.0])
def test_never_stale(small: Scenario, tmp_path: Path, budget: float) -> None:
    scenario = replace(small, training=replace(small.training, feature_cache_byte=budget))
    evaluator = FederatedEvaluator(scenario, tmp_path)
    for text in (*SCHEDULES, *reversed(SCHEDULES)):
        for device in (0, 2):
            cached, whole = hidden(evaluator, Schedule.parse(text, devices=3), device)
            torch.testing.assert_close(cached, whole, rtol=1e-5, atol=1e-5)


def test_files_hold_what_memory_would(small: Scenario, tmp_path: Path) -> None:
    """Bit for bit; and files leave nothing behind."""
    schedule = Schedule.parse("1x2:paa 2x2:ffa", devices=3)
    results = []
    for name, budget in (("memory", 4e9), ("files", 0.0)):
        scenario = replace(small, training=replace(small.training, feature_cache_byte=budget))
        evaluator = FederatedEvaluator(scenario, tmp_path / name)
        results.append(evaluator._trained(schedule))
    for own, other in zip(results[0][0].devices, results[1][0].devices, strict=True):
        for key, tensor in own.items():
            assert torch.equal(tensor, other[key])
    assert results[0][1] == results[1][1]


def test_the_base_models_activations_are_computed_once(
    small: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = FederatedEvaluator(small, tmp_path)
    schedule = Schedule.parse("3x2:ffa", devices=3)
    evaluator.train(schedule)
    evaluator.test(schedule)
    known = evaluator.trainer.features._base[Level(2)].known
    assert known[evaluator.material.shards[0].validation].all()
    assert known[evaluator.material.shards[0].test].all()
    passes = []
    embed = type(evaluator.material.backbone).embed
    monkeypatch.setattr(
        type(evaluator.material.backbone), "embed", lambda *args: passes.append(1) or embed(*args)
    )
    evaluator._folder = tmp_path / "again"
    evaluator.train(schedule)
    assert not passes
    evaluator.train(Schedule.parse("3x2:faa", devices=3))  # another level
    assert passes


def test_a_full_disk_is_told_before_anything_is_written(
    small: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    scenario = replace(small, training=replace(small.training, feature_cache_byte=0.0))
    evaluation = FederatedEvaluator(scenario, tmp_path).train(Schedule.parse("1x2:ffa", devices=3))
    assert evaluation.status == "failed"
    assert "No space left on device" in evaluation.reason
    assert "raise training.feature_cache_byte" in evaluation.reason


@pytest.mark.parametrize("text", ["1x2:paa 1x2:ffa", "1x0:pap 1x0:fap"])
def test_devices_that_read_the_same_text_do_not_read_each_other(
    small: Scenario, tmp_path: Path, text: str
) -> None:
    """With blocks of their own below, in either order, and training on what others have computed."""
    evaluator = FederatedEvaluator(small, tmp_path)
    trainer, backbone = evaluator.trainer, evaluator.material.backbone
    schedule = Schedule.parse(text, devices=3)
    state, _ = evaluator._trained(schedule)
    level = trainer._level(schedule.rounds[-1])
    scale = trainer._scale(schedule.rounds[-1].ranks[0])
    batch = evaluator.material.shards[2].test[:4]
    packed = Packed.of(evaluator.material.stage.tokens, [batch], device=backbone.device)
    for device in (0, 2, 1, 2, 0):
        own = state.devices[device]
        known = below(own, level)
        start = trainer.features.start(level, [device], [batch], [known], [scale], 1.0)
        with torch.no_grad():
            embedded = backbone.embed(packed)
            stack = Stack([trainer._moved(own)], [scale])
            options = {"stop": level.layer, "completed": level.completed}
            whole = backbone.run(packed, stack, embedded, **options)
        torch.testing.assert_close(start.hidden.cpu(), whole.cpu(), rtol=1e-5, atol=1e-5)
        if start.projected is not None:
            projected = backbone.project(level.layer, whole)
            torch.testing.assert_close(start.projected.cpu(), projected.cpu(), rtol=1e-5, atol=1e-5)
        assert not start.hidden.is_inference()
        with torch.no_grad():  # a start is not used up
            first, again = (backbone.run(packed, stack, start) for _ in range(2))
        assert torch.equal(first.cpu(), again.cpu())


def test_a_budget_beyond_the_memory_falls_back_on_files(
    small: Scenario,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is no step that was too large: mini-batches stay whole."""
    expected = FederatedEvaluator(small, tmp_path / "a")._trained(
        Schedule.parse("1x2:ffa", devices=3)
    )
    monkeypatch.setattr(features, "_memory", lambda *_: torch.empty(10**15))
    evaluator = FederatedEvaluator(small, tmp_path / "b")
    result = evaluator._trained(Schedule.parse("1x2:ffa", devices=3))
    assert result[1] == expected[1]
    assert "out of memory" not in caplog.text
    assert evaluator.trainer.features._left_byte == small.training.feature_cache_byte
