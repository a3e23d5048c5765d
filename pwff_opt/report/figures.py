"""Figures of a run; they read its folder and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import pandas as pd

from pwff_opt.errors import RunError
from pwff_opt.runs.records import RunFolder, write_atomically

TWO_COLUMNS_IN = 7.16

_LABELS = {
    "energy_j": "total energy (J)",
    "delay_s": "total delay (s)",
    "accuracy": "accuracy on test data",
}
# (x, y, colour); accuracy is never logarithmic, the other two always are.
_PANELS = (
    ("delay_s", "energy_j", "accuracy"),
    ("delay_s", "accuracy", "energy_j"),
    ("energy_j", "accuracy", "delay_s"),
)


def front_figure(folder: RunFolder) -> list[Path]:
    """Draw the front of a run in three pairwise projections; return the PDF and the PNG.

    Each line is one trained schedule (a number of rounds of it), drawn along its optimal
    energy-delay curve where it is on the front; the third objective is the colour.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm, Normalize

    front = folder.table("front.csv")
    if front is None or not len(front):
        raise RunError(f"{folder.path} has no front to draw; run: pwff-opt front")
    baseline = _baseline(folder.info())
    with as_file(files("pwff_opt.report") / "pwff.mplstyle") as style, plt.style.context(style):
        figure, axes = plt.subplots(1, 3, figsize=(TWO_COLUMNS_IN, 2.55), layout="constrained")
        for axis, (x, y, colour) in zip(axes, _PANELS, strict=True):
            values = front[colour]
            kind: Any = Normalize if colour == "accuracy" else LogNorm
            norm = kind(values.min(), values.max())
            for _, own in front.groupby("schedule", sort=False):
                curve = own.sort_values("delay_s")
                axis.plot(curve[x], curve[y], color="0.75", lw=0.6, zorder=1)
            dots = axis.scatter(
                front[x],
                front[y],
                c=values,
                norm=norm,
                s=7,
                linewidths=0,
                zorder=2,
                rasterized=False,
            )
            best = front[front["knee"]].iloc[0]
            axis.plot(
                best[x], best[y], marker="*", ms=10, mfc="none", mec="black", mew=0.9, ls="", zorder=4,
                label="knee",
            )  # fmt: skip
            axis.set_xscale("log")
            if y == "energy_j":
                axis.set_yscale("log")
            elif baseline is not None:
                axis.axhline(baseline[0], color="black", lw=0.7, ls=":", label=baseline[1])
            for scale in (axis.xaxis, axis.yaxis):
                if scale.get_scale() == "log":
                    _plain_ticks(scale)
            axis.set_xlabel(_LABELS[x])
            axis.set_ylabel(_LABELS[y])
            bar = figure.colorbar(dots, ax=axis, location="top", pad=0.02, aspect=28)
            bar.set_label(_LABELS[colour])
            if colour != "accuracy":
                _plain_ticks(bar.ax.xaxis)
            bar.outline.set_visible(False)
        # Below all: a baseline's name is longer than a panel has room for.
        figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        paths = [folder.path / "figures" / f"front.{suffix}" for suffix in ("pdf", "png")]
        for path in paths:
            metadata = {"CreationDate": None} if path.suffix == ".pdf" else None
            write_atomically(path, lambda target: figure.savefig(target, metadata=metadata))  # noqa: B023
        plt.close(figure)
    return paths


def _baseline(info: Mapping[str, Any]) -> tuple[float, str] | None:
    """Return the best accuracy that takes no learning, and its name; it may be each device's."""
    known = [
        (info[key], f"{info['baseline_name']}{by}")
        for key, by in (("baseline", ""), ("baseline_per_device", ", by device"))
        if info.get(key) is not None
    ]
    return max(known, key=lambda one: one[0], default=None)


def _plain_ticks(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers, as many as fit."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    subs = (1.0, 2.0, 5.0) if decades < 1.5 else (1.0, 3.0) if decades < 2.5 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def segments(front: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each schedule on a front, with the ends of its curve there."""
    grouped = front.groupby("schedule", sort=False)
    accuracies: dict[str, tuple[str, str]] = {
        name: (name, "first") for name in map(str, front) if name.startswith("accuracy")
    }
    if "probability_nondominated" in front:
        accuracies["probability_nondominated"] = ("probability_nondominated", "mean")
    return grouped.agg(
        **accuracies,
        delay_min_s=("delay_s", "min"),
        delay_max_s=("delay_s", "max"),
        energy_min_j=("energy_j", "min"),
        energy_max_j=("energy_j", "max"),
        points=("delay_s", "size"),
        knee=("knee", "any"),
    ).reset_index()
