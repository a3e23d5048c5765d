"""The devices of a file: drawn from distributions, then replaced one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from pwff_opt.rng import stream
from pwff_opt.scenario.checks import rules_of, value_problems
from pwff_opt.scenario.conversion import converted, is_table
from pwff_opt.scenario.tables import Device

# For required quantities that could not be read; the others fall back to their defaults. They break
# no rule of their own or between fields, so that every mistake makes one problem.
_STAND_INS = {"distance_m": 1.0, "power_max_w": 1.0, "frequency_max_hz": 1e300}
_DISTRIBUTIONS = {
    "uniform": "[low, high]: equally likely between",
    "log_uniform": "[low, high]: its logarithm equally likely between",
    "disc": "[low, high]: distances of points spread evenly over a ring",
    "choice": "[a, b, …]: one of the values",
}


def device_tables(
    population: Any, singles: Any, seed: Any, problems: list[str]
) -> list[dict[str, Any]] | None:
    """Return one table a device: drawn from the population, then replaced by its own entry.

    None if there is no telling how many.
    """
    if isinstance(population, list):  # a resolved scenario spells every device out
        singles, population = population, {}
    if not is_table(population) or not isinstance(singles, list):
        problems.append("devices must be a table [devices] and device a list of tables [[device]]")
        return None
    drawn = dict(population)
    count = _count(drawn, singles, problems)
    if count is None:
        return None
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        seed = 0  # reported with the seeds
    tables: list[dict[str, Any]] = [{} for _ in range(count)]
    for key, rule in drawn.items():
        if key not in rules_of(Device):
            near = get_close_matches(key, rules_of(Device), n=1)
            problems.append(
                f"devices.{key} is not a known key"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
            continue
        if is_table(rule):
            values = _draw(rule, key, count, seed, problems)
        else:
            hint = rules_of(Device)[key]
            own = list(value_problems(converted(rule, hint, key, []), hint, f"devices.{key}"))
            problems += own
            values = [] if own else [rule] * count
        for table, value in zip(tables, values, strict=False):
            table[key] = value
        if not values and key in _STAND_INS:
            for table in tables:
                table[key] = _STAND_INS[key]
    for table, single in zip(tables, singles, strict=False):
        if is_table(single):
            table.update(single)
        else:
            problems.append(f"device must be a list of tables, got {single!r}")
    for key, stand_in in _STAND_INS.items():
        if not any(key in table for table in tables):
            problems.append(f"devices.{key} is required, and missing")
            for table in tables:
                table[key] = stand_in
    return tables


def _count(drawn: dict[str, Any], singles: list[Any], problems: list[str]) -> int | None:
    """Return how many devices there are, and take ``count`` out of the table; None if there is no telling."""
    if "count" not in drawn and not singles:
        near = get_close_matches("count", drawn, n=1)
        problems.append(
            "devices.count is missing (or [[device]] entries)"
            + (f"; devices.{near[0]} is not a known key" if near else "")
        )
        return None
    count = drawn.pop("count", len(singles))
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        problems.append(
            f"devices.count must be a whole number of at least 1 (or [[device]] entries), got {count!r}"
        )
        return None
    if len(singles) > count:
        problems.append(
            f"device must hold at most devices.count ({count}) entries, got {len(singles)}"
        )
    return count


def _draw(
    rule: Mapping[str, Any], key: str, count: int, seed: int, problems: list[str]
) -> list[float]:
    """Return ``count`` values of a quantity, drawn from its distribution; none if that is not one."""
    where = f"devices.{key}"
    if len(rule) != 1 or next(iter(rule)) not in _DISTRIBUTIONS:
        known = "; ".join(f"{name} = {text}" for name, text in _DISTRIBUTIONS.items())
        problems.append(
            f"{where} must be a value or one distribution ({known}), got {dict(rule)!r}"
        )
        return []
    name, numbers = next(iter(rule.items()))
    where = f"{where}.{name}"
    if not isinstance(numbers, list) or not numbers or (name != "choice" and len(numbers) != 2):
        problems.append(f"{where} must be {_DISTRIBUTIONS[name]}, got {numbers!r}")
        return []
    hint = rules_of(Device)[key]
    made = [converted(number, hint, where, []) for number in numbers]
    broken = [
        line
        for number, item in enumerate(made)
        for line in value_problems(item, hint, f"{where}[{number}]")
    ]
    if not broken and name != "choice" and not made[0] <= made[1]:
        broken.append(f"{where} must be [low, high] with low <= high, got {numbers!r}")
    if not broken and name == "log_uniform" and not made[0] > 0:
        broken.append(f"{where}[0] must be greater than 0, got {numbers[0]!r}")
    problems += broken
    if broken:
        return []
    values = []
    for device in range(count):
        rng = stream(seed, f"devices.{key}", device=device)
        low, high = made[0], made[-1]
        if name == "uniform":
            values.append(float(rng.uniform(low, high)))
        elif name == "log_uniform":
            values.append(math.exp(rng.uniform(math.log(low), math.log(high))))
        elif name == "disc":
            values.append(high * math.sqrt(rng.uniform((low / high) ** 2, 1.0)))
        else:
            values.append(float(made[int(rng.integers(len(made)))]))
    return values
