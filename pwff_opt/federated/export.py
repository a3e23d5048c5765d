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
from pwff_opt.federated.backbone import HEADS, load_classifier, lora_config
from pwff_opt.federated.blocks import Tensors

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
    lora_scale: float,
) -> None:
    """Write one device's blocks: LoRA and head as a peft adapter, bottleneck adapters beside it.

    ``adapter_config.json`` and ``adapter_model.safetensors`` are peft's own; a device without LoRA
    has a rank-1 LoRA of zeros there, so that the head still travels peft's way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lora_layers = sorted({int(name.split(".")[1]) for name in blocks if name.startswith("lora.")})
    rank = next(
        (t.shape[0] for n, t in blocks.items() if n.startswith("lora.") and n.endswith("A")), 1
    )
    model = load_classifier(source, classes=len(class_names))
    head = HEADS[family]
    config = lora_config(
        family,
        rank,
        lora_scale,
        task_type=TaskType.SEQ_CLS,
        modules_to_save=[head],
        layers_to_transform=lora_layers or [0],
    )
    peft_model = get_peft_model(model, config)
    named = dict(peft_model.named_parameters())
    with torch.no_grad():
        for name, parameter in named.items():
            if ".lora_A." in name or ".lora_B." in name:
                parameter.zero_()
        for name, tensor in blocks.items():
            kind, *rest = name.split(".")
            if kind == "head":
                target = rf"\.{head}\.modules_to_save\.default\.{rest[0]}"
            elif kind == "lora":
                layer, projection, factor = rest
                target = rf"\.{layer}\..*\.{projection}\.lora_{factor}\.default\.weight"
            else:
                continue
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
