"""The evaluator that really trains: one scenario's model, data and devices on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from pwff_opt.costs import Architecture, Workload
from pwff_opt.decision import Schedule
from pwff_opt.errors import DataError, PwffError
from pwff_opt.evaluation import Evaluation, TrainedRound, learning_key
from pwff_opt.federated.backbone import Backbone, pad_token_id
from pwff_opt.federated.checkpoint import (
    checkpoint_path,
    load_checkpoint,
    make_room,
    save_checkpoint,
)
from pwff_opt.federated.data import load_corpus
from pwff_opt.federated.exchange import State
from pwff_opt.federated.export import save_device_model
from pwff_opt.federated.partition import Shard, partition
from pwff_opt.federated.privacy import spent_epsilon
from pwff_opt.federated.stages import Classification
from pwff_opt.federated.tokens import tokenise
from pwff_opt.federated.trainer import Trainer
from pwff_opt.models import model_config, model_source
from pwff_opt.scenario import Scenario


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What the data are like, to be told before the work begins."""

    sentences: int
    domains: tuple[str, ...]
    classes: tuple[str, ...]
    majority: float
    """Test accuracy of always naming the class most common in all training data, mean over devices."""
    majority_per_device: float
    """The same, each device naming its own most common class."""
    epsilon: float | None = None
    """Where noise is added, what all rounds spend of (epsilon, aggregation.privacy_delta)-privacy of a
    device, as to the shared blocks; accuracies that are published spend more."""


class FederatedEvaluator:
    """Trains schedules with the scenario's model and data, and keeps a checkpoint after every round.

    A checkpoint's key is that of the schedule's prefix, so a training that was killed goes on after
    its last round, and one that shares its first rounds with another does not train them again, while
    there is room for checkpoints.

    Parameters
    ----------
    scenario : Scenario
    checkpoints : folder for the checkpoints.
    tick : callable
        Called after each device's local steps with the number of them done in this session.
    workers : int
        Devices trained side by side; as many as there are cores if not given. It changes speed and
        memory, never results.
    """

    def __init__(
        self,
        scenario: Scenario,
        checkpoints: str | Path,
        *,
        tick: Callable[[int], None] = lambda _: None,
        workers: int | None = None,
    ) -> None:
        self.scenario = scenario
        self._folder = Path(checkpoints)
        self._tick, self._worker_count = tick, workers
        self.device_rounds = 0
        devices = len(scenario.devices)
        corpus = load_corpus(scenario.data, folder=Path(scenario.folder))
        held = partition(corpus, scenario.data, devices=devices, seed=scenario.seeds.data)
        used = np.concatenate([np.concatenate([s.train, s.validation, s.test]) for s in held])
        labels = corpus.labels[used]
        sizes = [len(part) for s in held for part in (s.train, s.validation, s.test)]
        parts = np.split(np.arange(len(used)), np.cumsum(sizes)[:-1])
        self.shards = [
            Shard(train=parts[3 * k], validation=parts[3 * k + 1], test=parts[3 * k + 2])
            for k in range(devices)
        ]
        self.source = model_source(scenario.model.source, folder=scenario.folder)
        self.class_names = corpus.class_names
        architecture = Architecture.from_config(
            model_config(self.source),
            classes=len(corpus.class_names),
            pooling=scenario.model.pooling,
        )
        tokenizer = AutoTokenizer.from_pretrained(self.source)
        texts = [corpus.texts[index] for index in used]
        self.tokens = tokenise(
            texts,
            tokenizer,
            max_tokens=scenario.model.max_tokens,
            pad_id=pad_token_id(self.source),
        )
        lengths = [self.tokens.lengths[shard.train].astype(float) for shard in self.shards]
        self._workload = Workload(
            classes=len(corpus.class_names),
            mean_tokens=np.array([own.mean() for own in lengths]),
            mean_squared_tokens=np.array([(own**2).mean() for own in lengths]),
        )
        self.backbone = Backbone(
            self.source,
            family=architecture.family,
            classes=len(corpus.class_names),
            pooling=scenario.model.pooling,
            max_tokens=scenario.model.max_tokens,
            dtype=scenario.training.base_dtype,
        )
        self.stage = Classification(self.backbone, self.tokens, labels)
        self.trainer = Trainer(scenario, self.backbone, self.stage, self.shards, workers=workers)
        self.labels = labels
        self.summary = replace(
            _summary(corpus.class_names, corpus.domain_names, labels, self.shards),
            epsilon=_epsilon(scenario),
        )

    @property
    def workload(self) -> Workload:
        return self._workload

    def with_seed(self, seed: int) -> FederatedEvaluator:
        """Return an evaluator of the same model and data, which it shares, with another training seed."""
        other = copy(self)
        other.scenario = replace(self.scenario, seeds=replace(self.scenario.seeds, training=seed))
        other.trainer = Trainer(
            other.scenario,
            self.backbone,
            self.stage,
            self.shards,
            workers=self._worker_count,
            features=self.trainer.features,
        )
        return other

    def train(self, schedule: Schedule) -> Evaluation:
        start = time.perf_counter()
        key = learning_key(self.scenario, schedule)
        status, reason = "done", ""
        rounds: list[TrainedRound] = []
        try:
            _, rounds = self._trained(schedule)
        except (PwffError, RuntimeError) as error:  # torch raises RuntimeError, out of memory too
            status, reason = "failed", str(error)
        return Evaluation(
            key=key,
            schedule=schedule,
            rounds=tuple(rounds),
            wall_s=time.perf_counter() - start,
            status="done" if status == "done" else "failed",
            reason=reason,
        )

    def test(self, schedule: Schedule) -> tuple[float, ...]:
        state, _ = self._trained(schedule)
        measured = self.trainer.measures(state, schedule.rounds[-1], "test")
        return tuple(own["accuracy"] for own in measured)

    def save_device(self, schedule: Schedule, device: int, folder: str | Path) -> None:
        """Write one device's model after a schedule; see :mod:`pwff_opt.federated.export`."""
        if not 0 <= device < len(self.shards):
            raise DataError(f"device must be in 0..{len(self.shards) - 1}, got {device}")
        state, _ = self._trained(schedule)
        save_device_model(
            Path(folder),
            state.devices[device],
            source=self.source,
            family=self.backbone.family,
            pooling=self.backbone.pooling,
            class_names=self.class_names,
            peft=self.scenario.peft,
        )

    def _trained(self, schedule: Schedule) -> tuple[State, list[TrainedRound]]:
        """Return state and learning curve after a schedule, training what no checkpoint holds."""
        paths = [
            checkpoint_path(self._folder, learning_key(self.scenario, schedule.prefix(n + 1)))
            for n in range(len(schedule))
        ]
        state = self.trainer.initial()
        rounds: list[TrainedRound] = []
        for done in range(len(schedule), 0, -1):
            loaded = load_checkpoint(paths[done - 1])
            if loaded is not None and len(loaded[1]) == done:
                state, rounds = loaded
                break
        for number in range(len(rounds), len(schedule)):
            state, entry = self.trainer.round(
                state, number, schedule.rounds[number], schedule.present[number], done=self._count
            )
            rounds.append(entry)
            save_checkpoint(paths[number], state, rounds)
            make_room(self._folder, self.scenario.training.checkpoint_byte, keep=paths)
        return state, rounds

    def _count(self) -> None:
        self.device_rounds += 1
        self._tick(self.device_rounds)


def _summary(
    classes: tuple[str, ...],
    domains: tuple[str, ...],
    labels: NDArray[np.int64],
    shards: list[Shard],
) -> Summary:
    count = len(classes)
    train = [np.bincount(labels[shard.train], minlength=count) for shard in shards]
    test = [np.bincount(labels[shard.test], minlength=count) / len(shard.test) for shard in shards]
    common = int(np.sum(train, axis=0).argmax())
    return Summary(
        sentences=len(labels),
        domains=domains,
        classes=classes,
        majority=float(np.mean([shares[common] for shares in test])),
        majority_per_device=float(
            np.mean([shares[own.argmax()] for shares, own in zip(test, train, strict=True)])
        ),
    )


def _epsilon(scenario: Scenario) -> float | None:
    table = scenario.aggregation
    if not table.noise_multiplier > 0:
        return None
    return spent_epsilon(
        noise_multiplier=table.noise_multiplier,
        rounds=scenario.training.rounds,
        devices_per_round=table.devices_per_round,
        devices=len(scenario.devices),
        delta=table.privacy_delta,
    )
