"""Access schemes that are solved by Newton, certified, and searched where Newton is not enough."""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pwff_solvers.allocation import certificate, registers
from pwff_solvers.allocation.access import LARGEST_GAP
from pwff_solvers.allocation.allocation import Allocation, Status
from pwff_solvers.allocation.batch import Batch, FloatArray
from pwff_solvers.allocation.certificate import GAP_TOLERANCE, VIOLATION_TOLERANCE
from pwff_solvers.allocation.objectives import LeastEnergy, Shortest, Weighted
from pwff_solvers.allocation.point import Point
from pwff_solvers.allocation.slots import (
    CELL_DELAY,
    POINT_BAND,
    POINT_COMPUTE,
    POINT_ENERGY,
    POINT_FREQUENCY,
    POINT_POWER,
    POINT_UPLOAD,
    POINTS,
)
from pwff_solvers.compiled.switch import COMPILED

__all__ = ["Found", "Scheme"]

# About this many devices are searched at once, so that the working arrays stay in the cache.
_CHUNK = 8192
# About this many devices make a piece of work for a thread.
_PIECE = 65536


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Found:
    """Solutions with their certificates, [instance] except ``decision`` [instance, 6, device].

    The rows of ``decision``: bandwidth, power, frequency, upload, compute, energy.  ``time`` is the
    round without the fixed delay, NaN where infeasible.
    """

    decision: FloatArray
    energy: FloatArray
    time: FloatArray
    lam: FloatArray
    mu: FloatArray
    shortest: FloatArray
    binding: FloatArray
    gap: FloatArray
    violation: FloatArray
    perfect: bool = False  # known to be good everywhere

    @staticmethod
    def joined(parts: list[Found], decision: FloatArray | None = None) -> Found:
        """Return the parts as one; ``decision`` if theirs lie side by side in it already."""
        names = [f.name for f in fields(Found) if f.name not in ("perfect", "decision")]
        arrays: dict[str, Any] = {n: np.concatenate([getattr(p, n) for p in parts]) for n in names}
        if decision is None:
            decision = np.concatenate([p.decision for p in parts])
        return Found(**arrays, decision=decision, perfect=all(p.perfect for p in parts))

    def good(self) -> NDArray[np.bool_]:
        """Return where the certificate is within its tolerances."""
        result: NDArray[np.bool_] = (
            (np.abs(self.gap) <= GAP_TOLERANCE)
            & (np.isnan(self.time) | (self.violation <= VIOLATION_TOLERANCE))
            & (np.isnan(self.time) | np.isfinite(self.energy + self.lam + self.mu))
        )
        return result

    def improve(self, rows: NDArray[np.int64], other: Found) -> None:
        """Overwrite ``rows`` by another attempt where it is nearer to its tolerances, or good."""
        mine = np.maximum(np.abs(self.gap[rows]), 10.0 * self.violation[rows])
        theirs = np.where(
            np.isnan(other.time), 0.0, np.maximum(np.abs(other.gap), 10.0 * other.violation)
        )
        better = ~(mine <= theirs)
        for f in fields(self):
            if f.name != "perfect":
                getattr(self, f.name)[rows[better]] = getattr(other, f.name)[better]

    def allocation(self, batch: Batch, objective: type, target: FloatArray) -> Allocation:
        """Return the result for the user; ``batch`` and ``target`` give the fixed parts."""
        instances = self.time.size
        status = np.zeros(instances, dtype=np.int8)
        binding = np.full(instances, -1, dtype=np.int64)
        # a given round is returned as given: adding the delay back would change its last bit
        given = objective is LeastEnergy
        round_s = target if given else self.time + batch.cell[:, CELL_DELAY]
        if not self.perfect:
            # no point is no proof: only a shortest round that is certified to be longer is one
            late = (self.shortest + batch.cell[:, CELL_DELAY]) * (1.0 - np.abs(self.gap)) > target
            infeasible = np.isnan(self.time) & late & (objective is LeastEnergy)
            binding = np.where(infeasible, self.binding, -1).astype(np.int64)
            round_s = np.where(np.isnan(self.time), np.nan, round_s)
            status[~self.good() | np.isnan(self.time)] = Status.INACCURATE
            status[infeasible] = Status.INFEASIBLE
        return Allocation(
            bandwidth_hz=self.decision[:, POINT_BAND],
            power_w=self.decision[:, POINT_POWER],
            frequency_hz=self.decision[:, POINT_FREQUENCY],
            upload_s=self.decision[:, POINT_UPLOAD],
            compute_s=self.decision[:, POINT_COMPUTE],
            device_energy_j=self.decision[:, POINT_ENERGY],
            energy_j=self.energy,
            round_s=round_s,
            price_of_bandwidth_j_per_hz=self.lam,
            # at a kink a range of prices supports the point, the one asked for among them
            price_of_time_w=target if objective is Weighted else self.mu,
            status=status,
            shortest_round_s=round_s
            if objective is Shortest
            else self.shortest + batch.cell[:, CELL_DELAY],
            binding_device=binding,
            gap=self.gap,
            violation=self.violation,
        )


class Scheme(ABC):
    """An access scheme whose problem is convex: it fills in Newton, the search and the bounds.

    It is an :class:`~pwff_solvers.allocation.access.Access`.  ``objective`` is always ``Shortest``,
    ``LeastEnergy`` or ``Weighted``, and ``target`` [instance] the parameter of the last two.
    """

    name: str
    largest_gap = LARGEST_GAP

    def require(self, batch: Batch) -> None:  # noqa: B027
        """Refuse a batch that asks for what the scheme cannot give; nothing is refused here."""

    @abstractmethod
    def newton(
        self, batch: Batch, objective: type, target: FloatArray, decision: FloatArray
    ) -> Found:
        """Return solutions by compiled Newton, certified; fill ``decision``.

        What has not converged comes with an infinite gap.
        """

    @abstractmethod
    def bracketed(
        self, batch: Batch, objective: type, target: FloatArray, blur: FloatArray
    ) -> Point:
        """Return solutions by a bracketed search in plain numpy.

        ``blur`` [instance]: by how much time [s] a given round is uncertain.
        """

    @abstractmethod
    def energy_and_bound(
        self,
        batch: Batch,
        point: certificate.Primal,
        multipliers: certificate.Multipliers,
        price_of_time_w: FloatArray | None,
    ) -> tuple[FloatArray, FloatArray]:
        """Return the variable energy [J] and the bound of ``energy_bound``, [instance] each."""

    @abstractmethod
    def shortest_bound(self, batch: Batch, point: certificate.Primal) -> FloatArray:
        """Return a lower bound [s] on the shortest round, fixed delay included, [instance]."""

    @abstractmethod
    def violation(self, batch: Batch, point: certificate.Primal) -> FloatArray:
        """Return the largest relative violation of any constraint, [instance]; 0 when none."""

    # --- what follows from them -------------------------------------------------------------------

    def energy_bound(
        self,
        batch: Batch,
        point: certificate.Primal,
        multipliers: certificate.Multipliers,
        price_of_time_w: FloatArray | None,
    ) -> FloatArray:
        """Return a lower bound [J] on the least variable energy, or on energy + price x round.

        Parameters
        ----------
        price_of_time_w : array [instance] or None
            The objective's own price of time; None for least energy within ``point.round_s``.  With a
            price the point must be feasible: what it costs limits the rounds worth a thought.
        """
        return self.energy_and_bound(batch, point, multipliers, price_of_time_w)[1]

    def energy_gap(
        self,
        batch: Batch,
        point: certificate.Primal,
        multipliers: certificate.Multipliers,
        price_of_time_w: FloatArray | None,
    ) -> FloatArray:
        """Return the relative gap (value - bound)/value of :meth:`energy_bound`, [instance].

        The nearer a round is to the shortest, the higher its price: rounding alone opens the gap
        there.
        """
        value, bound = self.energy_and_bound(batch, point, multipliers, price_of_time_w)
        if price_of_time_w is not None:
            value = value + price_of_time_w * point.round_s
        gap = (value - bound) / np.where(value != 0, np.abs(value), 1.0)
        return gap

    def shortest_gap(self, batch: Batch, point: certificate.Primal) -> FloatArray:
        """Return the relative gap of :meth:`shortest_bound`, [instance]."""
        value = point.round_s
        bound = self.shortest_bound(batch, point)
        return np.asarray((value - bound) / np.where(value != 0, value, 1.0))

    def allocate(
        self, batch: Batch, objective: type, target: FloatArray, threads: int
    ) -> Allocation:
        """Return the optimal allocations of a batch, with certificates."""
        # the pieces are the same for any number of threads, and so is the result to the last bit
        size = max(registers.LANES, _PIECE // batch.devices // registers.LANES * registers.LANES)
        pieces = [slice(i, i + size) for i in range(0, max(batch.instances, 1), size)]
        decision = np.empty((batch.instances, POINTS, batch.devices))
        if len(pieces) == 1:
            found = self._piece(batch, objective, target, decision)
        else:

            def solve_rows(rows: slice) -> Found:
                return self._piece(batch.take(rows), objective, target[rows], decision[rows])

            if threads == 1:
                found = Found.joined([solve_rows(rows) for rows in pieces], decision)
            else:
                with ThreadPoolExecutor(threads) as pool:
                    found = Found.joined(list(pool.map(solve_rows, pieces)), decision)
        return found.allocation(batch, objective, target)

    def _piece(
        self, batch: Batch, objective: type, target: FloatArray, decision: FloatArray
    ) -> Found:
        """Solve by Newton, certify, and search anew for what is not perfect; fill ``decision``."""
        with np.errstate(all="ignore"):  # here, for it holds for a thread only
            if not COMPILED:
                found = self.search(batch, objective, target)
                decision[...] = found.decision
                return replace(found, decision=decision)
            found = self.newton(batch, objective, target, decision)
            if not found.perfect:
                rest = np.flatnonzero(~found.good())
                found.improve(rest, self.search(batch.take(rest), objective, target[rest]))
            return found

    def search(self, batch: Batch, objective: type, target: FloatArray) -> Found:
        """Return solutions by bracketed searches: slow, and stopped by nothing."""
        # so many devices at once that the working arrays stay in the cache
        size = max(1, _CHUNK // batch.devices)
        pieces = [slice(i, i + size) for i in range(0, batch.instances, size)]
        if len(pieces) > 1:
            return Found.joined([self.search(batch.take(r), objective, target[r]) for r in pieces])
        # what taking the fixed delay off can have cost in digits
        blur = 4.0 * np.finfo(np.float64).eps * batch.fixed_delay_s
        point = self.bracketed(batch, objective, target, blur)
        b, z, t, f = point.b.T, point.z.T, point.t.T, point.f.T
        work = batch.work_cycles
        power = b * np.expm1(z) * batch.noise_psd_w_per_hz[:, None] / batch.gain
        compute = np.where(work > 0, work / f, 0.0 * f)
        energy = power * t + batch.kappa * work * f**2 + batch.fixed_energy_j
        decision = np.stack([b, power, f, t, compute, energy], axis=1)
        lam, mu = point.price_of_bandwidth, point.price_of_time
        gap, worst = self.certified(batch, objective, target, decision, point.time, lam, mu)
        infeasible = np.isnan(point.time)
        if infeasible.any():
            shortest = point.shortest + batch.fixed_delay_s
            rows = np.flatnonzero(infeasible)
            gap[rows] = self._infeasible_gap(batch, shortest, rows)
        return Found(
            decision=decision,
            energy=energy.sum(axis=1),
            time=point.time,
            lam=lam,
            mu=mu,
            shortest=point.shortest if objective is LeastEnergy else np.nan * point.time,
            binding=point.binding.astype(float),
            gap=gap,
            violation=np.where(infeasible, np.nan, worst),
        )

    def certified(
        self,
        batch: Batch,
        objective: type,
        target: FloatArray,
        decision: FloatArray,
        time: FloatArray,
        lam: FloatArray,
        mu: FloatArray,
    ) -> tuple[FloatArray, FloatArray]:
        """Return the relative duality gap and the largest violation of a point, [instance] each."""
        round_s = time + batch.cell[:, CELL_DELAY]
        if objective is LeastEnergy:
            # as given: adding the delay back would change its last bit
            round_s = np.where(np.isnan(time), np.nan, target)
        point = certificate.Primal.packed(decision, round_s)
        worst = self.violation(batch, point)
        if objective is Shortest:
            return self.shortest_gap(batch, point), worst
        price = target if objective is Weighted else None
        prices = certificate.Multipliers(bandwidth_j_per_hz=lam, time_w=mu)
        return self.energy_gap(batch, point, prices, price), worst

    def _infeasible_gap(
        self, batch: Batch, shortest: FloatArray, rows: NDArray[np.int64]
    ) -> FloatArray:
        """Return the gap of the shortest round of infeasible instances, by solving for it anew."""
        part = batch.take(rows)
        found = self.allocate(part, Shortest, np.zeros(rows.size), 1)
        gap = 1.0 - found.round_s * (1.0 - found.gap) / shortest[rows]
        return gap + np.where(found.violation > VIOLATION_TOLERANCE, np.inf, 0.0)
