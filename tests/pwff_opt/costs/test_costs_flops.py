"""FLOPs equal torch's own counter, exactly; and are linear, so expectations may be put in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pwff_opt.costs import Architecture, Blocks, TokenCount, forward_flops, step_flops
from pwff_opt.errors import DecisionError
from pwff_opt.scenario.schedule import LayerState

SHAPES = ((2, 8), (1, 5))
WIDTHS = (1, 6, 16)
RANKS = (0, 1, 4, 8)

TINY = Architecture(
    family="llama",
    layers=3,
    hidden=8,
    heads=4,
    key_value_heads=2,
    head_dim=2,
    intermediate=12,
    vocabulary=10,
)


def assert_exact(case, step, *, width, rank, states, present, **options):
    blocks = Blocks(adapter_width=width, **options)
    for sequences, length in SHAPES:
        count = TokenCount.batch(sequences=sequences, length=length)
        shared = {"rank": rank, "present": present, "count": count}
        forward = forward_flops(case.architecture, blocks, **shared)
        whole = step_flops(case.architecture, blocks, states=states, **shared)
        assert isinstance(forward, int)
        assert isinstance(whole, int)
        assert forward == step.forward_flops(sequences, length)
        assert whole == step.step_flops(sequences, length)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(
    ("name", "lowest"),
    [("minilm", n) for n in range(7)]
    + [("minilm_mean", n) for n in (0, 3, 6)]
    + [("llama", n) for n in range(5)],
)
def test_every_lowest_layer_and_rank_is_exact(subject, make_step, draw_states, name, lowest, rank):
    case = subject(name)
    width = WIDTHS[(lowest + rank) % 3]
    states, present = draw_states(case.architecture.layers, lowest, rank)
    step = make_step(name, width=width, rank=rank, states=states, present=present)
    assert_exact(case, step, width=width, rank=rank, states=states, present=present)


@pytest.mark.parametrize("seed", range(16))
def test_random_states_are_exact(subject, make_step, seed):
    case = subject("llama")
    chance = np.random.default_rng(seed)
    width, rank = int(chance.choice(WIDTHS)), int(chance.choice(RANKS))
    states = [LayerState(int(n)) for n in chance.integers(0, 3, 4)]
    present = [s != LayerState.FROZEN or bool(chance.integers(2)) for s in states]
    step = make_step("llama", width=width, rank=rank, states=states, present=present)
    assert_exact(case, step, width=width, rank=rank, states=states, present=present)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("lowest", [0, 2])
@pytest.mark.parametrize(
    "name", ["llama_equal_heads", "llama_one_key_head", "llama_bias", "mistral", "qwen2"]
)
def test_other_shapes_of_the_family_are_exact(subject, make_step, draw_states, name, lowest, rank):
    case = subject(name)
    states, present = draw_states(4, lowest, rank)
    step = make_step(name, width=6, rank=rank, states=states, present=present)
    assert_exact(case, step, width=6, rank=rank, states=states, present=present)


# A rule, a round and the factors that learn in it.
RULES = [
    ("ffa", 0, "B"),
    ("ffa", 1, "B"),
    ("rolora", 2, "B"),
    ("rolora", 3, "A"),
    ("fedsa", 1, "AB"),
]


@pytest.mark.parametrize(("rule", "number", "factors"), RULES)
@pytest.mark.parametrize(("width", "rank", "common"), [(6, 4, 0), (0, 4, 0), (6, 4, 3), (0, 4, 3)])
@pytest.mark.parametrize(
    ("name", "lowest"), [("minilm", 1), ("minilm", 2), ("llama", 0), ("llama", 1), ("llama", 2)]
)
def test_fixed_factors_are_exact(
    subject, make_step, draw_states, name, lowest, width, rank, common, rule, number, factors
):
    case = subject(name)
    states, present = draw_states(case.architecture.layers, lowest, number)
    options = {"width": width, "rank": rank, "states": states, "present": present}
    personal = "B" if rule == "ffa" else "AB"
    step = make_step(name, common=common, factors=factors, personal=personal, **options)
    own = {"common_rank": common, "lora_rule": rule, "round": number}
    blocks = Blocks(adapter_width=width, **own)
    assert [blocks.lora_trained(state) for state in LayerState] == ["", personal, factors]
    assert_exact(case, step, **options, **own)


@pytest.mark.parametrize(
    ("width", "rank", "common"), [(6, 0, 3), (6, 4, 3), (0, 0, 3), (0, 4, 3), (0, 4, 0), (0, 0, 0)]
)
@pytest.mark.parametrize(
    ("name", "lowest"),
    [("minilm", n) for n in (0, 3, 6)]
    + [("minilm_mean", 2)]
    + [("llama", n) for n in range(5)]
    + [("llama_one_key_head", 1), ("llama_bias", 1)],
)
def test_common_lora_and_no_adapter_are_exact(
    subject, make_step, draw_states, name, lowest, width, rank, common
):
    case = subject(name)
    states, present = draw_states(case.architecture.layers, lowest, 7)
    options = {"width": width, "rank": rank, "states": states, "present": present}
    step = make_step(name, common=common, **options)
    assert_exact(case, step, common_rank=common, **options)


layer_states = st.lists(st.sampled_from(list(LayerState)), min_size=3, max_size=3)


@given(
    states=layer_states,
    ranks=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    width=st.sampled_from([0, 2]),
    common=st.sampled_from([0, 3]),
    rule=st.sampled_from(["personal", "ffa"]),
)
def test_arrays_over_devices_equal_one_at_a_time(states, ranks, lengths, width, common, rule):
    size = min(len(ranks), len(lengths))
    rank, length = np.array(ranks[:size]), np.array(lengths[:size])
    options = {"states": states, "present": [True] * 3}
    blocks = Blocks(adapter_width=width, common_rank=common, lora_rule=rule)
    count = TokenCount(sequences=2, tokens=2 * length, squared_tokens=2 * length**2)
    together = step_flops(TINY, blocks, rank=rank, count=count, **options)
    assert together.shape == (size,)
    for k in range(size):
        single = TokenCount.batch(sequences=2, length=int(length[k]))
        assert together[k] == step_flops(TINY, blocks, rank=int(rank[k]), count=single, **options)


@given(
    states=layer_states, rank=st.integers(0, 4), lengths=st.lists(st.integers(1, 50), min_size=1)
)
def test_batches_of_unequal_lengths_add_up(states, rank, lengths):
    options = {"rank": rank, "states": states, "present": [True] * 3}
    blocks = Blocks(adapter_width=2)
    mean = TokenCount(
        sequences=1,
        tokens=sum(lengths) / len(lengths),
        squared_tokens=sum(n * n for n in lengths) / len(lengths),
    )
    batches = [TokenCount.batch(sequences=1, length=n) for n in lengths]
    total = sum(step_flops(TINY, blocks, count=batch, **options) for batch in batches)
    expected = step_flops(TINY, blocks, count=mean, **options)
    assert expected * len(lengths) == pytest.approx(total, rel=1e-12)


@given(states=layer_states, rank=st.integers(0, 4))
def test_freezing_the_lowest_layer_never_costs_more(states, rank):
    options = {
        "rank": rank,
        "present": [True] * 3,
        "count": TokenCount.batch(sequences=2, length=7),
    }
    blocks = Blocks(adapter_width=2)
    before = step_flops(TINY, blocks, states=states, **options)
    for layer, state in enumerate(states):
        if state != LayerState.FROZEN:
            states = [*states[:layer], LayerState.FROZEN, *states[layer + 1 :]]
            after = step_flops(TINY, blocks, states=states, **options)
            assert after < before
            before = after


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"states": [LayerState.PERSONAL] * 2},
            r"states must have one entry per layer \(3\), got 2",
        ),
        ({"present": [True]}, r"present must have one entry per layer \(3\), got 1"),
        ({"present": np.array([True, False, True])}, r"present\[1\] must be true .*PERSONAL"),
        ({"rank": -1}, "rank must not be negative, got -1"),
        ({"rank": np.array([1, -2])}, "rank must not be negative"),
    ],
)
def test_bad_decisions_are_refused(change, message):
    options = {
        "rank": 1,
        "states": [LayerState.PERSONAL] * 3,
        "present": [True] * 3,
        "count": TokenCount.batch(sequences=1, length=4),
    }
    with pytest.raises(DecisionError, match=message):
        step_flops(TINY, Blocks(adapter_width=2), **(options | change))
