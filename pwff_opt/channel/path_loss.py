"""Path loss: from distance to the mean power gain."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pwff_opt.scenario import Radio
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
