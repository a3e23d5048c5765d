"""The allocator on one core: speed, ratios to cvxpy with Clarabel, latency, distance to the limit.

Everything that is compared runs interleaved in one loop of one process, pinned to one core; ratios
are medians of the ratios of each repeat, since machines differ and a shared one drifts.

Cells: gains over three decades, payloads of 0.2 to 2 Mbit, works of 1 to 10 Gcycles, 2 MHz and
0.2 W for all; the round is 1.2, 1.5, 2, 3, 5 or 10 times the cell's shortest.  ``Weighted`` gets
the price of time of the ``LeastEnergy`` optimum, so that both end at the same point.

The rival is compiled once with parameters (DPP) and pays for setting them and for solving, not for
compiling; see ``pwff_solvers.extras.oracle``.  *fixed*: frequencies held at the optimum's, for
both sides (``frequency_min_hz = frequency_max_hz``).  *joint*: everything free, as a geometric program
that is exact (quadrature).  *joint, cones*: a stronger rival of our own making, second-order and
exponential cones in natural variables with ``(e^z-1)/z`` fitted to 2e-7, as an expert might find.

``python benchmarks/bench_allocator.py`` (minutes), ``--quick`` or BENCH_QUICK=1 for a smoke test;
it writes ``benchmarks/results/allocator.json`` (``--quick`` writes nothing unless ``--out`` is given).
"""

# ruff: noqa: E402 -- numpy reads the environment when it is imported
from __future__ import annotations

import os

for _name in ("OMP", "OPENBLAS", "MKL", "NUMBA", "RAYON"):
    os.environ[f"{_name}_NUM_THREADS"] = "1"

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import cvxpy as cp
import numpy as np
from harness import machine, parser, versions, write

from pwff_solvers.allocation import (
    Batch,
    LeastEnergy,
    Objective,
    Shortest,
    Weighted,
    solve,
)
from pwff_solvers.extras.oracle import CvxpyFixed, CvxpyJoint, OracleSolve

PACKAGES = ("numpy", "scipy", "numba", "cvxpy", "clarabel")
ROUND_FACTORS = (1.2, 1.5, 2.0, 3.0, 5.0, 10.0)
TARGET_RATIO = {
    "fixed": {10: 300, 50: 600, 200: 600},
    "joint": {10: 1500, 50: 6000, 200: 10000},
    "joint, cones": {10: 1500, 50: 6000, 200: 10000},
}
TARGET_LATENCY_US = 100
TARGET_WEIGHTED = 0.5  # speed of Weighted over that of LeastEnergy

# Counted by hand from the kernel, exponentials and logarithms as the polynomials they are; None
# where not counted yet. A multiplication and an addition each count as one operation.
OPERATIONS_PER_DEVICE_ITERATION: dict[str, float | None] = {"least_energy": 150, "weighted": 195}
ITERATIONS: dict[str, float | None] = {"least_energy": 7.5, "weighted": 7.5}  # mean, measured
OPERATIONS_PER_DEVICE_ONCE: dict[str, float | None] = {  # constants, start, answer, certificate
    "least_energy": 420,
    "weighted": 430,
}


@dataclass(frozen=True)
class Size:
    devices: tuple[int, ...] = (10, 50, 200)
    batches: tuple[int, ...] = (1, 100, 10000)
    repeats: int = 7
    cvxpy_instances: int = 6  # a repeat, others each time
    latency_calls: int = 2000
    least_s: float = 0.02  # a timing repeats its call until it lasts this long


class Geometric:
    """The joint problem as most would write it: a geometric program, exact by quadrature.

    ``phi(z) = (e^z-1)/z = int_0^1 e^{uz} du`` with Gauss-Legendre nodes, log-log convex in (b, t, f).
    """

    def __init__(self, devices: int, nodes: int = 8) -> None:
        u, weights = np.polynomial.legendre.leggauss(nodes)
        self.alpha, self.send, self.compute, self.least, self.fast = (
            cp.Parameter(devices, pos=True) for _ in range(5)
        )
        self.b, self.t, f = (cp.Variable(devices, pos=True) for _ in range(3))
        z = cp.multiply(self.alpha, cp.multiply(cp.power(self.b, -1), cp.power(self.t, -1)))
        parts = [
            w / 2 * cp.exp((x + 1) / 2 * z)
            for x, w in zip(u.tolist(), weights.tolist(), strict=True)
        ]
        phi = sum(parts[1:], parts[0])
        limits = [
            cp.sum(self.b) <= 1,
            f <= 1,
            cp.multiply(self.least, cp.multiply(phi, cp.power(self.t, -1))) <= 1,
            self.t + cp.multiply(self.fast, cp.power(f, -1)) <= 1,
        ]
        cost = cp.sum(cp.multiply(self.send, phi)) + cp.sum(
            cp.multiply(self.compute, cp.power(f, 2))
        )
        self.problem = cp.Problem(cp.Minimize(cost), limits)

    def solve(self, batch: Batch, i: int, target: float) -> OracleSolve:
        """Solve instance ``i`` for the least energy within ``target`` [s]."""
        a = batch.payload_bit[i] * np.log(2.0)
        g = batch.gain[i] / batch.noise_psd_w_per_hz[i]
        time_s = target - float(batch.fixed_delay_s[i])
        work, f_max = batch.work_cycles[i], batch.frequency_max_hz[i]
        compute = batch.kappa[i] * work * f_max**2
        unit_j = float(compute.sum())
        self.alpha.value = a / (batch.bandwidth_hz[i] * time_s)
        self.send.value, self.compute.value = a / g / unit_j, compute / unit_j
        self.least.value = a / (g * batch.power_max_w[i] * time_s)
        self.fast.value = work / (f_max * time_s)
        status, energy = "failed", float("nan")
        try:
            self.problem.solve(gp=True, solver=cp.CLARABEL)
            status = str(self.problem.status)
            energy = float(self.problem.value) * unit_j + float(batch.fixed_energy_j[i].sum())
        except cp.error.SolverError:
            pass
        stats = self.problem.solver_stats
        seconds = float("nan") if stats is None or stats.solve_time is None else stats.solve_time
        empty = np.full(batch.devices, np.nan)
        return OracleSolve(
            status=status, solver_s=seconds, energy_j=energy, round_s=target,
            bandwidth_hz=empty, upload_s=empty, frequency_hz=empty,
        )  # fmt: skip


QUICK = Size(devices=(10, 50), batches=(1, 100), repeats=3, cvxpy_instances=2, latency_calls=50)


@dataclass
class Case:
    """A batch with its optimum and the objectives that lead there."""

    batch: Batch
    round_s: np.ndarray
    frequency_hz: np.ndarray
    energy_j: np.ndarray
    objectives: dict[str, Objective] = field(default_factory=dict)


def arguments(count: int, devices: int, rng: np.random.Generator) -> dict[str, Any]:
    shape = (count, devices)
    return {
        "payload_bit": rng.uniform(2e5, 2e6, shape),
        "work_cycles": rng.uniform(1e9, 1e10, shape),
        "gain": 10.0 ** rng.uniform(-12.0, -9.0, shape),
        "power_max_w": 0.2,
        "frequency_min_hz": 0.0,
        "frequency_max_hz": 2e9,
        "kappa": 1e-28,
        "bandwidth_hz": 2e6,
        "noise_psd_w_per_hz": 4e-21,
    }


def case(batch: Batch, access: str, rng: np.random.Generator) -> Case:
    factor = rng.choice(ROUND_FACTORS, batch.instances)
    round_s = factor * solve(batch, Shortest(), access).round_s
    plan = solve(batch, LeastEnergy(round_s), access)
    objectives = {
        "shortest": Shortest(),
        "least_energy": LeastEnergy(round_s),
        "weighted": Weighted(np.maximum(plan.price_of_time_w, 1e-9)),
    }
    return Case(batch, round_s, plan.frequency_hz, plan.energy_j, objectives)


def seconds(call: Callable[[], object], least_s: float = 0.0) -> float:
    """Mean time of a call, repeated until it has lasted ``least_s``."""
    calls, start = 0, time.perf_counter()
    while True:
        call()
        calls += 1
        passed = time.perf_counter() - start
        if passed >= least_s:
            return passed / calls


def throughput(size: Size) -> list[dict[str, Any]]:
    """Instances per second of ours."""
    rows: list[dict[str, Any]] = []
    calls, times = [], []
    for devices in size.devices:
        rng = np.random.default_rng(devices)
        largest = Batch(**arguments(max(size.batches), devices, rng))
        for count in size.batches:
            batch = largest.take(np.arange(count))
            for access in ("fdma", "tdma"):
                own = case(batch, access, rng)
                for name, objective in own.objectives.items():
                    if access == "tdma" and name == "shortest":
                        continue
                    rows.append(
                        {"devices": devices, "batch": count, "access": access, "objective": name}
                    )
                    calls.append(lambda b=batch, o=objective, a=access: solve(b, o, a))
                    times.append([])
    for _ in range(size.repeats):
        for call, own_times in zip(calls, times, strict=True):
            own_times.append(seconds(call, size.least_s))
    speed: dict[tuple[Any, ...], np.ndarray] = {}
    for row, own_times in zip(rows, times, strict=True):
        rate = row["batch"] / np.array(own_times)
        speed[tuple(row.values())] = rate
        row["instances_per_s"] = float(np.median(rate))
        if row["objective"] == "weighted":
            base = speed[row["devices"], row["batch"], row["access"], "least_energy"]
            row["over_least_energy"] = float(np.median(rate / base))
    return rows


def ratios(size: Size) -> list[dict[str, Any]]:
    """Ours against cvxpy on the fixed-frequency and the joint problem."""
    count = max(size.batches)
    rows = []
    for devices in size.devices:
        rng = np.random.default_rng(1000 + devices)
        given = arguments(count, devices, rng)
        joint = case(Batch(**given), "fdma", rng)
        held = {"frequency_min_hz": joint.frequency_hz, "frequency_max_hz": joint.frequency_hz}
        objective = LeastEnergy(joint.round_s)
        problems = {
            "fixed": (Batch(**given | held), CvxpyFixed(devices)),
            "joint": (joint.batch, Geometric(devices)),
            "joint, cones": (joint.batch, CvxpyJoint(devices, LeastEnergy)),
        }
        ours_s: dict[str, list[float]] = {name: [] for name in problems}
        cvxpy_s: dict[str, list[float]] = {name: [] for name in problems}
        theirs: dict[str, list[Any]] = {name: [] for name in problems}
        result: dict[str, Any] = {}
        for batch, rival in problems.values():
            rival.solve(batch, 0, joint.round_s[0])  # compiles
        for repeat in range(size.repeats):
            few = [
                i % count
                for i in range(repeat * size.cvxpy_instances, (repeat + 1) * size.cvxpy_instances)
            ]
            for name, (batch, rival) in problems.items():
                start = time.perf_counter()
                result[name] = solve(batch, objective)
                ours_s[name].append((time.perf_counter() - start) / count)
                own = []
                for i in few:
                    start = time.perf_counter()
                    found = rival.solve(batch, i, joint.round_s[i])
                    own.append(time.perf_counter() - start)
                    theirs[name].append((i, found))
                cvxpy_s[name].append(float(np.mean(own)))
        for name in problems:
            good = [(i, found) for i, found in theirs[name] if found.found]
            energy = result[name].energy_j
            difference = [abs(found.energy_j / energy[i] - 1) for i, found in good]
            ratio = float(np.median(np.array(cvxpy_s[name]) / np.array(ours_s[name])))
            target = TARGET_RATIO[name].get(devices)
            rows.append(
                {
                    "problem": name,
                    "devices": devices,
                    "batch": count,
                    "ours_us": 1e6 * float(np.median(ours_s[name])),
                    "cvxpy_ms": 1e3 * float(np.median(cvxpy_s[name])),
                    "clarabel_ms": 1e3
                    * float(np.median([f.solver_s for _, f in good] or [np.nan])),
                    "ratio": ratio,
                    "target": target,
                    "met": None if target is None else ratio >= target,
                    "largest_gap": float(np.abs(result[name].gap).max()),
                    "not_certified": int((result[name].status != 0).sum()),
                    "median_difference": float(np.median(difference or [np.nan])),
                    "largest_difference": max(difference, default=float("nan")),
                    "cvxpy_solved": len(theirs[name]),
                    "cvxpy_inaccurate": sum(f.status == "optimal_inaccurate" for _, f in good),
                    "cvxpy_failed": len(theirs[name]) - len(good),
                }
            )
    return rows


def latency(size: Size) -> dict[str, Any]:
    """Microseconds of one call with one cell of 20 devices: checks, solution and certificate."""
    rng = np.random.default_rng(20)
    given = [arguments(1, 20, rng) for _ in range(50)]
    targets = [case(Batch(**one), "fdma", rng).round_s for one in given]
    times = []
    for i in range(size.latency_calls):
        one, round_s = given[i % 50], targets[i % 50]
        start = time.perf_counter()
        solve(Batch(**one), LeastEnergy(round_s))
        times.append(1e6 * (time.perf_counter() - start))
    median, late = (float(v) for v in np.quantile(times, [0.5, 0.9]))
    return {
        "devices": 20,
        "median_us": median,
        "percentile_90_us": late,
        "target_us": TARGET_LATENCY_US,
        "met": median <= TARGET_LATENCY_US,
    }


def peak_flop_per_s() -> float:
    """Operations per second that one core reaches here: a matrix product, nearly all fused
    multiply-adds at full vector width (loops of numba's reached a third of it)."""
    n = 512
    a = np.random.default_rng(0).random((n, n))
    return 2 * n**3 / min(seconds(lambda: a @ a, 0.1) for _ in range(5))


def limit_instances_per_s(objective: str, devices: int, peak: float) -> float | None:
    """Instances per second if every operation counted above ran at the peak rate."""
    per, count = OPERATIONS_PER_DEVICE_ITERATION[objective], ITERATIONS[objective]
    once = OPERATIONS_PER_DEVICE_ONCE[objective]
    if per is None or count is None or once is None:
        return None
    return peak / (devices * (count * per + once))


def limits(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The limit beside what the largest batch of each size reaches."""
    peak = peak_flop_per_s()
    largest = max(row["batch"] for row in rows)
    found = []
    for row in rows:
        if row["access"] == "tdma" or row["batch"] < largest or row["objective"] == "shortest":
            continue
        limit = limit_instances_per_s(row["objective"], row["devices"], peak)
        found.append(
            {
                "objective": row["objective"],
                "devices": row["devices"],
                "instances_per_s": row["instances_per_s"],
                "limit_instances_per_s": limit,
                "share": None if limit is None else row["instances_per_s"] / limit,
            }
        )
    return {"peak_flop_per_s": peak, "rows": found}


def pin_to_one_core() -> int | None:
    """Stay on one core; return its number, or None where the system cannot do that."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return core


def verdict(met: bool | None) -> str:
    return "" if met is None else "met" if met else "MISSED"


def show(result: dict[str, Any]) -> None:
    batches = sorted({row["batch"] for row in result["throughput"]})
    print(f"ours, instances per second{'':17}" + "".join(f"batch {n:<8}" for n in batches))
    lines: dict[tuple[Any, ...], list[str]] = {}
    for row in result["throughput"]:
        key = (row["access"], row["objective"], row["devices"])
        lines.setdefault(key, []).append(f"{row['instances_per_s']:<14,.0f}")
    for (access, objective, devices), cells in sorted(lines.items()):
        print(f"  {access}  {objective:<13} {devices:>4} devices     " + "".join(cells))
    print(f"Weighted over LeastEnergy in speed (target {TARGET_WEIGHTED})")
    for row in result["throughput"]:
        if row["batch"] == batches[-1] and "over_least_energy" in row:
            value = row["over_least_energy"]
            print(
                f"  {row['access']}  {row['devices']:>4} devices  {value:.2f}  "
                f"{verdict(value >= TARGET_WEIGHTED)}"
            )
    print("against cvxpy with Clarabel, compiled once")
    print(
        "  problem  devices  ours (us)  cvxpy (ms)  Clarabel (ms)   ratio  target          "
        "gap  differs by median / largest  inaccurate, failed of"
    )
    for row in result["ratios"]:
        print(
            f"  {row['problem']:<8} {row['devices']:>6} {row['ours_us']:>10.2f} "
            f"{row['cvxpy_ms']:>11.2f} {row['clarabel_ms']:>14.2f} {row['ratio']:>7.0f} "
            f"{row['target'] or 0:>7} {verdict(row['met']):<7} {row['largest_gap']:>7.0e}  "
            f"{row['median_difference']:>15.0e} / {row['largest_difference']:.0e} "
            f"{row['cvxpy_inaccurate']:>14}, {row['cvxpy_failed']} of {row['cvxpy_solved']}"
        )
    one = result["latency"]
    print(
        f"one call, 1 cell of {one['devices']} devices: median {one['median_us']:.0f} us, 90th "
        f"percentile {one['percentile_90_us']:.0f} us (target {one['target_us']}: "
        f"{verdict(one['met'])})"
    )
    limit = result["limit"]
    print(f"one core reaches {limit['peak_flop_per_s'] / 1e9:.1f} Gflop/s (matrix product)")
    for row in limit["rows"]:
        if row["share"] is None:
            print(f"  {row['objective']:<13} {row['devices']:>4} devices  operations not counted")
        else:
            print(
                f"  {row['objective']:<13} {row['devices']:>4} devices  limit "
                f"{row['limit_instances_per_s']:,.0f} instances/s, reached {row['share']:.0%}"
            )


def main() -> None:
    arguments = parser("the allocator on one core")
    given = arguments.parse_args()
    warnings.simplefilter("ignore")  # cvxpy warns of inaccurate solutions; they are counted
    size = QUICK if given.quick else Size()
    pinned = pin_to_one_core()
    load = os.getloadavg()[0]
    speed = throughput(size)
    result = {
        "machine": machine(pinned_to_core=pinned),
        "versions": versions(PACKAGES),
        "load_average": load,
        "quick": given.quick,
        "repeats": size.repeats,
        "throughput": speed,
        "ratios": ratios(size),
        "latency": latency(size),
        "limit": limits(speed),
    }
    show(result)
    write(result, given, "allocator")


if __name__ == "__main__":
    main()
