"""The switch between numba and plain numpy.

Numba is used where it can be imported, unless the environment says ``PWFF_NUMBA=0`` (or ``false``,
``no``, ``off``; or numba's own ``NUMBA_DISABLE_JIT=1``).
"""

from __future__ import annotations

import os

__all__ = ["COMPILED", "numba_wanted"]


def numba_wanted() -> bool:
    """Return whether numba can be imported and is not switched off."""
    if os.environ.get("PWFF_NUMBA", "").lower() in ("0", "false", "no", "off"):
        return False
    try:
        import numba
    except ImportError:
        return False
    return not numba.config.DISABLE_JIT


COMPILED = numba_wanted()
"""True where numba compiles the kernels."""
