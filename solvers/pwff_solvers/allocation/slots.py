"""Names of the places in the packed arrays that kernels share."""

from __future__ import annotations

# What a batch says of a device: `device` [instance, quantity, device].
DEVICE_PAYLOAD = 0  # [bit]
DEVICE_WORK = 1  # [cycles]
DEVICE_GAIN = 2  # channel power gain
DEVICE_POWER_MAX = 3  # [W]
DEVICE_F_MIN = 4  # least frequency [Hz]
DEVICE_F_MAX = 5  # largest frequency [Hz]
DEVICE_KAPPA = 6  # [W/Hz^3]
DEVICE_POWER_MIN = 7  # [W]
DEVICE_FIXED_ENERGY = 8  # [J]

# What a batch says of a cell: `cell` [instance, quantity].
CELL_BAND = 0  # [Hz]
CELL_NOISE = 1  # noise density [W/Hz]
CELL_DELAY = 2  # fixed delay [s]

# What is decided for a device: `decision` or `points` [instance, quantity, device].
POINT_BAND = 0  # bandwidth [Hz]
POINT_POWER = 1  # [W]
POINT_FREQUENCY = 2  # [Hz]
POINT_UPLOAD = 3  # upload time [s]
POINT_COMPUTE = 4  # computing time [s]
POINT_ENERGY = 5  # energy, the fixed one included [J]
PRIMAL = (POINT_BAND, POINT_POWER, POINT_FREQUENCY, POINT_UPLOAD)
"""The decision itself; the others follow from it."""
POINTS = 6
"""Number of quantities that are decided for a device."""

# What is found for an instance: `scalars` [instance, quantity].
SCALAR_CONVERGED = 0  # 1 where a solution is found, else 0
SCALAR_TIME = 1  # round without the fixed delay [s]
SCALAR_LAM = 2  # price of bandwidth [J/Hz]
SCALAR_MU = 3  # price of time [W]
SCALAR_SLOPE = 4  # slope of the price of time in the logarithm of the price of bandwidth [W]
SCALARS = 5
"""Number of quantities that are found for an instance."""
