"""Random streams keyed by purpose, round and device, so that no draw depends on the order of work."""

from __future__ import annotations

from zlib import crc32

import numpy as np


def stream(
    seed: int, purpose: str, *, round: int = 0, device: int = 0, item: int = 0
) -> np.random.Generator:
    """Return the generator of one purpose, round and device.

    The key enters ``numpy.random.SeedSequence`` as its spawn key: streams are independent of one
    another and of how many others were drawn before, in this process or in another.
    """
    key = (crc32(purpose.encode()), round, device, item)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
