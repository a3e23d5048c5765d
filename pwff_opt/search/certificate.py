"""How far a front that was found may be from the front of all schedules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pwff_solvers.surrogate import Attained

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """How far a front may be from that of all schedules, in log10 energy, log10 delay and error."""

    hypervolume_ratio: float
    """Of the front found over that hoped for."""
    epsilon_additive: float
    """By how much every coordinate of the front found must improve to dominate what is hoped for."""
    igd_plus: float
    """Mean distance by which points hoped for are not dominated."""
    hoped_for: int
    """Schedules, or kinds of them, that were not trained to the end."""
    scope: Literal["all", "kinds", "searched"]
    """Whether those are all there are, one of every kind (see :func:`kinds`), or what a search has found."""
    confidence: float
    """Standard deviations that they are hoped to be better than modelled."""
    cells: int
    """Of log energy, that areas are measured in."""
    cell_width: float
    """In log10 energy."""

    @classmethod
    def of(
        cls,
        found: Attained,
        hoped: Attained,
        edges: FloatArray,
        *,
        hoped_for: int,
        scope: Literal["all", "kinds", "searched"],
        confidence: float,
    ) -> Certificate:
        """Compare what is found with what is hoped for, which must be something."""
        import moocore

        ours, theirs = found.points(edges), hoped.points(edges)
        something = len(ours) > 0
        return cls(
            hypervolume_ratio=found.hypervolume / hoped.hypervolume,
            epsilon_additive=(
                float(moocore.epsilon_additive(ours, ref=theirs)) if something else np.inf
            ),
            igd_plus=float(moocore.igd_plus(ours, ref=theirs)) if something else np.inf,
            hoped_for=hoped_for,
            scope=scope,
            confidence=confidence,
            cells=len(edges) - 1,
            cell_width=float(edges[1] - edges[0]),
        )

    @property
    def sentence(self) -> str:
        """What it says, and how sure it is."""
        figures = (
            f"hypervolume ratio {self.hypervolume_ratio:.4f}, additive epsilon {self.epsilon_additive:.4f}, "
            f"IGD+ {self.igd_plus:.2e} (log10 J, log10 s, error; {self.cells} cells of "
            f"{self.cell_width:.3f} in log10 J)"
        )
        if not self.hoped_for and self.scope == "all":
            return f"every schedule was trained, so the front is that of the space: {figures}"
        hoped_for = {
            "all": f"all {self.hoped_for} schedules that were not trained to the end are",
            "kinds": f"all schedules ({self.hoped_for} kinds: layers count by how many are trained, how "
            "deep, and how many aggregated) that were not trained to the end are",
            "searched": f"{self.hoped_for} schedules, which an evolution found in search of the most to "
            "hope for (a search and no bound: the space is too large to go through), are",
        }[self.scope]
        return (
            f"against a front on which {hoped_for} {self.confidence:g} standard deviations more accurate "
            f"than the model of accuracy has them: {figures}. It is as good as that model, no proof, and "
            "about what is trained: choosing from that by few validation data may cost more"
        )
