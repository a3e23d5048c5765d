"""A device's model as two adapters that peft loads: LoRA with the head, and bottleneck adapters."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, TaskType, get_peft_model
from torch import nn

from pwff_opt.data.models import model_source
from pwff_opt.errors import ModelError
from pwff_opt.federated.export.peft_bottleneck import BottleneckConfig
from pwff_opt.federated.export.sparse import attend_within
from pwff_opt.federated.model.adapters import pool_by_mean
from pwff_opt.federated.model.attention import Window
from pwff_opt.federated.model.backbone import (
    load_classifier,
    load_language_model,
    lora_config,
)
from pwff_opt.federated.model.blocks import Tensors, lora_scale
from pwff_opt.registry import FAMILIES
from pwff_opt.scenario import Peft

LORA = "lora"
BOTTLENECK = "bottleneck"
INFO = "device.json"
EXCHANGE = ".exchange"
"""A folder has it while its parts are exchanged, and after a kill then: it is an export all the same."""


def save_device_model(
    folder: Path,
    blocks: Tensors,
    *,
    source: str,
    family: str,
    pooling: str,
    class_names: Sequence[str] | None,
    window: Window | None,
    system_prompt: str | None,
    peft: Peft,
) -> None:
    """Write one device's blocks as two peft adapters, and what else the model needs as a JSON file.

    Both folders are always there, so that every device loads in the same way: a device without LoRA
    has one of rank 1, one without bottleneck adapters one of width 1, and they are zero.

    Written over an older export, it takes its place at the end: killed before that, the older one is
    left; killed while its parts are exchanged, the folder has no JSON file, and does not load.

    ``source``: a name as in a scenario, or a folder. ``class_names`` None: a language model with its own
    head, which stays as it is. ``window``: of sparse attention, if it learned with that.
    ``system_prompt``: what it was given as the system's message in every prompt, also where that is
    empty; None: it learned without prompts.

    Raises
    ------
    ModelError
        The folder cannot be made, or holds something else than an export.
    """
    _claim(folder)
    model = _base(source, class_names)
    info = {
        "model": source,
        "classes": None if class_names is None else list(class_names),
        "pooling": pooling,
        "pad_token_id": model.config.pad_token_id,
        "attention_window": window.width if window else 0,
        "attention_sinks": window.sinks if window else 0,
        "system_prompt": system_prompt,
    }
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as name, warnings.catch_warnings():
        # Of peft, about transformers: nothing that whoever saves a model could change.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        new = Path(name)
        lora = _with_lora(model, blocks, family, peft, classifies=class_names is not None)
        lora.save_pretrained(new / LORA)
        _with_bottlenecks(lora.unload(), blocks).save_pretrained(new / BOTTLENECK)
        (new / INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        (folder / EXCHANGE).touch()
        (folder / INFO).unlink(missing_ok=True)
        for part in (LORA, BOTTLENECK):
            if (folder / part).exists():
                shutil.rmtree(folder / part)
            (new / part).rename(folder / part)
        (new / INFO).rename(folder / INFO)
        (folder / EXCHANGE).unlink()


def _claim(folder: Path) -> None:
    """Make the folder, unless it is there; refuse one with files that are not of an export."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"{folder} must be a folder that can be written: {error}") from error
    ours = any((folder / name).is_file() for name in (INFO, EXCHANGE))
    if not ours and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ModelError(
            f"{folder} must be new, empty or the folder of an older export (with {INFO}), got one with "
            "other files; choose another"
        )


def _base(source: str, class_names: Sequence[str] | None) -> Any:
    found = model_source(source)
    if class_names is None:
        return load_language_model(found)
    return load_classifier(found, classes=len(class_names))


def _with_lora(
    model: Any, blocks: Tensors, family: str, peft: Peft, *, classifies: bool
) -> PeftModel:
    """Return the model with a device's LoRA and, if it classifies, head."""
    factors = _factors(blocks, peft)
    ranks = {name: len(a) for name, (a, _) in factors.items()}
    rank = max(ranks.values(), default=1)
    others = {_pattern(name): r for name, r in ranks.items() if r != rank}
    head = FAMILIES[family].head
    task = (
        TaskType.SEQ_CLS if classifies else TaskType.CAUSAL_LM if FAMILIES[family].causal else None
    )
    config = lora_config(
        family,
        rank,
        1.0,  # the scale is in B
        task_type=task,
        modules_to_save=[head] if classifies else None,
        layers_to_transform=sorted({int(name.split(".")[0]) for name in ranks}) or [0],
        rank_pattern=others,
        alpha_pattern=others,
    )
    peft_model = get_peft_model(model, config)
    values = {
        rf"{_pattern(name)}\.lora_{factor}\.default\.weight": tensor
        for name, pair in factors.items()
        for factor, tensor in zip("AB", pair, strict=True)
    } | {
        rf"\.{head}\.modules_to_save\.default\.{name.split('.')[1]}": tensor
        for name, tensor in blocks.items()
        if name.startswith("head.")
    }
    _fill(peft_model, values, blank=".lora_")
    return peft_model


def _with_bottlenecks(model: Any, blocks: Tensors) -> PeftModel:
    """Return the model with a device's bottleneck adapters."""
    values = {}
    layers, width = set(), 1
    for name, tensor in blocks.items():
        if name.startswith("adapter."):
            _, layer, part, kind = name.split(".")
            values[rf"\.{layer}\.bottleneck\.bottleneck_{part}\.default\.{kind}"] = tensor
            layers.add(int(layer))
            if (part, kind) == ("down", "bias"):
                width = len(tensor)
    config = BottleneckConfig(width=width, layers_to_transform=sorted(layers) or [0])
    peft_model = get_peft_model(model, config)
    _fill(peft_model, values, blank=".bottleneck_")
    return peft_model


def _fill(model: PeftModel, values: Tensors, *, blank: str) -> None:
    """Set parameters by the end of their names, after all with ``blank`` in theirs are made zero."""
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in named.items():
            if blank in name:
                parameter.zero_()
        for pattern, tensor in values.items():
            _only(named, pattern).copy_(tensor)


def _pattern(name: str) -> str:
    """Return what the module of ``{layer}.{projection}`` is called, as a regular expression."""
    layer, projection = name.split(".")
    return rf".*\.{layer}\..*\.{projection}"


def _factors(blocks: Tensors, peft: Peft) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return all that is added to projections, as factors of scale 1 by ``{layer}.{projection}``.

    LoRA, common LoRA and what aggregation left behind are one LoRA of the sum of their ranks.
    """
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for name, tensor in sorted(blocks.items()):
        kind, layer, projection, *factor = [*name.split("."), ""]
        if kind == "delta":
            m, n = tensor.shape
            pair = (torch.eye(n), tensor) if n <= m else (tensor, torch.eye(m))
        elif kind in ("lora", "common") and factor[0] == "A":
            b = blocks[f"{name[:-1]}B"]
            pair = (tensor, b * lora_scale(peft, len(tensor)))
        else:
            continue
        parts.setdefault(f"{layer}.{projection}", []).append(pair)
    return {
        name: (torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1))
        for name, pairs in parts.items()
    }


def load_device_model(folder: str | Path) -> PeftModel:
    """Load what :func:`save_device_model` wrote; without this function it takes these steps::

    import pwff_opt.federated.export.peft_bottleneck  # peft knows bottleneck adapters from here on

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=classes)
    # or, where device.json has no classes: AutoModelForCausalLM.from_pretrained(base); of an encoder
    # AutoModelForMaskedLM
    pool_by_mean(model)  # where device.json says so
    model.config.pad_token_id = ...  # the one in device.json; only decoders need it
    model = PeftModel.from_pretrained(model, f"{folder}/lora").merge_and_unload()
    model = PeftModel.from_pretrained(model, f"{folder}/bottleneck").eval()

    LoRA is merged because a peft model holds adapters of one kind. Where device.json has an
    ``attention_window``, a last step is :func:`pwff_opt.federated.export.sparse.attend_within`.
    """
    folder = Path(folder)
    try:
        info: dict[str, Any] = json.loads((folder / INFO).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} must hold a device model ({INFO}): {error}") from error
    model = _base(info["model"], info["classes"])
    model.config.pad_token_id = info["pad_token_id"]
    if info["pooling"] == "mean" and info["classes"] is not None:
        pool_by_mean(model)
    model = PeftModel.from_pretrained(model, folder / LORA).merge_and_unload()
    loaded = PeftModel.from_pretrained(model, folder / BOTTLENECK).eval()
    if info["attention_window"]:
        window = Window(width=info["attention_window"], sinks=info["attention_sinks"])
        attend_within(loaded.get_base_model(), window)
    return loaded


def _only(parameters: dict[str, nn.Parameter], pattern: str) -> nn.Parameter:
    """Return the one parameter whose name ends as ``pattern`` says."""
    found = [value for name, value in parameters.items() if re.search(f"{pattern}$", name)]
    if len(found) != 1:
        raise ModelError(f"one parameter must match {pattern!r}, found {len(found)}")
    return found[0]
