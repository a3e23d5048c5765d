"""Devices side by side: a backbone and a core for each worker."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TypeVar

import torch

from pwff_opt.federated.backbone import Backbone

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """Backbones that share their frozen weights and work on different items at the same time.

    Every item is computed by one thread from start to end: products of this size gain more from other
    devices on the other cores than from being split, do not wait for a core that another process
    holds, and the result does not depend on the number of workers.
    """

    def __init__(self, backbone: Backbone, count: int | None = None) -> None:
        self.first = backbone
        self._backbones = [backbone, *(backbone.twin() for _ in range((count or cores()) - 1))]

    def map(
        self,
        work: Callable[[Backbone, Item], Result],
        items: Sequence[Item],
        *,
        done: Callable[[], None] = lambda: None,
    ) -> list[Result]:
        """Return ``work(backbone, item)`` for all items, in order; ``done`` is called after each."""
        idle: SimpleQueue[Backbone] = SimpleQueue()
        for backbone in self._backbones:
            idle.put(backbone)

        def run(item: Item) -> Result:
            backbone = idle.get()
            try:
                return work(backbone, item)
            finally:
                idle.put(backbone)

        with _one_thread_each(), ThreadPoolExecutor(len(self._backbones)) as pool:
            futures = [pool.submit(run, item) for item in items]
            results = []
            try:
                for future in futures:
                    results.append(future.result())
                    done()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return results


@contextmanager
def _one_thread_each() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
