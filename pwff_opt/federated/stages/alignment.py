"""Alignment: preferences between answers, weighed by what each device's user prefers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pwff_opt.costs.steps import LocalStep, preferences_step, sampling_step
from pwff_opt.costs.workload import Workload
from pwff_opt.federated.stages._stage import StageVariant
from pwff_opt.registry import STAGES
from pwff_opt.scenario import Scenario

if TYPE_CHECKING:
    from pwff_opt.federated.training.material import Material


class Alignment(StageVariant):
    """Learn to answer as users prefer; see :mod:`pwff_opt.federated.learning.alignment`."""

    sources = ("stereoset", "file", "hub")
    prompts = True
    decoder = True
    aligns = True

    def samples(self, scenario: Scenario) -> bool:
        """Return whether answers are sampled: by grpo."""
        return scenario.alignment.optimiser == "grpo"

    def sequences_per_example(self, scenario: Scenario) -> int:
        """Return how many sequences an example is: two preference pairs are four."""
        return 1 if self.samples(scenario) else 4

    def problems(self, scenario: Scenario) -> Iterator[str]:
        """Yield a line for every device whose user wants one axis only, where weights divide."""
        if scenario.alignment.optimiser != "modpo":
            return
        for number, device in enumerate(scenario.devices):
            if not 0.0 < device.helpfulness < 1.0:
                yield (
                    f"devices[{number}].helpfulness must be greater than 0 and less than 1 for "
                    "alignment.optimiser 'modpo', which divides by the weights of both axes; got "
                    f"{device.helpfulness:g}"
                )

    def local_step(self, scenario: Scenario, workload: Workload) -> LocalStep:
        """Return what a step on sampled answers, or on preference pairs, takes."""
        step = sampling_step if self.samples(scenario) else preferences_step
        return step(scenario, workload)

    def dealt(self, scenario: Scenario, source: str) -> tuple[str, int | None]:
        """Deal the pairs out as a training does; return what they are; see :class:`StageVariant`."""
        from pwff_opt.data.conversations import load_preferences
        from pwff_opt.data.partition import partition_preferences

        preferences = load_preferences(scenario.data, folder=Path(scenario.folder))
        partition_preferences(
            preferences,
            scenario.data,
            reward_share=scenario.alignment.reward_share,
            devices=len(scenario.devices),
            seed=scenario.seeds.data,
        )
        return f"{len(preferences)} pairs out of {source}", None

    def material(self, scenario: Scenario, workers: int | None) -> Material:
        """Return preference pairs and reward models as a material; see :class:`StageVariant`."""
        from pwff_opt.federated.training.material import alignment

        return alignment(scenario, workers)


STAGES.add("alignment", Alignment())
