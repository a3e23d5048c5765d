"""Run folders: what a run leaves behind, written so that a kill at any moment loses nothing."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd

from pwff_opt.costs import Workload
from pwff_opt.errors import RunError
from pwff_opt.evaluation import Evaluation, Evaluator, TrainedRound
from pwff_opt.runs.identity import learning_key
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.files import from_resolved, resolved
from pwff_opt.scenario.schedule import Schedule

PACKAGES = (
    "pwff-opt",
    "torch",
    "transformers",
    "peft",
    "numpy",
    "scipy",
    "pymoo",
    "moocore",
    "cvxpy",
)
# Of rounds.parquet; whatever else stands there are the stage's notes.
ROUND_COLUMNS = (
    "key",
    "round",
    "device",
    "loss",
    "accuracy_validation",
    "uplink_bit",
    "diverged",
)

BEGUN = {"scenario.toml", "resolved.json", "run.json"}
# What of the tables is read again, and as what; front.csv is made to be opened, and saved, elsewhere.
TABLES: Mapping[str, Mapping[str, type]] = {
    "front.csv": dict.fromkeys(
        (
            "energy_j",
            "delay_s",
            "accuracy",
            "accuracy_worst_device",
            "accuracy_chosen_by",
            "price_of_time_w",
        ),
        float,
    )
    | {"schedule": str, "knee": bool},
    "evaluations.parquet": {"key": str, "schedule": str, "rounds": int, "seed": int, "status": str},
    "rounds.parquet": {"key": str, "round": int, "device": int},
    "tests.parquet": {"key": str, "device": int, "accuracy_test": float},
}


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it: readers see all of it or the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        write(Path(name))
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2) + "\n"
    write_atomically(path, lambda target: target.write_text(text, encoding="utf-8"))


class RunFolder:
    """A folder with one scenario and all that was computed for it.

    ``scenario.toml`` as given, ``resolved.json`` with every default filled in, ``run.json``
    (versions, revision, hardware, start, end, status), ``evaluations.parquet`` (a row a training),
    ``rounds.parquet`` (a row a training, round and device), ``tests.parquet`` (a row a tested schedule
    and device), ``checkpoints/``, ``front.csv``, ``figures/``.

    Raises
    ------
    RunError
        If the folder holds another scenario's run, or something that is no run at all.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def front(self) -> Path:
        return self.path / "front.csv"

    def open(self, scenario: Scenario, text: str) -> None:
        """Begin a run here, or take up the one that is here.

        Its scenario must be the same, unless nothing was trained for it: then it is replaced.
        """
        resolved_path = self.path / "resolved.json"
        if resolved_path.is_file():
            difference = _differences(self.scenario(), scenario)
            if difference and self._has_results():
                raise RunError(
                    f"{self.path} holds the run of another scenario (it differs in "
                    f"{', '.join(difference)}); choose another --out, or delete the folder"
                )
            if difference:
                (self.path / "run.json").unlink(missing_ok=True)
        self._check_kind()
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.rglob(".*"):  # of a write that a kill cut short
            if leftover.is_file() and leftover.name != ".lock":
                leftover.unlink()
        write_atomically(
            self.path / "scenario.toml", lambda target: target.write_text(text, "utf-8")
        )
        write_json(resolved_path, resolved(scenario))

    def scenario(self) -> Scenario:
        """Return the scenario of the run."""
        path = self.path / "resolved.json"
        self._check_access()
        if not path.is_file():
            raise RunError(f"{self.path} is not a run folder: it has no resolved.json")
        return from_resolved(_json_object(path))

    def info(self) -> dict[str, Any]:
        path = self.path / "run.json"
        if not path.is_file():
            return {}
        return _json_object(path)

    def note(self, **values: Any) -> None:
        """Add to ``run.json``."""
        write_json(self.path / "run.json", self.info() | values)

    def begin(self, **values: Any) -> None:
        """Note versions, hardware and time at the start of a session."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        info = self.info()
        self.note(
            started=info.get("started", now),
            sessions=[*info.get("sessions", []), now],
            status="running",
            versions=_versions(),
            revision=_revision(),
            hardware=_hardware(),
            **values,
        )

    def finish(self, status: str) -> None:
        self.note(status=status, ended=datetime.now(UTC).isoformat(timespec="seconds"))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process alone; the system lets go of it when the process ends.

        Raises
        ------
        RunError
            If another process holds it, or the path is neither new, nor empty, nor a run folder.
        """
        self._check_kind()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("w")
        except OSError as error:
            raise RunError(f"{self.path} cannot be written: {error}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunError(f"{self.path} is in use by another process") from error
            yield

    def table(self, name: str) -> pd.DataFrame | None:
        path = self.path / name
        if not path.is_file():
            return None
        try:
            table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
            needed = TABLES.get(name, {})
            missing = [column for column in needed if column not in table]
            if missing:
                raise ValueError(f"it lacks the columns {', '.join(missing)}")
            table = table.astype(dict(needed))
            if name == "front.csv" and table["knee"].sum() != 1:
                raise ValueError(f"one row must be the knee, got {table['knee'].sum()}")
        except (ValueError, OSError) as error:
            raise RunError(
                f"{path} is damaged: {error}; delete it and give the same commands (front, train) again: it "
                "is made anew, and what checkpoints hold is not trained again"
            ) from error
        return table

    def write_table(self, name: str, table: pd.DataFrame) -> None:
        if name.endswith(".csv"):
            write_atomically(self.path / name, lambda target: table.to_csv(target, index=False))
        else:
            write_atomically(self.path / name, lambda target: table.to_parquet(target, index=False))

    def _has_results(self) -> bool:
        """Return whether there is more than what is written before anything is trained."""
        return any(
            path.is_file() and not path.name.startswith(".") and path.name not in BEGUN
            for path in self.path.rglob("*")
        )

    def _check_access(self) -> None:
        """Refuse a path that may not be looked into."""
        try:
            self.path.exists()
            (self.path / "resolved.json").is_file()
            if self.path.is_dir():
                next(self.path.iterdir(), None)
        except OSError as error:
            raise RunError(f"{self.path} cannot be read: {error}") from error

    def _check_kind(self) -> None:
        """Refuse a path that holds something else than a run."""
        self._check_access()
        if not self.path.exists() or (self.path / "resolved.json").is_file():
            return
        ours = {"scenario.toml"}  # written before resolved.json: a kill may leave it alone
        if not self.path.is_dir() or any(
            not entry.name.startswith(".") and entry.name not in ours
            for entry in self.path.iterdir()
        ):
            raise RunError(
                f"{self.path} exists and is not a run folder; choose another --out, or delete it"
            )


class Past:
    """The evaluator of a run that is over: it knows what the data contribute to costs, and trains nothing."""

    def __init__(self, folder: RunFolder) -> None:
        given = folder.info().get("workload")
        if given is None:
            raise RunError(f"{folder.path} has no workload in its run.json; run: pwff-opt front")
        self.workload = Workload.from_json(given)
        self._path = folder.path

    def train(self, schedule: Schedule) -> Evaluation:
        raise RunError(f"{self._path} holds no training of {schedule}")

    def test(self, schedule: Schedule) -> tuple[float, ...]:
        raise RunError(f"{self._path} holds no test of {schedule}")

    def with_seed(self, seed: int) -> Past:
        return self


class Journal:
    """An evaluator that remembers in a run folder: what is in the journal is never trained again."""

    def __init__(self, evaluator: Evaluator, folder: RunFolder) -> None:
        self._evaluator, self._folder = evaluator, folder
        # Several threads may train at once, with other seeds too: the tables are written by one.
        self._lock = threading.Lock()
        self._scenario = folder.scenario()
        self.trained: set[str] = set()
        """Keys of what was trained now, with any seed."""
        evaluations = folder.table("evaluations.parquet")
        rounds = folder.table("rounds.parquet")
        # An evaluation whose rounds are lost is trained again, from its checkpoints; and a kill between
        # the two files leaves rounds without their evaluation, which do not count. A failure may have
        # passed (memory was short, say): it stays on record, and is tried again in a new session.
        devices = len(self._scenario.devices)
        counts = Counter(row["key"] for row in _records(rounds))
        self._evaluations = [
            row
            for row in _records(evaluations)
            if row["status"] == "failed" or counts[row["key"]] == row["rounds"] * devices
        ]
        self._known = {row["key"]: row for row in self._evaluations if row["status"] == "done"}
        self._rounds = [row for row in _records(rounds) if row["key"] in self._known]
        # Those of data or a trainer that have changed since are not to be joined with a front.
        self._test_rows = [
            row
            for row in _records(folder.table("tests.parquet"))
            if "schedule" in row and row["key"] == self._key_of(row)
        ]
        self._tests: dict[str, list[float]] = {}
        for row in self._test_rows:  # device after device
            self._tests.setdefault(row["key"], []).append(row["accuracy_test"])

    @property
    def workload(self) -> Workload:
        return self._evaluator.workload

    def train(self, schedule: Schedule) -> Evaluation:
        key = learning_key(self._scenario, schedule)
        if key in self._known:
            return self._recall(key, schedule)
        evaluation = self._evaluator.train(schedule)
        with self._lock:
            self.trained.add(key)
            self._append(evaluation)
        return evaluation

    def with_seed(self, seed: int) -> Journal:
        """Return a journal of another training seed, in the same tables."""
        other = copy(self)
        seeds = replace(self._scenario.seeds, training=seed)
        other._scenario = replace(self._scenario, seeds=seeds)
        other._evaluator = self._evaluator.with_seed(seed)
        return other

    def knows(self, schedule: Schedule) -> bool:
        """Return whether a schedule is in the journal."""
        return learning_key(self._scenario, schedule) in self._known

    def recorded(self) -> list[Evaluation]:
        """Return all that a search has trained with this journal's seed, in order."""
        seed, single = self._scenario.seeds.training, self.single
        return [
            self._recall(key, self._schedule(row))
            for key, row in self._known.items()
            if row["seed"] == seed and row["schedule"] not in single
        ]

    @property
    def single(self) -> set[str]:
        """Schedules that no search has asked for, but ``pwff-opt train``."""
        return set(self._folder.info().get("single", []))

    def __len__(self) -> int:
        return len(self._known)

    @property
    def counts(self) -> tuple[int, int]:
        """How many schedules were trained with this journal's seed, and how many with others.

        What was trained on from a cut of a schedule is one with it.
        """
        texts = {(row["seed"], row["schedule"]) for row in self._known.values()}
        cuts = {(row["seed"], cut) for row in self._known.values() for cut in self._cuts(row)[:-1]}
        own = sum(int(seed) == self._scenario.seeds.training for seed, _ in texts - cuts)
        return own, len(texts - cuts) - own

    @property
    def searched(self) -> int:
        """What ``trainings`` a search needs to go through all that one has trained here.

        It counts rounds as :func:`pwff_opt.front.front.pareto_front` does: those that schedules share once.
        """
        spent: set[str] = set()
        before = 0
        single = self.single
        for row in self._own():
            if row["schedule"] in single:
                continue
            cuts = self._cuts(row)
            if not spent.issuperset(cuts):
                before = len(spent)
                spent.update(cuts)
        return before // self._scenario.training.rounds + 1 if spent else 0

    @property
    def outdated(self) -> int:
        """How many of this journal's trainings are of other data, model files or trainer than now."""
        seed = self._scenario.seeds.training
        tried = [row for row in self._evaluations if row["seed"] == seed]
        return len(tried) - len(self._own())

    def require(self, schedule: Schedule) -> None:
        """Refuse a schedule that is neither trained nor the beginning of one that is.

        Raises
        ------
        RunError
            It was not trained, or on files that have changed since.
        """
        seed = self._scenario.seeds.training
        if not any(
            row["status"] == "done" and str(schedule) in self._cuts(row) for row in self._own()
        ):
            before = any(
                row["seed"] == seed and str(schedule) in self._cuts(row)
                for row in self._known.values()
            )
            raise RunError(
                f"{self._folder.path} must hold a training of {schedule}: "
                + (
                    "it has one, but the files of its data or model, or the trainer, have changed since"
                    if before
                    else f"it has none; it has {self._told() or 'no training at all'}"
                )
            )

    def _told(self, most: int = 6) -> str:
        texts = list(dict.fromkeys(row["schedule"] for row in self._own()))
        return ", ".join(map(repr, texts[:most])) + (", …" if len(texts) > most else "")

    def _own(self) -> list[dict[str, Any]]:
        """Return what was tried with this journal's seed, as it would be tried now."""
        return [
            row
            for row in self._evaluations
            if row["seed"] == self._scenario.seeds.training and row["key"] == self._key_of(row)
        ]

    def _key_of(self, row: Mapping[str, Any]) -> str:
        """Return the key that a row's schedule and seed have now."""
        seeds = replace(self._scenario.seeds, training=int(row["seed"]))
        return learning_key(replace(self._scenario, seeds=seeds), self._schedule(row))

    def _cuts(self, row: Mapping[str, Any]) -> list[str]:
        """Return what a training has trained: its schedule after every round."""
        whole = self._schedule(row)
        return [str(whole.prefix(number + 1)) for number in range(len(whole))]

    def _schedule(self, row: Mapping[str, Any]) -> Schedule:
        return Schedule.parse(row["schedule"], devices=len(self._scenario.devices))

    def test(self, schedule: Schedule) -> tuple[float, ...]:
        key = learning_key(self._scenario, schedule)
        if key not in self._tests:
            found = self._evaluator.test(schedule)
            with self._lock:
                self._tests[key] = list(found)
                seed = self._scenario.seeds.training
                self._test_rows += [
                    {
                        "key": key,
                        "schedule": str(schedule),
                        "seed": seed,
                        "device": device,
                        "accuracy_test": accuracy,
                    }
                    for device, accuracy in enumerate(found)
                ]
                self._folder.write_table("tests.parquet", pd.DataFrame(self._test_rows))
        return tuple(self._tests[key])

    def _append(self, evaluation: Evaluation) -> None:
        last = evaluation.rounds[-1].accuracy if evaluation.rounds else ()
        row = {
            "key": evaluation.key,
            "schedule": str(evaluation.schedule),
            "rounds": len(evaluation.rounds),
            "seed": self._scenario.seeds.training,
            "accuracy_validation": list(last),
            "wall_s": evaluation.wall_s,
            "status": evaluation.status,
            "reason": evaluation.reason,
        }
        self._rounds += [
            {
                "key": evaluation.key,
                "round": number,
                "device": device,
                "loss": entry.loss[device],
                "accuracy_validation": entry.accuracy[device] if entry.accuracy else math.nan,
                "uplink_bit": entry.uplink_bit[device],
                "diverged": device in entry.diverged,
                **{name: values[device] for name, values in entry.notes.items()},
            }
            for number, entry in enumerate(evaluation.rounds)
            for device in range(len(entry.loss))
        ]
        self._evaluations.append(row)
        if evaluation.status == "done":  # a failure is on record, and may be tried again
            self._known[evaluation.key] = row
        # Rounds first: an evaluation is in the journal once its row is, and then it is complete.
        self._folder.write_table("rounds.parquet", pd.DataFrame(self._rounds))
        self._folder.write_table("evaluations.parquet", pd.DataFrame(self._evaluations))

    def _recall(self, key: str, schedule: Schedule) -> Evaluation:
        row = self._known[key]
        own: dict[int, list[dict[str, Any]]] = {}
        for entry in self._rounds:
            if entry["key"] == key:
                own.setdefault(int(entry["round"]), []).append(entry)
        return Evaluation(
            key=key,
            schedule=schedule,
            rounds=tuple(
                TrainedRound(
                    loss=tuple(float(entry["loss"]) for entry in own[number]),
                    accuracy=tuple(
                        float(entry["accuracy_validation"])
                        for entry in own[number]
                        if not math.isnan(entry["accuracy_validation"])
                    ),
                    uplink_bit=tuple(int(entry["uplink_bit"]) for entry in own[number]),
                    diverged=tuple(
                        int(entry["device"]) for entry in own[number] if entry["diverged"]
                    ),
                    notes={
                        name: tuple(float(entry[name]) for entry in own[number])
                        for name in own[number][0]
                        if name not in ROUND_COLUMNS
                        and not all(math.isnan(entry[name]) for entry in own[number])
                    },
                )
                for number in range(int(row["rounds"]))
            ),
            wall_s=float(row["wall_s"]),
            status=row["status"],
            reason=row["reason"],
        )


def _json_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise RunError(f"{path} is damaged: it must hold a JSON object")
    return values


def _records(table: pd.DataFrame | None) -> list[dict[str, Any]]:
    rows = [] if table is None else table.to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in rows]


def _differences(old: Scenario, new: Scenario) -> list[str]:
    """Return the keys in which two scenarios differ."""

    def flat(values: Any, path: str) -> dict[str, Any]:
        if isinstance(values, dict):
            items = [(f"{path}.{key}" if path else key, value) for key, value in values.items()]
        elif isinstance(values, list):
            items = [(f"{path}[{number}]", value) for number, value in enumerate(values)]
        else:
            return {path: values}
        return {key: leaf for name, value in items for key, leaf in flat(value, name).items()}

    a, b = flat(resolved(old), ""), flat(resolved(new), "")
    differing = [key for key in {**a, **b} if a.get(key) != b.get(key) and key != "folder"]
    shown = [f"{key}: {a.get(key)!r} there, {b.get(key)!r} now" for key in differing[:3]]
    return shown + ([f"{len(differing) - 3} more"] if len(differing) > 3 else [])


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def _revision() -> str:
    """Return the git revision of this code, with a + if it was changed since; "" outside git."""
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _hardware() -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
    }
