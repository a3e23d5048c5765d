"""Decisions, schedules and their genome."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pwff_opt.errors import DecisionError
from pwff_opt.scenario import Decisions
from pwff_opt.scenario.schedule import Codec, LayerState, RoundDecision, Schedule


@st.composite
def codecs(draw: Any) -> Codec:
    rounds = draw(st.integers(1, 6))
    return Codec(
        space=Decisions(
            ranks=tuple(draw(st.permutations([0, 2, 4, 8]))[: draw(st.integers(1, 4))]),
            rank_scope=draw(st.sampled_from(["common", "per_device"])),
            layer_states=tuple(
                draw(st.permutations(["frozen", "personal", "aggregated"]))[
                    : draw(st.integers(1, 3))
                ]
            ),
            phases=draw(st.integers(1, rounds)),
            layer_groups=draw(st.integers(0, 7)),
        ),
        devices=draw(st.integers(1, 4)),
        layers=draw(st.integers(1, 6)),
        rounds=rounds,
    )


@given(codecs(), st.integers(0, 2**32 - 1))
def test_genomes_and_texts_give_the_schedule_back(codec: Codec, seed: int) -> None:
    genome = np.random.default_rng(seed).integers(0, codec.cardinalities)
    schedule = codec.decode(genome)
    assert len(schedule) == codec.rounds
    assert schedule == schedule.canonical()
    assert codec.decode(codec.encode(schedule)) == schedule
    assert Schedule.parse(str(schedule), devices=codec.devices) == schedule
    assert len(set(schedule.rounds)) <= codec.space.phases
    assert len(codec.ordinal) == len(codec.cardinalities) == len(genome)


@given(codecs(), st.integers(0, 2**32 - 1))
def test_layers_stay_present_once_trained(codec: Codec, seed: int) -> None:
    schedule = codec.decode(np.random.default_rng(seed).integers(0, codec.cardinalities))
    for number, present in enumerate(schedule.present):
        expected = [
            any(d.states[layer] != LayerState.FROZEN for d in schedule.rounds[: number + 1])
            for layer in range(codec.layers)
        ]
        assert list(present) == expected
    assert schedule.prefix(1).present == schedule.present[:1]


def test_rank_means_nothing_where_no_layer_has_blocks() -> None:
    codec = Codec(space=Decisions(ranks=(2, 4)), devices=2, layers=2, rounds=1)
    frozen = codec.decode(np.array([1, 2, 0, 0]))
    assert frozen == codec.decode(np.array([0, 0, 2, 1]))
    assert str(frozen) == "1x0:ff"
    assert codec.decode(codec.encode(frozen)) == frozen


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4x8:ffp 99999999999999999999x8:ffp", "at most 10000 rounds, got 9{20} of '8:ffp'"),
        ("5000x8:ffp 5001x8:ffa", "at most 10000 rounds, got 5001 of '8:ffa'"),
        ("2x8:ffp 4x8:ffpx", r"f frozen, p personal, a aggregated\), got '4x8:ffpx' in '2x8"),
        (" ", "at least one round, got ' '"),
        ("0x8:ffp", "at least one round, got '0x8:ffp'"),
    ],
)
def test_bad_texts_are_told_apart(text: str, message: str) -> None:
    with pytest.raises(DecisionError, match=message):
        Schedule.parse(text, devices=2)


@pytest.mark.parametrize(
    "text",
    [
        *[
            "",
            "4ffaa",
            "4:xx",
            "-1:ff",
            "1,2,3:ff",
            "2x",
            "ax4:ff",
            "x4:ff",
            "2x4:ff 3x4:fff",
            "4:",
        ],
        # More digits than Python reads.
        pytest.param(f"{'9' * 5000}x4:ff", id="count"),
        pytest.param(f"2x{'9' * 5000}:ff", id="rank"),
    ],
)
def test_bad_texts_are_refused(text: str) -> None:
    with pytest.raises(DecisionError):
        Schedule.parse(text, devices=2)


def test_layers_below_the_depth_are_frozen() -> None:
    codec = Codec(space=Decisions(), devices=1, layers=4, rounds=1)
    assert str(codec.decode(np.array([1, 2, 1, 2, 1, 2]))) == "1x2:ffpa"
    assert codec.encode(Schedule.parse("1x2:fafp", devices=1)).tolist() == [1, 3, 0, 2, 0, 1]
    always = Codec(
        space=Decisions(layer_states=("personal", "aggregated")), devices=1, layers=2, rounds=1
    )
    assert always.cardinalities.tolist() == [4, 1, 2, 2]
    assert str(always.decode(np.array([0, 0, 1, 0]))) == "1x0:ap"


def test_bad_values_are_refused() -> None:
    with pytest.raises(DecisionError, match=r"ranks\[1\] must be a whole number >= 0, got -1"):
        RoundDecision(ranks=(1, -1), states=(LayerState.FROZEN,))
    codec = Codec(space=Decisions(), devices=1, layers=2, rounds=2)
    with pytest.raises(DecisionError, match=r"genome\[0\] must be in 0..3, got 4"):
        codec.decode(np.array([4, 0, 0, 0]))
    with pytest.raises(DecisionError, match="4 genes"):
        codec.decode(np.array([0, 0]))
    with pytest.raises(DecisionError, match="outside the decision space"):
        codec.encode(Schedule.parse("2x3:aa", devices=1))
    with pytest.raises(DecisionError, match="phase"):
        codec.encode(Schedule.parse("1x4:aa 1x4:pp", devices=1))


def test_layers_of_a_group_are_decided_together() -> None:
    codec = Codec(space=Decisions(ranks=(0, 2), layer_groups=3), devices=1, layers=7, rounds=2)
    assert codec.group_sizes == (3, 2, 2)
    assert codec.boundaries == (0, 3, 5, 7)
    assert codec.cardinalities.tolist() == [2, 4, 3, 3, 3]
    assert str(codec.decode(np.array([1, 2, 0, 1, 2]))) == "2x2:fffppaa"
    for text in ("2x2:fffppaa", "2x0:fffffff", "2x2:aaappff"):
        schedule = Schedule.parse(text, devices=1)
        assert codec.decode(codec.encode(schedule)) == schedule
    with pytest.raises(DecisionError, match=r"does not fit .* 3 group\(s\) of 7 layers"):
        codec.encode(Schedule.parse("2x2:fffffpa", devices=1))
    # More groups than layers: each layer its own.
    alone = Codec(space=Decisions(layer_groups=9), devices=1, layers=4, rounds=1)
    assert alone.group_sizes == (1, 1, 1, 1)
