"""Tensors of BERT in the order torch makes and releases them, eager attention."""

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
    """Return the bytes of position and token type numbers (64-bit)."""
    return 2 * 8 * architecture.positions


def embed_forward(ledger: Ledger, architecture: Architecture, batch: Batch) -> None:
    """Allocate what the embeddings make beside their sum, which is there already."""
    s, rows = batch.sizes, BYTE * batch.length * architecture.hidden
    ledger.take(s.hidden, s.hidden)  # token types, sum
    ledger.take(rows, s.hidden)  # positions, sum; the norm replaces the first sum
    ledger.give(s.hidden, s.hidden, s.hidden, rows)


def holds_embeddings(lowest: Mode) -> bool:
    """Return whether the embeddings are tensors of their own until all layers are done."""
    return not lowest.keeps_lora_input


def top_forward(ledger: Ledger, s: Sizes, trains: bool) -> None:
    """Do nothing: no norm follows the layers."""


def top_backward(ledger: Ledger, s: Sizes) -> None:
    """Do nothing: no norm follows the layers."""


def language_forward(ledger: Ledger, batch: Batch, trains: bool) -> None:
    """Make logits of the scored tokens' hidden states, which stay alive."""
    ledger.take(batch.scored_hidden)  # dense layer, kept for the GELU
    ledger.take(batch.scored_hidden)  # GELU, kept for the norm
    ledger.take(batch.scored_hidden, batch.moments)  # norm
    if not trains:
        ledger.give(2 * batch.scored_hidden, batch.moments)
    ledger.take(batch.logits)
    ledger.give(batch.scored_hidden)  # norm; the frozen head does not need it


def language_backward(ledger: Ledger, batch: Batch) -> None:
    """Turn the gradient of what the head over the vocabulary saw into that of the hidden states."""
    ledger.swap(batch.scored_hidden)  # through the norm
    ledger.free(batch.scored_hidden, batch.moments)  # GELU
    ledger.swap(batch.scored_hidden)  # through the GELU
    ledger.free(batch.scored_hidden)  # dense
    ledger.swap(batch.scored_hidden)  # through the dense layer


def classifier_forward(
    ledger: Ledger, architecture: Architecture, batch: Batch, trains: bool
) -> None:
    """Make the classes' scores of the last hidden state, by a pooler or the mean."""
    pooled = BYTE * batch.sequences * architecture.hidden
    if architecture.pooling == "mean":
        ledger.take(batch.sizes.token)  # weights of the mean
    # Pooler or mean; its tanh or norm, kept for the gradients of that and of the head.
    ledger.take(pooled, pooled)
    if architecture.pooling == "model" or not trains:
        ledger.give(pooled)
    ledger.give(batch.sizes.hidden)  # last hidden state
    ledger.take(BYTE * batch.sequences * architecture.classes)


def classifier_backward(
    ledger: Ledger, architecture: Architecture, batch: Batch, trains: bool, parameters: int
) -> None:
    """Leave alive the gradients of the head, of ``parameters`` bytes, and of the last layer's output."""
    pooled = BYTE * batch.sequences * architecture.hidden
    ledger.take(parameters)
    if trains:
        ledger.take(pooled, pooled)  # gradient of the pooled output, through tanh or norm
        ledger.give(pooled)
        if architecture.pooling == "mean":
            ledger.give(pooled)  # input of the norm
    ledger.give(pooled)  # tanh or norm
    if trains:
        if architecture.pooling == "model":
            ledger.swap(pooled)  # through the pooler
        ledger.take(batch.sizes.hidden)  # zeros but for the first token, or a share for each
        ledger.give(pooled)
    if architecture.pooling == "mean":
        ledger.give(batch.sizes.token)


def layer_forward(ledger: Ledger, s: Sizes, m: Mode) -> None:
    """Replace the layer's input, alive on entry, by its output; leave alive what backward needs."""
    _attention_forward(ledger, s, m)
    _add_norm_forward(ledger, s, m)
    ledger.give(s.query)  # context, an argument of the output projection until it returns
    ledger.take(s.inner)  # up, kept for the GELU
    ledger.take(s.inner)  # GELU
    if not m.flows:
        ledger.give(s.inner)
    _add_norm_forward(ledger, s, m)
    ledger.give(s.inner)  # GELU; the frozen down projection does not need it
    if not m.flows:
        ledger.give(s.scores)  # attention weights, held by the layer's frame until here
    ledger.give(s.hidden)  # attention output
    adapter_forward(ledger, s, m)
    if not m.keeps_lora_input:
        ledger.give(s.hidden)  # input of the layer, held by the loop over layers until here


def layer_backward(ledger: Ledger, s: Sizes, m: Mode) -> None:
    """Replace the gradient of the output, alive on entry, by that of the input if it is needed."""
    adapter_backward(ledger, s, m)
    if not m.flows:
        return
    _norm_backward(ledger, s)
    ledger.take(s.inner)  # gradient of the GELU
    ledger.take(s.inner)  # gradient of up
    ledger.give(s.inner)  # gradient of the GELU
    ledger.free(s.inner)  # up
    ledger.take(s.hidden)
    ledger.give(s.inner)
    ledger.give(s.hidden)  # added into the residual's gradient in place
    _norm_backward(ledger, s)
    ledger.take(s.query)  # gradient of the context
    if not m.below:
        ledger.give(s.hidden)  # the residual ends here
    if s.copies:
        ledger.swap(s.query)
    ledger.take(s.query)  # gradient of the values
    ledger.take(s.scores)  # gradient of the attention weights
    ledger.give(s.query)  # gradient of the context
    ledger.free(s.query)  # values
    scores_backward(ledger, s)
    ledger.take(s.query)  # gradient of the queries
    if m.below:
        ledger.take(s.query)  # gradient of the keys
        ledger.free(s.query)  # queries
    ledger.give(s.scores)  # gradient of the scores
    ledger.free(s.query)  # keys
    # Gradients of the layer's input are added into the residual's in place.
    ledger.give(projection_backward(ledger, s, m, "value") * s.hidden)
    if m.below:
        ledger.swap(s.query)  # keys, heads merged
        ledger.take(s.hidden)
        ledger.give(s.query, s.hidden)
    ledger.give(projection_backward(ledger, s, m, "query") * s.hidden)
    if m.keeps_lora_input:
        ledger.free(s.hidden)


def _attention_forward(ledger: Ledger, s: Sizes, m: Mode) -> None:
    projection_forward(ledger, s, m, out=s.query)
    ledger.take(s.query)  # keys
    projection_forward(ledger, s, m, out=s.query)
    if s.copies:
        ledger.take(s.query, s.query)  # queries and keys, one matrix a head
    ledger.take(s.scores)
    # bmm keeps the keys for the gradient of the queries, and the queries for that of the keys.
    dropped = 2 - m.flows - m.below
    if s.copies:
        ledger.give(dropped * s.query)
    scores_forward(ledger, s)
    if s.copies:
        ledger.take(s.query)  # values, one matrix a head
    ledger.take(s.query)  # context
    if s.copies and not m.flows:
        ledger.give(s.query)
    ledger.swap(s.query)  # context, heads merged
    ledger.give((3 if s.copies else dropped + (not m.flows)) * s.query)  # projections


def _add_norm_forward(ledger: Ledger, s: Sizes, m: Mode) -> None:
    """Projection, residual sum (kept for the norm), LayerNorm with its mean and deviation."""
    ledger.take(s.hidden)
    ledger.take(s.hidden)
    ledger.take(s.hidden, 2 * s.token)
    if not m.flows:
        ledger.give(s.hidden, 2 * s.token)
    ledger.give(s.hidden)


def _norm_backward(ledger: Ledger, s: Sizes) -> None:
    ledger.take(s.hidden)
    ledger.give(s.hidden)  # gradient of the output
    ledger.free(s.hidden, 2 * s.token)  # kept input and moments
