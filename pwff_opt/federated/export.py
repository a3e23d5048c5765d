"""A device's model as files that plain transformers and peft load, with our adapter class."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from pwff_opt.errors import ModelError
from pwff_opt.federated.adapters import attach_adapters, pool_by_mean
from pwff_opt.federated.backbone import load_classifier, lora_config
from pwff_opt.federated.blocks import Tensors, lora_scale
from pwff_opt.federated.families import HEADS
from pwff_opt.scenario import Peft

ADAPTER_WEIGHTS = "bottleneck_adapters.safetensors"
ADAPTER_CONFIG = "bottleneck_adapters.json"


def save_device_model(
    folder: Path,
    blocks: Tensors,
    *,
    source: str,
    family: str,
    pooling: str,
    class_names: Sequence[str],
    peft: Peft,
) -> None:
    """Write one device's blocks: LoRA and head as a peft adapter, bottleneck adapters beside it.

    ``adapter_config.json`` and ``adapter_model.safetensors`` are peft's own; a device without LoRA
    has a rank-1 LoRA of zeros there, so that the head still travels peft's way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    factors = _factors(blocks, peft)
    ranks = {name: len(a) for name, (a, _) in factors.items()}
    rank = max(ranks.values(), default=1)
    others = {_pattern(name): r for name, r in ranks.items() if r != rank}
    model = load_classifier(source, classes=len(class_names))
    head = HEADS[family]
    config = lora_config(
        family,
        rank,
        1.0,  # the scale is in B
        task_type=TaskType.SEQ_CLS,
        modules_to_save=[head],
        layers_to_transform=sorted({int(name.split(".")[0]) for name in ranks}) or [0],
        rank_pattern=others,
        alpha_pattern=others,
    )
    peft_model = get_peft_model(model, config)
    named = dict(peft_model.named_parameters())
    with torch.no_grad():
        for name, parameter in named.items():
            if ".lora_A." in name or ".lora_B." in name:
                parameter.zero_()
        for name, pair in factors.items():
            for factor, tensor in zip("AB", pair, strict=True):
                target = rf"{_pattern(name)}\.lora_{factor}\.default\.weight"
                _only(named, target).copy_(tensor)
        for name, tensor in blocks.items():
            if name.startswith("head."):
                target = rf"\.{head}\.modules_to_save\.default\.{name.split('.')[1]}"
                _only(named, target).copy_(tensor)
    peft_model.save_pretrained(folder)
    adapters = {
        name: tensor.contiguous() for name, tensor in blocks.items() if name.startswith("adapter.")
    }
    save_file(adapters, folder / ADAPTER_WEIGHTS)
    layers = sorted({int(name.split(".")[1]) for name in adapters})
    width = adapters[f"adapter.{layers[0]}.down.weight"].shape[0] if layers else 0
    text = json.dumps(
        {
            "model": source,
            "classes": list(class_names),
            "pooling": pooling,
            "pad_token_id": model.config.pad_token_id,
            "layers": layers,
            "width": width,
        },
        indent=2,
    )
    (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")


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


def load_device_model(folder: Path) -> PeftModel:
    """Load what :func:`save_device_model` wrote; the same by hand takes these three steps::

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=classes)
    load_adapters(model, folder)
    model = PeftModel.from_pretrained(model, folder).eval()
    """
    info = _adapter_info(folder)
    model = load_classifier(info["model"], classes=len(info["classes"]))
    load_adapters(model, folder)
    return PeftModel.from_pretrained(model, folder).eval()


def load_adapters(model: Any, folder: Path) -> None:
    """Attach the bottleneck adapters saved in ``folder`` to a model, and pool as it was trained."""
    info = _adapter_info(folder)
    model.config.pad_token_id = info["pad_token_id"]
    if info["pooling"] == "mean":
        pool_by_mean(model)
    layers = set(info["layers"])
    for layer, adapter in enumerate(attach_adapters(model, max(1, int(info["width"])))):
        adapter.enabled = layer in layers
        if adapter.enabled:
            prefix = f"adapter.{layer}."
            stored = load_file(folder / ADAPTER_WEIGHTS)
            adapter.load_state_dict(
                {
                    name.removeprefix(prefix): t
                    for name, t in stored.items()
                    if name.startswith(prefix)
                }
            )


def _adapter_info(folder: Path) -> dict[str, Any]:
    try:
        info: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder} must hold a device model ({ADAPTER_CONFIG}): {error}"
        ) from error
    return info


def _only(parameters: dict[str, nn.Parameter], pattern: str) -> nn.Parameter:
    """Return the one parameter whose name ends as ``pattern`` says."""
    found = [value for name, value in parameters.items() if re.search(f"{pattern}$", name)]
    if len(found) != 1:
        raise ModelError(f"one parameter must match {pattern!r}, found {len(found)}")
    return found[0]
