"""Work on all cores: a thread and a core for each item; and what it looks like when memory ends."""

from __future__ import annotations

import ctypes
import functools
import heapq
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

import torch

from pwff_opt.errors import DecisionError

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def companies(sizes: Mapping[int, float], *, most: int, cores: int) -> list[list[int]]:
    """Return who works together: companies of up to ``most``.

    There are as many as cores, or a multiple of it, and fewer only of fewer items. The largest item
    goes first, each to the company that has least, while there is a place in it (after Graham 1969).
    """
    turns = -(-len(sizes) // (most * cores))
    found: list[list[int]] = [[] for _ in range(min(len(sizes), turns * cores))]
    open_to = [(0.0, 0, place) for place in range(len(found))]  # what each has, and how many
    for item in sorted(sizes, key=lambda item: -sizes[item]):
        held, members, place = heapq.heappop(open_to)
        found[place].append(item)
        if members + 1 < most:
            heapq.heappush(open_to, (held + sizes[item], members + 1, place))
    return [sorted(company) for company in found]


_own = threading.local()


def go_on() -> None:
    """Raise where what this thread works on has been given up: interrupted, or another item failed.

    Called between steps, so that nobody waits for the rest of a long item.
    """
    given_up = getattr(_own, "given_up", None)
    if given_up is not None and given_up.is_set():
        raise CancelledError


class Workers:
    """Threads that work on different items at the same time.

    Every item is computed by one thread from start to end: products of this size gain more from other
    items on the other cores than from being split, do not wait for a core that another process
    holds, and the result does not depend on the number of workers.
    """

    def __init__(self, count: int | None = None) -> None:
        if count is not None and (not isinstance(count, int) or count < 1):
            raise DecisionError(f"workers must be a whole number of at least 1, got {count!r}")
        self.count = count or cores()
        _keep_freed_memory()

    def map(
        self,
        work: Callable[[Item], Result],
        items: Sequence[Item],
        *,
        size: Callable[[Item], float] = lambda _: 0.0,
        done: Callable[[Item], None] = lambda _: None,
    ) -> list[Result]:
        """Return ``work(item)`` for all items, in order; ``done`` is called as each ends.

        Those of largest ``size`` are begun first, so that no long one is left for the end (Graham 1969).
        """
        given_up = threading.Event()

        def watched(item: Item) -> Result:
            _own.given_up = given_up
            return work(item)

        with one_thread_each(), ThreadPoolExecutor(self.count) as pool:
            order = sorted(range(len(items)), key=lambda place: -size(items[place]))
            futures = {pool.submit(watched, items[place]): place for place in order}
            results = {}
            try:
                for future in as_completed(futures):
                    place = futures[future]
                    results[place] = future.result()
                    done(items[place])
            except BaseException:
                given_up.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [results[place] for place in range(len(items))]


# What glibc's mallopt calls M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, and how much is kept of freed memory.
_TRIM, _MMAP = -1, -3
_KEPT_BYTE, _LARGEST_BYTE = 512 << 20, 32 << 20


@functools.cache
def _keep_freed_memory() -> None:
    """Let the C library hold on to what a step has freed, up to 512 MiB, for the next one.

    Otherwise megabytes go back to the system after every product, and are mapped, cleared and faulted in
    again by the next.  Who has set these limits by the environment is left alone.
    """
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")):
        return
    if "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return
    mallopt(_TRIM, _KEPT_BYTE)
    mallopt(_MMAP, _LARGEST_BYTE)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Let torch split no product over threads: each is rounded as it is in a worker."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Of the CPU's allocator, of CUDA, and of its libraries, which have an allocator of their own.
_NO_MEMORY = ("t allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Return whether torch (or Python) ran out of memory; on a CPU torch raises a plain RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    )
