"""What every stage is to the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pwff_opt.federated.model.passes import Passes
from pwff_opt.federated.text.tokens import Indices, Tokens


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Loss:
    """The losses of a mini-batch in one objective."""

    objective: int
    each: torch.Tensor
    """[example], device after device."""
    graph_goes_on: bool = False
    """Whether the next objective's loss hangs on the same pass through the model."""


class Lesson(Protocol):
    """What a step learns from."""

    updates: int
    """Steps on it."""

    def losses(self, batches: Sequence[Indices], passes: Passes) -> Iterator[Loss]:
        """Yield the losses of examples, a batch for each device, objective by objective."""


class Stage(Protocol):
    """What is learned from which examples, and how well.

    An example is what training draws and mini-batches count; it consists of one or more sequences.
    """

    objectives: tuple[str, ...]
    """Names; there is a gradient for each, and they are reconciled on the device."""

    @property
    def tokens(self) -> Tokens:
        """All sequences."""

    def sequences(self, examples: Indices) -> Indices:
        """Return the sequences that some examples consist of, example after example."""

    def wishes(self, devices: Sequence[int]) -> NDArray[np.float64]:
        """Return the weights of the objectives to each device's user, [device, objective], 1 in sum."""

    def lesson(
        self, batches: Sequence[Indices], passes: Passes, *, seed: int, round: int, step: int
    ) -> tuple[Lesson, Sequence[Indices]]:
        """Return what a step learns from, a batch for each device: examples, or answers sampled now.

        What is drawn is keyed by ``seed``, ``round`` and ``step``.
        """

    def measures(self, examples: Indices, passes: Passes) -> dict[str, float]:
        """Return how well one device's model does on examples.

        "accuracy", between 0 and 1, is what a search wants more of.
        """


class Plain(ABC):
    """What most stages have in common: one objective, examples that are sequences, and no sampling."""

    objectives: tuple[str, ...] = ("loss",)
    updates = 1

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    @property
    def tokens(self) -> Tokens:
        return self._tokens

    def sequences(self, examples: Indices) -> Indices:
        return examples

    def wishes(self, devices: Sequence[int]) -> NDArray[np.float64]:
        return np.ones((len(devices), 1))

    def lesson(
        self, batches: Sequence[Indices], passes: Passes, *, seed: int, round: int, step: int
    ) -> tuple[Lesson, Sequence[Indices]]:
        return self, batches

    @abstractmethod
    def losses(self, batches: Sequence[Indices], passes: Passes) -> Iterator[Loss]:
        """See :class:`Lesson`."""
