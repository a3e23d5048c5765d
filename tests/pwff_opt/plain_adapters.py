"""Bottleneck adapters hooked on to plain transformers models: what the trainer is checked against."""

from __future__ import annotations

from typing import Any

from pwff_opt.federated.model.adapters import BottleneckAdapter, transformer_layers


def _apply_adapter(layer: Any, _args: Any, output: Any) -> Any:
    adapter = layer.adapter
    if not adapter.enabled:
        return output
    if isinstance(output, tuple):
        return (adapter(output[0]), *output[1:])
    return adapter(output)


def attach_adapters(model: Any, width: int) -> list[Any]:
    """Register an adapter as ``layer.adapter`` on every transformer layer; return them in order."""
    parent, name = transformer_layers(model)
    adapters: list[Any] = []
    for layer in getattr(parent, name):
        layer.adapter = BottleneckAdapter(model.config.hidden_size, width)
        layer.adapter.enabled = True
        layer.register_forward_hook(_apply_adapter)
        adapters.append(layer.adapter)
    return adapters
