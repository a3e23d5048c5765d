"""Search by a model of accuracy: which schedule to train next, and when a training is not worth its end.

What a schedule costs is known exactly before it is trained; only its accuracy is not.  So accuracy alone
is modelled, and a training is chosen by what it is expected to add to the front, curves and all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pwff_opt.errors import DecisionError, InfeasibleError
from pwff_opt.evaluation import Evaluation, TrainedRound
from pwff_opt.planning.planner import Planner
from pwff_opt.rng import stream
from pwff_opt.scenario.schedule import LayerState, RoundDecision, Schedule
from pwff_opt.search.certificate import Certificate
from pwff_opt.search.features import features, kinds, patterns, rank_genes
from pwff_opt.search.reference import Reference
from pwff_solvers.evolution.operators import crossed, mutated
from pwff_solvers.surrogate import Attained, GaussianProcess, expected_improvement, on_grid

FloatArray = NDArray[np.float64]
Genome = NDArray[np.int64]

CELLS = 64
"""Number of cells of log energy, in which areas of the energy-delay plane are measured."""
ENUMERABLE = 30_000
"""Number of genomes up to which every schedule is a candidate, and of kinds up to which one of each is."""
POPULATION = 50
"""Number of children a generation of the evolution beyond that, which costs no training."""
GENERATIONS = 8
"""Number of generations of that evolution, for a training."""
SEARCHED = 80
"""Number of generations of that evolution, for a certificate."""
SETTLED = 4
"""Number of trainings between searches for hyperparameters, which are the dear part, and settle."""
CONFIDENCE = 3.0
"""Standard deviations of optimism with which a training must be dominated to be stopped; chosen on the
replay of ``benchmarks/bench_search.py``, where two lost four times as many points of the front."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidate:
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
    ``search.explore_every`` is the candidate farthest from all that is trained.  Asked for several, it
    believes that each will turn out as modelled, and picks the next (kriging believer; Ginsbourger, Le
    Riche and Carraro 2010).

    Candidates are all schedules where the space is small, else one of every kind (:func:`kinds`) where
    a schedule has one phase, else what an evolution proposes anew each time; of them, those that
    thresholds do not rule out.
    """

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self._settings = planner.scenario.search
        self._marks = planner.scenario.training.validated
        self._genomes: dict[str, Genome] = {}
        self._decoded: dict[bytes, Schedule] = {}
        self._first = list(dict.fromkeys(map(self._fitting, planner.first_generation())))
        self._done: dict[str, tuple[Schedule, Evaluation]] = {}
        self._process = GaussianProcess(features=5)
        self._searched = 0
        """How many trainings there were at the last search for hyperparameters."""
        self._stale = True
        """Whether the process has learned from something else than what was told."""
        self._candidates: dict[str, Candidate] = {}
        self._all: list[Schedule] = []
        self._scope = self._scope_of(planner)
        self.reference: Reference | None = None
        self._edges = np.zeros(0)

    def ask(self, count: int = 1) -> list[Schedule]:
        first = [one for one in self._first if str(one) not in self._done]
        if first:
            return first[:count]
        if self.reference is None:
            self._measure()
        asked: list[Schedule] = []
        for _ in range(count):
            self._learn(search=not asked)
            schedule = self._next()
            if schedule is None:
                break
            asked.append(schedule)
            self._done[str(schedule)] = schedule, self._believed(schedule)
        for schedule in asked:
            del self._done[str(schedule)]
        self._stale = True
        return asked

    def _next(self) -> Schedule | None:
        """Return the schedule to train next, by what is known or believed."""
        number = len(self._done) - len(self._first)
        pool = self._pool(number)
        if not pool:
            return None
        every = self._settings.explore_every
        explores = every > 0 and number % every == every - 1
        merit = self._distances(pool) if explores else self._gains(pool)
        if not merit.any():  # nothing is to be gained, as far as the model goes
            merit = self._distances(pool)
        return pool[int(merit.argmax())].schedule

    def _believed(self, schedule: Schedule) -> Evaluation:
        """Return what the training of a schedule will give if the model is right."""
        mean, _ = self._process.predict(self._candidate(schedule).features)
        at = dict(zip(self._marks, mean, strict=True))
        rounds = tuple(
            TrainedRound(loss=(), accuracy=(at[n],) if n in at else (), uplink_bit=())
            for n in range(1, len(schedule) + 1)
        )
        return Evaluation(key="", schedule=schedule, rounds=rounds, wall_s=0.0)

    def tell(self, schedule: Schedule, evaluation: Evaluation) -> None:
        # The first rounds of a schedule stand for the one that goes on like their last.
        whole = Schedule(
            rounds=schedule.rounds
            + schedule.rounds[-1:] * (self._planner.codec.rounds - len(schedule))
        )
        known = self._done.get(str(whole))
        if known is None or len(known[1].rounds) <= len(evaluation.rounds):
            self._done[str(whole)] = whole, evaluation
        self._stale = True

    def worth_going_on(self, schedule: Schedule, so_far: Evaluation) -> bool:
        """Return False if no later round could help, were it CONFIDENCE deviations better than modelled."""
        if self.reference is None:
            return True
        key = str(schedule)
        self._done[key] = schedule, so_far
        self._learn(search=False)
        later = np.array(self._marks) > len(so_far.rounds)
        gain = self._optimistic_gains([self._candidate(schedule)], CONFIDENCE, later)
        del self._done[key]
        self._stale = True
        return bool(gain[0] > 0)

    def accuracy(self, evaluation: Evaluation) -> FloatArray:
        if self._stale:
            self._learn(search=not self._searched)
        marks = [n for n, entry in enumerate(evaluation.rounds) if entry.accuracy]
        return (
            self._process.predict(features(evaluation.schedule)[marks])[0] if marks else np.zeros(0)
        )

    def certificate(self, confidence: float) -> Certificate:
        """Return how far what is trained may be from the front of all schedules.

        What was not trained, or not to the end, counts with an accuracy ``confidence`` standard
        deviations above the model's, all at once; what was, with the model's. No schedule is left
        out, but in spaces of several phases that are too large to go through: there an evolution
        searches for those that would add most.

        Raises
        ------
        DecisionError
            If nothing was trained.
        InfeasibleError
            If nothing is within the thresholds, not even hoped for.
        """
        if not any(done.status == "done" for _, done in self._done.values()):
            raise DecisionError("a certificate needs at least 1 training that did not fail, got 0")
        reference = self.reference or self._measure()
        self._learn(search=True)
        begun = [
            (self._candidate(schedule), np.array(self._marks) > len(done.rounds))
            for schedule, done in self._done.values()
        ]
        hopes = [(one.curves, one.features) for one in self._hopes(confidence)]
        hopes += [(one.curves[left], one.features[left]) for one, left in begun if left.any()]
        found = self._attained()
        if not hopes:
            hoped = found
        else:
            mean, std = self._process.predict(np.concatenate([rows for _, rows in hopes]))
            hoped = self._attained(
                np.concatenate([curves for curves, _ in hopes]), 1.0 - (mean + confidence * std)
            )
        if not hoped.hypervolume > 0:
            raise InfeasibleError(
                f"some schedule must lie within the corner, were it {confidence:g} standard deviations "
                f"more accurate than modelled, got none: {reference.sentence}"
            )
        return Certificate.of(
            found,
            hoped,
            self._edges,
            hoped_for=len(hopes),
            scope=self._scope,
            confidence=confidence,
        )

    def _hopes(self, confidence: float) -> list[Candidate]:
        """Return candidates that what was not trained may be as good as."""
        if self._scope == "searched":
            return self._evolved(
                lambda some: self._optimistic_gains(some, confidence),
                number=0,
                generations=SEARCHED,
            )
        pool = self._pool(0)
        # Of a kind that is trained, there are other schedules.
        return self._known(self._all) if self._scope == "kinds" else pool

    def _measure(self) -> Reference:
        """Fix the corner, and the cells that areas are measured in."""
        first = [self._done[key][1] for one in self._first if (key := str(one)) in self._done]
        corner = Reference.of(self._planner, first or [done for _, done in self._done.values()])
        lowest = min(float(curve.energy_j.min()) for curve in self._planner.curves(self._cheapest))
        # Where nothing is that cheap, cells have a width all the same.
        lowest = min(lowest, 0.5 * corner.energy_j)
        self._edges = np.linspace(np.log10(lowest), np.log10(corner.energy_j), CELLS + 1)
        self.reference = corner
        return corner

    @property
    def _cheapest(self) -> list[Schedule]:
        """Schedules among which is the cheapest: one state in all layers, the least rank."""
        codec = self._planner.codec
        ranks = (min(codec.space.ranks),) * codec.devices
        plain = [
            RoundDecision(ranks=ranks, states=(LayerState[name.upper()],) * codec.layers)
            for name in codec.space.layer_states
        ]
        return self._first + [
            self._planner.repaired(Schedule(rounds=(decision,) * codec.rounds))
            for decision in plain
        ]

    def _learn(self, *, search: bool) -> None:
        """Fit the process to all measurements; ``search`` for hyperparameters too, when it is time."""
        # Schedules that begin alike share the training of those rounds: it was measured once.
        measured: dict[str, tuple[FloatArray, float]] = {}
        for schedule, evaluation in self._done.values():
            own = features(schedule)
            for number, entry in enumerate(evaluation.rounds):
                if entry.accuracy:
                    cut = str(schedule.prefix(number + 1))
                    measured[cut] = own[number], float(np.mean(entry.accuracy))
        for schedule, evaluation in self._done.values():
            if evaluation.status == "failed" and self.reference is not None:
                # Worthless, as far as the search is concerned, and so probably is what is like it.
                own = features(schedule)
                for mark in self._marks:
                    worthless = own[mark - 1], self.reference.accuracy
                    measured.setdefault(str(schedule.prefix(mark)), worthless)
        self._stale = False
        if not measured:
            return
        due = not self._searched or len(self._done) - self._searched >= SETTLED
        if search and due:
            self._searched = len(self._done)
        rows, values = zip(*measured.values(), strict=True)
        self._process.fit(np.array(rows), np.array(values), search=search and due)

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

    def _gains(self, pool: Sequence[Candidate]) -> FloatArray:
        """Return the expected improvement of every candidate."""
        curves, mean, std = self._modelled(pool)
        return expected_improvement(self._attained(), curves, 1.0 - mean, std)

    def _optimistic_gains(
        self,
        pool: Sequence[Candidate],
        confidence: float,
        marks: NDArray[np.bool_] | slice = slice(None),
    ) -> FloatArray:
        """Return the improvement of every candidate if it is better than modelled, by its ``marks``."""
        curves, mean, std = self._modelled(pool)
        errors = (1.0 - (mean + confidence * std))[:, marks]
        return expected_improvement(
            self._attained(), curves[:, marks], errors, np.zeros_like(errors)
        )

    def _modelled(self, pool: Sequence[Candidate]) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return curves [candidate, mark, cell] and mean and standard deviation of accuracies."""
        mean, std = self._process.predict(np.concatenate([one.features for one in pool]))
        shape = len(pool), len(self._marks)
        return np.array([one.curves for one in pool]), mean.reshape(shape), std.reshape(shape)

    def _distances(self, pool: Sequence[Candidate]) -> FloatArray:
        """Return how far in features every candidate is from the nearest that is trained."""
        there = np.array([self._candidate(one).features[-1] for one, _ in self._done.values()])
        here = np.array([one.features[-1] for one in pool])
        distances: FloatArray = np.linalg.norm(here[:, None] - there[None], axis=2).min(axis=1)
        return distances

    def _candidate(self, schedule: Schedule) -> Candidate:
        return self._known([schedule])[0]

    def _known(self, schedules: Sequence[Schedule]) -> list[Candidate]:
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
            self._candidates[str(schedule)] = Candidate(
                schedule=schedule, curves=curves, features=features(schedule)[at]
            )
        return [self._candidates[str(one)] for one in schedules]

    @staticmethod
    def _scope_of(planner: Planner) -> Literal["all", "kinds", "searched"]:
        """Return what can be gone through: all schedules, one of every kind, or neither."""
        codec, space = planner.codec, planner.codec.space
        if np.prod(codec.cardinalities.astype(float)) <= ENUMERABLE:
            return "all"
        count = len(patterns(codec)) * float(len(space.ranks)) ** rank_genes(codec)
        return "kinds" if space.phases == 1 and count <= ENUMERABLE else "searched"

    def _pool(self, number: int) -> list[Candidate]:
        """Return candidates for the next training, none of them trained."""
        if self._scope == "searched":
            return self._evolved(self._gains, number=number, generations=GENERATIONS)
        if not self._all:
            self._all = (
                list(dict.fromkeys(kinds(self._planner)))
                if self._scope == "kinds"
                else self._repaired(
                    np.array(list(product(*map(range, self._planner.codec.cardinalities))))
                )
            )
        return self._untrained(self._all)

    def _untrained(self, schedules: Sequence[Schedule]) -> list[Candidate]:
        """Return the candidates of those that are not trained and not ruled out by what they cost."""
        candidates = self._known([one for one in schedules if str(one) not in self._done])
        return [one for one in candidates if (one.curves < self._corner[0]).any()]

    def _evolved(
        self, merit: Callable[[list[Candidate]], FloatArray], *, number: int, generations: int
    ) -> list[Candidate]:
        """Return what an evolution towards large ``merit`` has come across.

        It starts from what is trained; in every generation the best of all so far, and some of
        chance, are crossed and mutated.
        """
        codec = self._planner.codec
        rng = stream(self._planner.scenario.seeds.search, "candidates", round=number)
        known = [self._genomes[key] for key in self._done if key in self._genomes]
        parents = np.array(known or list(self._genomes.values()))
        pool: dict[str, Candidate] = {}
        for _ in range(generations):
            mates = parents[rng.integers(0, len(parents), (2, POPULATION))]
            children = mutated(crossed(mates, rng)[0], codec.cardinalities, codec.ordinal, rng)
            strangers = rng.integers(
                0, codec.cardinalities, (POPULATION // 4, len(codec.cardinalities))
            )
            fresh = self._repaired(np.concatenate([children, strangers]))
            pool |= {str(one.schedule): one for one in self._untrained(fresh)}
            if not pool:
                continue
            keys, found = list(pool), list(pool.values())
            best = np.argsort(-merit(found), kind="stable")[: POPULATION // 2]
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
