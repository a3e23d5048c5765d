r"""The downlink: one broadcast to all devices, at the rate the weakest can decode."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from pwff_solvers.allocation.batch import Batch
from pwff_solvers.allocation.checks import NOT_NEGATIVE, POSITIVE, filled
from pwff_solvers.errors import InvalidInputError

__all__ = ["broadcast"]


def broadcast(
    batch: Batch,
    payload_bit: ArrayLike,
    power_w: ArrayLike,
    gain: ArrayLike | None = None,
    bandwidth_hz: ArrayLike | None = None,
    receive_power_w: ArrayLike = 0.0,
) -> Batch:
    r"""Return the batch whose rounds start with a broadcast from the base station.

    .. math:: t^{\mathrm{down}} = \frac{s^{\mathrm{down}}}
              {B \log_2\!\big(1 + P\,\min_k h_k/(N_0 B)\big)}

    is added to ``fixed_delay_s``, and ``receive_power_w`` times it to ``fixed_energy_j``.

    Parameters
    ----------
    batch : Batch
        Instances [instance] of devices [device]; its noise density :math:`N_0` [W/Hz] is used.
    payload_bit : array_like [instance]
        Broadcast payload :math:`s^{down}` [bit], the same for all devices; at least 0.
    power_w : array_like [instance]
        Transmit power :math:`P` of the base station [W], positive.
    gain : array_like [instance, device], optional
        Downlink gains, positive; those of the uplink if left out.
    bandwidth_hz : array_like [instance], optional
        Bandwidth of the broadcast [Hz], positive; that of the uplink if left out.
    receive_power_w : array_like [instance, device], default 0
        Power a device draws while it receives [W], at least 0.

    Returns
    -------
    Batch
        The same devices with the longer fixed delay and the larger fixed energy.

    Raises
    ------
    InvalidInputError
        If an argument is not finite, out of range or of the wrong shape.

    Notes
    -----
    *Exact.*  All devices need the whole payload before they compute, so the broadcast precedes
    everything else, and a common message is decoded by all only at a rate that the weakest
    supports.  Nothing the allocator decides enters its time: the problem with round T is the one
    without broadcast with round ``T - t_down``, and its energy that energy plus a constant.  (The
    base station's energy is not counted; at given power it is a constant too.)

    Examples
    --------
    >>> batch = Batch(payload_bit=1e5, work_cycles=1e9, gain=[3e-13, 1e-12],
    ...               power_max_w=0.1, frequency_min_hz=0.0, frequency_max_hz=2e9, kappa=1e-28,
    ...               bandwidth_hz=1e6, noise_psd_w_per_hz=1e-19)
    >>> later = broadcast(batch, 4e6, power_w=1.0, receive_power_w=0.5)
    >>> later.fixed_delay_s.tolist(), later.fixed_energy_j.tolist()  # SNR 3: 2 bit/s/Hz
    ([2.0], [[1.0, 1.0]])
    """
    if not isinstance(batch, Batch):
        raise InvalidInputError(f"batch must be a Batch, got {type(batch).__name__}")
    cell, device = (batch.instances,), (batch.instances, batch.devices)
    payload = filled("payload_bit", payload_bit, NOT_NEGATIVE, cell)
    power = filled("power_w", power_w, POSITIVE, cell)
    h = batch.gain if gain is None else filled("gain", gain, POSITIVE, device)
    band = batch.bandwidth_hz
    if bandwidth_hz is not None:
        band = filled("bandwidth_hz", bandwidth_hz, POSITIVE, cell)
    receiving = filled("receive_power_w", receive_power_w, NOT_NEGATIVE, device)
    snr = power * h.min(axis=1) / (batch.noise_psd_w_per_hz * band)
    duration = payload * np.log(2.0) / (band * np.log1p(snr))
    return batch.replace(
        fixed_delay_s=batch.fixed_delay_s + duration,
        fixed_energy_j=batch.fixed_energy_j + receiving * duration[:, None],
    )
