"""The search for what to train next, on accuracies that are a formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from pwff_opt import Evaluation, Planner, Scenario, Schedule, TrainedRound, Workload
from pwff_opt.errors import DecisionError, InfeasibleError
from pwff_opt.search import surrogate as search_module
from pwff_opt.search.evolution import Evolution
from pwff_opt.search.features import features, kinds
from pwff_opt.search.reference import Reference
from pwff_opt.search.surrogate import Surrogate
from pwff_solvers.surrogate import GaussianProcess


def answer(schedule: Schedule, score: Callable[[Schedule], float]) -> Evaluation:
    rounds = [
        TrainedRound(
            loss=(0.0,) * 3, accuracy=(score(schedule.prefix(n)),) * 3, uplink_bit=(0,) * 3
        )
        for n in range(1, len(schedule) + 1)
    ]
    return Evaluation(key=str(schedule), schedule=schedule, rounds=tuple(rounds), wall_s=0.0)


def one(search: Surrogate) -> Schedule | None:
    return next(iter(search.ask()), None)


def learned(schedule: Schedule) -> float:
    """Accuracy that rises with rounds, layers and rank."""
    effort = sum(sum(d.trained) * (1 + np.log2(1 + d.ranks[0])) for d in schedule.rounds)
    return float(0.4 + 0.5 * (1 - np.exp(-0.08 * effort)))


@pytest.fixture
def planner(small: Scenario) -> Planner:
    return Planner(small, Workload.padded(small, classes=3))


def course(planner: Planner, count: int) -> tuple[Surrogate, list[str]]:
    search, asked = Surrogate(planner), []
    while len(asked) < count and (schedule := one(search)) is not None:
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


def test_of_several_each_is_chosen_as_if_those_before_turned_out_as_modelled(
    planner: Planner,
) -> None:
    def noisy(cut: Schedule) -> float:
        return learned(cut) + 0.05 * (len(str(cut)) + str(cut).count("a") * len(cut)) % 0.04

    search, by_hand = Surrogate(planner), Surrogate(planner)
    for told in (search, by_hand):
        for _ in range(9):
            (schedule,) = told.ask()
            told.tell(schedule, answer(schedule, noisy))
    several = search.ask(3)
    assert search.ask(3) == several, "asking changes nothing"
    for schedule in several:
        assert by_hand.ask() == [schedule]
        modelled = by_hand.accuracy(answer(schedule, noisy))
        by_hand.tell(schedule, answer(schedule, lambda cut, at=modelled: at[len(cut) - 1]))
    gains = search._gains(search._pool(0))
    best = [str(search._pool(0)[index].schedule) for index in np.argsort(-gains)[:3]]
    assert [str(schedule) for schedule in several] != best, "the best of each alone are alike"


@pytest.mark.parametrize("kind", [Surrogate, Evolution])
def test_a_generation_is_told_before_the_next_is_asked_for(
    planner: Planner, kind: type[Surrogate | Evolution]
) -> None:
    search = kind(planner)
    first = search.ask(3)
    for schedule in first:
        search.tell(schedule, answer(schedule, learned))
    first += (rest := search.ask(100))
    assert len({str(schedule) for schedule in first}) == len(first) == len(kind(planner).ask(100))
    for schedule in rest:
        search.tell(schedule, answer(schedule, learned))
    assert not set(first) & set(search.ask(3))


def test_what_begins_alike_was_measured_once(
    small: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = replace(small, decisions=replace(small.decisions, phases=3))
    search, sizes = Surrogate(Planner(phases, Workload.padded(phases, classes=3))), []
    fit = GaussianProcess.fit
    monkeypatch.setattr(
        GaussianProcess,
        "fit",
        lambda *given, **how: [sizes.append(len(given[1])), fit(*given, **how)],
    )
    for text in ("1x2:faa", "1x2:faa 1x2:ffa 1x2:ffa", "2x2:faa 1x2:ffa"):
        schedule = Schedule.parse(text, devices=3)
        search.tell(schedule, answer(schedule, learned))
    search.accuracy(answer(schedule, learned))
    assert sizes == [5]  # 1x, 1x 1x, 1x 2x, 2x, 2x 1x


def test_the_last_training_counts_though_it_might_have_been_stopped(planner: Planner) -> None:
    asked, (told, _) = course(planner, 10)[0], course(planner, 10)
    (schedule,) = asked.ask()
    whole = answer(schedule, lambda cut: learned(cut) - 0.1 * (len(cut) == 3))
    asked.worth_going_on(schedule, replace(whole, rounds=whole.rounds[:1]))
    for search in (asked, told):
        search.tell(schedule, whole)
    np.testing.assert_array_equal(asked.accuracy(whole), told.accuracy(whole))


def test_where_nothing_is_to_be_gained_the_farthest_is_trained(small: Scenario) -> None:
    limits = replace(small.thresholds, accuracy_min=1.0)
    planner = Planner(replace(small, thresholds=limits), Workload.padded(small, classes=3))
    search, asked = course(planner, 12)
    here = np.array([features(Schedule.parse(text, devices=3))[-1] for text in asked])
    (schedule,) = search.ask()
    apart = [
        np.linalg.norm(features(one)[-1] - here, axis=1).min()
        for one in exact(planner)[1]
        if str(one) not in asked
    ]
    assert np.linalg.norm(features(schedule)[-1] - here, axis=1).min() == pytest.approx(max(apart))


def test_what_thresholds_rule_out_is_not_trained(small: Scenario) -> None:
    """Some afford only the cheaper schedules, some none: then only the first generation is trained."""
    free = Planner(small, Workload.padded(small, classes=3))
    least_j = {str(one): free.curve(one).energy_j.min() for one in exact(free)[1]}
    for energy_max_j in (1e-6, float(np.median(list(least_j.values())))):
        limits = replace(small.thresholds, energy_max_j=energy_max_j)
        planner = Planner(replace(small, thresholds=limits), free.costs.workload)
        search, schedules = exact(planner)
        first = len(planner.first_generation())
        assert all(least_j[str(one)] < energy_max_j for one in schedules[first:])
        affordable = {text for text, least in least_j.items() if least < 0.9 * energy_max_j}
        assert affordable <= {str(one) for one in schedules}
        assert (np.diff(search._edges) > 0).all()
    limits = replace(small.thresholds, energy_max_j=1e-6)
    search, _ = exact(Planner(replace(small, thresholds=limits), free.costs.workload))
    with pytest.raises(InfeasibleError, match="some schedule must lie within the corner"):
        search.certificate(2.0)


def test_areas_begin_at_the_cheapest_schedule(small: Scenario) -> None:
    unfrozen = replace(small.decisions, layer_states=("personal", "aggregated"))
    planner = Planner(replace(small, decisions=unfrozen), Workload.padded(small, classes=3))
    search, schedules = exact(planner)
    least_j = min(planner.curve(one).energy_j.min() for one in schedules)
    assert 10 ** search._edges[0] == pytest.approx(least_j)


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
        (schedule,) = search.ask()
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
    while (asked := one(search)) is not None and search.reference is None:
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
    assert "what training all layers costs" in corner.sentence


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
    while (schedule := one(search)) is not None:
        search.tell(schedule, answer(schedule, learned))
        schedules.append(schedule)
    return search, schedules


def test_a_certificate_of_everything_is_one(planner: Planner) -> None:
    search, _ = exact(planner)
    certificate = search.certificate(2.0)
    assert certificate.hoped_for == 0
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
        assert certificate.hoped_for == len(schedules) - count
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


@pytest.mark.parametrize("count", [20, 21])
def test_a_certificate_does_not_depend_on_how_trainings_were_told(
    planner: Planner, count: int
) -> None:
    """In a run folder there are also the beginnings of trainings that were stopped early or not."""
    _, asked = course(planner, count)
    at_once, in_pieces = Surrogate(planner), Surrogate(planner)
    for text in asked:
        schedule = Schedule.parse(text, devices=3)
        at_once.tell(schedule, answer(schedule, learned))
        for rounds in (1, 3, 2):
            in_pieces.tell(schedule.prefix(rounds), answer(schedule.prefix(rounds), learned))
    certificate = at_once.certificate(2.0)
    assert in_pieces.certificate(2.0) == certificate
    assert certificate.hypervolume_ratio > 0.9
    assert at_once._process.noise_std < 0.01, (
        "its hyperparameters were searched for: nothing is noisy"
    )
    assert certificate.hoped_for == len(exact(planner)[1]) - count


def test_a_training_that_was_stopped_may_be_hoped_for(planner: Planner) -> None:
    search, schedules = exact(planner)
    assert search.certificate(2.0).hoped_for == 0
    stopped = Surrogate(planner)
    for number, schedule in enumerate(schedules):
        cut = schedule.prefix(1 if number % 2 else 3)
        stopped.tell(schedule, answer(cut, learned))
    certificate = stopped.certificate(2.0)
    assert certificate.hoped_for == len(schedules) // 2
    assert certificate.hypervolume_ratio < 1.0


def test_a_certificate_needs_something_that_was_trained(planner: Planner) -> None:
    search = Surrogate(planner)
    for _ in range(2):
        with pytest.raises(DecisionError, match="at least 1 training that did not fail, got 0"):
            search.certificate(2.0)
        (schedule,) = search.ask()
        search.tell(schedule, replace(answer(schedule, learned), rounds=(), status="failed"))


@pytest.mark.parametrize(
    "states", [("frozen", "personal", "aggregated"), ("aggregated", "personal")]
)
@pytest.mark.parametrize("scope", ["common", "per_device"])
@pytest.mark.parametrize("groups", [0, 2])
def test_layers_are_alike(
    small: Scenario, scope: str, groups: int, states: tuple[str, ...]
) -> None:
    """Schedules of one kind cost the same and have the same features; no kind is missing, none more."""
    space = replace(
        small.decisions, rank_scope=scope, ranks=(0, 2), layer_groups=groups, layer_states=states
    )
    planner = Planner(replace(small, decisions=space), Workload.padded(small, classes=3))
    everything = planner_space(planner)
    representatives = list(kinds(planner))
    assert set(representatives) <= set(everything)
    known = {
        (one.rounds[0].ranks, features(one)[-1].tobytes()): planner.curve(one)
        for one in representatives
    }
    for one, curve in zip(everything, planner.curves(everything), strict=True):
        alike = known[one.rounds[0].ranks, features(one)[-1].tobytes()]
        np.testing.assert_allclose(curve.energy_j, alike.energy_j, rtol=1e-9)
        np.testing.assert_allclose(curve.delay_s, alike.delay_s, rtol=1e-9)


def planner_space(planner: Planner) -> list[Schedule]:
    """Every schedule."""
    genomes = np.ndindex(*planner.codec.cardinalities)
    decoded = (planner.codec.decode(np.array(genome)) for genome in genomes)
    return list(dict.fromkeys(map(planner.repaired, decoded)))


def test_large_spaces_are_certified_by_kinds(
    planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of every kind bounds all there are; an evolution comes near that bound, from above."""
    told = course(planner, 16)[1]
    ratios = []
    for enumerable in (30_000, 200, 1):
        monkeypatch.setattr(search_module, "ENUMERABLE", enumerable)
        search = Surrogate(planner)
        for text in told:
            schedule = Schedule.parse(text, devices=3)
            search.tell(schedule, answer(schedule, learned))
        ratios.append(search.certificate(2.0))
    everything, kind, searched = ratios
    assert [one.scope for one in ratios] == ["all", "kinds", "searched"]
    assert kind.hoped_for == len(set(kinds(planner))), "of every kind there may be others"
    assert kind.hypervolume_ratio <= everything.hypervolume_ratio + 1e-12
    assert kind.hypervolume_ratio >= 0.98 * everything.hypervolume_ratio
    assert searched.hypervolume_ratio >= everything.hypervolume_ratio - 1e-12
    assert searched.hypervolume_ratio <= 1.02 * everything.hypervolume_ratio
    assert "kinds: layers count by how many are trained" in kind.sentence
    assert "a search and no bound" in searched.sentence


def test_large_spaces_of_phases_are_certified_by_a_search(small: Scenario) -> None:
    large = replace(small, decisions=replace(small.decisions, phases=3))
    search, _ = course(Planner(large, Workload.padded(large, classes=3)), 8)
    certificate = search.certificate(2.0)
    assert certificate.scope == "searched"
    assert 0.0 < certificate.hypervolume_ratio < 1.0
    assert certificate.hoped_for > 500
