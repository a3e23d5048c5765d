"""Bits a device sends in a round, and bits the base station sends to all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pwff_opt.costs.architecture import Architecture
from pwff_opt.costs.blocks import (
    Blocks,
    FactorNames,
    adapter_parameters,
    check_states,
    head_parameters,
    lora_parameters,
)
from pwff_opt.errors import DecisionError
from pwff_opt.registry import RULES
from pwff_opt.scenario import UploadDtype
from pwff_opt.scenario.schedule import LayerState

_UPLOAD_BITS: dict[UploadDtype, int] = {"float32": 32, "float16": 16, "int8": 8}
_SCALE_BITS: dict[UploadDtype, int] = {"float32": 0, "float16": 0, "int8": 32}
# An average of 8-bit values is on no 8-bit grid, so it is sent in full.
_BROADCAST_BITS: dict[UploadDtype, int] = {"float32": 32, "float16": 16, "int8": 32}


def uplink_payload_bit(
    architecture: Architecture, blocks: Blocks, states: Sequence[LayerState], *, rank: int
) -> int:
    r"""Return the payload of one device's upload in a round.

    .. math:: s = \sum_{x \text{ sent}} (\beta\,|x| + \gamma)

    Sent are, of every aggregated layer, the adapter (:math:`w h`, :math:`w`, :math:`h w`, :math:`h`
    parameters) if it is shared, the factors ``blocks.lora_uploaded`` of the LoRA on queries and on
    values (A: :math:`r h` each; B: :math:`r a`, :math:`r k`), and both factors of the common LoRA;
    and the classification head's weight and bias if it is shared.

    Parameters
    ----------
    architecture, blocks
        Sizes; what is shared; :math:`\beta` = 32, 16 or 8 bit a parameter for float32, float16 or
        int8, and :math:`\gamma` = 32 bit a tensor, its scale, for int8.
    states
        State of every layer. [layers]
    rank
        LoRA rank of this device; 0: nothing of that LoRA is sent.

    Returns
    -------
    int
        Payload [bit]: 8 x the bytes of the tensors as safetensors stores them. The header of such a
        file is not in it: about 90 byte per tensor, measured 2,176 byte for six adapters (24
        tensors) and 144 byte for a head alone; framing is up to the protocol.

    Raises
    ------
    DecisionError
        ``states`` has not one entry per layer, or the rank is negative.
    """
    check_states(architecture, states)
    _check_ranks([rank])
    bits, scale = _UPLOAD_BITS[blocks.upload_dtype], _SCALE_BITS[blocks.upload_dtype]
    layer = [bits * size + scale for size in _layer_tensors(architecture, blocks, rank)]
    head = [bits * size + scale for size in _head_tensors(architecture)]
    return _aggregated(states) * sum(layer) + blocks.head_shared * sum(head)


def broadcast_payload_bit(
    architecture: Architecture,
    blocks: Blocks,
    states: Sequence[LayerState],
    *,
    ranks: Sequence[int],
) -> int:
    r"""Return the size of the one transmission that brings every participant the new shared blocks.

    Shared adapters, common LoRA and head: as in :func:`uplink_payload_bit`. The LoRA that decisions
    size, as its rule says, for each projection of :math:`n` inputs and :math:`m` outputs in an aggregated
    layer:

    ==================================  ============================================================
    personal                            0
    fedit, hetlora, hetlora-norm,       :math:`r(m + n)`, :math:`r = \max_k r_k`: a device cuts its
    raflora, flexlora                   part out (rows and columns; for flexlora the leading terms
                                        of one SVD)
    ffa, fedsa, rolora                  the factor that is averaged: :math:`rm`; :math:`rn`; one of
                                        them
    flora                               :math:`\min(\sum_k r_k (m + n),\; m n)`: all factors
                                        stacked, or their product, whichever is smaller
    fedex                               :math:`\min(\sum_k r_k (m + n),\; r(m + n) + m n)`: all
                                        factors stacked, or mean factors and residual
    ==================================  ============================================================

    Parameters
    ----------
    architecture, blocks, states
        As in :func:`uplink_payload_bit`.
    ranks
        LoRA ranks :math:`r_k` of the devices that take part in the round.

    Returns
    -------
    int
        Payload [bit], 32 bit a parameter, or 16 for float16. What was uploaded as int8 is sent as
        float32: an average of 8-bit values is on no 8-bit grid.

    Raises
    ------
    DecisionError
        ``states`` has not one entry per layer, no device takes part, or a rank is negative.
    """
    check_states(architecture, states)
    _check_ranks(ranks)
    layer = blocks.adapter_shared * adapter_parameters(architecture, blocks)
    layer += lora_parameters(architecture, blocks.common_rank)
    rule = RULES[blocks.lora_rule]
    for outputs in (architecture.query_width, architecture.key_value_width):
        layer += rule.broadcast_parameters(
            ranks, inputs=architecture.hidden, outputs=outputs, round=blocks.round
        )
    shared = _aggregated(states) * layer + blocks.head_shared * head_parameters(architecture)
    return _BROADCAST_BITS[blocks.upload_dtype] * shared


def _aggregated(states: Sequence[LayerState]) -> int:
    return sum(state == LayerState.AGGREGATED for state in states)


def _layer_tensors(architecture: Architecture, blocks: Blocks, rank: int) -> Iterator[int]:
    """Yield the number of entries of every tensor that is uploaded of an aggregated layer."""
    h, w = architecture.hidden, blocks.adapter_width
    if blocks.adapter_shared and w:
        yield from (w * h, w, h * w, h)
    loras: list[tuple[int, FactorNames]] = [
        (rank, blocks.lora_uploaded),
        (blocks.common_rank, "AB"),
    ]
    for r, factors in loras:
        for out in (architecture.query_width, architecture.key_value_width):
            if r and "A" in factors:
                yield r * h
            if r and "B" in factors:
                yield out * r


def _head_tensors(architecture: Architecture) -> Iterator[int]:
    if architecture.head == "language":
        return
    yield architecture.hidden * architecture.classes
    if architecture.facts.head_bias:
        yield architecture.classes


def _check_ranks(ranks: Sequence[int]) -> None:
    if not ranks:
        raise DecisionError("ranks must hold at least one device, got none")
    if min(ranks) < 0:
        raise DecisionError(f"rank must not be negative, got {min(ranks)}")
