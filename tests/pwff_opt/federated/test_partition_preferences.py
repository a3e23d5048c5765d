"""Preference pairs dealt by whole groups: nothing of one part is in another."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from pwff_opt.data.conversations import Preferences
from pwff_opt.data.partition import PreferenceShards, partition_preferences
from pwff_opt.errors import DataError
from pwff_opt.scenario import Data

DATA = Data(train_per_device=16, validation_per_device=4, test_per_device=8)


def _pairs(count: int, *, groups: int, axes: int = 2, seed: int = 0) -> Preferences:
    """Pairs that stand alone, each with a prompt of its own, of one axis or of either at random."""
    rng = np.random.default_rng(seed)
    return Preferences(
        prompts=tuple(f"prompt {n}" for n in range(count)),
        chosen=tuple(f"good {n}" for n in range(count)),
        rejected=tuple(f"bad {n}" for n in range(count)),
        axes=rng.integers(axes, size=count),
        groups=rng.integers(groups, size=count),
        group_names=tuple(map(str, range(groups))),
    )


def _deal(
    preferences: Preferences, data: Data = DATA, *, devices: int = 4, seed: int = 1
) -> PreferenceShards:
    return partition_preferences(preferences, data, reward_share=0.5, devices=devices, seed=seed)


def _parts(dealt: PreferenceShards) -> dict[str, np.ndarray]:
    """Return the pairs of the five parts."""
    examples = {
        name: np.concatenate([getattr(shard, name) for shard in dealt.shards])
        for name in ("train", "validation", "test")
    }
    parts = {name: dealt.pairs[own].ravel() for name, own in examples.items()}
    return parts | {"reward": dealt.reward_train, "held out": dealt.reward_held_out}


def _check(preferences: Preferences, dealt: PreferenceShards, data: Data, devices: int) -> None:
    for one, other in combinations(_parts(dealt).values(), 2):
        for held in (preferences.groups, np.asarray(preferences.prompts, dtype=object)):
            assert not set(held[one]) & set(held[other])
    assert (preferences.axes[dealt.pairs] == [0, 1]).all()
    sizes = (data.train_per_device, data.validation_per_device, data.test_per_device)
    assert len(dealt.shards) == devices
    for shard in dealt.shards:
        assert tuple(map(len, (shard.train, shard.validation, shard.test))) == sizes
    dealt_out = np.concatenate(
        [np.concatenate([s.train, s.validation, s.test]) for s in dealt.shards]
    )
    assert np.array_equal(np.sort(dealt_out), np.arange(len(dealt.pairs)))  # each to one device
    assert len(np.unique(dealt.pairs)) == dealt.pairs.size  # no pair in two examples


@pytest.mark.parametrize("seed", range(5))
def test_no_target_is_in_two_parts(stereoset: Preferences, seed: int) -> None:
    data = replace(DATA, train_per_device=120, validation_per_device=30, test_per_device=60)
    dealt = _deal(stereoset, data, seed=seed)
    _check(stereoset, dealt, data, devices=4)
    triples = stereoset.triples
    assert triples is not None
    assert (triples[dealt.pairs[:, 0]] == triples[dealt.pairs[:, 1]]).all()
    related = np.mean([stereoset.chosen[a] == stereoset.chosen[b] for a, b in dealt.pairs])
    assert 0.4 < related < 0.6  # helpfulness prefers stereotype or anti-stereotype, by lot
    reward = len(dealt.reward_train) + len(dealt.reward_held_out)
    assert reward / len(stereoset) == pytest.approx(0.5, abs=0.03)
    assert len(dealt.reward_held_out) / reward == pytest.approx(0.25, abs=0.05)
    # For the reward models, all three pairs of a triple.
    assert (np.bincount(triples[dealt.reward_train], minlength=2123) % 3 == 0).all()


@pytest.mark.parametrize("groups", [40, 1000])
def test_pairs_that_stand_alone_meet_by_lot(groups: int) -> None:
    preferences = _pairs(1000, groups=groups)
    dealt = _deal(preferences)
    _check(preferences, dealt, DATA, devices=4)
    other = _deal(preferences, seed=2)
    _check(preferences, other, DATA, devices=4)
    assert set(dealt.reward_train) != set(other.reward_train)


def test_groups_with_a_common_prompt_stay_together() -> None:
    preferences = _pairs(1000, groups=100)
    prompts = list(preferences.prompts)
    for group in range(0, 100, 2):  # a prompt of every even group comes in the next group, too
        mine, next_one = (np.flatnonzero(preferences.groups == g)[0] for g in (group, group + 1))
        prompts[next_one] = prompts[mine]
    preferences = replace(preferences, prompts=tuple(prompts))
    for seed in range(5):
        _check(preferences, _deal(preferences, seed=seed), DATA, devices=4)


def test_each_axis_is_shared_out_where_groups_have_but_one() -> None:
    preferences = _pairs(2000, groups=400)
    preferences = replace(preferences, axes=(preferences.groups % 4 == 0).astype(np.int64))
    parts = _parts(_deal(preferences))
    for name in ("reward", "held out"):
        assert preferences.axes[parts[name]].mean() == pytest.approx(0.25, abs=0.03)


def test_a_seed_says_it_all(stereoset: Preferences) -> None:
    one, again = _deal(stereoset), _deal(stereoset)
    assert np.array_equal(one.pairs, again.pairs)
    assert np.array_equal(one.reward_train, again.reward_train)
    more = _deal(stereoset, devices=6)
    for few, many in zip(one.shards, more.shards, strict=False):
        for part in ("train", "validation", "test"):
            assert np.array_equal(one.pairs[getattr(few, part)], more.pairs[getattr(many, part)])
    other_sizes = _deal(stereoset, replace(DATA, test_per_device=20))
    assert np.array_equal(one.reward_train, other_sizes.reward_train)


def test_too_few_are_said() -> None:
    preferences = _pairs(100, groups=50)
    with pytest.raises(
        DataError, match=r"at least 4 devices x 16 examples \(data.train_per_device\)"
    ):
        _deal(preferences)
    with pytest.raises(DataError, match=r"pairs of helpfulness and of safety .* got .*1 groups"):
        _deal(_pairs(100, groups=1))
