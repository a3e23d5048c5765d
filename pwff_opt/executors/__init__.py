"""Where trainings run: one module each, and what crosses the line between the search and a worker.

A search asks a :class:`Remote`; that hands jobs to an :class:`Executor`, and a :class:`Worker` on the other
side carries them out. All that crosses is text, so a worker may be another process or machine.
"""

from pwff_opt.executors._job import (
    Job,
    Make,
    evaluation_from_json,
    evaluation_to_json,
    require_workers,
)
from pwff_opt.executors._remote import Executor, ExecutorVariant, Remote, Worker

__all__ = [
    "Executor",
    "ExecutorVariant",
    "Job",
    "Make",
    "Remote",
    "Worker",
    "evaluation_from_json",
    "evaluation_to_json",
    "require_workers",
]
