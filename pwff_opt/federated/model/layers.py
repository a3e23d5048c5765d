"""What transformer layers of every family share, as arithmetic on packed tokens.

A row is a token's; rows of zeros below fill up (see :mod:`pwff_opt.federated.model.products`).

A layer falls into two parts, so that what never changes can be kept: ``project`` computes queries,
keys and values [row, query + key + value] from the layer's input, ``run`` all the rest.  LoRA comes in
between.  Weights are frozen, in float32 or bfloat16; products run in that type, everything else in
float32, projections with something added to their weights too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from pwff_opt.errors import ModelError
from pwff_opt.federated.model.attention import Around, Window
from pwff_opt.federated.model.encoder import Encoder
from pwff_opt.federated.model.low_rank import Updates, add_low_rank
from pwff_opt.federated.model.products import Frozen, filled
from pwff_opt.federated.text.tokens import Packed


class Layer(Protocol):
    """One frozen transformer layer."""

    widths: Mapping[str, int]
    """How many columns queries, keys and values have, by the family's names, in order."""

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the projections read, [row, hidden], from the layer's input."""

    def project(self, entered: torch.Tensor) -> torch.Tensor:
        """Return queries, keys and values side by side, [row, query + key + value]."""

    def change(self, deltas: Mapping[str, torch.Tensor]) -> Frozen:
        """Return the projections with something added to the weights of some, in float32."""

    def run(
        self,
        x: torch.Tensor,
        around: Around,
        updates: Updates,
        *,
        project: Frozen | None = None,
        projected: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the layer's output, [row, hidden], from its input, whose rows are filled.

        Parameters
        ----------
        updates : what devices add to projections.
        project : projections other than the layer's own.
        projected : what :meth:`project` returns, where it is known, in any type; [token, ...].
        """


class BaseLayer:
    """A layer of torch's operations, in its two parts."""

    widths: Mapping[str, int]
    _compiled: Encoder | None = None
    """All of it in one piece, where that can be had."""

    def __init__(self, parts: Mapping[str, torch.nn.Linear], dtype: torch.dtype) -> None:
        self._project = fused(parts, dtype)
        self.widths = {name: part.out_features for name, part in parts.items()}

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def project(self, entered: torch.Tensor) -> torch.Tensor:
        return self._project(entered).float()

    def change(self, deltas: Mapping[str, torch.Tensor]) -> Frozen:
        weight = self._project.weight.to(torch.float32, copy=True)
        parts = dict(zip(self.widths, weight.split([*self.widths.values()]), strict=True))
        for name, delta in deltas.items():
            parts[name] += delta
        # Back in bfloat16, what was added would mostly be rounded away.
        bias = self._project.bias
        return Frozen(weight, None if bias is None else bias.float())

    def run(
        self,
        x: torch.Tensor,
        around: Around,
        updates: Updates,
        *,
        project: Frozen | None = None,
        projected: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self._compiled is not None:
            by_place = [updates.get(name, ()) for name in self.widths]
            return self._compiled(x, around, by_place, project=project, projected=projected)
        entered = self.enter(x)
        if projected is None:
            projected = (project or self._project)(entered)
        columns = filled(projected.float()).split([*self.widths.values()], 1)
        parts = dict(zip(self.widths, columns, strict=True))
        for name, passes in updates.items():
            parts[name] = add_low_rank(parts[name], entered, passes)
        return self._complete(x, parts, around)

    def _complete(
        self, x: torch.Tensor, parts: Mapping[str, torch.Tensor], around: Around
    ) -> torch.Tensor:
        """Return the output, [row, hidden], from the input and the projections by name."""
        raise NotImplementedError


class Ends:
    """What comes before and after the layers: embeddings, rotations, pooling and its last norm."""

    def __init__(
        self, model: Any, pooling: str, *, max_tokens: int, window: Window | None = None
    ) -> None:
        self._base, self._pooling = model.base_model, pooling
        self._masked_head = getattr(model, "cls", None)
        """Of an encoder that names masked tokens."""
        self.window = window
        limit = self.positions()
        if limit is not None and limit < max_tokens:
            raise ModelError(
                f"model.max_tokens must not exceed the model's table of positions ({limit}), got "
                f"{max_tokens}"
            )
        limit = getattr(model.config, "sliding_window", None)
        if limit is not None and limit < max_tokens and (window is None or window.width > limit):
            raise ModelError(
                f"model.max_tokens must not exceed the model's attention window ({limit}), unless "
                f"model.attention_window is set and does not (with model.attention_sinks 0 it is the "
                f"model's own); got {max_tokens}"
            )

    def positions(self) -> int | None:
        """Return the tokens for which the model has positions; None: any number."""
        return None

    def embed(self, packed: Packed) -> torch.Tensor:
        """Return the input of the lowest layer, [token, hidden]."""
        return self._embedded(packed).float()

    def _embedded(self, packed: Packed) -> torch.Tensor:
        """Return the same in the type of the weights."""
        raise NotImplementedError

    def around(self, packed: Packed) -> Around:
        """Return what all layers see of a batch."""
        raise NotImplementedError

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what a head over the vocabulary, or a decoder's, sees of what leaves the last layer.

        [row, hidden] both.
        """
        if self._masked_head is not None:
            return self._masked_head.predictions.transform(hidden)  # type: ignore[no-any-return]
        return self._base.norm(hidden)  # type: ignore[no-any-return]

    def pool(self, hidden: torch.Tensor, packed: Packed) -> torch.Tensor:
        """Return what the head sees, [sequence, hidden]; see ``adapters.MeanPooling``."""
        raise NotImplementedError


def fused(parts: Mapping[str, torch.nn.Linear], dtype: torch.dtype) -> Frozen:
    """Return several maps of the same input as one, outputs side by side."""
    weight = torch.cat([part.weight.detach() for part in parts.values()]).to(dtype)
    if all(part.bias is None for part in parts.values()):
        return Frozen(weight, None)
    biases = [
        part.weight.new_zeros(part.out_features) if part.bias is None else part.bias.detach()
        for part in parts.values()
    ]
    return Frozen(weight, torch.cat(biases).to(dtype))
