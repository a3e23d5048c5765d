"""Draw how far block alternation ends from the optimum, from the folder of ``run_alternation.py``.

(a) The published split at its end, which it reaches in one pass: for each number of devices and
each start, the median gap (marker), the quartiles (bar) and the worst cell (dash).  (b) Median and
quartiles (band) of the gap after each pass, for the largest number of devices: the published split
stays where it is, the wide one goes on towards the optimum.

Run ``python studies/fig_alternation.py runs/alternation``; it writes ``alternation.pdf`` and
``.png`` into the run's ``figures/``.
"""

from __future__ import annotations

import sys
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import pandas as pd

from pwff_opt.errors import RunError
from pwff_opt.runs.records import RunFolder, write_atomically

ONE_COLUMN_IN = 3.5
# start: label, marker, colour; the markers alone tell them apart in black and white
STARTS = {
    "longest": ("equal bands, longest upload", "o", "#0072b2"),
    "half": ("equal bands, half the round", "s", "#e69f00"),
    "payload": ("bands by payload, full power", "^", "#009e73"),
    "inverse_gain": ("bands by inverse gain, full power", "D", "#000000"),
}
FLOOR_PERCENT = 1e-4  # a gap below is drawn here


def alternation_figure(folder: RunFolder) -> list[Path]:
    """Draw the figure of a run; return the PDF and the PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    table, passes = folder.table("alternation.csv"), folder.table("passes.csv")
    if table is None or passes is None:
        raise RunError(f"{folder.path} has no results; run: python studies/run_alternation.py")
    with as_file(files("pwff_opt.report") / "pwff.mplstyle") as style, plt.style.context(style):
        figure, (ends, course) = plt.subplots(
            2, 1, figsize=(ONE_COLUMN_IN, 4.7), layout="constrained"
        )
        _ends(ends, table)
        _course(course, passes)
        handles = [
            Line2D([], [], color=colour, marker=marker, mfc="white", label=label)
            for label, marker, colour in STARTS.values()
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=1)
        paths = [folder.path / "figures" / f"alternation.{suffix}" for suffix in ("pdf", "png")]
        for path in paths:
            metadata = {"CreationDate": None} if path.suffix == ".pdf" else None
            write_atomically(path, lambda target: figure.savefig(target, metadata=metadata))  # noqa: B023
        plt.close(figure)
    return paths


def _ends(axis: Any, table: pd.DataFrame) -> None:
    own = table[table["blocks"] == "published"]
    devices = sorted(own["devices"].unique())
    for place, count in enumerate(devices):
        for offset, (start, (_, marker, colour)) in enumerate(STARTS.items()):
            gap = 100 * own.loc[(own["devices"] == count) & (own["start"] == start), "gap"]
            low, middle, high, worst = gap.quantile([0.25, 0.5, 0.75, 1.0]).clip(FLOOR_PERCENT)
            x = place + 0.19 * (offset - 1.5)
            axis.plot([x, x], [low, high], color=colour, lw=2.2, solid_capstyle="butt")
            axis.plot([x, x], [high, worst], color=colour, lw=0.6)
            axis.plot(x, worst, marker="_", ms=6, color=colour)
            axis.plot(x, middle, marker=marker, color=colour, mfc="white", ls="")
    axis.set_yscale("log")
    axis.set_xticks(range(len(devices)), [str(count) for count in devices])
    axis.grid(visible=False, axis="x")
    axis.set_xlabel("number of devices")
    axis.set_ylabel("energy above optimum (%)")
    axis.set_title("(a) published blocks, at the end", loc="left")


def _course(axis: Any, passes: pd.DataFrame) -> None:
    count = passes["devices"].max()
    own = passes[passes["devices"] == count]
    for blocks, dashes in (("published", (3, 1.5)), ("wide", (None, None))):
        for start, (_, marker, colour) in STARTS.items():
            rows = own[(own["blocks"] == blocks) & (own["start"] == start)]
            rows = rows[rows["after_pass"] > 0]
            x = rows["after_pass"]
            low, middle, high = (
                (100 * rows[f"gap_{name}"]).clip(FLOOR_PERCENT)
                for name in ("lower_quartile", "median", "upper_quartile")
            )
            if blocks == "wide":
                axis.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
            axis.plot(
                x, middle, color=colour, marker=marker, mfc="white", ms=3, dashes=dashes,
                markevery=(list(STARTS).index(start), 4),
            )  # fmt: skip
    axis.set_yscale("log")
    axis.set_xlim(0.7, passes["after_pass"].max() + 0.3)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("passes over both blocks")
    axis.set_ylabel("energy above optimum (%)")
    axis.set_title(f"(b) {count} devices: published dashed, wide solid", loc="left")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python studies/fig_alternation.py RUN_FOLDER")
    for path in alternation_figure(RunFolder(Path(sys.argv[1]))):
        print(path)
