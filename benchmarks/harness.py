"""What every benchmark does around its measurements: arguments, machine, versions, result file."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with ``--quick``, a smoke test, and ``--out``."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--quick", action="store_true", default=bool(os.environ.get("BENCH_QUICK")))
    found.add_argument("--out", type=Path)
    return found


def machine(**others: Any) -> dict[str, Any]:
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": model,
        "cores": os.cpu_count(),
        **others,
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def write(result: dict[str, Any], given: argparse.Namespace, name: str) -> None:
    """Write ``results/NAME.json``, or where ``--out`` says; ``--quick`` alone writes nothing."""
    out: Path | None = given.out or (None if given.quick else RESULTS / f"{name}.json")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {out}")
