"""FFA-LoRA averages B and never trains A."""

from __future__ import annotations

from pwff_opt.federated.exchange.rules._rule import Means
from pwff_opt.registry import RULES


class FFA(Means):
    r"""Average B; A is fixed, and drawn in common, so that the average is exact.

    :math:`s (\sum_k p_k B_k) A = \Delta W^*` (FFA-LoRA: Sun et al., arXiv 2403.12313). A learns in
    personal layers no more than in aggregated ones, and a change of rank cuts or appends rows of the
    one draw: it is common in every round. Equal ranks only.
    """

    by_slices = True
    also_in_personal_layers = True

    def learns(self, round: int) -> tuple[bool, bool]:
        """Return whether A and B are trained in this round, in aggregated layers."""
        return False, True

    def sends(self, round: int) -> tuple[bool, bool]:
        """Return whether A and B are uploaded after this round."""
        return False, True


RULES.add("ffa", FFA())
