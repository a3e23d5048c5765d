"""HetLoRA pads factors with zeros to the largest rank and averages them."""

from __future__ import annotations

from dataclasses import dataclass

from pwff_opt.federated.exchange.rules._rule import Case, LoraRule, Merged, normalised
from pwff_opt.registry import RULES


@dataclass(frozen=True, slots=True)
class HetLoRA(LoraRule):
    r"""Pad with zeros to the largest rank, average, and give each device its first slices.

    .. math:: \bar A = \sum_k p_k [A_k; 0], \quad \bar B = \sum_k p_k [s_k B_k, 0], \quad
              A_k' = \bar A_{:r_k}, \quad B_k' = \bar B_{:, :r_k} / s_k

    Cho et al., arXiv 2401.06432, without its pruning of ranks. They have one scale; with several,
    B is averaged as it acts, times its scale. Slices above the rank of every sender stay as they are
    held: as zeros in both factors they would never learn again.

    Parameters
    ----------
    by_norm : use their "sparsity" weights, :math:`p_k \propto \lVert s_k B_k A_k \rVert_F`, in
        place of the numbers of examples.
    """

    by_slices = True

    by_norm: bool = False

    def merged(self, case: Case) -> Merged:
        """Return each device's first slices of the padded averages."""
        import torch

        from pwff_opt.federated.exchange.rules._factors import deal, norm

        norms = [norm(own) for own in case.sent] if self.by_norm else []
        shares = normalised(norms) if any(norms) else case.shares
        a, b = case.sent[0].a, case.sent[0].b
        top = max(own.rank for own in case.sent)
        mean_a = a.new_zeros((top, a.shape[1]), dtype=torch.float64)
        mean_b = b.new_zeros((b.shape[0], top), dtype=torch.float64)
        for own, share in zip(case.sent, shares, strict=True):
            mean_a[: own.rank] += own.a.double() * share
            mean_b[:, : own.rank] += own.b.double() * (share * own.scale)
        return Merged(factors=deal(mean_a, mean_b, case.held, lambda item: case.held[item]))


RULES.add("hetlora", HetLoRA())
RULES.add("hetlora-norm", HetLoRA(by_norm=True))
