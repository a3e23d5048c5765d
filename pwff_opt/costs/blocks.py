"""Sizes of the trainable blocks: bottleneck adapters, LoRA and the classification head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pwff_opt.costs.architecture import Architecture
from pwff_opt.errors import DecisionError, ModelError
from pwff_opt.registry import RULES
from pwff_opt.scenario import Scenario, UploadDtype
from pwff_opt.scenario.schedule import LayerState

FactorNames = Literal["", "A", "B", "AB"]
"""Names of factors of a LoRA, A: [rank, in], B: [out, rank]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    r"""The trainable blocks that a scenario puts on a frozen model, as they are in one round.

    Parameters
    ----------
    adapter_width
        Width :math:`w` of the bottleneck adapter of a layer; 0: none.
    common_rank
        Rank :math:`q` of the LoRA beside the one that decisions size; all devices share it. 0: none.
    lora_rule
        ``aggregation.lora``: what happens to the LoRA that decisions size.
    round
        Number of the round, from 0. It matters only to a rule whose ``period`` is above 1, "rolora" say.
    adapter_shared, head_shared
        Whether adapters of aggregated layers, and the classification head, are uploaded and averaged.
    upload_dtype
        Of a parameter on the air; on the device everything is float32.

    Raises
    ------
    ModelError
        A size is not an integer of at least 0, or a name is unknown.
    """

    adapter_width: int
    common_rank: int = 0
    lora_rule: str = "personal"
    round: int = 0
    adapter_shared: bool = True
    head_shared: bool = False
    upload_dtype: UploadDtype = "float32"

    def __post_init__(self) -> None:
        for name in ("adapter_width", "common_rank", "round"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ModelError(f"{name} must be an integer of at least 0, got {value!r}")
        choices = {"lora_rule": tuple(RULES), "upload_dtype": get_args(UploadDtype)}
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise ModelError(f"{name} must be one of {', '.join(known)}, got {value!r}")

    @classmethod
    def of(cls, scenario: Scenario, *, round: int) -> Blocks:
        """Return the blocks of a round; equal ones for rounds between which nothing differs."""
        peft, aggregation = scenario.peft, scenario.aggregation
        return cls(
            adapter_width=peft.adapter_width,
            common_rank=peft.common_lora_rank,
            lora_rule=aggregation.lora,
            round=round % RULES[aggregation.lora].period,
            adapter_shared=aggregation.adapter == "average",
            head_shared=peft.head == "shared",
            upload_dtype=peft.upload_dtype,
        )

    def lora_trained(self, state: LayerState) -> FactorNames:
        """Return the factors that learn in a layer, of the LoRA that decisions size.

        A rule holds a factor fixed where it aggregates; in a personal layer both learn, except for
        rules like "ffa": once learned, A would differ between devices and never be common again.
        """
        if state == LayerState.FROZEN:
            return ""
        aggregated = state == LayerState.AGGREGATED
        return _letters(RULES[self.lora_rule].trains(self.round, aggregated=aggregated))

    @property
    def lora_uploaded(self) -> FactorNames:
        """Factors that are sent in every aggregated layer, of the LoRA that decisions size."""
        return _letters(RULES[self.lora_rule].sends(self.round))


def _letters(factors: tuple[bool, bool]) -> FactorNames:
    """Return the names of the factors, A and B, that are marked."""
    names: dict[tuple[bool, bool], FactorNames] = {
        (False, False): "",
        (True, False): "A",
        (False, True): "B",
        (True, True): "AB",
    }
    return names[factors]


def adapter_parameters(architecture: Architecture, blocks: Blocks) -> int:
    r"""Return the parameters of the adapter of one layer, :math:`2hw + w + h`, or 0 at width 0."""
    h, w = architecture.hidden, blocks.adapter_width
    return 2 * h * w + w + h if w else 0


def lora_parameters(architecture: Architecture, rank: int, factors: FactorNames = "AB") -> int:
    r"""Return the parameters of the LoRA of one layer, A: :math:`2rh`, B: :math:`r(a + k)`.

    Query and value projections only, A: [r, h], B: [a or k, r]; ``rank`` 0 means no LoRA.
    """
    a, k = architecture.query_width, architecture.key_value_width
    return rank * (("A" in factors) * 2 * architecture.hidden + ("B" in factors) * (a + k))


def head_parameters(architecture: Architecture) -> int:
    """Return the parameters of the classification head, :math:`hc`, and BERT's :math:`c` biases.

    A language head is frozen: 0.
    """
    if architecture.head == "language":
        return 0
    bias: int = architecture.classes * architecture.facts.head_bias
    return architecture.hidden * architecture.classes + bias


def trained_parameters(
    architecture: Architecture, blocks: Blocks, *, rank: int, states: Sequence[LayerState]
) -> int:
    """Return the parameters a round trains: classifier, and adapter and LoRAs of unfrozen layers."""
    layers = sum(state != LayerState.FROZEN for state in states)
    per_layer = adapter_parameters(architecture, blocks)
    per_layer += lora_parameters(architecture, blocks.common_rank)
    sized = (lora_parameters(architecture, rank, blocks.lora_trained(state)) for state in states)
    return head_parameters(architecture) + layers * per_layer + sum(sized)


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
