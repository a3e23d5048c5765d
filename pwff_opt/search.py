"""Which schedule to train next, and when a training is not worth its end.

What a schedule costs is known exactly before it is trained; only its accuracy is not.  So accuracy alone
is modelled, and a training is chosen by what it is expected to add to the front, curves and all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import moocore
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pwff_opt.decision import LayerState, RoundDecision, Schedule
from pwff_opt.errors import DecisionError
from pwff_opt.evaluation import Evaluation
from pwff_opt.planning import Curve, Planner
from pwff_opt.rng import stream
from pwff_opt.scenario import Thresholds
from pwff_solvers.evolution import SetSearch, crossed, mutated
from pwff_solvers.surrogate import Attained, GaussianProcess, expected_improvement, on_grid

FloatArray = NDArray[np.float64]
Genome = NDArray[np.int64]

CELLS = 64
"""Of log energy, in which areas of the energy-delay plane are measured."""
ENUMERABLE = 30_000
"""Genomes: up to so many, every schedule is a candidate; beyond, an evolution proposes them."""
EVOLUTION = (50, 8)
"""Population and generations of that evolution, which costs no training."""
CONFIDENCE = 2.0
"""Standard deviations of optimism with which a training must be dominated to be stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The worst the user would accept: the corner from which a front is measured."""

    energy_j: float
    delay_s: float
    accuracy: float
    sentence: str
    """Where it comes from."""

    @classmethod
    def of(cls, planner: Planner, first: Sequence[Evaluation]) -> Reference:
        """Return the thresholds; in place of those not given, what costs most and what scores least.

        ``first``: the evaluations of the first generation.
        """
        scenario, layers = planner.scenario, planner.codec.layers
        thresholds = scenario.thresholds
        all_layers = RoundDecision(
            ranks=(max(scenario.decisions.ranks),) * len(scenario.devices),
            states=(LayerState.AGGREGATED,) * layers,
        )
        rounds = scenario.training.rounds
        most = planner.curve(planner.repaired(Schedule(rounds=(all_layers,) * rounds)))
        worst = min(
            (
                float(np.mean(entry.accuracy))
                for done in first
                for entry in done.rounds
                if entry.accuracy
            ),
            default=0.0,
        )
        given = {
            "energy_max_j": thresholds.energy_max_j,
            "delay_max_s": thresholds.delay_max_s,
            "accuracy_min": thresholds.accuracy_min,
        }
        values = {
            "energy_max_j": float(most.energy_j.max()),
            "delay_max_s": float(most.delay_s.max()),
            "accuracy_min": worst,
        }
        missing = [name for name, value in given.items() if value is None]
        values |= {name: value for name, value in given.items() if value is not None}
        sentence = (
            f"fronts are measured against {values['energy_max_j']:.4g} J, {values['delay_max_s']:.4g} s "
            f"and accuracy {values['accuracy_min']:.3f}"
        )
        if missing:
            sentence += (
                f"; [thresholds] {', '.join(missing)} not given, so the dearest schedule and the least "
                "accurate one of the first generation stand for what you would accept: give them, and "
                "no training is spent where you would not go"
            )
        return cls(
            energy_j=values["energy_max_j"],
            delay_s=values["delay_max_s"],
            accuracy=values["accuracy_min"],
            sentence=sentence,
        )


class Searcher(Protocol):
    """Proposes schedules to train, one at a time."""

    reference: Reference | None
    """What improvements are measured from, where and when that is known."""

    def ask(self) -> Schedule | None:
        """Return the next schedule; None when there is none left."""

    def tell(self, schedule: Schedule, evaluation: Evaluation) -> None:
        """Take what was trained of the schedule: all of its rounds, or the first ones."""

    def worth_going_on(self, schedule: Schedule, so_far: Evaluation) -> bool:
        """Return whether a training that stands after ``so_far`` should go on."""

    def accuracy(self, evaluation: Evaluation) -> FloatArray:
        """Return what it takes the mean accuracy to be after every round validated, [mark]."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """How far a front may be from that of all schedules, in log10 energy, log10 delay and error."""

    hypervolume_ratio: float
    """Of the front found over that hoped for."""
    epsilon_additive: float
    """By how much every coordinate of the front found must improve to dominate what is hoped for."""
    igd_plus: float
    """Mean distance by which points hoped for are not dominated."""
    untrained: int
    confidence: float
    """Standard deviations that untrained schedules are hoped to be better than modelled."""
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
        untrained: int,
        confidence: float,
    ) -> Certificate:
        ours, theirs = found.points(edges), hoped.points(edges)
        return cls(
            hypervolume_ratio=found.hypervolume / hoped.hypervolume,
            epsilon_additive=float(moocore.epsilon_additive(ours, ref=theirs)),
            igd_plus=float(moocore.igd_plus(ours, ref=theirs)),
            untrained=untrained,
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
        if not self.untrained:
            return f"every schedule was trained, so the front is that of the space: {figures}"
        return (
            f"against a front on which all {self.untrained} schedules that were not trained are "
            f"{self.confidence:g} standard deviations more accurate than the model of accuracy has them: "
            f"{figures}. It is as good as that model, and no proof"
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Candidate:
    """A schedule with what is known about it before it is trained, at its validated rounds."""

    schedule: Schedule
    curves: FloatArray
    """[mark, cell]: least log10 delay."""
    features: FloatArray
    """[mark, feature]"""


class Surrogate:
    """Trains next what is expected to add most hypervolume to the front.

    A Gaussian process over :func:`features` models the mean accuracy of devices after every validated
    round.  Costs are exact, so a candidate is a set of exact curves at uncertain accuracies, and its expected
    improvement has a closed form (:func:`pwff_solvers.surrogate.expected_improvement`).  The front it
    is measured against has the process's accuracies, not the measured ones: the best of many noisy
    measurements is mostly luck.  The first generation are plain ways to fine-tune; after it, one pick in
    ``search.explore_every`` is the candidate farthest from all that is trained.

    Candidates are all schedules where the space is small; else an evolution proposes them anew each time.
    """

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self._settings = planner.scenario.search
        self._marks = planner.scenario.training.validated
        self._genomes: dict[str, Genome] = {}
        self._decoded: dict[bytes, Schedule] = {}
        self._first = list(dict.fromkeys(map(self._fitting, planner.first_generation())))
        self._done: dict[str, tuple[Schedule, Evaluation]] = {}
        self._process, self._learned = GaussianProcess(features=5), 0
        self._candidates: dict[str, _Candidate] = {}
        self._everything: list[Schedule] = []
        self._small = float(np.prod(planner.codec.cardinalities.astype(float))) <= ENUMERABLE
        self.reference: Reference | None = None
        self._edges = np.zeros(0)

    def ask(self) -> Schedule | None:
        for schedule in self._first:
            if str(schedule) not in self._done:
                return schedule
        if self.reference is None:
            self._measure()
        self._learn()
        number = len(self._done) - len(self._first)
        pool = self._pool(number)
        if not pool:
            return None
        every = self._settings.explore_every
        explores = every > 0 and number % every == every - 1
        merit = self._distances(pool) if explores else self._gains(pool)
        return pool[int(merit.argmax())].schedule

    def tell(self, schedule: Schedule, evaluation: Evaluation) -> None:
        self._done[str(schedule)] = schedule, evaluation

    def worth_going_on(self, schedule: Schedule, so_far: Evaluation) -> bool:
        """Return False if no later round could help, were it CONFIDENCE deviations better than modelled."""
        if self.reference is None:
            return True
        key = str(schedule)
        self.tell(schedule, so_far)
        self._learn(search=False)
        candidate = self._candidate(schedule)
        mean, std = self._process.predict(candidate.features)
        later = np.array(self._marks) > len(so_far.rounds)
        gain = expected_improvement(
            self._attained(),
            candidate.curves[None, later],
            1.0 - (mean + CONFIDENCE * std)[None, later],
            np.zeros((1, int(later.sum()))),
        )
        del self._done[key]
        return bool(gain[0] > 0)

    def accuracy(self, evaluation: Evaluation) -> FloatArray:
        if self._learned != len(self._done):
            self._learn(search=False)
        marks = [n for n, entry in enumerate(evaluation.rounds) if entry.accuracy]
        return (
            self._process.predict(features(evaluation.schedule)[marks])[0] if marks else np.zeros(0)
        )

    def certificate(self, confidence: float) -> Certificate:
        """Return how far what is trained may be from the front of all schedules.

        Those that were not trained count with an accuracy ``confidence`` standard deviations above the
        model's, all at once; those that were, with the model's.

        Raises
        ------
        DecisionError
            If the space is too large to go through.
        """
        if not self._small:
            raise DecisionError(
                f"a space of at most {ENUMERABLE} genomes can be certified, this has "
                f"{np.prod(self._planner.codec.cardinalities.astype(float)):.3g}; fewer "
                "decisions.ranks, layer_states or phases make it smaller"
            )
        if self.reference is None:
            self._measure()
        self._learn()
        rest = self._pool(0)
        found = self._attained()
        if not rest:
            return Certificate.of(found, found, self._edges, untrained=0, confidence=confidence)
        rows = np.concatenate([one.features for one in rest])
        mean, std = self._process.predict(rows)
        hoped = self._attained(
            np.concatenate([one.curves for one in rest]), 1.0 - (mean + confidence * std)
        )
        return Certificate.of(found, hoped, self._edges, untrained=len(rest), confidence=confidence)

    def _measure(self) -> None:
        """Fix the corner and the cells that areas are measured in."""
        self.reference = Reference.of(self._planner, [done for _, done in self._done.values()])
        lowest = min(float(self._planner.curve(one).energy_j.min()) for one in self._first)
        self._edges = np.linspace(np.log10(lowest), np.log10(self.reference.energy_j), CELLS + 1)

    def _learn(self, *, search: bool = True) -> None:
        """Fit the process to all measurements."""
        self._learned = len(self._done)
        rows, values = [], []
        for schedule, evaluation in self._done.values():
            own = features(schedule)
            for number, entry in enumerate(evaluation.rounds):
                if entry.accuracy:
                    rows.append(own[number])
                    values.append(float(np.mean(entry.accuracy)))
            if evaluation.status == "failed" and self.reference is not None:
                # Worthless, as far as the search is concerned, and so probably is what is like it.
                rows += [own[mark - 1] for mark in self._marks]
                values += [self.reference.accuracy] * len(self._marks)
        if not rows:
            return
        # The search for hyperparameters is the dear part, and they settle.
        self._process.fit(
            np.array(rows), np.array(values), search=search and len(self._done) & 3 == 0
        )

    def _attained(
        self, more: FloatArray | None = None, more_errors: FloatArray | None = None
    ) -> Attained:
        """Return what is attained by all that is trained, at the model's accuracies, and by ``more``."""
        marks = np.array(self._marks)
        trained = self._known([schedule for schedule, _ in self._done.values()])
        reached = np.concatenate([marks <= len(done.rounds) for _, done in self._done.values()])
        curves = np.concatenate([one.curves for one in trained])
        errors = 1.0 - self._process.predict(np.concatenate([one.features for one in trained]))[0]
        curves, errors = curves[reached], errors[reached]
        if more is not None and more_errors is not None:
            curves, errors = np.concatenate([curves, more]), np.concatenate([errors, more_errors])
        return Attained.of(curves, errors, self._edges, self._corner)

    @property
    def _corner(self) -> tuple[float, float]:
        """Log10 delay and error of the reference."""
        assert self.reference is not None
        return float(np.log10(self.reference.delay_s)), 1.0 - self.reference.accuracy

    def _gains(self, pool: Sequence[_Candidate]) -> FloatArray:
        """Return the expected improvement of every candidate."""
        rows = np.concatenate([one.features for one in pool])
        mean, std = (
            values.reshape(len(pool), len(self._marks)) for values in self._process.predict(rows)
        )
        curves = np.array([one.curves for one in pool])
        return expected_improvement(self._attained(), curves, 1.0 - mean, std)

    def _distances(self, pool: Sequence[_Candidate]) -> FloatArray:
        """Return how far in features every candidate is from the nearest that is trained."""
        there = np.array([self._candidate(one).features[-1] for one, _ in self._done.values()])
        here = np.array([one.features[-1] for one in pool])
        distances: FloatArray = np.linalg.norm(here[:, None] - there[None], axis=2).min(axis=1)
        return distances

    def _candidate(self, schedule: Schedule) -> _Candidate:
        return self._known([schedule])[0]

    def _known(self, schedules: Sequence[Schedule]) -> list[_Candidate]:
        """Return the candidates of schedules, their curves computed once."""
        new = [one for one in schedules if str(one) not in self._candidates]
        at = np.array(self._marks) - 1
        for schedule, curve in zip(new, self._planner.curves(new), strict=True):
            curves = on_grid(
                np.log10(curve.energy_j[at, ::-1]),
                np.log10(curve.delay_s[at, ::-1]),
                self._edges,
                self._corner[0],
            )
            self._candidates[str(schedule)] = _Candidate(
                schedule=schedule, curves=curves, features=features(schedule)[at]
            )
        return [self._candidates[str(one)] for one in schedules]

    def _pool(self, number: int) -> list[_Candidate]:
        """Return candidates for the next training, none of them trained."""
        codec = self._planner.codec
        if self._small:
            if not self._everything:
                genomes = product(*map(range, codec.cardinalities))
                self._everything = self._repaired(np.array(list(genomes)))
            return self._known([one for one in self._everything if str(one) not in self._done])
        return self._evolved(
            stream(self._planner.scenario.seeds.search, "candidates", round=number)
        )

    def _evolved(self, rng: np.random.Generator) -> list[_Candidate]:
        """Return what an evolution towards large expected improvement has come across.

        It starts from what is trained; in every generation the best of all so far, and some of
        chance, are crossed and mutated.
        """
        codec = self._planner.codec
        count, generations = EVOLUTION
        parents = np.array([self._genomes[key] for key in self._done])
        pool: dict[str, _Candidate] = {}
        for _ in range(generations):
            mates = parents[rng.integers(0, len(parents), (2, count))]
            children = mutated(crossed(mates, rng)[0], codec.cardinalities, codec.ordinal, rng)
            strangers = rng.integers(0, codec.cardinalities, (count // 4, len(codec.cardinalities)))
            fresh = self._repaired(np.concatenate([children, strangers]))
            fresh = [one for one in fresh if str(one) not in self._done]
            pool |= {str(one.schedule): one for one in self._known(fresh)}
            if not pool:
                break
            keys, found = list(pool), list(pool.values())
            best = np.argsort(-self._gains(found), kind="stable")[: count // 2]
            parents = np.array([self._genomes[keys[index]] for index in best])
        return list(pool.values())

    def _repaired(self, genomes: Genome) -> list[Schedule]:
        """Return the schedules of genomes, made to fit, each once."""
        unique = np.unique(self._planner.codec.normalised(genomes), axis=0)
        return list(dict.fromkeys(map(self._fitting, unique)))

    def _fitting(self, genome: Genome) -> Schedule:
        """Return the schedule of a genome, made to fit."""
        key = genome.tobytes()
        if key not in self._decoded:
            schedule = self._planner.repaired(self._planner.codec.decode(genome))
            self._decoded[key] = schedule
            self._genomes.setdefault(str(schedule), genome)
        return self._decoded[key]


class Evolution:
    """NSGA-II over schedules (:class:`pwff_solvers.evolution.SetSearch`): a model of nothing."""

    def __init__(self, planner: Planner) -> None:
        self.reference: Reference | None = None
        self._planner = planner
        self._texts: dict[bytes, str] = {}
        self._search = SetSearch(
            planner.codec.cardinalities,
            planner.codec.ordinal,
            planner.first_generation(),
            key=self._text,
            seed=planner.scenario.seeds.search,
        )
        self._waiting: deque[Schedule] = deque()
        self._answers: list[FloatArray] = []

    def ask(self) -> Schedule | None:
        if not self._waiting:
            if self._answers:
                self._search.tell(self._answers)
                self._answers = []
            self._waiting.extend(
                self._planner.repaired(self._planner.codec.decode(genome))
                for genome in self._search.ask()
            )
        return self._waiting.popleft() if self._waiting else None

    def _text(self, genome: Genome) -> str:
        """Return the schedule that a genome comes down to."""
        codec = self._planner.codec
        key = codec.normalised(genome[None]).tobytes()
        if key not in self._texts:
            self._texts[key] = str(self._planner.repaired(codec.decode(genome)))
        return self._texts[key]

    def tell(self, schedule: Schedule, evaluation: Evaluation) -> None:
        table = candidates(
            evaluation,
            self._planner.curve(evaluation.schedule),
            self.accuracy(evaluation),
            self._planner.scenario.thresholds,
        )
        self._answers.append(objectives(table))

    def worth_going_on(self, schedule: Schedule, so_far: Evaluation) -> bool:
        return True

    def accuracy(self, evaluation: Evaluation) -> FloatArray:
        return measured(evaluation)


def measured(evaluation: Evaluation) -> FloatArray:
    """Return the mean validation accuracy after every round validated, [mark]."""
    return np.array([np.mean(entry.accuracy) for entry in evaluation.rounds if entry.accuracy])


def candidates(
    evaluation: Evaluation, curve: Curve, accuracy: FloatArray, thresholds: Thresholds
) -> pd.DataFrame:
    """Return every acceptable point a training offers: each validated round, at each price of time.

    ``accuracy`` [mark]: what a point is chosen by, in column ``accuracy_chosen_by``.
    """
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
