"""Variation of integer genomes that mix ordered and unordered genes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


def crossed(pairs: IntArray, rng: np.random.Generator) -> IntArray:
    """Return two children of every pair [2, pair, gene], which take each gene from one or the other."""
    swap = rng.random(pairs.shape[1:]) < 0.5
    return np.stack([np.where(swap, pairs[1], pairs[0]), np.where(swap, pairs[0], pairs[1])])


def mutated(
    genomes: IntArray,
    cardinalities: IntArray,
    ordinal: NDArray[np.bool_],
    rng: np.random.Generator,
) -> IntArray:
    """Change each gene [genome, gene] with chance 1/n: an ordered one by a step, another to any value."""
    change = (rng.random(genomes.shape) < 1.0 / genomes.shape[1]) & (cardinalities > 1)
    step = np.where(rng.random(genomes.shape) < 0.5, -1, 1)
    # At an end of the scale the only step there is leads inwards.
    step = np.where(genomes == 0, 1, np.where(cardinalities - 1 == genomes, -1, step))
    other = genomes + 1 + rng.integers(0, np.maximum(cardinalities - 1, 1), genomes.shape)
    return np.asarray(
        np.where(change, np.where(ordinal, genomes + step, other % cardinalities), genomes)
    )
