"""The compiled TDMA kernels against the searches in ``tdma.py``, which share no iteration."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from allocation_cells import random_arguments, random_batch

from pwff_solvers.allocation import TDMA, Batch, certificate
from pwff_solvers.allocation.slots import SCALARS
from pwff_solvers.allocation.tdma import bracketed as tdma
from pwff_solvers.allocation.tdma import newton as newton_tdma
from pwff_solvers.compiled.switch import COMPILED

pytestmark = pytest.mark.skipif(not COMPILED, reason="needs numba")

FEDL = json.loads(
    (Path(__file__).parents[2] / "oracles" / "fedl_5_devices.json").read_text(encoding="utf-8")
)
SIZES = [(1, 150), (2, 150), (5, 150), (10, 150), (17, 20), (50, 40), (200, 15)]
ROUNDS = [1.02, 1.1, 1.5, 3.0, 10.0, 100.0]
PRICES = [1e-4, 1e-2, 0.1, 1.0, 30.0]


def cells(devices, instances, kind):
    """Plain cells; cells with floors; cells with zeros, floors and least powers too."""
    rng = np.random.default_rng(devices)
    how = random_arguments(
        rng, instances, devices, floors=kind != "plain", zeros=kind == "all", delay=0.01
    )
    if kind == "all":
        least = rng.choice([0.0, 0.1, 1.0], (instances, devices))
        how["power_min_w"] = how["power_max_w"] * least * rng.choice([0, 1], (instances, 1))
    return Batch(**how)


def compiled(batch, kernel, *target):
    points = np.full((batch.instances, 6, batch.devices), np.nan)
    scalars = np.full((batch.instances, SCALARS), np.nan)
    kernel(batch.device, batch.cell, *target, points, scalars)
    return points, scalars


def shortest_s(batch):
    return tdma.shortest(tdma.TdmaCell(batch, slice(None))).time


@np.errstate(all="ignore")
def least_energy(batch, time):
    return tdma.least_energy(tdma.TdmaCell(batch, slice(None)), time)


def agree(batch, found, point, *, price=True):
    """Compare where converged, which has to be nearly everywhere; return where."""
    points, scalars = found
    converged = scalars[:, 0] > 0
    empty = (batch.payload_bit <= 0).all(1) & (batch.work_cycles <= 0).all(1)
    assert not converged[empty].any()
    assert (~converged & ~empty).sum() <= 0.01 * batch.instances
    ours, power = points[converged], np.expm1(point.z.T) * batch.noise_psd_w_per_hz[:, None]
    power = power * point.b.T / batch.gain
    frequency = np.where(batch.work_cycles > 0, point.f.T, batch.frequency_min_hz)
    energy = power * point.t.T + batch.kappa * batch.work_cycles * frequency**2
    energy += batch.fixed_energy_j
    compute = batch.work_cycles / np.where(batch.work_cycles > 0, frequency, 1.0)
    for row, theirs in enumerate([point.b.T, power, frequency, point.t.T, compute, energy]):
        np.testing.assert_allclose(ours[:, row], theirs[converged], rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(scalars[converged, 1], point.time[converged], rtol=1e-9)
    if price:
        np.testing.assert_allclose(scalars[converged, 3], point.price_of_time[converged], rtol=1e-9)
        # without payload the search has 0 times something that may overflow
        lam = np.where((batch.payload_bit > 0).any(1), point.price_of_bandwidth, 0.0)
        np.testing.assert_allclose(scalars[converged, 2], lam[converged], rtol=1e-9)
    return converged


def certified(batch, found, converged, round_s, price=None):
    points, scalars = (x[converged] for x in found)
    part = batch.take(converged)
    primal = certificate.Primal.packed(points, round_s[converged])
    prices = certificate.Multipliers(bandwidth_j_per_hz=scalars[:, 2], time_w=scalars[:, 3])
    price = None if price is None else price[converged]
    gap = TDMA.energy_gap(part, primal, prices, price)
    assert np.abs(gap).max(initial=0) <= 0.1 * certificate.GAP_TOLERANCE
    worst = TDMA.violation(part, primal)
    assert worst.max(initial=0) <= 0.1 * certificate.VIOLATION_TOLERANCE


@pytest.mark.parametrize("kind", ["plain", "floors", "all"])
@pytest.mark.parametrize(("devices", "instances"), SIZES)
class TestAgainstTheSearch:
    def test_shortest(self, devices, instances, kind):
        batch = cells(devices, instances, kind)
        found = compiled(batch, newton_tdma.shortest_tdma)
        point = tdma.shortest(tdma.TdmaCell(batch, slice(None)))
        # any price above the least supports it, and that one hangs on rounding
        converged = agree(batch, found, point, price=False)
        primal = certificate.Primal.packed(found[0], found[1][:, 1] + batch.fixed_delay_s)
        gap = TDMA.shortest_gap(batch, primal)[converged]
        assert np.abs(gap).max() <= certificate.GAP_TOLERANCE
        worst = TDMA.violation(batch, primal)[converged]
        assert worst.max() <= certificate.VIOLATION_TOLERANCE

    @pytest.mark.parametrize("slack", ROUNDS)
    def test_least_energy(self, devices, instances, kind, slack):
        batch = cells(devices, instances, kind)
        round_s = slack * shortest_s(batch) + batch.fixed_delay_s
        found = compiled(batch, newton_tdma.least_energy_tdma, round_s)
        point = least_energy(batch, round_s - batch.fixed_delay_s)
        certified(batch, found, agree(batch, found, point), round_s)

    @pytest.mark.parametrize("price", PRICES)
    def test_weighted(self, devices, instances, kind, price):
        batch = cells(devices, instances, kind)
        prices = np.full(instances, price)
        found = compiled(batch, newton_tdma.weighted_tdma, prices)
        point = tdma.weighted(tdma.TdmaCell(batch, slice(None)), prices)
        converged = agree(batch, found, point)
        certified(batch, found, converged, found[1][:, 1] + batch.fixed_delay_s, prices)


def test_at_the_shortest_round_and_below():
    batch = random_batch(np.random.default_rng(3), 64, 10)
    least = shortest_s(batch)
    round_s = least + batch.fixed_delay_s
    found = compiled(batch, newton_tdma.least_energy_tdma, round_s * (1.0 + 1e-12))
    certified(batch, found, found[1][:, 0] > 0, round_s * (1.0 + 1e-12))
    assert (found[1][:, 0] > 0).mean() > 0.9
    for slack in (0.999, 0.1, 0.0):
        _, scalars = compiled(batch, newton_tdma.least_energy_tdma, slack * round_s)
        assert not scalars[:, 0].any()


def test_mixed_lanes_do_not_disturb_each_other():
    """Infeasible, idle and empty instances in one block with those that are searched."""
    batch = cells(5, 64, "all")
    slack = np.tile([0.5, 1.02, 3.0, 1e9], 16)
    round_s = slack * shortest_s(batch) + batch.fixed_delay_s
    points, scalars = compiled(batch, newton_tdma.least_energy_tdma, round_s)
    for i in range(batch.instances):
        one = compiled(batch.take([i]), newton_tdma.least_energy_tdma, round_s[i : i + 1])
        assert one[1][0, 0] == scalars[i, 0] == (slack[i] > 1)
        if slack[i] > 1:
            np.testing.assert_allclose(one[0][0], points[i], rtol=1e-8)


@pytest.mark.parametrize("case", FEDL["optimum"], ids=lambda c: str(c["kappa"]))
def test_fedl_published_optimum(case):
    noise_w = 1e-10
    batch = Batch(
        payload_bit=FEDL["S"] / np.log(2),
        work_cycles=np.array(FEDL["C"]) * np.array(FEDL["D"]),
        gain=noise_w / np.array(FEDL["r"]),
        power_max_w=FEDL["p_max"],
        power_min_w=FEDL["p_min"],
        frequency_min_hz=FEDL["f_min_ghz"] * 1e9,
        frequency_max_hz=np.array(FEDL["f_max_ghz"]) * 1e9,
        kappa=FEDL["alpha"] / 2,
        bandwidth_hz=FEDL["B"],
        noise_psd_w_per_hz=noise_w / FEDL["B"],
    )
    points, scalars = compiled(batch, newton_tdma.weighted_tdma, np.array([float(case["kappa"])]))
    assert scalars[0, 0] == 1.0
    _, p, f, t, compute_s, _ = points[0]
    assert compute_s.max() == pytest.approx(case["T_cmp"], abs=1e-6)
    assert t.sum() == pytest.approx(case["T_com"], abs=1e-6)
    assert (p * t).sum() == pytest.approx(case["E_com"], abs=1e-6)
    work = (batch.kappa * batch.work_cycles * f**2).sum()
    assert work == pytest.approx(case["E_cmp"], abs=1e-6)
    if case["kappa"] == 0.1:
        published = FEDL["at_kappa_0.1"]
        np.testing.assert_allclose(f / 1e9, published["f_ghz"], atol=5.1e-5)
        np.testing.assert_allclose(p, published["p_w"], atol=5.1e-5)
