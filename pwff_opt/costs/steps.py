"""What a local step of every stage takes of a device: FLOPs and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from pwff_opt.costs.architecture import Architecture
from pwff_opt.costs.blocks import Blocks
from pwff_opt.costs.flops import Quantity, TokenCount, forward_flops, step_flops
from pwff_opt.costs.memory import (
    forward_memory_byte,
    resident_byte,
    sampling_memory_byte,
    training_memory_byte,
    weights_byte,
)
from pwff_opt.costs.workload import (
    FloatArray,
    Workload,
    attention_span,
    longest_sequence,
    most_scored,
    samples,
    sequences_per_example,
)
from pwff_opt.data.models import model_config, model_source, tensor_names
from pwff_opt.errors import DecisionError, ModelError
from pwff_opt.registry import FAMILIES, STAGES
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.schedule import LayerState


class LocalStep(Protocol):
    """A local step of a stage, on a device that takes no short cuts.

    Parameters and errors of both methods: :func:`pwff_opt.costs.step_flops` and
    :func:`pwff_opt.costs.training_memory_byte`.
    """

    @property
    def architecture(self) -> Architecture:
        """Of the model that learns."""

    def flops(
        self,
        blocks: Blocks,
        *,
        rank: Quantity,
        states: Sequence[LayerState],
        present: Sequence[bool],
    ) -> Quantity:
        """Return the FLOPs of a step in expectation over mini-batches; one number, or one a device."""

    def memory_byte(
        self,
        blocks: Blocks,
        *,
        rank: int,
        states: Sequence[LayerState],
        present: Sequence[bool],
    ) -> int:
        """Return the peak number of bytes allocated in a step whose sequences are all the longest."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Supervised:
    """Classes, or next tokens, that are given: classification, pre-training, instruction tuning.

    ``count``: of the mini-batch; ``sequences``, ``length`` and ``scored`` (tokens): what memory is for.
    """

    architecture: Architecture
    count: TokenCount
    sequences: int
    length: int
    scored: int

    def flops(
        self,
        blocks: Blocks,
        *,
        rank: Quantity,
        states: Sequence[LayerState],
        present: Sequence[bool],
    ) -> Quantity:
        return step_flops(
            self.architecture, blocks, rank=rank, states=states, present=present, count=self.count
        )

    def memory_byte(
        self,
        blocks: Blocks,
        *,
        rank: int,
        states: Sequence[LayerState],
        present: Sequence[bool],
        backwards: int = 1,
    ) -> int:
        return training_memory_byte(
            self.architecture,
            blocks,
            rank=rank,
            states=states,
            present=present,
            sequences=self.sequences,
            length=self.length,
            scored=self.scored,
            backwards=backwards,
        )

    def reference_flops(self) -> Quantity:
        """Return the FLOPs of the frozen model's forward pass, without any blocks."""
        return _plain_flops(self.architecture, self.count)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rewards:
    """The two reward models, both in memory, and what they read in a local step.

    ``count``: of both together; ``sequences`` and ``length``: what one of them reads at a time.
    """

    architecture: Architecture
    count: TokenCount
    sequences: int
    length: int

    def flops(self) -> Quantity:
        return _plain_flops(self.architecture, self.count)

    def weights_byte(self) -> int:
        return 2 * weights_byte(self.architecture)

    def forward_byte(self) -> int:
        return forward_memory_byte(
            self.architecture,
            Blocks(adapter_width=0),
            rank=0,
            present=[False] * self.architecture.layers,
            sequences=self.sequences,
            length=self.length,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Preferences:
    r"""Preference pairs of two objectives (dpo); with the other objective's reward as margin (modpo).

    .. math:: F = F_\text{step} + F_\text{reference} + F_\text{rewards}

    The chosen and rejected answers of both pairs are one mini-batch of the policy, forward and
    backward; the reference, which is the frozen model without blocks, reads the same without gradients,
    and each reward model the answers of the other objective's pair. A pair belongs to one objective, so
    two gradients, to be reconciled, are two backward passes of half the size each.

    Memory is the largest of what policy and reward models need in turn; the reference needs less than
    the policy. Numbers of which there is one a token or a sequence (log-probabilities, margins) are left
    out.
    """

    policy: Supervised
    rewards: Rewards | None

    @property
    def architecture(self) -> Architecture:
        return self.policy.architecture

    def flops(
        self,
        blocks: Blocks,
        *,
        rank: Quantity,
        states: Sequence[LayerState],
        present: Sequence[bool],
    ) -> Quantity:
        total: Any = self.policy.flops(blocks, rank=rank, states=states, present=present)
        total = total + self.policy.reference_flops()
        if self.rewards is not None:
            total = total + self.rewards.flops()
        return total  # type: ignore[no-any-return]

    def memory_byte(
        self,
        blocks: Blocks,
        *,
        rank: int,
        states: Sequence[LayerState],
        present: Sequence[bool],
    ) -> int:
        decision: dict[str, Any] = {"rank": rank, "states": states, "present": present}
        update = self.policy.memory_byte(blocks, **decision)
        if self.rewards is None:
            return update
        resident = resident_byte(self.architecture, blocks, **decision)
        reading = resident + self.rewards.forward_byte()
        return self.rewards.weights_byte() + max(update, reading)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sampling:
    r"""Answers sampled and learned from by their rewards (grpo).

    .. math:: F = F_\text{sampling} + F_\text{reference} + F_\text{rewards}
              + u\,(F_\text{forward} + g\,F_\text{backward})

    :math:`u` = ``updates`` on the same answers; :math:`g` = ``backwards``: one for each objective whose
    gradients are reconciled, or one for their weighted sum. Answers are sampled by the policy with its
    blocks and a key-value cache, and charged in full length; the old log-probabilities are those of the
    first update's own forward pass.

    Memory is the largest of what sampling (an upper bound), reward models and update need in turn.

    ``policy``: the update, whose mini-batch are all prompts with their answers; ``sampled``: what
    sampling these takes; ``answer``: tokens of each.
    """

    policy: Supervised
    rewards: Rewards
    sampled: TokenCount
    answer: int
    updates: int
    backwards: int

    @property
    def architecture(self) -> Architecture:
        return self.policy.architecture

    def flops(
        self,
        blocks: Blocks,
        *,
        rank: Quantity,
        states: Sequence[LayerState],
        present: Sequence[bool],
    ) -> Quantity:
        def forward(count: TokenCount) -> Any:
            return forward_flops(self.architecture, blocks, rank=rank, present=present, count=count)

        once: Any = forward(self.policy.count)
        step: Any = self.policy.flops(blocks, rank=rank, states=states, present=present)
        before = forward(self.sampled) + self.policy.reference_flops() + self.rewards.flops()
        return before + self.updates * (once + self.backwards * (step - once))  # type: ignore[no-any-return]

    def memory_byte(
        self,
        blocks: Blocks,
        *,
        rank: int,
        states: Sequence[LayerState],
        present: Sequence[bool],
    ) -> int:
        decision: dict[str, Any] = {"rank": rank, "states": states, "present": present}
        sampling = sampling_memory_byte(
            self.architecture,
            blocks,
            rank=rank,
            present=present,
            sequences=self.policy.sequences,
            length=self.policy.length - self.answer,
            answer=self.answer,
        )
        resident = resident_byte(self.architecture, blocks, **decision)
        update = self.policy.memory_byte(blocks, backwards=self.backwards, **decision)
        return self.rewards.weights_byte() + max(
            resident + max(sampling, self.rewards.forward_byte()), update
        )


def local_step(scenario: Scenario, workload: Workload) -> LocalStep:
    """Return what a local step of the scenario's stage takes.

    Sparse attention (``model.attention_window``) saves work; memory is that of attention to all tokens.

    Raises
    ------
    DecisionError
        The workload lacks what the stage needs.
    ModelError
        The model cannot be read, or its family does not fit the stage.
    """
    step: LocalStep = STAGES[scenario.training.stage].local_step(scenario, workload)
    return step


def supervised_step(scenario: Scenario, workload: Workload) -> Supervised:
    """Return what a step on given examples takes; errors: :func:`local_step`."""
    classifies = STAGES[scenario.training.stage].classifies
    architecture = model_architecture(scenario, _classes(workload) if classifies else None)
    batch, length = scenario.training.batch_size, longest_sequence(scenario)
    sequences = batch * sequences_per_example(scenario)
    most = 0 if classifies else sequences * most_scored(length, architecture.family)
    span = attention_span(scenario, architecture.family)
    count = _count(workload, batch, scenario).within(span)
    if not classifies:  # a workload that needs no data does not know that an encoder learns fewer
        count = replace(count, scored=np.minimum(count.scored, most))
    return Supervised(
        architecture=architecture,
        count=count,
        sequences=sequences,
        length=length,
        scored=most,
    )


def preferences_step(scenario: Scenario, workload: Workload) -> Preferences:
    """Return what a step on preference pairs takes (dpo, modpo); errors: :func:`local_step`."""
    policy = supervised_step(scenario, workload)
    margins = scenario.alignment.optimiser == "modpo"
    return Preferences(
        policy=policy,
        rewards=_rewards(scenario, workload, read=policy.sequences) if margins else None,
    )


def sampling_step(scenario: Scenario, workload: Workload) -> Sampling:
    """Return what a step on sampled answers takes (grpo); errors: :func:`local_step`."""
    training, alignment = scenario.training, scenario.alignment
    architecture = model_architecture(scenario, None)
    span = attention_span(scenario, architecture.family)
    sequences, answer = training.batch_size * alignment.answers, alignment.answer_tokens
    prompts = _count(workload, sequences, scenario)
    policy = Supervised(
        architecture=architecture,
        count=prompts.answered(answer).within(span),
        sequences=sequences,
        length=longest_sequence(scenario),
        scored=sequences * answer,
    )
    return Sampling(
        policy=policy,
        rewards=_rewards(scenario, workload, read=2 * sequences),
        sampled=prompts.sampling(answer).within(span),
        answer=answer,
        updates=alignment.updates,
        backwards=1 if alignment.reconcile == "weighted" else 2,
    )


def model_architecture(scenario: Scenario, classes: int | None) -> Architecture:
    """Return the sizes of the scenario's model; ``classes``: of classification, else None.

    Raises
    ------
    ModelError
        The model cannot be read, or its family does not fit the stage.
    """
    source = model_source(scenario.model.source, folder=scenario.folder)
    config = model_config(source)
    architecture = Architecture.from_config(config, classes=classes, pooling=scenario.model.pooling)
    stage = scenario.training.stage
    family = architecture.facts
    if not family.causal and STAGES[stage].decoder:
        kinds = sorted(k for own in FAMILIES.values() if own.causal for k in own.model_types)
        raise ModelError(
            f"model.source must name a causal language model ({', '.join(kinds)}) for training.stage "
            f"{stage!r}, got {scenario.model.source!r} of the family {architecture.family!r}"
        )
    names = tensor_names(source) if family.masked_head and classes is None else set()
    if names and not any(name.startswith(family.masked_head) for name in names):
        raise ModelError(
            f"model.source must name an encoder with its head over the vocabulary for training.stage "
            f"{stage!r}; {scenario.model.source!r} has none (no weights {family.masked_head}*)"
        )
    return architecture


def _count(workload: Workload, examples: int, scenario: Scenario) -> TokenCount:
    """Return the expected count of a mini-batch of examples."""
    scores = not STAGES[scenario.training.stage].classifies and not samples(scenario)
    return TokenCount(
        sequences=np.full(len(scenario.devices), float(examples * sequences_per_example(scenario))),
        tokens=examples * workload.mean_tokens,
        squared_tokens=examples * workload.mean_squared_tokens,
        scored=examples * _given(workload, "mean_scored_tokens", scenario) if scores else 0,
    )


def _rewards(scenario: Scenario, workload: Workload, *, read: int) -> Rewards:
    """Return the reward models; ``read``: sequences that both together read in a step."""
    source = model_source(scenario.alignment.reward_model, folder=scenario.folder)
    return Rewards(
        architecture=Architecture.from_config(model_config(source), classes=1, pooling="mean"),
        count=TokenCount(
            sequences=read,
            tokens=read * _given(workload, "mean_reward_tokens", scenario),
            squared_tokens=read * _given(workload, "mean_squared_reward_tokens", scenario),
        ),
        sequences=read // 2,
        length=longest_sequence(scenario),
    )


def _classes(workload: Workload) -> int:
    if workload.classes is None:
        raise DecisionError(
            "workload.classes must be given for training.stage 'classification', got None"
        )
    return workload.classes


def _given(workload: Workload, name: str, scenario: Scenario) -> FloatArray:
    values: FloatArray | None = getattr(workload, name)
    if values is None:
        stage = scenario.training.stage
        optimiser = f" with optimiser {scenario.alignment.optimiser!r}" * STAGES[stage].aligns
        raise DecisionError(
            f"workload.{name} must be given for training.stage {stage!r}{optimiser}, got None"
        )
    return values


def _plain_flops(architecture: Architecture, count: TokenCount) -> Quantity:
    return forward_flops(
        architecture,
        Blocks(adapter_width=0),
        rank=0,
        present=[False] * architecture.layers,
        count=count,
    )
