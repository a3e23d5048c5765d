"""What the server makes of uploads: plain averages of tensors, and the rules for LoRA factors."""

from pwff_opt.federated.aggregation.average import average
from pwff_opt.federated.aggregation.factors import Factors, ideal
from pwff_opt.federated.aggregation.rules import RULES, LoraRule, Merged

__all__ = ["RULES", "Factors", "LoraRule", "Merged", "average", "ideal"]
