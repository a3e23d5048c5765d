"""Token sequences of different lengths, end to end: in the corpus, and in a batch of several devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Indices = NDArray[np.int64]

EVALUATION_TOKENS = 2048  # a batch without gradients: enough to fill the arithmetic units


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokens:
    """Sequences of token ids end to end: sequence i is ``ids[offsets[i]:offsets[i + 1]]``."""

    ids: Indices
    offsets: Indices
    pad_id: int

    @property
    def lengths(self) -> Indices:
        return np.diff(self.offsets)

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
    padding; only attention, a few percent of the arithmetic at these lengths, is padded to ``width``.
    """

    ids: torch.Tensor
    """[token]"""
    positions: torch.Tensor
    """[token]: of a token in its sequence."""
    lengths: torch.Tensor
    """[sequence]"""
    width: int
    """Length of the longest sequence."""
    places: torch.Tensor | None
    """[token]: row of a token among [sequence x width] padded ones; None if all are equally long."""
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
        places = inside = None
        if (lengths != width).any():
            sequence = np.repeat(np.arange(len(indices)), lengths)
            places = torch.from_numpy(sequence * width + positions).to(device)
            inside = torch.from_numpy(np.arange(width) < lengths[:, None]).to(device)
        return cls(
            ids=torch.from_numpy(tokens.ids[rows]).to(device),
            positions=torch.from_numpy(positions).to(device),
            lengths=torch.from_numpy(lengths).to(device),
            width=width,
            places=places,
            inside=inside,
            token_counts=tuple(int(tokens.lengths[batch].sum()) for batch in batches),
            sequence_counts=tuple(len(batch) for batch in batches),
        )

    @property
    def sequences(self) -> int:
        return len(self.lengths)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """Return [sequence, width, ...] from [token, ...], zero where there is no token."""
        if self.places is not None:
            x = _Scatter.apply(x, self.places, self.sequences * self.width)  # type: ignore[no-untyped-call]
        return x.reshape(self.sequences, self.width, *x.shape[1:])

    def unpad(self, x: torch.Tensor) -> torch.Tensor:
        """Return [token, ...] from [sequence, width, ...]."""
        x = x.flatten(0, 1)
        if self.places is None:
            return x
        gathered: torch.Tensor = _Gather.apply(x, self.places)  # type: ignore[no-untyped-call]
        return gathered

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mean over the tokens of every sequence, [sequence, ...]."""
        return self.pad(x).sum(1) / self.lengths[:, None]

    def first(self, x: torch.Tensor) -> torch.Tensor:
        """Return every sequence's first token, [sequence, ...]."""
        return x[self.lengths.cumsum(0) - self.lengths]

    def last(self, x: torch.Tensor) -> torch.Tensor:
        """Return every sequence's last token, [sequence, ...]."""
        return x[self.lengths.cumsum(0) - 1]


class _Scatter(torch.autograd.Function):
    """Rows to their places among zeros.  No row is another's stand-in: a NaN stays where it is."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: torch.Tensor, rows: int) -> torch.Tensor:
        ctx.save_for_backward(places)
        return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, places, x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0].index_select(0, *ctx.saved_tensors), None, None


class _Gather(torch.autograd.Function):
    """The reverse; places are distinct, so its gradient needs no sums."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.rows = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grads[0]
        (places,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, places, grad), None
