"""Who holds what: the examples of every device, cut into train, validation and test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pwff_opt.data.conversations import AXES, Preferences
from pwff_opt.data.corpora import Corpus
from pwff_opt.errors import DataError
from pwff_opt.rng import stream
from pwff_opt.scenario import Data

Indices = NDArray[np.int64]

# Of the reward models' groups: those they do not learn from, to measure and to calibrate them with.
HELD_OUT = 0.25


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shard:
    """Indices of the examples that one device holds; the three parts are disjoint."""

    train: Indices
    validation: Indices
    test: Indices


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreferenceShards:
    """Who holds which preference pairs. No prompt or group is in two of the five parts."""

    pairs: Indices
    """[example, axis]: the pair of either axis that an example is made of."""
    shards: tuple[Shard, ...]
    """[device]: of examples."""
    reward_train: Indices
    """Pairs that the reward models learn from."""
    reward_held_out: Indices
    """Pairs that neither they nor the devices learn from."""


def partition(corpus: Corpus, data: Data, *, devices: int, seed: int) -> list[Shard]:
    """Deal the corpus out, no sentence twice.

    Device k draws from domain k mod (number of domains). Its class mix is q_k ~ Dirichlet(a p), with
    p the class mix of that domain and a = ``data.label_dirichlet`` (Hsu, Qi and Brown 2019, arXiv
    1909.06335, section 3); it draws without replacement, and once a class is used up the rest of
    the mix is renormalised. Train, validation and test are dealt from the device's own draw at random,
    so all three follow the device's own distribution.

    Raises
    ------
    DataError
        If a domain holds too few sentences for its devices.
    """
    sizes = (data.train_per_device, data.validation_per_device, data.test_per_device)
    domain_count, classes = len(corpus.domain_names), len(corpus.class_names)
    pools: list[list[Indices]] = []
    for domain in range(domain_count):
        rng = stream(seed, "partition-pool", item=domain)
        here = corpus.domains == domain
        pools.append(
            [rng.permutation(np.flatnonzero(here & (corpus.labels == c))) for c in range(classes)]
        )
        holders = len(range(domain, devices, domain_count))
        if holders * sum(sizes) > here.sum():
            raise DataError(
                f"domain {corpus.domain_names[domain]!r} must hold at least {holders} devices x "
                f"{sum(sizes)} sentences (data.train/validation/test_per_device), got {here.sum()}"
            )
    taken = np.zeros((domain_count, classes), dtype=np.int64)
    shards = []
    for device in range(devices):
        domain = device % domain_count
        rng = stream(seed, "partition-device", device=device)
        here = corpus.domains == domain
        present = np.bincount(corpus.labels[here], minlength=classes)
        mix = np.zeros(classes)
        mix[present > 0] = rng.dirichlet(
            data.label_dirichlet * present[present > 0] / present.sum()
        )
        left = np.array([len(pool) for pool in pools[domain]]) - taken[domain]
        counts = _draw(mix, left, sum(sizes), rng)
        held = np.concatenate(
            [
                pool[start : start + count]
                for pool, start, count in zip(pools[domain], taken[domain], counts, strict=True)
            ]
        )
        taken[domain] += counts
        train, validation, test, _ = np.split(rng.permutation(held), np.cumsum(sizes))
        shards.append(Shard(train=train, validation=validation, test=test))
    return shards


def _draw(mix: NDArray[np.float64], left: Indices, total: int, rng: np.random.Generator) -> Indices:
    """Return how many of each class: multinomial in ``mix``, never more than are ``left``."""
    counts = np.zeros(len(mix), dtype=np.int64)
    while (missing := total - counts.sum()) > 0:
        free = counts < left
        # A mix may give all its weight to classes that are used up: then the others, by what is left.
        weights = np.where(free, mix, 0.0)
        if not weights.sum() > 1e-12:
            weights = np.where(free, left - counts, 0).astype(float)
        counts += rng.multinomial(missing, weights / weights.sum())
        counts = np.minimum(counts, left)
    return counts


def partition_preferences(
    preferences: Preferences, data: Data, *, reward_share: float, devices: int, seed: int
) -> PreferenceShards:
    """Deal preference pairs out: first whole groups to the parts, then a part's examples to devices.

    Groups that share a prompt count as one. ``reward_share`` of the pairs goes to the reward models;
    the devices' rest is divided into train, validation and test as ``data.train_per_device`` and the
    others are to one another. An example is a pair of either axis: of one triple where pairs are from
    triples, else of two pairs drawn at random. No pair is in two examples, no example on two devices.

    Every device holds the same examples however many devices come after it; the reward models' pairs
    depend on ``reward_share`` and ``seed`` alone.

    Raises
    ------
    DataError
        If a part gets too few examples, or a part of the reward models no pair of an axis.
    """
    sizes = (data.train_per_device, data.validation_per_device, data.test_per_device)
    together = _inseparable(preferences)
    counts = np.zeros((together.max() + 1, len(AXES)), dtype=np.int64)
    np.add.at(counts, (together, preferences.axes), 1)

    def deal(groups: Indices, shares: Sequence[float], level: int) -> list[Indices]:
        return _deal(groups, counts, shares, stream(seed, "partition-groups", item=level))

    rewards, rest = deal(np.arange(len(counts)), (reward_share, 1 - reward_share), 0)
    reward_parts = [
        np.flatnonzero(np.isin(together, groups))
        for groups in deal(rewards, (1 - HELD_OUT, HELD_OUT), 1)
    ]
    for name, part in zip(("learn from", "are tested on"), reward_parts, strict=True):
        if len(np.unique(preferences.axes[part])) < len(AXES):
            raise DataError(
                f"data must hold pairs of {' and of '.join(AXES)} among those the reward models {name}, "
                f"got {np.bincount(preferences.axes[part], minlength=len(AXES)).tolist()}: there are "
                f"{len(counts)} groups, of which whole ones are dealt to them (alignment.reward_share "
                f"{reward_share:g})"
            )
    pairs: list[Indices] = []
    held: list[list[Indices]] = []
    for number, (groups, size) in enumerate(zip(deal(rest, sizes, 2), sizes, strict=True)):
        own = np.flatnonzero(np.isin(together, groups))
        examples = _examples(preferences, own, stream(seed, "partition-examples", item=number))
        if len(examples) < devices * size:
            key = ("train_per_device", "validation_per_device", "test_per_device")[number]
            raise DataError(
                f"data must hold at least {devices} devices x {size} examples (data.{key}) in "
                f"the groups dealt to that part, got {len(examples)} in "
                f"{len(groups)} of {len(counts)} groups; alignment.reward_share {reward_share:g} of "
                "the pairs is the reward models'"
            )
        start = sum(map(len, pairs))
        held.append(np.split(start + np.arange(devices * size), devices))
        pairs.append(examples[: devices * size])
    return PreferenceShards(
        pairs=np.concatenate(pairs),
        shards=tuple(Shard(train=a, validation=b, test=c) for a, b, c in zip(*held, strict=True)),
        reward_train=reward_parts[0],
        reward_held_out=reward_parts[1],
    )


def _inseparable(preferences: Preferences) -> Indices:
    """Return a number for every pair, the same where pairs are linked by common groups or prompts."""
    groups = len(preferences.group_names)
    _, prompts = np.unique(np.asarray(preferences.prompts, dtype=object), return_inverse=True)
    nodes = groups + int(prompts.max()) + 1
    links = coo_array(
        (np.ones(len(prompts)), (preferences.groups, groups + prompts)), shape=(nodes, nodes)
    )
    _, component = connected_components(links, directed=False)
    return np.unique(component[preferences.groups], return_inverse=True)[1].astype(np.int64)


def _deal(
    groups: Indices, counts: Indices, shares: Sequence[float], rng: np.random.Generator
) -> list[Indices]:
    """Return the groups of every part, so that its pairs of each axis come to its share.

    ``counts`` [group, axis] are numbers of pairs. One by one, in random order, a group goes where the
    axes it has are scarcest, so no part is left without as long as there are as many groups.
    """
    held = np.zeros((len(shares), counts.shape[1]))
    parts: list[list[int]] = [[] for _ in shares]
    for group in rng.permutation(groups):
        part = int(((held / np.asarray(shares)[:, None]) @ counts[group]).argmin())
        parts[part].append(int(group))
        held[part] += counts[group]
    return [np.sort(np.array(part, dtype=np.int64)) for part in parts]


def _examples(preferences: Preferences, pairs: Indices, rng: np.random.Generator) -> Indices:
    """Return examples made of these pairs, [example, axis], in random order."""
    mixed = pd.DataFrame({"pair": rng.permutation(pairs)})
    mixed["axis"] = preferences.axes[mixed["pair"]]
    mixed["triple"] = 0 if preferences.triples is None else preferences.triples[mixed["pair"]]
    # The n-th pair of an axis goes with the n-th of the other: of the same triple, where there is one.
    mixed["rank"] = mixed.groupby(["triple", "axis"]).cumcount()
    made = mixed.pivot(index=["triple", "rank"], columns="axis", values="pair")
    made = made.reindex(columns=range(len(AXES))).dropna()
    return rng.permutation(made.to_numpy().astype(np.int64))
