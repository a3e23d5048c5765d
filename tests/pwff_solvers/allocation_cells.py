"""Random cells for the tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from pwff_solvers.allocation import Batch


def random_arguments(
    rng: np.random.Generator,
    instances: int,
    devices: int,
    decades: float = 3.0,
    *,
    floors: bool = True,
    zeros: bool = False,
    delay: float = 0.01,
) -> dict[str, Any]:
    """Arguments of a batch: gains over some decades, floors and empty devices on request."""
    shape = (instances, devices)
    payload, work = 10 ** rng.uniform(4, 6, shape), 10 ** rng.uniform(7, 10, shape)
    f_max = rng.uniform(0.5e9, 3e9, shape)
    f_min = f_max * rng.choice([0.0, 0.05, 0.3, 1.0], shape) if floors else 0.0 * f_max
    if zeros:
        payload[rng.random(shape) < 0.2] = 0.0
        work[rng.random(shape) < 0.2] = 0.0
    return {
        "payload_bit": payload,
        "work_cycles": work,
        "gain": 10 ** rng.uniform(-12 - decades / 2, -12 + decades / 2, shape),
        "power_max_w": 10 ** rng.uniform(-2.5, -0.5, shape),
        "frequency_min_hz": f_min,
        "frequency_max_hz": f_max,
        "kappa": 10 ** rng.uniform(-28.5, -27, shape),
        "bandwidth_hz": 10 ** rng.uniform(5.5, 7.5, instances),
        "noise_psd_w_per_hz": 4e-21,
        "fixed_delay_s": delay,
        "fixed_energy_j": 1e-3,
    }


def random_batch(
    rng: np.random.Generator, instances: int, devices: int, decades: float = 3.0, **how: Any
) -> Batch:
    """A random batch."""
    return Batch(**random_arguments(rng, instances, devices, decades, **how))
