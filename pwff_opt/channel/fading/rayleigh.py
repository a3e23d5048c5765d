"""Rayleigh fading: many scattered paths, and no direct one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pwff_opt.registry import CHANNELS
from pwff_opt.scenario import Radio


class Rayleigh:
    """A channel of scattered paths alone."""

    def gain(self, count: int, *, radio: Radio, rng: np.random.Generator) -> NDArray[np.float64]:
        r"""Return ``count`` independent power gains :math:`|w|^2` with :math:`w \sim CN(0, 1)`.

        They follow the exponential law of mean 1. Source: Goldsmith, "Wireless Communications", 2005,
        section 3.2.2.
        """
        real, imaginary = rng.normal(0.0, np.sqrt(0.5), (2, count))
        return np.asarray(real**2 + imaginary**2)


CHANNELS.add("rayleigh", Rayleigh())
