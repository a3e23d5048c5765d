"""Transformer layers of the supported families, as arithmetic on packed tokens.

A row is a token's; rows of zeros below fill up (see :mod:`pwff_opt.federated.model.products`).

A layer falls into two parts, so that what never changes can be kept: ``project`` computes queries,
keys and values [row, query + key + value] from the layer's input, ``run`` all the rest.  LoRA comes in
between.  Weights are frozen, in float32 or bfloat16; products run in that type, everything else in
float32, projections with something added to their weights too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch.nn import functional
from transformers.activations import ACT2FN

from pwff_opt.errors import ModelError
from pwff_opt.federated.model.attention import Around, Window
from pwff_opt.federated.model.encoder import Encoder
from pwff_opt.federated.model.low_rank import Updates, add_low_rank
from pwff_opt.federated.model.products import Frozen, filled
from pwff_opt.federated.text.tokens import Packed

# The projections that carry a LoRA: queries and values (Hu et al., ICLR 2022, section 4.2).
LORA_TARGETS = {"bert": ("query", "value"), "llama": ("q_proj", "v_proj")}
HEADS = {"bert": "classifier", "llama": "score"}


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


class _Layer:
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


class BertLayer(_Layer):
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


class LlamaLayer(_Layer):
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


LAYERS: dict[str, Callable[[Any, Any, torch.dtype], Layer]] = {
    "bert": BertLayer,
    "llama": LlamaLayer,
}


class Ends:
    """What comes before and after the layers: embeddings, rotations, pooling and its last norm."""

    def __init__(
        self,
        model: Any,
        family: str,
        pooling: str,
        *,
        max_tokens: int,
        window: Window | None = None,
    ) -> None:
        self._base, self._family, self._pooling = model.base_model, family, pooling
        self._masked_head = getattr(model, "cls", None)
        """Of an encoder that names masked tokens."""
        self.window = window
        if family == "bert":
            limit = self._base.embeddings.position_embeddings.num_embeddings
            if limit < max_tokens:
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

    def embed(self, packed: Packed) -> torch.Tensor:
        """Return the input of the lowest layer, [token, hidden]."""
        if self._family == "bert":
            embedded = self._base.embeddings(
                input_ids=packed.ids[None],
                token_type_ids=torch.zeros_like(packed.ids)[None],
                position_ids=packed.positions[None],
            )[0]
        else:
            embedded = self._base.embed_tokens(packed.ids)
        return embedded.float()  # type: ignore[no-any-return]

    def around(self, packed: Packed) -> Around:
        if self._family == "bert":
            return Around(packed, causal=False, window=self.window)
        like = torch.empty(0, device=packed.ids.device)
        cos, sin = self._base.rotary_emb(like, position_ids=packed.positions[None])
        rotary = filled(cos[0, :, None]), filled(sin[0, :, None])
        return Around(packed, causal=True, rotary=rotary, window=self.window)

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what a head over the vocabulary, or a decoder's, sees of what leaves the last layer.

        [row, hidden] both.
        """
        if self._masked_head is not None:
            return self._masked_head.predictions.transform(hidden)  # type: ignore[no-any-return]
        return self._base.norm(hidden)  # type: ignore[no-any-return]

    def pool(self, hidden: torch.Tensor, packed: Packed) -> torch.Tensor:
        """Return what the head sees, [sequence, hidden]; see ``adapters.MeanPooling``."""
        if self._family == "llama":
            return packed.last(self.norm(hidden))
        if self._pooling == "mean":
            mean = packed.mean(hidden)
            return functional.layer_norm(mean, mean.shape[-1:])
        pooler = self._base.pooler
        return pooler.activation(pooler.dense(packed.first(hidden)))  # type: ignore[no-any-return]


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


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin
