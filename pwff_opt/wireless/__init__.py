"""From distance to power gain, and from power to rate."""

from pwff_opt.wireless.channel import channel_gain, fading_gain, mean_gain
from pwff_opt.wireless.rate import rate_bps

__all__ = ["channel_gain", "fading_gain", "mean_gain", "rate_bps"]
