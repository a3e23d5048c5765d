r"""The same problems through cvxpy: slow, independent, for tests and benchmarks only.

Three formulations, none of which uses the Lagrangian conditions of the kernel:

* FDMA, frequencies given, least energy: then t is given too, and with ``y = p/P`` the rate
  ``b log(1 + PG y/b)`` is ``-rel_entr(b, b + PG y)``: a disciplined convex program;
* FDMA, everything free: a disciplined geometric program in (b, t, f, T).  With
  ``(e^z-1)/z = int_0^1 e^{zu} du`` and Gauss-Legendre nodes, transmit energy is
  ``A sum_i w_i exp(u_i a/(b t))``, exact to 1e-13 up to z = 10;
* TDMA: ``B t e^{a/(Bt)}/G`` is an exponential cone: a disciplined convex program.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pwff_solvers.allocation.batch import Batch, FloatArray, per_instance
from pwff_solvers.allocation.errors import InvalidInputError
from pwff_solvers.allocation.objectives import LeastEnergy, Objective, Shortest, Weighted

__all__ = ["OracleSolution", "solve_cvxpy"]

_NODES = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OracleSolution:
    """Optimum by cvxpy: energies and rounds [instance], decisions [instance, device]."""

    energy_j: FloatArray
    round_s: FloatArray
    bandwidth_hz: FloatArray
    upload_s: FloatArray
    frequency_hz: FloatArray


def solve_cvxpy(
    batch: Batch,
    objective: Objective,
    access: str = "fdma",
    frequency_hz: ArrayLike | None = None,
) -> OracleSolution:
    """Solve every instance with cvxpy and Clarabel, one after the other.

    Parameters
    ----------
    batch, objective, access
        As for :func:`pwff_solvers.allocation.solve`.  FDMA needs positive payloads and works.
    frequency_hz : array_like [instance, device], optional
        Frequencies to hold fixed; only with FDMA and ``LeastEnergy``.

    Raises
    ------
    InvalidInputError
        If ``frequency_hz`` comes with another objective, or FDMA with an empty payload or work.
    RuntimeError
        If cvxpy reports no optimum.
    """
    if access == "fdma" and not ((batch.payload_bit > 0).all() and (batch.work_cycles > 0).all()):
        raise InvalidInputError("payload_bit and work_cycles must be positive for the oracle")
    if frequency_hz is not None and not isinstance(objective, LeastEnergy):
        raise InvalidInputError("frequency_hz must be None unless the objective is LeastEnergy")
    count = batch.instances
    target = np.zeros(count)
    if isinstance(objective, LeastEnergy):
        target = per_instance("round_s", objective.round_s, count)
    if isinstance(objective, Weighted):
        target = per_instance("price_of_time_w", objective.price_of_time_w, count)
    rows = []
    for i in range(count):
        one, value = batch.take([i]), float(target[i])
        if access == "tdma":
            rows.append(_tdma(one, objective, value))
        elif frequency_hz is not None:
            f = np.broadcast_to(np.asarray(frequency_hz, float), (count, batch.devices))[i]
            rows.append(_fixed(one, value, f))
        else:
            rows.append(_joint(one, objective, value))
    return OracleSolution(
        energy_j=np.array([r[0] for r in rows]) + batch.fixed_energy_j.sum(1),
        round_s=np.array([r[1] for r in rows]) + batch.fixed_delay_s,
        bandwidth_hz=np.array([r[2] for r in rows]),
        upload_s=np.array([r[3] for r in rows]),
        frequency_hz=np.array([r[4] for r in rows]),
    )


_Row = tuple[float, float, FloatArray, FloatArray, FloatArray]


def _cvxpy() -> Any:
    """cvxpy, imported where it is used: the package runs without it."""
    return import_module("cvxpy")


def _run(problem: Any, **options: Any) -> None:
    cp = _cvxpy()

    problem.solve(solver=cp.CLARABEL, **options)
    if problem.status not in ("optimal", "optimal_inaccurate"):
        raise RuntimeError(f"cvxpy ended with status {problem.status!r}")


def _constants(one: Batch) -> tuple[FloatArray, FloatArray, float]:
    a = one.payload_bit[0] * np.log(2.0)
    g = one.gain[0] / one.noise_psd_w_per_hz[0]
    return a, g, float(one.bandwidth_hz[0])


def _fixed(one: Batch, round_s: float, f: FloatArray) -> _Row:
    cp = _cvxpy()

    a, g, band = _constants(one)
    time = round_s - float(one.fixed_delay_s[0])
    t = time - one.work_cycles[0] / f
    power = one.power_max_w[0]
    b, y = cp.Variable(one.devices), cp.Variable(one.devices)  # shares of B and of P
    noise = power * g / band
    rate = -cp.rel_entr(b, b + cp.multiply(noise, y))
    scale = float((power * t).sum())
    need = a / (t * band)
    # each row in its own unit, or weak and strong devices differ by decades
    limits = [cp.multiply(1 / need, rate) >= 1, cp.sum(b) <= 1, y <= 1, y >= 0]
    problem = cp.Problem(cp.Minimize(cp.sum(cp.multiply(power * t / scale, y))), limits)
    _run(problem, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
    energy = float(problem.value) * scale
    energy += float((one.kappa[0] * one.work_cycles[0] * f**2).sum())
    return energy, time, np.asarray(b.value) * band, t, f


def _joint(one: Batch, objective: Objective, target: float) -> _Row:
    cp = _cvxpy()

    a, g, band = _constants(one)
    work, kappa = one.work_cycles[0], one.kappa[0]
    f_max, f_min = one.frequency_max_hz[0], one.frequency_min_hz[0]
    delay = float(one.fixed_delay_s[0])
    nodes: Any
    weights: Any
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    nodes, weights = ((nodes + 1) / 2).tolist(), (weights / 2).tolist()
    count = one.devices
    b, t = cp.Variable(count, pos=True), cp.Variable(count, pos=True)
    f = cp.Variable(count, pos=True)  # share of f_max
    share = band / count
    alone = a / (share * np.log1p(one.power_max_w[0] * g / share))
    unit = float((work / f_max + alone).max())  # every device in its share of the band
    if isinstance(objective, LeastEnergy):
        unit = target - delay
    time = cp.Variable(pos=True)  # in this unit; t too
    limits: list[Any] = [cp.sum(b) <= 1, f <= 1]
    sends, computes = [], []
    for k in range(count):
        z = float(a[k] / (band * unit)) * b[k] ** -1 * t[k] ** -1
        send = float(a[k] / g[k]) * cp.sum(
            cp.hstack([w * cp.exp(u * z) for u, w in zip(nodes, weights, strict=True)])
        )
        sends.append(send)
        computes.append(float(kappa[k] * work[k] * f_max[k] ** 2) * f[k] ** 2)
        limits.append(send * t[k] ** -1 * float(1 / (unit * one.power_max_w[0, k])) <= 1)
        ends = t[k] + float(work[k] / (f_max[k] * unit)) * f[k] ** -1
        limits.append(ends * time**-1 <= 1)
        if f_min[k] > 0:
            limits.append(f[k] >= float(f_min[k] / f_max[k]))
    energy = cp.sum(cp.hstack(sends + computes))
    cost = energy
    if isinstance(objective, LeastEnergy):
        limits.append(time <= 1)
    elif isinstance(objective, Weighted):
        cost = energy + target * unit * time
    else:
        cost = time
    problem = cp.Problem(cp.Minimize(cost), limits)
    _run(problem, gp=True, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10, max_iter=400)
    return (
        float(energy.value),
        float(time.value) * unit,
        np.asarray(b.value) * band,
        np.asarray(t.value) * unit,
        np.asarray(f.value) * f_max,
    )


def _tdma(one: Batch, objective: Objective, target: float) -> _Row:
    cp = _cvxpy()

    a, g, band = _constants(one)
    work = one.work_cycles[0]
    send, busy = a > 0, work > 0
    delay = float(one.fixed_delay_s[0])
    z_max = np.log1p(one.power_max_w[0] * g / band)
    z_min = np.log1p(one.power_min_w[0] * g / band)
    t_min = np.where(send, a / (band * z_max), 0.0)
    unit = float(t_min.sum() + (work / one.frequency_max_hz[0]).max())
    count = one.devices
    t, u = cp.Variable(count), cp.Variable(count)  # t in units of its own shortest time
    f, deadline = cp.Variable(count), cp.Variable()  # f as a share of f_max
    scale = np.where(send, one.power_max_w[0] * t_min, 0.0)  # energy at full power
    limits: list[Any] = [t >= 1, f <= 1, f >= one.frequency_min_hz[0] / one.frequency_max_hz[0]]
    limits.append(cp.ExpCone(z_max, t, u))  # t e^{z_max/t} <= u
    limits += [t[k] <= float(z_max[k] / z_min[k]) for k in range(count) if z_min[k] > 0]
    for k in np.flatnonzero(busy):
        share = float(work[k] / one.frequency_max_hz[0, k] / unit)
        limits.append(share * cp.inv_pos(f[k]) <= deadline)
    per = scale / np.expm1(z_max)
    dynamic = one.kappa[0] * work * one.frequency_max_hz[0] ** 2
    energy = per @ (u - t) + dynamic @ cp.square(f)
    time = deadline + (t_min / unit) @ t
    limits.append(deadline >= 0)
    unit_j = float(scale.sum() + dynamic.sum()) or 1.0
    if isinstance(objective, LeastEnergy):
        limits.append(time <= (target - delay) / unit)
        cost = energy / unit_j
    elif isinstance(objective, Weighted):
        unit_j = max(unit_j, target * unit)
        cost = (energy + target * unit * time) / unit_j
    elif isinstance(objective, Shortest):
        cost = time
    problem = cp.Problem(cp.Minimize(cost), limits)
    _run(problem, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
    upload = np.where(send, np.asarray(t.value) * t_min, 0.0)
    return (
        float(energy.value),
        float(time.value) * unit,
        np.where(send, band, 0.0),
        upload,
        np.asarray(f.value) * one.frequency_max_hz[0],
    )
