"""No fading: the gain is always its mean."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pwff_opt.registry import CHANNELS
from pwff_opt.scenario import Radio


class NoFading:
    """A channel that does not fade."""

    def gain(self, count: int, *, radio: Radio, rng: np.random.Generator) -> NDArray[np.float64]:
        """Return ``count`` ones; nothing is drawn."""
        return np.ones(count)


CHANNELS.add("none", NoFading())
