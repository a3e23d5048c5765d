"""From the tables of a file to the fields of a scenario."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from typing import Annotated, Any, cast, get_args, get_origin

from pwff_opt.scenario.checks import rules_of, value_problems


def converted_table(
    kind: type, document: Mapping[str, Any], where: str, problems: list[str]
) -> dict[str, Any]:
    """Return the fields of a table, converted; report unknown, missing and ill-typed keys."""
    hints = rules_of(kind)
    for key in document:
        if key not in hints:
            near = get_close_matches(key, hints, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(hints)}"
            problems.append(f"{where}{key} is not a known key{hint}")
    values = {}
    for entry in fields(kind):
        if entry.name in document:
            values[entry.name] = converted(
                document[entry.name], hints[entry.name], f"{where}{entry.name}", problems
            )
        elif _required(entry):
            table = hints[entry.name]
            keys = (
                [own.name for own in fields(table) if _required(own)] if is_dataclass(table) else []
            )
            needs = f"; it needs at least {', '.join(keys)}" if keys else ""
            problems.append(f"{where}{entry.name} is required, and missing{needs}")
    return values


def _required(entry: Field[Any]) -> bool:
    """Return whether a field has no default."""
    return entry.default is MISSING and entry.default_factory is MISSING


def converted(value: Any, hint: Any, where: str, problems: list[str]) -> Any:
    """Return a value of a file as its field's type has it: tables made, lists as tuples, floats.

    What cannot be converted comes back as it is, for the checks to report; a table that cannot be made is
    None, and what is wrong in it is added to ``problems``.
    """
    if is_dataclass(hint):
        if not is_table(value):
            problems.append(f"{where} must be a table, got {value!r}")
            return value
        before = len(problems)
        made = converted_table(hint, value, f"{where}.", problems)  # type: ignore[arg-type]
        if len(problems) > before:
            # The table cannot be made; still report which of its values break their own rules.
            for key, item in made.items():
                problems += value_problems(item, rules_of(hint)[key], f"{where}.{key}")  # type: ignore[arg-type]
            return None
        return cast(Any, hint)(**made)
    if get_origin(hint) is tuple and isinstance(value, list):
        item = get_args(hint)[0]
        return tuple(
            converted(entry, item, f"{where}[{number}]", problems)
            for number, entry in enumerate(value)
        )
    if type(None) in get_args(hint) and value is not None:
        return converted(value, get_args(hint)[0], where, problems)
    wants_float = get_origin(hint) is Annotated and get_args(hint)[0] is float
    if wants_float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf  # reported as not finite
    return value


def is_table(value: Any) -> bool:
    """Return whether a value of a file is a table."""
    return isinstance(value, Mapping)
