"""What the allocator returns."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from pwff_solvers.allocation.batch import FloatArray

__all__ = ["Allocation", "Status"]


class Status(IntEnum):
    """Outcome of one instance; ``status.sentence`` says what to do about it."""

    OPTIMAL = 0
    INACCURATE = 1
    INFEASIBLE = 2

    @property
    def sentence(self) -> str:
        """Return one sentence for the user."""
        return _SENTENCES[self]


_SENTENCES = {
    Status.OPTIMAL: "Certified optimal: use the allocation as it is.",
    Status.INACCURATE: (
        "The certificate missed its tolerance: read `gap` and `violation` before use; the round may be "
        "the shortest but for rounding, a search was cut short, or quantities of this instance differ "
        "by many decades."
    ),
    Status.INFEASIBLE: (
        "No allocation meets the round length: ask for at least `shortest_round_s`, or relieve "
        "`binding_device` (less payload or work, more power, frequency or gain)."
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Allocation:
    """Allocations of a batch, with prices, status and certificate.

    Attributes
    ----------
    bandwidth_hz, power_w, frequency_hz, upload_s, compute_s : array [instance, device]
        The decision.  With TDMA every uploading device has the full bandwidth during its own
        ``upload_s``.  A device without payload has zero bandwidth, power and upload time.
    device_energy_j : array [instance, device]
        Energy of each device [J], fixed energy included.
    energy_j, round_s : array [instance]
        Total energy [J] and round length [s], fixed parts included.
    price_of_bandwidth_j_per_hz : array [instance]
        -dE/dB [J/Hz] at fixed round length.  At the shortest round: its limit from longer rounds,
        except that ``Weighted`` takes the multiplier that supports its price of time.
    price_of_time_w : array [instance]
        -dE/dT [W] at the round length returned; at the shortest round, as above.  With ``Weighted``
        the price asked for, which is among those that support the point where it has a kink.
    status : array of int [instance]
        Values of :class:`Status`.
    shortest_round_s : array [instance]
        Shortest round [s]; known with ``Shortest`` and where infeasible, NaN elsewhere.
    binding_device : array of int [instance]
        Where ``status`` is INFEASIBLE: the device with the largest share in the price of time at
        the shortest round, that is, the one whose relief shortens it most; -1 elsewhere.
    gap : array [instance]
        Relative duality gap, (value - bound) / value, of the point returned (fixed parts left
        out of the value).  Where infeasible: the gap of ``shortest_round_s``, so that
        ``shortest_round_s * (1 - gap) > round_s`` proves infeasibility.
    violation : array [instance]
        Largest relative violation of a constraint by the point returned; NaN where infeasible.
    """

    bandwidth_hz: FloatArray
    power_w: FloatArray
    frequency_hz: FloatArray
    upload_s: FloatArray
    compute_s: FloatArray
    device_energy_j: FloatArray
    energy_j: FloatArray
    round_s: FloatArray
    price_of_bandwidth_j_per_hz: FloatArray
    price_of_time_w: FloatArray
    status: NDArray[np.int8]
    shortest_round_s: FloatArray
    binding_device: NDArray[np.int64]
    gap: FloatArray
    violation: FloatArray

    def __repr__(self) -> str:
        instances, devices = self.power_w.shape
        if not instances:
            return f"Allocation(0 instances x {devices} devices)"
        number = ((int((self.status == status).sum()), status.name) for status in Status)
        outcomes = ", ".join(f"{count} {name}" for count, name in number if count)
        return (
            f"Allocation({instances} instances x {devices} devices: {outcomes}; "
            f"worst gap {np.max(self.gap):.1e})"
        )
