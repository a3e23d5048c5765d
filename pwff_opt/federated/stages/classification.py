"""Classification: texts with labels, told apart by a head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pwff_opt.federated.stages._stage import TEXTS, StageVariant
from pwff_opt.registry import STAGES
from pwff_opt.scenario import Scenario

if TYPE_CHECKING:
    from pwff_opt.federated.training.material import Material


class Classification(StageVariant):
    """Learn to tell classes of texts apart."""

    sources = TEXTS
    classifies = True

    def material(self, scenario: Scenario, workers: int | None) -> Material:
        """Return texts and labels as a material; see :class:`StageVariant`."""
        from pwff_opt.federated.training.material import classification

        return classification(scenario, workers)


STAGES.add("classification", Classification())
