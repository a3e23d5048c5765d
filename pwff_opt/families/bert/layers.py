"""BERT as arithmetic on packed tokens (see :mod:`pwff_opt.federated.model.layers`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional
from transformers.activations import ACT2FN

from pwff_opt.federated.model.attention import Around
from pwff_opt.federated.model.encoder import Encoder
from pwff_opt.federated.model.layers import BaseLayer, Ends, fused
from pwff_opt.federated.text.tokens import Packed


class BertLayer(BaseLayer):
    """A layer with norms after its parts (Devlin et al. 2019)."""

    def __init__(self, layer: Any, config: Any, dtype: torch.dtype) -> None:
        own = layer.attention.self
        super().__init__({n: getattr(own, n) for n in ("query", "key", "value")}, dtype)
        self._heads = config.num_attention_heads
        self._out = fused({"": layer.attention.output.dense}, dtype)
        self._norm = layer.attention.output.LayerNorm
        self._up = fused({"": layer.intermediate.dense}, dtype)
        self._down = fused({"": layer.output.dense}, dtype)
        self._last_norm = layer.output.LayerNorm
        self._activation = ACT2FN[config.hidden_act]
        self._compiled = Encoder.of(
            heads=self._heads,
            activation=config.hidden_act,
            project=self._project,
            mix=self._out,
            norm=self._norm,
            up=self._up,
            down=self._down,
            last_norm=self._last_norm,
        )

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def _complete(
        self, x: torch.Tensor, parts: Mapping[str, torch.Tensor], around: Around
    ) -> torch.Tensor:
        q, k, v = (parts[name].unflatten(1, (self._heads, -1)) for name in self.widths)
        context = around.attend(q, k, v, scale=q.shape[-1] ** -0.5)
        x = self._norm(self._out(context).float() + x)
        inner = self._activation(self._up(x))
        return self._last_norm(self._down(inner).float() + x)  # type: ignore[no-any-return]


class BertEnds(Ends):
    """Embeddings with a table of positions; the head sees the pooler's output, or the mean."""

    def positions(self) -> int | None:
        return int(self._base.embeddings.position_embeddings.num_embeddings)

    def _embedded(self, packed: Packed) -> torch.Tensor:
        embedded: torch.Tensor = self._base.embeddings(
            input_ids=packed.ids[None],
            token_type_ids=torch.zeros_like(packed.ids)[None],
            position_ids=packed.positions[None],
        )[0]
        return embedded

    def around(self, packed: Packed) -> Around:
        return Around(packed, causal=False, window=self.window)

    def pool(self, hidden: torch.Tensor, packed: Packed) -> torch.Tensor:
        if self._pooling == "mean":
            mean = packed.mean(hidden)
            return functional.layer_norm(mean, mean.shape[-1:])
        pooler = self._base.pooler
        return pooler.activation(pooler.dense(packed.first(hidden)))  # type: ignore[no-any-return]
