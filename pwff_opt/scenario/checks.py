"""The rules of single fields: read from a table's types, and checked.

The rule of a field stands in its type: ``Annotated[float, Gt(0)]``, a ``Literal``, or
``Annotated[str, OneOf(RULES)]`` for the name of a variant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

from pwff_opt.registry import Registry

LARGEST_INTEGER = 2**53
"""Largest whole number of a scenario: every one up to it is exact as a float, in JSON too."""


@dataclass(frozen=True, slots=True)
class OneOf:
    """The rule of a field that names a variant: ``Annotated[str, OneOf(RULES)]``."""

    registry: Registry[Any]


def rules_of(table: type) -> dict[str, Any]:
    """Return the type of every field of a table, its rules included."""
    return get_type_hints(table, include_extras=True)


def field_problems(table: Any, path: str) -> Iterator[str]:
    """Yield a line for every field of a table (and of the tables in it) that breaks its rule."""
    for entry in fields(table):
        where = f"{path}{entry.name}"
        yield from value_problems(
            getattr(table, entry.name), rules_of(type(table))[entry.name], where
        )


def value_problems(value: Any, hint: Any, where: str) -> Iterator[str]:
    """Yield a line for every rule of the type ``hint`` that ``value`` breaks."""
    if get_origin(hint) is Annotated:
        kind, *rules = get_args(hint)
        if isinstance(rules[0], OneOf):
            known = rules[0].registry
            if not isinstance(value, str) or value not in known:
                yield f"{where} must be one of {', '.join(map(repr, known))}, got {value!r}"
            return
        yield from _number_problems(value, kind, rules, where)
    elif get_origin(hint) is Literal:
        if value not in get_args(hint):
            yield f"{where} must be one of {', '.join(map(repr, get_args(hint)))}, got {value!r}"
    elif get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            yield f"{where} must be a list, got {value!r}"
            return
        for number, item in enumerate(value):
            yield from value_problems(item, get_args(hint)[0], f"{where}[{number}]")
    elif type(None) in get_args(hint):
        if value is not None:
            yield from value_problems(value, get_args(hint)[0], where)
    elif is_dataclass(hint):
        if type(value) is not hint:
            yield f"{where} must be a {getattr(hint, '__name__', hint)}, got {value!r}"
            return
        yield from field_problems(value, f"{where}.")
    elif hint is str and not isinstance(value, str):
        yield f"{where} must be text, got {value!r}"


def _number_problems(value: Any, kind: type, rules: list[Any], where: str) -> Iterator[str]:
    """Yield a line if ``value`` is no number of its kind, or one for every bound that it breaks."""
    allowed = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed):
        yield f"{where} must be {'a whole number' if kind is int else 'a number'}, got {value!r}"
        return
    if kind is int and abs(value) > LARGEST_INTEGER:
        yield f"{where} must be at most {LARGEST_INTEGER}, got a number of {len(str(value))} digits"
        return
    if kind is float and not math.isfinite(value):
        yield f"{where} must be finite, got {value!r}"
        return
    for rule in rules:
        if isinstance(rule, Gt) and not value > rule.gt:  # type: ignore[operator]
            yield f"{where} must be greater than {rule.gt}, got {value!r}"
        if isinstance(rule, Ge) and not value >= rule.ge:  # type: ignore[operator]
            yield f"{where} must be at least {rule.ge}, got {value!r}"
        if isinstance(rule, Le) and not value <= rule.le:  # type: ignore[operator]
            yield f"{where} must be at most {rule.le}, got {value!r}"
        if isinstance(rule, Lt) and not value < rule.lt:  # type: ignore[operator]
            yield f"{where} must be less than {rule.lt}, got {value!r}"
