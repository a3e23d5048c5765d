"""An access scheme from outside the package: time division in whole slots."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

SLOT_S = 1e-3
SLOTTED = f'''
"""TDMA whose base station hands out whole slots of time."""

from dataclasses import replace

import numpy as np

from pwff_opt.registry import ACCESS
from pwff_solvers.allocation import TDMA, LeastEnergy, Shortest, Status, Weighted

SLOT_S = {SLOT_S}


def slots(time_s):
    """Return times [s] as numbers of whole slots, rounded up."""
    return np.ceil(time_s / SLOT_S * (1.0 - 1e-12))


class Slotted:
    """TDMA, then every upload and the round last whole slots; the energy is computed anew.

    The optimum of TDMA, which may use any time, bounds this scheme's from below: so the gap counts
    what the slots cost, too.
    """

    name = "slotted"
    largest_gap = 0.9
    require = staticmethod(TDMA.require)
    energy_bound = staticmethod(TDMA.energy_bound)

    def allocate(self, batch, objective, target, threads):
        least = TDMA.allocate(batch, Shortest, np.zeros(batch.instances), threads)
        given = target
        if objective is LeastEnergy:
            # what rounding up can add is taken off beforehand
            given = np.maximum(target - (batch.devices + 1) * SLOT_S, least.round_s)
        free = TDMA.allocate(batch, objective, given, threads)
        upload_s = slots(free.upload_s) * SLOT_S
        longer_s = (upload_s - free.upload_s).sum(1)
        round_s = slots(free.round_s + longer_s - batch.fixed_delay_s) * SLOT_S
        live = batch.payload_bit > 0
        band = batch.bandwidth_hz[:, None]
        nats = batch.payload_bit * np.log(2.0) / band / np.where(live, upload_s, 1.0)
        noise_w = band * batch.noise_psd_w_per_hz[:, None] / batch.gain
        power_w = np.where(live, noise_w * np.expm1(nats), 0.0)
        device_energy_j = free.device_energy_j + power_w * upload_s - free.power_w * free.upload_s
        energy_j, round_s = device_energy_j.sum(1), round_s + batch.fixed_delay_s
        if objective is Shortest:
            value, before = round_s, free.round_s
        else:
            price = target if objective is Weighted else 0.0
            fixed_j = batch.fixed_energy_j.sum(1)
            value = energy_j - fixed_j + price * round_s
            before = free.energy_j - fixed_j + price * free.round_s
        late = (objective is LeastEnergy) & (round_s > target)
        return replace(
            free,
            power_w=power_w,
            upload_s=upload_s,
            device_energy_j=device_energy_j,
            energy_j=energy_j,
            round_s=round_s,
            shortest_round_s=round_s if objective is Shortest else free.shortest_round_s,
            status=np.where(late, Status.INFEASIBLE, Status.INACCURATE).astype(np.int8),
            gap=1.0 - before * (1.0 - free.gap) / value,
        )


ACCESS.add("slotted", Slotted())
'''
FRONT = '''
import json

import numpy as np

from pwff_opt import Evaluation, Planner, Schedule, TrainedRound, Workload, pareto_front
from pwff_opt.scenario.files import parse_scenario
from pwff_solvers.allocation import Shortest, Weighted, solve


class Formula:
    """An evaluator whose accuracy is a formula of the schedule."""

    def __init__(self, scenario):
        self.scenario, self.workload = scenario, Workload.padded(scenario, classes=3)

    def test(self, schedule):
        learned = sum(sum(d.trained) * (1 + d.ranks[0]) for d in schedule.rounds)
        return tuple(1 - 0.6 / (1 + 0.1 * learned) - 0.01 * k for k in range(3))

    def train(self, schedule):
        rounds = [
            TrainedRound(
                loss=(0.0,) * 3, accuracy=self.test(schedule.prefix(n + 1)), uplink_bit=(0,) * 3
            )
            for n in range(len(schedule))
        ]
        return Evaluation(key=str(schedule), schedule=schedule, rounds=tuple(rounds), wall_s=0.0)


scenario = parse_scenario(TEXT)
evaluator = Formula(scenario)
front = pareto_front(scenario, evaluator, trainings=6)
planner = Planner(scenario, evaluator.workload)
found = []
for row in front.points.itertuples():
    schedule = Schedule.parse(row.schedule, devices=3)
    problem = planner.costs.batch(planner.costs.demand(schedule), planner.gain[: len(schedule)])
    price = row.price_of_time_w
    objective = Weighted(price) if np.isfinite(price) else Shortest()
    mine, free = solve(problem, objective, planner.access), solve(problem, objective, "tdma")
    found.append(
        {
            "delay_s": row.delay_s,
            "planned_s": float(mine.round_s.sum()),
            "free_s": float(free.round_s.sum()),
            "fixed_s": float(problem.fixed_delay_s.sum()),
            "upload_s": mine.upload_s.ravel().tolist(),
            "gap": float(mine.gap.max()),
        }
    )
print(json.dumps(found))
'''
TEXT = """
[cell]
bandwidth_hz = 1e6
downlink_bandwidth_hz = 1e6
downlink_power_w = 1
access = "slotted"
[devices]
count = 3
distance_m = { disc = [50, 300] }
power_max_w = 0.1
frequency_max_hz = { uniform = [1e9, 2e9] }
[model]
source = "MODEL"
max_tokens = 24
pooling = "mean"
[training]
rounds = 3
local_steps = 2
batch_size = 4
[decisions]
ranks = [0, 2, 4]
[search]
method = "evolution"
population = 4
curve_points = 5
"""


def whole(time_s: np.ndarray) -> np.ndarray:
    return np.abs(time_s / SLOT_S - np.round(time_s / SLOT_S)) < 1e-6


def test_a_front_of_slotted_tdma(run_with_plugin, small_model: Path):
    text = TEXT.replace("MODEL", str(small_model))
    done = run_with_plugin(f"TEXT = {text!r}\n{FRONT}", slotted=SLOTTED)
    points = json.loads(done.stdout.splitlines()[-1])
    assert len(points) >= 2
    for point in points:
        assert point["delay_s"] == pytest.approx(point["planned_s"])
        assert whole(np.array(point["delay_s"] - point["fixed_s"])), point
        assert whole(np.array(point["upload_s"])).all()
        assert point["free_s"] <= point["delay_s"]
        assert 0 < point["gap"] < 0.9


def test_an_unknown_scheme_is_refused_with_all_names(run_with_plugin, small_model: Path):
    text = TEXT.replace("MODEL", str(small_model)).replace("slotted", "aloha")
    code = f"""
from pwff_opt.errors import ScenarioError
from pwff_opt.scenario.files import parse_scenario
try:
    parse_scenario({text!r})
except ScenarioError as error:
    print(error)
"""
    done = run_with_plugin(code, slotted=SLOTTED)
    assert "cell.access must be one of 'fdma', 'slotted', 'tdma', got 'aloha'" in done.stdout
