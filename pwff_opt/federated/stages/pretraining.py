"""Pre-training: texts, whose next or masked tokens are named."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pwff_opt.federated.stages._stage import TEXTS, StageVariant
from pwff_opt.registry import STAGES
from pwff_opt.scenario import Scenario

if TYPE_CHECKING:
    from pwff_opt.data.corpora import Corpus
    from pwff_opt.federated.training.material import Material


class Pretraining(StageVariant):
    """Learn the language of the devices' texts."""

    sources = TEXTS

    def corpus(self, scenario: Scenario) -> Corpus:
        """Return the texts, labelled or not."""
        from pwff_opt.data.corpora import load_texts

        return load_texts(scenario.data, folder=Path(scenario.folder))

    def material(self, scenario: Scenario, workers: int | None) -> Material:
        """Return texts as a material; see :class:`StageVariant`."""
        from pwff_opt.federated.training.material import pretraining

        return pretraining(scenario, workers)


STAGES.add("pretraining", Pretraining())
