"""Scenario files: TOML in, TOML and JSON out.

A file has the tables and keys of :class:`pwff_opt.scenario.Scenario`. Only devices may be written in
a second way: ``[devices]`` holds their number and, for each quantity, a value for all or a
distribution to draw from; ``[[device]]`` entries, where present, replace what was drawn, one by one.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, cast, get_args, get_origin

from pwff_opt.errors import ScenarioError
from pwff_opt.rng import stream
from pwff_opt.scenario import Device, Scenario, rules_of, value_problems

BUILT_IN = files("pwff_opt.scenario") / "built_in"
# For required quantities that could not be read; the others fall back to their defaults. They break
# no rule of their own or between fields, so that every mistake makes one problem.
_STAND_INS = {"distance_m": 1.0, "power_max_w": 1.0, "frequency_max_hz": 1e300}
_DISTRIBUTIONS = {
    "uniform": "[low, high]: equally likely between",
    "log_uniform": "[low, high]: its logarithm equally likely between",
    "disc": "[low, high]: distances of points spread evenly over a ring",
    "choice": "[a, b, …]: one of the values",
}


def built_in_names() -> list[str]:
    return sorted(entry.name[:-5] for entry in BUILT_IN.iterdir() if entry.name.endswith(".toml"))


def scenario_text(source: str | Path) -> tuple[str, Path]:
    """Return the text of a scenario file, or of a built-in one by bare name, and its folder."""
    path = Path(source)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), path.parent
        except (OSError, UnicodeDecodeError) as error:
            raise ScenarioError(
                str(path), [f"file must be readable UTF-8 text: {error}"]
            ) from error
    if str(source) in built_in_names():
        return (BUILT_IN / f"{source}.toml").read_text(encoding="utf-8"), Path.cwd()
    raise ScenarioError(
        str(source),
        [f"must be a file or one of the built-in scenarios ({', '.join(built_in_names())})"],
    )


def read_scenario(source: str | Path) -> Scenario:
    """Read and check a scenario; a ScenarioError names all that is wrong with it."""
    text, folder = scenario_text(source)
    return parse_scenario(text, folder=folder, source=str(source))


def parse_scenario(text: str, *, folder: str | Path = ".", source: str = "scenario") -> Scenario:
    """Make a scenario of TOML text; relative paths in it start at ``folder``."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(source, [f"file must be TOML: {error}"]) from error
    problems: list[str] = []
    # Paths must not depend on where the program was started, nor be set by the file itself.
    if "folder" in document:
        problems.append("folder is not a key of a scenario file")
    population = document.pop("devices", {})
    singles = document.pop("device", [])
    seed = document.get("seeds", {}).get("devices", 1) if _is_table(document.get("seeds")) else 1
    document["devices"] = _devices(population, singles, seed, problems)
    document["folder"] = str(Path(folder).resolve())
    values = _table(Scenario, document, "", problems)
    try:
        scenario = Scenario(**values)
    except ScenarioError as error:
        # What could not be made has been reported already.
        unmade = [f"{name} must " for name, value in values.items() if value is None]
        unmade += [
            f"devices[{number}] must "
            for number, device in enumerate(values["devices"] or ())
            if device is None
        ]
        broken: list[str] = []
        for line in error.problems:
            # One mistake makes one problem: what rests on a value that breaks its own rule says nothing.
            known = line in problems or line.startswith(tuple(unmade))
            if not known and not any(
                re.search(rf"(?<!\S){re.escape(key)} ", line) for key in broken
            ):
                problems.append(line)
                broken.append(line.split(" ")[0])
    except TypeError:  # a required table is missing, reported already
        pass
    if problems:
        raise ScenarioError(source, problems)
    return scenario


def resolved(scenario: Scenario) -> dict[str, Any]:
    """Return the scenario as plain JSON values, every default filled in and every device drawn."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(scenario)))
    return values


def from_resolved(values: Mapping[str, Any]) -> Scenario:
    """Return the scenario that :func:`resolved` wrote down."""
    problems: list[str] = []
    made = _table(Scenario, dict(values), "", problems)
    if problems:
        raise ScenarioError("resolved scenario", problems)
    return Scenario(**made)


# -- tables ---------------------------------------------------------------------------------------


def _table(
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
            values[entry.name] = _convert(
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
    return entry.default is MISSING and entry.default_factory is MISSING


def _convert(value: Any, hint: Any, where: str, problems: list[str]) -> Any:
    if is_dataclass(hint):
        if not _is_table(value):
            problems.append(f"{where} must be a table, got {value!r}")
            return value
        before = len(problems)
        made = _table(hint, value, f"{where}.", problems)  # type: ignore[arg-type]
        if len(problems) > before:
            # The table cannot be made; still report which of its values break their own rules.
            for key, item in made.items():
                problems += value_problems(item, rules_of(hint)[key], f"{where}.{key}")  # type: ignore[arg-type]
            return None
        return cast(Any, hint)(**made)
    if get_origin(hint) is tuple and isinstance(value, list):
        item = get_args(hint)[0]
        return tuple(
            _convert(entry, item, f"{where}[{number}]", problems)
            for number, entry in enumerate(value)
        )
    if type(None) in get_args(hint) and value is not None:
        return _convert(value, get_args(hint)[0], where, problems)
    wants_float = get_origin(hint) is Annotated and get_args(hint)[0] is float
    if wants_float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf  # reported as not finite
    return value


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


# -- devices --------------------------------------------------------------------------------------


def _devices(
    population: Any, singles: Any, seed: Any, problems: list[str]
) -> list[dict[str, Any]] | None:
    """Return one table a device: drawn from the population, then replaced by its own entry.

    None if there is no telling how many.
    """
    if isinstance(population, list):  # a resolved scenario spells every device out
        singles, population = population, {}
    if not _is_table(population) or not isinstance(singles, list):
        problems.append("devices must be a table [devices] and device a list of tables [[device]]")
        return None
    drawn = dict(population)
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
        if _is_table(rule):
            values = _draw(rule, key, count, seed, problems)
        else:
            hint = rules_of(Device)[key]
            own = list(value_problems(_convert(rule, hint, key, []), hint, f"devices.{key}"))
            problems += own
            values = [] if own else [rule] * count
        for table, value in zip(tables, values, strict=False):
            table[key] = value
        if not values and key in _STAND_INS:
            for table in tables:
                table[key] = _STAND_INS[key]
    for table, single in zip(tables, singles, strict=False):
        if _is_table(single):
            table.update(single)
        else:
            problems.append(f"device must be a list of tables, got {single!r}")
    for key, stand_in in _STAND_INS.items():
        if not any(key in table for table in tables):
            problems.append(f"devices.{key} is required, and missing")
            for table in tables:
                table[key] = stand_in
    return tables


def _draw(
    rule: Mapping[str, Any], key: str, count: int, seed: int, problems: list[str]
) -> list[float]:
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
    converted = [_convert(number, hint, where, []) for number in numbers]
    broken = [
        line
        for number, item in enumerate(converted)
        for line in value_problems(item, hint, f"{where}[{number}]")
    ]
    if not broken and name != "choice" and not converted[0] <= converted[1]:
        broken.append(f"{where} must be [low, high] with low <= high, got {numbers!r}")
    if not broken and name == "log_uniform" and not converted[0] > 0:
        broken.append(f"{where}[0] must be greater than 0, got {numbers[0]!r}")
    problems += broken
    if broken:
        return []
    values = []
    for device in range(count):
        rng = stream(seed, f"devices.{key}", device=device)
        low, high = converted[0], converted[-1]
        if name == "uniform":
            values.append(float(rng.uniform(low, high)))
        elif name == "log_uniform":
            values.append(math.exp(rng.uniform(math.log(low), math.log(high))))
        elif name == "disc":
            values.append(high * math.sqrt(rng.uniform((low / high) ** 2, 1.0)))
        else:
            values.append(float(converted[int(rng.integers(len(converted)))]))
    return values
