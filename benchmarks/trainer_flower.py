"""Flower's simulation of the trainer's job: ``python trainer_flower.py JOB.npz OUT.json``.

Runs in an environment of its own (``.venv-flower``), which has torch, transformers, peft and Flower,
and nothing of ours. Clients are Flower's message-based ClientApps, run by its Ray engine: one core and
one torch thread each, as many at a time as there are cores, which was the fastest way here. A
process keeps its model from message to message; a client's personal tensors live in its Flower state,
the shared ones travel, and the stock FedAvg averages what travels. Before the clock starts, one
round without training lets every process load torch and the model.
"""

from __future__ import annotations

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_DEDUP_LOGS"] = "0"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from trainer_rival import Job, Outcome, PeftModel, load_base

JOB = "PWFF_FLOWER_JOB"  # the path travels to the clients' processes in the environment
app = ClientApp()
_models: dict[str, PeftModel] = {}


def model() -> PeftModel:
    """Return this process's model, loaded when first needed."""
    path = os.environ[JOB]
    if path not in _models:
        torch.set_num_threads(1)
        job = Job.load(Path(path))
        _models[path] = PeftModel(load_base(job.source, job.classes), job)
    return _models[path]


def tensors_of(message: Message, context: Context, device: int) -> dict[str, torch.Tensor]:
    job = model().job
    state = context.state
    own = state["personal"].to_torch_state_dict() if "personal" in state else job.first(device)
    return {**own, **message.content["arrays"].to_torch_state_dict()}


@app.train()
def train(message: Message, context: Context) -> Message:
    device = int(context.node_config["partition-id"])
    own, number = model(), int(message.content["config"]["server-round"]) - 2
    tensors, loss = tensors_of(message, context, device), 0.0
    if number >= 0:
        own.load(tensors)
        loss = own.local_steps(own.job.batches[number, device])
        tensors = own.collect()
    shared = {name: value for name, value in tensors.items() if own.job.is_shared(name)}
    personal = {name: value for name, value in tensors.items() if name not in shared}
    context.state["personal"] = ArrayRecord(personal)
    metrics = MetricRecord({"device": device, "value": loss, "num-examples": 1})
    return Message(
        RecordDict({"arrays": ArrayRecord(shared), "metrics": metrics}), reply_to=message
    )


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    device = int(context.node_config["partition-id"])
    own = model()
    own.load(tensors_of(message, context, device))
    accuracy = own.accuracy(own.job.validation[device])
    metrics = MetricRecord({"device": device, "value": accuracy, "num-examples": 1})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


class Marked(FedAvg):
    """FedAvg over what clients send, validated after marked rounds only; notes values and times."""

    def __init__(self, job: Job) -> None:
        every = {"min_train_nodes": job.devices, "min_evaluate_nodes": job.devices}
        super().__init__(min_available_nodes=job.devices, **every)
        self.job = job
        self.loss: list[list[float]] = []
        self.accuracy: dict[int, list[float]] = {}
        self.begun = self.ended = 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        if server_round == 2:  # every process has its model now
            self.begun = time.perf_counter()
        return super().configure_train(server_round, arrays, config, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        if server_round - 1 not in self.job.marks:
            return []
        return super().configure_evaluate(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        replies = list(replies)
        if server_round > 1:
            self.loss.append(_values(replies))
        return super().aggregate_train(server_round, replies)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> Any:
        replies = list(replies)
        if replies:
            self.accuracy[server_round - 1] = _values(replies)
        self.ended = time.perf_counter()
        return super().aggregate_evaluate(server_round, replies)


def _values(replies: list[Message]) -> list[float]:
    failed = [reply.error.reason for reply in replies if reply.has_error()]
    if failed:
        raise RuntimeError(f"a client failed: {failed[0]}")
    metrics = [reply.content["metrics"] for reply in replies]
    return [float(entry["value"]) for entry in sorted(metrics, key=lambda entry: entry["device"])]


def main() -> None:
    path, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    os.environ[JOB] = str(path)
    job = Job.load(path)
    strategy = Marked(job)
    server = ServerApp()

    @server.main()
    def run(grid: Grid, _context: Context) -> None:
        shared = {name: value for name, value in job.first(0).items() if job.is_shared(name)}
        strategy.start(grid, ArrayRecord(shared), num_rounds=job.rounds + 1)

    run_simulation(
        server,
        app,
        num_supernodes=job.devices,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    if len(strategy.loss) != job.rounds:
        raise RuntimeError(f"{job.rounds} rounds must have been trained, got {len(strategy.loss)}")
    found = Outcome(
        seconds=strategy.ended - strategy.begun, loss=strategy.loss, accuracy=strategy.accuracy
    )
    packages = ("flwr", "ray", "torch", "transformers", "peft")
    found.save(out, versions={name: version(name) for name in packages})


if __name__ == "__main__":
    # Clients' processes import the app by name: as part of __main__ it would travel by value, and
    # load its model again at every message.
    import trainer_flower

    trainer_flower.main()
