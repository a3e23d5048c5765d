"""Draw the front of a run folder: ``python studies/fig_front.py runs/front``."""

import sys
from pathlib import Path

from pwff_opt.report.figures import front_figure
from pwff_opt.runs.records import RunFolder

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python studies/fig_front.py RUN_FOLDER")
    for path in front_figure(RunFolder(Path(sys.argv[1]))):
        print(path)
