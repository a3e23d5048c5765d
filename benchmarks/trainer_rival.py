"""A plain peft loop for the trainer's job, as a competent user would write it.

One resident transformers model with a LoRA by peft and bottleneck adapters by hooks, in the layers that
a schedule trains and nowhere else; devices take turns, their trainable tensors are copied in and out.
Needs torch, transformers and peft, and nothing of ours: the Flower rival uses it too.

``python trainer_rival.py`` trains in a process of its own: for every line of standard input, the paths
of a job and of the answer as a JSON list, it trains, writes the answer and prints a line.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

IntArray = NDArray[np.int64]
Tensors = dict[str, torch.Tensor]
EVALUATION_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Job:
    """One schedule to train; every field is a number, a text or an array, so that it fits an .npz file.

    ``states`` has a letter a layer (f, p or a), the same in every round. Sequence i of the data is
    ``ids[offsets[i]:offsets[i + 1]]``; the other arrays hold such numbers i.
    """

    source: str
    classes: int
    ids: IntArray
    offsets: IntArray
    pad_id: int
    labels: IntArray
    validation: IntArray
    """[device, sequence]"""
    batches: IntArray
    """[round, device, step, sequence]: every mini-batch, drawn beforehand."""
    marks: IntArray
    """Rounds after which the models are validated, counted from 1."""
    states: str
    rank: int
    adapter_width: int
    lora_scale: float
    head_shared: bool
    learning_rate: float
    head_learning_rate: float
    weight_decay: float
    start: dict[str, NDArray[np.float32]]
    """``DEVICE/NAME`` -> first value of a trainable tensor, named as :meth:`PeftModel.trained` names it."""

    @property
    def rounds(self) -> int:
        return len(self.batches)

    @property
    def devices(self) -> int:
        return int(self.batches.shape[1])

    @property
    def device_steps(self) -> int:
        return int(np.prod(self.batches.shape[:3]))

    def first(self, device: int) -> Tensors:
        prefix = f"{device}/"
        return {
            name.removeprefix(prefix): torch.from_numpy(value.copy())
            for name, value in self.start.items()
            if name.startswith(prefix)
        }

    def is_shared(self, name: str) -> bool:
        """Whether a tensor is averaged over the devices."""
        kind, layer = name.split(".")[:2]
        return self.head_shared if kind == "head" else kind == "adapter" and self.at(layer) == "a"

    def at(self, layer: int | str) -> str:
        return self.states[int(layer)]

    def save(self, path: Path) -> None:
        plain = {
            entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "start"
        }
        np.savez(path, **plain, **{f"start/{name}": value for name, value in self.start.items()})  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Job:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        start = {
            name.removeprefix("start/"): value
            for name, value in arrays.items()
            if name.startswith("start/")
        }
        plain = {
            name: value.item() if value.ndim == 0 else value
            for name, value in arrays.items()
            if not name.startswith("start/")
        }
        return cls(**plain, start=start)


class Adapter(nn.Module):
    """Houlsby's bottleneck adapter at the output of a layer."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(hidden, width), nn.Linear(width, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.up(nn.functional.gelu(self.down(x)))
        return y


class MeanPooling(nn.Module):
    """The mean over a sequence's tokens, normalised, in the place of BERT's pooler."""

    mask: torch.Tensor

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weights = self.mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weights).sum(1) / weights.sum(1)
        return nn.functional.layer_norm(mean, mean.shape[-1:])


@functools.cache
def load_base(source: str, classes: int) -> Any:
    transformers_logging.set_verbosity_error()  # the head is new, as it should be
    transformers_logging.disable_progress_bar()
    model = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=classes, dtype=torch.float32, use_safetensors=True
    )
    return model.eval()  # no dropout, for both sides


class PeftModel:
    """The model of one schedule, with whichever device's tensors were loaded last."""

    def __init__(self, base: Any, job: Job) -> None:
        self.job = job
        self.model = model = copy.deepcopy(base)
        trained = [layer for layer, state in enumerate(job.states) if state != "f"]
        if trained and job.rank:
            config = LoraConfig(
                r=job.rank,
                lora_alpha=job.lora_scale * job.rank,
                target_modules=["query", "value"],
                layers_to_transform=trained,
            )
            inject_adapter_in_model(config, model)
        pooling = MeanPooling()
        model.bert.pooler = pooling
        model.bert.register_forward_pre_hook(
            lambda _module, _args, kwargs: setattr(pooling, "mask", kwargs["attention_mask"]),
            with_kwargs=True,
        )
        for layer in trained:
            module = model.bert.encoder.layer[layer]
            module.adapter = Adapter(model.config.hidden_size, job.adapter_width)
            module.register_forward_hook(_apply_adapter)
        model.requires_grad_(False)
        self.trained: dict[str, nn.Parameter] = {
            f"head.{part}": value for part, value in model.classifier.named_parameters()
        }
        for layer in trained:
            for name, value in model.bert.encoder.layer[layer].named_parameters():
                if name.startswith("adapter."):
                    self.trained[f"adapter.{layer}.{name.removeprefix('adapter.')}"] = value
                elif ".lora_" in name:
                    projection, factor = name.split(".")[2], name.split(".lora_")[1][0]
                    self.trained[f"lora.{layer}.{projection}.{factor}"] = value
        for value in self.trained.values():
            value.requires_grad_(True)
        self._labels = torch.from_numpy(job.labels)

    def load(self, tensors: Tensors) -> None:
        with torch.no_grad():
            for name, value in self.trained.items():
                value.copy_(tensors[name])

    def collect(self) -> Tensors:
        return {name: value.detach().clone() for name, value in self.trained.items()}

    def inputs(self, batch: IntArray) -> dict[str, torch.Tensor]:
        """Return ids and mask, padded to the longest sequence of the batch."""
        job = self.job
        rows = [
            torch.from_numpy(job.ids[job.offsets[i] : job.offsets[i + 1]]) for i in batch.tolist()
        ]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=job.pad_id)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask}

    def local_steps(self, batches: IntArray) -> float:
        """Take AdamW steps over ``batches`` [step, sequence]; return the mean loss."""
        job = self.job
        head = [value for name, value in self.trained.items() if name.startswith("head.")]
        body = [value for name, value in self.trained.items() if not name.startswith("head.")]
        groups: list[dict[str, Any]] = [{"params": head, "lr": job.head_learning_rate}]
        groups += [{"params": body, "lr": job.learning_rate}] if body else []
        optimiser = torch.optim.AdamW(groups, weight_decay=job.weight_decay)
        total = 0.0
        for batch in batches:
            loss = self.model(**self.inputs(batch), labels=self._labels[batch]).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item()
        return total / len(batches)

    def accuracy(self, indices: IntArray) -> float:
        right = 0
        with torch.inference_mode():
            for batch in np.array_split(
                indices, range(EVALUATION_BATCH, len(indices), EVALUATION_BATCH)
            ):
                logits = self.model(**self.inputs(batch)).logits
                right += int((logits.argmax(-1) == self._labels[batch]).sum())
        return right / len(indices)


def _apply_adapter(layer: Any, _args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (layer.adapter(output[0]), *output[1:])
    return layer.adapter(output)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a training gave and how long it took."""

    seconds: float
    loss: list[list[float]]
    """[round][device]"""
    accuracy: dict[int, list[float]]
    """Validated round, counted from 1 -> [device]."""

    def save(self, path: Path, **more: Any) -> None:
        path.write_text(json.dumps(asdict(self) | more), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Outcome:
        found = json.loads(path.read_text(encoding="utf-8"))
        accuracy = {int(number): scores for number, scores in found["accuracy"].items()}
        return cls(seconds=found["seconds"], loss=found["loss"], accuracy=accuracy)


def rounds(model: PeftModel) -> Iterator[tuple[list[float], list[float]]]:
    """Train; yield the loss of every device, and its accuracy in rounds that are validated."""
    job = model.job
    states = [job.first(device) for device in range(job.devices)]
    for number in range(job.rounds):
        losses, after = [], []
        for device, state in enumerate(states):
            model.load(state)
            losses.append(model.local_steps(job.batches[number, device]))
            after.append(model.collect())
        for name in filter(job.is_shared, after[0]):
            mean = torch.stack([state[name] for state in after]).mean(0)
            for state in after:
                state[name] = mean
        states = after
        scores = []
        if number + 1 in job.marks:
            for device, state in enumerate(states):
                model.load(state)
                scores.append(model.accuracy(job.validation[device]))
        yield losses, scores


def train(model: PeftModel) -> Outcome:
    """Carry out the whole job on all cores."""
    start = time.perf_counter()
    found = list(rounds(model))
    return Outcome(
        seconds=time.perf_counter() - start,
        loss=[losses for losses, _ in found],
        accuracy={n + 1: scores for n, (_, scores) in enumerate(found) if scores},
    )


def main() -> None:
    for line in sys.stdin:
        given, answer = map(Path, json.loads(line))
        job = Job.load(given)
        train(PeftModel(load_base(job.source, job.classes), job)).save(answer)
        print("done", flush=True)


if __name__ == "__main__":
    main()
