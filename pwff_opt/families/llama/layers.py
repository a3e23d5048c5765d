"""Llama as arithmetic on packed tokens (see :mod:`pwff_opt.federated.model.layers`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.activations import ACT2FN

from pwff_opt.federated.model.attention import Around
from pwff_opt.federated.model.layers import BaseLayer, Ends, fused
from pwff_opt.federated.model.products import filled
from pwff_opt.federated.text.tokens import Packed


class LlamaLayer(BaseLayer):
    """A layer with norms before its parts, rotated positions and a gate (Touvron et al. 2023)."""

    def __init__(self, layer: Any, config: Any, dtype: torch.dtype) -> None:
        own = layer.self_attn
        super().__init__({n: getattr(own, n) for n in ("q_proj", "k_proj", "v_proj")}, dtype)
        self._heads, self._pairs = config.num_attention_heads, config.num_key_value_heads
        self._out = fused({"": own.o_proj}, dtype)
        self._before, self._after = layer.input_layernorm, layer.post_attention_layernorm
        self._up = fused({"gate": layer.mlp.gate_proj, "up": layer.mlp.up_proj}, dtype)
        self._down = fused({"": layer.mlp.down_proj}, dtype)
        self._activation = ACT2FN[config.hidden_act]

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        return self._before(x)  # type: ignore[no-any-return]

    def _complete(
        self, x: torch.Tensor, parts: Mapping[str, torch.Tensor], around: Around
    ) -> torch.Tensor:
        assert around.rotary is not None
        q, k, v = (parts[name] for name in self.widths)
        q, k = q.unflatten(1, (self._heads, -1)), k.unflatten(1, (self._pairs, -1))
        context = around.attend(
            _rotated(q, *around.rotary),
            _rotated(k, *around.rotary),
            v.unflatten(1, (self._pairs, -1)),
            scale=q.shape[-1] ** -0.5,
        )
        x = self._out(context).float() + x
        gate, up = self._up(self._after(x)).chunk(2, 1)
        return self._down(self._activation(gate) * up).float() + x


class LlamaEnds(Ends):
    """Embeddings without positions, which rotate queries and keys; the head sees the last token."""

    def _embedded(self, packed: Packed) -> torch.Tensor:
        embedded: torch.Tensor = self._base.embed_tokens(packed.ids)
        return embedded

    def around(self, packed: Packed) -> Around:
        like = torch.empty(0, device=packed.ids.device)
        cos, sin = self._base.rotary_emb(like, position_ids=packed.positions[None])
        rotary = filled(cos[0, :, None]), filled(sin[0, :, None])
        return Around(packed, causal=True, rotary=rotary, window=self.window)

    def pool(self, hidden: torch.Tensor, packed: Packed) -> torch.Tensor:
        return packed.last(self.norm(hidden))


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin
