"""Which devices take part in a round: the trainer and the cost model must agree on it."""

from __future__ import annotations

from pwff_opt.rng import stream
from pwff_opt.scenario import Scenario


def participants(scenario: Scenario, round: int) -> tuple[bool, ...]:
    """Return whether each device takes part in a round (counted from 0).

    ``aggregation.devices_per_round`` of them are drawn without replacement, all alike (McMahan et al.,
    AISTATS 2017, algorithm 1); 0 takes all. The others neither train, upload nor listen; they hear the
    latest shared blocks before they next train or are evaluated.
    """
    count, chosen = len(scenario.devices), scenario.aggregation.devices_per_round
    if chosen == 0 or chosen == count:
        return (True,) * count
    rng = stream(scenario.seeds.training, "participants", round=round)
    drawn = set(rng.choice(count, chosen, replace=False).tolist())
    return tuple(device in drawn for device in range(count))
