"""Elementary functions, against numpy's."""

from __future__ import annotations

import numpy as np
import pytest

from pwff_solvers.compiled.elementary import (
    cbrt,
    entry,
    exp_pair,
    log,
    log1p,
    rough_exp,
    rough_log,
)
from pwff_solvers.compiled.switch import COMPILED

compiled = pytest.mark.skipif(not COMPILED, reason="numba is absent or switched off")


@entry
def _elementary(x, out):
    for i in range(x.size):
        y = abs(x[i]) + 1e-300
        out[0, i], out[1, i] = exp_pair(x[i])
        out[2, i] = log(y)
        out[3, i] = log1p(y)
        out[4, i] = cbrt(y)
        out[5, i] = rough_log(y)
        out[6, i] = rough_exp(x[i])


@compiled
def test_elementary_functions_to_the_last_digits():
    x = np.concatenate(
        [np.linspace(-600, 600, 100_001), np.linspace(-1, 1, 50_001), 10.0 ** np.arange(-290, 3)]
    )
    out = np.empty((7, x.size))
    _elementary(x, out)
    y = np.abs(x) + 1e-300
    truth = [np.exp(x), np.expm1(x), np.log(y), np.log1p(y), np.cbrt(y)]
    for mine, theirs in zip(out, truth, strict=False):
        np.testing.assert_allclose(mine, theirs, rtol=2e-15, atol=5e-100)
    np.testing.assert_allclose(out[5], np.log(y), atol=0.01)
    np.testing.assert_allclose(out[6], np.exp(x), rtol=0.1)
