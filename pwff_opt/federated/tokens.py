"""Token sequences of different lengths, kept end to end, and the base model's output for them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pwff_opt.federated.backbone import Backbone
from pwff_opt.federated.workers import Workers

logger = logging.getLogger(__name__)

EVALUATION_TOKENS = 4096  # a batch without gradients: large enough to fill the arithmetic units


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokens:
    """Sequences of token ids end to end: sequence i is ``ids[offsets[i]:offsets[i + 1]]``."""

    ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    pad_id: int

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1


def tokenise(texts: Sequence[str], tokenizer: Any, *, max_tokens: int, pad_id: int) -> Tokens:
    """Encode texts, cut to ``max_tokens`` each."""
    encoded = tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in encoded])]).astype(np.int64)
    return Tokens(
        ids=np.concatenate([np.asarray(ids, dtype=np.int64) for ids in encoded]),
        offsets=offsets,
        pad_id=pad_id,
    )


def by_length(tokens: Tokens, indices: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
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


class Inputs:
    """What the model is fed: padded ids and mask, and cached outputs of the base model's layers.

    The outputs of all layers for all sequences are computed in one pass, if they fit
    ``budget_byte``; where they do not (``cached`` is False), every layer runs every time.
    """

    def __init__(self, tokens: Tokens, workers: Workers, *, budget_byte: float) -> None:
        self.tokens = tokens
        self._hidden: list[torch.Tensor] = []
        backbone = workers.first
        need = float(tokens.offsets[-1]) * backbone.hidden * 4 * backbone.layer_count
        self.cached = need <= budget_byte
        if self.cached:
            self._fill(workers)
        else:
            logger.warning(
                "base-model outputs need %.1f GB, more than the %.1f GB allowed: not cached",
                need / 1e9,
                budget_byte / 1e9,
            )

    def batch(
        self, indices: NDArray[np.int64], first_layer: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return ids, mask [sequence, token] and the hidden states below ``first_layer``."""
        lengths = self.tokens.lengths[indices]
        width = int(lengths.max())
        inside = np.arange(width) < lengths[:, None]
        flat = np.where(inside, self.tokens.offsets[indices, None] + np.arange(width), 0)
        ids = torch.from_numpy(np.where(inside, self.tokens.ids[flat], self.tokens.pad_id))
        mask = torch.from_numpy(inside.astype(np.int64))
        if first_layer == 0:
            return ids, mask, None
        # Padded positions hold the first token's state: masked keys, never read as queries.
        return ids, mask, self._hidden[first_layer - 1][torch.from_numpy(flat)]

    def _fill(self, workers: Workers) -> None:
        total, backbone = int(self.tokens.offsets[-1]), workers.first
        self._hidden = [torch.empty(total, backbone.hidden) for _ in range(backbone.layer_count)]

        def fill(worker: Backbone, indices: NDArray[np.int64]) -> None:
            ids, mask, _ = self.batch(indices, 0)
            starts, stops = self.tokens.offsets[indices], self.tokens.offsets[indices + 1]
            rows = np.concatenate([np.arange(*ends) for ends in zip(starts, stops, strict=True)])
            outputs = worker.base_outputs(ids, mask)
            for store, output in zip(self._hidden, outputs, strict=True):
                store[torch.from_numpy(rows)] = output[mask.bool()]

        workers.map(fill, list(by_length(self.tokens, np.arange(len(self.tokens)))))
