"""Who holds what: the sentences of every device, cut into train, validation and test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pwff_opt.errors import DataError
from pwff_opt.federated.data import Corpus
from pwff_opt.rng import stream
from pwff_opt.scenario import Data


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shard:
    """Indices into the corpus that one device holds; the three parts are disjoint."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


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
    pools: list[list[NDArray[np.int64]]] = []
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


def _draw(
    mix: NDArray[np.float64], left: NDArray[np.int64], total: int, rng: np.random.Generator
) -> NDArray[np.int64]:
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
