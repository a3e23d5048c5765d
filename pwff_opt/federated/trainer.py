"""Federated rounds: local steps on every device, then partial aggregation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from pwff_opt.decision import RoundDecision
from pwff_opt.errors import DecisionError, TrainingError
from pwff_opt.evaluation import TrainedRound
from pwff_opt.federated.aggregation import average, uploaded_names
from pwff_opt.federated.backbone import Backbone
from pwff_opt.federated.blocks import (
    Tensors,
    fresh_adapter,
    fresh_head,
    fresh_lora,
    layer_of,
    resize_lora,
)
from pwff_opt.federated.partition import Shard
from pwff_opt.federated.tokens import Inputs, by_length
from pwff_opt.federated.workers import Workers
from pwff_opt.rng import stream
from pwff_opt.scenario import Peft, Training
from pwff_opt.units import BITS_PER_BYTE

Split = Literal["train", "validation", "test"]
DTYPES = {"float32": torch.float32, "float16": torch.float16}


class Trainer:
    """Trains schedules round by round; holds one frozen model for any number of devices.

    Everything random is keyed by (training seed, purpose, round, device), so the state after a round
    depends on the decisions up to that round and on nothing else.
    """

    def __init__(
        self,
        workers: Workers,
        inputs: Inputs,
        labels: NDArray[np.int64],
        shards: Sequence[Shard],
        *,
        peft: Peft,
        training: Training,
        seed: int,
    ) -> None:
        self.workers, self.inputs, self.shards = workers, inputs, shards
        self.labels = torch.from_numpy(labels)
        self.peft, self.training, self.seed = peft, training, seed
        self._adapters = [
            fresh_adapter(layer, hidden=self._model.hidden, width=peft.adapter_width, seed=seed)
            for layer in range(self._model.layer_count)
        ]

    @property
    def _model(self) -> Backbone:
        return self.workers.first

    def initial(self) -> list[Tensors]:
        """Return every device's blocks before the first round: a common head, nothing else."""
        head = fresh_head(self._model.head_shapes, seed=self.seed)
        return [dict(head) for _ in self.shards]

    def round(
        self,
        states: Sequence[Tensors],
        number: int,
        decision: RoundDecision,
        present: Sequence[bool],
        *,
        done: Callable[[], None] = lambda: None,
    ) -> tuple[list[Tensors], TrainedRound]:
        """Carry out round ``number``; return the devices' new blocks and what the round gave.

        ``states`` is left as it is. ``done`` is called after each device's local steps.
        """
        if len(decision.ranks) != len(self.shards) or len(present) != self._model.layer_count:
            raise DecisionError(
                f"{decision} must have {len(self.shards)} ranks and {self._model.layer_count} layers"
            )
        for device, rank in enumerate(decision.ranks):
            if rank not in (0, *self._model.ranks):
                raise DecisionError(
                    f"rank of device {device} must be one of decisions.ranks "
                    f"({', '.join(map(str, self._model.ranks))}) or 0, got {rank}"
                )

        def train(backbone: Backbone, device: int) -> tuple[Tensors, float]:
            rank = decision.ranks[device]
            blocks = self._prepared(states[device], rank, present, number, device)
            first = backbone.configure(rank, present, decision.trained, resume=self.inputs.cached)
            backbone.load(blocks)
            loss = self._local_steps(backbone, first, number, device)
            return blocks | backbone.collect(), loss

        trained = self.workers.map(train, range(len(states)), done=done)
        after = [blocks for blocks, _ in trained]
        marks = self.training.validate_after
        names = uploaded_names(after[0], decision.states, head_shared=self.peft.head == "shared")
        dtype = DTYPES[self.peft.upload_dtype]
        uploads = [{name: blocks[name].to(dtype) for name in names} for blocks in after]
        weights = [float(len(shard.train)) for shard in self.shards]
        # The broadcast has the precision of the upload; every device then holds the same object.
        shared = {name: mean.to(dtype).float() for name, mean in average(uploads, weights).items()}
        after = [blocks | shared for blocks in after]
        for device, blocks in enumerate(after):
            for name, tensor in blocks.items():
                if not torch.isfinite(tensor).all():
                    raise TrainingError(
                        f"device {device}, round {number}: {name} must stay finite; lower "
                        f"training.learning_rate, or upload float32"
                    )
        report = TrainedRound(
            loss=tuple(loss for _, loss in trained),
            accuracy=tuple(self.accuracy(after, decision, present, "validation"))
            if not marks or number + 1 in marks
            else (),
            uplink_bit=BITS_PER_BYTE
            * sum(t.numel() * t.element_size() for t in uploads[0].values()),
        )
        return after, report

    def accuracy(
        self,
        states: Sequence[Tensors],
        decision: RoundDecision,
        present: Sequence[bool],
        split: Split,
    ) -> list[float]:
        """Return the accuracy of every device's model on its own part of the data."""

        def evaluate(backbone: Backbone, device: int) -> float:
            indices = getattr(self.shards[device], split)
            frozen = [False] * len(present)
            first = backbone.configure(
                decision.ranks[device], present, frozen, resume=self.inputs.cached
            )
            backbone.load(states[device])
            right = 0
            with torch.inference_mode():
                for batch in by_length(self.inputs.tokens, indices):
                    logits = backbone.logits(*self.inputs.batch(batch, first))
                    right += int((logits.argmax(-1) == self.labels[batch]).sum())
            return right / len(indices)

        return self.workers.map(evaluate, range(len(states)))

    def batches(self, number: int, device: int) -> list[NDArray[np.int64]]:
        """Return the mini-batches of one device in one round.

        A draw of local_steps x batch_size examples without replacement, cut into batches of like
        length (so little is padded) that come in random order.
        """
        rng = stream(self.seed, "batches", round=number, device=device)
        steps, size = self.training.local_steps, self.training.batch_size
        drawn = rng.choice(self.shards[device].train, steps * size, replace=False)
        drawn = drawn[np.argsort(self.inputs.tokens.lengths[drawn], kind="stable")]
        batches = np.split(drawn, steps)
        return [batches[i] for i in rng.permutation(steps)]

    def _prepared(
        self, state: Tensors, rank: int, present: Sequence[bool], number: int, device: int
    ) -> Tensors:
        """Return a device's blocks with those of newly present layers, at this round's rank."""
        blocks = {
            name: tensor
            for name, tensor in state.items()
            if rank > 0 or not name.startswith("lora.")  # rank 0: the LoRA is given up
        }
        for layer in (layer for layer, here in enumerate(present) if here):
            if f"adapter.{layer}.up.weight" not in blocks:
                blocks |= self._adapters[layer]
            if rank == 0:
                continue
            projections = self._model.lora_shapes(layer)
            fresh = fresh_lora(
                layer, rank, projections, seed=self.seed, round=number, device=device
            )
            for projection in projections:
                a, b = f"lora.{layer}.{projection}.A", f"lora.{layer}.{projection}.B"
                if a not in blocks:
                    blocks[a], blocks[b] = fresh[a], fresh[b]
                elif blocks[a].shape[0] != rank:
                    blocks[a], blocks[b] = resize_lora(blocks[a], blocks[b], fresh[a])
        return blocks

    def _local_steps(self, backbone: Backbone, first: int, number: int, device: int) -> float:
        """Take AdamW steps on the device's own data with the blocks loaded; return the mean loss.

        The optimiser starts afresh every round: its moments would be those of other parameters
        after an aggregation, and a device need not store them between rounds.
        """
        trained = backbone.trained()
        head = [slot for name, slot in trained.items() if layer_of(name) is None]
        body = [slot for name, slot in trained.items() if layer_of(name) is not None]
        optimiser = torch.optim.AdamW(
            [
                {"params": head, "lr": self.training.head_learning_rate},
                {"params": body, "lr": self.training.learning_rate},
            ],
            weight_decay=self.training.weight_decay,
        )
        total = 0.0
        for batch in self.batches(number, device):
            logits = backbone.logits(*self.inputs.batch(batch, first))
            loss = torch.nn.functional.cross_entropy(logits, self.labels[batch])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            total += loss.item()
            if not math.isfinite(total):
                raise TrainingError(
                    f"device {device}, round {number}: loss must stay finite, got {loss.item()}; "
                    f"lower training.learning_rate ({self.training.learning_rate:g})"
                )
        return total / self.training.local_steps
