"""FLOPs of a forward pass and of a training step, counted as torch's own counter does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pwff_opt.costs.architecture import Architecture
from pwff_opt.costs.blocks import Blocks, FactorNames, check_states, lowest_trained
from pwff_opt.errors import DecisionError
from pwff_opt.scenario.schedule import LayerState

Quantity: TypeAlias = int | float | NDArray[Any]
"""One number, or one per device."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenCount:
    r"""What the work of a batch depends on: number of sequences and moments of their lengths.

    Linear work goes with :math:`\sum_n S_n` and attention with :math:`\sum_n S_n^2`, and FLOPs are
    linear in all fields. So several batches may be added, and expectations over random batches put
    in, without error. With padding, :math:`S_n` is the padded length.

    Parameters
    ----------
    sequences
        Number of sequences :math:`N`.
    tokens
        Sum of their lengths :math:`\sum_n S_n`.
    squared_tokens
        How often a token attends to another: the sum of their squared lengths :math:`\sum_n S_n^2`, or
        less where attention is sparse (:meth:`within`).
    scored
        Number of tokens :math:`Z` at which a language head says what comes next, or was masked; a
        classifier does not look at it.

    Each is a number, or an array of one per device.

    Examples
    --------
    >>> TokenCount.batch(sequences=2, length=8).squared_tokens
    128
    """

    sequences: Quantity
    tokens: Quantity
    squared_tokens: Quantity
    scored: Quantity = 0

    @classmethod
    def batch(cls, *, sequences: int, length: int, scored: int = 0) -> TokenCount:
        """Return the count of ``sequences`` sequences of ``length`` tokens, ``scored`` in each."""
        return cls(
            sequences=sequences,
            tokens=sequences * length,
            squared_tokens=sequences * length**2,
            scored=sequences * scored,
        )

    def within(self, span: int | None) -> TokenCount:
        r"""Return the count under sparse attention, where a token attends to ``span`` at most.

        .. math:: Q' = \min(Q,\; T \cdot \text{span})

        That is how torch counts attention in a band of equal width for all tokens, corners included; as
        it counts full attention, also by a decoder, all :math:`S_n^2` pairs, of which half are seen. Of
        sequences of unequal length, and of sampling, an upper bound. None: unchanged.
        """
        if span is None:
            return self
        tokens: Any = self.tokens
        fewest: Any = np.minimum(self.squared_tokens, tokens * span)
        whole = isinstance(self.squared_tokens, int) and isinstance(self.tokens, int)
        return replace(self, squared_tokens=int(fewest) if whole else fewest)

    def sampling(self, answer: int) -> TokenCount:
        r"""Return the count of sampling ``answer`` :math:`= A` tokens after each of these prompts.

        .. math:: T' = T + N(A-1), \quad Q' = Q + (A-1)\,T + N\,A(A-1)/2, \quad Z' = NA

        Keys and values are kept: a prompt goes through once, then every token but the last attends to
        what is before it and to itself. So :func:`forward_flops` of this is the work of sampling.
        """
        n: Any = self.sequences
        tokens: Any = self.tokens
        squared: Any = self.squared_tokens
        return TokenCount(
            sequences=n,
            tokens=tokens + n * (answer - 1),
            squared_tokens=squared + (answer - 1) * tokens + n * (answer * (answer - 1) // 2),
            scored=n * answer,
        )

    def answered(self, answer: int) -> TokenCount:
        r"""Return the count of these prompts, each followed by ``answer`` :math:`= A` scored tokens.

        .. math:: T' = T + NA, \quad Q' = Q + 2AT + NA^2, \quad Z' = NA
        """
        n: Any = self.sequences
        tokens: Any = self.tokens
        squared: Any = self.squared_tokens
        return TokenCount(
            sequences=n,
            tokens=tokens + n * answer,
            squared_tokens=squared + 2 * answer * tokens + n * answer**2,
            scored=n * answer,
        )


def forward_flops(
    architecture: Architecture,
    blocks: Blocks,
    *,
    rank: Quantity,
    present: Sequence[bool],
    count: TokenCount,
) -> Quantity:
    r"""Return the FLOPs of a forward pass (evaluation, a reference, a reward, sampling).

    .. math::
        F = \sum_l \big[2T(2ha + 2hk + m\,hi) + 4Qa
            + \pi_l\,(4Thw + 2T (r+q)(2h + a + k))\big] + F_\text{head}

    :math:`N, T, Q, Z`: the fields of ``count``; :math:`m` = 2 matrices in BERT's MLP, 3 in a gated
    one; :math:`\pi_l`: layer has blocks; :math:`q`: rank of the common LoRA;
    :math:`F_\text{head} = 2N(h^2 + hc)` for BERT (pooler and head see one token a sequence),
    :math:`2Thc` for a Llama classifier (Hugging Face scores every token), :math:`2ZhV` for a
    language head, and :math:`2Zh^2` for the dense layer that BERT's has.

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

    - head: its weight gradient, :math:`2Nhc` (BERT) or :math:`2Thc` (Llama), but for a language
      head, which is frozen; if any layer is trained, as much again (:math:`2ZhV` for a language
      head) for its input, and BERT's pooler :math:`2Nh^2`, or :math:`2Zh^2` before its language head;
    - layers above :math:`\ell`: the input gradient of every product, i.e. the forward FLOPs again
      with four attention products for two, and the weight gradient of the blocks that are trained;
    - layer :math:`\ell`, whose input needs no gradient: weight gradients of its blocks; input
      gradient of the adapter's up-projection; and with any LoRA, those of the adapter's
      down-projection, the MLP, the attention output, three attention products (the keys need no
      gradient), and of each factor B whose A is trained. Without LoRA nothing flows below the
      adapter;
    - nothing below :math:`\ell`.

    A factor that the rule of ``blocks`` holds fixed in this round (``Blocks.lora_trained``) has no
    weight gradient. Where there is neither adapter nor LoRA (width and ranks 0) no layer is trained;
    with a language head there is no backward pass then.

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
    total = total + work.head_weight
    lowest = lowest_trained(states)
    if lowest == architecture.layers:
        return total  # type: ignore[no-any-return]
    total = total + work.trains * work.head + work.trains * work.pooler
    trained = sum(state != LayerState.FROZEN for state in states)
    total += trained * (work.adapter + work.lora)
    for state in states:
        if state != LayerState.FROZEN:
            total -= work.fixed_factors(blocks.lora_trained(state))
    above = architecture.layers - lowest - 1
    total += work.trains * (above * (work.base + 4 * work.attention_product))
    total += sum(map(bool, present[lowest + 1 :])) * (work.adapter + work.lora)
    total += work.half_adapter
    total += work.has_lora * work.lowest_layer(blocks.lora_trained(states[lowest]))
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
        family = architecture.facts
        common = blocks.common_rank
        mlp = 2 * tokens * family.mlp_products * h * architecture.intermediate
        output = 2 * tokens * a * h
        half_adapter = 2 * tokens * h * blocks.adapter_width
        self.lora_a: Any = 2 * tokens * rank * 2 * h
        self.lora_b: Any = 2 * tokens * rank * (a + k)
        self.common_b: Any = 2 * tokens * common * (a + k)
        self.base: Any = mlp + output + 2 * tokens * h * (a + 2 * k)
        self.attention_product: Any = 2 * squared * a
        self.adapter: Any = 2 * half_adapter
        self.half_adapter: Any = half_adapter
        common_lora = 2 * tokens * common * 2 * h + self.common_b
        self.lora: Any = self.lora_a + self.lora_b + common_lora
        language = architecture.head == "language"
        if language:
            self.pooler: Any = family.transform_flops(architecture, count)
        elif architecture.pooling == "mean":
            self.pooler = 2 * tokens * h  # a product of weights [1, token] and [token, hidden]
        else:
            self.pooler = family.pooler_flops(architecture, count)
        classified: Any = tokens if family.classifies_tokens else sequences
        seen: Any = count.scored if language else classified
        self.head: Any = 2 * seen * h * architecture.classes
        self.head_weight: Any = 0 if language else self.head
        # With one rank a device, each of the next two is an array of one truth a device.
        self.has_lora: Any = rank + common > 0
        self.trains: Any = rank + common + blocks.adapter_width > 0
        self._above_lora: Any = half_adapter + mlp + output

    def fixed_factors(self, trained: FactorNames) -> Any:
        """Return the weight gradients of a layer's LoRA that are saved where not both learn."""
        return ("A" not in trained) * self.lora_a + ("B" not in trained) * self.lora_b

    def lowest_layer(self, trained: FactorNames) -> Any:
        """Return the input gradients of a lowest trained layer from its adapter down to its LoRAs."""
        # The gradient goes through a factor B only to reach an A that learns.
        factors_b = ("A" in trained) * self.lora_b + self.common_b
        return self._above_lora + factors_b + 3 * self.attention_product


def _check_rank(rank: Quantity) -> None:
    if np.any(np.asarray(rank) < 0):
        raise DecisionError(f"rank must not be negative, got {rank}")
