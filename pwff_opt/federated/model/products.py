"""Products with frozen weights: what nearly all of the time goes into.

On CPUs they run in oneDNN, also in float32, where torch itself would call MKL: MKL leaves half of the
arithmetic units idle on processors that are not Intel's (measured on AMD Zen 5: 118 against 265 Gflop/s a
core, results equal to rounding).  oneDNN prepares a kernel for every shape it meets, which takes as
long as a product of some hundred rows, and keeps a thousand; so rows are filled up to a multiple of
ROWS, and few shapes come up.  A pass through the layers does so once, at its start.
"""

from __future__ import annotations

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
        # In bfloat16 torch calls oneDNN itself, where the processor has instructions for it.
        self._onednn = _ONEDNN and weight.dtype == torch.float32 and weight.device.type == "cpu"
        # By columns oneDNN takes 5 % less time than by rows. A backward pass reads them turned, so it is
        # slower by as much, but there are more passes forward.
        self.weight = weight.t().contiguous().t() if self._onednn else weight
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T + b, [row, outputs], in the type of the weights."""
        whole = filled(x.to(self.weight.dtype))
        if self._onednn and whole.requires_grad and torch.is_grad_enabled():
            result: torch.Tensor = _Product.apply(whole, self)  # type: ignore[no-untyped-call]
        else:
            result = self.forward(whole)
        return result if len(result) == len(x) else result[: len(x)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the same of rows that are filled and of the weights' type."""
        if self._onednn:
            return _product(x, self.weight, self.bias)
        return functional.linear(x, self.weight, self.bias)

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        """Return the gradient of ``x``, given that of :meth:`forward`, both of the weights' type."""
        return _product(grad, self.weight.t(), None) if self._onednn else grad @ self.weight


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, frozen: Frozen) -> torch.Tensor:
        ctx.frozen = frozen
        return frozen.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.frozen.backward(grads[0]), None


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x W^T + b by oneDNN; ``weight`` may be a transposed view."""
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        x.contiguous(), weight, bias, "none", [], ""
    )
    return result


def filled(x: torch.Tensor) -> torch.Tensor:
    """Return [row, ...] with rows of zeros below, as many as make them a multiple of ROWS."""
    missing = -len(x) % ROWS
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x
