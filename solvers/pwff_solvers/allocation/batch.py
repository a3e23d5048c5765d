"""A batch of allocation problems, checked once and then only read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pwff_solvers.allocation.errors import InvalidInputError

__all__ = ["Batch", "FloatArray", "per_instance"]

FloatArray = NDArray[np.float64]

# argument -> (rule in words, True where the rule holds)
_Rule = tuple[str, Callable[[FloatArray], NDArray[np.bool_]]]
_POSITIVE: _Rule = ("positive", lambda x: x > 0)
_NOT_NEGATIVE: _Rule = ("at least 0", lambda x: x >= 0)
_DEVICE: dict[str, _Rule] = {
    "payload_bit": _NOT_NEGATIVE,
    "work_cycles": _NOT_NEGATIVE,
    "gain": _POSITIVE,
    "power_max_w": _POSITIVE,
    "frequency_min_hz": _NOT_NEGATIVE,
    "frequency_max_hz": _POSITIVE,
    "kappa": _NOT_NEGATIVE,
    "power_min_w": _NOT_NEGATIVE,
    "fixed_energy_j": _NOT_NEGATIVE,
}
_CELL: dict[str, _Rule] = {
    "bandwidth_hz": _POSITIVE,
    "noise_psd_w_per_hz": _POSITIVE,
    "fixed_delay_s": _NOT_NEGATIVE,
}


def _array(name: str, value: ArrayLike) -> FloatArray:
    """Copy ``value`` to a float array, or say why it is not one."""
    try:
        return np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        message = f"{name} must be an array of real numbers, got {value!r}"
        raise InvalidInputError(message) from error


def _place(name: str, index: tuple[int, ...]) -> str:
    return f"{name}[{', '.join(str(i) for i in index)}]" if index else name


def _check(name: str, array: FloatArray, rule: _Rule) -> None:
    """Raise at the first entry that is not finite or breaks the rule."""
    for words, good in (("finite", np.isfinite(array)), (rule[0], rule[1](array))):
        if not good.all():
            index = tuple(int(i) for i in np.argwhere(~good)[0]) if array.ndim else ()
            raise InvalidInputError(f"{_place(name, index)} must be {words}, got {array[index]}")


def per_instance(name: str, value: ArrayLike, instances: int) -> FloatArray:
    """Check a positive quantity and broadcast it to [instance]."""
    array = _array(name, value)
    _check(name, array, _POSITIVE)
    if array.ndim > 1 or (array.ndim == 1 and array.size not in (1, instances)):
        raise InvalidInputError(
            f"{name} must have shape [{instances}] or be a scalar, got shape {list(array.shape)}"
        )
    return np.broadcast_to(array, (instances,))


@dataclass(frozen=True, slots=True, eq=False, init=False)
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
        If an entry is not finite or out of range, limits cross, or shapes disagree.

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

    payload_bit: FloatArray
    work_cycles: FloatArray
    gain: FloatArray
    power_max_w: FloatArray
    frequency_min_hz: FloatArray
    frequency_max_hz: FloatArray
    kappa: FloatArray
    bandwidth_hz: FloatArray
    noise_psd_w_per_hz: FloatArray
    power_min_w: FloatArray
    fixed_energy_j: FloatArray
    fixed_delay_s: FloatArray

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
        given: dict[str, ArrayLike] = {
            "payload_bit": payload_bit,
            "work_cycles": work_cycles,
            "gain": gain,
            "power_max_w": power_max_w,
            "frequency_min_hz": frequency_min_hz,
            "frequency_max_hz": frequency_max_hz,
            "kappa": kappa,
            "power_min_w": power_min_w,
            "fixed_energy_j": fixed_energy_j,
            "bandwidth_hz": bandwidth_hz,
            "noise_psd_w_per_hz": noise_psd_w_per_hz,
            "fixed_delay_s": fixed_delay_s,
        }
        arrays = {name: _array(name, value) for name, value in given.items()}
        instances, devices = _common_shape(arrays)
        for name, array in arrays.items():
            _check(name, array, _DEVICE.get(name) or _CELL[name])
            shape = (instances, devices) if name in _DEVICE else (instances,)
            object.__setattr__(self, name, np.broadcast_to(array, shape))
        _check_order(self.power_min_w, self.power_max_w, "power_min_w", "power_max_w")
        _check_order(
            self.frequency_min_hz, self.frequency_max_hz, "frequency_min_hz", "frequency_max_hz"
        )

    def take(self, instances: ArrayLike) -> Batch:
        """Return the batch of some instances (indices or a mask)."""
        rows = np.asarray(instances)
        names = (*_DEVICE, *_CELL)
        return Batch(**{name: getattr(self, name)[rows] for name in names})

    @property
    def instances(self) -> int:
        """Number of instances."""
        return int(self.payload_bit.shape[0])

    @property
    def devices(self) -> int:
        """Number of devices of every instance."""
        return int(self.payload_bit.shape[1])


def _check_order(low: FloatArray, high: FloatArray, low_name: str, high_name: str) -> None:
    crossed = low > high
    if crossed.any():
        i, k = (int(v) for v in np.argwhere(crossed)[0])
        raise InvalidInputError(
            f"{low_name}[{i}, {k}] must be at most {high_name}[{i}, {k}] = {high[i, k]}, "
            f"got {low[i, k]}"
        )


def _common_shape(arrays: dict[str, FloatArray]) -> tuple[int, int]:
    """Shape [instance, device] that every argument broadcasts to."""
    first: dict[str, tuple[int, str]] = {}
    for name, array in arrays.items():
        limit = 2 if name in _DEVICE else 1
        if array.ndim > limit:
            wanted = "[instance, device]" if limit == 2 else "[instance]"
            raise InvalidInputError(
                f"{name} must broadcast to {wanted}, got shape {list(array.shape)}"
            )
        if name in _DEVICE:
            axes = ("device",) if array.ndim == 1 else ("instance", "device")[: array.ndim]
        else:
            axes = ("instance",)[: array.ndim]
        for axis, size in zip(axes, array.shape, strict=True):
            if size == 1:
                continue
            known = first.setdefault(axis, (size, name))
            if known[0] != size:
                raise InvalidInputError(
                    f"{name} must have {known[0]} along the {axis} axis like {known[1]}, "
                    f"got shape {list(array.shape)}"
                )
    devices = first.get("device", (1, ""))[0]
    if devices == 0:
        raise InvalidInputError(f"{first['device'][1]} must have at least one device, got 0")
    return first.get("instance", (1, ""))[0], devices
