"""The compiled iteration: against the search in numpy, the optimality conditions, many random cells."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from allocation_cells import random_arguments, random_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from pwff_solvers.allocation import (
    FDMA,
    Batch,
    LeastEnergy,
    Shortest,
    Status,
    Weighted,
    solve,
)
from pwff_solvers.allocation.fdma import newton
from pwff_solvers.allocation.registers import inverse_phi, inverse_psi
from pwff_solvers.compiled.elementary import (
    entry,
)
from pwff_solvers.compiled.switch import COMPILED

module = import_module("pwff_solvers.allocation.solve")
compiled = pytest.mark.skipif(not COMPILED, reason="numba is absent or switched off")
HOW = [{}, {"floors": False}, {"zeros": True}]


@entry
def _starts(psi, excess, out):
    for i in range(psi.size):
        out[0, i] = inverse_psi(psi[i])
        out[1, i] = inverse_phi(excess[i])


@compiled
def test_inverse_functions_are_near_enough_to_start_from():
    z = np.geomspace(1e-6, 300.0, 20_001)
    series = z**2 * (1 / 2 + z * (1 / 3 + z * (1 / 8 + z / 30)))
    psi = np.where(z < 0.01, series, 1.0 + (z - 1.0) * np.exp(z))
    out = np.empty((2, z.size))
    _starts(psi, np.expm1(z) / z - 1.0, out)
    np.testing.assert_allclose(out[0], z, rtol=0.02)
    large = z > 1e-4  # expm1(z)/z - 1 cancels below
    np.testing.assert_allclose(out[1][large], z[large], rtol=0.08)


def _certify(result, count, least=1.0):
    assert result.status.shape == (count,)
    good = result.status == Status.OPTIMAL
    assert good.mean() >= least, result.gap[~good]
    return np.abs(result.gap[good]).max(), result.violation.max()


def _random_cells(rng, devices, count, how):
    """Solve all objectives over ten decades of gain, rounds 1.02 to 100 times the shortest."""
    batch = random_batch(rng, count, devices, 10.0, **how)
    shortest = solve(batch, Shortest())
    factor = np.exp(rng.uniform(np.log(1.02), np.log(100.0), count))
    least = solve(batch, LeastEnergy(0.01 + (shortest.round_s - 0.01) * factor))
    known = least.price_of_time_w > 0
    price = np.where(known, least.price_of_time_w, 1.0) * 10.0 ** rng.uniform(-1, 1, count)
    weighted = solve(batch, Weighted(np.maximum(price, 1e-30)))
    worst = [_certify(shortest, count), _certify(least, count)]
    # the search in numpy misses the tolerance now and then (gaps of 1e-7), and says so
    worst.append(_certify(weighted, count, 1.0 if COMPILED else 0.98))
    return np.max(worst, axis=0)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("devices", [1, 2, 3, 5, 10, 20, 50])
def test_random_cells_are_all_certified(devices, how):
    gap, violation = _random_cells(np.random.default_rng(devices), devices, 200, how)
    assert gap <= 1e-8
    assert violation <= 1e-9


@pytest.mark.slow
@compiled
def test_four_hundred_thousand_random_cells_are_all_certified():
    rng = np.random.default_rng(400_000)
    worst = np.zeros(2)
    solved = 0
    while solved < 400_000:
        devices = int(rng.integers(1, 51))
        how = HOW[int(rng.integers(len(HOW)))]
        worst = np.maximum(worst, _random_cells(rng, devices, 1000, how))
        solved += 3000
    print(f"{solved} instances, gap {worst[0]:.1e}, violation {worst[1]:.1e}")
    assert worst[0] <= 1e-8
    assert worst[1] <= 1e-9


@compiled
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("devices", [2, 17, 60])
def test_newton_and_the_search_agree(devices, how):
    rng = np.random.default_rng(devices)
    batch = random_batch(rng, 60, devices, 4.0, **how)
    shortest = solve(batch, Shortest()).round_s
    for objective in (Shortest(), LeastEnergy(2.0 * shortest), Weighted(0.1)):
        kind, target = type(objective), module._target(objective, batch)
        with np.errstate(all="ignore"):
            room = np.empty((batch.instances, 6, batch.devices))
            quick = FDMA.newton(batch, kind, target, room)
            slow = FDMA.search(batch, kind, target)
        both = quick.good() & slow.good()
        assert both.mean() > 0.7, objective
        one, two = quick.decision[both, 5].sum(1), slow.decision[both, 5].sum(1)
        price = target[both] if isinstance(objective, Weighted) else 0.0
        one, two = one + price * quick.time[both], two + price * slow.time[both]
        np.testing.assert_allclose(one, two, rtol=1e-9)
        np.testing.assert_allclose(quick.time[both], slow.time[both], rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), devices=st.integers(1, 40), factor=st.floats(1.05, 50.0))
def test_optimality_conditions(seed, devices, factor):
    """The KKT conditions of every device, from the returned point alone."""
    batch = random_batch(np.random.default_rng(seed), 1, devices, 4.0)
    shortest = solve(batch, Shortest()).round_s
    a = solve(batch, LeastEnergy(0.01 + factor * (shortest - 0.01)))
    lam = a.price_of_bandwidth_j_per_hz[0]
    nats, g = batch.payload_bit[0] * np.log(2), batch.gain[0] / batch.noise_psd_w_per_hz[0]
    b, t, f = a.bandwidth_hz[0], a.upload_s[0], a.frequency_hz[0]
    z = nats / (b * t)
    psi = z * np.exp(z) - np.expm1(z)
    np.testing.assert_allclose(b.sum(), batch.bandwidth_hz[0], rtol=1e-12)
    np.testing.assert_allclose(t + a.compute_s[0], a.round_s[0] - 0.01, rtol=1e-9)
    full = a.power_w[0] >= batch.power_max_w[0] * (1 - 1e-7)
    noise = 1e-7 + 1e-15 / z**2  # psi cancels here
    value = psi * t / g  # worth of bandwidth
    assert (np.abs(value / lam - 1) <= noise)[~full].all()
    assert (value <= lam * (1 + noise))[full].all()
    # time: uploading is worth lam a e^z/(psi t^2) - P at full power, else psi b/g
    worth = np.where(
        full, lam * nats * np.exp(z) / (psi * t**2) - batch.power_max_w[0], psi * b / g
    )
    cost = 2 * batch.kappa[0] * f**3
    scale = np.maximum(worth, 1e-9 * batch.power_max_w[0] * full) + 1e-300
    error = (worth - cost) / scale
    slow = f <= batch.frequency_min_hz[0] * (1 + 1e-9)
    fast = f >= batch.frequency_max_hz[0] * (1 - 1e-9)
    assert (np.abs(error) <= 1e-4 + 10 * noise)[~slow & ~fast].all()
    assert (error <= 1e-4 + 10 * noise)[slow & ~fast].all()
    assert (error >= -1e-4 - 10 * noise)[fast & ~slow].all()


def test_threads_do_not_change_a_bit():
    batch = random_batch(np.random.default_rng(2), 3000, 30)
    shortest = solve(batch, Shortest(), threads=1).round_s
    for objective in (Shortest(), LeastEnergy(1.5 * shortest), Weighted(0.2)):
        one, three = (solve(batch, objective, threads=n) for n in (1, 3))
        for name in ("bandwidth_hz", "power_w", "upload_s", "energy_j", "gap", "status"):
            np.testing.assert_array_equal(getattr(one, name), getattr(three, name), err_msg=name)


def test_twenty_thousand_devices():
    batch = random_batch(np.random.default_rng(3), 1, 20_000)
    shortest = solve(batch, Shortest())
    for result in (
        shortest,
        solve(batch, LeastEnergy(2.0 * shortest.round_s)),
        solve(batch, Weighted(10.0)),
    ):
        _certify(result, 1)


def _one_frequency(rng, instances, devices, decades=3.0, floor=1.0, **how):
    """Arguments of a batch whose least frequencies are ``floor`` times the largest."""
    how = {"floors": False, **how}
    given_ = random_arguments(rng, instances, devices, decades, **how)
    return {**given_, "frequency_min_hz": floor * given_["frequency_max_hz"]}


def test_one_frequency_only():
    """Frequency fixed: the least frequency is the largest."""
    batch = Batch(**_one_frequency(np.random.default_rng(4), 50, 8))
    shortest = solve(batch, Shortest())
    result = solve(batch, LeastEnergy(2.0 * shortest.round_s))
    _certify(result, 50)
    np.testing.assert_array_equal(result.frequency_hz, batch.frequency_max_hz)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("devices", [1, 2, 7, 16, 60])
@pytest.mark.parametrize("factor", [1.0 + 1e-5, 1.01, 1.5, 30.0])
def test_one_frequency_is_the_limit_of_two(devices, factor, zeros):
    """A least frequency just below the largest takes the general iteration."""
    rng = [np.random.default_rng(devices) for _ in range(2)]
    one = Batch(**_one_frequency(rng[0], 40, devices, 6.0, zeros=zeros))
    two = Batch(**_one_frequency(rng[1], 40, devices, 6.0, 1.0 / (1.0 + 1e-9), zeros=zeros))
    target = LeastEnergy(0.01 + factor * (solve(one, Shortest()).round_s - 0.01))
    a, b = solve(one, target), solve(two, target)
    _certify(a, 40)
    _certify(b, 40)
    np.testing.assert_allclose(a.energy_j, b.energy_j, rtol=1e-8)
    np.testing.assert_array_equal(a.frequency_hz, one.frequency_max_hz)
    full = a.power_w >= one.power_max_w * (1.0 - 1e-9)
    assert full.any() or factor > 1.01 or devices == 1
    if factor > 1.0 + 1e-5:
        np.testing.assert_allclose(a.bandwidth_hz, b.bandwidth_hz, rtol=1e-5)
        np.testing.assert_allclose(a.power_w, b.power_w, rtol=1e-5)


@pytest.mark.parametrize("devices", [6, 200])
def test_one_frequency_beside_many(devices):
    """Instances of both kinds in one block, and devices that only compute at a free speed."""
    given_ = random_arguments(np.random.default_rng(6), 24, devices, floors=False, zeros=True)
    f_max = given_["frequency_max_hz"]
    held = (np.arange(24) % 3 != 0)[:, None] & (given_["payload_bit"] > 0)
    batch = Batch(**{**given_, "frequency_min_hz": np.where(held, f_max, 0.1 * f_max)})
    round_s = 2.0 * solve(batch, Shortest()).round_s
    together = solve(batch, LeastEnergy(round_s))
    _certify(together, 24)
    np.testing.assert_array_equal(together.frequency_hz[held], batch.frequency_max_hz[held])
    rows = np.argsort(np.arange(24) % 3 == 0, kind="stable")  # those of one frequency first
    sorted_ = solve(batch.take(rows), LeastEnergy(round_s[rows]))
    for name in ("energy_j", "bandwidth_hz", "power_w", "frequency_hz"):
        theirs = getattr(together, name)[rows]
        np.testing.assert_allclose(getattr(sorted_, name), theirs, rtol=1e-7, err_msg=name)


@compiled
def test_twenty_thousand_cells_of_one_frequency_are_all_certified():
    rng = np.random.default_rng(20_000)
    converged, sweeps = 0.0, 0
    for _ in range(40):
        devices = int(rng.integers(1, 51))
        zeros = bool(rng.integers(2))
        batch = Batch(**_one_frequency(rng, 500, devices, 10.0, zeros=zeros))
        shortest = solve(batch, Shortest()).round_s
        factor = np.exp(rng.uniform(np.log(1.02), np.log(100.0), 500))
        round_s = 0.01 + (shortest - 0.01) * factor
        gap, violation = _certify(solve(batch, LeastEnergy(round_s)), 500)
        assert gap <= 1e-8
        assert violation <= 1e-9
        # the search would hide an iteration that fails
        room, scalars = np.empty((500, 6, devices)), np.zeros((500, 5))
        sweeps += newton.least_energy(batch.device, batch.cell, round_s, room, scalars)
        converged += scalars[:, 0].sum()
    assert converged >= 0.995 * 20_000
    assert sweeps <= 5 * 20_000


_FALLBACK = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from allocation_cells import random_batch
from pwff_solvers.allocation import (
    LeastEnergy,
    Shortest,
    Weighted,
    solve,
)
from pwff_solvers.compiled import switch
from pwff_solvers.extras import solve_outage
assert switch.COMPILED == (sys.argv[2] == "1")
batch = random_batch(np.random.default_rng(9), 40, 7, 4.0, zeros=True)
rows = []
for access in ("fdma", "tdma"):
    shortest = solve(batch, Shortest(), access)
    for r in (shortest, solve(batch, LeastEnergy(1.7 * shortest.round_s), access),
              solve(batch, Weighted(0.3), access)):
        rows += [r.energy_j, r.round_s, r.status, *r.bandwidth_hz.T, *r.power_w.T]
# no round is long enough for some of them
rows += [solve_outage(batch, 0.2, 1e-6).status]
np.save(sys.argv[3], np.array(rows))
"""


@compiled
def test_without_numba_the_same_comes_out(tmp_path):
    found = []
    for switch in ("0", "1"):
        path = tmp_path / f"{switch}.npy"
        subprocess.run(
            [sys.executable, "-c", _FALLBACK, str(Path(__file__).parents[1]), switch, str(path)],
            env={**os.environ, "PWFF_NUMBA": switch, "PYTHONWARNINGS": "error"},
            check=True,
        )
        found.append(np.load(path))
    np.testing.assert_allclose(found[0], found[1], rtol=2e-7, atol=1e-12)
