"""Trains every schedule of a small space, so that searches can be compared on real trainings in minutes.

``python benchmarks/replay_table.py`` trains each of the 323 schedules of ``replay.toml`` that fit into the
devices' memory, once a training seed, and writes ``benchmarks/results/replay.parquet``: a row a seed,
schedule, validated round and device, with the accuracy on validation and on test data.  Seeds that the
table has are kept, unless ``--anew``.  A quarter to half an hour a seed on two cores with bfloat16; it
can be killed and goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pwff_opt.federated.training.evaluator import FederatedEvaluator
from pwff_opt.planning.planner import Planner
from pwff_opt.runs.records import Journal, RunFolder, write_atomically
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.files import read_scenario
from pwff_opt.scenario.schedule import Schedule

HERE = Path(__file__).resolve().parent
SCENARIO = HERE / "replay.toml"
TABLE = HERE / "results" / "replay.parquet"


def fitting(planner: Planner) -> list[Schedule]:
    """Return every schedule of the space that fits into the devices' memory, cheapest to train first."""
    codec = planner.codec
    found = {
        str(schedule): schedule
        for genome in product(*map(range, codec.cardinalities))
        if planner.costs.fits(planner.costs.demand(schedule := codec.decode(np.array(genome))))
    }
    return sorted(found.values(), key=lambda s: (sum(s.rounds[0].trained), str(s)))


def trained(scenario: Scenario, folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the rows of one training seed, and what the data contribute to costs.

    What a former session has trained is read from ``folder``.
    """
    run = RunFolder(folder)
    with run.lock():
        run.open(scenario, SCENARIO.read_text(encoding="utf-8"))
        evaluator = FederatedEvaluator(scenario, run.checkpoints)
        journal = Journal(evaluator, run)
        workload = evaluator.workload
        run.begin(
            workload={
                "classes": workload.classes,
                "mean_tokens": workload.mean_tokens.tolist(),
                "mean_squared_tokens": workload.mean_squared_tokens.tolist(),
            }
        )
        schedules = fitting(Planner(scenario, evaluator.workload))
        rows = []
        start, before = time.perf_counter(), len(journal)
        for number, schedule in enumerate(schedules):
            evaluation = journal.train(schedule)
            if evaluation.status != "done":
                raise SystemExit(f"{schedule}: {evaluation.reason}")
            for mark in scenario.training.validate_after:
                tests = journal.test(schedule.prefix(mark))
                for device, (seen, unseen) in enumerate(
                    zip(evaluation.rounds[mark - 1].accuracy, tests, strict=True)
                ):
                    rows.append(
                        (scenario.seeds.training, str(schedule), mark, device, seen, unseen)
                    )
            done = number + 1 - before
            if (done > 0 and sys.stdout.isatty()) or number % 20 == 19:
                rate = max(done, 1) / (time.perf_counter() - start)
                left = (len(schedules) - number - 1) / rate / 60
                print(f"seed {scenario.seeds.training}: {number + 1}/{len(schedules)}, "
                      f"{60 * rate:.0f} a minute, {left:.1f} min left", flush=True)  # fmt: skip
        run.finish("done")
    names = ["seed", "schedule", "round", "device", "accuracy_validation", "accuracy_test"]
    return pd.DataFrame(rows, columns=names), run.info()["workload"]


def kept() -> tuple[pd.DataFrame | None, dict[str, Any] | None]:
    """Return the table as it is, and what the data contribute to costs; nothing where there is none."""
    if not TABLE.is_file():
        return None, None
    table = pd.read_parquet(TABLE)
    return table.astype({"schedule": str}), table.attrs["workload"]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--out", type=Path, default=Path("runs/replay"))
    options.add_argument(
        "--anew", action="store_true", help="train the seeds that the table has, too"
    )
    chosen = options.parse_args()
    scenario = read_scenario(SCENARIO)
    old, workload = (None, None) if chosen.anew else kept()
    parts = []
    known = [] if old is None else old["seed"].unique().tolist()
    for seed in sorted({*known, *range(1, chosen.seeds + 1)}):  # none that is there is lost
        if old is not None and seed in known:
            own = old[old["seed"] == seed]
            print(f"seed {seed}: kept, {own['schedule'].nunique()} schedules")
            parts.append(own)
            continue
        rows, workload = trained(
            replace(scenario, seeds=replace(scenario.seeds, training=seed)),
            chosen.out / f"seed{seed}",
        )
        parts.append(rows)
    table = pd.concat(parts, ignore_index=True)
    table["schedule"] = table["schedule"].astype("category")
    table.attrs["workload"] = workload
    write_atomically(
        TABLE, lambda target: table.to_parquet(target, index=False, compression="zstd")
    )
    print(f"wrote {TABLE}: {len(table)} rows; next: make bench-search")


if __name__ == "__main__":
    main()
