"""What the memory model of every family shares: the ledger, the sizes, the blocks' own tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pwff_opt.costs.architecture import Architecture
from pwff_opt.costs.blocks import FactorNames

BYTE = 4
"""Bytes of a float32."""


class Ledger:
    """Running and highest number of bytes that are allocated."""

    __slots__ = ("keeps_graph", "live", "peak")

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0
        self.keeps_graph = False
        """Whether the backward pass leaves the graph for another one."""

    def take(self, *sizes: int) -> None:
        """Allocate tensors, all alive together."""
        self.live += sum(sizes)
        self.peak = max(self.peak, self.live)

    def give(self, *sizes: int) -> None:
        """Release tensors."""
        self.live -= sum(sizes)

    def free(self, *sizes: int) -> None:
        """Release tensors that the graph holds, which a backward pass that comes again needs."""
        if not self.keeps_graph:
            self.give(*sizes)

    def swap(self, size: int) -> None:
        """Allocate a result and then release its equally large operand."""
        self.take(size)
        self.give(size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Bytes of one LoRA's tensors on queries and values, and its factors that learn."""

    product: int
    """A x."""
    a: int
    query_b: int
    value_b: int
    factors: FactorNames

    @classmethod
    def of(cls, architecture: Architecture, *, rank: int, token: int, factors: FactorNames) -> Lora:
        """Return the sizes at a rank, ``token`` being the bytes of a number for every token."""
        return cls(
            product=token * rank,
            a=BYTE * rank * architecture.hidden,
            query_b=BYTE * rank * architecture.query_width,
            value_b=BYTE * rank * architecture.key_value_width,
            factors=factors,
        )

    @property
    def learns_a(self) -> bool:
        return "A" in self.factors

    @property
    def learns_b(self) -> bool:
        return "B" in self.factors


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Bytes of the tensors of a layer, named by what they hold."""

    hidden: int
    query: int
    key: int
    inner: int
    scores: int
    mask: int
    token: int
    width: int
    down_weight: int
    down_bias: int
    up_bias: int
    # One sequence's heads are a view of its projection; several are not, and are copied for bmm.
    copies: bool
    grouped: bool
    # Heads that share keys get copies of them, except where all share one: that is a view.
    repeats: bool
    masked: bool

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        *,
        adapter_width: int,
        sequences: int,
        length: int,
        padded: bool,
    ) -> Sizes:
        """Return the sizes for a batch of ``sequences`` sequences of ``length`` tokens."""
        token = BYTE * sequences * length
        h, a, k = architecture.hidden, architecture.query_width, architecture.key_value_width
        return cls(
            hidden=token * h,
            query=token * a,
            key=token * k,
            inner=token * architecture.intermediate,
            scores=token * length * architecture.heads,
            mask=token * length,
            token=token,
            width=token * adapter_width,
            down_weight=BYTE * h * adapter_width,
            down_bias=BYTE * adapter_width,
            up_bias=BYTE * h,
            copies=sequences > 1,
            grouped=architecture.heads > architecture.key_value_heads,
            repeats=architecture.heads > architecture.key_value_heads > 1,
            # A causal mask is always made; an encoder makes one only where there is padding.
            masked=padded or architecture.facts.always_masked,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """What a layer's tensors are kept for.

    ``below``: its input needs a gradient, because a layer below is trained; ``trained``: its blocks
    are trained; ``adapter``: it has one in its forward pass; ``loras``: it has these, in the order
    of the forward pass, none of rank 0.
    """

    below: bool
    trained: bool
    adapter: bool
    loras: tuple[Lora, ...]

    @property
    def flows(self) -> bool:
        """Whether the gradient goes on from the adapter into the layer's MLP and attention."""
        return self.below or (self.trained and bool(self.loras))

    @property
    def keeps_lora_input(self) -> bool:
        """Whether the weight gradient of the A factors needs the input of the projections."""
        return any(lora.learns_a for lora in self.loras)


def projection_forward(ledger: Ledger, s: Sizes, m: Mode, *, out: int) -> None:
    """Query or value projection with its LoRAs; leaves the result alive."""
    ledger.take(out)  # W x
    for lora in m.loras:
        ledger.take(lora.product)  # A x, kept for the gradient of B
        ledger.take(out)  # B A x
        if not lora.learns_b:
            ledger.give(lora.product)
        ledger.swap(out)  # scaled
        ledger.take(out)  # sum
        ledger.give(out, out)  # W x, scaled


def projection_backward(
    ledger: Ledger, s: Sizes, m: Mode, projection: Literal["query", "value"]
) -> int:
    """Query or value projection; takes over the gradient of its output.

    Returns the number of gradients of its input it leaves alive: one per path, LoRAs and base. Where
    there are two LoRAs torch has added some of them up by then: an upper bound.
    """
    out = s.query if projection == "query" else s.key
    ledger.swap(out)  # heads merged
    gradients = 0
    for lora in reversed(m.loras):
        ledger.take(out)  # unscaled
        if lora is m.loras[0] and not m.below:
            ledger.give(out)  # the base projection passes nothing on
        to_a = m.below or lora.learns_a
        if lora.learns_b:
            ledger.take(lora.query_b if projection == "query" else lora.value_b)
        if to_a:
            ledger.take(lora.product)
        ledger.give(out)
        if lora.learns_b:
            ledger.free(lora.product)  # A x
        if lora.learns_a:
            ledger.take(lora.a)
        if m.below:
            ledger.take(s.hidden)
            gradients += 1
        if to_a:
            ledger.give(lora.product)
    if m.below:
        ledger.take(s.hidden)
        gradients += 1
        ledger.give(out)
    elif not m.loras:
        ledger.give(out)
    return gradients


def scores_forward(ledger: Ledger, s: Sizes) -> None:
    """Scaling, mask and softmax of the attention scores, each replacing the one before."""
    for _ in range(3 if s.masked else 2):
        ledger.swap(s.scores)


def scores_backward(ledger: Ledger, s: Sizes) -> None:
    """From the gradient of the attention weights to that of the unscaled scores."""
    ledger.take(s.scores)  # through the softmax
    ledger.give(s.scores)  # gradient of the weights
    ledger.free(s.scores)  # the weights
    ledger.swap(s.scores)  # unscaled


def adapter_forward(ledger: Ledger, s: Sizes, m: Mode) -> None:
    """Replace the layer's output by the adapter's, keeping what its gradients need."""
    if not m.adapter:
        return
    kept = m.trained or m.below
    ledger.take(s.width)  # down, kept for the GELU
    ledger.take(s.width)  # GELU, kept for the gradient of the up weight
    if not kept:
        ledger.give(s.width)
    ledger.take(s.hidden)  # up
    if not m.trained:
        ledger.give(s.width)
    ledger.take(s.hidden)  # residual sum
    ledger.give(s.hidden)  # up
    if not m.trained:
        ledger.give(s.hidden)  # input, kept for the gradient of the down weight


def adapter_backward(ledger: Ledger, s: Sizes, m: Mode) -> None:
    """Turn the gradient of the adapter's output into that of its input, or into nothing."""
    if m.adapter:
        ledger.take(s.width)  # gradient of the GELU
        if m.trained:
            ledger.take(s.down_weight, s.up_bias)  # as large as the up weight
            ledger.free(s.width)  # GELU
        ledger.take(s.width)  # gradient of down
        ledger.give(s.width)  # gradient of the GELU
        ledger.free(s.width)  # down
        if m.flows:
            ledger.take(s.hidden)
        if m.trained:
            ledger.take(s.down_weight, s.down_bias)
            ledger.free(s.hidden)  # input
        ledger.give(s.width)
        if m.flows:
            ledger.give(s.hidden)  # added into the residual's gradient in place
    if not m.flows:
        ledger.give(s.hidden)
