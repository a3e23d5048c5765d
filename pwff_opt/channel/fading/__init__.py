"""Small-scale fading: one file a model, which adds it to ``CHANNELS`` under the name of ``radio.fading``."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pwff_opt.scenario import Radio


class Fading(Protocol):
    """A model of small-scale fading; it holds nothing, so that one serves all scenarios."""

    def gain(self, count: int, *, radio: Radio, rng: np.random.Generator) -> NDArray[np.float64]:
        """Return ``count`` independent power gains, each of mean 1, drawn from ``rng``."""
        ...
