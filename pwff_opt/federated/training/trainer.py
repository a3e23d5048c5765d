"""Federated rounds: local steps on every device, then aggregation."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Literal

import numpy as np
import torch

from pwff_opt.data.partition import Shard
from pwff_opt.errors import DecisionError, TrainingError
from pwff_opt.evaluation import TrainedRound
from pwff_opt.federated.exchange.exchange import Exchange, State
from pwff_opt.federated.exchange.rules import LoraRule
from pwff_opt.federated.learning import Stage
from pwff_opt.federated.learning.cohort import Cohort, Learned
from pwff_opt.federated.model.backbone import Backbone, Stack
from pwff_opt.federated.model.blocks import (
    Tensors,
    fresh_adapter,
    fresh_head,
    fresh_lora,
    lora_scale,
    resize_lora,
)
from pwff_opt.federated.model.features import Features, Level
from pwff_opt.federated.model.passes import CachedPasses, Passes
from pwff_opt.federated.model.workers import Workers, companies
from pwff_opt.federated.text.tokens import Indices
from pwff_opt.planning.feasibility import check_ranks
from pwff_opt.registry import RULES
from pwff_opt.rng import stream
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.participation import participants
from pwff_opt.scenario.schedule import RoundDecision

logger = logging.getLogger(__name__)

Split = Literal["train", "validation", "test"]

_Batches = Mapping[int, Sequence[Indices]]
"""The mini-batches of some devices in a round, in order."""

# Tokens of a step that devices are put together for, as long as all cores have work. Every product reads
# its weights anew: at 170 tokens in bfloat16 that is a tenth of the time, beyond 512 little is left of it.
COHORT_TOKENS = 512


class Trainer:
    """Trains schedules round by round; holds one frozen model for any number of devices.

    Everything random is keyed by (training seed, purpose, round, device), so the state after a round
    depends on the decisions up to that round and on nothing else.

    Parameters
    ----------
    scenario
    backbone, stage, shards : the model; what is learned; the examples that each device holds.
    workers : devices trained side by side; it changes speed, never results.
    features : cached activations of a trainer of the same data, if there is one.
    """

    def __init__(
        self,
        scenario: Scenario,
        backbone: Backbone,
        stage: Stage,
        shards: Sequence[Shard],
        *,
        workers: int | None = None,
        features: Features | None = None,
    ) -> None:
        self.scenario, self.backbone, self.stage, self.shards = scenario, backbone, stage, shards
        self._peft, self._seed = scenario.peft, scenario.seeds.training
        self._workers = Workers(workers)
        self._rule: LoraRule = RULES[scenario.aggregation.lora]
        self.features = features or Features(
            backbone,
            stage.tokens,
            [
                [stage.sequences(part) for part in (shard.train, shard.validation, shard.test)]
                for shard in shards
            ],
            budget_byte=scenario.training.feature_cache_byte,
        )
        width = self._peft.adapter_width
        self._adapters = [
            fresh_adapter(layer, hidden=backbone.hidden, width=width, seed=self._seed)
            if width
            else {}
            for layer in range(backbone.layer_count)
        ]
        all_examples = np.concatenate([shard.train for shard in shards])
        tokens_of_a_batch = scenario.training.batch_size * float(self._lengths(all_examples).mean())
        self._most_together = max(1, round(COHORT_TOKENS / tokens_of_a_batch))
        # The machine's, not those that this process is given: company in a product can show in the last
        # bit, and on one machine a run that goes on must end the same. On another, products differ anyway.
        self._cores = os.cpu_count() or 1
        alignment = scenario.alignment
        self._regularisation = {
            "weighted": math.inf,
            "mgda": 0.0,
            "regularised": alignment.regularisation,
        }[alignment.reconcile]
        rank = self._peft.common_lora_rank
        self._common_scale = lora_scale(self._peft, rank) if rank else 1.0

    def initial(self) -> State:
        """Return the state before the first round: a common head on every device, nothing else."""
        head = fresh_head(self.backbone.head_shapes, seed=self._seed)
        sent = head if self._peft.head == "shared" else {}
        return State(devices=tuple(dict(head) for _ in self.shards), sent=dict(sent))

    def round(
        self,
        state: State,
        number: int,
        decision: RoundDecision,
        present: Sequence[bool],
        *,
        done: Callable[[], None] = lambda: None,
    ) -> tuple[State, TrainedRound]:
        """Carry out round ``number``; return the new state and what the round gave.

        ``state`` is left as it is. ``done`` is called after each device's local steps.

        Raises
        ------
        DecisionError
            Ranks, layers or blocks do not fit this trainer.
        TrainingError
            All devices diverged.
        """
        self._check(decision, present)
        exchange = Exchange(self.scenario, number, decision)
        before = [
            self._prepared(own, rank, present, number, device)
            for device, (own, rank) in enumerate(zip(state.devices, decision.ranks, strict=True))
        ]
        taking_part = [k for k, here in enumerate(participants(self.scenario, number)) if here]
        batches = {k: self.batches(number, k) for k in taking_part}
        held = {k: float(self._lengths(np.concatenate(own)).sum()) for k, own in batches.items()}
        cohorts = companies(held, most=self._most_together, cores=self._cores)

        def train(cohort: Sequence[int]) -> list[Learned]:
            own = {k: batches[k] for k in cohort}
            return self._local_steps(own, before, decision, exchange, number)

        def tokens(cohort: Sequence[int]) -> float:
            return sum(held[k] for k in cohort)

        def count(cohort: Sequence[int]) -> None:
            for _ in cohort:
                done()

        results = self._workers.map(train, cohorts, size=tokens, done=count)
        trained = dict(sorted(zip(chain(*cohorts), chain(*results), strict=True)))
        finite = {
            k: math.isfinite(learned.loss) and exchange.is_sound(learned.blocks)
            for k, learned in trained.items()
        }
        bad = [k for k, good in finite.items() if not good]
        if bad:
            told = self._diverged(number, bad, [trained[k].loss for k in bad])
            if len(bad) == len(finite):
                raise TrainingError(f"{told}; nobody is left to go on with")
            logger.warning("%s; this round goes on without", told)
        if not finite:
            raise TrainingError(f"round {number + 1}: at least one device must take part, got 0")
        after = [
            own | trained[k].blocks if finite.get(k, False) else own for k, own in enumerate(before)
        ]
        new, uplink_bit = exchange.merge(
            before,
            after,
            [finite.get(k, False) for k in range(len(before))],
            len(taking_part),
            [float(len(shard.train)) for shard in self.shards],
            state,
            public=self._public(state.sent, decision, present, number),
            fresh=lambda device, layer, projection: self._fresh_a(
                decision.ranks[device], layer, projection, number + 1, device
            ),
        )
        marks = self.scenario.training.validate_after
        validated = not marks or number + 1 in marks
        measured = self.measures(new, decision, "validation") if validated else []
        noted = [
            {
                **(trained[k].notes if k in trained else {}),
                **_drift(after[k], new.devices[k], exchange.sends, finite.get(k, False)),
                **(measured[k] if measured else {}),
            }
            for k in range(len(before))
        ]
        report = TrainedRound(
            loss=tuple(
                trained[k].loss if finite.get(k, False) else math.nan for k in range(len(before))
            ),
            accuracy=tuple(own["accuracy"] for own in measured),
            uplink_bit=uplink_bit,
            diverged=tuple(bad),
            notes=_by_name(noted),
        )
        return new, report

    def _diverged(self, number: int, devices: Sequence[int], losses: Sequence[float]) -> str:
        """Return who diverged, in what, and what to do."""
        training = self.scenario.training
        what = (
            f"blocks must stay in the range of peft.upload_dtype {self._peft.upload_dtype!r}"
            if all(math.isfinite(loss) for loss in losses)
            else "losses and blocks must stay finite"
        )
        return (
            f"round {number + 1}: {what}, but diverged on device {', '.join(map(str, devices))} of "
            f"{len(self.shards)}; lower training.learning_rate ({training.learning_rate:g}) or "
            f"training.head_learning_rate ({training.head_learning_rate:g})"
        )

    def measures(
        self, state: State, decision: RoundDecision, split: Split
    ) -> list[dict[str, float]]:
        """Return how well every device's model does on its own part of the data."""

        held: list[Indices] = [getattr(shard, split) for shard in self.shards]

        def evaluate(device: int) -> dict[str, float]:
            with torch.inference_mode():
                return self.stage.measures(held[device], self.model(state, decision, device))

        def tokens(device: int) -> float:
            return float(self._lengths(held[device]).sum())

        return self._workers.map(evaluate, range(len(self.shards)), size=tokens)

    def model(self, state: State, decision: RoundDecision, device: int) -> Passes:
        """Return passes through one device's model as it is after a round of this decision."""
        own, scale = state.devices[device], self._scale(decision.ranks[device])
        stack = Stack([self._moved(own)], [scale], common_scale=self._common_scale)
        return self._passes(decision, [device], [own], [scale], stack)

    def _passes(
        self,
        decision: RoundDecision,
        devices: Sequence[int],
        blocks: Sequence[Tensors],
        scales: Sequence[float],
        stack: Stack,
    ) -> CachedPasses:
        return CachedPasses(
            self.backbone,
            devices,
            stack,
            features=self.features,
            level=self._level(decision),
            blocks=blocks,
            scales=scales,
            common_scale=self._common_scale,
        )

    def _lengths(self, examples: Indices) -> Indices:
        """Return how many tokens each example has in all its sequences."""
        lengths = self.stage.tokens.lengths[self.stage.sequences(examples)]
        sums: Indices = lengths.reshape(len(examples), -1).sum(1)
        return sums

    def batches(self, number: int, device: int) -> list[Indices]:
        """Return the mini-batches of one device in one round.

        A draw of local_steps x batch_size examples without replacement, cut into batches of like
        length; all devices take theirs in one and the same random order, so that batches of like
        length meet and little is padded.
        """
        steps, size = self.scenario.training.local_steps, self.scenario.training.batch_size
        rng = stream(self._seed, "batches", round=number, device=device)
        drawn = rng.choice(self.shards[device].train, steps * size, replace=False)
        drawn = drawn[np.argsort(self._lengths(drawn), kind="stable")]
        batches = np.split(drawn, steps)
        order = stream(self._seed, "batch-order", round=number).permutation(steps)
        return [batches[i] for i in order]

    def _check(self, decision: RoundDecision, present: Sequence[bool]) -> None:
        if len(decision.ranks) != len(self.shards) or len(present) != self.backbone.layer_count:
            raise DecisionError(
                f"{decision} must have {len(self.shards)} ranks and {self.backbone.layer_count} layers"
            )
        check_ranks(self.scenario, decision)

    def _level(self, decision: RoundDecision) -> Level:
        """Return up to where nothing is trained in a round."""
        trained = decision.trained
        lowest = trained.index(True) if any(trained) else len(trained)
        low_rank = any(decision.ranks) or self._peft.common_lora_rank
        return Level(lowest, completed=lowest < len(trained) and not low_rank)

    def _scale(self, rank: int) -> float:
        return lora_scale(self._peft, rank) if rank else 1.0

    def _moved(self, blocks: Tensors) -> Tensors:
        return {name: tensor.to(self.backbone.device) for name, tensor in blocks.items()}

    def _local_steps(
        self,
        batches: _Batches,
        before: Sequence[Tensors],
        decision: RoundDecision,
        exchange: Exchange,
        number: int,
    ) -> list[Learned]:
        """Train a cohort; return what every device has learned."""
        devices = [*batches]
        blocks = [before[k] for k in devices]
        scales = [self._scale(decision.ranks[k]) for k in devices]
        cohort = Cohort(
            self.backbone,
            self.stage,
            blocks,
            scales,
            common_scale=self._common_scale,
            passes=lambda stack: self._passes(decision, devices, blocks, scales, stack),
            training=self.scenario.training,
            wishes=self.stage.wishes(devices),
            regularisation=self._regularisation,
            learns=exchange.learns,
            pulled=exchange.sends,
            proximal=self.scenario.aggregation.proximal,
        )
        return cohort.train([*batches.values()], seed=self._seed, round=number)

    def _public(
        self, sent: Tensors, decision: RoundDecision, present: Sequence[bool], number: int
    ) -> Tensors:
        """Return what server and devices know of the blocks whatever the data, at this round's rank.

        That is what was sent to all, else the draw in common; both can be repeated by either end. LoRA
        is among it where the rule averages its factors, for then all devices have it at one rank.
        """
        return self._prepared(
            sent, decision.ranks[0] if self._rule.averages else 0, present, number, 0
        )

    def _prepared(
        self, state: Tensors, rank: int, present: Sequence[bool], number: int, device: int
    ) -> Tensors:
        """Return a device's blocks with those of newly present layers, at this round's rank."""
        blocks = {
            name: tensor
            for name, tensor in state.items()
            if rank > 0 or not name.startswith("lora.")  # rank 0: the LoRA is given up
        }
        common_rank = self._peft.common_lora_rank
        for layer in (layer for layer, here in enumerate(present) if here):
            projections = self.backbone.lora_shapes(layer)
            for name, tensor in self._adapters[layer].items():
                blocks.setdefault(name, tensor)
            if common_rank and f"common.{layer}.{min(projections)}.A" not in blocks:
                blocks |= fresh_lora(
                    layer,
                    common_rank,
                    projections,
                    seed=self._seed,
                    round=0,
                    device=None,
                    kind="common",
                )
            if rank == 0:
                continue
            for projection, (_, outputs) in projections.items():
                a, b = f"lora.{layer}.{projection}.A", f"lora.{layer}.{projection}.B"
                if a in blocks and b in blocks and len(blocks[a]) == rank:
                    continue
                # What was sent to all may be one factor only.
                held = (
                    len(blocks[a]) if a in blocks else blocks[b].shape[1] if b in blocks else rank
                )
                fresh = self._fresh_a(max(held, rank), layer, projection, number, device)
                blocks.setdefault(a, fresh[:held])
                blocks.setdefault(b, torch.zeros(outputs, held))
                if held != rank:
                    blocks[a], blocks[b] = resize_lora(
                        blocks[a],
                        blocks[b],
                        fresh[:rank],
                        stretch=self._scale(held) / self._scale(rank),
                        by_slices=self._rule.by_slices,
                    )
        return blocks

    def _fresh_a(
        self, rank: int, layer: int, projection: str, number: int, device: int
    ) -> torch.Tensor:
        """Return a new A; where LoRA is aggregated, devices begin with one and the same.

        Where factors are averaged it is one for all rounds, so that it can be drawn again whenever an
        update is to be measured from it.
        """
        fresh = fresh_lora(
            layer,
            rank,
            self.backbone.lora_shapes(layer),
            seed=self._seed,
            round=0 if self._rule.averages else number,
            device=None if self._rule.common_start else device,
        )
        return fresh[f"lora.{layer}.{projection}.A"]


def _by_name(noted: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, ...]]:
    """Return the notes of all devices, [device] each; NaN where a device has none."""
    names = sorted({name for own in noted for name in own if name != "accuracy"})
    return {name: tuple(own.get(name, math.nan) for own in noted) for name in names}


def _drift(
    learned: Tensors, received: Tensors, sends: Callable[[str], bool], took_part: bool
) -> dict[str, float]:
    """Return how far a device's uploaded blocks were from what aggregation made of them.

    The Euclidean distance; nothing where no block is sent and received in one and the same shape.
    """
    both = [
        (tensor, received[name])
        for name, tensor in learned.items()
        if sends(name) and name in received and received[name].shape == tensor.shape
    ]
    if not took_part or not both:
        return {}
    # A checkpoint keeps no order, so the sum must not depend on it.
    return {"drift": math.sqrt(math.fsum(float((a - b).double().square().sum()) for a, b in both))}
