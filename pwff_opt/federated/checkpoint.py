"""The state after a round, as one safetensors file: every device's blocks, and how they came about."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pwff_opt.evaluation import TrainedRound
from pwff_opt.federated.blocks import Tensors
from pwff_opt.records import write_atomically


def checkpoint_path(folder: Path, key: str) -> Path:
    return folder / f"{key}.safetensors"


def save_checkpoint(path: Path, states: Sequence[Tensors], rounds: Sequence[TrainedRound]) -> None:
    """Write the state of all devices and the learning curve so far.

    A tensor that all devices share (the very same object) is stored once, as ``shared/NAME``; the
    others as ``device{k}/NAME``.
    """
    tensors: Tensors = {}
    for device, state in enumerate(states):
        for name, tensor in state.items():
            common = all(name in other and other[name] is tensor for other in states)
            tensors[f"shared/{name}" if common else f"device{device}/{name}"] = tensor.contiguous()
    metadata = {
        "devices": str(len(states)),
        "rounds": json.dumps([asdict(entry) for entry in rounds]),
    }
    write_atomically(path, lambda target: save_file(tensors, target, metadata=metadata))


def load_checkpoint(path: Path) -> tuple[list[Tensors], list[TrainedRound]] | None:
    """Return what :func:`save_checkpoint` wrote; None if there is no file, or none that can be read."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            states: list[Tensors] = [{} for _ in range(int(metadata["devices"]))]
            for key in file.keys():  # noqa: SIM118  (not a mapping)
                holder, name = key.split("/", 1)
                tensor = file.get_tensor(key)
                if holder == "shared":
                    for state in states:
                        state[name] = tensor
                else:
                    states[int(holder.removeprefix("device"))][name] = tensor
            rounds = [
                TrainedRound(
                    loss=tuple(entry["loss"]),
                    accuracy=tuple(entry["accuracy"]),
                    uplink_bit=entry["uplink_bit"],
                )
                for entry in json.loads(metadata["rounds"])
            ]
    except (FileNotFoundError, SafetensorError, KeyError, ValueError):
        return None
    return states, rounds
