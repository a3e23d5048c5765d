"""Peak memory of a training step on a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pwff_opt.costs.architecture import Architecture
from pwff_opt.costs.blocks import (
    Blocks,
    FactorNames,
    adapter_parameters,
    check_states,
    head_parameters,
    lora_parameters,
    lowest_trained,
    trained_parameters,
)
from pwff_opt.costs.ledger import BYTE, Ledger, Lora, Mode, Sizes
from pwff_opt.errors import DecisionError
from pwff_opt.scenario.schedule import LayerState


def training_memory_byte(
    architecture: Architecture,
    blocks: Blocks,
    *,
    rank: int,
    states: Sequence[LayerState],
    present: Sequence[bool],
    sequences: int,
    length: int,
    scored: int = 0,
    backwards: int = 1,
    padded: bool = True,
) -> int:
    r"""Return the peak number of bytes allocated during a training step.

    .. math:: M = M_\text{resident} + \max_\tau \textstyle\sum_{x \text{ alive at } \tau} |x|

    The first part is that of :func:`resident_byte`. The maximum is over the instants of one step
    (forward, backward, optimiser) and its sum over activations kept for the backward pass, gradients
    that exist by then, and workspace. The step is replayed tensor by tensor in the order in which torch
    makes and releases them; nothing is fitted.

    Parameters
    ----------
    architecture, blocks
        Sizes of the frozen model and of its blocks.
    rank
        LoRA rank of this device, 0 for none.
    states
        State of every layer. [layers]
    present
        Whether a layer has blocks; true wherever it is not frozen. [layers]
    sequences, length
        Sequences in a mini-batch, and tokens in each, padding included.
    scored
        Tokens of the mini-batch at which a language head says what comes next.
    backwards
        Backward passes through the one graph, each with gradients of its own (one an objective), which
        are added up in place: 1 or, with a language head, 2.
    padded
        Whether the batch has padding. An encoder makes an attention mask only then; a decoder
        always.

    Returns
    -------
    int
        Peak [byte].

    Raises
    ------
    DecisionError
        A length is not the number of layers, a trained layer is not present, the rank is negative,
        the batch is empty, it has fewer tokens than are scored, or ``backwards`` cannot be.

    Notes
    -----
    Range of validity: float32, eager attention, ``eval()`` mode, no gradient checkpointing, AdamW
    one tensor at a time, gradients released after each step, an MLP activation that is one kernel
    (gelu, silu, relu, ...), and for decoders ``use_cache=False``, which is not Hugging Face's
    default: the cache adds up to a fifth to what is not weights where little is trained. Fused
    attention needs less. A language head sees the scored tokens alone, and its loss is torch's
    cross-entropy, summed or one a token. Where a common LoRA stands beside that of ``rank``, the
    backward pass through a projection is an upper bound, too high by at most two hidden states. What
    aggregation adds to frozen weights (flora, fedex) is taken to be folded into them. Not included:
    what a device keeps for error feedback (int8 uploads) or for the proximal term, the interpreter,
    code, allocator fragmentation, and what BLAS allocates for itself.

    Source: saved tensors of torch 2.13 and transformers 5.23, checked against every allocation that
    torch's profiler reports.
    """
    if backwards not in ((1, 2) if architecture.head == "language" else (1,)):
        raise DecisionError(
            f"backwards must be 1 or, with a language head, 2; got {backwards!r} for a "
            f"{architecture.head} head"
        )
    resident = resident_byte(architecture, blocks, rank=rank, states=states, present=present)
    batch = Batch.of(architecture, blocks, sequences, length, scored, padded)
    modes, lowest = _modes(architecture, blocks, rank, states, present, batch.sizes.token)
    trains = lowest < architecture.layers
    ledger = Ledger()
    _forward(ledger, architecture, batch, modes, trains)
    _head_forward(ledger, architecture, batch, trains)
    for left in reversed(range(backwards)):
        ledger.keeps_graph = left > 0
        _head_backward(ledger, architecture, batch, trains)
        for mode in reversed(modes[lowest:]):
            architecture.facts.memory.layer_backward(ledger, batch.sizes, mode)
    _optimiser(ledger, architecture, batch.sizes, modes)
    return resident + batch.given_byte + ledger.peak


def forward_memory_byte(
    architecture: Architecture,
    blocks: Blocks,
    *,
    rank: int,
    present: Sequence[bool],
    sequences: int,
    length: int,
    scored: int = 0,
    padded: bool = True,
) -> int:
    """Return the peak number of bytes that a forward pass without gradients allocates.

    Weights are not in it (:func:`resident_byte`): a device that holds several models runs one at a
    time. Parameters, errors and range of validity: :func:`training_memory_byte`.
    """
    states = [LayerState.FROZEN] * architecture.layers
    check_states(architecture, states, present)
    batch = Batch.of(architecture, blocks, sequences, length, scored, padded)
    modes, _ = _modes(architecture, blocks, rank, states, present, batch.sizes.token)
    ledger = Ledger()
    _forward(ledger, architecture, batch, modes, False)
    _head_forward(ledger, architecture, batch, False)
    return batch.given_byte + ledger.peak


def sampling_memory_byte(
    architecture: Architecture,
    blocks: Blocks,
    *,
    rank: int,
    present: Sequence[bool],
    sequences: int,
    length: int,
    answer: int,
) -> int:
    r"""Return an upper bound on the bytes allocated while answers are sampled with a key-value cache.

    .. math:: \max\{M_\text{forward}(P) + 4\,C(P),\; M_\text{forward}(1)
              + 4\,[C(P + A) + N (P + A)(\gamma a + 3 n_\text{heads}) + 5 N V]\}

    The prompts' pass, or that of the last tokens. :math:`C(S) = N S\,[2 (L + 1) k + 8]`: keys and
    values of all layers and, since the cache grows by copying, of one layer twice; numbers of tokens
    and positions, 64 bit; :math:`\gamma`: copies for heads that share keys and values, 2, or 1 where
    all share; scores; logits, scaled ones and probabilities, those of the token before still alive
    while this one's are made.

    Parameters
    ----------
    architecture, blocks, rank, present
        As in :func:`forward_memory_byte`.
    sequences, length
        Number of prompts N, one for every answer, and tokens in each, P.
    answer
        Tokens sampled for each, A.

    Notes
    -----
    Range of validity: as :func:`training_memory_byte`, and Hugging Face's ``generate`` with no other
    treatment of the logits than a temperature. Measured: 1.006 to 1.32 times what is allocated.
    """
    heads, whole = architecture.heads, length + answer

    def forward(tokens: int) -> int:
        return forward_memory_byte(
            architecture, blocks, rank=rank, present=present, sequences=sequences, length=tokens
        )

    def cache(tokens: int) -> int:
        return tokens * (2 * (architecture.layers + 1) * architecture.key_value_width + 8)

    # Keys that all heads share are a view until bmm copies them, and so are values, after them.
    sharing = min(2, architecture.key_value_heads) * (heads > architecture.key_value_heads)
    copies = sharing * architecture.query_width
    last = cache(whole) + whole * (copies + 3 * heads) + 5 * architecture.vocabulary
    return max(
        forward(length) + BYTE * sequences * cache(length), forward(1) + BYTE * sequences * last
    )


def resident_byte(
    architecture: Architecture,
    blocks: Blocks,
    *,
    rank: int,
    states: Sequence[LayerState],
    present: Sequence[bool],
) -> int:
    r"""Return the number of bytes that stay allocated from step to step.

    .. math:: M_\text{resident} = 4\,(n_\text{frozen} + n_\text{blocks} + 2\,n_\text{trained})
              + M_\text{buffers}

    Weights (:func:`weights_byte`) and the two moments of AdamW, in float32; a LoRA's factor that the
    rule of ``blocks`` holds fixed in this round has no moments. Parameters and errors:
    :func:`training_memory_byte`.
    """
    check_states(architecture, states, present)
    if rank < 0:
        raise DecisionError(f"rank must not be negative, got {rank}")
    per_layer = adapter_parameters(architecture, blocks)
    per_layer += lora_parameters(architecture, rank + blocks.common_rank)
    added = sum(map(bool, present)) * per_layer
    added += 2 * trained_parameters(architecture, blocks, rank=rank, states=states)
    return weights_byte(architecture) + BYTE * added


def weights_byte(architecture: Architecture) -> int:
    """Return the bytes of a model's weights in float32, its head's and its buffers' among them."""
    parameters = architecture.parameters() + head_parameters(architecture)
    buffers: int = architecture.facts.memory.buffers_byte(architecture)
    return BYTE * parameters + buffers


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A mini-batch: its shape, bytes of its tensors, and of what is there before the step."""

    sequences: int
    length: int
    sizes: Sizes
    scored_hidden: int
    moments: int
    """Mean and deviation of every scored token's norm."""
    logits: int
    given_byte: int

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        blocks: Blocks,
        sequences: int,
        length: int,
        scored: int,
        padded: bool,
    ) -> Batch:
        for name, value in (("sequences", sequences), ("length", length)):
            if value < 1:
                raise DecisionError(f"{name} must be at least 1, got {value}")
        if not 0 <= scored <= sequences * length:
            raise DecisionError(
                f"scored must be from 0 to the number of tokens ({sequences * length}), got {scored}"
            )
        # 64-bit integers: token numbers, attention mask, and labels; or, of scored tokens, where they
        # are and what comes next.
        labels = 2 * scored if architecture.head == "language" else sequences
        return cls(
            sequences=sequences,
            length=length,
            sizes=Sizes.of(
                architecture,
                adapter_width=blocks.adapter_width,
                sequences=sequences,
                length=length,
                padded=padded,
            ),
            scored_hidden=BYTE * scored * architecture.hidden,
            moments=2 * BYTE * scored,
            logits=BYTE * scored * architecture.classes,
            given_byte=8 * (2 * sequences * length + labels),
        )


def _modes(
    architecture: Architecture,
    blocks: Blocks,
    rank: int,
    states: Sequence[LayerState],
    present: Sequence[bool],
    token: int,
) -> tuple[list[Mode], int]:
    """Return what every layer's tensors are kept for, and the lowest layer that is trained."""
    any_blocks = max(blocks.adapter_width, blocks.common_rank, rank) > 0
    lowest = lowest_trained(states) if any_blocks else architecture.layers
    return [
        Mode(
            below=layer > lowest,
            trained=state != LayerState.FROZEN and any_blocks,
            adapter=bool(here) and blocks.adapter_width > 0,
            loras=_loras(architecture, blocks, rank, state, token) if here else (),
        )
        for layer, (state, here) in enumerate(zip(states, present, strict=True))
    ], lowest


def _loras(
    architecture: Architecture, blocks: Blocks, rank: int, state: LayerState, token: int
) -> tuple[Lora, ...]:
    """Return the LoRAs of a layer: the one that decisions size, then the common one."""
    common: FactorNames = "" if state == LayerState.FROZEN else "AB"
    both = ((rank, blocks.lora_trained(state)), (blocks.common_rank, common))
    return tuple(
        Lora.of(architecture, rank=r, token=token, factors=factors) for r, factors in both if r
    )


def _forward(
    ledger: Ledger,
    architecture: Architecture,
    batch: Batch,
    modes: Sequence[Mode],
    trains: bool,
) -> None:
    """Embeddings, layers and final norm; leaves the last hidden state alive."""
    s = batch.sizes
    ledger.take(s.hidden)
    own = architecture.facts.memory
    own.embed_forward(ledger, architecture, batch)
    if s.masked:
        ledger.take(s.mask)
    # The model's frame holds the embeddings, the first layer's input, until all layers are done.
    embeddings = s.hidden * own.holds_embeddings(modes[0])
    for layer, mode in enumerate(modes):
        own.layer_forward(ledger, s, mode)
        if layer == 0:
            ledger.take(embeddings)
    own.top_forward(ledger, s, trains)
    ledger.give(embeddings)
    if s.masked:
        ledger.give(s.mask)


def _head_forward(ledger: Ledger, architecture: Architecture, batch: Batch, trains: bool) -> None:
    own = architecture.facts.memory
    if architecture.head != "language":
        own.classifier_forward(ledger, architecture, batch, trains)
        return
    ledger.take(batch.scored_hidden)
    own.language_forward(ledger, batch, trains)
    ledger.give(batch.scored_hidden)
    ledger.take(batch.logits)  # log-probabilities, kept
    ledger.give(batch.logits, batch.sizes.hidden)  # logits and last hidden state, held by the frame
    if not trains:
        ledger.give(batch.logits)


def _head_backward(ledger: Ledger, architecture: Architecture, batch: Batch, trains: bool) -> None:
    """Head, pooler or final norm; leaves the gradient of the last layer's output if needed."""
    own, s = architecture.facts.memory, batch.sizes
    if architecture.head != "language":
        parameters = BYTE * head_parameters(architecture)
        own.classifier_backward(ledger, architecture, batch, trains, parameters)
    elif trains:
        ledger.take(batch.logits, batch.logits)  # gradients of log-probabilities and of logits
        ledger.give(batch.logits)
        ledger.free(batch.logits)  # log-probabilities
        ledger.take(batch.scored_hidden)
        ledger.give(batch.logits)
        own.language_backward(ledger, batch)
        ledger.take(s.hidden)  # zeros but for the scored tokens
        ledger.give(batch.scored_hidden)
        own.top_backward(ledger, s)


def _optimiser(ledger: Ledger, architecture: Architecture, s: Sizes, modes: Sequence[Mode]) -> None:
    """AdamW: root of the second moment and quotient, while the previous quotient is still bound."""
    previous = 0
    for mode in modes:
        if not mode.trained:
            continue
        for size in _trained_tensors(s, mode):
            ledger.take(size, size)
            ledger.give(size, previous)
            previous = size
    if architecture.head == "classifier":
        weight = BYTE * architecture.hidden * architecture.classes
        ledger.take(weight, weight)
        ledger.give(weight, weight)
    ledger.give(previous)


def _trained_tensors(s: Sizes, mode: Mode) -> Iterator[int]:
    """Yield the bytes of every tensor that learns in a layer, in the order of the model."""
    for projection in ("query", "value"):
        yield from (lora.a for lora in mode.loras if lora.learns_a)
        for lora in mode.loras:
            if lora.learns_b:
                yield lora.query_b if projection == "query" else lora.value_b
    if mode.adapter:
        yield from (s.down_weight, s.down_bias, s.down_weight, s.up_bias)
