"""Tensors of Llama in the order torch makes and releases them, eager attention."""

from __future__ import annotations

from pwff_opt.costs.architecture import Architecture
from pwff_opt.costs.ledger import (
    BYTE,
    Ledger,
    Mode,
    Sizes,
    adapter_backward,
    adapter_forward,
    projection_backward,
    projection_forward,
    scores_backward,
    scores_forward,
)
from pwff_opt.costs.memory import Batch


def buffers_byte(architecture: Architecture) -> int:
    """Return the bytes of rotary frequencies, two copies."""
    return 2 * BYTE * (architecture.head_dim // 2)


def embed_forward(ledger: Ledger, architecture: Architecture, batch: Batch) -> None:
    """Allocate the rotations of all positions."""
    ledger.take(2 * BYTE * batch.length * architecture.head_dim)  # cosines, sines


def holds_embeddings(lowest: Mode) -> bool:
    """Return true: the embeddings are tensors of their own until all layers are done."""
    return True


def top_forward(ledger: Ledger, s: Sizes, trains: bool) -> None:
    """Pass through the last norm, whose input is kept for its gradient."""
    norm_forward(ledger, s, kept=trains)
    if not trains:
        ledger.give(s.hidden)  # input of the norm


def top_backward(ledger: Ledger, s: Sizes) -> None:
    """Pass the gradient through the last norm."""
    norm_backward(ledger, s, residual=False)


def language_forward(ledger: Ledger, batch: Batch, trains: bool) -> None:
    """Make logits of the scored tokens' hidden states, which stay alive."""
    ledger.take(batch.logits)


def language_backward(ledger: Ledger, batch: Batch) -> None:
    """Do nothing: the head over the vocabulary sees the hidden states as they are."""


def classifier_forward(
    ledger: Ledger, architecture: Architecture, batch: Batch, trains: bool
) -> None:
    """Make the classes' scores of every token."""
    logits = batch.sizes.token * architecture.classes
    ledger.take(logits)  # the last hidden state stays for the head
    ledger.give(logits)


def classifier_backward(
    ledger: Ledger, architecture: Architecture, batch: Batch, trains: bool, parameters: int
) -> None:
    """Leave alive the gradients of the head, of ``parameters`` bytes, and of the last layer's output."""
    s = batch.sizes
    logits = s.token * architecture.classes
    ledger.take(logits, parameters)
    if trains:
        ledger.take(s.hidden)
    ledger.give(logits, s.hidden)  # last hidden state
    if trains:
        norm_backward(ledger, s, residual=False)


def layer_forward(ledger: Ledger, s: Sizes, m: Mode) -> None:
    """Replace the layer's input, alive on entry, by its output; leave alive what backward needs."""
    norm_forward(ledger, s, kept=m.below)
    _attention_forward(ledger, s, m)
    ledger.take(s.hidden)  # residual sum, kept for the second norm
    ledger.give(s.hidden)  # output projection
    norm_forward(ledger, s, kept=m.flows)
    ledger.take(s.inner)  # gate, kept for the SiLU
    ledger.take(s.inner)  # SiLU, kept for the gradient of up
    if not m.flows:
        ledger.give(s.inner)
    ledger.take(s.inner)  # up, kept for the gradient of the SiLU
    ledger.take(s.inner)  # their product; the frozen down projection does not need it
    if not m.flows:
        ledger.give(s.inner, s.inner)
    ledger.take(s.hidden)  # down
    ledger.give(s.inner, s.hidden)  # product, normalised
    ledger.swap(s.hidden)  # residual sum, down
    if not m.flows:
        ledger.give(s.hidden, s.scores)  # first residual sum; attention weights, held by the frame
    adapter_forward(ledger, s, m)
    if not m.below:
        ledger.give(s.hidden)  # input of the layer, else kept for the first norm


def layer_backward(ledger: Ledger, s: Sizes, m: Mode) -> None:
    """Replace the gradient of the output, alive on entry, by that of the input if it is needed."""
    adapter_backward(ledger, s, m)
    if not m.flows:
        return
    ledger.take(s.inner)  # gradient of the product
    ledger.take(s.inner, s.inner)  # gradients of SiLU and up
    ledger.give(s.inner)  # gradient of the product
    ledger.free(s.inner, s.inner)  # SiLU, up
    ledger.take(s.hidden)  # through up
    ledger.give(s.inner)
    ledger.take(s.inner)  # gradient of gate
    ledger.give(s.inner)  # gradient of the SiLU
    ledger.free(s.inner)  # gate
    ledger.take(s.hidden)  # through gate
    ledger.give(s.inner)
    _add(ledger, s)
    norm_backward(ledger, s, residual=True)
    _attention_backward(ledger, s, m)


def norm_forward(ledger: Ledger, s: Sizes, *, kept: bool) -> None:
    """Make a normalised tensor; where ``kept``, also what its gradient needs except the input."""
    ledger.take(s.hidden, s.token)  # squares, their mean
    ledger.give(s.hidden)
    ledger.take(s.hidden)  # scaled by the inverse deviation
    ledger.take(s.hidden)  # times the weight
    ledger.give(s.hidden)
    if not kept:
        ledger.give(s.token)


def norm_backward(ledger: Ledger, s: Sizes, *, residual: bool) -> None:
    """Turn the gradient of the output into that of the input, added to the residual's if any."""
    ledger.swap(s.hidden)  # through the weight
    ledger.take(s.hidden)  # through the product, to the input
    ledger.take(s.hidden)  # through the product, to the inverse deviation, before its sum
    ledger.give(s.hidden, s.hidden)
    if residual:
        ledger.give(s.hidden)  # added into the residual's gradient in place
    ledger.take(s.hidden)  # through the mean
    ledger.take(s.hidden, s.hidden, s.hidden)  # through the square: x, times 2, times gradient
    ledger.give(4 * s.hidden)
    ledger.free(s.hidden, s.token)  # kept input and inverse deviation


def _attention_forward(ledger: Ledger, s: Sizes, m: Mode) -> None:
    projection_forward(ledger, s, m, out=s.query)
    ledger.take(s.key)
    projection_forward(ledger, s, m, out=s.key)
    for size in (s.query, s.key):
        _rotary_forward(ledger, size)
    ledger.give(s.query, s.key)  # before rotation
    # bmm keeps the keys for the gradient of the queries, and the queries for that of the keys.
    copies_keys = s.copies and not s.repeats
    if s.repeats:
        ledger.take(s.query, s.query)  # keys and values, repeated for the query heads
    if s.copies:
        ledger.take(s.query)  # queries, one matrix a head
    if copies_keys:
        ledger.take(s.query)  # keys, one matrix a query head
    ledger.take(s.scores)
    if s.copies and not m.below:
        ledger.give(s.query)
    if copies_keys and not m.flows:
        ledger.give(s.query)
    scores_forward(ledger, s)
    if copies_keys:
        ledger.take(s.query)  # values, one matrix a query head
    ledger.take(s.query)  # context
    if copies_keys and not m.flows:
        ledger.give(s.query)
    ledger.swap(s.query)  # context, heads merged
    if s.repeats and not m.flows:
        ledger.give(s.query, s.query)
    ledger.take(s.hidden)  # output projection
    ledger.give(s.query)
    # The frame's own queries, keys and values stay where bmm used them without a copy.
    if s.copies or not m.below:
        ledger.give(s.query)
    if s.copies or s.repeats or not m.flows:
        ledger.give(s.key, s.key)
    if not m.keeps_lora_input:
        ledger.give(s.hidden)  # normalised


def _attention_backward(ledger: Ledger, s: Sizes, m: Mode) -> None:
    ledger.take(s.query)  # gradient of the context
    if not m.below:
        ledger.give(s.hidden)  # the residual ends here
    if s.copies:
        ledger.swap(s.query)
    ledger.take(s.query)  # gradient of the repeated values
    ledger.take(s.scores)  # gradient of the attention weights
    ledger.give(s.query)  # gradient of the context
    # The values are a view of the projection where nothing copied them.
    ledger.free(s.query if s.copies or s.repeats else s.key)
    scores_backward(ledger, s)
    ledger.take(s.query)  # gradient of the queries
    if m.below:
        ledger.take(s.query)  # gradient of the repeated keys
        ledger.free(s.query)  # queries
    ledger.give(s.scores)  # gradient of the scores
    ledger.free(s.query if s.copies or s.repeats else s.key)  # keys
    if s.grouped:
        for _ in range(1 + m.below):
            ledger.take(s.key)  # summed over the query heads of a group
            ledger.give(s.query)
    if m.below:
        _rotary_backward(ledger, s.key)
    _rotary_backward(ledger, s.query)
    paths = projection_backward(ledger, s, m, "value")
    if m.below:
        if paths > 1:
            _add(ledger, s)
            ledger.give((paths - 2) * s.hidden)  # in place, as below
        ledger.swap(s.key)  # keys, heads merged
        ledger.take(s.hidden)
        ledger.give(s.key)
        if paths > 1:
            ledger.give(s.hidden)  # in place: the sum is already a buffer of the engine's own
        else:
            _add(ledger, s)
    paths = projection_backward(ledger, s, m, "query")
    ledger.give(paths * s.hidden)
    if m.keeps_lora_input:
        ledger.free(s.hidden)
    if m.below:
        norm_backward(ledger, s, residual=True)


def _rotary_forward(ledger: Ledger, size: int) -> None:
    ledger.take(size)  # x cos
    ledger.take(size // 2)  # negated half
    ledger.take(size)  # rotated
    ledger.give(size // 2)
    ledger.take(size)  # rotated sin
    ledger.give(size)
    ledger.take(size)  # sum
    ledger.give(size, size)


def _rotary_backward(ledger: Ledger, size: int) -> None:
    ledger.take(size)  # through rotated sin
    ledger.take(size // 2)  # negated half
    ledger.take(size)  # put into place
    ledger.give(size // 2)
    ledger.take(size)  # other half put into place
    ledger.give(size, size)
    ledger.take(size)  # through x cos
    ledger.give(size, size)


def _add(ledger: Ledger, s: Sizes) -> None:
    """Sum two gradients out of place, as the engine does for the first two that are views."""
    ledger.take(s.hidden)
    ledger.give(s.hidden, s.hidden)
