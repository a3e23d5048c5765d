r"""Rules that merge the LoRA factors of many devices, for one projection at a time.

Device k holds :math:`\Delta W_k = s_k B_k A_k`, with A: [rank, inputs], B: [outputs, rank] and the
scale :math:`s_k`; :math:`p_k` are the weights of the senders, normalised here. The ideal average is
:math:`\Delta W^* = \sum_k p_k s_k B_k A_k`. Every sum is taken in float64 and in the order of devices;
results are float32. Where nobody sent anything, devices keep what they hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from pwff_opt.errors import TrainingError
from pwff_opt.federated.exchange.rules.factors import (
    Factors,
    Fresh,
    deal,
    ideal,
    mean,
    norm,
    normalised,
    redistribute,
    stack,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Merged:
    """What devices hold after a round."""

    factors: tuple[Factors, ...]
    """One per entry of ``held``, of the rank and scale it held."""
    delta: Tensor | None = None
    """[outputs, inputs], to be added to the frozen weight of all devices."""


class LoraRule(Protocol):
    """How the LoRA of many devices becomes one."""

    keeps_basis: bool
    """Whether slices mean after a round what they meant before it, so that what rounding has lost of
    one upload can be made good in the next."""
    by_slices: bool
    """Whether a rank that shrinks cuts slices off: devices hold different products, but the rule adds
    up row by row, and an SVD on each device would turn them against one another."""

    def learns(self, round: int) -> tuple[bool, bool]:
        """Return whether A and B are trained in this round, counted from 0, in aggregated layers."""

    def sends(self, round: int) -> tuple[bool, bool]:
        """Return whether A and B are uploaded after this round."""

    def merge(
        self,
        sent: Sequence[Factors],
        weights: Sequence[float],
        held: Sequence[Factors],
        *,
        round: int,
        fresh: Fresh,
    ) -> Merged:
        """Return what every device holds next.

        Parameters
        ----------
        sent : factors of the devices that took part. Those that the rule does not send are not read.
        weights : of ``sent``; they need not sum to one.
        held : what each device holds after its local training, whether it took part or not.
        round : counted from 0.
        fresh : place in ``held`` -> a newly drawn A of that device's rank.
        """


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Case:
    """What a rule merges, as in :meth:`LoraRule.merge`: something was sent, and shares sum to one."""

    sent: Sequence[Factors]
    shares: list[float]
    held: Sequence[Factors]
    round: int
    fresh: Fresh


class _Rule:
    """A and B are trained and sent in every round, unless a rule says otherwise."""

    equal_ranks = False
    """Whether ranks and scales that differ have no meaning for the rule."""
    keeps_basis = True
    by_slices = False

    def learns(self, round: int) -> tuple[bool, bool]:
        return True, True

    def sends(self, round: int) -> tuple[bool, bool]:
        return True, True

    def merge(
        self,
        sent: Sequence[Factors],
        weights: Sequence[float],
        held: Sequence[Factors],
        *,
        round: int,
        fresh: Fresh,
    ) -> Merged:
        if self.equal_ranks:
            self._check_alike((*sent, *held))
        if not sent:
            return Merged(factors=tuple(held))
        shares = normalised(weights)
        return self._merged(_Case(sent=sent, shares=shares, held=held, round=round, fresh=fresh))

    def _merged(self, case: _Case) -> Merged:
        raise NotImplementedError

    def _check_alike(self, factors: Sequence[Factors]) -> None:
        kinds = sorted({(own.rank, own.scale) for own in factors})
        if len(kinds) > 1:
            listed = ", ".join(f"{rank} (scale {scale:g})" for rank, scale in kinds)
            raise TrainingError(
                f"{type(self).__name__} averages LoRA factors of one rank and scale, not of ranks {listed}"
            )


class _Means(_Rule):
    """Every factor that is sent is averaged; the other stays with its device."""

    equal_ranks = True

    def _merged(self, case: _Case) -> Merged:
        with_a, with_b = self.sends(case.round)
        a = mean([own.a for own in case.sent], case.shares).float() if with_a else None
        b = mean([own.b for own in case.sent], case.shares).float() if with_b else None
        return Merged(
            factors=tuple(
                Factors(a=own.a if a is None else a, b=own.b if b is None else b, scale=own.scale)
                for own in case.held
            )
        )


class FedIT(_Means):
    r"""Average both factors: :math:`\bar A = \sum_k p_k A_k`, :math:`\bar B = \sum_k p_k B_k`.

    :math:`s \bar B \bar A` is not :math:`\Delta W^*` (Zhang et al., arXiv 2305.05644). Equal ranks only.
    """


class FFA(_Means):
    r"""Average B; A is fixed, and drawn in common, so that the average is exact.

    :math:`s (\sum_k p_k B_k) A = \Delta W^*` (FFA-LoRA: Sun et al., arXiv 2403.12313). A learns in
    personal layers no more than in aggregated ones, and a change of rank cuts or appends rows of the
    one draw: it is common in every round. Equal ranks only.
    """

    by_slices = True

    def learns(self, round: int) -> tuple[bool, bool]:
        return False, True

    def sends(self, round: int) -> tuple[bool, bool]:
        return False, True


class FedSA(_Means):
    """Average A; B is trained but stays with its device (FedSA-LoRA: Guo et al., arXiv 2410.01463).

    There is no one model of all devices. Equal ranks only.
    """

    by_slices = True

    def sends(self, round: int) -> tuple[bool, bool]:
        return True, False


class RoLoRA(_Means):
    """Train, send and average one factor a round while the other is frozen and common: exact.

    B comes first (rounds 0, 2, ...): as B starts at zero, A has no gradient before it has moved. So
    a layer that is first aggregated in an odd round learns nothing in it, and still uploads its A.
    After personal rounds both factors differ between devices: the first average is not exact, the next
    ones are. Chen et al., arXiv 2409.02346. Equal ranks only.
    """

    def learns(self, round: int) -> tuple[bool, bool]:
        return round % 2 == 1, round % 2 == 0

    def sends(self, round: int) -> tuple[bool, bool]:
        return self.learns(round)


@dataclass(frozen=True, slots=True)
class HetLoRA(_Rule):
    r"""Pad with zeros to the largest rank, average, and give each device its first slices.

    .. math:: \bar A = \sum_k p_k [A_k; 0], \quad \bar B = \sum_k p_k [s_k B_k, 0], \quad
              A_k' = \bar A_{:r_k}, \quad B_k' = \bar B_{:, :r_k} / s_k

    Cho et al., arXiv 2401.06432, without its pruning of ranks. They have one scale; with several,
    B is averaged as it acts, times its scale. Slices above the rank of every sender stay as they are
    held: as zeros in both factors they would never learn again.

    Parameters
    ----------
    by_norm : use their "sparsity" weights, :math:`p_k \propto \lVert s_k B_k A_k \rVert_F`, in
        place of the numbers of examples.
    """

    by_slices = True

    by_norm: bool = False

    def _merged(self, case: _Case) -> Merged:
        norms = [norm(own) for own in case.sent] if self.by_norm else []
        shares = normalised(norms) if any(norms) else case.shares
        a, b = case.sent[0].a, case.sent[0].b
        top = max(own.rank for own in case.sent)
        mean_a = a.new_zeros((top, a.shape[1]), dtype=torch.float64)
        mean_b = b.new_zeros((b.shape[0], top), dtype=torch.float64)
        for own, share in zip(case.sent, shares, strict=True):
            mean_a[: own.rank] += own.a.double() * share
            mean_b[:, : own.rank] += own.b.double() * (share * own.scale)
        return Merged(factors=deal(mean_a, mean_b, case.held, lambda item: case.held[item]))


class FLoRA(_Rule):
    r"""Stack all factors, which is exact, fold the product into the frozen weight, and start anew.

    .. math:: \Delta W^* = [B_1 \dots B_K] \, [p_1 s_1 A_1; \dots; p_K s_K A_K]

    Wang et al., arXiv 2409.05976. Weights go into one side only. The new A is fresh and B zero.
    """

    keeps_basis = False

    def _merged(self, case: _Case) -> Merged:
        return Merged(
            factors=tuple(
                Factors(a=case.fresh(item), b=torch.zeros_like(own.b), scale=own.scale)
                for item, own in enumerate(case.held)
            ),
            delta=ideal(case.sent, case.shares).float(),
        )


class FlexLoRA(_Rule):
    r"""Give each device the best approximation of :math:`\Delta W^*` that its rank allows.

    .. math:: \Delta W^* = U \Sigma V^T, \quad A_k' = \Sigma_{r_k}^{1/2} V_{r_k}^T, \quad
              B_k' = U_{r_k} \Sigma_{r_k}^{1/2} / s_k

    Bai et al., arXiv 2402.11505; see :func:`~pwff_opt.federated.exchange.rules.factors.redistribute`.
    """

    keeps_basis = False

    def _merged(self, case: _Case) -> Merged:
        left, right = stack(case.sent, case.shares)
        return Merged(factors=redistribute(left, right, case.held, case.fresh))


class FedEx(_Means):
    r"""Average both factors and leave what that misses in the frozen weight: exact.

    .. math:: \delta = \Delta W^* - s \bar B \bar A

    FedEx-LoRA: Singhal et al., arXiv 2410.09432. Equal ranks only.
    """

    def _merged(self, case: _Case) -> Merged:
        averages = super()._merged(case)
        own = averages.factors[0]
        # The residual is that of the factors as rounded, so that their rounding is made good too.
        delta = ideal(case.sent, case.shares) - own.scale * (own.b.double() @ own.a.double())
        return replace(averages, delta=delta.float())


class RaFLoRA(_Rule):
    r"""Average each rank slice over the devices that have it, then redistribute as FlexLoRA does.

    .. math:: \Delta W = \sum_i \sum_{k: r_k \ge i} p_{ki} s_k B_k^{(i)} A_k^{(i)}, \quad
              p_{ki} = w_k / \sum_{j: r_j \ge i} w_j

    with :math:`B^{(i)} A^{(i)}` the product of the i-th column and row. Low ranks then do not dilute
    the high slices (Wu et al., arXiv 2602.13486). The paper cuts slices at the configured ranks; as
    every device's rank is one of those, the devices that have a slice are the same i by i.
    """

    keeps_basis = False

    def _merged(self, case: _Case) -> Merged:
        present = [0.0] * max(own.rank for own in case.sent)
        for own, share in zip(case.sent, case.shares, strict=True):
            for i in range(own.rank):
                present[i] += share
        # A slice whose only holders weigh nothing has no average: it is left out.
        slices = [
            torch.tensor(
                [share / present[i] if present[i] > 0 else 0.0 for i in range(own.rank)],
                dtype=torch.float64,
                device=own.a.device,
            )[:, None]
            for own, share in zip(case.sent, case.shares, strict=True)
        ]
        left, right = stack(case.sent, slices)
        return Merged(factors=redistribute(left, right, case.held, case.fresh))


RULES: Mapping[str, LoraRule] = MappingProxyType(
    {
        "fedit": FedIT(),
        "ffa": FFA(),
        "fedsa": FedSA(),
        "rolora": RoLoRA(),
        "hetlora": HetLoRA(),
        "hetlora-norm": HetLoRA(by_norm=True),
        "flora": FLoRA(),
        "flexlora": FlexLoRA(),
        "fedex": FedEx(),
        "raflora": RaFLoRA(),
    }
)
"""By the names of ``[aggregation] lora``; "personal" needs none."""
