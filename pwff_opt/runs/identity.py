"""What identifies a training: a key of all that bears on what is learned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pwff_opt.data.models import model_config, model_source
from pwff_opt.registry import FAMILIES, RULES, STAGES, Registry
from pwff_opt.scenario import Data, Scenario
from pwff_opt.scenario.files import resolved
from pwff_opt.scenario.schedule import Schedule

# Raised whenever the trainer would learn something else from the same scenario and schedule.
TRAINER_VERSION = 8
# Raised whenever the same pairs of answers would make another reward model.
REWARDS_VERSION = 5


def learning_key(scenario: Scenario, schedule: Schedule) -> str:
    """Return what identifies a training: all that bears on what is learned and recorded.

    Cell, radio and device hardware are not in it: they change what a schedule costs, not what it
    learns. Local files are in it by what they hold and, of a folder, by their names in it, not by where
    they are. Rules, families and stages from outside the package are in it by their source. The number of
    rounds is that of the schedule, so a prefix has a key of its own.
    """
    return learning_keys(scenario, [schedule])[0]


def learning_keys(scenario: Scenario, schedules: Sequence[Schedule]) -> list[str]:
    """Return the keys of many schedules, what they have in common written down once."""
    relevant = _relevant(scenario)
    keys = []
    for schedule in schedules:
        text = json.dumps(relevant | {"schedule": str(schedule)}, sort_keys=True)
        keys.append(hashlib.sha256(text.encode()).hexdigest()[:16])
    return keys


def _relevant(scenario: Scenario) -> dict[str, Any]:
    """Return what of a scenario bears on what is learned."""
    everything = resolved(scenario)
    training = dict(everything["training"])
    for irrelevant in ("rounds", "feature_cache_byte", "checkpoint_byte"):
        del training[irrelevant]
    if not scenario.model.attention_window:
        for irrelevant in ("attention_window", "attention_sinks"):
            del everything["model"][irrelevant]
    models = [scenario.model.source]
    if _local_model(scenario.model.source, scenario.folder):
        del everything["model"]["source"]
    if scenario.data.source == "file":
        del everything["data"]["path"]
    more: dict[str, Any] = {}
    if STAGES[scenario.training.stage].aligns:
        models.append(scenario.alignment.reward_model)
        if _local_model(scenario.alignment.reward_model, scenario.folder):
            del everything["alignment"]["reward_model"]
        more = {
            "rewards": REWARDS_VERSION,
            "alignment": everything["alignment"],
            "helpfulness": [device.helpfulness for device in scenario.devices],
        }
    plugins = _plugins(scenario)
    if plugins:
        more["plugins"] = plugins
    return {
        "trainer": TRAINER_VERSION,
        "model": everything["model"],
        "data": everything["data"],
        "files": _digest(tuple(models), scenario.data, scenario.folder),
        "peft": everything["peft"],
        "training": training,
        "aggregation": everything["aggregation"],
        "seeds": {name: everything["seeds"][name] for name in ("data", "training")},
        "devices": len(scenario.devices),
    } | more


def _plugins(scenario: Scenario) -> dict[str, str]:
    """Return digests of the sources of what a scenario names from outside the package, by key.

    One that was edited then trains again. What comes with the package is told apart by
    ``TRAINER_VERSION``.
    """
    named: list[tuple[Registry[Any], str]] = [
        (RULES, scenario.aggregation.lora),
        (STAGES, scenario.training.stage),
    ]
    if any(FAMILIES.source(name) for name in FAMILIES):  # else there is no need to read the model
        config = model_config(model_source(scenario.model.source, folder=scenario.folder))
        kind = config.get("model_type")
        named += [(FAMILIES, name) for name, own in FAMILIES.items() if kind in own.model_types]
    digests = {registry.key: registry.source(name) for registry, name in named}
    return {key: digest for key, digest in digests.items() if digest}


def _local_model(source: str, folder: str) -> Path | None:
    """Return the folder that a model is read from, None if it is packaged or on the hub."""
    local = Path(folder) / source
    return local if local.is_dir() and model_source(source, folder=folder) == str(local) else None


@cache
def _digest(models: tuple[str, ...], data: Data, folder: str) -> str:
    """Return a digest of the local files that a scenario names, "" if it names none."""
    local = [found for source in models if (found := _local_model(source, folder))]
    # Every file: what a tokenizer reads has no one ending (tokenizer.model, merges.txt, ...).
    paths = [(path, "") for found in local for path in sorted(found.iterdir())]
    if data.source == "file":
        file = Path(folder) / data.path
        inside = sorted(file.rglob("*")) if file.is_dir() else []
        # What a file of several is called can tell what its rows are.
        paths += [(path, str(path.relative_to(file))) for path in inside] or [(file, "")]
    total = hashlib.sha256()
    for path, name in paths:
        if path.is_file():
            total.update(name.encode())
            with path.open("rb") as content:
                total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest() if paths else ""
