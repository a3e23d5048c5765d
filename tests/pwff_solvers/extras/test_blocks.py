"""Whole resource blocks against brute force that shares no formula with the kernel."""

from __future__ import annotations

import math
import time
from itertools import product

import numpy as np
import pytest
from allocation_cells import random_batch
from scipy.optimize import minimize_scalar

from pwff_solvers.allocation import (
    FDMA,
    Batch,
    InvalidInputError,
    LeastEnergy,
    Shortest,
    Status,
    certificate,
    solve,
)
from pwff_solvers.extras.resource_blocks import round_to_blocks


def least_energy(batch, i, k, time_s, band):
    """Least energy of one device in a given band, by a bounded search; inf if none."""
    s, c = batch.payload_bit[i, k], batch.work_cycles[i, k]
    f_min, f_max = batch.frequency_min_hz[i, k], batch.frequency_max_hz[i, k]
    noise = batch.noise_psd_w_per_hz[i] * band
    h = batch.gain[i, k]

    def energy(t):
        f = max(f_min, c / (time_s - t)) if c > 0 else f_min
        power = noise / h * math.expm1(min(s / (t * band) * math.log(2), 700.0))
        return power * t + batch.kappa[i, k] * c * f**2

    low = s / (band * math.log2(1 + batch.power_max_w[i, k] * h / noise))
    high = time_s - c / f_max
    if low > high:
        return math.inf
    # in log t and in log (T - t), for the optimum may sit very near to either end
    inner = minimize_scalar(
        lambda y: energy(time_s / (1 + math.exp(-y))),
        bounds=(math.log(low / (time_s - low)), min(math.log(high / max(c / f_max, 1e-12)), 30)),
        options={"xatol": 1e-10},
    )
    return min(inner.fun, energy(low), energy(high)) + batch.fixed_energy_j[i, k]


def brute_force(batch, i, time_s, number):
    """Least energy over all integer splits of one instance."""
    best = math.inf
    step = batch.bandwidth_hz[i] / number
    table = [
        [math.inf] + [least_energy(batch, i, k, time_s, n * step) for n in range(1, number + 1)]
        for k in range(batch.devices)
    ]
    for split in product(range(1, number + 1), repeat=batch.devices):
        if sum(split) <= number:
            best = min(best, sum(table[k][n] for k, n in enumerate(split)))
    return best


@pytest.mark.parametrize(("number", "floors"), [(3, True), (7, False), (12, True), (12, False)])
def test_brute_force(number, floors):
    rng = np.random.default_rng(number)
    batch = random_batch(rng, 25, 3, decades=2.0, floors=floors)
    round_s = solve(batch, Shortest()).round_s * rng.choice([1.05, 1.3, 2.0, 6.0], 25)
    plan = round_to_blocks(batch, round_s, number)
    seen = set()
    for i in range(25):
        best = brute_force(batch, i, round_s[i] - 0.01, number)
        seen.add(math.isinf(best))
        assert (plan.status[i] == Status.INFEASIBLE) == math.isinf(best)
        if math.isfinite(best):
            assert plan.energy_j[i] == pytest.approx(best, rel=1e-9)
            assert plan.blocks[i].sum() == number
    assert False in seen


def point_of(plan, round_s):
    return certificate.Primal(
        bandwidth_hz=plan.bandwidth_hz,
        power_w=plan.power_w,
        frequency_hz=plan.frequency_hz,
        upload_s=plan.upload_s,
        round_s=round_s,
    )


@pytest.mark.parametrize("how", [{"floors": False}, {"zeros": True}, {"decades": 6.0}])
@pytest.mark.parametrize("devices", [1, 5, 20])
def test_constraints_energy_and_bound(devices, how):
    rng = np.random.default_rng(devices)
    batch = random_batch(rng, 40, devices, **how)
    round_s = solve(batch, Shortest()).round_s * rng.choice([1.2, 2.0, 10.0], 40)
    plan = round_to_blocks(batch, round_s, 100)
    good = plan.status == Status.OPTIMAL
    assert good.mean() > 0.3
    assert not (plan.status == Status.INACCURATE).any()
    part = batch.take(good)
    kept = {
        name: getattr(plan, name)[good]
        for name in ("bandwidth_hz", "power_w", "frequency_hz", "upload_s")
    }
    point = certificate.Primal(**kept, round_s=round_s[good])
    assert FDMA.violation(part, point).max() <= 1e-9
    np.testing.assert_allclose(plan.violation[good], FDMA.violation(part, point))
    energy = (
        kept["power_w"] * kept["upload_s"]
        + part.kappa * part.work_cycles * kept["frequency_hz"] ** 2
        + part.fixed_energy_j
    )
    np.testing.assert_allclose(plan.device_energy_j[good], energy, rtol=1e-12)
    np.testing.assert_allclose(plan.energy_j[good], energy.sum(1), rtol=1e-12)
    assert (plan.energy_j[good] >= plan.bound_j[good] * (1 - 1e-12)).all()
    assert (plan.rounding_price[good] >= -1e-12).all()
    step = batch.bandwidth_hz[:, None] / 100
    np.testing.assert_allclose(plan.bandwidth_hz[good], (plan.blocks * step)[good], rtol=1e-14)
    assert ((plan.blocks > 0) == (batch.payload_bit > 0))[good].all()
    assert (plan.blocks.sum(1) <= 100).all()
    assert np.isnan(plan.energy_j[~good]).all()


def test_rounding_vanishes_with_finer_blocks_and_halving_never_hurts():
    rng = np.random.default_rng(5)
    batch = random_batch(rng, 20, 5, decades=1.0)
    round_s = 2 * solve(batch, Shortest()).round_s
    prices = [round_to_blocks(batch, round_s, n).rounding_price for n in (25, 50, 400, 3200)]
    assert (prices[1] <= prices[0] + 1e-12)[~np.isnan(prices[0])].all()
    assert prices[3].max() < 1e-4
    assert np.nanmean(prices[3]) < 0.1 * np.nanmean(prices[2]) < 0.01 * np.nanmean(prices[1])


def test_moving_a_block_never_helps():
    """Optimality by exchange, on cells too large for brute force."""
    rng = np.random.default_rng(6)
    batch = random_batch(rng, 4, 8, decades=2.0)
    round_s = 1.5 * solve(batch, Shortest()).round_s
    plan = round_to_blocks(batch, round_s, 60)
    assert (plan.status == Status.OPTIMAL).any()
    for i in np.flatnonzero(plan.status == Status.OPTIMAL):
        step, n = batch.bandwidth_hz[i] / 60, plan.blocks[i]

        def energies(change, i=i, step=step, n=n):
            return np.array(
                [
                    least_energy(batch, i, k, round_s[i] - 0.01, (n[k] + change) * step)
                    if n[k] + change > 0
                    else math.inf
                    for k in range(8)
                ]
            )

        now, fewer, more = energies(0), energies(-1), energies(1)
        np.testing.assert_allclose(plan.device_energy_j[i], now, rtol=1e-9)
        exchange = (fewer - now)[:, None] + (more - now)[None, :]
        np.fill_diagonal(exchange, 0.0)
        assert exchange.min() >= -1e-9 * now.sum()


def test_permutation_of_devices():
    rng = np.random.default_rng(7)
    batch = random_batch(rng, 10, 6, zeros=True)
    round_s = 1.8 * solve(batch, Shortest()).round_s
    order = rng.permutation(6)
    names = (
        "payload_bit", "work_cycles", "gain", "power_max_w", "frequency_min_hz",
        "frequency_max_hz", "kappa", "fixed_energy_j",
    )  # fmt: skip
    turned = batch.replace(**{name: getattr(batch, name)[:, order] for name in names})
    plan, other = round_to_blocks(batch, round_s, 50), round_to_blocks(turned, round_s, 50)
    np.testing.assert_array_equal(plan.blocks[:, order], other.blocks)
    np.testing.assert_allclose(plan.energy_j, other.energy_j, rtol=1e-13)


def test_edge_cases():
    def cell(**change):
        arguments = {
            "payload_bit": [1e5, 1e5], "work_cycles": 1e8, "gain": 1e-10, "power_max_w": 0.1,
            "frequency_min_hz": 0.0, "frequency_max_hz": 1e9, "kappa": 1e-28,
            "bandwidth_hz": 1e6, "noise_psd_w_per_hz": 4e-21,
        }  # fmt: skip
        return Batch(**(arguments | change))

    # alike devices share alike, and an odd block goes to one of them
    assert round_to_blocks(cell(), 1.0, 10).blocks.tolist() == [[5, 5]]
    assert sorted(round_to_blocks(cell(), 1.0, 11).blocks[0]) == [5, 6]
    # one block for two devices
    short = round_to_blocks(cell(), 1.0, [1])
    assert short.status[0] == Status.INFEASIBLE
    assert np.isnan(short.energy_j[0])
    assert np.isfinite(short.bound_j[0])
    assert short.blocks.tolist() == [[0, 0]]
    # nothing to send; nothing to compute; no price of computing; a round too short; mixed rows
    idle = round_to_blocks(cell(payload_bit=0.0, gain=[1e-10, 1e-10]), 1.0, 1)
    assert idle.status[0] == Status.OPTIMAL
    assert idle.energy_j[0] == pytest.approx(2 * 1e-28 * 1e8**3, rel=1e-12)
    for change in ({"work_cycles": 0.0}, {"kappa": 0.0}, {"frequency_min_hz": 1e9}):
        plan = round_to_blocks(cell(**change), 1.0, 10)
        assert plan.status[0] == Status.OPTIMAL
        best = brute_force(cell(**change), 0, 1.0, 10)
        assert plan.energy_j[0] == pytest.approx(best, rel=1e-9)
    late = round_to_blocks(cell(fixed_delay_s=[0.0, 0.99, 2.0]), 1.0, 10)
    assert late.status.tolist() == [0, 2, 2]
    never = round_to_blocks(cell(payload_bit=[1e5, 0.0], work_cycles=[1e8, 2e9]), 1.0, 10)
    assert never.status[0] == Status.INFEASIBLE
    # at the shortest round every device has its least band: whole blocks fit only by luck
    shortest = solve(cell(), Shortest()).round_s
    assert round_to_blocks(cell(), shortest, 10).status[0] == Status.OPTIMAL
    assert round_to_blocks(cell(), shortest, 11).status[0] == Status.INFEASIBLE


def test_a_large_cell_is_quick():
    rng = np.random.default_rng(8)
    batch = random_batch(rng, 1, 100, decades=1.0)
    round_s = 3 * solve(batch, Shortest()).round_s
    start = time.perf_counter()
    plan = round_to_blocks(batch, round_s, 275)
    assert time.perf_counter() - start < 5.0  # about 0.1 s where nobody else computes
    assert plan.status[0] == Status.OPTIMAL
    assert plan.energy_j[0] >= solve(batch, LeastEnergy(round_s)).energy_j[0] * (1 - 1e-10)


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        (0, "blocks must be positive, got 0.0"),
        (2.5, "blocks must be a whole number, got 2.5"),
        ([3, -1], r"blocks\[1\] must be positive, got -1.0"),
        ([3, 3, 3], r"blocks must have shape \[2\] or be a scalar, got shape \[3\]"),
    ],
)
def test_wrong_input(blocks, words):
    batch = random_batch(np.random.default_rng(9), 2, 3)
    with pytest.raises(InvalidInputError, match=words):
        round_to_blocks(batch, 10.0, blocks)
    with pytest.raises(InvalidInputError, match="round_s must be positive"):
        round_to_blocks(batch, 0.0, 5)
