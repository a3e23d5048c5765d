"""The trainer against a plain peft loop and Flower; its share of the machine's arithmetic; its memory.

*Job*: the ``hutto`` scenario as ``make front`` trains it: 4 devices, 8 rounds of 5 steps of 8
sentences, validation after the marked rounds. *Schedules*: those the search asks for in its 24
trainings, a first generation and two of offspring, of which every third is taken. To draw them
nothing is trained: an evaluator pretends, with accuracies that rise with rounds, depth (up to three
layers) and rank like those of the README's front, and noise of a fixed seed; so which schedules are
drawn does not depend on the machine.

*Plain peft* (``trainer_rival.py``): one resident float32 model, LoRA by peft, gradients for the
trained blocks only, AdamW, random mini-batches padded to their longest sequence, evaluation in
batches of 32 in the order of the data, padded likewise, in inference mode; all cores in every
product; a process of its own, which our settings do not reach. *Same batches*: that loop with the
mini-batches of ours, which are cut by length and so hardly padded: no user would have them, but both
sides then take the same steps, and losses and accuracies must agree. *Flower* (``trainer_flower.py``):
the job of *same batches* by its simulation.

All sides run interleaved, schedule by schedule, each schedule with a training seed of its own; ratios
are of times of the same schedule, ours and plain peft in turn, medians of three; *same batches* and Flower
run once. Before them ours trains the schedule once, with whatever it has yet to prepare (end-to-end seconds,
with set-up and checkpoints).

*Share of the peak*: the time that the floating-point operations in products that are left to do would take
at the peak, over ours. The peak of a dtype is what the faster of MKL and oneDNN reaches with
[1024, 384] x [384, 1536] on all cores, measured between the runs; products with frozen weights count by
that of their type; attention, blocks and heads, 2 to 4 % of all, by that of float32, as they run (by one peak
for all, shares in bfloat16 would be 2 to 3 % lower: it is printed beside). Left to do is, for the tokens
there are, without padding, a forward pass from the lowest layer with blocks up, and a backward pass, less
what is known of that layer: queries, keys and values by its frozen weights; without a LoRA, all of it but
its adapter. It is held against the products that the trainer calls.

*Memory*: peak resident memory (VmHWM) of processes with 8, 64 and 512 devices of 28 short sentences each,
one step, one round. A device should cost its blocks and its data: token ids, and the base model's outputs
that training resumes from, at one layer or at all (a search resumes from any).

``python benchmarks/bench_trainer.py`` (12 minutes), ``--quick`` or BENCH_QUICK=1 for a smoke test; it
writes ``benchmarks/results/trainer.json`` (``--quick`` writes nothing unless ``--out`` is given).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from harness import machine, parser, versions, write
from torch.utils.flop_counter import FlopCounterMode
from trainer_rival import IntArray, Job, Outcome, PeftModel, load_base
from transformers import AutoTokenizer

from pwff_opt.costs import Workload
from pwff_opt.data.corpora import load_corpus
from pwff_opt.data.models import model_config, model_source
from pwff_opt.data.partition import partition
from pwff_opt.evaluation import Evaluation, TrainedRound
from pwff_opt.federated.model.blocks import fresh_adapter, fresh_head, fresh_lora
from pwff_opt.federated.model.products import Frozen
from pwff_opt.federated.training.evaluator import FederatedEvaluator
from pwff_opt.federated.training.trainer import Trainer
from pwff_opt.front.front import pareto_front
from pwff_opt.rng import stream
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.files import read_scenario
from pwff_opt.scenario.schedule import RoundDecision, Schedule

HERE = Path(__file__).resolve().parent
FLOWER = HERE.parent / ".venv-flower"
PACKAGES = ("numpy", "torch", "transformers", "peft")
Dtype = Literal["float32", "bfloat16"]
DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RIVALS = ("peft", "peft, same batches", "flower")
SIDES = (*DTYPES, *RIVALS)
TARGET_RATIO: dict[Dtype, float] = {"float32": 4, "bfloat16": 6}
TARGET_SHARE = 0.7
QUIET_LOAD = 0.5
UNDISTURBED = 0.8  # of the best product timed: a slower one tells of other work on the machine
TRAININGS = 24  # of `make front`
MEMORY_SCHEDULE = "1x4:ffppaa"


@dataclass(frozen=True)
class Size:
    first: int = 0  # of the schedules drawn, this one
    every: int = 3  # and every such one after it
    repeats: int = 3
    same_batches: int = 3  # of those schedules, one in so many also with our batches
    flower: int = 2  # of those, so many through Flower
    devices: tuple[int, ...] = (8, 64, 512)
    peak_calls: int = 200


QUICK = Size(first=2, every=8, repeats=1, same_batches=3, flower=1, devices=(8, 64), peak_calls=50)


# -- schedules ------------------------------------------------------------------------------------


class Pretended:
    """Stands in for the trainer while schedules are drawn."""

    def __init__(self, scenario: Scenario, classes: int) -> None:
        self._scenario = scenario
        self.workload = Workload.padded(scenario, classes=classes)
        self._rng = np.random.default_rng(24)

    def train(self, schedule: Schedule) -> Evaluation:
        decision = schedule.rounds[0]
        gain = min(1.0, 0.7 + 0.1 * depth_of(schedule)) if any(decision.trained) else 0.05
        gain *= 0.9 + 0.1 * decision.ranks[0] / max(self._scenario.decisions.ranks)
        devices, marks = len(decision.ranks), self._scenario.training.validate_after
        entries = []
        for number in range(1, len(schedule) + 1):
            mean = 0.41 + 0.16 * gain * number**0.27
            scores = mean + 0.04 * self._rng.standard_normal(devices)
            accuracy = tuple(scores.tolist()) if number in marks else ()
            entries.append(
                TrainedRound(loss=(1.0,) * devices, accuracy=accuracy, uplink_bit=(0,) * devices)
            )
        return Evaluation(key=str(schedule), schedule=schedule, rounds=tuple(entries), wall_s=0.0)

    def test(self, schedule: Schedule) -> tuple[float, ...]:
        return (0.5,) * len(schedule.rounds[0].ranks)


def drawn(scenario: Scenario) -> list[Schedule]:
    """Return every schedule that the search asks for."""
    front = pareto_front(scenario, Pretended(scenario, classes=3), trainings=TRAININGS)
    return [evaluation.schedule for evaluation in front.evaluations]


def first_layer(decision: RoundDecision) -> int:
    """Return the lowest layer with blocks, in a schedule of equal rounds; their number if none."""
    return next((n for n, here in enumerate(decision.trained) if here), len(decision.states))


def depth_of(schedule: Schedule) -> int:
    return len(schedule.rounds[0].states) - first_layer(schedule.rounds[0])


# -- the job, for the rivals ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Material:
    """Data and model of a scenario, brought as any script would, numbered as our trainer numbers them."""

    scenario: Scenario
    source: str
    classes: int
    ids: IntArray
    offsets: IntArray
    pad_id: int
    labels: IntArray
    train: IntArray
    validation: IntArray

    @classmethod
    def of(cls, scenario: Scenario) -> Material:
        corpus = load_corpus(scenario.data, folder=Path(scenario.folder))
        devices = len(scenario.devices)
        held = partition(corpus, scenario.data, devices=devices, seed=scenario.seeds.data)
        used = np.concatenate([np.concatenate([s.train, s.validation, s.test]) for s in held])
        source = model_source(scenario.model.source, folder=scenario.folder)
        tokenizer = AutoTokenizer.from_pretrained(source)
        encoded = tokenizer(
            [corpus.texts[index] for index in used],
            truncation=True,
            max_length=scenario.model.max_tokens,
        )["input_ids"]
        data = scenario.data
        a, b = data.train_per_device, data.train_per_device + data.validation_per_device
        numbers = np.arange(len(used)).reshape(devices, -1)
        return cls(
            scenario=scenario,
            source=source,
            classes=len(corpus.class_names),
            ids=np.concatenate([np.asarray(row, dtype=np.int64) for row in encoded]),
            offsets=np.concatenate([[0], np.cumsum([len(row) for row in encoded])]),
            pad_id=int(tokenizer.pad_token_id),
            labels=corpus.labels[used],
            train=numbers[:, :a],
            validation=numbers[:, a:b],
        )

    @property
    def lengths(self) -> IntArray:
        return np.diff(self.offsets)

    def with_seed(self, seed: int) -> Material:
        """Return the same with another training seed."""
        seeds = replace(self.scenario.seeds, training=seed)
        return replace(self, scenario=replace(self.scenario, seeds=seeds))

    def random_batches(self, rounds: int) -> IntArray:
        """Return mini-batches as anyone draws them; no example twice in a round, like ours."""
        seed = self.scenario.seeds.training
        training = self.scenario.training
        steps, size = training.local_steps, training.batch_size
        drawn = [
            stream(seed, "benchmark", round=number, device=device)
            .permutation(own)[: steps * size]
            .reshape(steps, size)
            for number in range(rounds)
            for device, own in enumerate(self.train)
        ]
        return np.array(drawn).reshape(rounds, len(self.train), steps, size)

    def own_batches(self, trainer: Trainer, rounds: int) -> IntArray:
        """Return the mini-batches of our trainer."""
        found = np.array(
            [
                [trainer.batches(number, device) for device in range(len(self.train))]
                for number in range(rounds)
            ]
        )
        if not all(np.isin(found[:, k], train).all() for k, train in enumerate(self.train)):
            raise RuntimeError(
                "our mini-batches must be of the sentences that each device trains on"
            )
        return found

    def job(self, schedule: Schedule, batches: IntArray) -> Job:
        if len(set(schedule.rounds)) > 1 or len(set(schedule.rounds[0].ranks)) > 1:
            raise ValueError(f"the rivals train one decision for all rounds, got {schedule}")
        scenario, decision = self.scenario, schedule.rounds[0]
        return Job(
            source=self.source,
            classes=self.classes,
            ids=self.ids,
            offsets=self.offsets,
            pad_id=self.pad_id,
            labels=self.labels,
            validation=self.validation,
            batches=batches,
            marks=np.array(scenario.training.validate_after),
            states=str(decision).split(":")[1],
            rank=decision.ranks[0],
            adapter_width=scenario.peft.adapter_width,
            lora_scale=scenario.peft.lora_scale,
            head_shared=scenario.peft.head == "shared",
            learning_rate=scenario.training.learning_rate,
            head_learning_rate=scenario.training.head_learning_rate,
            weight_decay=scenario.training.weight_decay,
            start=self._start(decision),
        )

    def _start(self, decision: RoundDecision) -> dict[str, np.ndarray]:
        """Return first values of every device's blocks: those ours draws, so that results compare."""
        seed, hidden = self.scenario.seeds.training, self._hidden
        head = fresh_head({"weight": (self.classes, hidden), "bias": (self.classes,)}, seed=seed)
        start: dict[str, np.ndarray] = {}
        for device, rank in enumerate(decision.ranks):
            blocks = dict(head)
            for layer in (layer for layer, here in enumerate(decision.trained) if here):
                width = self.scenario.peft.adapter_width
                blocks |= fresh_adapter(layer, hidden=hidden, width=width, seed=seed)
                if rank:
                    shapes = {"query": (hidden, hidden), "value": (hidden, hidden)}
                    blocks |= fresh_lora(layer, rank, shapes, seed=seed, round=0, device=device)
            start |= {f"{device}/{name}": value.numpy() for name, value in blocks.items()}
        return start

    @property
    def _hidden(self) -> int:
        return int(model_config(self.source)["hidden_size"])


# -- operations -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Products:
    """Floating-point operations of the matrix products of a BERT with blocks; counted as torch counts.

    ``tokens`` and ``squared`` are sums of lengths and of squared lengths over the sequences.
    """

    hidden: int
    intermediate: int
    classes: int
    width: int
    rank: int
    depth: int
    """Layers from the lowest with blocks to the top, all taken to have them."""
    trained: int
    """Layers among them that learn; the lowest always does."""
    own_weight: float = 1.0
    """What an operation of attention, blocks and heads counts; one with frozen weights counts 1."""

    def forward(self, sequences: float, tokens: float, squared: float, layers: int) -> float:
        """Of the top ``layers`` layers and the head."""
        base, product, adapter, lora = self._layer(tokens, squared)
        blocks = self.trained * (adapter + lora)
        return layers * (base + 2 * product) + blocks + self._head(sequences)

    def step(self, sequences: float, tokens: float, squared: float, layers: int) -> float:
        """Of a training step, forward through the top ``layers`` layers."""
        base, product, adapter, lora = self._layer(tokens, squared)
        head = self._head(sequences)
        total = self.forward(sequences, tokens, squared, layers) + head
        if not self.depth:
            return total
        total += head  # for its input
        total += (self.depth - 1) * (base + 4 * product)  # inputs; weights are frozen
        # Gradients of weights everywhere, of inputs above the lowest.
        total += (2 * self.trained - 1) * (adapter + lora)
        total += adapter / 2  # up-projection of the lowest
        if self.rank:
            # The lowest layer's input needs no gradient, nor do its keys; of a LoRA, B passes one to A.
            below = 2 * tokens * (2 * self.hidden * self.intermediate + self.hidden**2)
            total += below + adapter / 2 + 3 * product + lora / 2
        return total

    def known(self, tokens: float, squared: float) -> float:
        """Of a forward pass through the lowest layer, what cached activations spare."""
        base, product, _, _ = self._layer(tokens, squared)
        if not self.depth:
            return 0.0
        return 2 * tokens * 3 * self.hidden**2 if self.rank else base + 2 * product

    def _layer(self, tokens: float, squared: float) -> tuple[float, float, float, float]:
        h, own = self.hidden, self.own_weight
        base = 2 * tokens * (4 * h**2 + 2 * h * self.intermediate)
        adapter, lora = 4 * tokens * h * self.width, 8 * tokens * h * self.rank
        return base, own * 2 * squared * h, own * adapter, own * lora

    def _head(self, sequences: float) -> float:
        return self.own_weight * 2 * sequences * self.hidden * self.classes


def products(material: Material, job: Job) -> Products:
    config = model_config(material.source)
    frozen = len(job.states) - len(job.states.lstrip("f"))
    return Products(
        hidden=int(config["hidden_size"]),
        intermediate=int(config["intermediate_size"]),
        classes=job.classes,
        width=job.adapter_width,
        rank=job.rank,
        depth=len(job.states) - frozen,
        trained=sum(state != "f" for state in job.states),
    )


def needed(material: Material, job: Job, count: Products) -> float:
    """Return the operations that are left to do of a schedule, given what is cached."""
    lengths = material.lengths.astype(float)
    total = 0.0
    for batch in job.batches.reshape(-1, job.batches.shape[-1]):
        own = lengths[batch]
        tokens, squared = own.sum(), (own**2).sum()
        total += count.step(len(own), tokens, squared, count.depth) - count.known(tokens, squared)
    own = lengths[job.validation.ravel()]
    tokens, squared = own.sum(), (own**2).sum()
    passed = count.forward(len(own), tokens, squared, count.depth) - count.known(tokens, squared)
    return total + len(job.marks) * passed


def called(work: Callable[[], object]) -> float:
    """Return the operations of products with frozen weights that some work calls, filling included."""
    found: list[int] = []

    def counted(plain: Any) -> Any:
        def product(frozen: Frozen, x: torch.Tensor) -> Any:
            found.append(2 * len(x) * frozen.weight.numel())
            return plain(frozen, x)

        return product

    with (
        mock.patch.object(Frozen, "forward", counted(Frozen.forward)),
        mock.patch.object(Frozen, "backward", counted(Frozen.backward)),
    ):
        work()
    return float(sum(found))


def checked_by_torch(material: Material, model: PeftModel) -> float:
    """Return our count over torch's own, of one step of the rival, padding and all layers included."""
    job = model.job
    batch = job.batches[0, 0, 0]
    model.model.set_attn_implementation("eager")  # the fused kernel is not counted on a CPU
    with FlopCounterMode(display=False) as counter:
        model.local_steps(batch[None])
    width = int(material.lengths[batch].max())
    tokens, layers = len(batch) * width, len(job.states)
    count = products(material, job)
    return count.step(len(batch), tokens, tokens * width, layers) / float(counter.get_total_flops())


def peak_flop_per_s(dtype: Dtype, calls: int) -> float:
    """Return what the faster of MKL (torch's choice for float32) and oneDNN reaches."""
    x = torch.randn(1024, 384).to(DTYPES[dtype])
    w = torch.randn(1536, 384).to(DTYPES[dtype])
    frozen = Frozen(w, None)
    best = []
    with torch.inference_mode():
        for product in (lambda: torch.nn.functional.linear(x, w), lambda: frozen(x)):
            times = []
            for _ in range(calls):
                start = time.perf_counter()
                product()
                times.append(time.perf_counter() - start)
            best.append(float(np.median(times)))
    return 2 * 1024 * 384 * 1536 / min(best)


# -- speed ----------------------------------------------------------------------------------------


class Ours:
    """An evaluator with a folder of its own; ``setup_s`` is what it took to make one."""

    def __init__(self, scenario: Scenario, dtype: Dtype, folder: Path) -> None:
        training = replace(scenario.training, base_dtype=dtype)
        self.folder = folder
        start = time.perf_counter()
        self._evaluator = FederatedEvaluator(replace(scenario, training=training), folder)
        self.setup_s = time.perf_counter() - start

    def trainer(self, seed: int) -> Trainer:
        return self._evaluator.with_seed(seed).trainer

    def train(self, schedule: Schedule, seed: int) -> Outcome:
        evaluator = self._evaluator.with_seed(seed)
        shutil.rmtree(self.folder, ignore_errors=True)  # a checkpoint would spare the work
        self.folder.mkdir(parents=True)
        start = time.perf_counter()
        evaluation = evaluator.train(schedule)
        seconds = time.perf_counter() - start
        if evaluation.status != "done" or len(evaluation.rounds) != len(schedule):
            raise RuntimeError(f"{schedule} must train to its end: {evaluation.reason}")
        return Outcome(
            seconds=seconds,
            loss=[list(entry.loss) for entry in evaluation.rounds],
            accuracy={
                n + 1: list(entry.accuracy)
                for n, entry in enumerate(evaluation.rounds)
                if entry.accuracy
            },
        )


def summary(*outcomes: Outcome) -> dict[str, Any]:
    """Return the median time, and accuracy and loss of the last round, means over devices."""
    outcome = outcomes[0]
    if any((each.loss, each.accuracy) != (outcome.loss, outcome.accuracy) for each in outcomes):
        raise RuntimeError("the same training must give the same result")
    return {
        "seconds": float(np.median([each.seconds for each in outcomes])),
        "accuracy": float(np.mean(outcome.accuracy[len(outcome.loss)])),
        "loss": float(np.mean(outcome.loss[-1])),
    }


@dataclass
class Speed:
    """What the interleaved run found, a row a schedule."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    setup_s: dict[str, float] = field(default_factory=dict)
    peak: dict[Dtype, list[float]] = field(default_factory=lambda: {"float32": [], "bfloat16": []})
    flop_check: list[float] = field(default_factory=list)
    flower_versions: dict[str, str] = field(default_factory=dict)

    def time_peak(self, calls: int) -> None:
        for dtype, reached in self.peak.items():
            reached.append(peak_flop_per_s(dtype, calls))


class Peft:
    """The plain peft loop, in a process of its own for as long as it is needed."""

    def __init__(self, scratch: Path) -> None:
        self._given, self._answer = scratch / "peft.npz", scratch / "peft.json"
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "trainer_rival.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def train(self, job: Job) -> Outcome:
        job.save(self._given)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(
            json.dumps([str(self._given), str(self._answer)]), file=self._process.stdin, flush=True
        )
        if self._process.stdout.readline() != "done\n":
            raise RuntimeError("plain peft failed; see above")
        return Outcome.load(self._answer)

    def __enter__(self) -> Peft:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # it ends when no more jobs can come
        self._process.wait()


def compared(
    scenario: Scenario, schedules: list[Schedule], size: Size, scratch: Path, peft: Peft
) -> Speed:
    found = Speed()
    start = time.perf_counter()
    data = Material.of(scenario)
    base = load_base(data.source, data.classes)
    found.setup_s["peft"] = time.perf_counter() - start
    sides: dict[Dtype, Ours] = {}
    for dtype in DTYPES:
        sides[dtype] = Ours(scenario, dtype, scratch / dtype)
        found.setup_s[dtype] = sides[dtype].setup_s
    rounds = scenario.training.rounds
    through_flower = 0
    for number, schedule in enumerate(schedules):
        row: dict[str, Any] = {"schedule": str(schedule), "depth": depth_of(schedule)}
        seed = scenario.seeds.training + number
        material = data.with_seed(seed)
        job = material.job(schedule, material.random_batches(rounds))
        own = material.own_batches(sides["float32"].trainer(seed), rounds)
        model = PeftModel(base, job)
        row["device_steps"] = job.device_steps
        same = replace(job, batches=own)
        count = products(material, same)
        row["needed_flop"] = needed(material, same, count)
        row["needed_flop_frozen"] = needed(material, same, replace(count, own_weight=0.0))
        found.time_peak(size.peak_calls)
        for dtype, side in sides.items():
            row[dtype] = {"first_s": side.train(schedule, seed).seconds}
        outcomes: dict[str, list[Outcome]] = {}
        for _ in range(size.repeats):
            outcomes.setdefault("peft", []).append(peft.train(job))
            for dtype, side in sides.items():
                outcomes.setdefault(dtype, []).append(side.train(schedule, seed))
            found.time_peak(size.peak_calls)
        if row["depth"]:
            once_more = called(lambda: sides["float32"].train(schedule, seed))  # noqa: B023
            row["called_over_needed"] = once_more / row["needed_flop_frozen"]
        for name, repeated in outcomes.items():
            row[name] = row.get(name, {}) | summary(*repeated)
        found.flop_check.append(checked_by_torch(material, model))
        if number % size.same_batches == 1:
            row["peft, same batches"] = summary(peft.train(same))
            if (FLOWER / ".ready").is_file() and through_flower < size.flower:
                through_flower += 1
                row["flower"], found.flower_versions = flower(same, scratch)
        found.rows.append(row)
        times = "  ".join(
            f"{name} {entry['seconds']:.1f} s" for name, entry in row.items() if name in SIDES
        )
        log(f"  {number + 1}/{len(schedules)} {schedule}  {times}")
    return found


def flower(job: Job, scratch: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Train through Flower, in its own environment; return what ``summary`` does, and versions."""
    given, answer = scratch / "flower.npz", scratch / "flower.json"
    job.save(given)
    answer.unlink(missing_ok=True)
    command = [
        str(FLOWER / "bin" / "python"),
        str(HERE / "trainer_flower.py"),
        str(given),
        str(answer),
    ]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    wall_s = time.perf_counter() - start
    if done.returncode or not answer.is_file():
        raise RuntimeError(f"Flower failed: {done.stderr.strip()[-2000:]}")
    told = json.loads(answer.read_text(encoding="utf-8"))["versions"]
    return summary(Outcome.load(answer)) | {"with_start_s": wall_s}, told


def speed_report(found: Speed, *, quiet: bool) -> dict[str, Any]:
    """Return per schedule ratios and shares, and the aggregates; ``quiet``: the machine was, before."""
    peak = {dtype: float(np.median(values)) for dtype, values in found.peak.items()}
    report: dict[str, Any] = {
        "setup_s": found.setup_s,
        "peak_flop_per_s": peak,
        "needed_over_counted_flop": [min(found.flop_check), max(found.flop_check)],
        "flower_versions": found.flower_versions,
        "schedules": found.rows,
        "aggregate": {},
        "share_by_depth": {},
    }
    # Before each schedule and after each repeat of it.
    singles = np.array(found.peak["float32"]).reshape(len(found.rows), -1)
    disturbed = singles.min(axis=1) < UNDISTURBED * singles.max()
    report["disturbed"] = int(disturbed.sum())
    for row, other_work in zip(found.rows, disturbed, strict=True):
        row["disturbed"] = bool(other_work)
        for dtype in DTYPES:
            row[dtype]["ratio"] = {
                rival: row[rival]["seconds"] / row[dtype]["seconds"]
                for rival in RIVALS
                if rival in row
            }
            own_flop = row["needed_flop"] - row["needed_flop_frozen"]
            least_s = row["needed_flop_frozen"] / peak[dtype] + own_flop / peak["float32"]
            row[dtype]["least_s"] = least_s
            row[dtype]["share_of_peak"] = least_s / row[dtype]["seconds"] if row["depth"] else None
    for dtype in DTYPES:
        entry: dict[str, Any] = {}
        for rival in RIVALS:
            rows = [row for row in found.rows if rival in row]
            if not rows:
                continue
            ratios = np.array([row[dtype]["ratio"][rival] for row in rows])
            ours = sum(row[dtype]["seconds"] for row in rows)
            total = sum(row[rival]["seconds"] for row in rows) / ours
            entry[rival] = {
                "schedules": len(rows),
                "total": total,
                "geometric_mean": float(np.exp(np.log(ratios).mean())),
                "median": float(np.median(ratios)),
                **_difference(rows, dtype, rival),
            }
        ratio = entry["peft"]
        ratio["target"] = TARGET_RATIO[dtype]
        judged = quiet and not disturbed.any()
        ratio["met"] = ratio["total"] >= TARGET_RATIO[dtype] if judged else None
        ours = found.setup_s[dtype] + sum(row[dtype]["first_s"] for row in found.rows)
        theirs = found.setup_s["peft"] + sum(row["peft"]["seconds"] for row in found.rows)
        entry["end_to_end"] = {"ours_s": ours, "peft_s": theirs, "ratio": theirs / ours}
        with_blocks = [row for row in found.rows if row["depth"]]
        share = sum(row[dtype]["least_s"] for row in with_blocks) / sum(
            row[dtype]["seconds"] for row in with_blocks
        )
        by_one_peak = sum(row["needed_flop"] for row in with_blocks) / peak[dtype]
        entry["share_of_peak"] = {
            "total": share,
            "total_by_one_peak": by_one_peak / sum(row[dtype]["seconds"] for row in with_blocks),
            "target": TARGET_SHARE,
            "met": bool(share >= TARGET_SHARE) if judged else None,
        }
        report["aggregate"][dtype] = entry
        shares: dict[int, list[float]] = {}
        for row in found.rows:
            if row[dtype]["share_of_peak"] is not None:
                shares.setdefault(row["depth"], []).append(row[dtype]["share_of_peak"])
        report["share_by_depth"][dtype] = {
            str(depth): float(np.median(own)) for depth, own in sorted(shares.items())
        }
    return report


def _difference(rows: list[dict[str, Any]], dtype: Dtype, rival: str) -> dict[str, float]:
    """Return how far results lie apart: mean of both sides, and the largest difference."""
    ours, theirs = (
        {key: np.array([row[side][key] for row in rows]) for key in ("accuracy", "loss")}
        for side in (dtype, rival)
    )
    return {
        "accuracy": float(ours["accuracy"].mean()),
        "accuracy_rival": float(theirs["accuracy"].mean()),
        "largest_accuracy_difference": float(np.abs(ours["accuracy"] - theirs["accuracy"]).max()),
        "loss": float(ours["loss"].mean()),
        "loss_rival": float(theirs["loss"].mean()),
        "largest_loss_difference": float(np.abs(ours["loss"] / theirs["loss"] - 1).max()),
    }


# -- memory ---------------------------------------------------------------------------------------


def many_devices(count: int) -> Scenario:
    scenario = read_scenario("hutto")
    devices = tuple(scenario.devices[n % len(scenario.devices)] for n in range(count))
    data = replace(scenario.data, train_per_device=20, validation_per_device=4, test_per_device=4)
    training = replace(scenario.training, rounds=1, validate_after=(1,), local_steps=1)
    return replace(scenario, devices=devices, data=data, training=training)


def resident_byte(key: Literal["VmRSS", "VmHWM"]) -> int:
    # Not ru_maxrss: a child process starts with its parent's.
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def memory_of(devices: int) -> dict[str, float]:
    """Train one round with so many devices; to be called in a fresh process."""
    scenario = many_devices(devices)
    schedule = Schedule.parse(MEMORY_SCHEDULE, devices=devices)
    with tempfile.TemporaryDirectory() as folder:
        evaluator = FederatedEvaluator(scenario, folder)
        loaded = resident_byte("VmRSS")
        start = time.perf_counter()
        evaluation = evaluator.train(schedule)
        seconds = time.perf_counter() - start
    if evaluation.status != "done":
        raise RuntimeError(evaluation.reason)
    return {
        "devices": devices,
        "model_loaded_byte": loaded,
        "peak_byte": resident_byte("VmHWM"),
        "seconds": seconds,
    }


def device_byte(devices: int) -> dict[str, float]:
    """Return what a device should hold, counted: blocks, ids, and base outputs at one layer."""
    material = Material.of(many_devices(devices))
    decision = Schedule.parse(MEMORY_SCHEDULE, devices=devices).rounds[0]
    job = material.job(Schedule(rounds=(decision,)), material.random_batches(1))
    blocks = sum(value.nbytes for name, value in job.start.items() if name.startswith("0/"))
    tokens = float(material.offsets[-1]) / devices
    hidden = int(model_config(material.source)["hidden_size"])
    return {
        "blocks": blocks,
        "ids": 8 * tokens,
        "outputs_of_a_layer": 4 * tokens * hidden,
        "layers": len(decision.states),
    }


def memory(size: Size) -> dict[str, Any]:
    rows = []
    for devices in size.devices:
        command = [sys.executable, str(Path(__file__).resolve()), "--memory", str(devices)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        if done.returncode:
            raise RuntimeError(f"{devices} devices: {done.stderr.strip()[-2000:]}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        log(f"  {devices} devices: {rows[-1]['peak_byte'] / 1e6:.0f} MB")
    low, high = rows[-2:]
    slope = (high["peak_byte"] - low["peak_byte"]) / (high["devices"] - low["devices"])
    counted = device_byte(int(high["devices"]))
    one = counted["blocks"] + counted["ids"] + counted["outputs_of_a_layer"]
    every = one + (counted["layers"] - 1) * counted["outputs_of_a_layer"]
    return {
        "schedule": MEMORY_SCHEDULE,
        "rows": rows,
        "slope_byte_per_device": slope,
        "counted_byte": counted,
        "slope_over_counted_one_layer": slope / one,
        "slope_over_counted_all_layers": slope / every,
    }


# -- report ---------------------------------------------------------------------------------------


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def verdict(met: bool | None) -> str:
    return "not judged" if met is None else "met" if met else "MISSED"


def show(result: dict[str, Any]) -> None:
    speed, depth = result["speed"], result["mean_depth"]
    print(
        f"{len(speed['schedules'])} of {TRAININGS} schedules; layers from the first with blocks, mean: "
        f"{depth['sample']:.2f}, of all {depth['all_drawn']:.2f}"
    )
    print("device-steps per second (validation included), and how much longer plain peft takes")
    print(
        "  schedule            peft    float32  bfloat16   ratio f32  bf16   share f32  bf16   "
        "accuracy peft / f32 / bf16"
    )
    for row in speed["schedules"]:
        single, half = row["float32"], row["bfloat16"]
        rates = [row["device_steps"] / side["seconds"] for side in (row["peft"], single, half)]
        shares = [
            "    -" if side["share_of_peak"] is None else f"{side['share_of_peak']:5.2f}"
            for side in (single, half)
        ]
        print(
            f"  {row['schedule']:<16} {rates[0]:>7.1f} {rates[1]:>10.1f} {rates[2]:>9.1f} "
            f"{single['ratio']['peft']:>11.2f} {half['ratio']['peft']:>5.2f} {shares[0]:>11} "
            f"{shares[1]:>5}   {row['peft']['accuracy']:.3f} / {single['accuracy']:.3f} / "
            f"{half['accuracy']:.3f}"
        )
    if speed["disturbed"]:
        print(
            f"  {speed['disturbed']} of these were disturbed by other work on the machine: products "
            "split over all cores then wait for one another, and plain peft looks slower than it is"
        )
    print("rival's time over ours")
    print(
        "  rival                dtype     schedules  total  geo. mean  median  accuracy theirs / "
        "ours  loss theirs / ours    largest difference"
    )
    for dtype, entry in speed["aggregate"].items():
        for rival in RIVALS:
            if rival not in entry:
                continue
            own = entry[rival]
            target = ""
            if "target" in own:
                target = f"  target {own['target']}: {verdict(own['met'])}"
            print(
                f"  {rival:<20} {dtype:<9} {own['schedules']:>9} {own['total']:>6.2f} "
                f"{own['geometric_mean']:>10.2f} {own['median']:>7.2f} "
                f"{own['accuracy_rival']:>17.4f} / {own['accuracy']:.4f} "
                f"{own['loss_rival']:>11.4f} / {own['loss']:.4f} "
                f"{own['largest_accuracy_difference']:>10.4f}, "
                f"{own['largest_loss_difference']:.0e}{target}"
            )
    for row in speed["schedules"]:
        if "flower" in row:
            own = row["flower"]
            print(
                f"  flower, {row['schedule']}: {own['seconds']:.1f} s, with start-up "
                f"{own['with_start_s']:.1f} s; ours {row['float32']['seconds']:.1f} s"
            )
    if not speed["flower_versions"]:
        print("  flower left out: no .venv-flower (make .venv-flower/.ready)")
    print("end to end, set-up and everything prepared included")
    for dtype, entry in speed["aggregate"].items():
        own = entry["end_to_end"]
        print(
            f"  {dtype:<9} {own['ours_s']:.1f} s (set-up {speed['setup_s'][dtype]:.1f} s), plain peft "
            f"{own['peft_s']:.1f} s (set-up {speed['setup_s']['peft']:.1f} s): {own['ratio']:.2f}"
        )
    print("share of the peak of products, in total and by layers from the first with blocks")
    for dtype, shares in speed["share_by_depth"].items():
        cells = "  ".join(f"{depth}: {share:.2f}" for depth, share in shares.items())
        own = speed["aggregate"][dtype]["share_of_peak"]
        print(
            f"  {dtype:<9} of {speed['peak_flop_per_s'][dtype] / 1e9:.0f} Gflop/s   "
            f"{own['total']:.3f} (by one peak {own['total_by_one_peak']:.3f}; target {own['target']}: "
            f"{verdict(own['met'])})   {cells}"
        )
    low, high = speed["needed_over_counted_flop"]
    print(f"  operations as we count them over torch's count, same step: {low:.4f} to {high:.4f}")
    over = [row["called_over_needed"] for row in speed["schedules"] if row["depth"]]
    print(
        f"  products with frozen weights that the trainer calls, over those left to do: "
        f"{min(over):.3f} to {max(over):.3f}"
    )
    own = result["memory"]
    print(f"peak memory, one round of {own['schedule']}")
    for row in own["rows"]:
        print(
            f"  {row['devices']:>4} devices  {row['peak_byte'] / 1e6:>8.0f} MB  (model loaded: "
            f"{row['model_loaded_byte'] / 1e6:.0f} MB)  {row['seconds']:.1f} s"
        )
    counted = own["counted_byte"]
    print(
        f"  a device more: {own['slope_byte_per_device'] / 1e3:.0f} kB; counted: blocks "
        f"{counted['blocks'] / 1e3:.0f} kB, ids {counted['ids'] / 1e3:.1f} kB, base outputs "
        f"{counted['outputs_of_a_layer'] / 1e3:.0f} kB a layer: {own['slope_over_counted_one_layer']:.2f} "
        f"of that with one layer, {own['slope_over_counted_all_layers']:.2f} with all"
    )


def main() -> None:
    arguments = parser("the trainer against plain peft and Flower")
    arguments.add_argument("--memory", type=int, metavar="DEVICES", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if given.memory:
        print(json.dumps(memory_of(given.memory)))
        return
    size = QUICK if given.quick else Size()
    load = os.getloadavg()[0]
    if load > QUIET_LOAD:
        log(f"load average {load:.1f}: a machine at rest gives other figures")
    scenario = read_scenario("hutto")
    with tempfile.TemporaryDirectory() as scratch:
        every = drawn(scenario)
        sample = every[size.first :: size.every]
        with Peft(Path(scratch)) as peft:
            found = compared(scenario, sample, size, Path(scratch), peft)
    result = {
        "machine": machine(torch_threads=torch.get_num_threads()),
        "versions": versions(PACKAGES),
        "load_average": load,
        "quick": given.quick,
        "mean_depth": {
            "all_drawn": float(np.mean([depth_of(schedule) for schedule in every])),
            "sample": float(np.mean([depth_of(schedule) for schedule in sample])),
        },
        "speed": speed_report(found, quiet=load <= QUIET_LOAD),
        "memory": memory(size),
    }
    show(result)
    write(result, given, "trainer")


if __name__ == "__main__":
    main()
