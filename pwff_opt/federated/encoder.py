"""A layer of an encoder in one piece: products by a library, all between them by loops of our own.

The same arithmetic as :class:`pwff_opt.federated.families.BertLayer` writes out in torch, with its gradient
by hand.  There, at the tens of tokens of a sentence, up to half of the time goes into moving numbers
between products, and into torch's own work around every operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pwff_opt.federated import kernels
from pwff_opt.federated.attention import Around, attended, attended_back
from pwff_opt.federated.lanes import LANES
from pwff_opt.federated.low_rank import LowRank
from pwff_opt.federated.products import Frozen, filled

Kept = tuple[torch.Tensor, torch.Tensor]
Placed = tuple[int, LowRank]
"""A low-rank update, and the column where what it is added to begins."""


class AddNorm:
    """LayerNorm of a sum (Ba et al. 2016), float32."""

    def __init__(self, norm: torch.nn.LayerNorm) -> None:
        self._weight, self._bias = (
            kernels.flat(parameter.detach()) for parameter in (norm.weight, norm.bias)
        )
        self._epsilon = np.float32(norm.eps)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor, *, learns: bool
    ) -> tuple[torch.Tensor, torch.Tensor, Kept]:
        """Return the norm of x + residual, [row, hidden]; in the type of ``x``; for ``backward``."""
        out = torch.empty_like(residual)
        low = out if x.dtype == out.dtype else torch.empty_like(x)
        centred, deviations = torch.empty_like(out[: len(out) * learns]), out.new_empty(len(out))
        kernels.add_norm(
            kernels.flat(x),
            kernels.flat(residual),
            self._weight,
            self._bias,
            self._epsilon,
            *map(kernels.flat, (out, low[: len(low) * (low is not out)], centred, deviations)),
        )
        return out, low, (centred, deviations)

    def backward(
        self, grad: torch.Tensor, more: torch.Tensor | None, kept: Kept, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradient of either input, and as ``dtype``, given ``grad + more``, the norm's."""
        out = torch.empty_like(grad)
        low = out if dtype == out.dtype else torch.empty_like(grad, dtype=dtype)
        kernels.add_norm_back(
            *map(kernels.flat, (grad, grad[:0] if more is None else more, *kept)),
            self._weight,
            *map(kernels.flat, (out, low[: len(low) * (low is not out)])),
        )
        return out, low


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoder:
    """The frozen parts of a layer with norms after its parts (Devlin et al. 2019)."""

    heads: int
    project: Frozen
    """Queries, keys and values, of equal width, side by side."""
    mix: Frozen
    norm: AddNorm
    up: Frozen
    down: Frozen
    last_norm: AddNorm

    @classmethod
    def of(
        cls, *, heads: int, activation: str, norm: Any, last_norm: Any, **products: Frozen
    ) -> Encoder | None:
        """Return the layer of these parts, or None if it can only be had of torch's operations."""
        inner, hidden = products["up"].weight.shape
        fits = (
            kernels.AVAILABLE
            and products["up"].weight.device.type == "cpu"
            and products["up"].weight.dtype in (torch.float32, torch.bfloat16)
            and activation == "gelu"
            and hidden // heads % LANES == 0
            and inner % LANES == 0
        )
        if not fits:
            return None
        return cls(heads=heads, norm=AddNorm(norm), last_norm=AddNorm(last_norm), **products)

    def __call__(
        self,
        x: torch.Tensor,
        around: Around,
        updates: Sequence[Sequence[Sequence[LowRank]]],
        *,
        project: Frozen | None,
        projected: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the layer's output; see :meth:`pwff_opt.federated.families.Layer.run`.

        updates : of queries, keys and values.
        """
        layer = self if project is None else replace(self, project=project)
        width = x.shape[1]
        placed = [
            (place * width, update)
            for place, passes in enumerate(updates)
            for updates_of_pass in passes
            for update in updates_of_pass
        ]
        factors = [factor for _, update in placed for factor in (update.a, update.b)]
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *factors))
        encoded: torch.Tensor = _Encoding.apply(  # type: ignore[no-untyped-call]
            x, projected, layer, placed, around, learns, *factors
        )
        return encoded


class _Encoding(torch.autograd.Function):
    """y = norm(x + O attention(Q x, K x, V x)), then norm(y + D gelu(U y)), with updates of Q, K and V.

    What comes back is the gradient of x and of the updates' factors: all else is frozen.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        projected: torch.Tensor | None,
        layer: Encoder,
        placed: Sequence[Placed],
        around: Around,
        learns: bool,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        if projected is None:
            projected = layer.project.forward(x.to(layer.project.weight.dtype))
            wide = projected.float()
        else:  # left as it is
            wide = filled(projected).to(torch.float32, copy=bool(placed))
        inners = _update(wide, x, placed)
        tensors, scale = _heads(wide, layer.heads), (x.shape[1] // layer.heads) ** -0.5
        context, weights = attended(
            tensors, around, scale, learns=learns, dtype=layer.mix.weight.dtype
        )
        y, low, kept = layer.norm.forward(layer.mix.forward(context), x, learns=learns)
        inner = layer.up.forward(low)
        slope = torch.empty_like(inner[: len(inner) * learns])
        kernels.gelu(*map(kernels.flat, (inner, inner, slope)))
        out, _, last_kept = layer.last_norm.forward(layer.down.forward(inner), y, learns=learns)
        if learns:
            ctx.save_for_backward(x, wide, weights, *kept, slope, *last_kept, *inners)
            ctx.layer, ctx.placed, ctx.around, ctx.scale = layer, placed, around, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layer, placed = ctx.layer, ctx.placed
        x, wide, weights, *rest = ctx.saved_tensors
        kept, slope, last_kept, inners = (rest[0], rest[1]), rest[2], (rest[3], rest[4]), rest[5:]
        dtype = layer.mix.weight.dtype
        to_y, low = layer.last_norm.backward(grads[0].contiguous(), None, last_kept, dtype)
        inner = layer.down.backward(low).mul_(slope)
        to_x, low = layer.norm.backward(to_y, layer.up.backward(inner), kept, dtype)
        goes_on, to_wide = ctx.needs_input_grad[0], torch.empty_like(wide)
        columns = {column for column, _ in placed}
        attended_back(
            layer.mix.backward(low),
            _heads(wide, layer.heads),
            weights,
            ctx.around,
            ctx.scale,
            _heads(to_wide, layer.heads),
            [goes_on or place * x.shape[1] in columns for place in range(3)],
        )
        to_factors = _update_back(to_wide, x, placed, inners, to_x if goes_on else to_x[:0])
        if goes_on:
            back = layer.project.backward(to_wide.to(layer.project.weight.dtype))
            kernels.add(*map(kernels.flat, (to_x, back)))
        return to_x if goes_on else None, None, None, None, None, None, *to_factors


def _heads(wide: torch.Tensor, heads: int) -> list[torch.Tensor]:
    """Return queries, keys and values, [row, head, size] each, of them side by side."""
    return list(wide.view(len(wide), 3, heads, -1).unbind(1))


def _update(wide: torch.Tensor, x: torch.Tensor, placed: Sequence[Placed]) -> list[torch.Tensor]:
    """Add the updates for ``x``, [row, hidden], to ``wide``; return A x of each, [row, rank], filled."""
    inners = []
    for column, own in placed:
        inner = x.new_empty(own.stop - own.start, kernels.whole(len(own.a)))
        kernels.low_rank(
            *map(kernels.flat, (x, own.a, own.b)),
            np.float32(own.scale),
            len(own.a),
            own.start,
            own.stop,
            kernels.flat(wide),
            wide.shape[1],
            column,
            kernels.flat(inner),
        )
        inners.append(inner)
    return inners


def _update_back(
    to_wide: torch.Tensor,
    x: torch.Tensor,
    placed: Sequence[Placed],
    inners: Sequence[torch.Tensor],
    to_x: torch.Tensor,
) -> list[torch.Tensor]:
    """Return the gradients of all factors, and add that of ``x`` to ``to_x``, unless it is empty."""
    found = []
    for (column, own), inner in zip(placed, inners, strict=True):
        to_a, to_b = torch.empty_like(own.a), torch.empty_like(own.b)
        kernels.low_rank_back(
            kernels.flat(to_wide),
            to_wide.shape[1],
            column,
            *map(kernels.flat, (x, inner, own.a, own.b)),
            np.float32(own.scale),
            len(own.a),
            own.start,
            own.stop,
            *map(kernels.flat, (to_a, to_b, to_x)),
        )
        found += [to_a, to_b]
    return found
