"""The trainable tensors of a device: names, fresh values, and a change of rank."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from pwff_opt.rng import stream
from pwff_opt.scenario import Peft

Tensors = dict[str, torch.Tensor]
"""A device's tensors by name.

``adapter.{layer}.{part}``, ``lora.{layer}.{projection}.A|B`` (the LoRA that decisions size),
``common.{layer}.{projection}.A|B`` (the one of fixed rank beside it), ``head.{part}``; and, not trained
but left behind by some aggregation rules, ``delta.{layer}.{projection}``, which is added to the
frozen weight.

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
    device: int | None,
    kind: str = "lora",
) -> Tensors:
    """Return new LoRA factors of one layer (``projections``: name -> (inputs, outputs)).

    A: [rank, inputs], uniform in +-1/sqrt(inputs) as peft draws it; B: [outputs, rank], zero. With
    ``device`` None the draw is common to all devices, and that of a lower rank its first rows.
    """
    blocks: Tensors = {}
    for item, (projection, (inputs, outputs)) in enumerate(sorted(projections.items())):
        purpose = f"{kind}-init" if device is not None else f"{kind}-common-init"
        place = layer * len(projections) + item
        rng = stream(seed, purpose, round=round, device=device or 0, item=place)
        blocks[f"{kind}.{layer}.{projection}.A"] = _uniform(rng, (rank, inputs))
        blocks[f"{kind}.{layer}.{projection}.B"] = torch.zeros(outputs, rank)
    return blocks


def lora_scale(peft: Peft, rank: int) -> float:
    r"""Return what multiplies B A at a rank: :math:`s`, :math:`\alpha/r` or :math:`\alpha/\sqrt r`.

    The last keeps activations and gradients of one size at any rank (rsLoRA, arXiv 2312.03732).
    """
    if peft.lora_scaling == "constant":
        return peft.lora_scale
    return peft.lora_alpha / (rank if peft.lora_scaling == "standard" else math.sqrt(rank))


def resize_lora(
    a: torch.Tensor,
    b: torch.Tensor,
    fresh_a: torch.Tensor,
    *,
    stretch: float = 1.0,
    by_slices: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors of the rank of ``fresh_a`` that keep what ``b @ a`` has learned.

    ``stretch``: the scale of the old rank over that of the new one, which goes into ``b``. Growing
    appends rows of ``fresh_a`` and zero columns: the function computed does not change. Shrinking
    keeps the largest singular values of ``b @ a``, the best approximation of that rank (Eckart and
    Young), split evenly between factors; with ``by_slices`` the first rows and columns, so that a
    factor common to several devices stays common.
    """
    old, new = a.shape[0], fresh_a.shape[0]
    b = b if stretch == 1.0 else b * stretch
    if new < old and by_slices:
        return a[:new], b[:, :new].contiguous()
    if new < old:
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.T)
        u, s, v_t = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        # A direction of singular value 0 would be zero in both factors and never learn again.
        noise = torch.finfo(s.dtype).eps * max(b.shape[0], a.shape[1]) * s.max()
        found = min(new, int((s > noise).sum()))
        root = s[:found].sqrt()
        a, b = root[:, None] * (v_t[:found] @ q_a.T), (q_b @ u[:, :found]) * root
    kept = a.shape[0]
    return (
        torch.cat([a, fresh_a[kept:]]),
        torch.cat([b, torch.zeros(b.shape[0], new - kept)], dim=1),
    )


def _uniform(rng: np.random.Generator, shape: tuple[int, int]) -> torch.Tensor:
    bound = shape[1] ** -0.5
    return torch.from_numpy(rng.uniform(-bound, bound, shape).astype(np.float32))
