"""Path loss, shadowing and per-round fading."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pwff_opt.rng import stream
from pwff_opt.scenario import Radio, Scenario
from pwff_opt.units import linear_from_db


def mean_gain(
    distance_m: ArrayLike, *, radio: Radio, shadowing_db: ArrayLike = 0.0
) -> NDArray[np.float64]:
    r"""Return the power gain averaged over fading (linear, shape of the inputs).

    .. math:: \bar h = 10^{-(L_0 + n \log_{10}(d / 1\,\mathrm{km}) + X) / 10}

    with :math:`L_0` = ``radio.path_loss_1km_db``, n = ``radio.path_loss_slope_db`` (dB a decade) and X the
    shadowing in dB. With the defaults it is the macro-cell model of 3GPP TR 36.942, section 4.5.2, at
    2 GHz; it holds from some 35 m up. Nearer than 1 m the distance counts as 1 m.

    >>> float(mean_gain(1000.0, radio=Radio(shadowing_std_db=0.0)))  # 128.1 dB at one kilometre
    1.5488166189124...e-13
    """
    distance_km = np.maximum(np.asarray(distance_m, dtype=float), 1.0) / 1000.0
    loss_db = radio.path_loss_1km_db + radio.path_loss_slope_db * np.log10(distance_km)
    return linear_from_db(-(loss_db + np.asarray(shadowing_db)))


def fading_gain(shape: int, *, radio: Radio, rng: np.random.Generator) -> NDArray[np.float64]:
    r"""Return ``shape`` independent power gains of small-scale fading, each of mean 1.

    Rician with factor K (power of the direct path over the scattered ones):

    .. math:: |g|^2, \quad g = \sqrt{K/(K+1)} + \sqrt{1/(K+1)}\, w, \quad w \sim CN(0, 1)

    Rayleigh is K = 0, so :math:`|g|^2` is exponential; "none" is 1. Source: Goldsmith, "Wireless
    Communications", 2005, section 3.2.2.
    """
    if radio.fading == "none":
        return np.ones(shape)
    k = radio.rician_factor if radio.fading == "rician" else 0.0
    scattered = rng.normal(0.0, np.sqrt(0.5 / (k + 1.0)), (2, shape))
    return np.asarray((np.sqrt(k / (k + 1.0)) + scattered[0]) ** 2 + scattered[1] ** 2)


def channel_gain(scenario: Scenario) -> NDArray[np.float64]:
    """Return the power gain [round, device] of every round of a scenario.

    Shadowing is drawn once a device, fading anew for every round and device (block fading); up and
    downlink share the gain. Streams are keyed by round and device, so that more rounds or devices leave
    the others' draws as they are.
    """
    devices, seed = scenario.devices, scenario.seeds.channel
    shadowing_db = np.array(
        [
            stream(seed, "shadowing", device=k).normal(0.0, scenario.radio.shadowing_std_db)
            for k in range(len(devices))
        ]
    )
    distance_m = [device.distance_m for device in devices]
    mean = mean_gain(distance_m, radio=scenario.radio, shadowing_db=shadowing_db)
    fading = [
        [
            fading_gain(1, radio=scenario.radio, rng=stream(seed, "fading", round=t, device=k))[0]
            for k in range(len(devices))
        ]
        for t in range(scenario.training.rounds)
    ]
    return np.asarray(mean * np.array(fading))
