"""One allocation problem: this package against cvxpy with Clarabel, interleaved, on one core.

Both solve least energy within a round, frequency fixed, on the same random instances (round 2x the
shortest); cvxpy as a user would first write it, the problem built anew for each instance (no DPP).
Ours solves the harder joint problem, frequency included, in one batch. Medians over repeats; ratios,
since machines differ.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np

from pwff_solvers.allocation import Batch, LeastEnergy, Shortest, solve
from pwff_solvers.allocation.oracle import solve_cvxpy

RESULT = Path(__file__).parent / "results" / "allocator.json"
INSTANCES, CVXPY_INSTANCES, REPEATS = 1000, 3, 5


def instances(count: int, devices: int, rng: np.random.Generator) -> Batch:
    return Batch(
        payload_bit=rng.uniform(2e5, 2e6, (count, devices)),
        work_cycles=rng.uniform(1e9, 1e10, (count, devices)),
        gain=10.0 ** rng.uniform(-12.0, -9.0, (count, devices)),
        power_max_w=0.2,
        frequency_min_hz=0.0,
        frequency_max_hz=2e9,
        kappa=1e-28,
        bandwidth_hz=2e6,
        noise_psd_w_per_hz=4e-21,
    )


def main() -> None:
    warnings.simplefilter("ignore")  # Clarabel says "may be inaccurate" on some of these
    rows = []
    for devices in (4, 10, 50):
        rng = np.random.default_rng(devices)
        batch = instances(INSTANCES, devices, rng)
        round_s = 2.0 * solve(batch, Shortest()).round_s
        few = batch.take(np.arange(CVXPY_INSTANCES))
        ours_s, cvxpy_s = [], []
        for _ in range(REPEATS):
            start = time.perf_counter()
            ours = solve(batch, LeastEnergy(round_s))
            ours_s.append((time.perf_counter() - start) / INSTANCES)
            start = time.perf_counter()
            solve_cvxpy(
                few,
                LeastEnergy(round_s[:CVXPY_INSTANCES]),
                frequency_hz=ours.frequency_hz[:CVXPY_INSTANCES],
            )
            cvxpy_s.append((time.perf_counter() - start) / CVXPY_INSTANCES)
        rows.append(
            {
                "devices": devices,
                "ours_s": statistics.median(ours_s),
                "cvxpy_s": statistics.median(cvxpy_s),
                "ratio": statistics.median(c / o for c, o in zip(cvxpy_s, ours_s, strict=True)),
                "largest_gap": float(np.max(ours.gap)),
            }
        )
    print(f"{'devices':>8} {'ours (s)':>12} {'cvxpy (s)':>12} {'ratio':>8} {'gap':>9}")
    for row in rows:
        print(
            f"{row['devices']:>8} {row['ours_s']:>12.3g} {row['cvxpy_s']:>12.3g} "
            f"{row['ratio']:>8.0f} {row['largest_gap']:>9.1e}"
        )
    packages = ("numpy", "scipy", "cvxpy", "clarabel")
    result = {
        "machine": {"system": platform.system(), "machine": platform.machine()},
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "batch": INSTANCES,
        "rows": rows,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {RESULT}")


if __name__ == "__main__":
    main()
