"""The algebra of LoRA factors that the rules share; it needs torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from pwff_opt.federated.exchange.rules._rule import Factors, Fresh, normalised


def ideal(sent: Sequence[Factors], weights: Sequence[float]) -> Tensor:
    r"""Return :math:`\Delta W^* = \sum_k p_k s_k B_k A_k`: [outputs, inputs], float64."""
    left, right = stack(sent, normalised(weights))
    return left @ right


def mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Return the weighted sum, float64, in the order given."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, share in zip(tensors, shares, strict=True):
        total += tensor.double() * share
    return total


def stack(sent: Sequence[Factors], shares: Iterable[float | Tensor]) -> tuple[Tensor, Tensor]:
    """Return [outputs, R] and [R, inputs], R the sum of ranks, whose product is the weighted sum.

    ``shares``: of each device, or of each of its slices as [rank, 1]. They go into A alone: on both
    sides they would count twice.
    """
    left = torch.cat([own.b.double() for own in sent], dim=1)
    right = torch.cat(
        [own.a.double() * (share * own.scale) for own, share in zip(sent, shares, strict=True)]
    )
    return left, right


def norm(own: Factors) -> float:
    r"""Return :math:`\lVert s B A \rVert_F`, from the Gram matrices of size rank."""
    a, b = own.a.double(), own.b.double()
    squared = float(((b.T @ b) * (a @ a.T)).sum())
    return abs(own.scale) * math.sqrt(max(squared, 0.0))  # rounding can make it just negative


def redistribute(
    left: Tensor, right: Tensor, held: Sequence[Factors], fresh: Fresh
) -> tuple[Factors, ...]:
    r"""Return, for each device, the truncated SVD of ``left @ right`` ([outputs, R] [R, inputs]).

    With :math:`L = Q_L R_L` and :math:`R^T = Q_R R_R` only the small core :math:`R_L R_R^T` is
    decomposed; outputs x inputs is never formed, and one SVD serves all ranks. Singular values are
    split evenly between factors, and the scale goes into B. Singular pairs have a sign at will: here
    the largest entry of the left vector is positive, or factors would jump between rounds.

    A device of more rank than the product has gets fresh rows of A with zero columns of B for the
    rest, which change nothing and can learn.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, v_t = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    # Singular values that are rounding have directions that are rounding.
    noise = torch.finfo(s.dtype).eps * max(left.shape[0], right.shape[1]) * s.max()
    found = int((s > noise).sum())
    u, s, v_t = q_left @ u[:, :found], s[:found], v_t[:found] @ q_right.T
    if found:
        signs = u.gather(0, u.abs().argmax(dim=0, keepdim=True)).sign()
        u, v_t = u * signs, v_t * signs.T
    root = s.sqrt()

    def start(item: int) -> Factors:
        own = held[item]
        return Factors(a=fresh(item), b=torch.zeros_like(own.b), scale=own.scale)

    return deal(root[:, None] * v_t, u * root, held, start)


def deal(
    a: Tensor, b: Tensor, held: Sequence[Factors], rest: Callable[[int], Factors]
) -> tuple[Factors, ...]:
    """Return for each device the first slices of ``a`` and of ``b`` over its scale, as float32.

    ``rest``: place in ``held`` -> factors whose slices fill a rank beyond those of ``a`` and ``b``.
    Devices of one rank and scale share the very tensors where nothing is filled in.
    """
    known: dict[tuple[int, float], Factors] = {}
    dealt = []
    for item, own in enumerate(held):
        kind = (own.rank, own.scale)
        if kind not in known:
            known[kind] = Factors(
                a=a[: own.rank].float().contiguous(),
                b=(b[:, : own.rank] / own.scale).float().contiguous(),
                scale=own.scale,
            )
        new = known[kind]
        if own.rank > new.rank:
            filling = rest(item)
            new = Factors(
                a=torch.cat([new.a, filling.a[new.rank :]]),
                b=torch.cat([new.b, filling.b[:, new.rank :]], dim=1),
                scale=own.scale,
            )
        dealt.append(new)
    return tuple(dealt)
