"""The points that a training offers to the front, as a table, and their objectives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pwff_opt.evaluation import Evaluation
from pwff_opt.planning.planner import Curve
from pwff_opt.scenario import Thresholds

if TYPE_CHECKING:
    import pandas as pd

FloatArray = NDArray[np.float64]


def measured(evaluation: Evaluation) -> FloatArray:
    """Return the mean validation accuracy after every round validated, [mark]."""
    return np.array([np.mean(entry.accuracy) for entry in evaluation.rounds if entry.accuracy])


def candidates(
    evaluation: Evaluation, curve: Curve, accuracy: FloatArray, thresholds: Thresholds
) -> pd.DataFrame:
    """Return every acceptable point a training offers: each validated round, at each price of time.

    ``accuracy`` [mark]: what a point is chosen by, in column ``accuracy_chosen_by``.
    """
    import pandas as pd

    marks = [n for n, entry in enumerate(evaluation.rounds) if entry.accuracy]
    points = len(curve.price_of_time_w)
    cuts = [str(evaluation.schedule.prefix(n + 1)) for n in marks]
    table = pd.DataFrame(
        {
            "energy_j": curve.energy_j[marks].ravel(),
            "delay_s": curve.delay_s[marks].ravel(),
            "accuracy_validation": np.repeat(measured(evaluation), points),
            "accuracy_chosen_by": np.repeat(accuracy, points),
            "price_of_time_w": np.tile(curve.price_of_time_w, len(marks)),
            "rounds": np.repeat(np.array(marks, dtype=np.int64) + 1, points),
            "schedule": np.repeat(np.array(cuts, dtype=object), points),
            "evaluation": evaluation.key,
        }
    )
    keep = np.ones(len(table), dtype=bool)
    if thresholds.accuracy_min is not None:
        keep &= table["accuracy_chosen_by"].to_numpy() >= thresholds.accuracy_min
    if thresholds.energy_max_j is not None:
        keep &= table["energy_j"].to_numpy() <= thresholds.energy_max_j
    if thresholds.delay_max_s is not None:
        keep &= table["delay_s"].to_numpy() <= thresholds.delay_max_s
    return table[keep]


def objectives(table: pd.DataFrame) -> FloatArray:
    """Return [point, (log10 energy, log10 delay, error)]: both quantities span decades."""
    return np.column_stack(
        [
            np.log10(table["energy_j"].to_numpy(dtype=float)),
            np.log10(table["delay_s"].to_numpy(dtype=float)),
            1.0 - table["accuracy_chosen_by"].to_numpy(dtype=float),
        ]
    )
