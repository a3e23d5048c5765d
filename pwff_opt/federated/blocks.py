"""The trainable tensors of a device: names, fresh values, and a change of rank."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from pwff_opt.rng import stream

Tensors = dict[str, torch.Tensor]
"""Trainable tensors by name: ``adapter.{layer}.{part}``, ``lora.{layer}.{projection}.A|B``, ``head.{part}``.

Tensors are never written in place, so devices may share the very object of a tensor they agree on.
"""


def layer_of(name: str) -> int | None:
    """Return the layer a tensor belongs to, or None for the head."""
    kind, layer = name.split(".")[:2]
    return None if kind == "head" else int(layer)


def fresh_head(parts: Mapping[str, tuple[int, ...]], *, seed: int) -> Tensors:
    """Return a new classification head, the same for every device: N(0, 0.02^2), biases 0."""
    blocks = {}
    for item, (part, shape) in enumerate(sorted(parts.items())):
        rng = stream(seed, "head-init", item=item)
        values = rng.normal(0.0, 0.02, shape) if len(shape) > 1 else np.zeros(shape)
        blocks[f"head.{part}"] = torch.from_numpy(values.astype(np.float32))
    return blocks


def fresh_adapter(layer: int, *, hidden: int, width: int, seed: int) -> Tensors:
    """Return a new adapter of one layer, the same for every device; it computes the identity."""
    rng = stream(seed, "adapter-init", item=layer)
    return {
        f"adapter.{layer}.down.weight": _uniform(rng, (width, hidden)),
        f"adapter.{layer}.down.bias": torch.zeros(width),
        f"adapter.{layer}.up.weight": torch.zeros(hidden, width),
        f"adapter.{layer}.up.bias": torch.zeros(hidden),
    }


def fresh_lora(
    layer: int,
    rank: int,
    projections: Mapping[str, tuple[int, int]],
    *,
    seed: int,
    round: int,
    device: int,
) -> Tensors:
    """Return new LoRA factors of one layer (``projections``: name -> (inputs, outputs)).

    A: [rank, inputs], uniform in +-1/sqrt(inputs) as peft draws it; B: [outputs, rank], zero.
    """
    rng = stream(seed, "lora-init", round=round, device=device, item=layer)
    blocks: Tensors = {}
    for projection, (inputs, outputs) in sorted(projections.items()):
        blocks[f"lora.{layer}.{projection}.A"] = _uniform(rng, (rank, inputs))
        blocks[f"lora.{layer}.{projection}.B"] = torch.zeros(outputs, rank)
    return blocks


def resize_lora(
    a: torch.Tensor, b: torch.Tensor, fresh_a: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors of the rank of ``fresh_a`` that keep what ``b @ a`` has learned.

    Growing appends rows of ``fresh_a`` and zero columns: the function computed does not change,
    because alpha / r is the same for every rank. Shrinking keeps the largest singular values of
    ``b @ a``, the best approximation of that rank (Eckart and Young), split evenly between factors.
    """
    old, new = a.shape[0], fresh_a.shape[0]
    if new >= old:
        return (
            torch.cat([a, fresh_a[old:]]),
            torch.cat([b, torch.zeros(b.shape[0], new - old)], dim=1),
        )
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, v_t = torch.linalg.svd(r_b @ r_a.T)
    root = s[:new].sqrt()
    return root[:, None] * (v_t[:new] @ q_a.T), (q_b @ u[:, :new]) * root


def _uniform(rng: np.random.Generator, shape: tuple[int, int]) -> torch.Tensor:
    bound = shape[1] ** -0.5
    return torch.from_numpy(rng.uniform(-bound, bound, shape).astype(np.float32))
