"""Tables of text that a scenario names: files, and data sets by hub name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pwff_opt.errors import DataError
from pwff_opt.scenario import Data


def _read_csv(path: Path) -> pd.DataFrame:
    """Read texts as written: no "None" becomes missing, no "01" becomes 1."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if not isinstance(table.index, pd.RangeIndex):  # pandas takes what is over as the rows' names
        raise ValueError(
            f"rows must have no more fields than the header, which has {len(table.columns)}; a text with "
            "commas must be in quotes"
        )
    return table


def _read_jsonl(path: Path) -> pd.DataFrame:
    """Read a row a line; some that are published hold one array of rows."""
    try:
        return pd.read_json(path, lines=True, dtype=False, convert_dates=False)
    except ValueError:
        table = pd.read_json(path, lines=False, dtype=False, convert_dates=False)
    if list(table.index) != list(range(len(table))):
        raise ValueError(f"{path.name} holds one object, not rows")
    return table


FOLDER = "folder"
"""Column that is added to a table of several files: the folders that a row's file is in, as "a/b"."""

_READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": _read_csv,
    ".parquet": pd.read_parquet,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
}


def read_table(data: Data, *, folder: Path) -> pd.DataFrame:
    """Read the table that a scenario names by file or by hub; files are looked for in ``folder``.

    Raises
    ------
    DataError
        There is none, or it cannot be read.
    """
    return _read_tables(folder / data.path) if data.source == "file" else _read_hub(data.path)


def require(table: pd.DataFrame, columns: Sequence[str], data: Data) -> None:
    """Raise a DataError unless the table, and every file it was read from, has all the columns."""
    files: dict[str, list[str]] = table.attrs.get("files", {})
    read = set().union(*files.values())  # what is not from a file has been added to all rows
    for file, found in files.items():
        lacking = [column for column in columns if column in read and column not in found]
        if lacking:
            raise DataError(
                f"data {data.path!r}: every file must have the columns {list(columns)}, {file!r} lacks "
                f"{lacking}; it has {found}"
            )
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise DataError(
            f"data {data.path!r} must have the columns {list(columns)}, lacks {missing}; "
            f"it has {list(table.columns)}"
        )


def filled(table: pd.DataFrame, columns: Sequence[str], data: Data) -> pd.DataFrame:
    """Return some columns as texts, without blanks around them.

    Raises
    ------
    DataError
        There is no such column, or a row in it is blank or holds neither text nor a whole number.
    """
    require(table, columns, data)
    texts = {
        column: [
            str(v).strip() if isinstance(v, str | int | np.integer) else "" for v in table[column]
        ]
        for column in columns
    }
    for column, values in texts.items():
        refuse_rows(pd.Series(values) == "", column, "must hold text", table[column], data)
    return pd.DataFrame(texts)


def refuse_rows(
    wrong: pd.Series[bool], column: str, rule: str, values: pd.Series[Any], data: Data
) -> None:
    """Raise a DataError if any row is wrong; it names the rule, the first such row and its value."""
    rows = np.flatnonzero(wrong)
    if len(rows):
        raise DataError(
            f"data {data.path!r}: column {column!r} {rule}, got {values.iloc[rows[0]]!r} in row "
            f"{rows[0]}, counted from 0 ({len(rows)} such rows)"
        )


def _reader(path: Path) -> Callable[[Path], pd.DataFrame] | None:
    return next((read for ending, read in _READERS.items() if path.name.endswith(ending)), None)


def _read_tables(path: Path) -> pd.DataFrame:
    """Read one file, or all files of a folder that end in one of the known ways."""
    try:
        is_folder = path.is_dir()
        candidates = sorted(path.rglob("*")) if is_folder else [path]
        files = [file for file in candidates if file.is_file()]
        there = path.exists()
    except OSError as error:
        raise DataError(f"data.path {str(path)!r} cannot be looked into: {error}") from error
    tables = [(file, reader) for file in files if (reader := _reader(file)) is not None]
    read = [
        _with_folder(_read(file, reader), file.relative_to(path).parts if is_folder else ())
        for file, reader in tables
    ]
    if not read:
        told = "" if there else ", which is not there"
        raise DataError(
            f"data.path must name a {', '.join(_READERS)} file or a folder of them, got {str(path)!r}{told}"
        )
    whole = pd.concat(read, ignore_index=True)
    if len(read) > 1:
        names = [str(file.relative_to(path)) for file, _ in tables]
        whole.attrs["files"] = {
            name: list(table.columns) for name, table in zip(names, read, strict=True)
        }
    return whole


def _read(file: Path, reader: Callable[[Path], pd.DataFrame]) -> pd.DataFrame:
    try:
        return reader(file)
    except UnicodeDecodeError as error:
        raise DataError(f"data.path {str(file)!r} must be in UTF-8: {error}") from error
    except (ValueError, OSError, EOFError) as error:
        told = str(error).strip()
        raise DataError(f"data.path {str(file)!r} could not be read: {told}") from error


def _with_folder(table: pd.DataFrame, parts: Sequence[str]) -> pd.DataFrame:
    if len(parts) < 2 or FOLDER in table.columns:
        return table
    return table.assign(**{FOLDER: "/".join(parts[:-1])})


def _read_hub(name: str) -> pd.DataFrame:
    """Read the tables of a data set on the Hugging Face hub, or in its local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [f"*{ending}" for ending in _READERS]
    try:
        folder = snapshot_download(name, repo_type="dataset", allow_patterns=patterns)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(f"data.path {name!r} could not be fetched from the hub: {error}") from error
    return _read_tables(Path(folder))
