"""What the server makes of uploads: plain averages of tensors, and the rules for LoRA factors."""

from pwff_opt.federated.exchange.average import average
from pwff_opt.federated.exchange.rules.factors import Factors, ideal
from pwff_opt.federated.exchange.rules.rules import RULES, LoraRule, Merged

__all__ = ["RULES", "Factors", "LoraRule", "Merged", "average", "ideal"]
