"""A layer of an encoder in one piece: products by a library, all between them by loops of our own.

The same arithmetic as :class:`pwff_opt.families.bert.layers.BertLayer` writes out in torch, with
its gradient by hand.  There, at the tens of tokens of a sentence, up to half of the time goes into
moving numbers between products, and into torch's own work around every operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from pwff_opt.federated.model import memory
from pwff_opt.federated.model.attention import Around, Rows, attended, attended_back
from pwff_opt.federated.model.low_rank import LowRank
from pwff_opt.federated.model.products import Frozen, filled
from pwff_solvers.compiled import transformer as kernels
from pwff_solvers.compiled.lanes import LANES

Kept = tuple[Any, Any]
"""What AddNorm needs to go backwards, as kernels take it: [row, hidden] and [row]."""


class AddNorm:
    """LayerNorm of a sum (Ba et al. 2016), float32."""

    def __init__(self, norm: torch.nn.LayerNorm) -> None:
        self._weight, self._bias = (
            memory.flat(parameter) for parameter in (norm.weight, norm.bias)
        )
        self._epsilon = np.float32(norm.eps)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor, dtype: torch.dtype, *, learns: bool
    ) -> tuple[torch.Tensor, torch.Tensor, Kept]:
        """Return the norm of x + residual, [row, hidden]; that as ``dtype``; for ``backward``."""
        out = torch.empty_like(residual)
        low = out if dtype == out.dtype else torch.empty_like(residual, dtype=dtype)
        centred = memory.room(out.dtype, len(out) * learns, out.shape[1])
        deviations = memory.room(out.dtype, len(out))
        kernels.add_norm(
            memory.flat(x),
            memory.flat(residual),
            self._weight,
            self._bias,
            self._epsilon,
            memory.flat(out),
            _other(low, out),
            centred,
            deviations,
        )
        return out, low, (centred, deviations)

    def backward(
        self, grad: torch.Tensor, more: torch.Tensor | None, kept: Kept, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradient of either input, and as ``dtype``, given ``grad + more``, the norm's."""
        out = torch.empty_like(grad)
        low = out if dtype == out.dtype else torch.empty_like(grad, dtype=dtype)
        kernels.add_norm_back(
            memory.flat(grad),
            memory.room(grad.dtype, 0) if more is None else memory.flat(more),
            *kept,
            self._weight,
            memory.flat(out),
            _other(low, out),
        )
        return out, low


def _other(low: torch.Tensor, out: torch.Tensor) -> Any:
    """Return the memory of ``low``; nothing where it is ``out`` itself."""
    return memory.room(out.dtype, 0) if low is out else memory.flat(low)


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
        """Return the layer's output; see :meth:`pwff_opt.federated.model.layers.Layer.run`.

        updates : of queries, keys and values.
        """
        layer = self if project is None else replace(self, project=project)
        width = x.shape[1]
        placed = [
            _Update(place * width, own)
            for place, passes in enumerate(updates)
            for one_pass in passes
            for own in one_pass
        ]
        factors = [factor for update in placed for factor in (update.own.a, update.own.b)]
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *factors))
        encoded: torch.Tensor = _Encoding.apply(  # type: ignore[no-untyped-call]
            x.contiguous(), projected, layer, placed, around, learns, *factors
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
        updates: Sequence[_Update],
        around: Around,
        learns: bool,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        if projected is None:
            wide = layer.project.forward(x.to(layer.project.weight.dtype)).float()
        else:
            wide = filled(projected).float()
            if updates and wide is projected:  # it is left as it is
                wide = wide.clone()
        inners = [update.add(wide, x) for update in updates]
        how: dict[str, Any] = {
            "heads": layer.heads,
            "groups": 1,
            "scale": (x.shape[1] // layer.heads) ** -0.5,
        }
        dtype = layer.mix.weight.dtype
        context = torch.empty_like(x, dtype=dtype)
        weights = attended(_side_by_side(wide), around, context, learns=learns, **how)
        y, low, kept = layer.norm.forward(layer.mix.forward(context), x, dtype, learns=learns)
        inner = layer.up.forward(low)
        slope = memory.room(inner.dtype, len(inner) * learns, inner.shape[1])
        kernels.gelu(memory.flat(inner), memory.flat(inner), slope)
        down = layer.down.forward(inner)
        out, _, last_kept = layer.last_norm.forward(down, y, y.dtype, learns=learns)
        if learns:
            kept_arrays = (weights, *kept, slope, *last_kept, *inners)
            ctx.save_for_backward(x, wide, *factors, *map(torch.from_numpy, kept_arrays))
            ctx.layer, ctx.updates, ctx.around, ctx.how = layer, updates, around, how
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layer, updates, (x, wide, *saved) = ctx.layer, ctx.updates, ctx.saved_tensors
        factors, kept_arrays = saved[: 2 * len(updates)], saved[2 * len(updates) :]
        weights, centred, deviations, slope, last_centred, last_deviations, *inners = (
            part.numpy() for part in kept_arrays
        )
        dtype, goes_on = layer.mix.weight.dtype, ctx.needs_input_grad[0]
        to_y, low = layer.last_norm.backward(
            grads[0].contiguous(), None, (last_centred, last_deviations), dtype
        )
        inner = layer.down.backward(low)
        kernels.multiply(memory.flat(inner), slope)
        to_x, low = layer.norm.backward(
            to_y, layer.up.backward(inner), (centred, deviations), dtype
        )
        to_wide = torch.empty_like(wide)
        columns = {update.column for update in updates}
        attended_back(
            layer.mix.backward(low),
            _side_by_side(wide),
            weights,
            ctx.around,
            _side_by_side(to_wide),
            [goes_on or place * x.shape[1] in columns for place in range(3)],
            **ctx.how,
        )
        to_factors = []
        for update, inner, a, b in zip(updates, inners, factors[::2], factors[1::2], strict=True):
            into = to_x if goes_on else to_x[:0]
            to_factors += update.back(to_wide, x, inner, a, b, into)
        if goes_on:
            back = layer.project.backward(to_wide.to(layer.project.weight.dtype))
            kernels.add(memory.flat(to_x), memory.flat(back))
        return to_x if goes_on else None, None, None, None, None, None, *to_factors


def _side_by_side(wide: torch.Tensor) -> list[Rows]:
    """Return the rows of queries, keys and values, which are side by side."""
    flat, whole = memory.flat(wide), wide.shape[1]
    return [(flat[place * whole // 3 :], whole) for place in range(3)]


class _Update:
    """A low-rank update of the columns from ``column`` on."""

    def __init__(self, column: int, own: LowRank) -> None:
        self.column, self.own = column, own
        self._where = (np.float32(own.scale), len(own.a), own.start, own.stop)

    def add(self, wide: torch.Tensor, x: torch.Tensor) -> Any:
        """Add what it makes of ``x``, [row, hidden], to ``wide``; return A x, for the way back."""
        own = self.own
        inner = memory.room(own.a.dtype, own.stop - own.start, kernels.whole(len(own.a)))
        kernels.low_rank(
            memory.flat(x),
            *memory.read(own.a, own.b),
            *self._where,
            memory.flat(wide),
            wide.shape[1],
            self.column,
            inner,
        )
        return inner

    def back(
        self,
        to_wide: torch.Tensor,
        x: torch.Tensor,
        inner: Any,
        a: torch.Tensor,
        b: torch.Tensor,
        to_x: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of A and B; add that of ``x`` to ``to_x``, unless it is empty."""
        to_a, to_b = a.new_empty(a.shape), b.new_empty(b.shape)
        kernels.low_rank_back(
            memory.flat(to_wide),
            to_wide.shape[1],
            self.column,
            memory.flat(x),
            inner,
            *memory.read(a, b),
            *self._where,
            *map(memory.flat, (to_a, to_b, to_x)),
        )
        return to_a, to_b
