"""Prompts and answers: demonstrations to imitate, and pairs of answers of which one is preferred."""

from __future__ import annotations

import json
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pwff_opt.data.corpora import Corpus, gather
from pwff_opt.data.packages import read_bytes
from pwff_opt.data.tables import FOLDER, filled, read_table, refuse_rows
from pwff_opt.errors import DataError
from pwff_opt.scenario import Data

AXES = ("helpfulness", "safety")
"""What one answer can be better in than another; in arrays an axis is its number here."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Demonstrations(Corpus):
    """Prompts (the ``texts``, all of one class) with the answer that each should get."""

    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Preferences:
    """Pairs of answers to a prompt, of which one is better on one axis."""

    prompts: tuple[str, ...]
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    axes: NDArray[np.int64]
    """[pair]: into AXES."""
    groups: NDArray[np.int64]
    """[pair]: into ``group_names``."""
    group_names: tuple[str, ...]
    triples: NDArray[np.int64] | None = None
    """[pair]: which triple of answers a pair is from; None: pairs stand alone."""

    def __len__(self) -> int:
        return len(self.prompts)


def load_demonstrations(data: Data, *, folder: Path) -> Demonstrations:
    """Load the prompts and answers a scenario names; relative files are looked for in ``folder``.

    Of several answers to a prompt the first is kept: a prompt in two parts would leak from one to the
    other.

    Raises
    ------
    DataError
        The data are missing or unreadable, lack a column, or a row lacks prompt, answer or domain.
    """
    if data.source == "alpaca-demo":
        table = _alpaca()
        columns = list(table.columns)
    else:
        columns = [data.prompt_column, data.answer_column]
        columns += [data.domain_column] if data.domain_column else []
        table = filled(read_table(data, folder=folder), columns, data)
    table = table.drop_duplicates(columns[0])
    prompts, answers, *domains = (table[column] for column in columns)
    corpus = gather(prompts, domains=domains[0] if domains else None)
    return Demonstrations(
        texts=corpus.texts,
        labels=corpus.labels,
        domains=corpus.domains,
        class_names=corpus.class_names,
        domain_names=corpus.domain_names,
        answers=tuple(answers),
    )


def load_preferences(data: Data, *, folder: Path) -> Preferences:
    """Load the preference pairs a scenario names; relative files are looked for in ``folder``.

    Where there is no column of prompts, answers are whole dialogues in the manner of HH-RLHF (Bai et al.
    2022, arXiv 2204.05862): what both have in common, up to the last "Assistant:", is the prompt. A pair
    that comes again is left out. HH-RLHF and PKU-SafeRLHF (Ji et al. 2023, arXiv 2307.04657) are read as they
    are published; pairs of theirs without an answer or a difference are left out.

    Raises
    ------
    DataError
        The data are missing or unreadable, or lack a column; a row lacks prompt, answer, axis or group,
        has equal answers or an unknown axis; or an axis has no pair.
    """
    if data.source == "stereoset":
        return _stereoset()
    read = _published(read_table(data, folder=folder), data)
    columns = [data.chosen_column, data.rejected_column, data.axis_column]
    dialogues = data.prompt_column not in read.columns
    columns += [] if dialogues else [data.prompt_column]
    columns += [data.group_column] if data.group_column else []
    table = filled(read, columns, data)
    pairs = pd.DataFrame(
        {
            "chosen": table[data.chosen_column],
            "rejected": table[data.rejected_column],
            "axis": table[data.axis_column],
        }
    )
    pairs["prompt"] = _split_dialogues(pairs, data) if dialogues else table[data.prompt_column]
    pairs["group"] = table[data.group_column] if data.group_column else pairs["prompt"]
    refuse_rows(
        ~pairs["axis"].isin(AXES), data.axis_column, f"must be one of {AXES}", pairs["axis"], data
    )
    refuse_rows(
        pairs["chosen"] == pairs["rejected"],
        data.rejected_column,
        f"must differ from {data.chosen_column!r}",
        pairs["rejected"],
        data,
    )
    for axis in AXES:
        if not (pairs["axis"] == axis).any():
            raise DataError(
                f"data {data.path!r}: column {data.axis_column!r} must name either axis, "
                f"got no {axis!r} in {len(pairs)} rows"
            )
    return _preferences(pairs.drop_duplicates(["prompt", "chosen", "rejected", "axis"]))


def general_texts() -> tuple[str, ...]:
    """Return 300 pages of the web (C4), a measure of what a model forgets: nothing is trained on them."""
    return tuple(row["text"] for row in _rows("alpaca-demo", "c4_demo.jsonl"))


def _preferences(pairs: pd.DataFrame) -> Preferences:
    names, groups = np.unique(pairs["group"].to_numpy(str), return_inverse=True)
    return Preferences(
        prompts=tuple(pairs["prompt"]),
        chosen=tuple(pairs["chosen"]),
        rejected=tuple(pairs["rejected"]),
        axes=pairs["axis"].map(AXES.index).to_numpy(np.int64),
        groups=groups.astype(np.int64),
        group_names=tuple(map(str, names)),
        triples=pairs["triple"].to_numpy(np.int64) if "triple" in pairs else None,
    )


# -- As published -----------------------------------------------------------------------------------

_BETTER = {"helpfulness": "better_response_id", "safety": "safer_response_id"}
"""Columns of PKU-SafeRLHF: which of two responses is the better one on an axis."""

_FOLDERS = {"helpful": "helpfulness", "harmless": "safety"}
"""How folders of HH-RLHF begin: "helpful-base", "harmless-base" and others; the rest holds no pairs."""


def _published(read: pd.DataFrame, data: Data) -> pd.DataFrame:
    """Return the columns that a scenario names, of a data set that says the same in other ones."""
    told, named = set(read.columns), [data.chosen_column, data.rejected_column]
    if {"prompt", "response_0", "response_1", *_BETTER.values()} <= told and not told & {*named}:
        both = read[["response_0", "response_1"]].to_numpy(object)
        parts = []
        for axis, column in _BETTER.items():
            better: pd.Series[Any] = pd.to_numeric(read[column], errors="coerce")
            refuse_rows(~better.isin([0, 1]), column, "must be 0 or 1", read[column], data)
            which = better.astype(int).to_numpy()
            part = read.copy()
            part[data.prompt_column], part[data.axis_column] = read["prompt"], axis
            for name, number in zip(named, (which, 1 - which), strict=True):
                part[name] = both[np.arange(len(read)), number]
            parts.append(part)
        # The pairs of a row together, as it stands.
        pairs = pd.concat(parts).sort_index(kind="stable", ignore_index=True)
        return _differing(pairs, pairs[named[0]], pairs[named[1]])
    if data.axis_column not in told and FOLDER in told and {*named} <= told:
        axes = read[FOLDER].map(_axis_of)
        if axes.notna().any():
            pairs = read.assign(**{data.axis_column: axes})[axes.notna()]
            chosen, rejected = pairs[named[0]], pairs[named[1]]
            if data.prompt_column in told:
                return _differing(pairs, chosen, rejected)
            answers = [_answers(*pair) for pair in zip(chosen, rejected, strict=True)]
            own, other = (pd.Series(part, pairs.index) for part in zip(*answers, strict=True))
            return _differing(pairs, own, other)
    return read


def _axis_of(folders: Any) -> str | None:
    """Return the axis that a folder of HH-RLHF is of."""
    names = str(folders).split("/")
    return next((_FOLDERS[n] for name in names if (n := name.split("-")[0]) in _FOLDERS), None)


def _differing(pairs: pd.DataFrame, chosen: pd.Series, rejected: pd.Series) -> pd.DataFrame:
    """Return the pairs of which both answers are there, and differ."""
    ours, others = (
        part.map(lambda answer: answer.strip() if isinstance(answer, str) else "")
        for part in (chosen, rejected)
    )
    found = pairs[(ours != "") & (others != "") & (ours != others)].reset_index(drop=True)
    found.attrs.clear()  # published folders hold files of other things: these rows are what was meant
    return found


def _answers(chosen: Any, rejected: Any) -> tuple[str, str]:
    """Return the answers in which two dialogues end, empty where they do not begin alike."""
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        return "", ""
    end = _last_turn(chosen, rejected)
    if end < 0:
        return "", ""
    return chosen[end + len(_ASSISTANT) :], rejected[end + len(_ASSISTANT) :]


_HUMAN, _ASSISTANT = "Human:", "\n\nAssistant:"


def _last_turn(chosen: str, rejected: str) -> int:
    """Return where the last turn of the assistant begins that two dialogues share; -1 if none does."""
    return commonprefix([chosen, rejected]).rfind(_ASSISTANT)  # noqa: RUF071  (texts, not paths)


def _split_dialogues(pairs: pd.DataFrame, data: Data) -> pd.Series:
    """Return the prompts of the dialogues ``chosen`` and ``rejected``, which become answers."""
    both = list(zip(pairs["chosen"], pairs["rejected"], strict=True))
    ends = np.array([_last_turn(*texts) for texts in both])
    refuse_rows(
        pd.Series(ends < 0),
        data.chosen_column,
        f"must begin as {data.rejected_column!r} does, up to an answer of 'Assistant:', for there is "
        f"no column {data.prompt_column!r}",
        pairs["chosen"],
        data,
    )
    for column in ("chosen", "rejected"):
        pairs[column] = [
            text[end + len(_ASSISTANT) :].strip()
            for text, end in zip(pairs[column], ends, strict=True)
        ]
        refuse_rows(pairs[column] == "", column, "must end with an answer", pairs[column], data)
    return pd.Series(
        [
            texts[0][:end].strip().removeprefix(_HUMAN).strip()
            for texts, end in zip(both, ends, strict=True)
        ]
    )


# -- Out of pinned packages -------------------------------------------------------------------------


def _rows(name: str, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in read_bytes(name, file).split(b"\n") if line]


def _alpaca() -> pd.DataFrame:
    """Return 999 instructions with answers, as LLaMA-Factory ships them to try it with.

    After Stanford Alpaca (Taori et al. 2023); the input, if there is any, ends the prompt.
    """
    rows = json.loads(read_bytes("alpaca-demo", "alpaca_en_demo.json"))
    return pd.DataFrame(
        {
            "prompt": [f"{row['instruction']}\n\n{row['input']}".strip() for row in rows],
            "answer": [row["output"].strip() for row in rows],
        }
    )


def _stereoset() -> Preferences:
    """Return StereoSet's triples of sentences that follow a context (Nadeem, Bethke and Reddy, ACL 2021).

    There are 2,123, about 79 targets (the groups). Three pairs of each: safety prefers the sentence
    against the stereotype to that with it, and helpfulness, which stands for relevance here, prefers
    either to the unrelated one.
    """
    better = (
        ("safety", "anti-stereotype", "stereotype"),
        ("helpfulness", "stereotype", "unrelated"),
        ("helpfulness", "anti-stereotype", "unrelated"),
    )
    triples = [r for r in _rows("stereoset", "test.jsonl") if r["type"] == "intersentence"]
    return _preferences(
        pd.DataFrame(
            [
                {
                    "prompt": triple["context"].strip(),
                    "chosen": triple[chosen].strip(),
                    "rejected": triple[rejected].strip(),
                    "axis": axis,
                    "group": triple["target"],
                    "triple": number,
                }
                for number, triple in enumerate(triples)
                for axis, chosen, rejected in better
            ]
        )
    )
