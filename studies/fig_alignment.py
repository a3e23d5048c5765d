"""Draw where devices end between helpful and safe, from the folder of ``run_alignment.py``.

Left: mean reward of a device's likeliest answers on either axis, a mark a device or, with several seeds, the
mean of the devices with like users, a mark a seed; the reference model's as a cross.  Filled marks are of
users who care for helpful answers, open ones of those who care for safe ones.  Right: how a device's own user
likes its answers, and how one of the opposite weights would, against those of the reference (0.5), by
variant: mean over devices, with the standard error over seeds (bar; none with one).

Run ``python studies/fig_alignment.py runs/alignment``; it writes ``alignment.pdf`` and ``.png`` into the
run's ``figures/``.
"""

from __future__ import annotations

import argparse
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pwff_opt.errors import RunError
from pwff_opt.runs.records import write_atomically

TWO_COLUMNS_IN = 7.16
BLUE, ORANGE, GREEN, PURPLE, BLACK, GREY = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#000000",
    "0.6",
)
# marker, colour: of the variants on the left
MARKS = {
    "pwff": ("o", BLUE),
    "fedavg": ("s", BLACK),
    "local": ("^", ORANGE),
    "no-person": ("D", GREEN),
    "sampled": ("v", PURPLE),
}
TITLES = {
    "pwff": "PWFF, pairs (MODPO)",
    "no-person": "no user's weights",
    "no-reconcile": "weighted sum",
    "mgda": "MGDA",
    "no-partial": "all layers averaged",
    "single": "one reward",
    "dpo": "DPO, no margin",
    "sampled": "PWFF, sampled (GRPO)",
    "fedavg": "one model for all",
    "sampled-fedavg": "one model, sampled",
    "local": "local alone",
    "pfit": "PFIT (v1)",
}


def figure(folder: Path) -> list[Path]:
    """Draw the study in ``folder``; return the PDF and the PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    source = folder / "alignment.csv"
    if not source.is_file():
        raise RunError(f"{folder} has no alignment.csv; run: python studies/run_alignment.py")
    rows = pd.read_csv(source)
    with as_file(files("pwff_opt.report") / "pwff.mplstyle") as style, plt.style.context(style):
        sheet, (left, right) = plt.subplots(
            1, 2, figsize=(TWO_COLUMNS_IN, 2.9), layout="constrained", width_ratios=(1.0, 1.05)
        )
        _ends(left, rows)
        _likings(right, rows)
        paths = [folder / "figures" / f"alignment.{suffix}" for suffix in ("pdf", "png")]
        for path in paths:
            metadata = {"CreationDate": None} if path.suffix == ".pdf" else None
            write_atomically(path, lambda target: sheet.savefig(target, metadata=metadata))  # noqa: B023
        plt.close(sheet)
    return paths


def _ends(axis: Any, rows: pd.DataFrame) -> None:
    first = rows.iloc[0]
    axis.plot(
        first["reference_helpfulness"], first["reference_safety"], "x", color=BLACK, ms=7, mew=1.4, ls="",
        label="reference",
    )  # fmt: skip
    for name, (marker, colour) in MARKS.items():
        own = rows[rows["variant"] == name]
        for helpful in (True, False):
            part = own[(own["helpfulness"] > 0.5) == helpful]
            if rows["seed"].nunique() > 1:
                part = part.groupby("seed")[["reward_helpfulness", "reward_safety"]].mean()
            axis.plot(
                part["reward_helpfulness"], part["reward_safety"], marker, color=colour, ms=5, ls="",
                mfc=colour if helpful else "white", mew=1.0,
                label=TITLES[name] if helpful and len(part) else None,
            )  # fmt: skip
    axis.set_xlabel("reward of helpfulness (log-odds)")
    axis.set_ylabel("reward of safety (log-odds)")
    # What filled and open mean, once.
    axis.plot([], [], "o", color=GREY, mfc=GREY, label="helpful users")
    axis.plot([], [], "o", color=GREY, mfc="white", label="safe users")
    axis.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handletextpad=0.2, columnspacing=0.8
    )


def _likings(axis: Any, rows: pd.DataFrame) -> None:
    names = [name for name in TITLES if (rows["variant"] == name).any()]
    by_seed = rows.groupby(["variant", "seed"])[["liking", "liking_of_others"]].mean()
    place = np.arange(len(names))[::-1]
    for column, marker, fill, label in (
        ("liking", "o", BLUE, "own user"),
        ("liking_of_others", "o", "white", "opposite user"),
    ):
        mean = by_seed[column].groupby("variant").mean()[names]
        error = by_seed[column].groupby("variant").sem()[names].fillna(0.0)
        axis.errorbar(
            mean, place, xerr=error, fmt=marker, color=BLUE, mfc=fill, ms=5, capsize=2, lw=0.9, label=label
        )  # fmt: skip
    axis.axvline(0.5, color=BLACK, lw=0.7, ls=":", label="reference model")
    axis.set_yticks(place, [TITLES[name] for name in names])
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.set_xlabel("probability of beating the reference")
    axis.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, handletextpad=0.3)


def main() -> None:
    options = argparse.ArgumentParser(description="draw the study of alignment")
    options.add_argument("run", type=Path)
    for path in figure(options.parse_args().run):
        print(path)


if __name__ == "__main__":
    main()
