"""FedIT averages both factors."""

from __future__ import annotations

from pwff_opt.federated.exchange.rules._rule import Means
from pwff_opt.registry import RULES


class FedIT(Means):
    r"""Average both factors: :math:`\bar A = \sum_k p_k A_k`, :math:`\bar B = \sum_k p_k B_k`.

    :math:`s \bar B \bar A` is not :math:`\Delta W^*` (Zhang et al., arXiv 2305.05644). Equal ranks only.
    """


RULES.add("fedit", FedIT())
