"""Properties that hold for every cell."""

from __future__ import annotations

import numpy as np
import pytest
from allocation_cells import random_arguments, random_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from pwff_solvers.allocation import (
    Batch,
    LeastEnergy,
    Shortest,
    Status,
    Weighted,
    solve,
)

SEED = st.integers(0, 2**32 - 1)
ARRAYS = ("bandwidth_hz", "power_w", "frequency_hz", "upload_s", "device_energy_j", "energy_j")
few = settings(max_examples=25, deadline=None)


def cell(seed, devices=5, **how):
    return random_arguments(np.random.default_rng(seed), 1, devices, **how)


@few
@given(seed=SEED, factor=st.floats(1.001, 5.0))
def test_more_of_anything_never_costs_energy(seed, factor):
    given_ = cell(seed, zeros=True)
    batch = Batch(**given_)
    round_s = 1.5 * solve(batch, Shortest()).round_s
    base = solve(batch, LeastEnergy(round_s))
    for name in ("bandwidth_hz", "power_max_w", "frequency_max_hz", "gain"):
        richer = Batch(**{**given_, name: given_[name] * factor})
        assert solve(richer, LeastEnergy(round_s)).energy_j[0] <= base.energy_j[0] * (1 + 1e-8)
        assert solve(richer, Shortest()).round_s[0] <= round_s[0] / 1.5 * (1 + 1e-9)
    later = solve(batch, LeastEnergy(round_s * factor))
    assert later.energy_j[0] <= base.energy_j[0] * (1 + 1e-8)


@few
@given(seed=SEED)
def test_order_of_devices_does_not_matter(seed):
    given_ = cell(seed, zeros=True)
    order = np.random.default_rng(seed).permutation(5)
    mixed = {k: v[:, order] if np.ndim(v) == 2 else v for k, v in given_.items()}
    round_s = 1.4 * solve(Batch(**given_), Shortest()).round_s
    one, two = (solve(Batch(**g), LeastEnergy(round_s)) for g in (given_, mixed))
    np.testing.assert_allclose(one.bandwidth_hz[:, order], two.bandwidth_hz, rtol=1e-6)
    np.testing.assert_allclose(one.energy_j, two.energy_j, rtol=1e-9)


@few
@given(
    seed=SEED, second=st.floats(1e-3, 1e3), joule=st.floats(1e-3, 1e3), cycle=st.floats(0.01, 100)
)
def test_units_do_not_matter(seed, second, joule, cycle):
    """One second, one joule and one cycle become 1/second, 1/joule, 1/cycle of the new units."""
    old = cell(seed)
    power, hertz = joule / second, 1 / second
    new = {
        "payload_bit": old["payload_bit"],
        "work_cycles": old["work_cycles"] * cycle,
        "gain": old["gain"],
        "power_max_w": old["power_max_w"] * power,
        "frequency_min_hz": old["frequency_min_hz"] * cycle * hertz,
        "frequency_max_hz": old["frequency_max_hz"] * cycle * hertz,
        "kappa": old["kappa"] * joule / (cycle * (cycle * hertz) ** 2),
        "bandwidth_hz": old["bandwidth_hz"] * hertz,
        "noise_psd_w_per_hz": 4e-21 * joule,
        "fixed_delay_s": 0.01 * second,
        "fixed_energy_j": 1e-3 * joule,
    }
    round_s = 1.4 * solve(Batch(**old), Shortest()).round_s
    one = solve(Batch(**old), LeastEnergy(round_s))
    two = solve(Batch(**new), LeastEnergy(round_s * second))
    np.testing.assert_allclose(one.energy_j * joule, two.energy_j, rtol=1e-9)
    np.testing.assert_allclose(one.bandwidth_hz * hertz, two.bandwidth_hz, rtol=1e-6)
    np.testing.assert_allclose(one.price_of_time_w * power, two.price_of_time_w, rtol=1e-6)


@few
@given(seed=SEED)
def test_twins_share_alike(seed):
    """Every device twice in twice the band: everybody does as before."""
    given_ = cell(seed, devices=3)
    twice = {k: np.hstack([v, v]) if np.ndim(v) == 2 else v for k, v in given_.items()}
    twice["bandwidth_hz"] = 2 * given_["bandwidth_hz"]
    round_s = 1.6 * solve(Batch(**given_), Shortest()).round_s
    one, two = (solve(Batch(**g), LeastEnergy(round_s)) for g in (given_, twice))
    np.testing.assert_allclose(two.bandwidth_hz[:, :3], two.bandwidth_hz[:, 3:], rtol=1e-9)
    np.testing.assert_allclose(two.bandwidth_hz[:, :3], one.bandwidth_hz, rtol=1e-6)
    np.testing.assert_allclose(two.energy_j, 2 * one.energy_j, rtol=1e-9)


@pytest.mark.parametrize("access", ["fdma", "tdma"])
def test_price_of_time_is_the_slope_of_the_energy(access):
    batch = random_batch(np.random.default_rng(3), 60, 6, floors=False)
    round_s = 0.01 + 1.5 * (solve(batch, Shortest(), access).round_s - 0.01)
    base = solve(batch, LeastEnergy(round_s), access)
    step = 1e-5
    up = solve(batch, LeastEnergy(round_s * (1 + step)), access).energy_j
    down = solve(batch, LeastEnergy(round_s * (1 - step)), access).energy_j
    slope = (up - down) / (2 * step * round_s)
    np.testing.assert_allclose(slope, -base.price_of_time_w, rtol=2e-4)


@pytest.mark.parametrize("access", ["fdma", "tdma"])
def test_price_of_bandwidth_is_the_slope_of_the_energy(access):
    given_ = random_arguments(np.random.default_rng(4), 60, 6, floors=False)
    batch = Batch(**given_)
    round_s = 0.01 + 1.5 * (solve(batch, Shortest(), access).round_s - 0.01)
    base = solve(batch, LeastEnergy(round_s), access)
    step = 1e-5
    energies = [
        solve(
            Batch(**{**given_, "bandwidth_hz": given_["bandwidth_hz"] * (1 + s)}),
            LeastEnergy(round_s),
            access,
        ).energy_j
        for s in (step, -step)
    ]
    slope = (energies[0] - energies[1]) / (2 * step * given_["bandwidth_hz"])
    np.testing.assert_allclose(slope, -base.price_of_bandwidth_j_per_hz, rtol=2e-4)


@pytest.mark.parametrize("access", ["fdma", "tdma"])
def test_weighted_agrees_with_least_energy_at_its_round(access):
    batch = random_batch(np.random.default_rng(5), 60, 6, floors=False)
    weighted = solve(batch, Weighted(0.05), access)
    least = solve(batch, LeastEnergy(weighted.round_s), access)
    np.testing.assert_allclose(weighted.energy_j, least.energy_j, rtol=1e-9)
    inner = weighted.round_s > solve(batch, Shortest(), access).round_s * (1 + 1e-6)
    assert inner.sum() > 10
    np.testing.assert_allclose(least.price_of_time_w[inner], 0.05, rtol=1e-5)
    for factor in (0.99, 1.01):
        other = solve(batch, LeastEnergy(weighted.round_s * factor), access)
        cost = other.energy_j + 0.05 * other.round_s
        best = weighted.energy_j + 0.05 * weighted.round_s
        assert not (cost < best * (1 - 1e-9)).any()


@pytest.mark.parametrize("access", ["fdma", "tdma"])
def test_batch_equals_one_by_one(access):
    batch = random_batch(np.random.default_rng(6), 40, 7, decades=6.0, zeros=True)
    shortest = solve(batch, Shortest(), access).round_s
    for objective, one in (
        (LeastEnergy(1.3 * shortest), lambda i: LeastEnergy(1.3 * shortest[i])),
        (Weighted(0.5), lambda i: Weighted(0.5)),
        (Shortest(), lambda i: Shortest()),
    ):
        together = solve(batch, objective, access)
        for i in range(0, 40, 5):
            alone = solve(batch.take([i]), one(i), access)
            for name in ARRAYS:
                np.testing.assert_allclose(
                    getattr(together, name)[i], getattr(alone, name)[0], rtol=1e-5, atol=1e-12
                )
            np.testing.assert_allclose(together.energy_j[i], alone.energy_j[0], rtol=1e-8)


def test_floor_without_payload_finishes_early():
    batch = Batch(
        payload_bit=[0.0, 1e5],
        work_cycles=[1e8, 0.0],
        gain=1e-10,
        power_max_w=0.1,
        frequency_min_hz=1e9,
        frequency_max_hz=2e9,
        kappa=1e-28,
        bandwidth_hz=1e6,
        noise_psd_w_per_hz=4e-21,
        fixed_delay_s=0.5,
    )
    result = solve(batch, LeastEnergy(2.0))
    assert result.status[0] == Status.OPTIMAL
    assert result.compute_s[0, 0] == pytest.approx(0.1)
    assert result.bandwidth_hz[0].tolist() == [0.0, pytest.approx(1e6)]
    assert result.upload_s[0].tolist() == [0.0, pytest.approx(1.5)]


def test_nothing_to_send_and_nothing_to_do():
    for access in ("fdma", "tdma"):
        for payload, work in ((0.0, 0.0), (0.0, 1e9), (1e5, 0.0)):
            batch = Batch(
                payload_bit=[payload] * 2,
                work_cycles=[work] * 2,
                gain=1e-10,
                power_max_w=0.1,
                frequency_min_hz=[0.0, 1e8],
                frequency_max_hz=2e9,
                kappa=1e-28,
                bandwidth_hz=1e6,
                noise_psd_w_per_hz=4e-21,
                fixed_delay_s=0.5,
            )
            for objective in (Shortest(), LeastEnergy(3.0), Weighted(1.0)):
                result = solve(batch, objective, access)
                assert result.status[0] == Status.OPTIMAL, (access, payload, work, objective)
