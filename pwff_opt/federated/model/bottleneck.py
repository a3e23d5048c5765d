"""What devices add at the output of a layer: bottleneck adapters (Houlsby et al., ICML 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pwff_opt.federated.model import memory
from pwff_opt.federated.model.low_rank import joined
from pwff_solvers.compiled import transformer as kernels
from pwff_solvers.compiled.lanes import LANES


@dataclass(frozen=True, slots=True, eq=False)
class Bottleneck:
    """What one device makes of its rows: x + U gelu(D x + d) + u.

    See :class:`pwff_opt.federated.model.adapters.BottleneckAdapter`.
    """

    start: int
    stop: int
    """Its rows are those from ``start`` to before ``stop``."""
    down: torch.Tensor
    """[width, hidden]"""
    down_bias: torch.Tensor
    up: torch.Tensor
    """[hidden, width]"""
    up_bias: torch.Tensor


def adapted(x: torch.Tensor, adapters: Sequence[Bottleneck]) -> torch.Tensor:
    """Return ``x``, [row, hidden], with the rows of devices that have an adapter as those make them."""
    tensors = [t for own in adapters for t in (own.down, own.down_bias, own.up, own.up_bias)]
    compiled = kernels.AVAILABLE and x.device.type == "cpu" and x.shape[1] % LANES == 0
    if compiled and all(t.dtype == torch.float32 for t in (x, *tensors)):
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors))
        rows = [(own.start, own.stop) for own in adapters]
        out: torch.Tensor = _Adapted.apply(x.contiguous(), rows, learns, *tensors)  # type: ignore[no-untyped-call]
        return out
    parts, at = [], 0
    for own in adapters:
        if at < own.start:
            parts.append(x[at : own.start])
        part, at = x[own.start : own.stop], own.stop
        inner = functional.gelu(functional.linear(part, own.down, own.down_bias))
        parts.append(part + functional.linear(inner, own.up, own.up_bias))
    if at < len(x):
        parts.append(x[at:])
    return joined(parts)


class _Adapted(torch.autograd.Function):
    """By loops of our own: products as narrow as these leave a library's kernels mostly idle."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        rows: Sequence[tuple[int, int]],
        learns: bool,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        out, kept, at = torch.empty_like(x), [], 0
        for (start, stop), own in zip(rows, _by_adapter(tensors), strict=True):
            out[at:start] = x[at:start]
            at = stop
            size = (stop - start, kernels.whole(len(own[1])))
            inner, slope = (memory.room(x.dtype, many * size[0], size[1]) for many in (1, learns))
            kernels.bottleneck(
                memory.flat(x), start, stop, *memory.read(*own), memory.flat(out), inner, slope
            )
            kept += [inner, slope]
        out[at:] = x[at:]
        if learns:
            ctx.save_for_backward(x, *tensors, *map(torch.from_numpy, kept))
            ctx.rows = rows
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, *saved), rows = ctx.saved_tensors, ctx.rows
        grad, goes_on = grads[0].contiguous(), ctx.needs_input_grad[0]
        to_x = grad.clone() if goes_on else grad[:0]
        tensors, kept = saved[: 4 * len(rows)], saved[4 * len(rows) :]
        found: list[torch.Tensor] = []
        for (start, stop), own, inner, slope in zip(
            rows, _by_adapter(tensors), kept[::2], kept[1::2], strict=True
        ):
            to_own = [t.new_empty(t.shape) for t in own]
            kernels.bottleneck_back(
                memory.flat(grad),
                memory.flat(x),
                start,
                stop,
                *memory.read(*own),
                inner.numpy(),
                slope.numpy(),
                *map(memory.flat, (*to_own, to_x)),
            )
            found += to_own
        return to_x if goes_on else None, None, None, *found


def _by_adapter(tensors: Sequence[torch.Tensor]) -> list[Sequence[torch.Tensor]]:
    return [tensors[at : at + 4] for at in range(0, len(tensors), 4)]
