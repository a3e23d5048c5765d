"""The two ends of an executor: the evaluator that a search asks, and the worker that trains."""

from __future__ import annotations

import json
import threading
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Protocol

from pwff_opt.costs import Workload
from pwff_opt.errors import PwffError
from pwff_opt.evaluation import Evaluation, Evaluator
from pwff_opt.executors._job import Job, Make, evaluation_from_json, evaluation_to_json
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.schedule import Schedule


class Executor(Protocol):
    """Hands jobs to workers."""

    def submit(self, job: Job) -> Future[str]:
        """Return a promise of what :meth:`Worker.carry_out` gives for the job, in some worker."""

    def close(self) -> None:
        """Let go of jobs that have not begun, wait for the others, and end the workers."""


class ExecutorVariant(Protocol):
    """A variant of where trainings run."""

    def open(self, make: Make, workers: int) -> Executor:
        """Return an executor of so many workers, each with an evaluator that ``make`` builds."""


class Worker:
    """Carries out jobs with an evaluator that it builds at the first one, and keeps.

    Scenarios that differ in the seed of training only share one evaluator by ``with_seed``.
    """

    def __init__(self, make: Make) -> None:
        self._make = make
        self._first: dict[Scenario, Evaluator] = {}  # by scenario, its training seed set to 0
        self._seeded: dict[Scenario, Evaluator] = {}
        self._lock = threading.Lock()

    def carry_out(self, job: Job) -> str:
        """Return the result of a job as JSON text, a deliberate error of the package included.

        Any other error is a bug, or the machine's, and is raised.
        """
        try:
            evaluator = self._evaluator(job.scenario)
            if job.task == "train":
                return evaluation_to_json(evaluator.train(job.schedule))
            return json.dumps({"accuracy": [float(a) for a in evaluator.test(job.schedule)]})
        except PwffError as error:
            return _error_to_json(error)

    def _evaluator(self, scenario: Scenario) -> Evaluator:
        with self._lock:
            if scenario not in self._seeded:
                base = replace(scenario, seeds=replace(scenario.seeds, training=0))
                if base in self._first:
                    made = self._first[base].with_seed(scenario.seeds.training)
                else:
                    made = self._first[base] = self._make(scenario)
                self._seeded[scenario] = made
            return self._seeded[scenario]


class Remote:
    """An evaluator whose trainings and tests run where an executor has them run."""

    def __init__(self, executor: Executor, scenario: Scenario, workload: Workload) -> None:
        self._executor, self._scenario, self._workload = executor, scenario, workload

    @property
    def workload(self) -> Workload:
        """What the data contribute to the costs."""
        return self._workload

    def train(self, schedule: Schedule) -> Evaluation:
        """Have a worker train a schedule; wait for its learning curve on validation data."""
        job = Job(scenario=self._scenario, schedule=schedule, task="train")
        return evaluation_from_json(self._result(job))

    def test(self, schedule: Schedule) -> tuple[float, ...]:
        """Have a worker test a schedule; wait for every device's accuracy on test data."""
        job = Job(scenario=self._scenario, schedule=schedule, task="test")
        return tuple(json.loads(self._result(job))["accuracy"])

    def with_seed(self, seed: int) -> Remote:
        """Return an evaluator that differs in the seed of training only, with the same workers."""
        seeds = replace(self._scenario.seeds, training=seed)
        return Remote(self._executor, replace(self._scenario, seeds=seeds), self._workload)

    def _result(self, job: Job) -> str:
        """Return the JSON text that a worker gave for a job; raise the error that it met."""
        text = self._executor.submit(job).result()
        values = json.loads(text)
        if "error" in values:
            raise _error_from(values["error"])
        return text


def _error_to_json(error: PwffError) -> str:
    """Return a deliberate error as JSON text: its type, its message and its problems."""
    kind = type(error)
    values: dict[str, Any] = {"type": [kind.__module__, kind.__qualname__], "message": str(error)}
    if hasattr(error, "problems"):
        values["problems"] = list(error.problems)
    return json.dumps({"error": values})


def _error_from(values: dict[str, Any]) -> PwffError:
    """Return the error that :func:`_error_to_json` wrote down; a PwffError if its type is unknown."""
    kinds: list[type[PwffError]] = [PwffError]
    for kind in kinds:  # which grows
        kinds += kind.__subclasses__()
    named = [kind for kind in kinds if [kind.__module__, kind.__qualname__] == values["type"]]
    kind = (named or [PwffError])[0]
    error = kind.__new__(kind, values["message"])  # a type's own __init__ may want other things
    if "problems" in values:
        error.problems = tuple(values["problems"])  # type: ignore[attr-defined]
    return error
