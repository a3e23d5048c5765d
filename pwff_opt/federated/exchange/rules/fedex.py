"""FedEx-LoRA averages both factors and leaves what that misses in the frozen weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pwff_opt.federated.exchange.rules._rule import Case, Means, Merged
from pwff_opt.registry import RULES


class FedEx(Means):
    r"""Average both factors and leave what that misses in the frozen weight: exact.

    .. math:: \delta = \Delta W^* - s \bar B \bar A

    FedEx-LoRA: Singhal et al., arXiv 2410.09432. Equal ranks only.
    """

    averages = False

    def merged(self, case: Case) -> Merged:
        """Return the averages, and what they miss for the frozen weight."""
        from pwff_opt.federated.exchange.rules._factors import ideal

        averages = super().merged(case)
        own = averages.factors[0]
        # The residual is that of the factors as rounded, so that their rounding is made good too.
        delta = ideal(case.sent, case.shares) - own.scale * (own.b.double() @ own.a.double())
        return replace(averages, delta=delta.float())

    def broadcast_parameters(
        self, ranks: Sequence[int], *, inputs: int, outputs: int, round: int
    ) -> int:
        """Return the size of all factors stacked, or of their means and the residual, if smaller."""
        means = max(ranks) * (inputs + outputs)
        return min(sum(ranks) * (inputs + outputs), means + inputs * outputs)


RULES.add("fedex", FedEx())
