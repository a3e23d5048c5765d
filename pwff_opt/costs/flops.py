"""FLOPs of a forward pass and of a training step, counted as torch's own counter does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pwff_opt.costs.architecture import Architecture
from pwff_opt.costs.blocks import Blocks, check_states, lowest_trained
from pwff_opt.decision import LayerState
from pwff_opt.errors import DecisionError

Quantity: TypeAlias = int | float | NDArray[Any]
"""One number, or one per device."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenCount:
    r"""What the work of a batch depends on: number of sequences and moments of their lengths.

    Linear work goes with :math:`\sum_n S_n` and attention with :math:`\sum_n S_n^2`, and FLOPs are
    linear in all three fields. So several batches may be added, and expectations over random
    batches put in, without error. With padding, :math:`S_n` is the padded length.

    Parameters
    ----------
    sequences
        Number of sequences :math:`N`.
    tokens
        Sum of their lengths :math:`\sum_n S_n`.
    squared_tokens
        Sum of their squared lengths :math:`\sum_n S_n^2`.

    Each is a number, or an array of one per device.

    Examples
    --------
    >>> TokenCount.batch(sequences=2, length=8).squared_tokens
    128
    """

    sequences: Quantity
    tokens: Quantity
    squared_tokens: Quantity

    @classmethod
    def batch(cls, *, sequences: int, length: int) -> TokenCount:
        """Return the count of ``sequences`` sequences of ``length`` tokens each."""
        return cls(
            sequences=sequences, tokens=sequences * length, squared_tokens=sequences * length**2
        )


def forward_flops(
    architecture: Architecture,
    blocks: Blocks,
    *,
    rank: Quantity,
    present: Sequence[bool],
    count: TokenCount,
) -> Quantity:
    r"""Return the FLOPs of a forward pass (evaluation).

    .. math::
        F = \sum_l \big[2T(2ha + 2hk + m\,hi) + 4Qa
            + \pi_l\,(4Thw + 2T r(2h + a + k))\big] + F_\text{head}

    :math:`N, T, Q`: the fields of ``count``; :math:`m` = 2 matrices in BERT's MLP, 3 in a gated
    one; :math:`\pi_l`: layer has blocks; :math:`F_\text{head} = 2N(h^2 + hc)` for BERT (pooler
    and head see one token a sequence), :math:`2Thc` for Llama (Hugging Face scores every token).

    Parameters
    ----------
    architecture, blocks
        Sizes of the frozen model and of its blocks.
    rank
        LoRA rank, 0 for none; a number, or one per device.
    present
        Whether a layer has blocks in its forward pass. [layers]
    count
        Sequences and tokens; numbers, or one per device.

    Returns
    -------
    int, float or array
        FLOPs; a Python int if ``rank`` and ``count`` are, exact then.

    Raises
    ------
    DecisionError
        ``present`` has not one entry per layer, or a rank is negative.

    Notes
    -----
    Equal to ``torch.utils.flop_counter.FlopCounterMode`` with eager attention: two per
    multiply-accumulate of a matrix product, nothing for element-wise work.
    """
    check_states(architecture, [LayerState.FROZEN] * architecture.layers, present)
    _check_rank(rank)
    work = _Work(architecture, blocks, rank, count)
    with_blocks = sum(map(bool, present))
    total = architecture.layers * (work.base + 2 * work.attention_product)
    total += with_blocks * (work.adapter + work.lora)
    return total + work.pooler + work.head  # type: ignore[no-any-return]


def step_flops(
    architecture: Architecture,
    blocks: Blocks,
    *,
    rank: Quantity,
    states: Sequence[LayerState],
    present: Sequence[bool],
    count: TokenCount,
) -> Quantity:
    r"""Return the FLOPs of a training step: forward pass, loss, and backward pass.

    With :math:`\ell` the lowest layer that is not frozen, backward adds to forward

    - head: its weight gradient, :math:`2Nhc` (BERT) or :math:`2Thc` (Llama); if any layer is
      trained, as much for its input, and BERT's pooler :math:`2Nh^2`;
    - layers above :math:`\ell`: the input gradient of every product, i.e. the forward FLOPs again
      with four attention products for two, and the weight gradient of the blocks that are trained;
    - layer :math:`\ell`, whose input needs no gradient: weight gradients of its blocks; input
      gradient of the adapter's up-projection; and with LoRA, those of the adapter's
      down-projection, the MLP, the attention output, both B factors and three attention products
      (the keys need no gradient). Without LoRA nothing flows below the adapter;
    - nothing below :math:`\ell`.

    The optimiser does element-wise work only, which is not counted.

    Parameters
    ----------
    architecture, blocks, rank, count
        As in :func:`forward_flops`.
    states
        State of every layer. [layers]
    present
        Whether a layer has blocks in its forward pass; true wherever it is not frozen. [layers]

    Returns
    -------
    int, float or array
        FLOPs; a Python int if ``rank`` and ``count`` are, exact then.

    Raises
    ------
    DecisionError
        A length is not the number of layers, a trained layer is not present, or a rank is negative.

    Notes
    -----
    Equal to ``torch.utils.flop_counter.FlopCounterMode`` with eager attention in ``eval()`` mode.
    """
    check_states(architecture, states, present)
    total: Any = forward_flops(architecture, blocks, rank=rank, present=present, count=count)
    work = _Work(architecture, blocks, rank, count)
    total = total + work.head
    lowest = lowest_trained(states)
    if lowest == architecture.layers:
        return total  # type: ignore[no-any-return]
    total = total + work.head + work.pooler
    trained = sum(state != LayerState.FROZEN for state in states)
    total += trained * (work.adapter + work.lora)
    above = architecture.layers - lowest - 1
    total += above * (work.base + 4 * work.attention_product)
    total += sum(map(bool, present[lowest + 1 :])) * (work.adapter + work.lora)
    total += work.half_adapter
    total += work.has_lora * work.lowest_layer
    return total  # type: ignore[no-any-return]


class _Work:
    """FLOPs of each group of matrix products, once through."""

    def __init__(
        self, architecture: Architecture, blocks: Blocks, rank: Any, count: TokenCount
    ) -> None:
        h, a, k = architecture.hidden, architecture.query_width, architecture.key_value_width
        sequences: Any = count.sequences
        tokens: Any = count.tokens
        squared: Any = count.squared_tokens
        bert = architecture.family == "bert"
        mlp = 2 * tokens * (2 if bert else 3) * h * architecture.intermediate
        output = 2 * tokens * a * h
        half_adapter = 2 * tokens * h * blocks.adapter_width
        lora_b = 2 * tokens * rank * (a + k)
        self.base: Any = mlp + output + 2 * tokens * h * (a + 2 * k)
        self.attention_product: Any = 2 * squared * a
        self.adapter: Any = 2 * half_adapter
        self.lora: Any = 2 * tokens * rank * 2 * h + lora_b
        self.pooler: Any = 0
        if architecture.pooling == "mean":
            self.pooler = 2 * tokens * h  # a product of weights [1, token] and [token, hidden]
        elif bert:
            self.pooler = 2 * sequences * h * h
        self.head: Any = 2 * (sequences if bert else tokens) * h * architecture.classes
        self.has_lora: Any = rank > 0
        self.lowest_layer: Any = half_adapter + mlp + output + lora_b + 3 * self.attention_product
        self.half_adapter: Any = half_adapter


def _check_rank(rank: Quantity) -> None:
    if np.any(np.asarray(rank) < 0):
        raise DecisionError(f"rank must not be negative, got {rank}")
