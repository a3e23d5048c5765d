"""Trainings run in processes of their own, on this machine."""

from __future__ import annotations

import pickle
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context

from pwff_opt.errors import DecisionError
from pwff_opt.executors._job import Job, Make, require_workers
from pwff_opt.executors._remote import Worker
from pwff_opt.registry import EXECUTORS

_workers: list[Worker] = []  # of this process: one, where it is a worker


def _begin(make: Make) -> None:
    """Make this process a worker."""
    _workers[:] = [Worker(make)]


def _carry_out(text: str) -> str:
    """Return the result of a job that came as JSON text."""
    return _workers[0].carry_out(Job.from_json(text))


class ProcessesExecutor:
    """A pool of processes, each with an evaluator of its own.

    They begin afresh ("spawn"): a copy of a process with threads, or with a GPU in use, may hang. They have
    this process's ``sys.path``, and with it its plug-ins.
    """

    def __init__(self, make: Make, workers: int) -> None:
        self._pool = ProcessPoolExecutor(
            workers, mp_context=get_context("spawn"), initializer=_begin, initargs=(make,)
        )

    def submit(self, job: Job) -> Future[str]:
        """Return a promise of what a process makes of a job."""
        return self._pool.submit(_carry_out, job.to_json())

    def close(self) -> None:
        """Let go of jobs that have not begun, wait for the others, and end the processes."""
        self._pool.shutdown(cancel_futures=True)


class Processes:
    """Run trainings in processes of their own, on this machine."""

    def open(self, make: Make, workers: int) -> ProcessesExecutor:
        """Return an executor with so many processes; ``make`` must be a function that pickle can name."""
        require_workers(workers)
        try:
            pickle.dumps(make)
        except Exception as error:
            raise DecisionError(
                f"make must be picklable, such as a function of a module, got {make!r}: {error}"
            ) from error
        return ProcessesExecutor(make, workers)


EXECUTORS.add("processes", Processes())
