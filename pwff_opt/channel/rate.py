"""Shannon's rate."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def rate_bps(
    *,
    bandwidth_hz: ArrayLike,
    power_w: ArrayLike,
    gain: ArrayLike,
    noise_psd_w_per_hz: ArrayLike,
) -> NDArray[np.float64]:
    r"""Return the rate of a Gaussian channel in bit/s (the inputs broadcast).

    .. math:: R = b \log_2\left(1 + \frac{p h}{N_0 b}\right)

    b bandwidth [Hz], p power [W], h power gain, N_0 noise density [W/Hz]; R = 0 where b = 0. Source:
    Shannon, "Communication in the presence of noise", Proc. IRE 1949, eq. (25).

    >>> float(rate_bps(bandwidth_hz=1e6, power_w=1.0, gain=3e-15, noise_psd_w_per_hz=1e-21))
    2000000.0
    """
    b = np.asarray(bandwidth_hz, dtype=float)
    received_w = np.asarray(power_w, dtype=float) * np.asarray(gain, dtype=float)
    noise_w = np.asarray(noise_psd_w_per_hz, dtype=float) * b
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = b * np.log1p(received_w / noise_w) / np.log(2.0)
    return np.where(b > 0, rate, 0.0)
