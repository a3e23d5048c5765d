"""The power gain of every round and device: path loss, shadowing and fading together."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pwff_opt.channel.fading import Fading
from pwff_opt.channel.path_loss import mean_gain
from pwff_opt.channel.shadowing import shadowing_db
from pwff_opt.registry import CHANNELS
from pwff_opt.rng import stream
from pwff_opt.scenario import Radio, Scenario


def fading_gain(count: int, *, radio: Radio, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return ``count`` independent power gains of small-scale fading, each of mean 1.

    ``radio.fading`` names the model, one of :mod:`pwff_opt.channel.fading` or of a plug-in.
    """
    model: Fading = CHANNELS[radio.fading]
    return model.gain(count, radio=radio, rng=rng)


def channel_gain(scenario: Scenario) -> NDArray[np.float64]:
    """Return the power gain [round, device] of every round of a scenario.

    Shadowing is drawn once a device, fading anew for every round and device (block fading); up and
    downlink share the gain. Streams are keyed by round and device, so that more rounds or devices leave
    the others' draws as they are.
    """
    devices, seed = scenario.devices, scenario.seeds.channel
    distance_m = [device.distance_m for device in devices]
    mean = mean_gain(distance_m, radio=scenario.radio, shadowing_db=shadowing_db(scenario))
    fading = [
        [
            fading_gain(1, radio=scenario.radio, rng=stream(seed, "fading", round=t, device=k))[0]
            for k in range(len(devices))
        ]
        for t in range(scenario.training.rounds)
    ]
    return np.asarray(mean * np.array(fading))
