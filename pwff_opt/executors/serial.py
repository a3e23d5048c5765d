"""Trainings run one by one, in the thread that asks for them."""

from __future__ import annotations

import threading
from concurrent.futures import Future

from pwff_opt.executors._job import Job, Make, require_workers
from pwff_opt.executors._remote import Worker
from pwff_opt.registry import EXECUTORS


class SerialExecutor:
    """One worker, in the thread that submits; other threads wait for their turn."""

    def __init__(self, make: Make) -> None:
        self._worker, self._turn = Worker(make), threading.Lock()

    def submit(self, job: Job) -> Future[str]:
        """Carry out a job; return a promise that is kept already."""
        future: Future[str] = Future()
        try:
            with self._turn:
                future.set_result(self._worker.carry_out(job))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Do nothing: no job is under way."""


class Serial:
    """Run trainings one by one, however many workers are asked for."""

    def open(self, make: Make, workers: int) -> SerialExecutor:
        """Return an executor that trains in the thread that asks."""
        require_workers(workers)
        return SerialExecutor(make)


EXECUTORS.add("serial", Serial())
