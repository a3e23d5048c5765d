"""A batch of allocation problems, checked once and then only read."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pwff_solvers.allocation.checks import NOT_NEGATIVE, POSITIVE, Rule, as_array, check, rows
from pwff_solvers.allocation.slots import (
    CELL_BAND,
    CELL_DELAY,
    CELL_NOISE,
    DEVICE_F_MAX,
    DEVICE_F_MIN,
    DEVICE_FIXED_ENERGY,
    DEVICE_GAIN,
    DEVICE_KAPPA,
    DEVICE_PAYLOAD,
    DEVICE_POWER_MAX,
    DEVICE_POWER_MIN,
    DEVICE_WORK,
)
from pwff_solvers.compiled.elementary import FloatArray, entry
from pwff_solvers.compiled.switch import COMPILED
from pwff_solvers.errors import InvalidInputError

__all__ = ["Batch", "FloatArray"]

_DEVICE: dict[str, Rule] = {
    "payload_bit": NOT_NEGATIVE,
    "work_cycles": NOT_NEGATIVE,
    "gain": POSITIVE,
    "power_max_w": POSITIVE,
    "frequency_min_hz": NOT_NEGATIVE,
    "frequency_max_hz": POSITIVE,
    "kappa": NOT_NEGATIVE,
    "power_min_w": NOT_NEGATIVE,
    "fixed_energy_j": NOT_NEGATIVE,
}
_CELL: dict[str, Rule] = {
    "bandwidth_hz": POSITIVE,
    "noise_psd_w_per_hz": POSITIVE,
    "fixed_delay_s": NOT_NEGATIVE,
}
_NAMES = (*_DEVICE, *_CELL)


def _column(number: int) -> property:
    """Return a property: a quantity of the devices, [instance, device]."""

    def get(batch: Batch) -> FloatArray:
        return batch.device[:, number]

    return property(get)


def _scalar(number: int) -> property:
    """Return a property: a quantity of the cells, [instance]."""

    def get(batch: Batch) -> FloatArray:
        return batch.cell[:, number]

    return property(get)


class Batch:
    r"""Instances of the allocation problem, each a cell with the same number of devices.

    Device :math:`k` computes :math:`c_k` cycles at frequency :math:`f_k` (energy
    :math:`\kappa_k c_k f_k^2`, time :math:`c_k/f_k`) and uploads :math:`s_k` bit in its own band
    :math:`b_k` at power :math:`p_k` and rate :math:`b_k \log_2(1 + p_k h_k/(N_0 b_k))`.

    Parameters
    ----------
    payload_bit, work_cycles : array_like [instance, device]
        :math:`s_k` [bit] and :math:`c_k` [cycles], at least 0.  A device without payload takes
        no bandwidth; a device without work uploads during the whole round.
    gain : array_like [instance, device]
        Channel power gain :math:`h_k`, positive, without unit.
    power_max_w : array_like [instance, device]
        Largest transmit power [W], positive.
    frequency_min_hz, frequency_max_hz : array_like [instance, device]
        Limits of the CPU frequency [Hz]; the least may be 0.
    kappa : array_like [instance, device]
        Energy coefficient of the CPU [J s^2 / cycle^3 = W/Hz^3], at least 0.
    bandwidth_hz, noise_psd_w_per_hz : array_like [instance]
        Bandwidth :math:`B` of the cell [Hz] and noise density :math:`N_0` [W/Hz], positive.
    power_min_w : array_like [instance, device], default 0
        Least transmit power [W]; only with TDMA (with FDMA it is not a convex limit).
    fixed_energy_j : array_like [instance, device], default 0
        Energy [J] added to each device whatever the allocation (reception, sensing, ...).
    fixed_delay_s : array_like [instance], default 0
        Delay [s] added to the round whatever the allocation (broadcast, aggregation, ...).

    Raises
    ------
    InvalidInputError
        If an entry is not a number, masked, not finite or out of range, limits cross, shapes
        disagree, or a quantity made of several leaves the range of a double: ``a/(P G)``,
        ``P G/B``, ``c/f_max`` or ``kappa c^3``.

    Attributes
    ----------
    device : array [instance, 9, device]
        The device quantities in the order of the signature, ``power_min_w`` and
        ``fixed_energy_j`` last; every quantity is also an attribute [instance, device].
    cell : array [instance, 3]
        ``bandwidth_hz``, ``noise_psd_w_per_hz``, ``fixed_delay_s``.

    Notes
    -----
    A device argument may be a scalar, [device], [1, device], [instance, 1] or
    [instance, device]; a cell argument a scalar or [instance].  Everything is copied, and kept as
    read-only arrays of shape [instance, device] or [instance].

    Examples
    --------
    >>> batch = Batch(payload_bit=[1e5, 2e5], work_cycles=1e9, gain=[1e-9, 1e-10],
    ...               power_max_w=0.1, frequency_min_hz=0.0, frequency_max_hz=2e9, kappa=1e-28,
    ...               bandwidth_hz=1e6, noise_psd_w_per_hz=4e-21)
    >>> batch.instances, batch.devices
    (1, 2)
    """

    __slots__ = ("cell", "device")

    device: FloatArray
    cell: FloatArray

    def __init__(
        self,
        *,
        payload_bit: ArrayLike,
        work_cycles: ArrayLike,
        gain: ArrayLike,
        power_max_w: ArrayLike,
        frequency_min_hz: ArrayLike,
        frequency_max_hz: ArrayLike,
        kappa: ArrayLike,
        bandwidth_hz: ArrayLike,
        noise_psd_w_per_hz: ArrayLike,
        power_min_w: ArrayLike = 0.0,
        fixed_energy_j: ArrayLike = 0.0,
        fixed_delay_s: ArrayLike = 0.0,
    ) -> None:
        arrays = [
            as_array(name, value)
            for name, value in zip(
                _NAMES,
                (
                    payload_bit, work_cycles, gain, power_max_w, frequency_min_hz,
                    frequency_max_hz, kappa, power_min_w, fixed_energy_j,
                    bandwidth_hz, noise_psd_w_per_hz, fixed_delay_s,
                ),
                strict=True,
            )
        ]  # fmt: skip
        instances, devices = _common_shape(arrays)
        device = np.empty((instances, len(_DEVICE), devices))
        cell = np.empty((instances, len(_CELL)))
        for number, array in enumerate(arrays[: len(_DEVICE)]):
            device[:, number] = array
        for number, array in enumerate(arrays[len(_DEVICE) :]):
            cell[:, number] = array
        if not (COMPILED and _good(device, cell)):
            _complain(arrays, device, cell)
        self._own(device, cell)

    def _own(self, device: FloatArray, cell: FloatArray) -> None:
        device.flags.writeable = cell.flags.writeable = False
        object.__setattr__(self, "device", device)
        object.__setattr__(self, "cell", cell)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Batch is read-only: make a new one to change {name}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _batch, (self.device, self.cell)

    def __repr__(self) -> str:
        return f"Batch({self.instances} instances x {self.devices} devices)"

    def take(self, instances: ArrayLike | slice) -> Batch:
        """Return the batch of some instances.

        Parameters
        ----------
        instances : array_like of int or bool, or slice
            Indices in any order, also none or some repeatedly; a mask [instance]; or a slice.

        Raises
        ------
        InvalidInputError
            If an index is out of range, a mask has the wrong length, or it is neither.

        Examples
        --------
        One cell at many prices of time:

        >>> from pwff_solvers.allocation import Weighted, solve
        >>> batch = Batch(payload_bit=[1e5, 2e5], work_cycles=1e9, gain=1e-10, power_max_w=0.1,
        ...               frequency_min_hz=0.0, frequency_max_hz=2e9, kappa=1e-28,
        ...               bandwidth_hz=1e6, noise_psd_w_per_hz=4e-21)
        >>> prices = np.logspace(-2, 2, 5)
        >>> solve(batch.take(np.zeros(5, int)), Weighted(prices)).round_s.shape
        (5,)
        """
        if not isinstance(instances, slice):
            instances = rows("instances", instances, self.instances)
        return _batch(self.device[instances], self.cell[instances])

    def replace(self, **arguments: ArrayLike) -> Batch:
        """Return the batch with some arguments replaced, checked like any other.

        Examples
        --------
        >>> batch = Batch(payload_bit=[1e5, 2e5], work_cycles=1e9, gain=1e-10, power_max_w=0.1,
        ...               frequency_min_hz=0.0, frequency_max_hz=2e9, kappa=1e-28,
        ...               bandwidth_hz=1e6, noise_psd_w_per_hz=4e-21)
        >>> batch.replace(payload_bit=[3e5, 4e5]).payload_bit.tolist()
        [[300000.0, 400000.0]]
        """
        kept: dict[str, Any] = {name: getattr(self, name) for name in _NAMES}
        return Batch(**kept | arguments)

    @property
    def instances(self) -> int:
        """Return the number of instances."""
        return int(self.device.shape[0])

    @property
    def devices(self) -> int:
        """Return the number of devices of every instance."""
        return int(self.device.shape[2])

    payload_bit = _column(DEVICE_PAYLOAD)
    work_cycles = _column(DEVICE_WORK)
    gain = _column(DEVICE_GAIN)
    power_max_w = _column(DEVICE_POWER_MAX)
    frequency_min_hz = _column(DEVICE_F_MIN)
    frequency_max_hz = _column(DEVICE_F_MAX)
    kappa = _column(DEVICE_KAPPA)
    power_min_w = _column(DEVICE_POWER_MIN)
    fixed_energy_j = _column(DEVICE_FIXED_ENERGY)
    bandwidth_hz = _scalar(CELL_BAND)
    noise_psd_w_per_hz = _scalar(CELL_NOISE)
    fixed_delay_s = _scalar(CELL_DELAY)


def _batch(device: FloatArray, cell: FloatArray) -> Batch:
    """Return the batch of arrays that need no check: parts or copies of another's."""
    batch = object.__new__(Batch)
    batch._own(device, cell)
    return batch


# Products and ratios of four such numbers stay in the range of a double.
_LEAST, _MOST = 1e-75, 1e75


@entry
def _good(device: FloatArray, cell: FloatArray) -> bool:
    """Return whether every rule of ``_complain`` holds for sure, in one sweep; NaN fails.

    What a rule bounds below by 0, or not above, is held to within 75 decades of 1 here: then no
    product or ratio in the kernels can leave the range, and none has to be evaluated.
    """
    for i in range(device.shape[0]):
        if not (_LEAST <= cell[i, CELL_BAND] <= _MOST and _LEAST <= cell[i, CELL_NOISE] <= _MOST):
            return False
        if not 0.0 <= cell[i, CELL_DELAY] < np.inf:
            return False
        for k in range(device.shape[2]):
            payload, work, kappa = (
                device[i, DEVICE_PAYLOAD, k],
                device[i, DEVICE_WORK, k],
                device[i, DEVICE_KAPPA, k],
            )
            if not (0.0 <= payload <= _MOST and 0.0 <= work <= _MOST and 0.0 <= kappa <= _MOST):
                return False
            if 0.0 < payload < _LEAST or 0.0 < work < _LEAST or 0.0 < kappa < _LEAST:
                return False
            if not (
                _LEAST <= device[i, DEVICE_GAIN, k] <= _MOST
                and _LEAST <= device[i, DEVICE_POWER_MAX, k] <= _MOST
            ):
                return False
            if not 0.0 <= device[i, DEVICE_F_MIN, k] <= device[i, DEVICE_F_MAX, k] <= _MOST:
                return False
            if not (
                device[i, DEVICE_F_MAX, k] >= _LEAST
                and 0.0 <= device[i, DEVICE_POWER_MIN, k] <= device[i, DEVICE_POWER_MAX, k]
            ):
                return False
            if not 0.0 <= device[i, DEVICE_FIXED_ENERGY, k] < np.inf:
                return False
    return True


def _complain(arrays: list[FloatArray], device: FloatArray, cell: FloatArray) -> None:
    """Raise for the first rule that is broken, if any, naming argument, index, rule and value."""
    for name, array in zip(_NAMES, arrays, strict=True):
        check(name, array, _DEVICE.get(name) or _CELL[name])
    _check_order(
        device[:, DEVICE_POWER_MIN], device[:, DEVICE_POWER_MAX], "power_min_w", "power_max_w"
    )
    _check_order(
        device[:, DEVICE_F_MIN], device[:, DEVICE_F_MAX], "frequency_min_hz", "frequency_max_hz"
    )
    payload, work, gain, power, _, f_max, kappa = (device[:, n] for n in range(7))
    band, noise = cell[:, CELL_BAND, None], cell[:, CELL_NOISE, None]
    with np.errstate(all="ignore"):
        g = gain / noise
        for what, names, value, wanted in (
            ("G = h/N0", ("gain", "noise_psd_w_per_hz"), g, True),
            (
                "P G/B",
                ("power_max_w", "gain", "noise_psd_w_per_hz", "bandwidth_hz"),
                power * g / band,
                True,
            ),
            (
                "a/(P G)",
                ("payload_bit", "power_max_w", "gain", "noise_psd_w_per_hz"),
                payload * np.log(2.0) / (power * g),
                payload > 0,
            ),
            ("c/f_max", ("work_cycles", "frequency_max_hz"), work / f_max, work > 0),
            (
                "kappa c^3",
                ("kappa", "work_cycles"),
                2.0 * kappa * work * work * work,
                (kappa > 0) & (work > 0),
            ),
        ):
            wrong = wanted & ~((value > 0) & (value < np.inf))
            if wrong.any():
                _complain_range(what, names, value, wrong, device, cell)


def _complain_range(
    what: str,
    names: tuple[str, ...],
    value: FloatArray,
    wrong: NDArray[np.bool_],
    device: FloatArray,
    cell: FloatArray,
) -> NoReturn:
    """Raise for a quantity of several arguments, ``names``, that is 0 or infinite where ``wrong``."""
    i, k = (int(v) for v in np.argwhere(wrong)[0])
    parts = [
        f"{name}[{i}, {k}] = {device[i, list(_DEVICE).index(name), k]}"
        if name in _DEVICE
        else f"{name}[{i}] = {cell[i, list(_CELL).index(name)]}"
        for name in names
    ]
    raise InvalidInputError(
        f"{', '.join(parts[:-1])} and {parts[-1]} must give a positive, finite {what}, "
        f"got {value[i, k]}"
    )


def _check_order(low: FloatArray, high: FloatArray, low_name: str, high_name: str) -> None:
    crossed = low > high
    if crossed.any():
        i, k = (int(v) for v in np.argwhere(crossed)[0])
        raise InvalidInputError(
            f"{low_name}[{i}, {k}] must be at most {high_name}[{i}, {k}] = {high[i, k]}, "
            f"got {low[i, k]}"
        )


def _common_shape(arrays: list[FloatArray]) -> tuple[int, int]:
    """Return the shape [instance, device] that every argument broadcasts to."""
    devices, instances = 1, 1
    for number, array in enumerate(arrays):
        shape = array.shape
        if not shape:
            continue
        mine = (1, *shape)[-2:] if number < len(_DEVICE) else (shape[0], devices)
        if len(shape) > (2 if number < len(_DEVICE) else 1):
            _complain_shapes(arrays)
        if mine[1] != devices and mine[1] != 1:
            devices = mine[1] if devices == 1 else _complain_shapes(arrays)
        if mine[0] != instances and mine[0] != 1:
            instances = mine[0] if instances == 1 else _complain_shapes(arrays)
    if devices == 0:
        _complain_shapes(arrays)
    return instances, devices


def _complain_shapes(arrays: list[FloatArray]) -> NoReturn:
    """Raise for the first shape that does not fit those before it."""
    first: dict[str, tuple[int, str]] = {}
    for number, array in enumerate(arrays):
        name = _NAMES[number]
        limit = 2 if number < len(_DEVICE) else 1
        if array.ndim > limit:
            wanted = "[instance, device]" if limit == 2 else "[instance]"
            raise InvalidInputError(
                f"{name} must broadcast to {wanted}, got shape {list(array.shape)}"
            )
        axes = ("instance", "device") if limit == 2 else ("instance",)
        for axis, size in zip(axes[limit - array.ndim :], array.shape, strict=True):
            if axis == "device" and size == 0:
                raise InvalidInputError(f"{name} must have at least one device, got 0")
            known = first.setdefault(axis, (size, name)) if size != 1 else (1, name)
            if known[0] != size:
                raise InvalidInputError(
                    f"{known[1]} and {name} must have equal sizes along the {axis} axis, "
                    f"got {known[0]} and {size}"
                )
    raise AssertionError("the shapes fit after all")
