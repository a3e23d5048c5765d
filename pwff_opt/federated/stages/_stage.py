"""What a stage states about itself; every stage derives from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pwff_opt.costs.steps import LocalStep, supervised_step
from pwff_opt.costs.workload import Workload
from pwff_opt.errors import DataError
from pwff_opt.scenario import Scenario

if TYPE_CHECKING:
    from pwff_opt.data.corpora import Corpus
    from pwff_opt.federated.training.material import Material

TEXTS = ("hutto", "reuters-r8", "20newsgroups", "file", "hub")
"""Sources of data that hold texts."""


class StageVariant(ABC):
    """The facts of a stage, and what makes its costs, its data and its losses.

    A module of a stage must import without torch: :meth:`material` imports what needs it.
    """

    sources: ClassVar[tuple[str, ...]]
    """Values of ``data.source`` that the stage can learn from."""
    classifies: ClassVar[bool] = False
    """Whether classes are told apart, by a head that is trained."""
    prompts: ClassVar[bool] = False
    """Whether the model is given prompts, and so a system prompt."""
    decoder: ClassVar[bool] = False
    """Whether the model must be a causal one."""
    aligns: ClassVar[bool] = False
    """Whether the scenario's alignment table, and what users prefer, bear on what is learned."""

    def samples(self, scenario: Scenario) -> bool:
        """Return whether devices sample answers to learn from them."""
        return False

    def sequences_per_example(self, scenario: Scenario) -> int:
        """Return how many sequences an example is."""
        return 1

    def problems(self, scenario: Scenario) -> Iterator[str]:
        """Yield a line for every rule between fields of the scenario that is broken."""
        yield from ()

    def local_step(self, scenario: Scenario, workload: Workload) -> LocalStep:
        """Return what a local step takes; errors: :func:`pwff_opt.costs.local_step`."""
        return supervised_step(scenario, workload)

    def dealt(self, scenario: Scenario, source: str) -> tuple[str, int | None]:
        """Deal the data out as a training does; return what they are, and how many classes they have.

        ``source`` : the words for where they are from.
        """
        from pwff_opt.data.partition import partition

        corpus = self.corpus(scenario)
        told = f"{len(corpus)} different texts out of {source}, of {len(corpus.domain_names)} domain(s)"
        classes = len(corpus.class_names) if self.classifies else None
        if classes is not None:
            told += f" and {classes} classes ({_listed(corpus.class_names)})"
        try:
            partition(
                corpus, scenario.data, devices=len(scenario.devices), seed=scenario.seeds.data
            )
        except DataError as error:
            raise DataError(f"{error}; there are {told}") from error
        return told, classes

    def corpus(self, scenario: Scenario) -> Corpus:
        """Return the texts that are dealt out; labelled ones, where a stage says nothing else."""
        from pwff_opt.data.corpora import load_corpus

        return load_corpus(scenario.data, folder=Path(scenario.folder))

    @abstractmethod
    def material(self, scenario: Scenario, workers: int | None) -> Material:
        """Load model and data and deal these out; see :meth:`Material.of` for arguments and errors."""


def _listed(names: tuple[str, ...], most: int = 6) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
