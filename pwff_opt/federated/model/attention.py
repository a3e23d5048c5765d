"""Attention among packed tokens: each to those of its own sequence."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from pwff_opt.federated.model import memory
from pwff_opt.federated.text.tokens import Packed
from pwff_solvers.compiled import transformer as kernels
from pwff_solvers.compiled.lanes import LANES


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

    Rows fill up below the tokens (:func:`pwff_opt.federated.model.products.filled`): ``rotary`` has them too,
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
        self.causal = causal

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float
    ) -> torch.Tensor:
        """Return the attended values, [row, head x size], of [row, head, size] each.

        softmax(scale Q K^T) V in every sequence and head; several heads of queries may share one of
        keys and values, in order (grouped queries). Rows beyond the tokens fill up, and stay zero.
        """
        tensors = (queries, keys, values)
        compiled = kernels.AVAILABLE and all(
            x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[2] % LANES == 0
            for x in tensors
        )
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        how = _Compiled if compiled else _Padded
        attended: torch.Tensor = how.apply(*tensors, self, scale, learns)  # type: ignore[no-untyped-call]
        return attended

    @functools.cached_property
    def barred(self) -> torch.Tensor | None:
        """[sequence or 1, query or 1, key]: which padded places are not seen; None: all are."""
        packed, barred = self.packed, None
        places = torch.arange(packed.width, device=packed.ids.device)
        if self.causal:
            # Padding comes last, so no token attends to it.
            barred = (places > places[:, None])[None]
        elif packed.inside is not None:
            barred = ~packed.inside[:, None]
        if self.window is not None and packed.width > self.window.width:
            far = self.window.bars(places[:, None], places)[None]
            barred = far if barred is None else barred | far
        return barred


class _Compiled(torch.autograd.Function):
    """By loops of our own (:mod:`pwff_solvers.compiled.transformer`), one sequence and head after the other.

    At tens of tokens a sequence the products are so small that moving numbers is what counts: here
    nothing is padded, turned to heads or masked in memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        around: Around,
        scale: float,
        learns: bool,
    ) -> torch.Tensor:
        tensors = [x.contiguous() for x in (queries, keys, values)]
        heads, size = queries.shape[1:]
        how: dict[str, Any] = {
            "heads": heads,
            "groups": heads // keys.shape[1],
            "scale": scale,
        }
        out = queries.new_empty(len(queries), heads * size)
        weights = attended(_rows(tensors), around, out, learns=learns, **how)
        ctx.save_for_backward(*tensors, torch.from_numpy(weights))
        ctx.around, ctx.how = around, how
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *tensors, weights = ctx.saved_tensors
        found, wanted = [torch.empty_like(x) for x in tensors], ctx.needs_input_grad[:3]
        attended_back(
            grads[0].contiguous(),
            _rows(tensors),
            weights.numpy(),
            ctx.around,
            _rows(found),
            wanted,
            **ctx.how,
        )
        dq, dk, dv = (x if wants else None for x, wants in zip(found, wanted, strict=True))
        return dq, dk, dv, None, None, None


Rows = tuple[Any, int]
"""Memory of [row, head x size] as kernels take it, and how far apart in it rows are."""


def _rows(tensors: Sequence[torch.Tensor]) -> list[Rows]:
    return [(memory.flat(x), x.shape[1] * x.shape[2]) for x in tensors]


def attended(
    parts: Sequence[Rows],
    around: Around,
    out: torch.Tensor,
    *,
    heads: int,
    groups: int,
    scale: float,
    learns: bool,
) -> Any:
    """Write what queries, keys and values make (:meth:`Around.attend`) to ``out``; return the weights.

    They are complete if it ``learns``. ``groups``: heads of queries that share one of keys and values.
    """
    lengths, width = around.packed.lengths.numpy(), around.packed.width
    squares = lengths * kernels.whole(lengths)
    most = heads * int(squares.sum()) if learns else int(squares.max())
    weights = memory.room(torch.float32, most)
    window = around.window or Window(width=width, sinks=0)
    kernels.attend(
        *itertools.chain.from_iterable(parts),
        lengths,
        heads,
        groups,
        out.shape[1] // heads,
        np.float32(scale),
        around.causal,
        window.width,
        window.sinks,
        memory.flat(out),
        weights,
        learns,
    )
    return weights


def attended_back(
    grad: torch.Tensor,
    parts: Sequence[Rows],
    weights: Any,
    around: Around,
    found: Sequence[Rows],
    wanted: Sequence[bool],
    *,
    heads: int,
    groups: int,
    scale: float,
) -> None:
    """Write the gradients of queries, keys and values to ``found``, where wanted."""
    kernels.attend_back(
        memory.flat(grad),
        *itertools.chain.from_iterable(parts),
        around.packed.lengths.numpy(),
        heads,
        groups,
        grad.shape[1] // heads,
        np.float32(scale),
        weights,
        *itertools.chain.from_iterable(found),
        (wanted[0], wanted[1], wanted[2]),
    )


class _Padded(torch.autograd.Function):
    """Written out in torch, padded to the longest sequence, heads outermost: on GPUs, and for odd heads.

    Padding and turning to heads is one gather here, scale and mask go into the product.  torch's fused
    attention takes longer forwards and several times as long backwards at tens of tokens.  A padded
    place holds its sequence's first token, so one that diverges stays alone with its NaN.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        around: Around,
        scale: float,
        learns: bool,
    ) -> torch.Tensor:
        packed, barred = around.packed, around.barred
        groups = queries.shape[1] // keys.shape[1]
        q, k, v = (_padded(x, packed) for x in (queries, keys, values))
        k, v = _repeated(k, groups, packed), _repeated(v, groups, packed)
        weights = _scaled(q, k.transpose(1, 2), scale)
        if barred is not None:
            by_sequence = weights.view(-1, packed.sequences, packed.width, packed.width)
            by_sequence.masked_fill_(barred, -1e9)
        weights = weights.softmax(-1)
        ctx.save_for_backward(q, k, v, weights)
        ctx.packed, ctx.groups, ctx.scale = packed, groups, scale
        return _tokens(weights @ v, packed, len(queries)).flatten(1)

    @staticmethod
    @once_differentiable
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
