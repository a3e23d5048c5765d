"""From distance to power gain, and from power to rate."""

from pwff_opt.channel.gain import channel_gain, fading_gain
from pwff_opt.channel.path_loss import mean_gain
from pwff_opt.channel.rate import rate_bps

__all__ = ["channel_gain", "fading_gain", "mean_gain", "rate_bps"]
