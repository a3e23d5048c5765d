"""The study of block alternation: its blocks, its results and its figure."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from pwff_opt.runs.records import RunFolder
from pwff_solvers.allocation import LeastEnergy, solve

sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))

import fig_alternation as figure
import run_alternation as study


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "alternation"
    return out, study.run(out, devices=(3, 5), cells=6, passes=8, seed=1)


def test_no_gap_is_negative_and_published_blocks_stay_far_away(results):
    _, table = results
    assert len(table) == 2 * 2 * 4 * 6
    assert (table["gap"] > -1e-9).all()
    published = table[table["blocks"] == "published"]
    assert (published.groupby("start")["gap"].median() > 0.01).all()
    assert published["change_last_pass"].abs().max() < 1e-9  # frozen
    np.testing.assert_allclose(published["gap"], published["gap_first_pass"], rtol=1e-6, atol=1e-9)


def test_wide_blocks_go_to_the_optimum(results):
    _, table = results
    wide = table[table["blocks"] == "wide"]
    assert wide["gap"].median() < 1e-3 < wide["gap_first_pass"].median()


@pytest.mark.parametrize("blocks", study.BLOCKS)
@pytest.mark.parametrize("start", study.STARTS)
def test_no_block_raises_the_energy(blocks, start):
    cells = study.random_cells(8, 6, np.random.default_rng(2))
    energies, _ = study.alternate(cells, blocks, start, passes=5)
    assert energies.shape == (11, 8)
    # the start may be worse than anything, but it is feasible: the first block cannot raise it
    assert (np.diff(energies, axis=0) <= 1e-9 * energies[:-1]).all()


@pytest.mark.parametrize("start", study.STARTS)
def test_starts_and_blocks_are_feasible(start):
    cells = study.random_cells(8, 6, np.random.default_rng(3))
    b, t, _ = study.start_times(cells, start)
    for step in (lambda: (b, t), lambda: (study.bandwidths(cells, t), t)):
        bands, times = step()
        assert (bands.sum(axis=1) <= cells.B[:, 0] * (1 + 1e-9)).all()
        power = bands * np.expm1(cells.a / (bands * times)) / cells.g
        assert (power <= cells.P * (1 + 1e-9)).all()
        assert (times <= cells.t_max * (1 + 1e-12)).all()


def test_blocks_keep_the_optimum():
    cells = study.random_cells(8, 6, np.random.default_rng(4))
    optimum = solve(cells.batch, LeastEnergy(cells.T[:, 0]))
    np.testing.assert_allclose(
        study.bandwidths(cells, optimum.upload_s), optimum.bandwidth_hz, rtol=1e-6
    )
    np.testing.assert_allclose(
        study.times_joint(cells, optimum.bandwidth_hz), optimum.upload_s, rtol=1e-6
    )


def test_figure_reads_the_folder(results):
    out, _ = results
    for path in figure.alternation_figure(RunFolder(out)):
        assert path.stat().st_size > 5000
    assert RunFolder(out).info()["status"] == "done"
