"""FedSA-LoRA averages A and leaves B with its device."""

from __future__ import annotations

from pwff_opt.federated.exchange.rules._rule import Means
from pwff_opt.registry import RULES


class FedSA(Means):
    """Average A; B is trained but stays with its device (FedSA-LoRA: Guo et al., arXiv 2410.01463).

    There is no one model of all devices. Equal ranks only.
    """

    by_slices = True

    def sends(self, round: int) -> tuple[bool, bool]:
        """Return whether A and B are uploaded after this round."""
        return True, False


RULES.add("fedsa", FedSA())
