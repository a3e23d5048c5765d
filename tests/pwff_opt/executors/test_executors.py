"""Where trainings run does not matter for what a front is."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toy_evaluator import Broken, Toy

from pwff_opt import Evaluation, Scenario, Schedule, TrainedRound, pareto_front
from pwff_opt.errors import DecisionError, ScenarioError, TrainingError
from pwff_opt.executors import Job, Remote, Worker, evaluation_from_json, evaluation_to_json
from pwff_opt.registry import EXECUTORS
from pwff_opt.runs.records import Journal, RunFolder

NAMES = ("processes", "serial", "threads")


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_variants_of_this_package() -> None:
    assert set(NAMES) <= set(EXECUTORS)


def test_fronts_are_the_same_wherever_trainings_run(
    small: Scenario, small_text: str, name: str, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"trainings": 6, "confirm": 2, "batch": 2}
    alone = pareto_front(small, Toy(small), **how)
    folder = RunFolder(tmp_path / "run")
    folder.open(small, small_text)
    before = set(tmp_path.rglob("*"))
    with (
        closing(EXECUTORS[name].open(Toy, 2)) as executor,
        ThreadPoolExecutor(2) as pool,
    ):
        remote = Remote(executor, small, Toy(small).workload)
        unwritten = pareto_front(small, remote, executor=pool, **how)
        assert set(tmp_path.rglob("*")) == before, "workers write nothing"
        written = pareto_front(small, Journal(remote, folder), executor=pool, **how)
    for front in (unwritten, written):
        assert front.points.equals(alone.points)
        assert [str(e.schedule) for e in front.evaluations] == [
            str(e.schedule) for e in alone.evaluations
        ]

    class Untouched(Toy):
        def train(self, schedule: Schedule) -> Evaluation:
            raise AssertionError("it was trained")

        def with_seed(self, seed: int) -> Untouched:
            return Untouched(super().with_seed(seed).scenario)

    recalled = pareto_front(small, Journal(Untouched(small), folder), **how)
    assert recalled.points.equals(alone.points)


def test_errors_of_a_worker_arrive_as_they_were(small: Scenario, name: str) -> None:
    schedule = Schedule.parse("3x2:faa", devices=3)
    with closing(EXECUTORS[name].open(Broken, 1)) as executor:
        remote = Remote(executor, small, Toy(small).workload)
        with pytest.raises(TrainingError) as training:
            remote.train(schedule)
        with pytest.raises(ScenarioError) as scenario:
            remote.test(schedule)
    assert type(training.value) is TrainingError
    assert str(training.value) == "round 1, device 2: loss is not finite"
    here = ScenarioError("there", ["cell must be one", "radio must be one"])
    assert str(scenario.value) == str(here)
    assert scenario.value.problems == here.problems


@pytest.mark.parametrize("workers", [0, -1, 1.5, True])
def test_an_executor_has_a_worker(name: str, workers: Any) -> None:
    with pytest.raises(
        DecisionError, match=f"workers must be a whole number of at least 1, got {workers}"
    ):
        EXECUTORS[name].open(Toy, workers)


def test_what_a_process_builds_its_evaluator_with_has_a_name() -> None:
    with pytest.raises(DecisionError, match="make must be picklable, such as a function of a mod"):
        EXECUTORS["processes"].open(lambda scenario: Toy(scenario), 1)


def test_a_worker_builds_one_evaluator(small: Scenario) -> None:
    made: list[Scenario] = []

    def make(scenario: Scenario) -> Toy:
        made.append(scenario)
        return Toy(scenario)

    worker = Worker(make)
    schedule = Schedule.parse("3x2:faa", devices=3)
    other = replace(small, seeds=replace(small.seeds, training=77))
    texts = [
        worker.carry_out(Job(scenario=scenario, schedule=schedule, task="train"))
        for scenario in (small, other, small)
    ]
    assert made == [small]
    assert texts[0] == texts[2] != texts[1]
    assert texts[1] == evaluation_to_json(Toy(other).train(schedule))


def test_jobs_and_evaluations_survive_as_text(small: Scenario) -> None:
    schedule = Schedule.parse("2x2:faa 1x0,2,4:fpa", devices=3)
    job = Job(scenario=small, schedule=schedule, task="test")
    assert Job.from_json(job.to_json()) == job
    with pytest.raises(DecisionError, match="task must be 'train' or 'test', got 'rest'"):
        Job(scenario=small, schedule=schedule, task="rest")  # type: ignore[arg-type]
    whole = TrainedRound(
        loss=(0.1 + 0.2, math.nan, math.inf),
        accuracy=(),
        uplink_bit=(1, 2**60, 0),
        diverged=(2,),
        notes={"drift": (math.nan, 1e-300, 1 / 3)},
    )
    evaluation = Evaluation(
        key="k", schedule=schedule, rounds=(whole,), wall_s=1 / 3, status="failed", reason="é\n"
    )
    back = evaluation_from_json(evaluation_to_json(evaluation))
    assert repr(back) == repr(evaluation), "NaN is not equal to itself"
    assert math.isnan(back.rounds[0].loss[1])
    assert math.isnan(back.rounds[0].notes["drift"][0])
