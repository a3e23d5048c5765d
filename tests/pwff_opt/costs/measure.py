"""What torch says it does: its own FLOP counter, and its profiler of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode


def flops_of(run: Callable[[], Any]) -> int:
    """Return what torch's own counter counts."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def allocated_byte(run: Callable[[], Any]) -> int:
    """Return the highest number of bytes allocated at once, beyond what was there before.

    The profiler reports every allocation and release of torch's CPU allocator, also those inside
    kernels, so it is exact: the highest running sum.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    running = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        running += event.nbytes()
        peak = max(peak, running)
    return peak


def storage_byte(tensors: Iterable[torch.Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
