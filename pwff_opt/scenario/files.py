"""Scenario files: TOML in, TOML and JSON out.

A file has the tables and keys of :class:`pwff_opt.scenario.Scenario`. Only devices may be written in
a second way: ``[devices]`` holds their number and, for each quantity, a value for all or a
distribution to draw from; ``[[device]]`` entries, where present, replace what was drawn, one by one.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from pwff_opt.errors import ScenarioError
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.conversion import converted_table, is_table
from pwff_opt.scenario.devices import device_tables

BUILT_IN = files("pwff_opt.scenario") / "built_in"


def built_in_names() -> list[str]:
    """Return the names of the scenarios that come with the package."""
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
    seed = document.get("seeds", {}).get("devices", 1) if is_table(document.get("seeds")) else 1
    document["devices"] = device_tables(population, singles, seed, problems)
    document["folder"] = str(Path(folder).resolve())
    values = converted_table(Scenario, document, "", problems)
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
    made = converted_table(Scenario, dict(values), "", problems)
    if problems:
        raise ScenarioError("resolved scenario", problems)
    return Scenario(**made)
