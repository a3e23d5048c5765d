r"""Rules that merge the LoRA factors of many devices, for one projection at a time; one file a rule.

Device k holds :math:`\Delta W_k = s_k B_k A_k`, with A: [rank, inputs], B: [outputs, rank] and the
scale :math:`s_k`; :math:`p_k` are the weights of the senders, normalised here. The ideal average is
:math:`\Delta W^* = \sum_k p_k s_k B_k A_k`. Every sum is taken in float64 and in the order of devices;
results are float32. Where nobody sent anything, devices keep what they hold.

A rule is a :class:`LoraRule`: it states its facts as attributes and methods, and the scenario, the costs,
the trainer and the exchange ask it. Each module adds its rules to ``pwff_opt.registry.RULES``; none
imports torch before it merges.
"""

from pwff_opt.federated.exchange.rules._rule import Case, Factors, Fresh, LoraRule, Means, Merged

__all__ = ["Case", "Factors", "Fresh", "LoraRule", "Means", "Merged"]
