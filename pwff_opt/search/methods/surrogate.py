"""A model of accuracy chooses what to train next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pwff_opt.registry import SEARCHES

if TYPE_CHECKING:
    from pwff_opt.planning.planner import Planner
    from pwff_opt.search.surrogate import Surrogate


class SurrogateMethod:
    """Choose what is expected to add most to the front, by a model of accuracy."""

    certifies = True

    def build(self, planner: Planner) -> Surrogate:
        """Return a searcher that has been told nothing yet."""
        from pwff_opt.search.surrogate import Surrogate

        return Surrogate(planner)


SEARCHES.add("surrogate", SurrogateMethod())
