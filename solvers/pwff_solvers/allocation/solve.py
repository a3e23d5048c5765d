"""The one entry point of the allocator."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pwff_solvers.allocation import certificate, fdma, tdma
from pwff_solvers.allocation.allocation import Allocation, Status
from pwff_solvers.allocation.batch import Batch, FloatArray, per_instance
from pwff_solvers.allocation.errors import InvalidInputError
from pwff_solvers.allocation.objectives import LeastEnergy, Objective, Shortest, Weighted

__all__ = ["GAP_TOLERANCE", "VIOLATION_TOLERANCE", "solve"]

GAP_TOLERANCE = 1e-8
VIOLATION_TOLERANCE = 1e-9
# About this many devices are solved at once, so that the working arrays stay in the cache.
_CHUNK = 8192


def solve(
    batch: Batch, objective: Objective, access: Literal["fdma", "tdma"] = "fdma"
) -> Allocation:
    r"""Return the optimal bandwidths, powers and frequencies of every instance, with certificate.

    FDMA, with ``T`` the round and ``d`` its fixed delay:

    .. math::
        \min_{b,p,f,t}\ \sum_k p_k t_k + \kappa_k c_k f_k^2
        \quad\text{s.t.}\quad
        & t_k\, b_k \log_2\!\Big(1 + \frac{p_k h_k}{N_0 b_k}\Big) \ge s_k,\quad
          t_k + c_k/f_k + d \le T,\quad \textstyle\sum_k b_k \le B, \\
        & 0 \le p_k \le P_k,\quad f^{\min}_k \le f_k \le f^{\max}_k .

    TDMA (FEDL): ``b_k = B`` for all, and ``max_k c_k/f_k + sum_k t_k + d <= T``.

    Parameters
    ----------
    batch : Batch
        Instances [instance] of devices [device]; SI units.
    objective : Shortest, LeastEnergy or Weighted
        The shortest round; the least energy within a round; the least energy + price x round.
    access : {"fdma", "tdma"}
        Own bands at the same time, or the whole band one after another.

    Returns
    -------
    Allocation
        Point, prices, status, relative duality gap and largest relative violation.  An infeasible
        instance never raises: it has NaN arrays, its shortest round and its binding device.

    Raises
    ------
    InvalidInputError
        If the objective or the access is unknown, a parameter is not positive, or ``power_min_w``
        is used with FDMA.

    Notes
    -----
    *Theorem.*  The problem is jointly convex in (b, t, f, T).  The rate constraint is tight at an
    optimum, so ``p = (b/G)(e^z - 1)`` with ``a = s ln 2``, ``G = h/N_0``, ``z = a/(b t)``, and

    .. math:: p\,t = \tfrac1G\, b\,t\,(e^{a/(bt)}-1)
              = \tfrac1G \sum_{n\ge0} \frac{a^{n+1}}{(n+1)!}\,(b t)^{-n}

    is a sum of monomials with positive coefficients and exponents that are never positive; each is
    convex on the positive quadrant.  ``c/f`` and ``f^2`` are convex, and the power limit
    ``a/t <= b ln(1 + P G/b)`` bounds a convex function by a concave one.  (A least power would be
    the reverse of that limit, hence not convex; it is refused with FDMA.)  With TDMA ``b = B`` and
    both power limits are bounds on t alone.

    *Derivation.*  The energy falls with t, hence ``f = max(f_min, c/(T-d-t))``.  With a price
    ``lam`` on bandwidth each device is on its own: ``psi(z) t = lam G``,
    ``2 kappa c^3/(T-d-t)^3 = (b/G) psi(z)`` with ``psi(z) = 1 + (z-1)e^z``, or it sits at a
    limit; ``sum b(lam) = B`` fixes lam.  The least energy V(T) is convex, with
    ``V'(T) = -sum mu_k`` and ``mu_k`` the price of time of device k; ``Weighted`` solves
    ``sum mu_k = w``.  The shortest round makes the least bandwidths add up to B.

    *Certificate.*  For any ``lam, nu, mu >= 0`` the minimum of the Lagrangian bounds the optimum
    from below (weak duality); ``certificate.py`` evaluates it at the multipliers the returned point
    suggests, corrected by its own residual so that it stays a bound.  At the shortest
    round, where nothing but the returned point is feasible, the bound on the round may take its
    place.  ``status`` is OPTIMAL only where gap <= 1e-8 and violation <= 1e-9.

    *Range.*  The spectral efficiency is limited to 690 nat/s/Hz, and device quantities should keep
    ``P h/(N_0 B)`` above 1e-8: below that, the bandwidth a device needs at the shortest round is
    decided by the rounding of T.

    Sources: convexity and certificate, own derivation; TDMA, Dinh et al., IEEE/ACM ToN 2021,
    arXiv 1910.13067.

    Examples
    --------
    >>> from pwff_solvers.allocation import Batch, LeastEnergy, Shortest, solve
    >>> batch = Batch(payload_bit=2e5, work_cycles=[1e9, 2e9], gain=[1e-10, 1e-11],
    ...               power_max_w=0.1, frequency_min_hz=0.0, frequency_max_hz=2e9, kappa=1e-28,
    ...               bandwidth_hz=1e6, noise_psd_w_per_hz=4e-21)
    >>> shortest = solve(batch, Shortest()).round_s
    >>> plan = solve(batch, LeastEnergy(round_s=2 * shortest))
    >>> plan.status.tolist(), bool(abs(plan.gap[0]) < 1e-8)
    ([0], True)
    >>> bool(abs(plan.bandwidth_hz.sum() / 1e6 - 1) < 1e-12)
    True
    """
    if access not in ("fdma", "tdma"):
        raise InvalidInputError(f"access must be 'fdma' or 'tdma', got {access!r}")
    if not isinstance(batch, Batch):
        raise InvalidInputError(f"batch must be a Batch, got {type(batch).__name__}")
    target = _target(objective, batch)
    if access == "fdma" and (batch.power_min_w > 0).any():
        i, k = (int(v) for v in np.argwhere(batch.power_min_w > 0)[0])
        raise InvalidInputError(
            f"power_min_w[{i}, {k}] must be 0 with access 'fdma', got {batch.power_min_w[i, k]}: "
            "a least power is not a convex limit there; use access 'tdma' or drop it"
        )
    size = max(1, _CHUNK // batch.devices)
    with np.errstate(all="ignore"):
        points = [
            _solve_rows(batch, objective, target, access, slice(i, i + size))
            for i in range(0, batch.instances, size)
        ]
        return _certify(batch, objective, target, access, points)


def _target(objective: Objective, batch: Batch) -> FloatArray:
    """Parameter of the objective, [instance]; zeros where it has none."""
    match objective:
        case LeastEnergy():
            return per_instance("round_s", objective.round_s, batch.instances)
        case Weighted():
            return per_instance("price_of_time_w", objective.price_of_time_w, batch.instances)
        case Shortest():
            return np.zeros(batch.instances)
    raise InvalidInputError(
        f"objective must be Shortest(), LeastEnergy(...) or Weighted(...), got {objective!r}"
    )


def _solve_rows(
    batch: Batch, objective: Objective, target: FloatArray, access: str, rows: slice
) -> fdma.Point:
    wanted = target[rows]
    delay = batch.fixed_delay_s[rows]
    if access == "tdma":
        slots = tdma.TdmaCell(batch, rows)
        if isinstance(objective, LeastEnergy):
            return tdma.least_energy(slots, wanted - delay)
        if isinstance(objective, Weighted):
            return tdma.weighted(slots, wanted)
        return tdma.shortest(slots)
    cell = fdma.Cell(batch, rows)
    if isinstance(objective, LeastEnergy):
        return fdma.least_energy(cell, wanted - delay)
    return fdma.weighted(cell, wanted) if isinstance(objective, Weighted) else fdma.shortest(cell)


def _certify(
    batch: Batch,
    objective: Objective,
    target: FloatArray,
    access: Literal["fdma", "tdma"],
    points: list[fdma.Point],
) -> Allocation:
    """Put the chunks together, certify them and give each instance its status."""

    def devices(name: str) -> FloatArray:
        if not points:
            return np.empty((0, batch.devices))
        return np.concatenate([getattr(p, name).T for p in points])

    def cells(name: str) -> FloatArray:
        return np.concatenate([getattr(p, name) for p in points]) if points else np.empty(0)

    b, z, t, f = (devices(name) for name in ("b", "z", "t", "f"))
    delay = batch.fixed_delay_s
    infeasible = np.isnan(cells("time"))
    # a given round is returned as given: adding the delay back would change its last bit
    round_s = cells("time") + delay
    if isinstance(objective, LeastEnergy):
        round_s = np.where(infeasible, np.nan, target)
    gain_per_noise = batch.gain / batch.noise_psd_w_per_hz[:, None]
    power = b * np.expm1(z) / gain_per_noise
    compute = np.where(batch.work_cycles > 0, batch.work_cycles / f, 0.0 * f)
    energy = power * t + batch.kappa * batch.work_cycles * f**2 + batch.fixed_energy_j
    lam, mu = cells("price_of_bandwidth"), cells("price_of_time")
    shortest = cells("shortest") + delay

    point = certificate.Primal(
        bandwidth_hz=b, power_w=power, frequency_hz=f, upload_s=t, round_s=round_s
    )
    prices = certificate.Multipliers(bandwidth_j_per_hz=lam, time_w=mu)
    if isinstance(objective, Shortest):
        value = round_s
        bound = certificate.shortest_bound(batch, point, access)
        gap = _relative(value, bound)
    else:
        value = certificate.variable_energy(batch, point)
        weight = target if isinstance(objective, Weighted) else None
        if weight is not None:
            value = value + weight * round_s
        bound = certificate.energy_bound(batch, point, prices, weight, access)
        gap = _relative(value, bound)
        corner = (np.abs(gap) > GAP_TOLERANCE) & _at_full_power(batch, point)
        if access == "fdma" and corner.any():
            late = certificate.shortest_bound(batch, point, access)
            edge = _relative(round_s, late)
            gap = np.where(corner & (np.abs(edge) <= 1e-9), edge, gap)
    worst = certificate.violation(batch, point, access)
    if infeasible.any():
        gap[infeasible] = _infeasible_gap(batch, shortest, access, np.flatnonzero(infeasible))
    good = (np.abs(gap) <= GAP_TOLERANCE) & (infeasible | (worst <= VIOLATION_TOLERANCE))
    status = np.where(good, Status.OPTIMAL, Status.INACCURATE)
    status = np.where(infeasible, Status.INFEASIBLE, status).astype(np.int8)
    binding = cells("binding").astype(np.int64)
    return Allocation(
        bandwidth_hz=b,
        power_w=power,
        frequency_hz=f,
        upload_s=t,
        compute_s=compute,
        device_energy_j=energy,
        energy_j=energy.sum(axis=1),
        round_s=round_s,
        price_of_bandwidth_j_per_hz=lam,
        price_of_time_w=mu,
        status=status,
        shortest_round_s=round_s if isinstance(objective, Shortest) else shortest,
        binding_device=np.where(infeasible, binding, -1),
        gap=gap,
        violation=np.where(infeasible, np.nan, worst),
    )


def _at_full_power(batch: Batch, point: certificate.Primal) -> NDArray[np.bool_]:
    """True where every device that uploads has full power and full frequency.

    At the shortest round that is the only feasible point, while the price of time may be so high
    that the energy bound drowns in rounding: the bound on the round then settles the matter.
    """
    power = point.power_w >= (1.0 - 1e-9) * batch.power_max_w
    speed = (point.frequency_hz >= (1.0 - 1e-9) * batch.frequency_max_hz) | (batch.work_cycles == 0)
    live = batch.payload_bit > 0
    result: NDArray[np.bool_] = ((power & speed) | ~live).all(1) & live.any(1)
    return result


def _relative(value: FloatArray, bound: FloatArray) -> FloatArray:
    """Relative gap; 0 where both vanish."""
    scale = np.where(value != 0, np.abs(value), 1.0)
    return np.asarray((value - bound) / scale, dtype=np.float64)


def _infeasible_gap(
    batch: Batch,
    shortest: FloatArray,
    access: Literal["fdma", "tdma"],
    rows: NDArray[np.int64],
) -> FloatArray:
    """Gap of the shortest round of infeasible instances, by solving for it anew."""
    part = batch.take(rows)
    found = solve(part, Shortest(), access)
    return _relative(shortest[rows], found.round_s * (1.0 - found.gap)) + np.where(
        found.violation > VIOLATION_TOLERANCE, np.inf, 0.0
    )
