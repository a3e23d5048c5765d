"""The evaluator that really trains: one scenario's model, data and devices on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pwff_opt.costs import Workload
from pwff_opt.data.models import portable_name
from pwff_opt.errors import DataError, DecisionError, PwffError
from pwff_opt.evaluation import Evaluation, TrainedRound
from pwff_opt.federated.exchange.exchange import State
from pwff_opt.federated.exchange.privacy import spent_epsilon
from pwff_opt.federated.export.export import save_device_model
from pwff_opt.federated.model.passes import Passes
from pwff_opt.federated.training.checkpoint import (
    checkpoint_path,
    load_checkpoint,
    make_room,
    save_checkpoint,
)
from pwff_opt.federated.training.material import Material, Summary
from pwff_opt.federated.training.trainer import Trainer
from pwff_opt.planning.demand import CostModel
from pwff_opt.planning.feasibility import as_schedule, check_ranks, demanded
from pwff_opt.registry import STAGES
from pwff_opt.runs.identity import learning_key, learning_keys
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.schedule import Schedule


class FederatedEvaluator:
    """Trains schedules with the scenario's model and data, and keeps a checkpoint after every round.

    A checkpoint's key is that of the schedule's prefix, so a training that was killed goes on after
    its last round, and one that shares its first rounds with another does not train them again, while
    there is room for checkpoints.

    A schedule may be given as its text. One that does not fit scenario or model is a DecisionError, one
    that a device lacks the memory for an InfeasibleError; a training that goes wrong is no error, but an
    evaluation whose ``status`` is "failed".

    Parameters
    ----------
    scenario : Scenario
    checkpoints : folder for the checkpoints.
    tick : callable
        Called after each device's local steps with the number of them done in this session.
    workers : int
        Devices trained side by side; as many as there are cores if not given. It changes speed and
        memory, never results.
    like : FederatedEvaluator
        Its model, data and cached activations are used where the scenarios agree on them.
    """

    def __init__(
        self,
        scenario: Scenario,
        checkpoints: str | Path,
        *,
        tick: Callable[[int], None] = lambda _: None,
        workers: int | None = None,
        like: FederatedEvaluator | None = None,
    ) -> None:
        if not isinstance(scenario, Scenario):
            raise DecisionError(
                f"scenario must be a Scenario, as read_scenario(NAME or PATH) returns it, got {scenario!r}"
            )
        self.scenario = scenario
        self._folder = Path(checkpoints)
        self._tick, self._worker_count = tick, workers
        self.device_rounds: int = 0 if like is None else like.device_rounds
        self.material: Material = Material.of(
            scenario, None if like is None else like.material, workers=workers
        )
        self._costs = CostModel(scenario, self.material.workload)
        shares = like is not None and like.material.stage.tokens is self.material.stage.tokens
        self.trainer: Trainer = Trainer(
            scenario,
            self.material.backbone,
            self.material.stage,
            self.material.shards,
            workers=workers,
            features=like.trainer.features if like is not None and shares else None,
        )

    @property
    def workload(self) -> Workload:
        return self.material.workload

    @property
    def summary(self) -> Summary:
        """What the data are like."""
        return self.material.summary

    @property
    def epsilon(self) -> float | None:
        """Where noise is added, what all rounds of one training spend of a device's privacy.

        The shared blocks are (epsilon, ``aggregation.privacy_delta``)-private, neighbours being data in
        which all that one device holds is replaced
        (:func:`pwff_opt.federated.exchange.privacy.spent_epsilon`).
        Further trainings on the same data, and accuracies that are published, spend more.
        """
        return _epsilon(self.scenario)

    def with_seed(self, seed: int) -> FederatedEvaluator:
        """Return an evaluator of the same model and data, which it shares, with another training seed."""
        seeds = replace(self.scenario.seeds, training=seed)
        other = FederatedEvaluator(
            replace(self.scenario, seeds=seeds),
            self._folder,
            tick=self._tick,
            workers=self._worker_count,
            like=self,
        )
        other._costs = self._costs  # other participants may be drawn, but plans are made for these
        return other

    def train(self, schedule: Schedule | str) -> Evaluation:
        start = time.perf_counter()
        schedule = self._possible(schedule)
        key = learning_key(self.scenario, schedule)
        status, reason = "done", ""
        rounds: list[TrainedRound] = []
        try:
            _, rounds = self._trained(schedule)
        except DecisionError:
            raise  # the caller's mistake, no matter of training
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

    def rounds_kept(self, schedule: Schedule | str) -> int:
        """Return how many rounds of a schedule checkpoints hold: training goes on after them."""
        return len(self._kept(self._possible(schedule))[1])

    def test(self, schedule: Schedule | str) -> tuple[float, ...]:
        return tuple(own["accuracy"] for own in self.measures(schedule))

    def model(self, schedule: Schedule | str, device: int) -> Passes:
        """Return passes through one device's model after a schedule."""
        schedule = self._possible(schedule)
        state, _ = self._trained(schedule)
        return self.trainer.model(state, schedule.rounds[-1], device)

    def measures(self, schedule: Schedule | str) -> list[dict[str, float]]:
        """Return all that the stage measures of every device's model on its test data, [device]."""
        schedule = self._possible(schedule)
        state, _ = self._trained(schedule)
        return self.trainer.measures(state, schedule.rounds[-1], "test")

    def save_device(self, schedule: Schedule | str, device: int, folder: str | Path) -> None:
        """Write one device's model after a schedule; see :mod:`pwff_opt.federated.export.export`."""
        if not 0 <= device < len(self.material.shards):
            raise DataError(f"device must be in 0..{len(self.material.shards) - 1}, got {device}")
        state, _ = self._trained(self._possible(schedule))
        prompts = STAGES[self.scenario.training.stage].prompts
        save_device_model(
            Path(folder),
            state.devices[device],
            source=portable_name(self.scenario.model.source, folder=self.scenario.folder),
            family=self.material.backbone.family,
            pooling=self.material.backbone.pooling,
            class_names=self.material.class_names,
            window=self.material.backbone.ends.window,
            system_prompt=self.scenario.model.system_prompt if prompts else None,
            peft=self.scenario.peft,
        )

    def _possible(self, schedule: Schedule | str) -> Schedule:
        """Return the schedule, if scenario, model and every device's memory allow it."""
        schedule = as_schedule(schedule, devices=len(self.scenario.devices))
        demanded(self._costs, schedule)
        check_ranks(self.scenario, *schedule.rounds)
        return schedule

    def _trained(self, schedule: Schedule) -> tuple[State, list[TrainedRound]]:
        """Return state and learning curve after a schedule, training what no checkpoint holds."""
        paths = self._paths(schedule)
        state, rounds = self._kept(schedule)
        for number in range(len(rounds), len(schedule)):
            state, entry = self.trainer.round(
                state, number, schedule.rounds[number], schedule.present[number], done=self._count
            )
            rounds.append(entry)
            save_checkpoint(paths[number], state, rounds)
            make_room(self._folder, self.scenario.training.checkpoint_byte, keep=paths)
        return state, rounds

    def _kept(self, schedule: Schedule) -> tuple[State, list[TrainedRound]]:
        """Return the same as far as checkpoints hold it."""
        paths = self._paths(schedule)
        for done in range(len(schedule), 0, -1):
            loaded = load_checkpoint(paths[done - 1])
            if loaded is not None and len(loaded[1]) == done:
                return loaded
        return self.trainer.initial(), []

    def _paths(self, schedule: Schedule) -> list[Path]:
        """Return where the state after each round is kept."""
        cuts = [schedule.prefix(n + 1) for n in range(len(schedule))]
        return [checkpoint_path(self._folder, key) for key in learning_keys(self.scenario, cuts)]

    def _count(self) -> None:
        self.device_rounds += 1
        self._tick(self.device_rounds)


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
