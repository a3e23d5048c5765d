r"""The same problems through cvxpy and Clarabel: for users who doubt, for tests and as a rival.

None of these formulations uses the Lagrangian conditions of the kernel.  The two with FDMA are
compiled once, with parameters (DPP), and solved again for as many instances as one likes:

* :class:`CvxpyFixed`, frequencies given, hence t given: with ``beta = b/need``, ``need = a/(B t)``
  and ``y = p/P`` the rate ``b log(1 + P G y/b)`` becomes the exponential cone
  ``beta e^{1/beta} <= beta + snr y``.
* :class:`CvxpyJoint`, everything free, convex in natural variables: ``z >= a/(b t)`` is a chain of
  three second-order cones, the transmit energy is ``(a/G) phi(z)``, ``phi(z) = (e^z - 1)/z``, and
  the power limit ``energy <= P t`` is linear in it.  ``phi`` itself has no exact cone that we know
  of; ``phi(z) = int_0^1 e^{uz} du`` leads to ``sum_i w_i e^{u_i z}``, one exponential cone a node,
  where Gauss-Legendre needs ten nodes for what five fitted ones give (2.2e-7 for z <= 18).

With TDMA, ``B t e^{a/(Bt)}/G`` is an exponential cone and nothing is approximated.

Energies are evaluated from the definition at the decision that the solver returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pwff_solvers.allocation.batch import Batch, FloatArray
from pwff_solvers.allocation.checks import Rule, check, per_instance
from pwff_solvers.allocation.objectives import LeastEnergy, Objective, Shortest, Weighted
from pwff_solvers.errors import InvalidInputError

__all__ = ["CvxpyFixed", "CvxpyJoint", "OracleSolution", "OracleSolve", "solve_cvxpy"]

# phi(z) = sum_i _WEIGHTS[i] exp(_NODES[i] z): least largest relative error, 2.2e-7, on [0, _Z_MAX]
_NODES = np.array([0.0915666166, 0.3782845524, 0.6662568372, 0.8675362925, 0.9753111638])
_WEIGHTS = np.array([0.21993461047, 0.31388795148, 0.24920257604, 0.15333137933, 0.06364326349])
_Z_MAX = 18.0
_BUSY: Rule = ("positive for cvxpy with FDMA", lambda x: x > 0)
# Tighter than Clarabel's own 1e-8; _solve_instance goes back to that where it makes no progress.
_TIGHT = {"tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11, "max_iter": 400}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OracleSolution:
    """Optimum by cvxpy: energies and rounds [instance], decisions [instance, device]."""

    energy_j: FloatArray
    round_s: FloatArray
    bandwidth_hz: FloatArray
    upload_s: FloatArray
    frequency_hz: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OracleSolve:
    """What one call of the solver came to; NaN where it found no point.

    Attributes
    ----------
    status : str
        cvxpy's: ``"optimal"``, ``"optimal_inaccurate"``, ``"solver_error"``, ``"infeasible"``, ...
    energy_j, round_s : float
        Energy [J] and round [s], fixed parts included.
    bandwidth_hz, upload_s, frequency_hz : array [device]
        The decision.
    solver_s : float
        Clarabel's own share of the time [s]; the rest is cvxpy's.
    """

    status: str
    energy_j: float
    round_s: float
    bandwidth_hz: FloatArray
    upload_s: FloatArray
    frequency_hz: FloatArray
    solver_s: float

    @property
    def found(self) -> bool:
        """Return True where the solver found a point that it calls optimal or nearly so."""
        return self.status in ("optimal", "optimal_inaccurate")


class CvxpyFixed:
    """Least energy with FDMA at given frequencies, compiled once.

    Parameters
    ----------
    devices : int
        Number of devices of every instance to come.
    **options
        Clarabel's settings; its defaults without.
    """

    def __init__(self, devices: int, **options: Any) -> None:
        cp = _cvxpy()
        self._options = options
        self._need, self._snr, self._cost = (cp.Parameter(devices) for _ in range(3))
        self._beta, power = cp.Variable(devices), cp.Variable(devices)  # power as a share of P
        received = self._beta + cp.multiply(self._snr, power)
        limits = [
            cp.ExpCone(np.ones(devices), self._beta, received),
            self._need @ self._beta <= 1,
            power <= 1,
        ]
        self._problem = cp.Problem(cp.Minimize(self._cost @ power), limits)

    def solve(self, batch: Batch, i: int, target: float) -> OracleSolve:
        """Solve instance ``i`` for a round of ``target`` s at its ``frequency_max_hz``."""
        a, g, band = _constants(batch, i)
        f = batch.frequency_max_hz[i]
        upload = target - batch.fixed_delay_s[i] - batch.work_cycles[i] / f
        if (upload <= 0).any():
            return _failure(batch, "infeasible")
        need = a / (upload * band)
        energy_full = batch.power_max_w[i] * upload
        self._need.value = need
        self._snr.value = batch.power_max_w[i] * g / (band * need)
        self._cost.value = energy_full / energy_full.sum()
        status, seconds = _run(self._problem, self._options)
        if self._beta.value is None:
            return _failure(batch, status)
        return _point(batch, i, status, seconds, target, self._beta.value * need * band, upload, f)


class CvxpyJoint:
    """Any objective with FDMA, everything free, compiled once.

    Parameters
    ----------
    devices : int
        Number of devices of every instance to come.
    kind : type
        ``LeastEnergy``, ``Weighted`` or ``Shortest``.
    **options
        Clarabel's settings; its defaults without.
    """

    def __init__(self, devices: int, kind: type[Objective], **options: Any) -> None:
        cp = _cvxpy()
        self._kind, self._options = kind, options
        one, nodes = np.ones(devices), (_NODES.size, devices)
        self._need, self._fast, self._slow = (cp.Parameter(devices) for _ in range(3))
        self._shift, self._weights = cp.Parameter(devices), cp.Parameter(nodes)
        self._send_cost, self._compute_cost = cp.Parameter(devices), cp.Parameter(devices)
        self._time_cost = cp.Parameter()
        # beta = b/(B need); times in units of the round (or, if it is free, of a guess at it);
        # compute in units of the least; frequency as a share of the largest
        self._beta, self._upload, z = (cp.Variable(devices) for _ in range(3))
        compute, self._frequency = cp.Variable(devices), cp.Variable(devices)
        area, root = cp.Variable(devices), cp.Variable(devices)
        send = cp.Variable(devices)  # energy, in units of full power all the time
        exponentials = cp.Variable(nodes)
        self._time: Any = 1.0 if kind is LeastEnergy else cp.Variable()

        def cone(x: Any, y: Any, h: Any) -> Any:  # h^2 <= x y
            return cp.SOC(x + y, cp.vstack([x - y, 2 * h]), axis=0)

        exponents = _NODES[:, None] @ cp.reshape(z - self._shift, (1, devices), order="C")
        limits = [
            self._need @ self._beta <= 1,
            # z >= 1/(beta upload) as z >= root^2, root >= 1/area, area^2 <= beta upload
            cone(self._beta, self._upload, area),
            cone(root, area, one),
            cone(z, one, root),
            # each node in its own unit: without the shift Clarabel fails where z is large
            cp.ExpCone(exponents, np.ones(nodes), exponentials),
            cp.sum(cp.multiply(self._weights, exponentials), axis=0) <= send,
            send <= self._upload,
            self._upload + cp.multiply(self._fast, compute) <= self._time,
            cone(self._frequency, compute, one),
            compute >= 1,
            self._frequency >= self._slow,
        ]
        cost = self._time
        if kind is not Shortest:
            cost = self._send_cost @ send
            cost += cp.sum_squares(cp.multiply(self._compute_cost, self._frequency))
        if kind is Weighted:
            cost += self._time_cost * self._time
        self._problem = cp.Problem(cp.Minimize(cost), limits)

    def solve(self, batch: Batch, i: int, target: float = 0.0) -> OracleSolve:
        """Solve instance ``i``; ``target`` is the round [s] or the price of time [W]."""
        a, g, band = _constants(batch, i)
        work, power = batch.work_cycles[i], batch.power_max_w[i]
        f_max, delay = batch.frequency_max_hz[i], float(batch.fixed_delay_s[i])
        if self._kind is LeastEnergy:
            unit_s = target - delay
        else:  # every device in its share of the band, at full power
            share = band / batch.devices
            unit_s = float((work / f_max + a / (share * np.log1p(power * g / share))).max())
        if unit_s <= 0:
            return _failure(batch, "infeasible")
        full = power * unit_s * g / a  # phi(z) at full power all the time
        shift = np.log1p(full)
        shift += np.log1p(shift)  # about the z with phi(z) = full
        send, compute = power * unit_s, batch.kappa[i] * work * f_max**2
        unit_j = max(float(compute.sum()), target * unit_s if self._kind is Weighted else 0.0)
        unit_j = unit_j or float(send.sum())
        self._need.value = a / (band * unit_s)
        self._fast.value = work / (f_max * unit_s)
        self._slow.value = batch.frequency_min_hz[i] / f_max
        self._shift.value = shift
        self._weights.value = _WEIGHTS[:, None] * np.exp(_NODES[:, None] * shift) / full
        self._send_cost.value = send / unit_j
        self._compute_cost.value = np.sqrt(compute / unit_j)
        self._time_cost.value = target * unit_s / unit_j
        status, seconds = _run(self._problem, self._options)
        if self._beta.value is None:
            return _failure(batch, status)
        round_s = target
        if self._kind is not LeastEnergy:
            round_s = float(self._time.value) * unit_s + delay
        b, t = self._beta.value * self._need.value * band, self._upload.value * unit_s
        return _point(batch, i, status, seconds, round_s, b, t, self._frequency.value * f_max)


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
        If cvxpy reports no optimum, or one beyond the range of the joint formulation.
    """
    if access == "fdma":
        for name in ("payload_bit", "work_cycles"):
            check(name, getattr(batch, name), _BUSY)
    if frequency_hz is not None and not isinstance(objective, LeastEnergy):
        raise InvalidInputError("frequency_hz must be None unless the objective is LeastEnergy")
    count = batch.instances
    target = np.zeros(count)
    if isinstance(objective, LeastEnergy):
        target = per_instance("round_s", objective.round_s, count)
    if isinstance(objective, Weighted):
        target = per_instance("price_of_time_w", objective.price_of_time_w, count)
    if access == "tdma":
        rows = [_tdma(batch, i, objective, float(target[i])) for i in range(count)]
    else:
        joint = frequency_hz is None
        held = batch if joint else _at_frequency(batch, frequency_hz)
        solvers = [
            CvxpyJoint(batch.devices, type(objective), **options)
            if joint
            else CvxpyFixed(batch.devices, **options)
            for options in (_TIGHT, {})
        ]
        rows = [_solve_instance(solvers, held, i, float(target[i])) for i in range(count)]
    return OracleSolution(
        energy_j=np.array([r.energy_j for r in rows]),
        round_s=np.array([r.round_s for r in rows]),
        bandwidth_hz=np.array([r.bandwidth_hz for r in rows]),
        upload_s=np.array([r.upload_s for r in rows]),
        frequency_hz=np.array([r.frequency_hz for r in rows]),
    )


def _solve_instance(
    solvers: Sequence[CvxpyFixed | CvxpyJoint],
    batch: Batch,
    i: int,
    target: float,
) -> OracleSolve:
    """Return the result of the first solver that finds one."""
    for solver in solvers:
        result = solver.solve(batch, i, target)
        if result.found:
            break
    else:
        raise RuntimeError(f"cvxpy ended with status {result.status!r}")
    a, _, _ = _constants(batch, i)
    z = float((a / (result.bandwidth_hz * result.upload_s)).max())
    if isinstance(solver, CvxpyJoint) and z > _Z_MAX:
        raise RuntimeError(f"spectral efficiency must be at most {_Z_MAX} nat/s/Hz, got {z:.3g}")
    return result


def _cvxpy() -> Any:
    """Return cvxpy, imported where it is used: the package runs without it."""
    return import_module("cvxpy")


def _run(problem: Any, options: dict[str, Any]) -> tuple[str, float]:
    """Solve; return the status, and Clarabel's seconds."""
    cp = _cvxpy()
    try:
        problem.solve(solver=cp.CLARABEL, **options)
    except cp.SolverError:  # no progress; variables may hold the values of an earlier instance
        for variable in problem.variables():
            variable.value = None
        return "solver_error", float("nan")
    return str(problem.status), float(problem.solver_stats.solve_time)


def _constants(batch: Batch, i: int) -> tuple[FloatArray, FloatArray, float]:
    a = batch.payload_bit[i] * np.log(2.0)
    g = batch.gain[i] / batch.noise_psd_w_per_hz[i]
    return a, g, float(batch.bandwidth_hz[i])


def _at_frequency(batch: Batch, frequency_hz: Any) -> Batch:
    fields = {name: getattr(batch, name) for name in signature(Batch).parameters}
    return Batch(**fields | {"frequency_min_hz": frequency_hz, "frequency_max_hz": frequency_hz})


def _failure(batch: Batch, status: str) -> OracleSolve:
    nothing = np.full(batch.devices, np.nan)
    return OracleSolve(
        status=status,
        energy_j=float("nan"),
        round_s=float("nan"),
        bandwidth_hz=nothing,
        upload_s=nothing,
        frequency_hz=nothing,
        solver_s=float("nan"),
    )


def _point(
    batch: Batch,
    i: int,
    status: str,
    seconds: float,
    round_s: float,
    b: FloatArray,
    t: FloatArray,
    f: FloatArray,
) -> OracleSolve:
    """Evaluate a decision with FDMA from the definition."""
    a, g, _ = _constants(batch, i)
    energy = b * t * np.expm1(a / (b * t)) / g + batch.kappa[i] * batch.work_cycles[i] * f**2
    return OracleSolve(
        status=status,
        energy_j=float((energy + batch.fixed_energy_j[i]).sum()),
        round_s=round_s,
        bandwidth_hz=b,
        upload_s=t,
        frequency_hz=f,
        solver_s=seconds,
    )


def _tdma(batch: Batch, i: int, objective: Objective, target: float) -> OracleSolve:
    cp = _cvxpy()

    a, g, band = _constants(batch, i)
    work, f_max = batch.work_cycles[i], batch.frequency_max_hz[i]
    send, busy = a > 0, work > 0
    delay = float(batch.fixed_delay_s[i])
    z_max = np.log1p(batch.power_max_w[i] * g / band)
    z_min = np.log1p(batch.power_min_w[i] * g / band)
    t_min = np.where(send, a / (band * z_max), 0.0)
    unit = float(t_min.sum() + (work / f_max).max())
    count = batch.devices
    t, u = cp.Variable(count), cp.Variable(count)  # t in units of its own shortest time
    f, deadline = cp.Variable(count), cp.Variable()  # f as a share of f_max
    scale = np.where(send, batch.power_max_w[i] * t_min, 0.0)  # energy at full power
    limits: list[Any] = [t >= 1, f <= 1, f >= batch.frequency_min_hz[i] / f_max]
    limits.append(cp.ExpCone(z_max, t, u))  # t e^{z_max/t} <= u
    longest = z_min > 0
    if longest.any():
        limits.append(t[longest] <= z_max[longest] / z_min[longest])
    if busy.any():
        share = work[busy] / (f_max[busy] * unit)
        limits.append(cp.multiply(share, cp.inv_pos(f[busy])) <= deadline)
    per = scale / np.expm1(z_max)
    dynamic = batch.kappa[i] * work * f_max**2
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
    status, seconds = _run(problem, _TIGHT)
    if status not in ("optimal", "optimal_inaccurate"):
        raise RuntimeError(f"cvxpy ended with status {status!r}")
    return OracleSolve(
        status=status,
        energy_j=float(energy.value + batch.fixed_energy_j[i].sum()),
        round_s=float(time.value) * unit + delay,
        bandwidth_hz=np.where(send, band, 0.0),
        upload_s=np.where(send, np.asarray(t.value) * t_min, 0.0),
        frequency_hz=np.asarray(f.value) * f_max,
        solver_s=seconds,
    )
