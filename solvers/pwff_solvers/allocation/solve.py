"""The one entry point of the allocator."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pwff_solvers.allocation import certificate, registers
from pwff_solvers.allocation.allocation import Allocation, Status
from pwff_solvers.allocation.batch import Batch, FloatArray
from pwff_solvers.allocation.certificate import GAP_TOLERANCE, VIOLATION_TOLERANCE
from pwff_solvers.allocation.checks import per_instance
from pwff_solvers.allocation.fdma import bracketed as fdma
from pwff_solvers.allocation.fdma import newton
from pwff_solvers.allocation.fdma import shortest as newton_shortest
from pwff_solvers.allocation.objectives import LeastEnergy, Objective, Shortest, Weighted
from pwff_solvers.allocation.tdma import bracketed as tdma
from pwff_solvers.allocation.tdma import newton as newton_tdma
from pwff_solvers.compiled.elementary import COMPILED
from pwff_solvers.errors import InvalidInputError

__all__ = ["GAP_TOLERANCE", "VIOLATION_TOLERANCE", "solve"]

# About this many devices are searched at once, so that the working arrays stay in the cache.
_CHUNK = 8192
_KINDS = {Shortest: 0, LeastEnergy: 1, Weighted: 2}
# About this many devices make a piece of work for a thread.
_PIECE = 65536


def solve(
    batch: Batch,
    objective: Objective,
    access: Literal["fdma", "tdma"] = "fdma",
    *,
    threads: int = 1,
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
        The shortest round; the least energy within a round; the least energy + price x round.  To
        ask one cell for many rounds or prices, repeat it: ``batch.take(np.zeros(n, int))``.
    access : {"fdma", "tdma"}
        Own bands at the same time, or the whole band one after another.
    threads : int, default 1
        Pieces of a large batch that are solved at the same time; the result does not depend on it.

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

    *Method.*  Newton on all unknowns at once, compiled for whole vector registers (``newton.py``); what
    has not converged, or is not certified, is solved again by bracketed searches (``fdma.py``,
    ``tdma.py``), which also do everything where numba is absent.

    *Certificate.*  For any ``lam, nu, mu >= 0`` the minimum of the Lagrangian bounds the optimum
    from below (weak duality); ``certificate.py`` evaluates it at the multipliers the returned point
    suggests, corrected by its own residual so that it stays a bound, less what rounding can have done
    to it.  ``status`` is OPTIMAL only where gap <= 1e-8 and violation <= 1e-9.  A round within
    1e-11 of the shortest is answered by the point of the shortest.  Near it the price of time is so
    high that rounding alone opens the gap: the status says INACCURATE and the gap how much is
    certain, though the point is right.  Of 20,000 cells of four devices whose quantities spread over
    several decades, 56 % were INACCURATE at rounds 1e-9 above the shortest, 40 % at 1e-8, 18 % at
    1e-7, 1.5 % at 1e-6, 0.03 % at 1e-5 and none at 1e-4 (largest gap 3e-5).  With prices of time
    from 1e-6 to 1e9 W about 10 of them at most were (gap below 3e-7), and with TDMA none.  Without
    numba about 50 were (gap below 1e-6), and 2.7 % at the shortest round itself, where such points
    meet their limits only to 1e-5.

    *Company.*  Instances are solved side by side and iterate until the last one has converged, so an
    answer depends on the others in its batch, within its tolerances: in those cells the objective by
    up to 1e-8, and by less than 1e-10 where devices differ less; the energy by up to 2e-7 at a price
    that asks for nearly the shortest round.  At the edge of a tolerance, as above, the status may
    change.  Equal batches give equal answers, to the last bit and for any ``threads``.

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

    FEDL (Dinh et al.) counts nat, gives noise power over gain, prices computing at alpha/2 c f^2
    and calls the price of time kappa:

    >>> nat, noise_w, noise_over_gain_w, alpha, kappa = 25e3, 1e-10, np.array([0.9, 0.2]), 2e-28, 0.1
    >>> fedl = Batch(payload_bit=nat / np.log(2), work_cycles=[1.2e9, 1.1e9],
    ...              gain=noise_w / noise_over_gain_w, power_min_w=0.2, power_max_w=1.0,
    ...              frequency_min_hz=0.3e9, frequency_max_hz=[1.2e9, 1.7e9], kappa=alpha / 2,
    ...              bandwidth_hz=1e6, noise_psd_w_per_hz=noise_w / 1e6)
    >>> solve(fedl, Weighted(price_of_time_w=kappa), access="tdma").status.tolist()
    [0]
    """
    if access not in ("fdma", "tdma"):
        raise InvalidInputError(f"access must be 'fdma' or 'tdma', got {access!r}")
    if not isinstance(batch, Batch):
        raise InvalidInputError(f"batch must be a Batch, got {type(batch).__name__}")
    if not (isinstance(threads, int) and threads >= 1):
        raise InvalidInputError(f"threads must be an integer of at least 1, got {threads!r}")
    target = _target(objective, batch)
    if access == "fdma" and batch.device[:, 7].any():
        i, k = (int(v) for v in np.argwhere(batch.power_min_w > 0)[0])
        raise InvalidInputError(
            f"power_min_w[{i}, {k}] must be 0 with access 'fdma', got {batch.power_min_w[i, k]}: "
            "a least power is not a convex limit there; use access 'tdma' or drop it"
        )
    problem = _Problem(type(objective), access)
    # the pieces are the same for any number of threads, and so is the result to the last bit
    size = max(registers.LANES, _PIECE // batch.devices // registers.LANES * registers.LANES)
    pieces = [slice(i, i + size) for i in range(0, max(batch.instances, 1), size)]
    decision = np.empty((batch.instances, 6, batch.devices))
    if len(pieces) == 1:
        found = _solve_piece(batch, problem, target, decision)
    else:

        def solve_rows(rows: slice) -> _Found:
            return _solve_piece(batch.take(rows), problem, target[rows], decision[rows])

        if threads == 1:
            found = _Found.joined([solve_rows(rows) for rows in pieces], decision)
        else:
            with ThreadPoolExecutor(threads) as pool:
                found = _Found.joined(list(pool.map(solve_rows, pieces)), decision)
    return found.allocation(batch, problem, target)


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


@dataclass(frozen=True, slots=True)
class _Problem:
    """What is asked: kind of objective and of access."""

    objective: type
    access: Literal["fdma", "tdma"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Found:
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
    def joined(parts: list[_Found], decision: FloatArray | None = None) -> _Found:
        """Return the parts as one; ``decision`` if theirs lie side by side in it already."""
        names = [f.name for f in fields(_Found) if f.name not in ("perfect", "decision")]
        arrays: dict[str, Any] = {n: np.concatenate([getattr(p, n) for p in parts]) for n in names}
        if decision is None:
            decision = np.concatenate([p.decision for p in parts])
        return _Found(**arrays, decision=decision, perfect=all(p.perfect for p in parts))

    def good(self) -> NDArray[np.bool_]:
        """Return where the certificate is within its tolerances."""
        result: NDArray[np.bool_] = (
            (np.abs(self.gap) <= GAP_TOLERANCE)
            & (np.isnan(self.time) | (self.violation <= VIOLATION_TOLERANCE))
            & (np.isnan(self.time) | np.isfinite(self.energy + self.lam + self.mu))
        )
        return result

    def improve(self, rows: NDArray[np.int64], other: _Found) -> None:
        """Overwrite ``rows`` by another attempt where it is nearer to its tolerances, or good."""
        mine = np.maximum(np.abs(self.gap[rows]), 10.0 * self.violation[rows])
        theirs = np.where(
            np.isnan(other.time), 0.0, np.maximum(np.abs(other.gap), 10.0 * other.violation)
        )
        better = ~(mine <= theirs)
        for f in fields(self):
            if f.name != "perfect":
                getattr(self, f.name)[rows[better]] = getattr(other, f.name)[better]

    def allocation(self, batch: Batch, problem: _Problem, target: FloatArray) -> Allocation:
        """Return the result for the user; ``batch`` and ``target`` give the fixed parts."""
        instances = self.time.size
        status = np.zeros(instances, dtype=np.int8)
        binding = np.full(instances, -1, dtype=np.int64)
        # a given round is returned as given: adding the delay back would change its last bit
        given = problem.objective is LeastEnergy
        round_s = target if given else self.time + batch.cell[:, 2]
        if not self.perfect:
            # no point is no proof: only a shortest round that is certified to be longer is one
            late = (self.shortest + batch.cell[:, 2]) * (1.0 - np.abs(self.gap)) > target
            infeasible = np.isnan(self.time) & late & (problem.objective is LeastEnergy)
            binding = np.where(infeasible, self.binding, -1).astype(np.int64)
            round_s = np.where(np.isnan(self.time), np.nan, round_s)
            status[~self.good() | np.isnan(self.time)] = Status.INACCURATE
            status[infeasible] = Status.INFEASIBLE
        return Allocation(
            bandwidth_hz=self.decision[:, 0],
            power_w=self.decision[:, 1],
            frequency_hz=self.decision[:, 2],
            upload_s=self.decision[:, 3],
            compute_s=self.decision[:, 4],
            device_energy_j=self.decision[:, 5],
            energy_j=self.energy,
            round_s=round_s,
            price_of_bandwidth_j_per_hz=self.lam,
            # at a kink a range of prices supports the point, the one asked for among them
            price_of_time_w=target if problem.objective is Weighted else self.mu,
            status=status,
            shortest_round_s=round_s
            if problem.objective is Shortest
            else self.shortest + batch.cell[:, 2],
            binding_device=binding,
            gap=self.gap,
            violation=self.violation,
        )


def _solve_piece(
    batch: Batch, problem: _Problem, target: FloatArray, decision: FloatArray
) -> _Found:
    """Solve by Newton, certify, and search anew for what is not perfect; fill ``decision``."""
    with np.errstate(all="ignore"):  # here, for it holds for a thread only
        if not COMPILED:
            found = _search(batch, problem, target)
            decision[...] = found.decision
            return replace(found, decision=decision)
        newton_of = _newton_tdma if problem.access == "tdma" else _newton
        found = newton_of(batch, problem, target, decision)
        if not found.perfect:
            rest = np.flatnonzero(~found.good())
            found.improve(rest, _search(batch.take(rest), problem, target[rest]))
        return found


def _newton(batch: Batch, problem: _Problem, target: FloatArray, decision: FloatArray) -> _Found:
    """Solutions by Newton; what has not converged comes with an infinite gap."""
    device, cell = batch.device, batch.cell
    instances = device.shape[0]
    scalars = np.zeros((instances, registers.SCALARS))
    kind = _KINDS[problem.objective]
    if problem.objective is LeastEnergy:
        newton.least_energy(device, cell, target, decision, scalars)
    elif problem.objective is Weighted:
        newton.weighted(device, cell, target, decision, scalars)
    else:
        newton_shortest.shortest(device, cell, decision, scalars)
    rest = np.flatnonzero(scalars[:, 0] == 0)
    if rest.size:
        if problem.objective is Weighted:
            _hard_prices(batch.take(rest), target[rest], rest, decision, scalars)
        elif problem.objective is Shortest:
            _idle_last(batch.take(rest), rest, decision, scalars)
    time, lam, mu = scalars[:, 1], scalars[:, 2], scalars[:, 3]
    gap, violation, energy, perfect = certificate.judge(
        device, cell, decision, time, lam, target, kind
    )
    missing = np.full(instances, np.nan)
    found = _Found(
        decision=decision,
        energy=energy,
        time=time,
        lam=lam,
        mu=mu,
        shortest=missing,
        binding=missing.copy(),
        gap=gap,
        violation=violation,
        perfect=perfect and not rest.size,
    )
    if not found.perfect:
        converged = scalars[:, 0] > 0
        # prices of devices that only compute: what the quick judge does not know
        rest = np.flatnonzero(~found.good() & converged)
        gap[~converged] = violation[~converged] = np.inf
        gap[rest], violation[rest] = _certificate(
            batch.take(rest), problem, target[rest], decision[rest], time[rest], lam[rest], mu[rest]
        )
    return found


def _newton_tdma(
    batch: Batch, problem: _Problem, target: FloatArray, decision: FloatArray
) -> _Found:
    """As ``_newton``, for uploads one after another."""
    device, cell = batch.device, batch.cell
    instances = device.shape[0]
    # the kernels leave alone what they do not solve
    decision[...] = np.nan
    scalars = np.zeros((instances, registers.SCALARS))
    if problem.objective is LeastEnergy:
        newton_tdma.least_energy_tdma(device, cell, target, decision, scalars)
    elif problem.objective is Weighted:
        newton_tdma.weighted_tdma(device, cell, target, decision, scalars)
    else:
        newton_tdma.shortest_tdma(device, cell, decision, scalars)
    missed = scalars[:, 0] == 0
    time, lam, mu = scalars[:, 1], scalars[:, 2], scalars[:, 3]
    gap, violation = _certificate(batch, problem, target, decision, time, lam, mu)
    gap[missed] = violation[missed] = np.inf
    missing = np.full(instances, np.nan)
    return _Found(
        decision=decision,
        energy=decision[:, 5].sum(axis=1),
        time=time,
        lam=lam,
        mu=mu,
        shortest=missing,
        binding=missing.copy(),
        gap=gap,
        violation=violation,
    )


def _idle_last(
    batch: Batch, rows: NDArray[np.int64], decision: FloatArray, scalars: FloatArray
) -> None:
    """Overwrite ``rows``: a device without payload ends last, the others have time to spare."""
    fast = np.where(batch.payload_bit > 0, 0.0, batch.work_cycles / batch.frequency_max_hz)
    points = np.empty((rows.size, 6, batch.devices))
    found = np.zeros((rows.size, registers.SCALARS))
    newton.least_energy(batch.device, batch.cell, fast.max(1) + batch.cell[:, 2], points, found)
    found[:, 1] = fast.max(1)
    decision[rows], scalars[rows] = points, found


def _hard_prices(
    batch: Batch,
    price: FloatArray,
    rows: NDArray[np.int64],
    decision: FloatArray,
    scalars: FloatArray,
) -> None:
    """Overwrite ``rows``: the shortest round where time is that dear, else by a bracketed search.

    Any price of bandwidth above the least one supports that round too, and at a fixed point
    ``dmu_k/dlog lam = mu_k + P_k``: so the wanted price of time is met exactly.
    """
    points = np.empty((rows.size, 6, batch.devices))
    edge = np.zeros((rows.size, registers.SCALARS))
    newton_shortest.shortest(batch.device, batch.cell, points, edge)
    stop = (edge[:, 0] > 0) & (edge[:, 3] <= price)
    edge[:, 2] *= 1.0 + (price - edge[:, 3]) / edge[:, 4]
    edge[:, 3] = price
    go = np.flatnonzero((edge[:, 0] > 0) & ~stop)
    if go.size:
        part = batch.take(go)
        inner = np.empty((go.size, 6, batch.devices))
        scalar = np.zeros((go.size, registers.SCALARS))
        newton.weighted_carefully(part.device, part.cell, price[go], edge[go, 1], inner, scalar)
        points[go], edge[go] = inner, scalar
    decision[rows] = points
    scalars[rows] = edge
    scalars[rows, 0] = stop
    scalars[rows[go], 0] = edge[go, 0]


def _search(batch: Batch, problem: _Problem, target: FloatArray) -> _Found:
    """Solutions by bracketed searches in plain numpy: slow, and stopped by nothing."""
    # so many devices at once that the working arrays stay in the cache
    size = max(1, _CHUNK // batch.devices)
    pieces = [slice(i, i + size) for i in range(0, batch.instances, size)]
    if len(pieces) > 1:
        return _Found.joined([_search(batch.take(r), problem, target[r]) for r in pieces])
    point = _solve_rows(batch, problem, target)
    b, z, t, f = point.b.T, point.z.T, point.t.T, point.f.T
    work = batch.work_cycles
    power = b * np.expm1(z) * batch.noise_psd_w_per_hz[:, None] / batch.gain
    compute = np.where(work > 0, work / f, 0.0 * f)
    energy = power * t + batch.kappa * work * f**2 + batch.fixed_energy_j
    decision = np.stack([b, power, f, t, compute, energy], axis=1)
    gap, worst = _certificate(
        batch, problem, target, decision, point.time, point.price_of_bandwidth, point.price_of_time
    )
    infeasible = np.isnan(point.time)
    if infeasible.any():
        shortest = point.shortest + batch.fixed_delay_s
        rows = np.flatnonzero(infeasible)
        gap[rows] = _infeasible_gap(batch, shortest, problem.access, rows)
    return _Found(
        decision=decision,
        energy=energy.sum(axis=1),
        time=point.time,
        lam=point.price_of_bandwidth,
        mu=point.price_of_time,
        shortest=point.shortest if problem.objective is LeastEnergy else np.nan * point.time,
        binding=point.binding.astype(float),
        gap=gap,
        violation=np.where(infeasible, np.nan, worst),
    )


def _solve_rows(batch: Batch, problem: _Problem, target: FloatArray) -> fdma.Point:
    everything = slice(None)
    # what taking the fixed delay off can have cost in digits
    blur = 4.0 * np.finfo(np.float64).eps * batch.fixed_delay_s
    if problem.access == "tdma":
        slots = tdma.TdmaCell(batch, everything)
        if problem.objective is LeastEnergy:
            return tdma.least_energy(slots, target - batch.fixed_delay_s, blur)
        return (
            tdma.weighted(slots, target) if problem.objective is Weighted else tdma.shortest(slots)
        )
    cell = fdma.Cell(batch, everything)
    if problem.objective is LeastEnergy:
        return fdma.least_energy(cell, target - batch.fixed_delay_s, blur)
    return fdma.weighted(cell, target) if problem.objective is Weighted else fdma.shortest(cell)


def _certificate(
    batch: Batch,
    problem: _Problem,
    target: FloatArray,
    decision: FloatArray,
    time: FloatArray,
    lam: FloatArray,
    mu: FloatArray,
) -> tuple[FloatArray, FloatArray]:
    """Return the relative duality gap and the largest violation of a point, [instance] each."""
    round_s = time + batch.cell[:, 2]
    if problem.objective is LeastEnergy:
        # as given: adding the delay back would change its last bit
        round_s = np.where(np.isnan(time), np.nan, target)
    point = certificate.Primal.packed(decision, round_s)
    worst = certificate.violation(batch, point, problem.access)
    if problem.objective is Shortest:
        return certificate.shortest_gap(batch, point, problem.access), worst
    price = target if problem.objective is Weighted else None
    prices = certificate.Multipliers(bandwidth_j_per_hz=lam, time_w=mu)
    return certificate.energy_gap(batch, point, prices, price, problem.access), worst


def _infeasible_gap(
    batch: Batch,
    shortest: FloatArray,
    access: Literal["fdma", "tdma"],
    rows: NDArray[np.int64],
) -> FloatArray:
    """Gap of the shortest round of infeasible instances, by solving for it anew."""
    part = batch.take(rows)
    found = solve(part, Shortest(), access)
    gap = 1.0 - found.round_s * (1.0 - found.gap) / shortest[rows]
    return gap + np.where(found.violation > VIOLATION_TOLERANCE, np.inf, 0.0)
