"""Rician fading: a direct path beside the scattered ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pwff_opt.registry import CHANNELS
from pwff_opt.scenario import Radio


class Rician:
    """A channel with a direct path, whose share is ``radio.rician_factor``."""

    def gain(self, count: int, *, radio: Radio, rng: np.random.Generator) -> NDArray[np.float64]:
        r"""Return ``count`` independent power gains, each of mean 1.

        With the factor K, the power of the direct path over that of the scattered ones,

        .. math:: |g|^2, \quad g = \sqrt{K/(K+1)} + \sqrt{1/(K+1)}\, w, \quad w \sim CN(0, 1)

        Source: Goldsmith, "Wireless Communications", 2005, section 3.2.2.
        """
        k = radio.rician_factor
        real, imaginary = rng.normal(0.0, np.sqrt(0.5 / (k + 1.0)), (2, count))
        return np.asarray((np.sqrt(k / (k + 1.0)) + real) ** 2 + imaginary**2)


CHANNELS.add("rician", Rician())
