"""The memory of tensors, as compiled loops take it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch


def flat(x: torch.Tensor) -> Any:
    """Return the memory of a contiguous tensor, as kernels take it; nothing is learned through it."""
    # By numpy as far as it goes: torch lets go of Python's lock in every call, and threads that take it
    # from each other between calls as small as these wait longer than they work.
    array = (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy(force=True)
    if not array.flags.c_contiguous:
        # Reshaped it would be a copy, and what is written there be lost.
        raise ValueError(f"a kernel's tensor must be contiguous, got strides {x.stride()}")
    return array.reshape(-1)


def read(*tensors: torch.Tensor) -> list[Any]:
    """Return the memory of tensors that are only read, as :func:`flat`; some rules leave them transposed."""
    return [flat(tensor.contiguous()) for tensor in tensors]


def room(dtype: torch.dtype, *size: int) -> Any:
    """Return new memory for kernels' own use, [n]."""
    return np.empty(math.prod(size), np.uint16 if dtype == torch.bfloat16 else np.float32)
