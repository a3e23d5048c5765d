"""NSGA-II chooses what to train next, without a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pwff_opt.registry import SEARCHES

if TYPE_CHECKING:
    from pwff_opt.planning.planner import Planner
    from pwff_opt.search.evolution import Evolution


class EvolutionMethod:
    """Choose by NSGA-II over schedules, without a model."""

    certifies = False

    def build(self, planner: Planner) -> Evolution:
        """Return a searcher that has been told nothing yet."""
        from pwff_opt.search.evolution import Evolution

        return Evolution(planner)


SEARCHES.add("evolution", EvolutionMethod())
