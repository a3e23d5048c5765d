"""Attention among packed tokens: each to those of its own sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pwff_opt.federated.tokens import Packed


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Sparse attention: a token sees those less than ``width`` away, and the first ``sinks`` ones.

    Without the first tokens, on which much attention rests whatever they say, a model that was not made
    for it falls apart as soon as they leave the window (Xiao et al., ICLR 2024, arXiv 2309.17453). Tokens
    keep their positions; there those in the cache are counted anew, which matters beyond the longest texts
    that the model was made for.
    """

    width: int
    sinks: int

    def bars(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return which places of keys each place of queries does not see; both broadcast."""
        return ((queries - keys).abs() >= self.width) & (keys >= self.sinks)


class Around:
    """What all layers see of a batch: how it is packed, who may attend to whom, rotations.

    Rows fill up below the tokens (:func:`pwff_opt.federated.products.filled`): ``rotary`` has them too,
    ``attend`` is given them and returns them.
    """

    def __init__(
        self,
        packed: Packed,
        *,
        causal: bool,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        window: Window | None = None,
    ) -> None:
        self.packed = packed
        self.rotary = rotary
        self.window = window
        self._bias: torch.Tensor | None = None
        barred = None
        if causal:
            # Padding comes last, so no token attends to it.
            shape = (packed.width, packed.width)
            barred = torch.ones(shape, dtype=torch.bool, device=packed.ids.device).triu(1)[None]
        elif packed.inside is not None:
            barred = ~packed.inside[:, None]
        if window is not None and packed.width > window.width:
            places = torch.arange(packed.width, device=packed.ids.device)
            far = window.bars(places[:, None], places)[None]
            barred = far if barred is None else barred | far
        if barred is not None:
            self._bias = torch.zeros(barred.shape, device=barred.device)
            self._bias = self._bias.masked_fill(barred, -1e9)

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float
    ) -> torch.Tensor:
        """Return the attended values, [row, head x size], of [row, head, size] each.

        softmax(scale Q K^T) V in every sequence and head; several heads of queries may share one of
        keys and values, in order (grouped queries). Rows beyond the tokens fill up, and stay zero.
        """
        attended: torch.Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
            queries, keys, values, self.packed, self._bias, scale
        )
        return attended


class _Attention(torch.autograd.Function):
    """Written out, padded to the longest sequence, heads outermost.

    At tens of tokens a sequence the products are so small that moving numbers is what counts: padding and
    turning to heads is one gather here, scale and mask go into the product.  torch's fused attention takes
    longer forwards and several times as long backwards at these lengths.  A padded place holds its
    sequence's first token, so one that diverges stays alone with its NaN.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        packed: Packed,
        bias: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        groups = queries.shape[1] // keys.shape[1]
        q, k, v = (_padded(x, packed) for x in (queries, keys, values))
        k, v = _repeated(k, groups, packed), _repeated(v, groups, packed)
        weights = _scaled(q, k.transpose(1, 2), scale)
        if bias is not None:
            weights.view(-1, packed.sequences, packed.width, packed.width).add_(bias)
        weights = weights.softmax(-1)
        ctx.save_for_backward(q, k, v, weights)
        ctx.packed, ctx.groups, ctx.scale = packed, groups, scale
        return _tokens(weights @ v, packed, len(queries)).flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        packed, scale, rows = ctx.packed, ctx.scale, len(grads[0])
        gradient = _padded(grads[0].unflatten(1, (-1, v.shape[-1])), packed)
        if packed.inside is not None:  # nothing was read from padded places
            gradient.view(-1, packed.sequences, packed.width, v.shape[-1]).mul_(
                packed.inside[:, :, None]
            )
        dq = dk = dv = None
        if ctx.needs_input_grad[2]:
            dv = weights.transpose(1, 2) @ gradient
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            scores = torch._softmax_backward_data(
                gradient @ v.transpose(1, 2), weights, -1, weights.dtype
            )
            if ctx.needs_input_grad[0]:
                dq = _tokens(_scaled(scores, k, scale), packed, rows)
            if ctx.needs_input_grad[1]:
                dk = _scaled(scores.transpose(1, 2), q, scale)
        dk, dv = (
            None if x is None else _tokens(_summed(x, ctx.groups, packed), packed, rows)
            for x in (dk, dv)
        )
        return dq, dk, dv, None, None, None


def _padded(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Return [head x sequence, width, size] of [row, head, size]."""
    padded = x.transpose(0, 1).index_select(1, packed.slots)
    return padded.view(-1, packed.width, x.shape[2])


def _tokens(x: torch.Tensor, packed: Packed, rows: int) -> torch.Tensor:
    """Return [row, head, size] of [head x sequence, width, size]."""
    places = x.view(-1, packed.sequences * packed.width, x.shape[2]).transpose(0, 1)
    tokens = len(packed.places)
    found = x.new_empty(rows, *places.shape[1:])
    torch.index_select(places, 0, packed.places, out=found[:tokens])
    found[tokens:] = 0
    return found


def _repeated(x: torch.Tensor, groups: int, packed: Packed) -> torch.Tensor:
    """Return each head of keys or values as often as heads of queries share it."""
    if groups == 1:
        return x
    return x.view(-1, packed.sequences, *x.shape[1:]).repeat_interleave(groups, 0).flatten(0, 1)


def _summed(x: torch.Tensor, groups: int, packed: Packed) -> torch.Tensor:
    """Return the gradient of what was repeated."""
    if groups == 1:
        return x
    return x.view(-1, groups, packed.sequences, *x.shape[1:]).sum(1).flatten(0, 1)


def _scaled(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Return ``scale`` a b."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)
