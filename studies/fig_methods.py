"""Draw what methods reach against what they cost, from the folder of ``run_methods.py``.

A panel a data setting: accuracy on test data, mean over devices and seeds, with its standard error over
seeds (bar; none with one seed), against the energy of the least-energy plan, all methods of a panel being
done within the same time.  Dotted: always naming the class most common on the device.  Where one device
holds a class alone, both axes are accuracies on that class: of its holder, and of the other devices'
models; dotted where they are the same.  Nothing is joined and nothing is ordered.

Run ``python studies/fig_methods.py runs/methods``; ``--against uplink_bit`` puts the payload of an upload in
place of the energy.  It writes ``methods.pdf`` and ``.png`` into the run's ``figures/``.
"""

from __future__ import annotations

import argparse
import math
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import pandas as pd

from pwff_opt.errors import RunError
from pwff_opt.runs.records import RunFolder, write_atomically

TWO_COLUMNS_IN = 7.16
TITLES = {
    "hutto": "rated sentences, by domain",
    "r8-0.1": "Reuters R8, Dirichlet 0.1",
    "r8-0.5": "Reuters R8, Dirichlet 0.5",
    "newsgroups": "20 Newsgroups, by subject",
    "own-class": "Reuters R8, one device's own class",
}
AXES = {
    "energy_j": ("total energy (J)", 1.0),
    "uplink_bit": ("upload of a device in a round (kbit)", 1e-3),
}
BLUE, ORANGE, GREEN, BLACK = "#0072b2", "#d55e00", "#009e73", "#000000"
# name: marker, colour, filled; markers and fill alone tell them apart in black and white
MARKS = {
    "pwff": ("*", BLUE, "full"),
    "pwff-head": ("*", BLUE, "none"),
    "pftt": ("H", BLUE, "full"),
    "feddpa": ("d", BLUE, "full"),
    "local": ("x", BLACK, "none"),
    "shared": ("+", BLACK, "none"),
    "fedavg": ("s", BLACK, "full"),
    "fedit": ("o", ORANGE, "none"),
    "ffa": ("v", ORANGE, "none"),
    "fedsa": ("^", ORANGE, "none"),
    "rolora": ("<", ORANGE, "none"),
    "fedex": ("P", ORANGE, "none"),
    "hetlora": ("s", ORANGE, "none"),
    "flora": ("D", ORANGE, "none"),
    "flexlora": ("p", ORANGE, "none"),
    "raflora": ("X", ORANGE, "none"),
    "hetlora-mixed": ("s", GREEN, "bottom"),
    "flora-mixed": ("D", GREEN, "bottom"),
    "flexlora-mixed": ("p", GREEN, "bottom"),
    "raflora-mixed": ("X", GREEN, "bottom"),
    "fedit-low": ("o", GREEN, "none"),
    "fedit-high": ("o", GREEN, "full"),
}


def methods_figure(folder: RunFolder, against: str = "energy_j") -> list[Path]:
    """Draw the figure of a run; return the PDF and the PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    table = folder.table("summary.csv")
    if table is None or not len(table):
        raise RunError(f"{folder.path} has no summary; run: python studies/run_methods.py")
    settings = list(dict.fromkeys(table["setting"]))
    columns = min(3, len(settings) + 1)
    rows = math.ceil((len(settings) + 1) / columns)  # one place is the legend's
    with as_file(files("pwff_opt.report") / "pwff.mplstyle") as style, plt.style.context(style):
        figure, axes = plt.subplots(
            rows, columns, figsize=(TWO_COLUMNS_IN, 2.5 * rows), layout="constrained", squeeze=False
        )
        places = list(axes.flat)
        for letter, setting, axis in zip("abcdefgh", settings, places, strict=False):
            _panel(axis, table[table["setting"] == setting], against)
            axis.set_title(f"({letter}) {TITLES.get(setting, setting)}", loc="left")
        for axis in places[len(settings) :]:
            axis.axis("off")
        shown = [name for name in MARKS if name in set(table["method"])]
        handles = [Line2D([], [], ls="", label=name, **_mark(name)) for name in shown]
        places[len(settings)].legend(handles=handles, loc="center", ncols=2)
        paths = [folder.path / "figures" / f"methods.{suffix}" for suffix in ("pdf", "png")]
        for path in paths:
            metadata = {"CreationDate": None} if path.suffix == ".pdf" else None
            write_atomically(path, lambda target: figure.savefig(target, metadata=metadata))  # noqa: B023
        plt.close(figure)
    return paths


def _mark(method: str) -> dict[str, Any]:
    marker, colour, fill = MARKS.get(method, ("o", "0.5", "none"))
    return {
        "marker": marker,
        "color": colour,
        "fillstyle": fill,
        "markerfacecoloralt": "white",
        "markeredgewidth": 0.8,
        "markersize": 5.0,
    }


def _panel(axis: Any, table: pd.DataFrame, against: str) -> None:
    if table["own_class"].notna().all():
        _points(axis, table, "own_class_others", "own_class", 1.0)
        axis.axline((0, 0), slope=1, color="0.4", lw=0.7, ls=":")
        axis.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
        axis.set_xlabel("accuracy of the others on that class")
        axis.set_ylabel("accuracy of its holder")
        return
    label, unit = AXES[against]
    _points(axis, table, against, "accuracy", unit)
    axis.axhline(table["majority_per_device"].mean(), color="0.4", lw=0.7, ls=":")
    if against == "energy_j":  # energies may span decades; a payload may be zero
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7), numticks=20))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    axis.margins(x=0.1)
    axis.set_xlabel(label)
    axis.set_ylabel("accuracy on test data")


def _points(axis: Any, table: pd.DataFrame, x: str, y: str, unit: float) -> None:
    """Plot a mark a method, with bars where there are standard errors."""
    for _, row in table.iterrows():
        bars = {
            f"{name}err": None
            if math.isnan(row.get(f"{column}_se", math.nan))
            else row[f"{column}_se"]
            for name, column in (("x", x), ("y", y))
        }
        axis.errorbar(unit * row[x], row[y], **bars, elinewidth=0.7, ls="", **_mark(row["method"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="the figure of run_methods.py")
    parser.add_argument("run", type=Path)
    parser.add_argument("--against", choices=list(AXES), default="energy_j")
    given = parser.parse_args()
    for path in methods_figure(RunFolder(given.run), given.against):
        print(path)
