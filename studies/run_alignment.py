r"""Do devices with opposite users end at different points between helpful and safe, and why?

Each variant aligns SmolLM2 on the devices of the built-in scenario ``alignment`` (or ``--scenario``), three
of whose users care for helpful answers and three for safe ones, from scratch and with every seed:

``pwff``          adapters of the upper layers averaged, LoRA personal, two rewards weighed by each user
                  (MODPO), gradients reconciled with a pull to the user's weights
``no-person``     every user takes both rewards for equal, and nothing pulls to what is shared
``no-reconcile``  the gradients' weighted sum
``mgda``          their shortest mixture, without the pull
``no-partial``    the adapters of all trained layers averaged, where pwff keeps the lower half personal
``single``        helpfulness alone (DPO)
``dpo``           two rewards, but no margin of the other
``sampled``       answers sampled by the device's own model (GRPO)
``fedavg``        adapters and LoRA averaged: one model for all; ``sampled-fedavg`` by sampled answers
``local``         nothing is sent
``pfit``          PFIT of the paper's first version (:mod:`pwff_opt.methods`): answers sampled, the weighted
                  sum of the rewards, attention to 16 tokens and the first four, the upper two layers

What is measured, on the test prompts of all devices together: ``reward_AXIS``, the mean reward of a device's
likeliest answers; ``win_AXIS``, how often it beats that of the reference model, which attends to all tokens
whatever the variant; ``preferred_AXIS``, the probability
that someone who cares for this axis alone prefers it; ``liking``, the same for the device's own user, and
``liking_of_others``, for a user of the opposite weights; ``perplexity`` on pages of the web that nothing was
trained on (what was forgotten).  Means of the rounds: ``conflict``, ``stationarity`` (see
``pwff_opt.federated.learning.reconcile``), ``loss_spread``, the standard deviation of the loss between
devices; and ``weight_unrest``, the standard deviation over rounds of what the gradient of helpfulness weighs.
Costs are those of the least-energy plan within a deadline common to all variants, 1.5 times the longest of
their shortest delays.

Run ``python studies/run_alignment.py --out runs/alignment``; it writes ``alignment.csv``, a row a variant,
seed and device, as trainings end (killed and run again, it goes on where it was), ``rounds.csv``, what
every round told of each device, and ``summary.csv``.
``studies/fig_alignment.py`` draws it.  StereoSet's pairs are of one sentence, its "helpfulness" is relevance,
and the reward models are small: numbers say how the method behaves, not how good an assistant is.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import AutoTokenizer

from pwff_opt import Planner, Scenario, Schedule, methods, read_scenario
from pwff_opt.data.conversations import AXES, general_texts
from pwff_opt.data.packages import fetch
from pwff_opt.errors import PwffError
from pwff_opt.federated.learning import Causal
from pwff_opt.federated.model.backbone import NOTHING
from pwff_opt.federated.model.passes import Passes
from pwff_opt.federated.model.workers import Workers, one_thread_each
from pwff_opt.federated.text.encoding import encode_texts
from pwff_opt.federated.training.evaluator import FederatedEvaluator
from pwff_opt.runs.identity import learning_key
from pwff_opt.runs.records import write_atomically

DEPTH, RANK = 6, 8
"""Layers that are trained, the upper ones, and rank of their LoRA."""
DEADLINE = 1.5
GENERAL = (40, 64)
"""Texts that measure forgetting, and tokens of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What differs from the scenario."""

    alignment: Mapping[str, Any] = field(default_factory=dict)
    aggregation: Mapping[str, Any] = field(default_factory=dict)
    helpfulness: float | None = None
    """Of all users; None: as the scenario has it."""
    letters: str = "pa"
    """States of the lower and the upper half of the trained layers."""
    method: str = ""
    """Of :mod:`pwff_opt.methods`, which says all the rest; empty: none."""

    def applied(self, scenario: Scenario) -> Scenario:
        if self.method:
            return methods.apply(scenario, self.method)
        devices = scenario.devices
        if self.helpfulness is not None:
            devices = tuple(replace(own, helpfulness=self.helpfulness) for own in devices)
        return replace(
            scenario,
            devices=devices,
            alignment=replace(scenario.alignment, **self.alignment),
            aggregation=replace(scenario.aggregation, **self.aggregation),
        )

    def schedule(self, scenario: Scenario, layers: int) -> Schedule:
        if self.method:
            return methods.schedule(scenario, self.method, DEPTH)
        lower = DEPTH // 2
        states = "f" * (layers - DEPTH) + self.letters[0] * lower
        states += self.letters[1] * (DEPTH - lower)
        return Schedule.parse(
            f"{scenario.training.rounds}x{RANK}:{states}", devices=len(scenario.devices)
        )


VARIANTS: Mapping[str, Variant] = {
    "pwff": Variant(),
    "no-person": Variant(helpfulness=0.5, aggregation={"proximal": 0.0}),
    "no-reconcile": Variant(alignment={"reconcile": "weighted"}),
    "mgda": Variant(alignment={"reconcile": "mgda"}),
    "no-partial": Variant(letters="aa"),
    "single": Variant(alignment={"optimiser": "dpo", "reconcile": "weighted"}, helpfulness=1.0),
    "dpo": Variant(alignment={"optimiser": "dpo"}),
    "sampled": Variant(alignment={"optimiser": "grpo"}),
    "fedavg": Variant(letters="aa", aggregation={"lora": "fedit"}),
    "sampled-fedavg": Variant(
        letters="aa", aggregation={"lora": "fedit"}, alignment={"optimiser": "grpo"}
    ),
    "local": Variant(letters="pp"),
    "pfit": Variant(method="pfit"),
}


class Study:
    """The rows of one run; everything is told from ``base``, the scenario as given."""

    def __init__(self, base: Scenario, folder: Path, workers: int | None) -> None:
        self.base, self.folder, self._workers = base, folder, workers
        self._path = folder / "alignment.csv"
        self.rows: list[dict[str, Any]] = (
            pd.read_csv(self._path).to_dict("records") if self._path.is_file() else []
        )
        self._curves = folder / "rounds.csv"
        self.rounds: list[dict[str, Any]] = (
            pd.read_csv(self._curves).to_dict("records") if self._curves.is_file() else []
        )
        self._latest: FederatedEvaluator | None = None
        self._reference: Reference | None = None

    def scenario(self, name: str, seed: int) -> Scenario:
        seeds = replace(self.base.seeds, training=seed)
        return replace(VARIANTS[name].applied(self.base), seeds=seeds)

    def done(self, name: str, seed: int) -> bool:
        return any(row["variant"] == name and row["seed"] == seed for row in self.rows)

    def train(self, name: str, seed: int) -> None:
        """Train a variant and append its rows."""
        reference = self._referred()
        scenario = self.scenario(name, seed)
        start = time.perf_counter()
        evaluator = self._evaluator(scenario)
        backbone = evaluator.material.backbone
        schedule = VARIANTS[name].schedule(scenario, backbone.layer_count)
        done = evaluator.train(schedule)
        if done.status == "failed":
            raise PwffError(f"{name}, seed {seed}: {done.reason}")
        rounds = [dict(entry.notes) | {"loss": entry.loss} for entry in done.rounds]
        stage = evaluator.material.stage
        pooled = np.concatenate([shard.test for shard in evaluator.material.shards])
        general = language(evaluator)
        everything = np.arange(len(general.tokens))

        def measures(device: int) -> tuple[dict[str, float], float]:
            with torch.inference_mode():
                model = evaluator.model(schedule, device)
                told = general.measures(everything, model)
                return stage.measures(pooled, model, reference.judged), told["perplexity"]

        found = Workers(self._workers).map(measures, range(len(self.base.devices)))
        wall_s = time.perf_counter() - start
        rows = []
        for device, (given, own) in enumerate(zip(self.base.devices, found, strict=True)):
            measured, perplexity = own
            likings = np.array([measured[f"preferred_{axis}"] for axis in AXES])
            wishes = np.array([given.helpfulness, 1 - given.helpfulness])
            rows.append(
                {
                    "variant": name,
                    "seed": seed,
                    "device": device,
                    "helpfulness": given.helpfulness,
                    "liking": float(wishes @ likings),
                    "liking_of_others": float(wishes[::-1] @ likings),
                    **{key: value for key, value in measured.items() if key != "accuracy"},
                    "perplexity": perplexity,
                    **reference.told,
                    **{
                        note: float(np.mean([entry[note][device] for entry in rounds]))
                        for note in ("conflict", "stationarity", "weight")
                    },
                    "loss_spread": float(np.mean([np.std(entry["loss"]) for entry in rounds])),
                    "uplink_bit": done.rounds[-1].uplink_bit[device],
                    "wall_s": wall_s,
                    "key": learning_key(scenario, schedule),
                }
            )
        told = {"variant": name, "seed": seed}
        self.rounds = [row for row in self.rounds if not told.items() <= row.items()] + [
            told | {"round": number, "device": device} | {n: v[device] for n, v in entry.items()}
            for number, entry in enumerate(rounds, start=1)
            for device in range(len(self.base.devices))
        ]
        curves = pd.DataFrame(self.rounds)
        write_atomically(self._curves, lambda target: curves.to_csv(target, index=False))
        self.rows += rows
        self.write()

    def cost(self, names: Sequence[str]) -> None:
        """Fill in what variants cost, all within the same time."""
        seed, plans = 1, {}
        for name in names:
            scenario = self.scenario(name, seed)
            evaluator = self._evaluator(scenario)
            planner = Planner(scenario, evaluator.workload)
            layers = evaluator.material.backbone.layer_count
            plans[name] = planner, VARIANTS[name].schedule(scenario, layers)
        shortest = {
            name: float(planner.curve(schedule).delay_s[-1].min())
            for name, (planner, schedule) in plans.items()
        }
        deadline = DEADLINE * max(shortest.values())
        for name, (planner, schedule) in plans.items():
            plan = planner.plan(schedule, delay_max_s=deadline)
            told = {"energy_j": plan.energy_j, "deadline_s": deadline}
            for row in self.rows:
                if row["variant"] == name:
                    row |= told | {"shortest_s": shortest[name]}
        self.write()

    def _evaluator(self, scenario: Scenario) -> FederatedEvaluator:
        folder = self.folder / "checkpoints"
        self._latest = FederatedEvaluator(
            scenario, folder, workers=self._workers, like=self._latest
        )
        return self._latest

    def write(self) -> None:
        table = pd.DataFrame(self.rows)
        write_atomically(self._path, lambda target: table.to_csv(target, index=False))

    def _referred(self) -> Reference:
        """Return what all variants are measured against: the frozen model of ``base``."""
        if self._reference is None:
            evaluator = self._evaluator(self.base)
            for note in (evaluator.summary.sentence, *evaluator.summary.notes):
                print(note, flush=True)
            material = evaluator.material
            pooled = np.concatenate([shard.test for shard in material.shards])
            general = language(evaluator)
            with one_thread_each(), torch.inference_mode():
                frozen = Passes(material.backbone, [0], NOTHING)
                judged = material.stage.judged(pooled, frozen)
                measured = general.measures(np.arange(len(general.tokens)), frozen)
            told = {"perplexity_reference": measured["perplexity"]}
            told |= {
                f"reference_{a}": float(own.mean()) for a, own in zip(AXES, judged, strict=True)
            }
            self._reference = Reference(judged=judged, told=told)
        return self._reference


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reference:
    """The frozen model's likeliest answers, judged [axis][prompt], and means of them to be told."""

    judged: Sequence[np.ndarray]
    told: Mapping[str, float]


def language(evaluator: FederatedEvaluator) -> Causal:
    """Return pages of the web as something to be measured on."""
    count, length = GENERAL
    tokenizer = AutoTokenizer.from_pretrained(evaluator.material.source)
    encoded = encode_texts(
        general_texts()[:count], tokenizer, max_tokens=length, pad_id=tokenizer.eos_token_id
    )
    return Causal(evaluator.material.backbone, encoded.tokens, encoded.answer_start)


def summary(rows: pd.DataFrame, rounds: pd.DataFrame) -> pd.DataFrame:
    """Return a row a variant: means over devices and seeds, and standard errors over seeds."""
    rows = rows.assign(
        worst=rows.groupby(["variant", "seed"])["liking"].transform("min"),
        # How far apart the two kinds of users end, on either axis.
        kind=np.where(rows["helpfulness"] > 0.5, "helpful", "safe"),
    )
    by_seed = rows.groupby(["variant", "seed"], sort=False)
    table = by_seed[
        [
            "liking",
            "liking_of_others",
            "worst",
            "perplexity",
            "conflict",
            "stationarity",
            "loss_spread",
            "energy_j",
        ]
    ].mean()
    unrest = rounds.groupby(["variant", "seed", "device"])["weight"].std()
    table["weight_unrest"] = unrest.groupby(["variant", "seed"]).mean()
    for axis in AXES:
        table[f"reward_{axis}"] = by_seed[f"reward_{axis}"].mean()
        apart = rows.pivot_table(f"reward_{axis}", ["variant", "seed"], "kind", sort=False)
        if {"helpful", "safe"} <= set(apart.columns):
            table[f"apart_{axis}"] = apart["helpful"] - apart["safe"]
    mean = table.groupby("variant", sort=False).mean()
    error = table.groupby("variant", sort=False).sem().add_suffix("_error")
    return mean.join(error)


def run(
    base: Scenario, out: Path, *, variants: Sequence[str], seeds: int, workers: int | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train what is missing in ``out``; return all rows and their summary, which are written there."""
    for name in ("smollm2", "stereoset"):
        if name in (base.model.source, base.data.source):
            fetch(name)
    fetch("alpaca-demo")  # which has the pages of the web
    study = Study(base, out, workers)
    pairs = [(name, 1 + n) for n in range(seeds) for name in variants]
    left = [pair for pair in pairs if not study.done(*pair)]
    begun = time.perf_counter()
    for number, (name, seed) in enumerate(left):
        told = f"{number + 1}/{len(left)}  {name}, seed {seed}"
        if number:
            each = (time.perf_counter() - begun) / number
            told += f"  {each / 60:.1f} min each, {each * (len(left) - number) / 60:.0f} min left"
        print(told, flush=True)
        study.train(name, seed)
    study.cost(variants)
    rows = pd.DataFrame(study.rows)
    table = summary(rows, pd.DataFrame(study.rounds))
    write_atomically(out / "summary.csv", lambda target: table.to_csv(target))
    return rows, table


def main() -> None:
    options = argparse.ArgumentParser(description="personalised alignment, and what each part does")
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--scenario", default="alignment")
    options.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--workers", type=int)
    given = options.parse_args()
    try:
        base = read_scenario(given.scenario)
        rows, table = run(
            base, given.out, variants=given.variants, seeds=given.seeds, workers=given.workers
        )
    except PwffError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
    shown = ["liking", "liking_of_others", "worst", *(f"reward_{axis}" for axis in AXES)]
    shown += [name for name in table if name.startswith("apart_") and "error" not in name]
    shown += ["perplexity", "conflict", "energy_j"]
    print(table[shown].round(3).to_string())
    first = rows.iloc[0]
    reference = ", ".join(f"{axis} {first[f'reference_{axis}']:.3f}" for axis in AXES)
    print(
        f"the reference: rewards {reference}, perplexity {first['perplexity_reference']:.2f}, liking 0.5"
    )
    print(
        f"wrote {given.out}/alignment.csv and summary.csv; next: python studies/fig_alignment.py {given.out}"
    )


if __name__ == "__main__":
    main()
