"""RoLoRA trains and averages one factor a round, in turn."""

from __future__ import annotations

from pwff_opt.federated.exchange.rules._rule import Means
from pwff_opt.registry import RULES


class RoLoRA(Means):
    """Train, send and average one factor a round while the other is frozen and common: exact.

    B comes first (rounds 0, 2, ...): as B starts at zero, A has no gradient before it has moved. So
    a layer that is first aggregated in an odd round learns nothing in it, and still uploads its A.
    After personal rounds both factors differ between devices: the first average is not exact, the next
    ones are. Chen et al., arXiv 2409.02346. Equal ranks only.
    """

    period = 2

    def learns(self, round: int) -> tuple[bool, bool]:
        """Return whether A and B are trained in this round, in aggregated layers."""
        return round % 2 == 1, round % 2 == 0

    def sends(self, round: int) -> tuple[bool, bool]:
        """Return whether A and B are uploaded after this round."""
        return self.learns(round)


RULES.add("rolora", RoLoRA())
