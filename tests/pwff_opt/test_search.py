"""The search for what to train next, on accuracies that are a formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from pwff_opt import Evaluation, Planner, Scenario, Schedule, TrainedRound, Workload
from pwff_opt.errors import DecisionError
from pwff_opt.search import Reference, Surrogate, features


def answer(schedule: Schedule, score: Callable[[Schedule], float]) -> Evaluation:
    rounds = [
        TrainedRound(
            loss=(0.0,) * 3, accuracy=(score(schedule.prefix(n)),) * 3, uplink_bit=(0,) * 3
        )
        for n in range(1, len(schedule) + 1)
    ]
    return Evaluation(key=str(schedule), schedule=schedule, rounds=tuple(rounds), wall_s=0.0)


def learned(schedule: Schedule) -> float:
    """Accuracy that rises with rounds, layers and rank."""
    effort = sum(sum(d.trained) * (1 + np.log2(1 + d.ranks[0])) for d in schedule.rounds)
    return float(0.4 + 0.5 * (1 - np.exp(-0.08 * effort)))


@pytest.fixture
def planner(small: Scenario) -> Planner:
    return Planner(small, Workload.padded(small, classes=3))


def course(planner: Planner, count: int) -> tuple[Surrogate, list[str]]:
    search, asked = Surrogate(planner), []
    while len(asked) < count and (schedule := search.ask()) is not None:
        asked.append(str(schedule))
        search.tell(schedule, answer(schedule, learned))
    return search, asked


def test_nothing_is_asked_twice_and_the_same_is_asked_again(planner: Planner) -> None:
    _, asked = course(planner, 30)
    assert len(set(asked)) == 30
    assert course(planner, 30)[1] == asked
    first = [str(planner.repaired(planner.codec.decode(g))) for g in planner.first_generation()]
    assert asked[: len(set(first))] == list(dict.fromkeys(first))


def test_a_space_is_asked_to_the_end(small: Scenario) -> None:
    tiny = replace(
        small, decisions=replace(small.decisions, ranks=(0, 2), layer_states=("frozen", "personal"))
    )
    planner = Planner(tiny, Workload.padded(tiny, classes=3))
    _, asked = course(planner, 1000)
    assert len(asked) == 1 + 7 * 2


def test_large_spaces_are_searched_by_evolution(small: Scenario) -> None:
    large = replace(small, decisions=replace(small.decisions, phases=3, ranks=(0, 2, 4)))
    planner = Planner(large, Workload.padded(large, classes=3))
    assert np.prod(planner.codec.cardinalities.astype(float)) > 1e5
    _, asked = course(planner, 8)
    assert len(set(asked)) == 8
    assert course(planner, 8)[1] == asked


def test_the_model_learns_what_is_told(planner: Planner) -> None:
    search, _ = course(planner, 25)
    schedules = [Schedule.parse(text, devices=3) for text in ("3x4:pap", "3x2:fap", "3x0:ffa")]
    for schedule in schedules:
        truth = [learned(schedule.prefix(n)) for n in (1, 2, 3)]
        told = search.accuracy(answer(schedule, lambda _: 0.0))
        np.testing.assert_allclose(told, truth, atol=0.03)


def test_what_failed_is_avoided(planner: Planner) -> None:
    """High ranks diverge here; once that is seen, they are asked for less than elsewhere."""
    search, asked = Surrogate(planner), []
    for _ in range(24):
        schedule = search.ask()
        assert schedule is not None
        asked.append(schedule)
        broken = schedule.rounds[0].ranks[0] == 4
        search.tell(
            schedule,
            replace(answer(schedule, learned), rounds=(), status="failed", reason="broke")
            if broken
            else answer(schedule, learned),
        )
    later = [schedule.rounds[0].ranks[0] == 4 for schedule in asked[8:]]
    free = [
        Schedule.parse(text, devices=3).rounds[0].ranks[0] == 4
        for text in course(planner, 24)[1][8:]
    ]
    assert sum(later) < sum(free)


def test_a_hopeless_training_is_stopped_and_a_good_one_goes_on(small: Scenario) -> None:
    """Rank 4 learns nothing here, and less than half right is not acceptable."""
    limits = replace(small.thresholds, accuracy_min=0.5)
    planner = Planner(replace(small, thresholds=limits), Workload.padded(small, classes=3))

    def score(schedule: Schedule) -> float:
        return 0.3 if schedule.rounds[0].ranks[0] == 4 else learned(schedule)

    search = Surrogate(planner)
    texts = [f"3x{rank}:{states}" for rank in (0, 2, 4) for states in ("fff", "ffa", "faa", "app")]
    for text in texts:
        schedule = Schedule.parse(text, devices=3)
        search.tell(schedule, answer(schedule, score))
    while (asked := search.ask()) is not None and search.reference is None:
        search.tell(asked, answer(asked, score))
    for text, goes_on in (("3x4:ppa", False), ("3x2:ppa", True)):
        schedule = Schedule.parse(text, devices=3)
        assert search.worth_going_on(schedule, answer(schedule.prefix(1), score)) == goes_on


def test_a_training_is_stopped_where_its_next_rounds_cost_too_much(small: Scenario) -> None:
    free = Planner(small, Workload.padded(small, classes=3))
    schedule = Schedule.parse("3x4:aaa", devices=3)
    least_j = free.curve(schedule).energy_j.min(axis=1)
    limits = replace(small.thresholds, energy_max_j=float(0.5 * (least_j[0] + least_j[1])))
    search, _ = course(Planner(replace(small, thresholds=limits), free.costs.workload), 6)
    assert not search.worth_going_on(schedule, answer(schedule.prefix(1), learned))


def test_thresholds_are_the_corner(small: Scenario) -> None:
    limits = replace(small.thresholds, energy_max_j=3.0, delay_max_s=20.0, accuracy_min=0.5)
    planner = Planner(replace(small, thresholds=limits), Workload.padded(small, classes=3))
    corner = Reference.of(planner, [])
    assert (corner.energy_j, corner.delay_s, corner.accuracy) == (3.0, 20.0, 0.5)
    assert "not given" not in corner.sentence
    free = Planner(small, Workload.padded(small, classes=3))
    first = [answer(Schedule.parse("3x0:fff", devices=3), lambda _: 0.37)]
    corner = Reference.of(free, first)
    assert corner.accuracy == pytest.approx(0.37)
    assert "energy_max_j, delay_max_s, accuracy_min not given" in corner.sentence


def test_features_are_of_prefixes() -> None:
    schedule = Schedule.parse("1x4:ffa 2x2:pfa", devices=3)
    whole = features(schedule)
    assert whole.shape == (3, 5)
    for rounds in (1, 2, 3):
        np.testing.assert_array_equal(features(schedule.prefix(rounds)), whole[:rounds])
    np.testing.assert_allclose(whole[0] * 3, [0, np.log2(5), 1, 1, 1])
    assert features(Schedule.parse("1x4:fff", devices=3))[0].tolist() == [0, 0, 0, 0, 0]


def exact(planner: Planner) -> tuple[Surrogate, list[Schedule]]:
    """A search that was told everything."""
    search, schedules = Surrogate(planner), []
    while (schedule := search.ask()) is not None:
        search.tell(schedule, answer(schedule, learned))
        schedules.append(schedule)
    return search, schedules


def test_a_certificate_of_everything_is_one(planner: Planner) -> None:
    search, _ = exact(planner)
    certificate = search.certificate(2.0)
    assert certificate.untrained == 0
    assert certificate.hypervolume_ratio == 1.0
    assert certificate.epsilon_additive == 0.0
    assert certificate.igd_plus == 0.0
    assert "every schedule was trained" in certificate.sentence


def test_a_certificate_bounds_the_front_of_the_space(planner: Planner) -> None:
    """What is hoped for is at least what there is, and with more trainings it comes near."""
    _, schedules = exact(planner)
    ratios = []
    for count in (8, 16, 40):
        search, asked = course(planner, count)
        certificate = search.certificate(2.0)
        assert certificate.untrained == len(schedules) - count
        found = search._attained().hypervolume
        for schedule in schedules:
            if str(schedule) not in asked:
                search.tell(schedule, answer(schedule, learned))
        search._process = _Truth()  # type: ignore[assignment]
        assert found / certificate.hypervolume_ratio >= 0.995 * search._attained().hypervolume
        ratios.append(certificate.hypervolume_ratio)
    assert ratios == sorted(ratios)
    assert ratios[-1] > 0.95


class _Truth:
    """A model that knows: the inverse of ``features`` and ``learned`` where decisions do not change."""

    def predict(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        log_rounds, log_rank, _, trained, _ = 3.0 * rows.T
        effort = 2.0**log_rounds * trained * (1 + log_rank)
        return 0.4 + 0.5 * (1 - np.exp(-0.08 * effort)), np.zeros(len(rows))


def test_large_spaces_are_not_certified(small: Scenario) -> None:
    large = replace(small, decisions=replace(small.decisions, phases=3))
    search = Surrogate(Planner(large, Workload.padded(large, classes=3)))
    with pytest.raises(DecisionError, match="at most 30000 genomes can be certified, this has"):
        search.certificate(2.0)
