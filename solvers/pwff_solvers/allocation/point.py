"""What a bracketed search finds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pwff_solvers.allocation.batch import FloatArray

__all__ = ["Point"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Point:
    """A solution in the kernel's layout: [device, instance], and [instance] for the scalars."""

    b: FloatArray
    z: FloatArray
    t: FloatArray
    f: FloatArray
    time: FloatArray  # round without the fixed delay; NaN where infeasible
    price_of_bandwidth: FloatArray
    price_of_time: FloatArray
    shortest: FloatArray  # without the fixed delay; NaN where not computed
    binding: NDArray[np.int64]  # device that holds the shortest round; -1 where not computed
