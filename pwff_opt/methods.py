"""Named ways to fine-tune in a federation: configurations of the one trainer, not forks of it.

A :class:`Method` overrides ``[peft]`` and ``[aggregation]`` of a scenario (:data:`ALIGNMENTS` also
``[alignment]`` and ``[model]``) and gives the schedule its shape, the same decision in every round::

    from pwff_opt.methods import apply, schedule

    changed = apply(scenario, "feddpa")
    trained = evaluator(changed).train(schedule(changed, "feddpa", depth=3))

What a method leaves out is the scenario's: width of the adapters, scaling of the LoRA, type of the
uploads, everything in ``[training]``. With adapters of width 16 and hidden size 384, an adapter has
12.7 k parameters a layer and a LoRA of rank 8 has 12.3 k: methods that send either send about the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from pwff_opt.costs import Architecture
from pwff_opt.data.models import model_config, model_source
from pwff_opt.errors import DecisionError
from pwff_opt.registry import STAGES
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.schedule import LayerState, RoundDecision, Schedule

RANK = 8
MIXED_RANKS = (2, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What is trained, what is shared and how it is merged."""

    text: str
    """What the method does, in one line."""
    adapters: bool = True
    """Whether there are adapters; False sets ``peft.adapter_width`` to 0."""
    head: Literal["shared", "personal"] = "shared"
    common_rank: int = 0
    lora: str = "personal"
    """Name of the LoRA rule, one of ``pwff_opt.registry.RULES``; it becomes ``aggregation.lora``."""
    letter: Literal["a", "p"] = "a"
    """State of the trained layers: aggregated or personal."""
    ranks: tuple[int, ...] = (RANK,)
    """Ranks of the LoRA, in turn over the devices; (0,): none."""
    all_layers: bool = False
    """Trains every layer, whatever depth is asked for."""
    upper: int | None = None
    """Trains so many of the upper layers, whatever depth is asked for."""
    alignment: Mapping[str, Any] = field(default_factory=dict)
    """What the method changes in ``[alignment]``; a method that has any needs that stage."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """What the method changes in ``[model]``."""

    @property
    def peft(self) -> dict[str, Any]:
        """What the method changes in ``[peft]``."""
        width: dict[str, Any] = {} if self.adapters else {"adapter_width": 0}
        return width | {"head": self.head, "common_lora_rank": self.common_rank}

    @property
    def aggregation(self) -> dict[str, Any]:
        """What the method changes in ``[aggregation]``."""
        return {"adapter": "average", "lora": self.lora}

    @property
    def mixed(self) -> bool:
        """Whether devices differ in rank."""
        return len(set(self.ranks)) > 1


def _rule(name: str, text: str, **others: Any) -> Method:
    return Method(text=text, adapters=False, lora=name, **others)


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        # -- personal and shared parts ------------------------------------------------------------
        "pwff": Method(text="PWFF: adapters of the upper layers averaged, LoRA personal"),
        "pwff-head": Method(text="as pwff, with a personal head", head="personal"),
        # v1 (2024) speaks of global adapters and local LoRA; choosing the layers to aggregate came with v2.
        # So this is "pwff" in all layers: more is sent, and the backward pass goes all the way down.
        "pftt": Method(
            text="PFTT of arXiv 2404.13238 v1: as pwff, in all layers instead of the upper ones",
            all_layers=True,
        ),
        # Yang et al., arXiv 2403.19211, without its mixing of the two at inference by the instance.
        "feddpa": Method(
            text="FedDPA: a common LoRA averaged beside the personal one",
            adapters=False,
            common_rank=RANK,
        ),
        # -- baselines ------------------------------------------------------------------------------
        "shared": Method(text="adapters averaged, nothing personal", ranks=(0,)),
        "fedavg": Method(text="adapters and LoRA averaged, nothing personal", lora="fedit"),
        "local": Method(text="nothing is sent", letter="p", head="personal"),
        # -- rules for LoRA, without adapters -----------------------------------------------------
        "fedit": _rule("fedit", "FedIT: A and B averaged"),
        "ffa": _rule("ffa", "FFA-LoRA: A fixed, B averaged"),
        "fedsa": _rule("fedsa", "FedSA-LoRA: A averaged, B and head personal", head="personal"),
        "rolora": _rule("rolora", "RoLoRA: A and B averaged in turn"),
        "hetlora": _rule("hetlora", "HetLoRA: zero-padded average (equal ranks: that of fedit)"),
        "flora": _rule("flora", "FLoRA: stacked and folded into the frozen weight"),
        "flexlora": _rule("flexlora", "FlexLoRA: SVD of the exact average"),
        "fedex": _rule("fedex", "FedEx-LoRA: averages, what they miss in the frozen weight"),
        "raflora": _rule("raflora", "raFLoRA: average by slices (equal ranks: that of flexlora)"),
        "hetlora-mixed": _rule("hetlora", "HetLoRA, ranks 2, 4, 8 in turn", ranks=MIXED_RANKS),
        "flora-mixed": _rule("flora", "FLoRA, ranks 2, 4, 8 in turn", ranks=MIXED_RANKS),
        "flexlora-mixed": _rule("flexlora", "FlexLoRA, ranks 2, 4, 8 in turn", ranks=MIXED_RANKS),
        "raflora-mixed": _rule("raflora", "raFLoRA, ranks 2, 4, 8 in turn", ranks=MIXED_RANKS),
    }
)

ALIGNMENTS: Mapping[str, Method] = MappingProxyType(
    {
        # v1 names the parts: two reward models in one weighted reward, reinforcement learning with a penalty
        # for leaving the global model (``aggregation.proximal``, the scenario's), sparse attention, the last
        # layers. What is sparse about it, it does not say; here it is a window with sinks.
        "pfit": Method(
            text="PFIT of arXiv 2404.13238 v1: answers sampled, rewards weighted, sparse attention",
            upper=2,
            alignment={"optimiser": "grpo", "reconcile": "weighted"},
            model={"attention_window": 16},
        ),
    }
)
"""Methods whose stage is alignment."""


def named(method: Method | str) -> Method:
    """Return a method by its name, or as it is.

    Raises
    ------
    DecisionError
        If there is none of that name.
    """
    if isinstance(method, Method):
        return method
    every = {**METHODS, **ALIGNMENTS}
    if method not in every:
        raise DecisionError(f"method must be one of {', '.join(every)}, got {method!r}")
    return every[method]


def apply(scenario: Scenario, method: Method | str) -> Scenario:
    """Return the scenario as the method, or the one of this name, has it.

    The method's ranks are added to ``decisions.ranks`` where they are not in it, and ``rank_scope`` becomes
    what they need: most rules forbid ranks that differ.

    Raises
    ------
    DecisionError
        If there is no method of that name, or it aligns and the scenario's stage is another.
    """
    method = named(method)
    if method.alignment and not STAGES[scenario.training.stage].aligns:
        raise DecisionError(
            f"training.stage must be 'alignment' for a method that aligns ({method.text}), got "
            f"{scenario.training.stage!r}"
        )
    space = scenario.decisions
    missing = tuple(sorted(set(method.ranks) - set(space.ranks)))
    return replace(
        scenario,
        peft=replace(scenario.peft, **method.peft),
        aggregation=replace(scenario.aggregation, **method.aggregation),
        alignment=replace(scenario.alignment, **method.alignment),
        model=replace(scenario.model, **method.model),
        decisions=replace(
            space,
            ranks=space.ranks + missing,
            rank_scope="per_device" if method.mixed else "common",
        ),
    )


def schedule(scenario: Scenario, method: Method | str, depth: int) -> Schedule:
    """Return the method's schedule: the upper ``depth`` layers trained in all rounds.

    Raises
    ------
    DecisionError
        If the model has fewer layers than are to be trained, or ``depth`` is less than 1.
    """
    method = named(method)
    source = model_source(scenario.model.source, folder=scenario.folder)
    # The number of layers does not depend on that of the classes.
    layers = Architecture.from_config(model_config(source), classes=2).layers
    depth = layers if method.all_layers else method.upper or depth
    if not 1 <= depth <= layers:
        raise DecisionError(f"depth must be in 1..{layers}, the layers of the model, got {depth}")
    state = LayerState.AGGREGATED if method.letter == "a" else LayerState.PERSONAL
    devices = range(len(scenario.devices))
    decision = RoundDecision(
        ranks=tuple(method.ranks[device % len(method.ranks)] for device in devices),
        states=(LayerState.FROZEN,) * (layers - depth) + (state,) * depth,
    )
    return Schedule(rounds=(decision,) * scenario.training.rounds)
