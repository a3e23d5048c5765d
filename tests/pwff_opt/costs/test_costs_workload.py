"""What the data contribute: read back as written, and refused where it cannot be."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from pwff_opt import Workload
from pwff_opt.errors import DecisionError

LENGTHS = {
    "mean_tokens": [17.3, 20.0, 29.1],
    "mean_squared_tokens": [400.7, 512.0, 990.3],
    "mean_scored_tokens": [4.5, 1 / 3, 7.0],
    "mean_reward_tokens": [21.0, 22.0, 23.0],
    "mean_squared_reward_tokens": [500.0, 501.0, 502.1],
}


@pytest.mark.parametrize("known", [2, 3, 5])
@pytest.mark.parametrize("classes", [None, 3])
def test_a_workload_is_read_back_as_it_was_written(classes, known):
    lengths = dict(list(LENGTHS.items())[:known])
    workload = Workload(classes=classes, **{k: np.array(v) for k, v in lengths.items()})
    given = json.loads(json.dumps(workload.to_json()))
    assert given == {"classes": classes, **lengths}
    again = Workload.from_json(given)
    assert again.classes == classes
    assert {name: values.tolist() for name, values in again.lengths().items()} == lengths
    assert all(values.dtype == np.float64 for values in again.lengths().values())


def test_a_workload_written_before_there_were_stages_is_read():
    given = {"classes": 3, "mean_tokens": [9, 8], "mean_squared_tokens": [90, 70]}
    workload = Workload.from_json(given)
    assert workload.mean_tokens.tolist() == [9.0, 8.0]
    assert workload.mean_scored_tokens is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean_tokens": None}, "workload.mean_tokens must be positive and finite, got None"),
        ({"mean_tokens": "many"}, "workload.mean_tokens must be positive and finite, got many"),
        ({"mean_tokens": [[1.0], [1.0, 2.0]]}, "workload.mean_tokens must be positive and finite"),
        ({"mean_scored_tokens": [1.0, 0.0]}, "workload.mean_scored_tokens must be positive"),
        ({"classes": 1}, "workload.classes must be a whole number of at least 2, got 1"),
        ({"classes": 3.0}, "workload.classes must be a whole number of at least 2, got 3.0"),
        ({"mean_token": [1.0]}, "workload must hold only classes, mean_reward.*; got 'mean_token'"),
    ],
)
def test_a_workload_that_cannot_be_is_refused(change, message):
    given = {"classes": 3, "mean_tokens": [9.0, 8.0], "mean_squared_tokens": [90.0, 70.0]}
    with pytest.raises(DecisionError, match=message):
        Workload.from_json(given | change)


def test_a_workload_without_lengths_is_refused():
    with pytest.raises(DecisionError, match=r"workload\.mean_tokens must be given, got none"):
        Workload.from_json({"classes": 3})
    with pytest.raises(DecisionError, match=r"workload must be an object, got \[\]"):
        Workload.from_json([])


def test_padded_lengths_are_those_of_the_longest_example(small):
    length = small.model.max_tokens
    text = Workload.padded(small, classes=3)
    assert text.mean_tokens.tolist() == [length] * 3
    assert text.mean_squared_tokens.tolist() == [length**2] * 3
    data, training = (
        replace(small.data, source="stereoset"),
        replace(small.training, stage="alignment"),
    )
    pairs = replace(small, data=data, training=training)
    four = Workload.padded(pairs)
    assert four.mean_tokens.tolist() == [4 * length] * 3
    assert four.mean_squared_tokens.tolist() == [4 * length**2] * 3
    assert four.mean_scored_tokens.tolist() == [4 * (length - 1)] * 3
    assert four.mean_reward_tokens.tolist() == [length] * 3
    sampled = replace(pairs, alignment=replace(pairs.alignment, optimiser="grpo", answer_tokens=7))
    prompts = Workload.padded(sampled)
    assert prompts.mean_tokens.tolist() == [length] * 3
    assert prompts.mean_reward_tokens.tolist() == [length + 7] * 3
    assert prompts.mean_squared_reward_tokens.tolist() == [(length + 7) ** 2] * 3
