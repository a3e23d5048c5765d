"""Sizes of the trainable blocks: bottleneck adapters, LoRA and the classification head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pwff_opt.costs.architecture import Architecture
from pwff_opt.decision import LayerState
from pwff_opt.errors import DecisionError, ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    r"""The trainable blocks that a scenario puts on a frozen model.

    Parameters
    ----------
    adapter_width
        Width :math:`w` of the bottleneck adapter of a layer.
    bits_per_parameter
        Bits of a parameter on the air [bit]; on the device everything is float32.
    head_shared
        Whether the classification head is uploaded and averaged, or stays personal.

    Raises
    ------
    ModelError
        The width or the bits are not positive integers.
    """

    adapter_width: int
    bits_per_parameter: int = 32
    head_shared: bool = False

    def __post_init__(self) -> None:
        for name in ("adapter_width", "bits_per_parameter"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelError(f"{name} must be an integer of at least 1, got {value!r}")


def adapter_parameters(architecture: Architecture, blocks: Blocks) -> int:
    r"""Return the parameters of the adapter of one layer, :math:`2hw + w + h`."""
    h, w = architecture.hidden, blocks.adapter_width
    return 2 * h * w + w + h


def lora_parameters(architecture: Architecture, rank: int) -> int:
    r"""Return the parameters of the LoRA of one layer, :math:`r(h + a) + r(h + k)`.

    Query and value projections only, A: [r, h], B: [a or k, r]; ``rank`` 0 means no LoRA.
    """
    a, k = architecture.query_width, architecture.key_value_width
    return rank * (2 * architecture.hidden + a + k)


def head_parameters(architecture: Architecture) -> int:
    """Return the parameters of the classification head, :math:`hc`, and BERT's :math:`c` biases."""
    bias = architecture.classes if architecture.family == "bert" else 0
    return architecture.hidden * architecture.classes + bias


def trained_parameters(
    architecture: Architecture, blocks: Blocks, *, rank: int, states: Sequence[LayerState]
) -> int:
    """Return the parameters that a round trains: head, and adapter and LoRA of unfrozen layers."""
    layers = sum(state != LayerState.FROZEN for state in states)
    per_layer = adapter_parameters(architecture, blocks) + lora_parameters(architecture, rank)
    return head_parameters(architecture) + layers * per_layer


def check_states(
    architecture: Architecture, states: Sequence[LayerState], present: Sequence[bool] | None = None
) -> None:
    """Check that a decision has one entry per layer and trains only layers that have blocks.

    Raises
    ------
    DecisionError
        A length is not the number of layers, or a layer that is not present is not frozen.
    """
    named = {"states": states} | ({} if present is None else {"present": present})
    for name, values in named.items():
        if len(values) != architecture.layers:
            raise DecisionError(
                f"{name} must have one entry per layer ({architecture.layers}), got {len(values)}"
            )
    if present is None:
        return
    for layer, (state, here) in enumerate(zip(states, present, strict=True)):
        if state != LayerState.FROZEN and not here:
            raise DecisionError(
                f"present[{layer}] must be true because states[{layer}] is "
                f"{LayerState(state).name}, got false"
            )


def lowest_trained(states: Sequence[LayerState]) -> int:
    """Return the lowest layer that is not frozen, or the number of layers where all are frozen."""
    return next((n for n, s in enumerate(states) if s != LayerState.FROZEN), len(states))
