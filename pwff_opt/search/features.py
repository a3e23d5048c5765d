"""What learning depends on in a schedule, and the kinds of schedules that follow from it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
from numpy.typing import NDArray

from pwff_opt.planning.planner import Planner
from pwff_opt.scenario.schedule import Codec, LayerState, RoundDecision, Schedule

FloatArray = NDArray[np.float64]


def features(schedule: Schedule) -> FloatArray:
    """Return what learning depends on, [round, 5], each of order one.

    After n rounds: log2 n; the mean of log2(1 + rank) over devices; how deep, in how many layers, and in
    how many aggregated ones the model is trained; the last four are means over those rounds.
    """
    rows = []
    for decision, present in zip(schedule.rounds, schedule.present, strict=True):
        trained, layers = decision.trained, len(decision.states)
        rank = np.mean(np.log2(1.0 + np.array(decision.ranks))) if any(present) else 0.0
        depth = layers - trained.index(True) if any(trained) else 0
        aggregated = sum(state is LayerState.AGGREGATED for state in decision.states)
        rows.append([rank, depth, sum(trained), aggregated])
    rounds = np.arange(1, len(rows) + 1)
    means = np.cumsum(np.array(rows), axis=0) / rounds[:, None]
    return np.column_stack([np.log2(rounds), means]) / 3.0


def kinds(planner: Planner) -> Iterator[Schedule]:
    """Yield one schedule of every kind that has one decision for all rounds.

    Neither costs nor :func:`features` know more of a decision than its ranks and how deep, in how many
    layers, and in how many aggregated ones it trains: the layers of a language model are alike.
    """
    codec = planner.codec
    genes = rank_genes(codec)
    for states, ranks in product(patterns(codec), product(codec.space.ranks, repeat=genes)):
        decision = RoundDecision(ranks=ranks * (codec.devices // genes), states=states)
        yield planner.repaired(Schedule(rounds=(decision,) * codec.rounds))


def rank_genes(codec: Codec) -> int:
    return 1 if codec.space.rank_scope == "common" else codec.devices


def patterns(codec: Codec) -> list[tuple[LayerState, ...]]:
    """Return states of layers, one pattern of every depth, number trained and number aggregated."""
    found: dict[tuple[int, int, int], tuple[LayerState, ...]] = {(0, 0, 0): ()}
    for size in reversed(codec.group_sizes):  # from the last layer down
        longer = {}
        for (deep, trained, aggregated), above in found.items():
            for name in codec.space.layer_states:
                state = LayerState[name.upper()]
                learns = state is not LayerState.FROZEN
                kind = (
                    len(above) + size if learns else deep,
                    trained + size * learns,
                    aggregated + size * (state is LayerState.AGGREGATED),
                )
                longer[kind] = (state,) * size + above
        found = longer
    return list(found.values())
