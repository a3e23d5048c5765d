"""Trainings run in threads of this process, for evaluators that wait for other machines."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from pwff_opt.executors._job import Job, Make, require_workers
from pwff_opt.executors._remote import Worker
from pwff_opt.registry import EXECUTORS


class ThreadsExecutor:
    """A pool of threads that share one evaluator, which must bear that."""

    def __init__(self, make: Make, workers: int) -> None:
        self._worker, self._pool = Worker(make), ThreadPoolExecutor(workers)

    def submit(self, job: Job) -> Future[str]:
        """Return a promise of what a thread makes of a job."""
        return self._pool.submit(self._worker.carry_out, job)

    def close(self) -> None:
        """Let go of jobs that have not begun, wait for the others, and end the threads."""
        self._pool.shutdown(cancel_futures=True)


class Threads:
    """Run trainings in threads of this process."""

    def open(self, make: Make, workers: int) -> ThreadsExecutor:
        """Return an executor with so many threads."""
        require_workers(workers)
        return ThreadsExecutor(make, workers)


EXECUTORS.add("threads", Threads())
