"""Errors the package raises on purpose; each message names the thing, the rule and the value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pwff_solvers.errors import InvalidInputError


class PwffError(Exception):
    """Base of every deliberate error, so that a caller can tell it from a bug."""


class ScenarioError(PwffError):
    """A scenario that breaks rules; ``problems`` holds one line for each, all found at once."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        noun = "problem" if len(self.problems) == 1 else "problems"
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{source}: {len(self.problems)} {noun}\n{lines}")


class DecisionError(PwffError):
    """A decision, schedule or argument that makes no sense, or does not fit the model or the space."""


@contextmanager
def allocator_refusals() -> Iterator[None]:
    """Raise what the allocator refuses as a DecisionError: it is as deliberate as any other."""
    try:
        yield
    except InvalidInputError as error:
        raise DecisionError(str(error)) from error


class DataError(PwffError):
    """A data set that is missing, unreadable or too small for what the scenario asks of it."""


class ModelError(PwffError):
    """A language model that is missing or of a shape the trainer or cost model does not know."""


class RunError(PwffError):
    """A run folder that cannot be used: another scenario's, locked, or damaged."""


class InfeasibleError(PwffError):
    """A demand that no allocation or decision can meet; says what the nearest possible one is."""


class PluginError(PwffError):
    """A plug-in that cannot be imported, or adds what cannot be added."""


class TrainingError(PwffError):
    """A training that went wrong, with the device and round it went wrong on."""
