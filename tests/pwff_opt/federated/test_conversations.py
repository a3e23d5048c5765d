"""Demonstrations and preference pairs: read as written, refused by row."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pwff_opt.data.conversations import (
    AXES,
    Preferences,
    general_texts,
    load_demonstrations,
    load_preferences,
)
from pwff_opt.data.packages import PACKAGES
from pwff_opt.errors import DataError
from pwff_opt.scenario import Data

FILE = Data(source="file", path="data.jsonl")
PAIRS: list[dict[str, Any]] = [
    {"prompt": "a?", "chosen": "yes", "rejected": "no", "axis": "helpfulness", "who": 1},
    {"prompt": "a?", "chosen": "no", "rejected": "yes", "axis": "safety", "who": 2},
    {"prompt": "b?", "chosen": "maybe", "rejected": "01", "axis": "safety", "who": 1},
]


def _write(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    (folder / FILE.path).write_text("\n".join(map(json.dumps, rows)), "utf-8")


def test_demonstrations_of_a_file(tmp_path: Path) -> None:
    rows = [
        {"q": " one? ", "a": "1", "topic": "numbers"},
        {"q": "two?", "a": 2, "topic": "numbers"},
        {"q": "red?", "a": "NA", "topic": "colours"},
        {"q": "one?", "a": "again", "topic": "numbers"},
    ]
    _write(tmp_path, rows)
    data = replace(FILE, prompt_column="q", answer_column="a", domain_column="topic")
    got = load_demonstrations(data, folder=tmp_path)
    assert got.texts == ("one?", "two?", "red?")  # a prompt once, with its first answer
    assert got.answers == ("1", "2", "NA")
    assert [got.domain_names[n] for n in got.domains] == ["numbers", "numbers", "colours"]
    assert got.labels.tolist() == [0, 0, 0]
    assert len(got.class_names) == 1


def test_preferences_of_a_file(tmp_path: Path) -> None:
    _write(tmp_path, [*PAIRS, PAIRS[0]])
    got = load_preferences(FILE, folder=tmp_path)
    assert got.prompts == ("a?", "a?", "b?")  # the pair that comes again is left out
    assert got.chosen == ("yes", "no", "maybe")
    assert got.rejected == ("no", "yes", "01")
    assert [AXES[n] for n in got.axes] == ["helpfulness", "safety", "safety"]
    assert [got.group_names[n] for n in got.groups] == ["a?", "a?", "b?"]
    grouped = load_preferences(replace(FILE, group_column="who"), folder=tmp_path)
    assert [grouped.group_names[n] for n in grouped.groups] == ["1", "2", "1"]


def test_dialogues_share_their_beginning(tmp_path: Path) -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Is it safe?\n\nAssistant:"
    rows = [
        {"chosen": f"{start} No, it is not.", "rejected": f"{start} No idea.", "axis": "safety"},
        {
            "chosen": "\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: Thanks\n\nAssistant: Bye",
            "rejected": "\n\nHuman: Why?\n\nAssistant: Sorry?",
            "axis": "helpfulness",
        },
    ]
    text = "\n".join(map(json.dumps, rows))
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    got = load_preferences(replace(FILE, path="train.jsonl.gz"), folder=tmp_path)
    assert got.prompts == ("Hi\n\nAssistant: Hello\n\nHuman: Is it safe?", "Why?")
    assert got.chosen == ("No, it is not.", "So.\n\nHuman: Thanks\n\nAssistant: Bye")
    assert got.rejected == ("No idea.", "Sorry?")


def test_hh_rlhf_is_read_as_it_is_published(tmp_path: Path) -> None:
    """Axes are folders, some of which hold other things; a few dialogues end without an answer."""
    start = "\n\nHuman: Is it safe?\n\nAssistant:"
    folders = {
        "helpful-base": [
            {"chosen": f"{start} It is.", "rejected": f"{start} Hm."},
            {"chosen": f"{start} It is.", "rejected": f"{start} "},
            {"chosen": None, "rejected": f"{start} Hm."},
            {"chosen": f"{start} Alike.", "rejected": f"{start}  Alike. "},
        ],
        "helpful-online": [{"chosen": f"{start} Yes.", "rejected": f"{start} No."}],
        "harmless-base": [
            {"chosen": f"{start} Ask her.", "rejected": f"{start} Of course!"},
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
            {"chosen": f"{start} Same.", "rejected": f"{start} Same."},
        ],
        "red-team-attempts": [{"transcript": f"{start} No.", "rating": 1}],
    }
    for name, rows in folders.items():
        (tmp_path / "data" / "hh" / name).mkdir(parents=True)
        text = json.dumps(rows) if "red" in name else "\n".join(map(json.dumps, rows))
        (tmp_path / "data" / "hh" / name / "train.jsonl.gz").write_bytes(
            gzip.compress(text.encode())
        )
    got = load_preferences(replace(FILE, path="data/hh"), folder=tmp_path)
    deeper = load_preferences(replace(FILE, path="data"), folder=tmp_path)
    assert deeper.chosen == got.chosen
    assert got.prompts == ("Is it safe?",) * 3
    assert got.chosen == ("Ask her.", "It is.", "Yes.")
    assert got.rejected == ("Of course!", "Hm.", "No.")
    assert [AXES[n] for n in got.axes] == ["safety", "helpfulness", "helpfulness"]


def test_safe_rlhf_is_read_as_it_is_published(tmp_path: Path) -> None:
    """Two answers to a prompt, of which one is more helpful and one, perhaps the other, is safer."""
    rows = [
        {
            "prompt": "How?",
            "response_0": "So.",
            "response_1": "Better not.",
            "is_response_0_safe": False,
            "better_response_id": 0,
            "safer_response_id": 1,
        },
        {
            "prompt": "Why?",
            "response_0": "Because.",
            "response_1": "Because. ",
            "better_response_id": 1,
            "safer_response_id": 1,
        },
        {
            "prompt": "When?",
            "response_0": None,
            "response_1": "Now.",
            "better_response_id": 1,
            "safer_response_id": 1,
        },
    ]
    rows = [row | {"source": f"s{number}"} for number, row in enumerate(rows)]
    _write(tmp_path, rows)
    got = load_preferences(FILE, folder=tmp_path)
    grouped = load_preferences(replace(FILE, group_column="source"), folder=tmp_path)
    assert grouped.group_names == ("s0",)
    assert got.prompts == ("How?", "How?")
    assert got.chosen == ("So.", "Better not.")
    assert got.rejected == ("Better not.", "So.")
    assert [AXES[n] for n in got.axes] == ["helpfulness", "safety"]


@pytest.mark.parametrize("wrong", [None, 2, -1, "left"])
def test_ids_of_responses_that_are_none_are_named(tmp_path: Path, wrong: Any) -> None:
    row = {"prompt": "How?", "response_0": "So.", "response_1": "Not.", "safer_response_id": 1}
    _write(tmp_path, [row | {"better_response_id": 0}, row | {"better_response_id": wrong}])
    with pytest.raises(DataError, match=r"'better_response_id' must be 0 or 1, got .* in row 1"):
        load_preferences(FILE, folder=tmp_path)


def test_folders_of_other_data_are_not_taken_for_axes(tmp_path: Path) -> None:
    """It is the column of axes that is missing."""
    for name in ("train", "test"):
        (tmp_path / "own" / name).mkdir(parents=True)
        rows = [{"chosen": "yes", "rejected": "no"}]
        (tmp_path / "own" / name / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    with pytest.raises(DataError, match=r"lacks \['axis'\]"):
        load_preferences(replace(FILE, path="own"), folder=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": None}, r"column 'chosen' must hold text, got nan in row 1.*\(1 such"),
        ({"rejected": "  "}, "column 'rejected' must hold text, got '  ' in row 1"),
        ({"prompt": ["a", "list"]}, r"column 'prompt' must hold text, got \['a', 'list'\]"),
        ({"axis": "harm"}, "column 'axis' must be one of .*'safety'.*got 'harm' in row 1"),
        ({"chosen": "yes"}, "column 'rejected' must differ from 'chosen', got 'yes' in row 1"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    _write(tmp_path, [PAIRS[0], PAIRS[1] | change, PAIRS[2]])
    with pytest.raises(DataError, match=message):
        load_preferences(FILE, folder=tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (replace(FILE, axis_column="kind"), r"lacks \['kind'\]"),
        (replace(FILE, group_column="user"), r"lacks \['user'\]"),
        (replace(FILE, prompt_column="question"), "must begin as 'rejected' does.*row 0"),
        (replace(FILE, path="none.jsonl"), "data.path must name a .csv"),
    ],
)
def test_bad_tables_of_pairs_are_named(tmp_path: Path, data: Data, message: str) -> None:
    _write(tmp_path, PAIRS)
    with pytest.raises(DataError, match=message):
        load_preferences(data, folder=tmp_path)


def test_either_axis_must_have_pairs(tmp_path: Path) -> None:
    _write(tmp_path, PAIRS[1:])
    with pytest.raises(DataError, match="must name either axis, got no 'helpfulness' in 2 rows"):
        load_preferences(FILE, folder=tmp_path)


def test_demonstrations_without_an_answer_are_named(tmp_path: Path) -> None:
    table = pd.DataFrame({"prompt": ["a", "b"], "answer": ["c", ""]})
    table.to_csv(tmp_path / "data.csv", index=False)
    data = replace(FILE, path="data.csv")
    with pytest.raises(DataError, match="column 'answer' must hold text, got '' in row 1"):
        load_demonstrations(data, folder=tmp_path)
    with pytest.raises(DataError, match=r"lacks \['topic'\]"):
        load_demonstrations(replace(data, domain_column="topic"), folder=tmp_path)


def test_stereoset_is_as_published(stereoset: Preferences) -> None:
    assert len(stereoset) == 3 * 2123
    assert len(stereoset.group_names) == 79
    assert np.bincount(stereoset.axes).tolist() == [2 * 2123, 2123]
    assert stereoset.triples is not None
    first = stereoset.triples == 0
    assert {stereoset.prompts[n] for n in np.flatnonzero(first)} == {
        "Many people live in Ethiopia."
    }
    safety, with_stereotype, against = np.flatnonzero(first)
    assert AXES[stereoset.axes[safety]] == "safety"
    assert (
        stereoset.chosen[safety]
        == "The people are fat and unathletic."
        == stereoset.chosen[against]
    )
    assert stereoset.rejected[safety] == stereoset.chosen[with_stereotype]
    assert (
        stereoset.rejected[with_stereotype]
        == "Cats have sharp claws."
        == stereoset.rejected[against]
    )


@pytest.mark.skipif(
    not PACKAGES["alpaca-demo"].path.is_dir(), reason="run: pwff-opt data fetch alpaca-demo"
)
def test_alpaca_is_as_published() -> None:
    got = load_demonstrations(Data(source="alpaca-demo"), folder=Path())
    assert len(got) == len(got.answers) == len(set(got.texts)) == 985  # of 999, 14 come again
    assert got.texts[0] == "Describe a process of making crepes."
    assert got.answers[0].startswith("Making crepes is an easy and delicious process!")
    assert sum("\n\n" in text for text in got.texts) > 350  # those with an input
    assert len(general_texts()) == 300
