"""TDMA as an access scheme: devices upload one after another, each in the whole band."""

from __future__ import annotations

import numpy as np

from pwff_solvers.allocation import certificate
from pwff_solvers.allocation.batch import Batch, FloatArray
from pwff_solvers.allocation.objectives import LeastEnergy, Weighted
from pwff_solvers.allocation.point import Point
from pwff_solvers.allocation.scheme import Found, Scheme
from pwff_solvers.allocation.slots import (
    POINT_ENERGY,
    SCALAR_CONVERGED,
    SCALAR_LAM,
    SCALAR_MU,
    SCALAR_TIME,
    SCALARS,
)
from pwff_solvers.allocation.tdma import bracketed as brackets
from pwff_solvers.allocation.tdma import certificate as bounds
from pwff_solvers.allocation.tdma import newton as kernels

__all__ = ["Tdma"]


class Tdma(Scheme):
    """The whole band one after another."""

    name = "tdma"

    def newton(
        self, batch: Batch, objective: type, target: FloatArray, decision: FloatArray
    ) -> Found:
        """Return solutions by Newton; what has not converged comes with an infinite gap."""
        device, cell = batch.device, batch.cell
        instances = device.shape[0]
        # the kernels leave alone what they do not solve
        decision[...] = np.nan
        scalars = np.zeros((instances, SCALARS))
        if objective is LeastEnergy:
            kernels.least_energy_tdma(device, cell, target, decision, scalars)
        elif objective is Weighted:
            kernels.weighted_tdma(device, cell, target, decision, scalars)
        else:
            kernels.shortest_tdma(device, cell, decision, scalars)
        missed = scalars[:, SCALAR_CONVERGED] == 0
        time, lam, mu = scalars[:, SCALAR_TIME], scalars[:, SCALAR_LAM], scalars[:, SCALAR_MU]
        gap, violation = self.certified(batch, objective, target, decision, time, lam, mu)
        gap[missed] = violation[missed] = np.inf
        missing = np.full(instances, np.nan)
        return Found(
            decision=decision,
            energy=decision[:, POINT_ENERGY].sum(axis=1),
            time=time,
            lam=lam,
            mu=mu,
            shortest=missing,
            binding=missing.copy(),
            gap=gap,
            violation=violation,
        )

    def bracketed(
        self, batch: Batch, objective: type, target: FloatArray, blur: FloatArray
    ) -> Point:
        """Return solutions by closed forms, and by a search for the price of time."""
        cell = brackets.TdmaCell(batch, slice(None))
        if objective is LeastEnergy:
            return brackets.least_energy(cell, target - batch.fixed_delay_s, blur)
        return brackets.weighted(cell, target) if objective is Weighted else brackets.shortest(cell)

    def energy_and_bound(
        self,
        batch: Batch,
        point: certificate.Primal,
        multipliers: certificate.Multipliers,
        price_of_time_w: FloatArray | None,
    ) -> tuple[FloatArray, FloatArray]:
        """Return the variable energy [J] and its bound, [instance] each."""
        bound = bounds.energy_bound(batch, point, multipliers, price_of_time_w)
        return certificate.variable_energy(batch, point), bound

    def shortest_bound(self, batch: Batch, point: certificate.Primal) -> FloatArray:
        """Return a lower bound [s] on the shortest round, fixed delay included, [instance]."""
        return bounds.shortest_bound(batch)

    def violation(self, batch: Batch, point: certificate.Primal) -> FloatArray:
        """Return the largest relative violation of any constraint, [instance]; 0 when none."""
        return certificate.violation(batch, point, in_turn=True)
