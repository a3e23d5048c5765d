"""What devices add to frozen projections: LoRA (Hu et al., ICLR 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LowRank:
    """What one device adds in its rows: ``scale`` B A x."""

    start: int
    stop: int
    """Its rows are those from ``start`` to before ``stop``."""
    scale: float
    a: torch.Tensor
    """[rank, inputs]"""
    b: torch.Tensor
    """[outputs, rank]"""


Updates = Mapping[str, Sequence[Sequence[LowRank]]]
"""By the projection's name: what is added to it, in passes over the rows from top to bottom."""


def add_low_rank(
    base: torch.Tensor, x: torch.Tensor, passes: Sequence[Sequence[LowRank]]
) -> torch.Tensor:
    """Return ``base`` [row, outputs] with what is added to it, for rows ``x`` [row, inputs]."""
    for updates in passes:
        parts, at = [], 0
        for own in updates:
            if at < own.start:
                parts.append(base[at : own.start])
            rows = slice(own.start, own.stop)
            inner = functional.linear(x[rows], own.a)
            parts.append(torch.addmm(base[rows], inner, own.b.t(), alpha=own.scale))
            at = own.stop
        if at < len(base):
            parts.append(base[at:])
        base = joined(parts)
    return base


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the parts' rows, one part's below the other's; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
