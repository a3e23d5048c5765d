"""Compile the kernels now and keep them: ``python -m pwff_solvers.allocation``.

Otherwise the first call of each kind does it, which takes half a minute once.
"""

from __future__ import annotations

import time

from pwff_solvers.allocation import (
    Batch,
    LeastEnergy,
    Shortest,
    Weighted,
    solve,
)
from pwff_solvers.allocation.solve import SCHEMES
from pwff_solvers.compiled.switch import COMPILED


def main() -> None:
    """Solve one small instance of each kind."""
    if not COMPILED:
        print("allocator: numba is absent or switched off, plain numpy is used")
        return
    start = time.perf_counter()
    print("allocator: compiling its kernels (half a minute, once)", flush=True)
    batch = Batch(
        payload_bit=[1e5, 2e5, 0.0], work_cycles=1e9, gain=1e-10, power_max_w=0.1,
        frequency_min_hz=1e8, frequency_max_hz=2e9, kappa=1e-28, bandwidth_hz=1e6,
        noise_psd_w_per_hz=4e-21,
    )  # fmt: skip
    for access in SCHEMES:
        for objective in (Shortest(), LeastEnergy(10.0), Weighted(1.0), Weighted(1e9)):
            solve(batch, objective, access)
    print(f"allocator: ready after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
