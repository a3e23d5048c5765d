"""Numba can be switched off."""

from __future__ import annotations

import pytest

from pwff_solvers.compiled import switch


@pytest.mark.parametrize("word", ["0", "false", "No", "OFF"])
def test_numba_can_be_switched_off(word, monkeypatch):
    monkeypatch.setenv("PWFF_NUMBA", word)
    assert not switch.numba_wanted()
