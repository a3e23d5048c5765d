"""Peak memory of a training step on a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pwff_opt.costs import memory_bert, memory_llama
from pwff_opt.costs.architecture import Architecture
from pwff_opt.costs.blocks import (
    Blocks,
    Factors,
    adapter_parameters,
    check_states,
    head_parameters,
    lora_parameters,
    lowest_trained,
    trained_parameters,
)
from pwff_opt.costs.ledger import BYTE, Ledger, Lora, Mode, Sizes
from pwff_opt.decision import LayerState
from pwff_opt.errors import DecisionError

_LAYERS = {
    "bert": (memory_bert.layer_forward, memory_bert.layer_backward),
    "llama": (memory_llama.layer_forward, memory_llama.layer_backward),
}


def training_memory_byte(
    architecture: Architecture,
    blocks: Blocks,
    *,
    rank: int,
    states: Sequence[LayerState],
    present: Sequence[bool],
    sequences: int,
    length: int,
    padded: bool = True,
) -> int:
    r"""Return the peak number of bytes allocated during a training step.

    .. math:: M = 4\,(n_\text{frozen} + n_\text{blocks} + 2\,n_\text{trained}) + M_\text{buffers}
              + \max_\tau \textstyle\sum_{x \text{ alive at } \tau} |x|

    The first part is resident: weights and the two moments of AdamW, in float32; a LoRA's factor
    that the rule of ``blocks`` holds fixed in this round has no moments. The maximum is
    over the instants of one step (forward, backward, optimiser) and its sum over activations kept
    for the backward pass, gradients that exist by then, and workspace. The step is replayed tensor
    by tensor in the order in which torch makes and releases them; nothing is fitted.

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
        or the batch is empty.

    Notes
    -----
    Range of validity: float32, eager attention, ``eval()`` mode, no gradient checkpointing, AdamW
    one tensor at a time, gradients released after each step, an MLP activation that is one kernel
    (gelu, silu, relu, ...), and for decoders ``use_cache=False``, which is not Hugging Face's
    default: the cache adds up to a fifth to what is not weights where little is trained. Fused
    attention needs less. Where a common LoRA stands beside that of ``rank``, the backward pass
    through a projection is an upper bound, too high by at most two hidden states. What aggregation
    adds to frozen weights (flora, fedex) is taken to be folded into them. Not included: what
    a device keeps for error feedback (int8 uploads) or for the proximal term, the interpreter, code,
    allocator fragmentation, and what BLAS allocates for itself.

    Source: saved tensors of torch 2.13 and transformers 5.23, checked against every allocation that
    torch's profiler reports.
    """
    check_states(architecture, states, present)
    if rank < 0:
        raise DecisionError(f"rank must not be negative, got {rank}")
    for name, value in (("sequences", sequences), ("length", length)):
        if value < 1:
            raise DecisionError(f"{name} must be at least 1, got {value}")
    sizes = Sizes.of(
        architecture,
        adapter_width=blocks.adapter_width,
        sequences=sequences,
        length=length,
        padded=padded,
    )
    any_blocks = max(blocks.adapter_width, blocks.common_rank, rank) > 0
    lowest = lowest_trained(states) if any_blocks else architecture.layers
    modes = [
        Mode(
            below=layer > lowest,
            trained=state != LayerState.FROZEN and any_blocks,
            adapter=bool(here) and blocks.adapter_width > 0,
            loras=_loras(architecture, blocks, rank, state, sizes.token) if here else (),
        )
        for layer, (state, here) in enumerate(zip(states, present, strict=True))
    ]
    trains = lowest < architecture.layers
    ledger = Ledger()
    _forward(ledger, architecture, sizes, modes, trains, length)
    _head_forward(ledger, architecture, sizes, trains, sequences)
    _head_backward(ledger, architecture, sizes, trains, sequences)
    backward = _LAYERS[architecture.family][1]
    for mode in reversed(modes[lowest:]):
        backward(ledger, sizes, mode)
    _optimiser(ledger, architecture, sizes, modes)

    per_layer = adapter_parameters(architecture, blocks)
    per_layer += lora_parameters(architecture, rank + blocks.common_rank)
    resident = architecture.parameters() + head_parameters(architecture)
    resident += sum(map(bool, present)) * per_layer
    resident += 2 * trained_parameters(architecture, blocks, rank=rank, states=states)
    # Token numbers, attention mask and labels are 64-bit integers.
    batch = 8 * (2 * sequences * length + sequences)
    return BYTE * resident + _buffers_byte(architecture) + batch + ledger.peak


def _loras(
    architecture: Architecture, blocks: Blocks, rank: int, state: LayerState, token: int
) -> tuple[Lora, ...]:
    """Return the LoRAs of a layer: the one that decisions size, then the common one."""
    common: Factors = "" if state == LayerState.FROZEN else "AB"
    both = ((rank, blocks.lora_trained(state)), (blocks.common_rank, common))
    return tuple(
        Lora.of(architecture, rank=r, token=token, factors=factors) for r, factors in both if r
    )


def _buffers_byte(architecture: Architecture) -> int:
    """Position and token type numbers (64-bit) of BERT; rotary frequencies of Llama, two copies."""
    if architecture.family == "bert":
        return 2 * 8 * architecture.positions
    return 2 * BYTE * (architecture.head_dim // 2)


def _forward(
    ledger: Ledger,
    architecture: Architecture,
    s: Sizes,
    modes: Sequence[Mode],
    trains: bool,
    length: int,
) -> None:
    """Embeddings, layers and final norm; leaves the last hidden state alive."""
    ledger.take(s.hidden)
    if architecture.family == "bert":
        rows = BYTE * length * architecture.hidden
        ledger.take(s.hidden, s.hidden)  # token types, sum
        ledger.take(rows, s.hidden)  # positions, sum; the norm replaces the first sum
        ledger.give(s.hidden, s.hidden, s.hidden, rows)
    else:
        ledger.take(2 * BYTE * length * architecture.head_dim)  # cosines, sines
    if s.masked:
        ledger.take(s.mask)
    # The model's frame holds the embeddings, the first layer's input, until all layers are done.
    embeddings = 0 if architecture.family == "bert" and modes[0].keeps_lora_input else s.hidden
    for layer, mode in enumerate(modes):
        _LAYERS[architecture.family][0](ledger, s, mode)
        if layer == 0:
            ledger.take(embeddings)
    if architecture.family == "llama":
        memory_llama.norm_forward(ledger, s, kept=trains)
        if not trains:
            ledger.give(s.hidden)  # input of the norm
    ledger.give(embeddings)
    if s.masked:
        ledger.give(s.mask)


def _head_forward(
    ledger: Ledger, architecture: Architecture, s: Sizes, trains: bool, sequences: int
) -> None:
    if architecture.family == "bert":
        pooled = BYTE * sequences * architecture.hidden
        if architecture.pooling == "mean":
            ledger.take(s.token)  # weights of the mean
        # Pooler or mean; its tanh or norm, kept for the gradients of that and of the head.
        ledger.take(pooled, pooled)
        if architecture.pooling == "model" or not trains:
            ledger.give(pooled)
        ledger.give(s.hidden)  # last hidden state
        ledger.take(BYTE * sequences * architecture.classes)
    else:
        ledger.take(s.token * architecture.classes)  # the last hidden state stays for the head
        ledger.give(s.token * architecture.classes)


def _head_backward(
    ledger: Ledger, architecture: Architecture, s: Sizes, trains: bool, sequences: int
) -> None:
    """Head, pooler or final norm; leaves the gradient of the last layer's output if needed."""
    parameters = BYTE * head_parameters(architecture)
    if architecture.family == "bert":
        pooled = BYTE * sequences * architecture.hidden
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
            ledger.take(s.hidden)  # zeros but for the first token, or a share for each
            ledger.give(pooled)
        if architecture.pooling == "mean":
            ledger.give(s.token)
        return
    logits = s.token * architecture.classes
    ledger.take(logits, parameters)
    if trains:
        ledger.take(s.hidden)
    ledger.give(logits, s.hidden)  # last hidden state
    if trains:
        memory_llama.norm_backward(ledger, s, residual=False)


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
    weight = BYTE * architecture.hidden * architecture.classes
    ledger.take(weight, weight)
    ledger.give(weight, weight, previous)


def _trained_tensors(s: Sizes, mode: Mode) -> Iterator[int]:
    """Yield the bytes of every tensor that learns in a layer, in the order of the model."""
    for projection in ("query", "value"):
        yield from (lora.a for lora in mode.loras if lora.learns_a)
        for lora in mode.loras:
            if lora.learns_b:
                yield lora.query_b if projection == "query" else lora.value_b
    if mode.adapter:
        yield from (s.down_weight, s.down_bias, s.down_weight, s.up_bias)
