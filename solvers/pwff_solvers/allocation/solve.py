"""The one entry point of the allocator."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pwff_solvers.allocation.access import Access
from pwff_solvers.allocation.allocation import Allocation
from pwff_solvers.allocation.batch import Batch, FloatArray
from pwff_solvers.allocation.certificate import GAP_TOLERANCE, VIOLATION_TOLERANCE
from pwff_solvers.allocation.checks import per_instance
from pwff_solvers.allocation.fdma import FDMA
from pwff_solvers.allocation.objectives import LeastEnergy, Objective, Shortest, Weighted
from pwff_solvers.allocation.tdma import TDMA
from pwff_solvers.errors import InvalidInputError

__all__ = ["GAP_TOLERANCE", "SCHEMES", "VIOLATION_TOLERANCE", "named", "solve"]

SCHEMES: Mapping[str, Access] = {scheme.name: scheme for scheme in (FDMA, TDMA)}
"""The access schemes that have a name here."""


def solve(
    batch: Batch,
    objective: Objective,
    access: str | Access = "fdma",
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
    access : {"fdma", "tdma"} or Access
        Own bands at the same time, the whole band one after another, or a scheme of one's own.
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
    scheme = named(access)
    if not isinstance(batch, Batch):
        raise InvalidInputError(f"batch must be a Batch, got {type(batch).__name__}")
    if not (isinstance(threads, int) and threads >= 1):
        raise InvalidInputError(f"threads must be an integer of at least 1, got {threads!r}")
    target = _target(objective, batch)
    scheme.require(batch)
    return scheme.allocate(batch, type(objective), target, threads)


def named(access: str | Access) -> Access:
    """Return the access scheme of a name, or the scheme that is given.

    Raises
    ------
    InvalidInputError
        If it is neither.
    """
    if isinstance(access, str) and access in SCHEMES:
        return SCHEMES[access]
    if not isinstance(access, str) and isinstance(access, Access):
        return access
    raise InvalidInputError(f"access must be 'fdma' or 'tdma', got {access!r}")


def _target(objective: Objective, batch: Batch) -> FloatArray:
    """Return the parameter of the objective, [instance]; zeros where it has none."""
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
