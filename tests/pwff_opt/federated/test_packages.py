"""Fetching out of pinned packages: by the real pip, from a folder with a small wheel."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pwff_opt.cli.app import app
from pwff_opt.data.models import data_folder, model_source
from pwff_opt.data.packages import PACKAGES, Package, fetch, read_bytes
from pwff_opt.errors import DataError, ModelError

WORDS = b"some words\n"
METADATA = "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A package that pip finds in a folder, and no index or other folder to ask."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("tiny/words.txt", WORDS)
        file.writestr("tiny/__init__.py", "raise RuntimeError('imported')\n")
        file.writestr("tiny-1.0.dist-info/METADATA", METADATA)
        file.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr("tiny-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PWFF_DATA", str(tmp_path / "data"))
    package = Package(
        requirement="tiny==1.0",
        wheel=True,
        sha256=_sha256(wheel.read_bytes()),
        folder="tiny-1.0",
        files={"tiny/words.txt": _sha256(WORDS)},
    )
    monkeypatch.setitem(PACKAGES, "tiny", package)  # type: ignore[arg-type]
    return package


def _visible() -> list[str]:
    return sorted(
        str(path.relative_to(data_folder()))
        for path in data_folder().rglob("*")
        if path.is_file() and path.suffix != ".lock"
    )


def test_only_what_is_needed_is_kept(tiny: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="run: pwff-opt data fetch tiny"):
        read_bytes("tiny", "words.txt")
    assert fetch("tiny") == data_folder() / "tiny-1.0"
    assert _visible() == ["tiny-1.0/words.txt"]
    assert read_bytes("tiny", "words.txt") == WORDS
    monkeypatch.setenv("PIP_FIND_LINKS", "nowhere")
    assert fetch("tiny") == tiny.path  # nothing is asked of pip


def test_damage_is_seen_and_mended(tiny: Package) -> None:
    words = fetch("tiny") / "words.txt"
    words.write_bytes(b"other words\n")
    with pytest.raises(DataError, match="is damaged; run: pwff-opt data fetch tiny"):
        read_bytes("tiny", "words.txt")
    fetch("tiny")
    assert read_bytes("tiny", "words.txt") == WORDS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, "SHA-256 0{64}.*Got +[0-9a-f]{64}"),
        ({"files": {"tiny/words.txt": "0" * 64}}, "SHA-256 of tiny/words.txt must be 0{64}, got"),
        ({"requirement": "tiny==2.0"}, "pip could not bring tiny==2.0"),
    ],
)
def test_another_release_is_refused(
    tiny: Package, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], message: str
) -> None:
    monkeypatch.setitem(PACKAGES, "tiny", replace(tiny, **change))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=f"(?s){message}"):
        fetch("tiny")
    assert _visible() == []


def test_a_kill_leaves_nothing_half_made(tiny: Package) -> None:
    script = (
        "import os, signal\n"
        "from pwff_opt.data.packages import PACKAGES, Package, fetch\n"
        "def killed(folder):\n"
        "    (folder / 'half.txt').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"PACKAGES['tiny'] = Package(requirement={tiny.requirement!r}, wheel=True, "
        f"sha256={tiny.sha256!r}, folder={tiny.folder!r}, files={dict(tiny.files)!r}, prepare=killed)\n"
        "fetch('tiny')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not tiny.path.exists()
    assert any("half.txt" in name for name in _visible())  # it did begin
    fetch("tiny")
    assert _visible() == ["tiny-1.0/words.txt"]


def test_a_folder_that_cannot_be_written_is_named(
    tiny: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PWFF_DATA", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"file/tiny-1\.0 cannot be written"):
        fetch("tiny")


def test_the_command_fetches_by_name(tiny: Package) -> None:
    done = CliRunner().invoke(app, ["data", "fetch", "tiny"])
    assert done.exit_code == 0
    assert f"tiny: {tiny.path}" in done.output
    unknown = CliRunner().invoke(app, ["data", "fetch", "tinny"])
    assert isinstance(unknown.exception, DataError)
    assert "must be one of 'hutto', 'smollm2'" in str(unknown.exception)


def test_a_model_that_was_not_fetched_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PWFF_DATA", str(tmp_path))
    with pytest.raises(ModelError, match="run: pwff-opt data fetch smollm2"):
        model_source("smollm2")
    PACKAGES["smollm2"].path.mkdir()
    assert model_source("smollm2") == str(PACKAGES["smollm2"].path)
