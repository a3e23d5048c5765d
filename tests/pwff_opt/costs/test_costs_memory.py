"""Peak memory against every allocation of torch's CPU allocator during a real training step.

Measured on these cases: at most 0.05 % off in total, 0.2 % off in what is not frozen weights.
The bound is 1 % of the latter: a changed order of allocations in torch or transformers shows.
"""

from __future__ import annotations

import pytest

from pwff_opt.costs import Architecture, Blocks, training_memory_byte
from pwff_opt.errors import DecisionError
from pwff_opt.scenario.schedule import LayerState

BOUND = 0.01


def assert_close(case, step, *, width, rank, states, present, shapes, padding=0, **options):
    for sequences, length in shapes:
        measured = step.memory_byte(sequences, length, padding=padding)
        predicted = training_memory_byte(
            case.architecture,
            Blocks(adapter_width=width, **options),
            rank=rank,
            states=states,
            present=present,
            sequences=sequences,
            length=length,
            padded=padding > 0,
        )
        variable = measured - 4 * case.architecture.parameters()
        assert abs(predicted - measured) <= BOUND * variable, (sequences, length, variable)


@pytest.mark.parametrize("rank", [0, 4, 16])
@pytest.mark.parametrize(
    ("name", "lowest"),
    [("minilm", n) for n in range(7)]
    + [("minilm_mean", n) for n in (0, 3, 6)]
    + [("llama", n) for n in range(5)],
)
def test_every_lowest_layer_and_rank(subject, make_step, draw_states, name, lowest, rank):
    case = subject(name)
    width = (4, 16, 64)[(lowest + rank) % 3]
    states, present = draw_states(case.architecture.layers, lowest, rank)
    options = {"width": width, "rank": rank, "states": states, "present": present}
    step = make_step(name, **options)
    assert_close(case, step, shapes=((2, 8), (4, 32), (1, 48)), **options)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("lowest", [0, 3, 4])
@pytest.mark.parametrize(
    "name", ["llama_equal_heads", "llama_one_key_head", "llama_bias", "mistral", "qwen2"]
)
def test_other_shapes_of_the_family(subject, make_step, draw_states, name, lowest, rank):
    case = subject(name)
    states, present = draw_states(4, lowest, rank)
    options = {"width": 16, "rank": rank, "states": states, "present": present}
    step = make_step(name, **options)
    assert_close(case, step, shapes=((2, 8), (3, 40), (1, 40)), **options)


@pytest.mark.parametrize("name", ["minilm", "minilm_mean", "llama"])
@pytest.mark.parametrize("lowest", [0, 2, 4])
def test_long_and_padded_batches(subject, make_step, draw_states, name, lowest):
    case = subject(name)
    states, present = draw_states(case.architecture.layers, lowest, 0)
    options = {"width": 16, "rank": 4, "states": states, "present": present}
    step = make_step(name, **options)
    assert_close(case, step, shapes=((2, 128),), **options)
    assert_close(case, step, shapes=((2, 8), (3, 64)), padding=2, **options)


@pytest.mark.parametrize(
    ("width", "rank", "common", "rule", "number", "factors"),
    [
        (16, 4, 8, "personal", 0, "AB"),
        (16, 0, 8, "personal", 0, "AB"),
        (0, 4, 8, "personal", 0, "AB"),
        (0, 4, 0, "personal", 0, "AB"),
        (0, 0, 0, "personal", 0, "AB"),
        (16, 8, 0, "ffa", 0, "B"),
        (0, 8, 0, "rolora", 0, "B"),
        (16, 8, 0, "rolora", 1, "A"),
        (0, 8, 4, "rolora", 1, "A"),
        (0, 8, 4, "ffa", 1, "B"),
    ],
)
@pytest.mark.parametrize(
    ("name", "lowest"),
    [(name, n) for name in ("minilm", "llama", "llama_equal_heads") for n in (0, 2)],
)
def test_common_lora_no_adapter_and_fixed_factors(
    subject, make_step, draw_states, name, lowest, width, rank, common, rule, number, factors
):
    case = subject(name)
    states, present = draw_states(case.architecture.layers, lowest, rank)
    options = {"width": width, "rank": rank, "states": states, "present": present}
    personal = "B" if rule == "ffa" else "AB"
    step = make_step(name, common=common, factors=factors, personal=personal, **options)
    own = {"common_rank": common, "lora_rule": rule, "round": number}
    assert_close(case, step, shapes=((2, 8), (4, 32), (1, 48)), **options, **own)


TINY = Architecture(
    family="llama",
    layers=2,
    hidden=8,
    heads=4,
    key_value_heads=2,
    head_dim=2,
    intermediate=12,
    vocabulary=10,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequences": 0}, "sequences must be at least 1, got 0"),
        ({"length": -1}, "length must be at least 1, got -1"),
        ({"rank": -1}, "rank must not be negative, got -1"),
        ({"scored": 5}, r"scored must be from 0 to the number of tokens \(4\), got 5"),
        (
            {"backwards": 2},
            "backwards must be 1 or, with a language head, 2; got 2 for a classifier",
        ),
        ({"present": [True, False]}, r"present\[1\] must be true because states\[1\] is PERSONAL"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    options = {
        "rank": 1,
        "states": [LayerState.PERSONAL] * 2,
        "present": [True] * 2,
        "sequences": 1,
        "length": 4,
    }
    with pytest.raises(DecisionError, match=message):
        training_memory_byte(TINY, Blocks(adapter_width=2), **(options | change))
