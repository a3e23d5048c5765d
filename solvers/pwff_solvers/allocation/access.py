"""What the allocator must know of a way to share the band: an access scheme."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from pwff_solvers.allocation.allocation import Allocation
from pwff_solvers.allocation.batch import Batch, FloatArray
from pwff_solvers.allocation.certificate import Multipliers, Primal

__all__ = ["LARGEST_GAP", "Access"]

LARGEST_GAP = 1e-6
"""Relative duality gap above which no figure may rest on an allocation, unless its scheme says else."""


@runtime_checkable
class Access(Protocol):
    """How devices share the band: what ``solve`` and the curves ask of a scheme.

    A scheme whose optimum is found by Newton and by a bracketed search, each checked by a
    certificate, fills in :class:`~pwff_solvers.allocation.scheme.Scheme` instead.  Another may solve a
    batch in its own way, or correct what a scheme returns.
    """

    @property
    def name(self) -> str:
        """Return the name in messages."""
        ...

    @property
    def largest_gap(self) -> float:
        """Return the largest relative duality gap that its users may rest figures on."""
        ...

    def require(self, batch: Batch) -> None:
        """Refuse a batch that asks for what the scheme cannot give.

        Raises
        ------
        InvalidInputError
            Naming argument, index, rule and value.
        """
        ...

    def allocate(
        self, batch: Batch, objective: type, target: FloatArray, threads: int
    ) -> Allocation:
        """Return the optimal allocations of a batch, with certificates.

        Parameters
        ----------
        batch : Batch
            Instances that ``require`` has accepted.
        objective : type
            ``Shortest``, ``LeastEnergy`` or ``Weighted``.
        target : array [instance]
            The objective's parameter: ``round_s`` or ``price_of_time_w``; zeros where it has none.
        threads : int
            Pieces of a large batch that are solved at the same time.
        """
        ...

    def energy_bound(
        self,
        batch: Batch,
        point: Primal,
        multipliers: Multipliers,
        price_of_time_w: FloatArray | None,
    ) -> FloatArray:
        """Return a lower bound [J] on the least variable energy, or on energy + price x round.

        Parameters
        ----------
        price_of_time_w : array [instance] or None
            The objective's own price of time; None for least energy within ``point.round_s``.  With a
            price the point must be feasible: what it costs limits the rounds worth a thought.
        """
        ...
