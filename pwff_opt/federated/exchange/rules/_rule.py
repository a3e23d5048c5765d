"""What every rule is: its facts, which scenario, costs and trainer ask for, and how it merges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pwff_opt.errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor

Fresh = Callable[[int], "Tensor"]
"""Place in ``held`` -> a newly drawn A of that device's rank."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Factors:
    """What one device holds for one projection: dW = scale * b @ a."""

    a: Tensor
    """[rank, inputs]"""
    b: Tensor
    """[outputs, rank]"""
    scale: float

    @property
    def rank(self) -> int:
        """The number of slices, rows of ``a`` and columns of ``b``."""
        return self.a.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Merged:
    """What devices hold after a round."""

    factors: tuple[Factors, ...]
    """One per entry of ``held``, of the rank and scale it held."""
    delta: Tensor | None = None
    """[outputs, inputs], to be added to the frozen weight of all devices."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """What a rule merges, as in :meth:`LoraRule.merge`: something was sent, and shares sum to one."""

    sent: Sequence[Factors]
    shares: list[float]
    held: Sequence[Factors]
    round: int
    fresh: Fresh


class LoraRule:
    """How the LoRA of many devices becomes one.

    A rule is a class of its own that changes the facts which differ, and says in :meth:`merged` what
    becomes of the factors. A and B are trained and sent in every round, unless a rule says otherwise.
    """

    period: int = 1
    """Number of rounds after which :meth:`learns` and :meth:`sends` repeat."""
    also_in_personal_layers: bool = False
    """Whether personal layers, too, learn only what :meth:`learns` says; otherwise they learn both factors.
    It is for a rule whose fixed factor must stay common: once learned, it would differ between devices."""
    equal_ranks: bool = False
    """Whether ranks and scales that differ between devices have no meaning for the rule."""
    averages: bool = False
    """Whether the rule averages factors and does nothing else, so that noise and server optimisers can act
    on the averages, and what was sent to all is known at one rank."""
    keeps_basis: bool = True
    """Whether slices mean after a round what they meant before it, so that what rounding has lost of
    one upload can be made good in the next."""
    by_slices: bool = False
    """Whether a rank that shrinks cuts slices off: devices hold different products, but the rule adds
    up row by row, and an SVD on each device would turn them against one another."""
    common_start: bool = True
    """Whether all devices draw one and the same new A; otherwise each draws its own."""

    def learns(self, round: int) -> tuple[bool, bool]:
        """Return whether A and B are trained in this round, counted from 0, in aggregated layers."""
        return True, True

    def sends(self, round: int) -> tuple[bool, bool]:
        """Return whether A and B are uploaded after this round, from aggregated layers."""
        return True, True

    def trains(self, round: int, *, aggregated: bool) -> tuple[bool, bool]:
        """Return whether A and B are trained in this round in a layer that is aggregated, or personal."""
        return self.learns(round) if aggregated or self.also_in_personal_layers else (True, True)

    @property
    def aggregates(self) -> bool:
        """Whether anything is ever sent."""
        return any(any(self.sends(round)) for round in range(self.period))

    def broadcast_parameters(
        self, ranks: Sequence[int], *, inputs: int, outputs: int, round: int
    ) -> int:
        r"""Return the number of parameters that the server sends to all for one projection.

        By default the factors that are sent, at the largest rank: a device cuts its part out.

        Parameters
        ----------
        ranks : of the devices that take part.
        inputs, outputs : width of the projection's input and output.
        round : counted from 0.
        """
        with_a, with_b = self.sends(round)
        return max(ranks) * (with_a * inputs + with_b * outputs)

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
        if self.equal_ranks:
            self._check_alike((*sent, *held))
        if not sent:
            return Merged(factors=tuple(held))
        shares = normalised(weights)
        return self.merged(Case(sent=sent, shares=shares, held=held, round=round, fresh=fresh))

    def merged(self, case: Case) -> Merged:
        """Return what every device holds next, where somebody sent something."""
        raise NotImplementedError

    def _check_alike(self, factors: Sequence[Factors]) -> None:
        kinds = sorted({(own.rank, own.scale) for own in factors})
        if len(kinds) > 1:
            listed = ", ".join(f"{rank} (scale {scale:g})" for rank, scale in kinds)
            raise TrainingError(
                f"{type(self).__name__} averages LoRA factors of one rank and scale, not of ranks {listed}"
            )


class Means(LoraRule):
    """Every factor that is sent is averaged; the other stays with its device."""

    equal_ranks = True
    averages = True

    def merged(self, case: Case) -> Merged:
        """Return the factors that are sent as their weighted means."""
        from pwff_opt.federated.exchange.rules._factors import mean

        with_a, with_b = self.sends(case.round)
        a = mean([own.a for own in case.sent], case.shares).float() if with_a else None
        b = mean([own.b for own in case.sent], case.shares).float() if with_b else None
        return Merged(
            factors=tuple(
                Factors(a=own.a if a is None else a, b=own.b if b is None else b, scale=own.scale)
                for own in case.held
            )
        )


def normalised(weights: Sequence[float]) -> list[float]:
    """Return weights that sum to one."""
    total = sum(weights)
    if not total > 0:
        raise TrainingError(f"the weights of LoRA uploads sum to {total:g}; they must be positive")
    return [weight / total for weight in weights]
