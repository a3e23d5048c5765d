"""Products with frozen weights, what nearly all of the time goes into, and with the factors beside them.

On CPUs they run in oneDNN, also in float32, where torch itself would call MKL: MKL leaves half of the
arithmetic units idle on processors that are not Intel's (measured on AMD Zen 5: 118 against 265 Gflop/s a
core, results equal to rounding).  oneDNN prepares a kernel for every shape it meets, which takes as
long as a product of some hundred rows, and keeps a thousand; so rows are filled up to a multiple of
ROWS, and few shapes come up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

ROWS = 8  # twice as many shapes as 16, half the filling; all of a run's kernels still fit the cache

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Frozen:
    """An affine map by weights that never change, in float32 or bfloat16.

    Parameters
    ----------
    weight : [outputs, inputs]
    bias : [outputs] or None
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T + b, [row, outputs], in the type of the weights."""
        if x.requires_grad and torch.is_grad_enabled():
            result: torch.Tensor = _Product.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
            return result
        return _product(x, self.weight, self.bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _product(grads[0], ctx.weight.t(), None).to(ctx.dtype), None, None


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x W^T + b; ``weight`` may be a transposed view."""
    if not _ONEDNN or x.device.type != "cpu":
        return functional.linear(x.to(weight.dtype), weight, bias)
    rows = len(x)
    filled = -(-rows // ROWS) * ROWS
    if filled != rows:
        whole = x.new_empty(filled, x.shape[1], dtype=weight.dtype)
        whole[:rows] = x
        whole[rows:] = 0
        x = whole
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        x.to(weight.dtype).contiguous(), weight, bias, "none", [], ""
    )
    # Not a view: what is added to it later may be added in place.
    return result.resize_(rows, result.shape[1])


@dataclass(frozen=True, slots=True)
class LowRank:
    """Where products of two factors are added: those of one device, of one layer."""

    rows: slice
    """Tokens of the device."""
    scale: float
    columns: tuple[slice, ...]
    """Of each projection that has factors."""


def add_low_rank(
    projected: torch.Tensor,
    entered: torch.Tensor,
    places: Sequence[LowRank],
    factors: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Add scale x A^T B^T to some rows and columns of ``projected``, in place; return it.

    ``projected`` [token, column], ``entered`` [token, inputs]: x; ``factors``, for each of ``places``: A
    [rank, inputs] of all its projections, then B [outputs, rank].
    """
    result: torch.Tensor = _LowRankSum.apply(projected, entered, tuple(places), *factors)  # type: ignore[no-untyped-call]
    return result


class _LowRankSum(torch.autograd.Function):
    """Written out, as products so thin cost as much as what surrounds them: a device's A act at once."""

    @staticmethod
    def forward(
        ctx: Any,
        projected: torch.Tensor,
        entered: torch.Tensor,
        places: tuple[LowRank, ...],
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        ctx.mark_dirty(projected)
        inners = []
        for place, a, b in _by_place(places, factors):
            inner = entered[place.rows] @ torch.cat(a).t()
            ranks = [len(own) for own in a]
            for part, columns, own in zip(inner.split(ranks, 1), place.columns, b, strict=True):
                projected[place.rows, columns].addmm_(part, own.t(), alpha=place.scale)
            inners.append(inner)
        ctx.save_for_backward(entered, *inners, *factors)
        ctx.places = places
        return projected

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,), places = grads, ctx.places
        entered, *saved = ctx.saved_tensors
        inners, factors = saved[: len(places)], saved[len(places) :]
        needed = iter(ctx.needs_input_grad[3:])
        into = torch.zeros_like(entered) if ctx.needs_input_grad[1] else None
        found: list[torch.Tensor | None] = []
        for (place, a, b), inner in zip(_by_place(places, factors), inners, strict=True):
            x, ranks = entered[place.rows], [len(own) for own in a]
            outer = [gradient[place.rows, columns] for columns in place.columns]
            back = [(g @ own).mul_(place.scale) for g, own in zip(outer, b, strict=True)]
            found += [g.t() @ x if next(needed) else None for g in back]
            found += [
                (g.t() @ own).mul_(place.scale) if next(needed) else None
                for g, own in zip(outer, inner.split(ranks, 1), strict=True)
            ]
            if into is not None:
                for g, own in zip(back, a, strict=True):
                    into[place.rows].addmm_(g, own)
        return gradient, into, None, *found


def _by_place(
    places: Sequence[LowRank], factors: Sequence[torch.Tensor]
) -> Iterator[tuple[LowRank, list[torch.Tensor], list[torch.Tensor]]]:
    """Yield each place with its A and its B."""
    start = 0
    for place in places:
        count = len(place.columns)
        a, b = factors[start : start + count], factors[start + count : start + 2 * count]
        yield place, list(a), list(b)
        start += 2 * count
