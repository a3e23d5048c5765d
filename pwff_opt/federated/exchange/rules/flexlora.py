"""FlexLoRA gives each device a truncated SVD of the exact average."""

from __future__ import annotations

from pwff_opt.federated.exchange.rules._rule import Case, LoraRule, Merged
from pwff_opt.registry import RULES


class FlexLoRA(LoraRule):
    r"""Give each device the best approximation of :math:`\Delta W^*` that its rank allows.

    .. math:: \Delta W^* = U \Sigma V^T, \quad A_k' = \Sigma_{r_k}^{1/2} V_{r_k}^T, \quad
              B_k' = U_{r_k} \Sigma_{r_k}^{1/2} / s_k

    Bai et al., arXiv 2402.11505; see :func:`~pwff_opt.federated.exchange.rules._factors.redistribute`.
    """

    keeps_basis = False

    def merged(self, case: Case) -> Merged:
        """Return the truncated SVD of the exact average, at each device's rank."""
        from pwff_opt.federated.exchange.rules._factors import redistribute, stack

        left, right = stack(case.sent, case.shares)
        return Merged(factors=redistribute(left, right, case.held, case.fresh))


RULES.add("flexlora", FlexLoRA())
