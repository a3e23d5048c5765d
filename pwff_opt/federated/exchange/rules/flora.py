"""FLoRA stacks all factors and folds their product into the frozen weight."""

from __future__ import annotations

from collections.abc import Sequence

from pwff_opt.federated.exchange.rules._rule import Case, Factors, LoraRule, Merged
from pwff_opt.registry import RULES


class FLoRA(LoraRule):
    r"""Stack all factors, which is exact, fold the product into the frozen weight, and start anew.

    .. math:: \Delta W^* = [B_1 \dots B_K] \, [p_1 s_1 A_1; \dots; p_K s_K A_K]

    Wang et al., arXiv 2409.05976. Weights go into one side only. The new A is fresh and B zero.
    """

    keeps_basis = False

    def merged(self, case: Case) -> Merged:
        """Return new factors, and the exact average for the frozen weight."""
        import torch

        from pwff_opt.federated.exchange.rules._factors import ideal

        return Merged(
            factors=tuple(
                Factors(a=case.fresh(item), b=torch.zeros_like(own.b), scale=own.scale)
                for item, own in enumerate(case.held)
            ),
            delta=ideal(case.sent, case.shares).float(),
        )

    def broadcast_parameters(
        self, ranks: Sequence[int], *, inputs: int, outputs: int, round: int
    ) -> int:
        """Return the size of all factors stacked, or of their product, whichever is smaller."""
        return min(sum(ranks) * (inputs + outputs), inputs * outputs)


RULES.add("flora", FLoRA())
