"""Searches compared on replayed real trainings: true hypervolume against trainings spent.

*Replay*: ``results/replay.parquet`` holds every schedule of the space of ``replay.toml``, really trained
(``replay_table.py``) with one seed or more.  A search asks for a training and gets its validation
accuracies with one of the seeds, at once.  *Truth* of a schedule cut after a round is its mean accuracy on
test data, over all seeds of the table; no search sees it.

*Measures*: after n trainings a search reports the front of what it has trained, by what it takes accuracies
to be.  *Reported* is what that front is truly worth: its hypervolume at true accuracies, over that of the
front of all schedules.  *Trained* is the same with hindsight, for the front that could be chosen from what
has been trained: it tells how well a search picks its trainings, apart from the noise of choosing by the
few sentences of validation data.  Areas are those of exact energy-delay curves, and every training counts
with all of its validated rounds: in that the rivals are given more than they would have (they choose
schedules, and get the allocator's curves and the nested rounds for nothing).

*Searches*: ours (a model of accuracy and expected improvement), reporting by its model or by what was
measured; NSGA-II on sets of curves, ours too; pymoo's NSGA-II with its own operators on rank and layer
states, as a user would write it; random; Optuna's NSGA-II, TPE and GP samplers; BoTorch's qLogNEHVI over all
schedules that are left.  Rivals see energy and delay at the knee of a schedule's curve and its error after
the last round.

*Early stops*: the whole search with ``search.stop_early``, against the same without, at the same rounds; and
what stopping lost, against its own schedules had they been trained to the end.  *Certificate*: what it
claims after some trainings, against the true ratio within the same corner, at several confidences.

``python benchmarks/bench_search.py`` (20 to 30 minutes; ``--quick`` for a smoke test) writes
``benchmarks/results/search.json`` and the figure ``runs/search.png``.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from harness import machine, parser, versions, write

from pwff_opt.costs import Workload
from pwff_opt.evaluation import Evaluation, TrainedRound
from pwff_opt.front.front import Front, pareto_front
from pwff_opt.planning.planner import Planner
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.files import read_scenario
from pwff_opt.scenario.schedule import Schedule
from pwff_opt.search.evolution import Evolution
from pwff_opt.search.reference import Reference
from pwff_opt.search.surrogate import CONFIDENCE, Surrogate
from pwff_solvers.surrogate import Attained, on_grid

HERE = Path(__file__).resolve().parent
PACKAGES = ("numpy", "scipy", "scikit-learn", "pymoo", "optuna", "botorch", "gpytorch", "torch")
CELLS = 256
SHOWN = 60  # trainings in the figure
FloatArray = np.ndarray


class Replay:
    """The table, its truth, and what any set of trainings is worth."""

    def __init__(self, scenario: Scenario, table: pd.DataFrame) -> None:
        self.scenario = scenario
        self.marks = scenario.training.validated
        given = table.attrs["workload"]
        moments = {name: np.array(given[name]) for name in ("mean_tokens", "mean_squared_tokens")}
        self.planner = Planner(scenario, Workload(classes=given["classes"], **moments))
        self.seeds = sorted(table["seed"].unique())
        means = table.groupby(["seed", "schedule", "round"], observed=True)[
            ["accuracy_validation", "accuracy_test"]
        ].mean()
        self.seen = {
            seed: own.droplevel("seed")["accuracy_validation"].unstack("round")[list(self.marks)]
            for seed, own in means.groupby(level="seed")
        }
        truth = means["accuracy_test"].groupby(level=["schedule", "round"], observed=True).mean()
        self.truth = truth.unstack("round")[list(self.marks)]
        self.per_device = {
            key: own.sort_values("device")["accuracy_validation"].to_numpy()
            for key, own in table.groupby(["seed", "schedule", "round"], observed=True)
        }
        self.schedules = {
            str(text): Schedule.parse(str(text), devices=len(scenario.devices))
            for text in self.truth.index
        }
        curves = self.planner.curves(list(self.schedules.values()))
        most = Reference.of(self.planner, [])
        self.planner_corner = (float(np.log10(most.energy_j)), float(np.log10(most.delay_s)))
        self.reference = (float(np.log10(most.delay_s)), float(1.0 - self.truth.to_numpy().min()))
        low = min(float(np.log10(curve.energy_j.min())) for curve in curves)
        edges = np.linspace(low, np.log10(most.energy_j), CELLS + 1)
        self.edges = edges
        at = np.array(self.marks) - 1
        self.curves = {
            text: on_grid(
                np.log10(curve.energy_j[at, ::-1]),
                np.log10(curve.delay_s[at, ::-1]),
                edges,
                self.reference[0],
            )
            for text, curve in zip(self.schedules, curves, strict=True)
        }
        self.knees = {}
        for text, curve in zip(self.schedules, curves, strict=True):
            energy, delay = np.log10(curve.energy_j[-1]), np.log10(curve.delay_s[-1])
            scaled = [(x - x.min()) / np.ptp(x) for x in (energy, delay)]
            at_knee = int(np.sum(scaled, axis=0).argmin())
            self.knees[text] = (float(energy[at_knee]), float(delay[at_knee]))
        self.best = self.worth(list(self.schedules), self.truth.to_numpy())

    def whole(self, cut: Schedule) -> str:
        """Return the schedule of the table that begins with a cut."""
        return str(Schedule(rounds=cut.rounds[:1] * self.scenario.training.rounds))

    def evaluation(self, text: str, seed: int) -> Evaluation:
        rounds = []
        devices = len(self.scenario.devices)
        for number in range(1, self.scenario.training.rounds + 1):
            accuracy = self.per_device.get((seed, text, number), ())
            rounds.append(
                TrainedRound(
                    loss=(1.0,) * devices, accuracy=tuple(accuracy), uplink_bit=(0,) * devices
                )
            )
        return Evaluation(key=text, schedule=self.schedules[text], rounds=tuple(rounds), wall_s=0.0)

    def worth(self, trained: list[str], estimate: FloatArray) -> float:
        """Return the true hypervolume of the front of some trainings, by ``estimate`` [training, mark]."""
        return self.attained(self.chosen(trained, estimate)).hypervolume

    def chosen(self, trained: list[str], estimate: FloatArray) -> list[tuple[str, int]]:
        """Return the cuts (schedule, index of mark) on the front of some trainings, by ``estimate``."""
        cuts = [(text, mark) for text in trained for mark in range(len(self.marks))]
        least, chosen = np.full(CELLS, self.reference[0]), []
        for index in np.argsort(1.0 - estimate.ravel(), kind="stable"):
            text, mark = cuts[index]
            if (self.curves[text][mark] < least).any():
                chosen.append((text, mark))
                least = np.minimum(least, self.curves[text][mark])
        return chosen

    def attained(self, cuts: list[tuple[str, int]], worst: float | None = None) -> Attained:
        """Return what cuts truly attain, up to an error of ``worst``."""
        places = [self.truth.index.get_loc(text) for text, _ in cuts]
        errors = 1.0 - self.truth.to_numpy()[places, [mark for _, mark in cuts]]
        curves = np.array([self.curves[text][mark] for text, mark in cuts])
        corner = self.reference if worst is None else (self.reference[0], worst)
        return Attained.of(curves, errors, self.edges, corner)


@dataclass(frozen=True)
class Replayed:
    """An evaluator of one training seed that looks trainings up."""

    replay: Replay
    seed: int

    @property
    def workload(self) -> Workload:
        return self.replay.planner.costs.workload

    def train(self, schedule: Schedule) -> Evaluation:
        whole = self.replay.evaluation(self.replay.whole(schedule), self.seed)
        return replace(
            whole, key=str(schedule), schedule=schedule, rounds=whole.rounds[: len(schedule)]
        )

    def test(self, schedule: Schedule) -> tuple[float, ...]:
        mark = self.replay.marks.index(len(schedule))
        return (float(self.replay.truth.loc[self.replay.whole(schedule)].iloc[mark]),)

    def with_seed(self, seed: int) -> Replayed:
        return replace(self, seed=seed)


@dataclass(frozen=True)
class Asked:
    """A search at work: what it trains, in order, and how it sees what it has trained."""

    order: Iterator[str]
    estimate: Callable[[list[str]], FloatArray]
    """Of trained schedules, accuracy [schedule, mark]: the report is the front by these."""


Method = Callable[[Replay, int, int], Asked]
"""From the replay, a training seed and a search seed."""


def as_seen(replay: Replay, seed: int) -> Callable[[list[str]], FloatArray]:
    return lambda trained: replay.seen[seed].loc[trained].to_numpy()


def rival(order: Callable[[Replay, int, int], Iterator[str]]) -> Method:
    return lambda replay, seed, own: Asked(order(replay, seed, own), as_seen(replay, seed))


def settled(replay: Replay, search_seed: int, **settings: Any) -> Scenario:
    """Return the scenario with a search seed and settings of the search."""
    return replace(
        replay.scenario,
        seeds=replace(replay.scenario.seeds, search=search_seed),
        search=replace(replay.scenario.search, **settings),
    )


def ours(
    kind: Callable[[Planner], Any], *, modelled: bool, batch: int = 1, **settings: Any
) -> Method:
    """Our searches; ``modelled``: they report by their model, not by what was measured."""

    def start(replay: Replay, seed: int, search_seed: int) -> Asked:
        scenario = settled(replay, search_seed, **settings)
        searcher = kind(Planner(scenario, replay.planner.costs.workload))

        def order() -> Iterator[str]:
            while asked := searcher.ask(batch):
                for schedule in asked:
                    searcher.tell(schedule, replay.evaluation(str(schedule), seed))
                    yield str(schedule)

        def model(trained: list[str]) -> FloatArray:
            return np.array([searcher.accuracy(replay.evaluation(text, seed)) for text in trained])

        return Asked(order(), model if modelled else as_seen(replay, seed))

    return start


def by_chance(replay: Replay, seed: int, search_seed: int) -> Iterator[str]:
    yield from np.random.default_rng(search_seed).permutation(list(replay.schedules)).tolist()


# -- rivals ---------------------------------------------------------------------------------------


class Coded:
    """A schedule as a user would code it: a rank and a state a layer, seven integers."""

    def __init__(self, replay: Replay) -> None:
        self._replay, self._planner = replay, replay.planner
        space = replay.scenario.decisions
        self.ranks, self.layers = space.ranks, replay.planner.codec.layers
        self.highest = np.array([len(space.ranks) - 1] + [2] * self.layers)
        self._texts: dict[tuple[int, ...], str] = {}

    def text(self, code: Any) -> str:
        """Return the schedule of a code, made to fit like ours."""
        key = tuple(int(value) for value in code)
        if key not in self._texts:
            letters = "".join("fpa"[value] for value in key[1:])
            text = f"{self._replay.scenario.training.rounds}x{self.ranks[key[0]]}:{letters}"
            schedule = Schedule.parse(text, devices=len(self._replay.scenario.devices))
            self._texts[key] = str(self._planner.repaired(schedule.canonical()))
        return self._texts[key]

    def objectives(self, text: str, seed: int) -> tuple[float, float, float]:
        """Return log10 energy and delay at the knee, and the error after the last round."""
        error = 1.0 - float(self._replay.seen[seed].loc[text].iloc[-1])
        return (*self._replay.knees[text], error)


def by_pymoo(replay: Replay, seed: int, search_seed: int) -> Iterator[str]:
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import Problem
    from pymoo.core.termination import NoTermination
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.operators.sampling.rnd import IntegerRandomSampling
    from pymoo.problems.static import StaticProblem

    coded = Coded(replay)
    problem = Problem(n_var=len(coded.highest), n_obj=3, xl=0, xu=coded.highest, vtype=int)
    algorithm = NSGA2(
        pop_size=20,
        sampling=IntegerRandomSampling(),
        crossover=SBX(prob=0.9, eta=3, vtype=float, repair=RoundingRepair()),
        mutation=PM(eta=3, vtype=float, repair=RoundingRepair()),
        eliminate_duplicates=True,
        seed=search_seed,
    )
    algorithm.setup(problem, termination=NoTermination())
    for _ in range(200):
        asked = algorithm.ask()
        texts = [coded.text(code) for code in asked.get("X")]
        yield from texts
        answers = np.array([coded.objectives(text, seed) for text in texts])
        algorithm.evaluator.eval(StaticProblem(problem, F=answers), asked)
        algorithm.tell(infills=asked)


def by_optuna(name: str) -> Callable[[Replay, int, int], Iterator[str]]:
    def asks(replay: Replay, seed: int, search_seed: int) -> Iterator[str]:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", module="optuna")
        coded = Coded(replay)
        samplers = {
            "nsga2": lambda: optuna.samplers.NSGAIISampler(population_size=20, seed=search_seed),
            "tpe": lambda: optuna.samplers.TPESampler(multivariate=True, seed=search_seed),
            "gp": lambda: optuna.samplers.GPSampler(seed=search_seed),
        }
        study = optuna.create_study(directions=["minimize"] * 3, sampler=samplers[name]())
        for _ in range(2000):
            trial = study.ask()
            code = [trial.suggest_int("rank", 0, int(coded.highest[0]))]
            code += [trial.suggest_categorical(f"layer{n}", [0, 1, 2]) for n in range(coded.layers)]
            text = coded.text(code)
            yield text
            study.tell(trial, coded.objectives(text, seed))

    return asks


def by_botorch(replay: Replay, seed: int, search_seed: int) -> Iterator[str]:
    import torch
    from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import ModelListGP, SingleTaskGP
    from botorch.optim import optimize_acqf_discrete
    from gpytorch.mlls import SumMarginalLogLikelihood

    torch.manual_seed(search_seed)
    coded = Coded(replay)
    texts = list(replay.schedules)
    states = [text.split("x")[1].split(":") for text in texts]
    codes = np.array(
        [[coded.ranks.index(int(rank)), *("fpa".index(x) for x in row)] for rank, row in states]
    )
    rows = torch.from_numpy(codes / coded.highest).double()
    answers = torch.tensor([coded.objectives(text, seed) for text in texts]).double()
    asked = np.random.default_rng(search_seed).permutation(len(texts))[:16].tolist()
    yield from (texts[index] for index in asked)
    worst = -torch.tensor([*replay.planner_corner, replay.reference[1]]).double()
    while True:
        values = -answers[asked]
        shift, size = values.mean(0), values.std(0)
        scaled = (values - shift) / size
        model = ModelListGP(*[SingleTaskGP(rows[asked], scaled[:, [n]]) for n in range(3)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit_gpytorch_mll(SumMarginalLogLikelihood(model.likelihood, model))
            acquisition = qLogNoisyExpectedHypervolumeImprovement(
                model, ref_point=((worst - shift) / size).tolist(), X_baseline=rows[asked],
                prune_baseline=True,
            )  # fmt: skip
            left = [index for index in range(len(texts)) if index not in set(asked)]
            chosen, _ = optimize_acqf_discrete(acquisition, 1, rows[left], max_batch_size=512)
            best = int((rows[left] == chosen).all(1).nonzero()[0])
        asked.append(left[best])
        yield texts[left[best]]


METHODS: dict[str, Method] = {
    "ours": ours(Surrogate, modelled=True),
    "ours, as measured": ours(Surrogate, modelled=False),
    "ours, batches of 4": ours(Surrogate, modelled=True, batch=4),
    "ours, NSGA-II on curves": ours(Evolution, modelled=False),
    "pymoo NSGA-II": rival(by_pymoo),
    "random": rival(by_chance),
    "Optuna NSGA-II": rival(by_optuna("nsga2")),
    "Optuna TPE": rival(by_optuna("tpe")),
    "Optuna GP": rival(by_optuna("gp")),
    "BoTorch qLogNEHVI": rival(by_botorch),
}


def course(replay: Replay, method: Method, seed: int, search_seed: int, budget: int) -> FloatArray:
    """Return the true hypervolume ratios, reported and trained, after 1, 2, … trainings, [2, budget]."""
    trained: list[str] = []
    ratios: list[tuple[float, float]] = []
    asked = method(replay, seed, search_seed)
    for text in asked.order:
        if text in trained:
            continue
        trained.append(text)
        chosen = (asked.estimate(trained), replay.truth.loc[trained].to_numpy())
        reported, hindsight = (replay.worth(trained, estimate) / replay.best for estimate in chosen)
        ratios.append((reported, hindsight))
        if len(trained) == budget:
            break
    return np.array(ratios + [ratios[-1]] * (budget - len(ratios))).T


# -- report ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    budget: int = 60
    runs: int = 10
    reference: int = 200
    """Trainings of pymoo's NSGA-II that ours is asked to match in twenty."""
    dear: int = 40
    """Trainings of BoTorch, whose choice of one takes seconds."""
    stopped: int = 24
    """Trainings of searches with and without early stops."""
    certified: tuple[int, ...] = (12, 20, 40)
    """Trainings after which fronts are certified."""


QUICK = Size(budget=12, runs=2, reference=12, dear=18, stopped=10, certified=(10,))
CONFIDENCES = (1.0, 2.0, 3.0)


def first_at(values: FloatArray, level: float) -> int | None:
    """Return after how many trainings a course stays at a level or above."""
    below = np.flatnonzero(values < level)
    first = int(below[-1]) + 2 if len(below) else 1
    return first if first <= len(values) else None


def measure(replay: Replay, size: Size, only: list[str]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, method in METHODS.items():
        if only and name not in only:
            continue
        budget = {"pymoo NSGA-II": size.reference, "BoTorch qLogNEHVI": size.dear}.get(
            name, size.budget
        )
        start = time.perf_counter()
        courses = np.array(
            [
                course(replay, method, replay.seeds[run % len(replay.seeds)], run, budget)
                for run in range(size.runs)
            ]
        )
        seconds = (time.perf_counter() - start) / (size.runs * budget)
        row: dict[str, Any] = {"seconds_a_training": seconds}
        shown = [f"{name:<24}"]
        for measured, own in zip(("reported", "trained"), courses.transpose(1, 0, 2), strict=True):
            low, median, high = np.quantile(own, [0.25, 0.5, 0.75], axis=0)
            row[measured] = {
                "median": median.round(5).tolist(),
                "lower_quartile": low.round(5).tolist(),
                "upper_quartile": high.round(5).tolist(),
            }
            cells = [
                f"{n}: {median[n - 1]:.3f} ({low[n - 1]:.3f}-{high[n - 1]:.3f})"
                for n in (10, 20, 40, 60, 200)
                if n <= budget
            ]
            shown.append(f"{measured} {' '.join(cells)}")
        rows[name] = row
        print("  " + "\n    ".join([*shown, f"{1e3 * seconds:.0f} ms a training"]), flush=True)
    return rows


def measure_stops(replay: Replay, size: Size) -> dict[str, Any]:
    """Return what ``search.stop_early`` saves and loses, run by run."""
    runs = []
    for run in range(size.runs):
        evaluator = Replayed(replay, replay.seeds[run % len(replay.seeds)])
        row: dict[str, Any] = {}
        for name, stop in (("whole", False), ("stopped", True)):
            scenario = settled(replay, run, stop_early=stop)
            front = pareto_front(scenario, evaluator, trainings=size.stopped)
            row[name] = worth_of(replay, front)
        runs.append(row)
    medians = {
        name: {key: float(np.median([row[name][key] for row in runs])) for key in own}
        for name, own in runs[0].items()
    }
    stopped, whole = medians["stopped"], medians["whole"]
    own = [row["stopped"] for row in runs]
    lost, points = (sum(row[key] for row in own) for key in ("points_lost", "points"))
    print(
        f"early stops at {CONFIDENCE:g} standard deviations, {size.runs} runs of "
        f"{size.stopped} trainings' rounds, medians"
    )
    print(
        f"  its own schedules trained to the end: {stopped['rounds_spared']:.1%} of their rounds "
        f"spared, {stopped['lost']:.4f} of their true hypervolume lost (at most "
        f"{max(row['lost'] for row in own):.4f}), {lost} of {points} cuts on their true fronts (all runs)"
    )
    print(
        f"  same rounds without stops: {stopped['schedules']:.0f} schedules for "
        f"{whole['schedules']:.0f}, reported {stopped['reported']:.4f} for {whole['reported']:.4f}, "
        f"trained {stopped['trained']:.4f} for {whole['trained']:.4f}"
    )
    return {"confidence": CONFIDENCE, "trainings": size.stopped, "medians": medians, "runs": runs}


def worth_of(replay: Replay, front: Front) -> dict[str, Any]:
    """Return what a front and its trainings are truly worth, and what training to the end would add."""
    marks = list(replay.marks)
    picked = [replay.whole(one.schedule) for one in front.evaluations]
    whole = [(text, n) for text in picked for n in range(len(marks))]
    trained = [
        (text, n)
        for text, one in zip(picked, front.evaluations, strict=True)
        for n, mark in enumerate(marks)
        if mark <= len(one.rounds)
    ]
    cuts = front.points[["schedule", "rounds"]].drop_duplicates().itertuples(index=False)
    devices = len(replay.scenario.devices)
    reported = [
        (replay.whole(Schedule.parse(text, devices=devices)), marks.index(rounds))
        for text, rounds in cuts
    ]
    had = replay.attained(trained).hypervolume
    points = set(replay.chosen(picked, replay.truth.loc[picked].to_numpy()))
    return {
        "schedules": len(picked),
        "rounds": front.rounds_trained,
        "rounds_spared": 1.0 - front.rounds_trained / front.rounds_asked,
        "reported": replay.attained(reported).hypervolume / replay.best,
        "trained": had / replay.best,
        "lost": 1.0 - had / replay.attained(whole).hypervolume,
        "points": len(points),
        "points_lost": len(points - set(trained)),
    }


def measure_certificates(replay: Replay, size: Size) -> list[dict[str, Any]]:
    """Return how often the true hypervolume ratio is at least what the certificate claims."""
    everything = [(text, n) for text in replay.schedules for n in range(len(replay.marks))]
    runs: dict[tuple[int, float], list[tuple[float, float, float]]] = {}
    for run in range(size.runs):
        seed = replay.seeds[run % len(replay.seeds)]
        search = Surrogate(Planner(settled(replay, run), replay.planner.costs.workload))
        trained: list[str] = []
        for count in size.certified:
            while len(trained) < count:
                (schedule,) = search.ask()
                search.tell(schedule, replay.evaluation(str(schedule), seed))
                trained.append(str(schedule))
            assert search.reference is not None
            worst = 1.0 - search.reference.accuracy
            best = replay.attained(everything, worst).hypervolume
            cuts = [(text, n) for text in trained for n in range(len(replay.marks))]
            hindsight = replay.attained(cuts, worst).hypervolume / best
            estimate = np.array([search.accuracy(replay.evaluation(one, seed)) for one in trained])
            reported = replay.attained(replay.chosen(trained, estimate), worst).hypervolume / best
            for confidence in CONFIDENCES:
                claimed = search.certificate(confidence).hypervolume_ratio
                runs.setdefault((count, confidence), []).append((claimed, reported, hindsight))
    print(
        "certificates: ratio claimed, true ratio reported and trained (medians), share of runs they hold in"
    )
    rows = []
    for (count, confidence), own in runs.items():
        claimed, reported, hindsight = np.array(own).T
        rows.append(
            {
                "trainings": count,
                "confidence": confidence,
                "claimed": claimed.round(5).tolist(),
                "reported": reported.round(5).tolist(),
                "trained": hindsight.round(5).tolist(),
                "holds_reported": float(np.mean(reported >= claimed)),
                "holds_trained": float(np.mean(hindsight >= claimed)),
            }
        )
        print(
            f"  {count} trainings, confidence {confidence:g}: claimed {np.median(claimed):.3f}, "
            f"reported {np.median(reported):.3f} (holds in {rows[-1]['holds_reported']:.0%}), "
            f"trained {np.median(hindsight):.3f} ({rows[-1]['holds_trained']:.0%})"
        )
    return rows


def figure(rows: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with as_file(files("pwff_opt.report") / "pwff.mplstyle") as style, plt.style.context(style):
        drawing, axes = plt.subplots(figsize=(6.0, 3.6), layout="constrained")
        for name, row in rows.items():
            median = np.array(row["trained"]["median"])[:SHOWN]
            axes.plot(
                np.arange(1, len(median) + 1),
                1 - median,
                label=name,
                lw=2.2 if name == "ours" else 1.1,
            )
        axes.set(
            xlabel="trainings",
            ylabel="1 - hypervolume ratio of what is trained",
            yscale="log",
            xlim=(5, None),
        )
        axes.legend(fontsize=7)
        drawing.savefig(path, dpi=200)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="*", default=[], choices=list(METHODS))
    options.add_argument("--figure", type=Path, default=Path("runs/search.png"))
    options.add_argument("--table", type=Path, default=HERE / "results" / "replay.parquet")
    chosen = options.parse_args()
    size = QUICK if chosen.quick else Size()
    replay = Replay(read_scenario(HERE / "replay.toml"), pd.read_parquet(chosen.table))
    everything = list(replay.schedules)
    blurred = [
        replay.worth(everything, as_seen(replay, seed)(everything)) / replay.best
        for seed in replay.seeds
    ]
    print(
        f"{len(replay.schedules)} schedules, {len(replay.seeds)} training seeds, {size.runs} runs a search"
    )
    print(
        f"the front chosen by all validation accuracies of one seed is worth {np.mean(blurred):.4f}"
    )
    print("true hypervolume ratio after so many trainings, median (quartiles)")
    rows = measure(replay, size, chosen.only)
    result: dict[str, Any] = {"all_trained_once": blurred, "searches": rows}
    if "ours" in rows:
        result["stop_early"] = measure_stops(replay, size)
        result["certificate"] = measure_certificates(replay, size)
    if {"ours", "pymoo NSGA-II"} <= rows.keys():
        for measured in ("reported", "trained"):
            theirs = rows["pymoo NSGA-II"][measured]["median"]
            after = first_at(np.array(rows["ours"][measured]["median"]), theirs[-1])
            result[f"matched_after_{measured}"] = after
            print(
                f"{measured}: ours reaches the {len(theirs)}-training value of pymoo's NSGA-II "
                f"({theirs[-1]:.4f}) after {after} trainings (target 20)"
            )
    write({"machine": machine(), "versions": versions(PACKAGES), **result}, chosen, "search")
    figure(rows, chosen.figure)


if __name__ == "__main__":
    main()
