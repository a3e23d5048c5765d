"""raFLoRA averages each rank slice over the devices that have it."""

from __future__ import annotations

from pwff_opt.federated.exchange.rules._rule import Case, LoraRule, Merged
from pwff_opt.registry import RULES


class RaFLoRA(LoraRule):
    r"""Average each rank slice over the devices that have it, then redistribute as FlexLoRA does.

    .. math:: \Delta W = \sum_i \sum_{k: r_k \ge i} p_{ki} s_k B_k^{(i)} A_k^{(i)}, \quad
              p_{ki} = w_k / \sum_{j: r_j \ge i} w_j

    with :math:`B^{(i)} A^{(i)}` the product of the i-th column and row. Low ranks then do not dilute
    the high slices (Wu et al., arXiv 2602.13486). The paper cuts slices at the configured ranks; as
    every device's rank is one of those, the devices that have a slice are the same i by i.
    """

    keeps_basis = False

    def merged(self, case: Case) -> Merged:
        """Return the truncated SVD of the average by slices, at each device's rank."""
        import torch

        from pwff_opt.federated.exchange.rules._factors import redistribute, stack

        present = [0.0] * max(own.rank for own in case.sent)
        for own, share in zip(case.sent, case.shares, strict=True):
            for i in range(own.rank):
                present[i] += share
        # A slice whose only holders weigh nothing has no average: it is left out.
        slices = [
            torch.tensor(
                [share / present[i] if present[i] > 0 else 0.0 for i in range(own.rank)],
                dtype=torch.float64,
                device=own.a.device,
            )[:, None]
            for own, share in zip(case.sent, case.shares, strict=True)
        ]
        left, right = stack(case.sent, slices)
        return Merged(factors=redistribute(left, right, case.held, case.fresh))


RULES.add("raflora", RaFLoRA())
