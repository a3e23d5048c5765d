"""Shadowing: what buildings and hills add to the path loss of each device."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pwff_opt.rng import stream
from pwff_opt.scenario import Scenario


def shadowing_db(scenario: Scenario) -> NDArray[np.float64]:
    """Return the shadowing of every device in dB, drawn once for all rounds.

    It is normal with mean 0 (log-normal shadowing). Streams are keyed by device, so that more devices
    leave the others' draws as they are.
    """
    std_db, seed = scenario.radio.shadowing_std_db, scenario.seeds.channel
    return np.array(
        [
            stream(seed, "shadowing", device=k).normal(0.0, std_db)
            for k in range(len(scenario.devices))
        ]
    )
