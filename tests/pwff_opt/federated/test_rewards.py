"""Reward models: what they learn, how sure they are, and that they come back as they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import expit

from pwff_opt.data.models import model_source
from pwff_opt.federated.learning.rewards import (
    Pairs,
    Reader,
    RewardModel,
    fitted_temperature,
    reliability,
)

GOOD = ("kind", "helpful", "gentle", "honest", "patient", "fair")
BAD = ("rude", "cruel", "lazy", "greedy", "mean", "unfair")
PEOPLE = ("nurse", "teacher", "driver", "farmer", "baker", "pilot", "lawyer", "cook")


def pairs(seed: int, count: int) -> Pairs:
    """Return sentences that a kind word is preferred in."""
    rng = np.random.default_rng(seed)
    people = [PEOPLE[i] for i in rng.integers(len(PEOPLE), size=count)]
    good = [GOOD[i] for i in rng.integers(len(GOOD), size=count)]
    bad = [BAD[i] for i in rng.integers(len(BAD), size=count)]
    return Pairs(
        prompts=tuple(f"The {person} came in." for person in people),
        chosen=tuple(
            f"The {person} was {word} to us." for person, word in zip(people, good, strict=True)
        ),
        rejected=tuple(
            f"The {person} was {word} to us." for person, word in zip(people, bad, strict=True)
        ),
    )


def test_learns_what_is_preferred_and_comes_back_as_it_was(tmp_path: Path) -> None:
    reader = Reader(model_source("minilm"))
    parts = pairs(1, 60), pairs(2, 40), pairs(3, 40)
    model = RewardModel.of(reader, *parts, steps=12, seed=1, folder=tmp_path)
    assert model.reliability.accuracy > 0.9
    assert model.reliability.log_loss < 0.5 < np.log(2)
    kind, unkind = model.rewards(
        ["The plumber came."] * 2, ["The plumber was helpful.", "The plumber was cruel."]
    )
    assert kind > unkind
    (path,) = tmp_path.glob("*.safetensors")
    written = path.stat().st_mtime_ns
    again = RewardModel.of(reader, *parts, steps=12, seed=1, folder=tmp_path)
    assert path.stat().st_mtime_ns == written
    assert again.reliability == model.reliability
    np.testing.assert_array_equal(
        again.rewards(parts[2].prompts, parts[2].chosen),
        model.rewards(parts[2].prompts, parts[2].chosen),
    )
    # The mean reward of what it was calibrated with is zero.
    both = np.concatenate(
        [model.rewards(parts[1].prompts, one) for one in (parts[1].chosen, parts[1].rejected)]
    )
    assert both.mean() == pytest.approx(0.0, abs=1e-5)
    # Another seed or other pairs make another model; a damaged file is made anew.
    RewardModel.of(reader, *parts, steps=12, seed=2, folder=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    path.write_bytes(b"damaged")
    mended = RewardModel.of(reader, *parts, steps=12, seed=1, folder=tmp_path)
    assert mended.reliability == model.reliability


def test_the_number_of_threads_does_not_show(tmp_path: Path) -> None:
    """Products that are split over threads round otherwise, and AdamW makes much of it."""
    reader = Reader(model_source("minilm"))
    parts = [  # long enough to be split
        replace(own, prompts=tuple(prompt * 4 for prompt in own.prompts))
        for own in (pairs(1, 60), pairs(2, 20), pairs(3, 20))
    ]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            folder = tmp_path / str(threads)
            folder.mkdir()
            RewardModel.of(reader, *parts, steps=3, seed=1, folder=folder)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    one, two = (next((tmp_path / name).iterdir()).read_bytes() for name in "12")
    assert one == two


def test_the_frozen_encoder_is_left_as_it_was(tmp_path: Path, small_model: Path) -> None:
    reader = Reader(str(small_model))
    before = [layer._up.weight.clone() for layer in reader.backbone.layers]  # type: ignore[attr-defined]
    RewardModel.of(
        reader, pairs(1, 20), pairs(2, 10), pairs(3, 10), steps=4, seed=1, folder=tmp_path
    )
    for layer, weight in zip(reader.backbone.layers, before, strict=True):
        assert (layer._up.weight == weight).all()  # type: ignore[attr-defined]


@pytest.mark.parametrize("temperature", [0.2, 1.0, 4.0])
def test_temperature_is_found(temperature: float) -> None:
    """Differences whose log-odds are a multiple of what the model says."""
    rng = np.random.default_rng(6)
    odds = rng.normal(0.0, 2.0, 200_000)
    won = rng.random(len(odds)) < expit(odds)
    differences = np.where(won, odds, -odds) * temperature
    assert fitted_temperature(differences) == pytest.approx(temperature, rel=0.03)


def test_reliability_counts() -> None:
    rng = np.random.default_rng(6)
    odds = rng.normal(0.0, 2.0, 200_000)
    calibrated = np.where(rng.random(len(odds)) < expit(odds), odds, -odds)
    told = reliability(calibrated)
    assert told.calibration_error < 0.01
    assert told.accuracy == pytest.approx(float((calibrated > 0).mean()))
    assert reliability(3 * calibrated).calibration_error > 0.05  # too sure of itself
    by_hand = reliability(np.array([2.0, -1.0]))
    assert by_hand.accuracy == 0.5
    assert by_hand.log_loss == pytest.approx(-(np.log(expit(2.0)) + np.log(expit(-1.0))) / 2)
    expected = (abs(expit(2.0) - 1) + abs(expit(1.0) - 0)) / 2
    assert by_hand.calibration_error == pytest.approx(expected)
