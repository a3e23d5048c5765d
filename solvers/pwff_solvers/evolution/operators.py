"""Variation of integer genomes that mix ordered and unordered genes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymoo.core.crossover import Crossover
from pymoo.core.mutation import Mutation

IntArray = NDArray[np.int64]


class UniformCrossover(Crossover):  # type: ignore[misc]
    """Two children that take every gene from one parent or the other with equal chance."""

    def __init__(self) -> None:
        super().__init__(n_parents=2, n_offsprings=2, prob=0.9)

    def _do(
        self,
        problem: Any,
        X: IntArray,
        *args: Any,
        random_state: np.random.Generator,
        **kwargs: Any,
    ) -> IntArray:
        swap = random_state.random(X.shape[1:]) < 0.5
        return np.stack([np.where(swap, X[1], X[0]), np.where(swap, X[0], X[1])])


class StepMutation(Mutation):  # type: ignore[misc]
    """Change each gene with chance 1/n: an ordered one by a step, another to any other value."""

    def __init__(self, cardinalities: IntArray, ordinal: NDArray[np.bool_]) -> None:
        super().__init__()
        self._cardinalities, self._ordinal = cardinalities, ordinal

    def _do(
        self,
        problem: Any,
        X: IntArray,
        *args: Any,
        random_state: np.random.Generator,
        **kwargs: Any,
    ) -> IntArray:
        limits = self._cardinalities
        change = (random_state.random(X.shape) < 1.0 / X.shape[1]) & (limits > 1)
        step = np.where(random_state.random(X.shape) < 0.5, -1, 1)
        # At an end of the scale the only step there is leads inwards.
        step = np.where(X == 0, 1, np.where(limits - 1 == X, -1, step))
        other = (X + 1 + random_state.integers(0, np.maximum(limits - 1, 1), X.shape)) % limits
        return np.asarray(np.where(change, np.where(self._ordinal, X + step, other), X))
