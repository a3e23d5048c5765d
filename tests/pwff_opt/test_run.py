"""Run folders and the command line: atomic, resumable, and clear about what is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pwff_opt.cli import app as cli
from pwff_opt.cli.app import scenario_check
from pwff_opt.errors import DecisionError, RunError, ScenarioError
from pwff_opt.report.figures import _baseline
from pwff_opt.runs.records import Journal, Past, RunFolder, write_atomically
from pwff_opt.scenario.files import parse_scenario, read_scenario

COMMAND = [sys.executable, "-c", "from pwff_opt.cli import main; main()"]
TRAININGS = 5


def pwff_opt(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def scenario_file(small_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scenario") / "small.toml"
    path.write_text(small_text)
    return path


@pytest.fixture(scope="module")
def finished(scenario_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("run") / "whole"
    done = pwff_opt("front", scenario_file, "--out", out, "--trainings", TRAININGS, "--confirm", 0)
    return out, done.stdout


def test_a_run_leaves_everything_behind(finished: tuple[Path, str], scenario_file: Path) -> None:
    out, printed = finished
    assert (out / "scenario.toml").read_text() == scenario_file.read_text()
    info = json.loads((out / "run.json").read_text())
    assert info["status"] == "done"
    assert info["versions"]["torch"] == "2.13.0+cpu" or info["versions"]["torch"].startswith("2.13")
    assert info["computed_on"] == ["cpu"]  # in a process of its own, whatever --device says
    assert info["started"] <= info["ended"]
    front = pd.read_csv(out / "front.csv")
    wanted = {"energy_j", "delay_s", "accuracy", "accuracy_worst_device", "price_of_time_w"}
    assert wanted <= set(front)
    evaluations = pd.read_parquet(out / "evaluations.parquet")
    assert len(evaluations) == TRAININGS
    assert set(front["evaluation"]) <= set(evaluations["key"])
    assert (evaluations["status"] == "done").all()
    rounds = pd.read_parquet(out / "rounds.parquet")
    assert len(rounds) == TRAININGS * 3 * 3
    assert len(list((out / "checkpoints").glob("*.safetensors"))) == TRAININGS * 3
    for name in ("front.pdf", "front.png"):
        assert (out / "figures" / name).stat().st_size > 10_000
        assert name in printed
    assert "knee" in printed
    own = info["baseline_per_device"]
    assert (
        f"always the most common class scores {info['baseline']:.3f}, on every device its own"
        in printed
    )
    assert f"{own:.3f}" in printed
    assert str(out / "front.csv") in printed


def test_show_and_a_second_run_are_quick_and_change_nothing(
    finished: tuple[Path, str], scenario_file: Path
) -> None:
    out, printed = finished
    before = (out / "front.csv").read_bytes()
    assert pwff_opt("show", out).stdout in printed
    again = pwff_opt(
        "front", scenario_file, "--out", out, "--trainings", TRAININGS, "--confirm", 0
    ).stdout
    assert f"(0 now, {TRAININGS} from the journal)" in again
    assert (out / "front.csv").read_bytes() == before


@pytest.mark.parametrize("kills", [1, 3])
def test_killed_at_any_moment_it_ends_at_the_same_front(
    finished: tuple[Path, str], scenario_file: Path, tmp_path: Path, kills: int
) -> None:
    """Kill -9 when so many checkpoints are there, then let it end: same bytes, nothing trained twice."""
    out = tmp_path / "killed"
    command = [
        "front",
        str(scenario_file),
        "--out",
        str(out),
        "--trainings",
        str(TRAININGS),
        "--confirm",
        "0",
    ]
    for kill in range(kills):
        process = subprocess.Popen(
            [*COMMAND, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        goal = (kill + 1) * TRAININGS * 3 // (kills + 1)
        deadline = time.monotonic() + 120
        while len(list(out.glob("checkpoints/*.safetensors"))) < goal:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    (out / "checkpoints" / ".left.over.safetensors").write_bytes(b"")  # as a kill in a write does
    kept = {path: path.stat().st_mtime_ns for path in out.glob("checkpoints/[!.]*.safetensors")}
    pwff_opt(*command)
    assert (out / "front.csv").read_bytes() == (finished[0] / "front.csv").read_bytes()
    for path, time_ns in kept.items():  # a round that has a checkpoint is never trained again
        assert path.stat().st_mtime_ns == time_ns
    assert [path.name for path in out.rglob(".*")] == [".lock"]
    columns = ["key", "schedule", "rounds"]
    one = pd.read_parquet(out / "evaluations.parquet")[columns]
    other = pd.read_parquet(finished[0] / "evaluations.parquet")[columns]
    assert one.equals(other)
    assert not one["key"].duplicated().any()
    rounds = pd.read_parquet(out / "rounds.parquet")
    assert rounds.equals(pd.read_parquet(finished[0] / "rounds.parquet"))


def test_fewer_trainings_keep_all_there_are(
    finished: tuple[Path, str], scenario_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "kept"
    shutil.copytree(finished[0], out)
    printed = pwff_opt("front", scenario_file, "--out", out, "--trainings", 2, "--confirm", 0)
    assert f"going by --trainings {TRAININGS} --confirm 0" in printed.stdout
    assert (out / "front.csv").read_bytes() == (finished[0] / "front.csv").read_bytes()


def test_lost_tables_are_made_again_from_checkpoints(
    finished: tuple[Path, str], scenario_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "lost"
    shutil.copytree(finished[0], out)
    (out / "rounds.parquet").unlink()
    pwff_opt("front", scenario_file, "--out", out, "--trainings", TRAININGS, "--confirm", 0)
    assert (out / "front.csv").read_bytes() == (finished[0] / "front.csv").read_bytes()
    assert pd.read_parquet(out / "rounds.parquet").equals(
        pd.read_parquet(finished[0] / "rounds.parquet")
    )


def test_interrupting_is_noted(scenario_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "interrupted"
    process = subprocess.Popen(
        [*COMMAND, "front", str(scenario_file), "--out", str(out), "--trainings", "50"],
        stdout=subprocess.PIPE,
        text=True,
        # A shell's background job, as this test may be, has its children ignore interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(out.glob("checkpoints/*.safetensors")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from here" in printed
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"


def test_saved_model_command(finished: tuple[Path, str], tmp_path: Path) -> None:
    done = pwff_opt("save-model", finished[0], "--device", 1, "--out", tmp_path / "model")
    assert "load it with" in done.stdout
    for part in ("lora", "bottleneck"):
        assert (tmp_path / "model" / part / "adapter_config.json").is_file()


def test_one_schedule_is_trained_tested_and_saved(
    scenario_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, text = tmp_path / "one", "2x2:ffa 1x4:fpa"
    cli.train(str(scenario_file), text, out)
    printed = capsys.readouterr().out
    assert [f"train {done}/3 rounds" in printed for done in range(4)] == [True] * 4
    tests = pd.read_parquet(out / "tests.parquet")["accuracy_test"]
    told = ", ".join(f"{one:.3f}" for one in tests)
    assert f"test accuracy {tests.mean():.3f} (worst device {tests.min():.3f}): {told}" in printed
    rounds = pd.read_parquet(out / "rounds.parquet").groupby("round")
    for loss in rounds["loss"].mean():
        assert f"{loss:.4f}" in printed
    cli.train(str(scenario_file), text, out)
    again = capsys.readouterr().out
    assert "train 3/3 rounds" in again
    assert "train 2/3 rounds" not in again
    assert again.splitlines()[-5:] == printed.splitlines()[-5:]
    cli.save_model(out, 0, tmp_path / "model", text)
    assert (tmp_path / "model" / "lora" / "adapter_config.json").is_file()
    # No search has asked for it, so one in the same folder is as long as it is asked to be.
    cli.train(str(scenario_file), "3x4:ppp", out)
    capsys.readouterr()
    cli.front(str(scenario_file), out, 1, 0)
    searched = capsys.readouterr().out
    assert "going by" not in searched
    assert "1 schedules trained" in searched
    assert "2 schedules were trained singly: they are not among these, nor on the front" in searched
    folder = RunFolder(out)
    assert len(Journal(Past(folder), folder).recorded()) == 1
    # What a search asks for after all is one of its trainings.
    asked = Journal(Past(folder), folder).recorded()[0].schedule
    folder.note(single=[*folder.info()["single"], str(asked)])
    assert not Journal(Past(folder), folder).recorded()
    cli.front(str(scenario_file), out, 1, 0)
    assert len(Journal(Past(folder), folder).recorded()) == 1
    assert "2 schedules were trained singly" in capsys.readouterr().out
    status = folder.info()["status"]
    for bad, message in (
        ("1x3:ffa", r"rank must be one of decisions.ranks \(2, 4\) or 0, got 3 in '3:ffa'"),
        ("9x2:ffa", "at most training.rounds"),
    ):
        with pytest.raises(DecisionError, match=message):
            cli.train(str(scenario_file), bad, out)
    assert folder.info()["status"] == status == "done"
    with pytest.raises(RunError, match="it has '2x2:ffa 1x4:fpa', '3x4:ppp'"):
        cli.save_model(out, 0, tmp_path / "none", "3x2:ppa")


def test_a_single_training_goes_on_where_it_was_killed(
    scenario_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    cli.train(str(scenario_file), "1x2:fpa", killed)
    for name in ("evaluations", "rounds", "tests"):  # what a kill after one round would not leave
        (killed / f"{name}.parquet").unlink()
    capsys.readouterr()
    cli.train(str(scenario_file), "3x2:fpa", killed)
    printed = capsys.readouterr().out
    assert "train 1/3 rounds" in printed
    assert "train 0/3 rounds" not in printed
    cli.train(str(scenario_file), "3x2:fpa", whole)
    assert printed.splitlines()[-5:-2] == capsys.readouterr().out.splitlines()[-5:-2]
    assert pd.read_parquet(killed / "rounds.parquet").equals(
        pd.read_parquet(whole / "rounds.parquet")
    )


def refused(*arguments: object) -> str:
    done = pwff_opt(*arguments, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_mistakes_get_one_clear_error(
    finished: tuple[Path, str], scenario_file: Path, tmp_path: Path
) -> None:
    out = finished[0]
    other = tmp_path / "other.toml"
    other.write_text(scenario_file.read_text().replace("local_steps = 2", "local_steps = 3"))
    message = refused("front", other, "--out", out)
    assert "another scenario" in message
    assert "training.local_steps: 2 there, 3 now" in message
    assert "is not a run folder" in refused("show", tmp_path)
    (tmp_path / "file").write_text("x")
    assert "is not a run folder" in refused("front", scenario_file, "--out", tmp_path / "file")
    assert "cannot be written" in refused("front", scenario_file, "--out", tmp_path / "file" / "x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert "is not a run folder" in refused("front", scenario_file, "--out", tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]
    assert "built-in scenarios (alignment, hutto)" in refused(
        "scenario", "check", tmp_path / "none.toml"
    )
    other.write_text("[cell]\nbandwidth_hz = -1\n")
    assert "cell.bandwidth_hz must be greater than 0, got -1" in refused("scenario", "check", other)
    assert "device must be in 0..2, got 7" in refused(
        "save-model", out, "--device", 7, "--out", tmp_path / "m"
    )
    untrained = ("--schedule", "3x4,2,4:fap")
    assert "must hold a training of 3x4,2,4:fap: it has none" in refused(
        "save-model", out, "--device", 0, "--out", tmp_path / "m", *untrained
    )
    with pytest.raises(DecisionError, match=r"at most training.rounds \(3\) rounds, got 4"):
        cli.train(str(scenario_file), "4x2:fpa", tmp_path / "long")
    with pytest.raises(DecisionError, match="f frozen, p personal, a aggregated"):
        cli.train(str(scenario_file), "2x2:fpz", tmp_path / "letters")
    assert not (tmp_path / "letters").exists()
    assert "must read like" in refused(
        "save-model", out, "--device", 0, "--out", tmp_path / "m", "--schedule", "what"
    )


def test_scenario_init_writes_a_good_file_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    pwff_opt("scenario", "init", path)
    assert read_scenario(path).name == "mine"
    assert "is good: 4 devices" in pwff_opt("scenario", "check", path).stdout
    assert "exists already" in refused("scenario", "init", path)


@pytest.mark.parametrize(
    ("stem", "name"),
    [('a "b"', 'a "b"'), ("a\\b", "a\\b"), ("für dich", "für dich"), ("two\nlines", "hutto")],
)
def test_a_scenario_is_named_after_its_file(tmp_path: Path, stem: str, name: str) -> None:
    first, second = tmp_path / f"{stem}.toml", tmp_path / "copy.toml"
    cli.scenario_init(first)
    assert read_scenario(first).name == name
    cli.scenario_init(second, source=str(first))
    assert read_scenario(second).name == "copy"
    assert second.read_text().count("name =") == first.read_text().count("name =")


@pytest.mark.parametrize("command", [("scenario", "check"), ("show",)])
def test_what_the_system_refuses_is_one_message(command: tuple[str, ...]) -> None:
    assert "File name too long" in refused(*command, "x" * 300)


def test_two_processes_never_share_a_folder(tmp_path: Path, small_text: str) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    second = RunFolder(folder.path).lock()
    with folder.lock(), pytest.raises(RunError, match="in use by another process"):
        second.__enter__()
    folder.open(parse_scenario(small_text), small_text)
    with folder.lock():
        pass


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")

    def broken(target: Path) -> None:
        target.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, broken)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_may_not_be_looked_into_is_named(
    tmp_path: Path, scenario_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(_: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", forbidden)
    with pytest.raises(RunError, match=r"cannot be read: .*Permission denied"):
        cli.train(str(scenario_file), "1x2:ffa", tmp_path / "run")
    with pytest.raises(RunError, match=r"cannot be read: .*Permission denied"):
        cli.show(tmp_path)


def test_damaged_files_are_named(tmp_path: Path, small_text: str) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open(parse_scenario(small_text), small_text)
    (folder.path / "resolved.json").write_text("{")
    with pytest.raises(RunError, match=r"resolved\.json is damaged"):
        folder.scenario()
    (folder.path / "resolved.json").write_text("null")
    with pytest.raises(RunError, match="must hold a JSON object"):
        folder.scenario()
    (folder.path / "evaluations.parquet").write_bytes(b"x")
    with pytest.raises(RunError, match=r"evaluations\.parquet is damaged: .*; delete it"):
        folder.table("evaluations.parquet")


def test_a_front_is_confirmed_and_certified(
    finished: tuple[Path, str], scenario_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "confirmed"
    shutil.copytree(finished[0], out)
    command = ["front", scenario_file, "--out", out, "--trainings", TRAININGS, "--confirm", 2]
    printed = pwff_opt(*command).stdout
    assert "fresh seeds: mean test accuracy of trainings that chose nothing" in printed
    front, before = pd.read_csv(out / "front.csv"), pd.read_csv(finished[0] / "front.csv")
    assert front[before.columns].equals(before), "confirmation chooses nothing"
    assert front["accuracy_confirmed"].between(0, 1).all()
    assert front["probability_nondominated"].between(0, 1).all()
    tests = pd.read_parquet(out / "tests.parquet").query("seed == 1").groupby("schedule")
    means = front["schedule"].map(tests["accuracy_test"].mean())
    np.testing.assert_allclose(means, front["accuracy"], rtol=1e-12)
    seeds = pd.read_parquet(out / "evaluations.parquet").groupby("seed").size()
    schedules = front["schedule"].nunique()
    assert seeds.to_dict() == {1: TRAININGS, 2: schedules, 3: schedules}
    kept = (out / "front.csv").read_bytes()
    again = pwff_opt(*command[:-1], 0).stdout
    assert f"going by --trainings {TRAININGS} --confirm 2" in again
    fresh = f", and {seeds[2] + seeds[3]} trainings with fresh seeds"
    if front.groupby("rounds").ngroups == 1:  # else cuts of a training are one with it
        assert fresh in again
    assert f"{TRAININGS} schedules are in its journal, and" in again
    assert (out / "front.csv").read_bytes() == kept
    certified = pwff_opt("certify", out).stdout
    assert certified.startswith(f"{TRAININGS} schedules trained by the search in")
    assert "hypervolume ratio" in certified
    assert "has no workload" in refused("certify", _without_workload(out))


def _without_workload(run: Path) -> Path:
    info = json.loads((run / "run.json").read_text())
    del info["workload"]
    (run / "run.json").write_text(json.dumps(info))
    return run


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("front.csv", "energy_j,delay_s\n1,2\n", "lacks the columns accuracy"),
        ("front.csv", None, "could not convert"),
        ("front.csv", "", "No columns"),
    ],
)
def test_a_damaged_front_is_named(
    finished: tuple[Path, str], tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    out = tmp_path / "damaged"
    shutil.copytree(finished[0], out, ignore=shutil.ignore_patterns("checkpoints"))
    if content is None:
        front = pd.read_csv(out / name)
        content = front.assign(energy_j="much").to_csv(index=False)
    (out / name).write_text(content)
    said = refused("show", out)
    assert "front.csv is damaged" in said
    assert message in said
    no_knee = pd.read_csv(finished[0] / name).assign(knee=False)
    no_knee.to_csv(out / name, index=False)
    assert "one row must be the knee, got 0" in refused("show", out)


def test_a_run_without_trainings_takes_a_corrected_scenario(
    tmp_path: Path, small_text: str
) -> None:
    folder = RunFolder(tmp_path / "run")
    wrong, right = (small_text.replace("rounds = 3", f"rounds = {n}") for n in (2, 3))
    folder.open(parse_scenario(wrong), wrong)
    folder.begin(trainings=4)
    folder.open(parse_scenario(right), right)
    assert folder.scenario().training.rounds == 3
    assert (folder.path / "scenario.toml").read_text() == right
    assert folder.info() == {}
    folder.checkpoints.mkdir()
    (folder.checkpoints / "0.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match=r"training\.rounds: 3 there, 2 now"):
        folder.open(parse_scenario(wrong), wrong)


def test_the_harder_baseline_is_drawn() -> None:
    name = "always the most common class"
    info = {"baseline": 0.41, "baseline_per_device": 0.533, "baseline_name": name}
    assert _baseline(info) == (0.533, f"{name}, by device")
    assert _baseline(info | {"baseline": 0.6}) == (0.6, name)
    assert _baseline(info | {"baseline_per_device": None}) == (0.41, name)
    assert _baseline({}) is None


# -- a file of one's own ---------------------------------------------------------------------------

OWN = """[data]
source = "file"
path = "own.csv"
domain_column = "shop"
"""


@pytest.fixture
def own(small_text: str, tmp_path: Path) -> Path:
    """A scenario beside its CSV file, which has 240 different sentences of three shops in 300 rows."""
    rows = [
        {"text": f"{word} {thing} number {n}", "label": label, "shop": f"shop {n % 3}"}
        for n in range(40)
        for label, word in (("bad", "awful"), ("good", "lovely"))
        for thing in ("kettle", "lamp", "chair")
    ]
    pd.DataFrame(rows + rows[:60]).to_csv(tmp_path / "own.csv", index=False)
    path = tmp_path / "own.toml"
    path.write_text(small_text.replace("[data]\n", OWN))
    return path


def problems_of(path: Path) -> tuple[str, ...]:
    with pytest.raises(ScenarioError) as caught:
        scenario_check(str(path))
    return caught.value.problems


def test_check_looks_at_data_and_model_without_torch(own: Path) -> None:
    code = (
        "import sys, pwff_opt.cli\n"
        f"sys.argv = ['pwff-opt', 'scenario', 'check', {str(own)!r}]\n"
        "try: pwff_opt.cli.app.app()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (
        "240 different texts out of 300 rows of 'own.csv', of 3 domain(s) and 2 classes (bad, good)"
        in done.stdout
    )


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("path", "gone.csv", "gone.csv', which is not there"),
        ("path", "/etc/passwd", "data.path must name a .csv"),
        ("path", "x" * 300, "cannot be looked into: [Errno 36] File name too long"),
        ("text_column", "words", "lacks ['words']"),
        ("label_column", "mood", "lacks ['mood']"),
        ("domain_column", "town", "lacks ['town']"),
        ("label_column", "one", "at least 2 classes, got 1"),
        ("path", "latin.csv", "latin.csv' must be in UTF-8"),
        ("path", "commas.csv", "rows must have no more fields than the header, which has 3"),
        ("path", "comma.csv", "comma.csv' could not be read: Error tokenizing data"),
        ("path", "header.csv", "got 0 in column 'label'"),
        ("path", "empty.csv", "could not be read"),
        (
            "path",
            "few.csv",
            "sentences (data.train/validation/test_per_device), got 24; there are 60",
        ),
    ],
)
def test_check_names_what_no_training_could_begin_with(
    own: Path, column: str, value: str, said: str
) -> None:
    folder, table = own.parent, pd.read_csv(own.parent / "own.csv").assign(one="x")
    table.to_csv(folder / "own.csv", index=False)
    table[:60].to_csv(folder / "few.csv", index=False)
    (folder / "latin.csv").write_bytes("text,label,shop\ncaf\u00e9,good,a\n".encode("latin-1"))
    (folder / "empty.csv").write_text("")
    (folder / "header.csv").write_text("text,label,shop\n")
    (folder / "commas.csv").write_text("text,label,shop\nOh, good,good,a\nOh, bad,bad,a\n")
    (folder / "comma.csv").write_text("text,label,shop\nfine,good,a\nOh, bad,bad,a\n")
    lines = [line for line in own.read_text().splitlines() if not line.startswith(f"{column} =")]
    text = "\n".join(lines).replace("[data]", f'[data]\n{column} = "{value}"')
    scenario_check(str(own))
    own.write_text(text)
    (problem,) = problems_of(own)
    assert said in problem
    # and all at once
    own.write_text(
        text.replace("max_tokens = 24", "max_tokens = 999").replace("[0, 2, 4]", "[0, 500]")
    )
    problem, length, ranks = problems_of(own)
    assert said in problem
    assert length.startswith("model.max_tokens must not exceed")
    assert ranks.startswith("decisions.ranks must not exceed")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "power_max_w",
            "memory_byte = 1e5\npower_max_w",
            "devices[0].memory_byte must be at least",
        ),
        ("[model]\n", '[model]\nsource = "./nomodel"\n', "'./nomodel' could not be fetched"),
        ("[model]\n", f'[model]\nsource = "{"x" * 300}"\n', "cannot be looked for: [Errno 36]"),
    ],
)
def test_check_names_a_model_that_is_missing_or_too_large(
    own: Path, old: str, new: str, said: str
) -> None:
    text = own.read_text()
    if "source" in new:
        text = "\n".join(line for line in text.splitlines() if "/model" not in line) + "\n"
    assert old in text
    own.write_text(text.replace(old, new, 1))
    (problem,) = problems_of(own)
    assert said in problem


def test_a_run_on_data_that_change(own: Path) -> None:
    """What is told counts schedules, whatever stops early; and no model of other data is given out."""
    text = own.read_text().replace("[search]", "[search]\nstop_early = true")
    own.write_text(text + "[aggregation]\nclip_norm = 1.0\nnoise_multiplier = 1.0\n")
    out, model = own.parent / "run", own.parent / "m"
    command = ["front", own, "--out", out, "--trainings", 2, "--confirm", 1]
    printed = pwff_opt(*command).stdout
    evaluations = pd.read_parquet(out / "evaluations.parquet").query("seed == 1")
    rows = list(evaluations["schedule"])
    assert len(rows) > 2  # a row a cut
    found = re.search(r"(\d+) schedules trained \((\d+) now, 0 from the journal\)", printed)
    assert found is not None
    assert found[1] == found[2]
    assert int(found[1]) < len(rows)
    assert "nan" not in printed
    assert "one fresh seed says nothing of errors" in printed
    assert "private as to all data of one device, replaced by another's" in printed
    assert f"{found[1]} schedules are in its journal" in pwff_opt(*command).stdout
    cut = ("--schedule", rows[0])
    saved = pwff_opt("save-model", out, "--device", 0, "--out", model, *cut)
    assert "Warning" not in saved.stderr
    assert "must be new, empty" in refused("save-model", out, "--device", 0, "--out", own.parent)
    file = own.parent / "own.csv"
    file.write_text(file.read_text().replace("lovely", "splendid"))
    before = sorted(path.stat().st_mtime_ns for path in model.rglob("*"))
    message = refused("save-model", out, "--device", 0, "--out", model, *cut)
    assert "have changed since" in message
    assert sorted(path.stat().st_mtime_ns for path in model.rglob("*")) == before
    again = pwff_opt(*command).stdout
    assert f"{len(rows)} trainings in the journal do not count" in again
    assert f"({found[1]} now, 0 from the journal)" in again
