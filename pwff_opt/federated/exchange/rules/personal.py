"""The LoRA of every device stays its own."""

from __future__ import annotations

from pwff_opt.federated.exchange.rules._rule import Case, LoraRule, Merged
from pwff_opt.registry import RULES


class Personal(LoraRule):
    """Send nothing: every device trains a LoRA of its own, from a start of its own."""

    common_start = False

    def sends(self, round: int) -> tuple[bool, bool]:
        """Return whether A and B are uploaded after this round: never."""
        return False, False

    def merged(self, case: Case) -> Merged:
        """Return what devices hold."""
        return Merged(factors=tuple(case.held))


RULES.add("personal", Personal())
