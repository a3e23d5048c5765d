"""Token sequences of different lengths, end to end: in the corpus, and in a batch of several devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Indices = NDArray[np.int64]

EVALUATION_TOKENS = 1024  # a batch without gradients: 512 take 5 to 12 % longer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokens:
    """Sequences of token ids end to end: sequence i is ``ids[offsets[i]:offsets[i + 1]]``."""

    ids: Indices
    offsets: Indices
    pad_id: int
    lengths: Indices = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", np.diff(self.offsets))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def rows(self, indices: Indices) -> Indices:
        """Return where the tokens of some sequences are in ``ids``, end to end."""
        lengths = self.lengths[indices]
        starts = np.repeat(self.offsets[indices] - np.cumsum(lengths) + lengths, lengths)
        return starts + np.arange(lengths.sum())


def tokenise(texts: Sequence[str], tokenizer: Any, *, max_tokens: int, pad_id: int) -> Tokens:
    """Encode texts, cut to ``max_tokens`` each."""
    encoded = tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in encoded])]).astype(np.int64)
    return Tokens(
        ids=np.concatenate([np.asarray(ids, dtype=np.int64) for ids in encoded]),
        offsets=offsets,
        pad_id=pad_id,
    )


def by_length(tokens: Tokens, indices: Indices) -> Iterator[Indices]:
    """Yield the indices in batches of like length, each of at most EVALUATION_TOKENS when padded."""
    order = indices[np.argsort(tokens.lengths[indices], kind="stable")]
    start = 0
    while start < len(order):
        stop = start + 1
        while (
            stop < len(order)
            and (stop + 1 - start) * tokens.lengths[order[stop]] <= EVALUATION_TOKENS
        ):
            stop += 1
        yield order[start:stop]
        start = stop


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Packed:
    """A batch: the sequences of one or more devices end to end, without padding.

    Products with weights, norms and activations work on tokens, [token, ...], and waste nothing on
    padding; only attention, where it is not compiled, is padded to ``width``.
    """

    ids: torch.Tensor
    """[token]"""
    positions: torch.Tensor
    """[token]: of a token in its sequence."""
    lengths: torch.Tensor
    """[sequence]"""
    width: int
    """Length of the longest sequence."""
    sequence_of: torch.Tensor
    """[token]: of a token in the batch."""
    places: torch.Tensor
    """[token]: where a token is among [sequence x width] padded places."""
    slots: torch.Tensor
    """[sequence x width]: the token in a padded place; the sequence's first where there is none."""
    inside: torch.Tensor | None
    """[sequence, width]: whether there is a token; None if all are equally long."""
    token_counts: tuple[int, ...]
    """Tokens of every device, in order."""
    sequence_counts: tuple[int, ...]

    @classmethod
    def of(
        cls, tokens: Tokens, batches: Sequence[Indices], *, device: torch.device | str = "cpu"
    ) -> Packed:
        """Pack one batch of sequences (indices into ``tokens``) for each device."""
        indices = np.concatenate(batches)
        lengths = tokens.lengths[indices]
        width = int(lengths.max())
        rows = tokens.rows(indices)
        positions = rows - np.repeat(tokens.offsets[indices], lengths)
        sequence = np.repeat(np.arange(len(indices)), lengths)
        there = np.arange(width) < lengths[:, None]
        slots = (np.cumsum(lengths) - lengths)[:, None] + np.where(there, np.arange(width), 0)
        return cls(
            ids=torch.from_numpy(tokens.ids[rows]).to(device),
            positions=torch.from_numpy(positions).to(device),
            lengths=torch.from_numpy(lengths).to(device),
            width=width,
            sequence_of=torch.from_numpy(sequence).to(device),
            places=torch.from_numpy(sequence * width + positions).to(device),
            slots=torch.from_numpy(slots.ravel()).to(device),
            inside=None if there.all() else torch.from_numpy(there).to(device),
            token_counts=tuple(int(tokens.lengths[batch].sum()) for batch in batches),
            sequence_counts=tuple(len(batch) for batch in batches),
        )

    @property
    def sequences(self) -> int:
        return len(self.lengths)

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mean over the tokens of every sequence, [sequence, ...]."""
        sums = x.new_zeros(self.sequences, *x.shape[1:]).index_add(0, self.sequence_of, x)
        return sums / self.lengths[:, None]

    def first(self, x: torch.Tensor) -> torch.Tensor:
        """Return every sequence's first token, [sequence, ...]."""
        return x[self.lengths.cumsum(0) - self.lengths]

    def last(self, x: torch.Tensor) -> torch.Tensor:
        """Return every sequence's last token, [sequence, ...]."""
        return x[self.lengths.cumsum(0) - 1]
