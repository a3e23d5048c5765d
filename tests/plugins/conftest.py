"""Plug-ins as users install them: a module, and an entry point of the group ``pwff_opt.plugins``."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_with_plugin(tmp_path: Path) -> Run:
    """Return a function that runs Python code where plug-ins are installed, in a process of its own.

    ``run_with_plugin(code, name=source, ...)``: every plug-in is one module, or a folder where its source is
    a mapping of file names to sources. ``code`` runs with ``tmp_path`` as working directory.
    """

    def run(code: str, **plugins: str | Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        site = tmp_path / "site"
        for name, source in plugins.items():
            own = site / f"{name}-1.0.dist-info"
            own.mkdir(parents=True, exist_ok=True)
            (own / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            (own / "entry_points.txt").write_text(f"[pwff_opt.plugins]\n{name} = {name}\n")
            if isinstance(source, str):
                (site / f"{name}.py").write_text(source)
                continue
            for file, text in source.items():
                (site / name / file).parent.mkdir(parents=True, exist_ok=True)
                (site / name / file).write_text(text)
        importlib.invalidate_caches()
        here = [str(site), *[path for path in sys.path if path]]
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": ":".join(here)},
            timeout=500,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run
