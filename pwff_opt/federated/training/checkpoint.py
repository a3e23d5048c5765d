"""The state after a round, as one safetensors file: blocks of all devices, server, how they came about."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pwff_opt.evaluation import TrainedRound
from pwff_opt.federated.exchange.exchange import State
from pwff_opt.federated.model.blocks import Tensors
from pwff_opt.runs.records import write_atomically


def checkpoint_path(folder: Path, key: str) -> Path:
    return folder / f"{key}.safetensors"


def save_checkpoint(path: Path, state: State, rounds: Sequence[TrainedRound]) -> None:
    """Write the state and the learning curve so far.

    A tensor that all devices share (the very same object) is stored once, as ``shared/NAME``; the
    others as ``device{k}/NAME``; what the server has sent to all as ``sent/NAME``, its moments as
    ``server/NAME`` and what a device's uploads owe as ``owed{k}/NAME``.
    """
    tensors: Tensors = {}
    for device, own in enumerate(state.devices):
        for name, tensor in own.items():
            common = all(name in other and other[name] is tensor for other in state.devices)
            if common:
                tensors[f"shared/{name}"] = tensor.contiguous()
            else:  # a copy: some devices may share it, and safetensors stores no memory twice
                tensors[f"device{device}/{name}"] = tensor.clone(
                    memory_format=torch.contiguous_format
                )
    tensors |= {f"sent/{name}": tensor.clone() for name, tensor in state.sent.items()}
    tensors |= {f"server/{name}": tensor for name, tensor in state.moments.items()}
    for device, owed in enumerate(state.residuals):
        tensors |= {f"owed{device}/{name}": tensor for name, tensor in owed.items()}
    metadata = {
        "devices": str(len(state.devices)),
        "rounds": json.dumps([_to_json(entry) for entry in rounds]),
    }
    write_atomically(path, lambda target: save_file(tensors, target, metadata=metadata))


def load_checkpoint(path: Path) -> tuple[State, list[TrainedRound]] | None:
    """Return what :func:`save_checkpoint` wrote; None if there is no file, or none that can be read."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            count = int(metadata["devices"])
            devices: list[Tensors] = [{} for _ in range(count)]
            owed: list[Tensors] = [{} for _ in range(count)]
            sent: Tensors = {}
            moments: Tensors = {}
            for key in file.keys():  # noqa: SIM118  (not a mapping)
                holder, name = key.split("/", 1)
                # A copy: as the file has it, it may begin anywhere in memory, and products then
                # round otherwise.
                tensor = file.get_tensor(key).clone()
                if holder == "shared":
                    for own in devices:
                        own[name] = tensor
                elif holder == "sent":
                    sent[name] = tensor
                elif holder == "server":
                    moments[name] = tensor
                elif holder.startswith("owed"):
                    owed[int(holder.removeprefix("owed"))][name] = tensor
                else:
                    devices[int(holder.removeprefix("device"))][name] = tensor
            rounds = [_from_json(entry) for entry in json.loads(metadata["rounds"])]
        # Used now, for make_room; few file systems note it by themselves.
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    except (FileNotFoundError, SafetensorError, KeyError, ValueError, IndexError, TypeError):
        return None
    return State(devices=tuple(devices), sent=sent, moments=moments, residuals=tuple(owed)), rounds


def make_room(folder: Path, limit_byte: float, *, keep: Collection[Path]) -> None:
    """Delete checkpoints, the ones unused for longest first, until the rest fit the limit.

    Those in ``keep`` stay. What is deleted can be trained again, to the same bits.
    """
    files = [(path, path.stat()) for path in folder.glob("[!.]*.safetensors")]
    total = sum(status.st_size for _, status in files)
    for path, status in sorted(files, key=lambda file: file[1].st_atime_ns):
        if total <= limit_byte:
            break
        if path not in keep:
            path.unlink(missing_ok=True)
            total -= status.st_size


def _to_json(entry: TrainedRound) -> dict[str, Any]:
    notes = {name: _nulls(values) for name, values in entry.notes.items()}
    return asdict(entry) | {"loss": _nulls(entry.loss), "notes": notes}


def _nulls(values: Sequence[float]) -> list[float | None]:
    """Return the values with None for NaN, which is no JSON."""
    return [None if math.isnan(value) else value for value in values]


def _numbers(values: Sequence[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if value is None else value for value in values)


def _from_json(entry: dict[str, Any]) -> TrainedRound:
    return TrainedRound(
        loss=_numbers(entry["loss"]),
        accuracy=tuple(entry["accuracy"]),
        uplink_bit=tuple(entry["uplink_bit"]),
        diverged=tuple(entry["diverged"]),
        notes={name: _numbers(values) for name, values in entry["notes"].items()},
    )
