"""An executor outside the package, in one module: jobs reach its workers as text."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

MAIL = '''
"""Jobs and results go through a folder, as they would to another machine."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pwff_opt.executors import Job, Worker, require_workers
from pwff_opt.registry import EXECUTORS


class MailExecutor:
    def __init__(self, make, workers):
        self.worker, self.pool = Worker(make), ThreadPoolExecutor(workers)
        self.box, self.count = Path("box"), 0
        self.box.mkdir()

    def submit(self, job):
        self.count += 1
        letter = self.box / f"{self.count}.json"
        letter.write_text(job.to_json())
        return self.pool.submit(self.answer, letter)

    def answer(self, letter):
        return self.worker.carry_out(Job.from_json(letter.read_text()))

    def close(self):
        self.pool.shutdown(cancel_futures=True)


class Mail:
    def open(self, make, workers):
        require_workers(workers)
        return MailExecutor(make, workers)


EXECUTORS.add("mail", Mail())
'''

FORMULA = """
class Formula:
    "An evaluator whose accuracy grows with what is trained."

    def __init__(self, scenario):
        self.scenario, self.workload = scenario, Workload.padded(scenario, classes=3)

    def with_seed(self, seed):
        return self

    def test(self, schedule):
        learned = sum(sum(d.trained) * (1 + d.ranks[0]) for d in schedule.rounds)
        return (1 - 0.6 / (1 + 0.1 * learned),) * len(self.scenario.devices)

    def train(self, schedule):
        each = len(self.scenario.devices)
        rounds = tuple(
            TrainedRound(
                loss=(0.0,) * each,
                accuracy=self.test(schedule.prefix(n + 1)),
                uplink_bit=(0,) * each,
            )
            for n in range(len(schedule))
        )
        key = learning_key(self.scenario, schedule)
        return Evaluation(key=key, schedule=schedule, rounds=rounds, wall_s=0.0)
"""

FRONT = f"""
import json
from dataclasses import replace
from pathlib import Path

from pwff_opt import Evaluation, TrainedRound, Workload, pareto_front, read_scenario
from pwff_opt.executors import Remote
from pwff_opt.registry import EXECUTORS
from pwff_opt.runs.identity import learning_key

{FORMULA}

base = read_scenario("hutto")
scenario = replace(
    base,
    devices=base.devices[:3],
    training=replace(base.training, rounds=2, validate_after=()),
    decisions=replace(base.decisions, phases=1),
)
alone = pareto_front(scenario, Formula(scenario), trainings=4)
executor = EXECUTORS["mail"].open(Formula, 2)
remote = Remote(executor, scenario, Formula(scenario).workload)
front = pareto_front(scenario, remote, trainings=4)
executor.close()
print(json.dumps({{
    "known": list(EXECUTORS),
    "same": front.points.equals(alone.points),
    "points": len(front.points),
    "letters": len(list(Path("box").iterdir())),
    "tests": int(front.points["schedule"].nunique()),
}}))
"""


def test_an_executor_is_one_module(run_with_plugin: Callable[..., Any]) -> None:
    found = json.loads(run_with_plugin(FRONT, mail=MAIL).stdout)
    assert found["known"] == ["mail", "processes", "serial", "threads"]
    assert found["same"]
    assert found["points"] > 0
    assert found["letters"] == 4 + found["tests"]
