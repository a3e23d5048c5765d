"""Instruction tuning: prompts with answers, of which the answers are learned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pwff_opt.federated.stages._stage import StageVariant
from pwff_opt.registry import STAGES
from pwff_opt.scenario import Scenario

if TYPE_CHECKING:
    from pwff_opt.data.corpora import Corpus
    from pwff_opt.federated.training.material import Material


class Instruction(StageVariant):
    """Learn to answer prompts as demonstrated."""

    sources = ("alpaca-demo", "file", "hub")
    prompts = True
    decoder = True

    def corpus(self, scenario: Scenario) -> Corpus:
        """Return the prompts with their answers."""
        from pwff_opt.data.conversations import load_demonstrations

        return load_demonstrations(scenario.data, folder=Path(scenario.folder))

    def material(self, scenario: Scenario, workers: int | None) -> Material:
        """Return prompts with answers as a material; see :class:`StageVariant`."""
        from pwff_opt.federated.training.material import instruction

        return instruction(scenario, workers)


STAGES.add("instruction", Instruction())
