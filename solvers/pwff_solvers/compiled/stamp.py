"""The stamp that tells numba's cache when compiled kernels are out of date.

Numba asks only whether the file of the function itself has changed, not those that it takes constants
and kernels from: so the stamp is that of all files with kernels.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

__all__ = ["stamp", "stamped"]

_HOME = Path(__file__).parents[1]


def stamp(*places: str) -> str:
    """Return a digest of source files.

    Parameters
    ----------
    places : str
        Files, or folders for all modules in them (not in those below), seen from ``pwff_solvers``.
    """
    digest = hashlib.sha256()
    for place in places:
        path = _HOME / place
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def stamped(dispatcher: Any, mark: str) -> Any:
    """Return a compiled function whose cache is valid as long as the stamp is ``mark``."""
    # private, hence guarded: without it a stale kernel may survive an upgrade in place
    with contextlib.suppress(AttributeError):
        dispatcher._cache._cache_file._source_stamp = mark
    return dispatcher
