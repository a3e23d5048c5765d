"""The broadcast only shifts the round: by hand, by its own formula, and through the allocator."""

from __future__ import annotations

import math

import numpy as np
import pytest
from allocation_cells import random_batch

from pwff_solvers.allocation import (
    InvalidInputError,
    LeastEnergy,
    Shortest,
    Status,
    solve,
)
from pwff_solvers.extras.downlink import broadcast


def test_by_hand():
    """SNR 15 at the weakest receiver: 4 bit/s/Hz; 8 Mbit in 1 MHz take 2 s."""
    batch = random_batch(np.random.default_rng(0), 1, 3, delay=0.5)
    noise = 4e-21 * 1e6
    gain = np.array([100.0, 15.0, 40.0]) * noise / 20.0
    later = broadcast(batch, 8e6, 20.0, gain, 1e6, receive_power_w=[0.1, 0.2, 0.0])
    np.testing.assert_allclose(later.fixed_delay_s, [2.5], rtol=1e-14)
    np.testing.assert_allclose(later.fixed_energy_j, [[0.201, 0.401, 0.001]], rtol=1e-14)
    for name in ("payload_bit", "work_cycles", "gain", "bandwidth_hz", "kappa"):
        np.testing.assert_array_equal(getattr(later, name), getattr(batch, name))


def test_formula_of_every_instance():
    rng = np.random.default_rng(1)
    batch = random_batch(rng, 7, 4, zeros=True)
    payload, power = 10 ** rng.uniform(4, 7, 7), 10 ** rng.uniform(-1, 1.5, 7)
    later = broadcast(batch, payload, power, receive_power_w=0.3)
    for i in range(7):
        noise = batch.noise_psd_w_per_hz[i] * batch.bandwidth_hz[i]
        rates = [batch.bandwidth_hz[i] * math.log2(1 + power[i] * h / noise) for h in batch.gain[i]]
        slowest = max(payload[i] / rate for rate in rates)
        assert later.fixed_delay_s[i] == pytest.approx(0.01 + slowest, rel=1e-12)
        np.testing.assert_allclose(later.fixed_energy_j[i], 1e-3 + 0.3 * slowest, rtol=1e-12)


def test_the_allocation_is_the_one_of_the_shorter_round():
    rng = np.random.default_rng(2)
    batch = random_batch(rng, 30, 6, zeros=True, delay=0.0)
    later = broadcast(batch, 1e6, 5.0, receive_power_w=0.7)
    shift = later.fixed_delay_s
    shortest = solve(batch, Shortest()).round_s
    np.testing.assert_allclose(solve(later, Shortest()).round_s, shortest + shift, rtol=1e-11)
    round_s = shortest * rng.uniform(1.3, 4.0, 30)
    plain, moved = solve(batch, LeastEnergy(round_s)), solve(later, LeastEnergy(round_s + shift))
    assert (moved.status == Status.OPTIMAL).all()
    # the sum rounds the round itself: a few ulp of it, amplified by how steep the answers are
    for name in ("bandwidth_hz", "power_w", "frequency_hz", "upload_s"):
        np.testing.assert_allclose(getattr(moved, name), getattr(plain, name), rtol=1e-7)
    np.testing.assert_allclose(moved.energy_j, plain.energy_j + 6 * 0.7 * shift, rtol=1e-10)
    # and the round does not come for free
    assert (solve(later, LeastEnergy(shortest)).status == Status.INFEASIBLE).all()


def test_no_payload_changes_nothing_and_broadcasts_add_up():
    batch = random_batch(np.random.default_rng(3), 4, 3)
    same = broadcast(batch, 0.0, 1.0, receive_power_w=1.0)
    np.testing.assert_array_equal(same.fixed_delay_s, batch.fixed_delay_s)
    np.testing.assert_array_equal(same.fixed_energy_j, batch.fixed_energy_j)
    twice = broadcast(broadcast(batch, 1e6, 1.0), 2e6, 1.0)
    np.testing.assert_allclose(
        twice.fixed_delay_s, broadcast(batch, 3e6, 1.0).fixed_delay_s, rtol=1e-14
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"payload_bit": -1.0}, "payload_bit must be at least 0, got -1.0"),
        ({"payload_bit": [1.0, np.nan]}, r"payload_bit\[1\] must be finite, got nan"),
        ({"payload_bit": [1.0, 2.0, 3.0]}, r"payload_bit must broadcast to \[instance\] = \[2\]"),
        ({"power_w": 0.0}, "power_w must be positive, got 0.0"),
        ({"gain": [[1.0, 1.0, -2.0]]}, r"gain\[0, 2\] must be positive, got -2.0"),
        ({"gain": np.ones((2, 4))}, r"\[instance, device\] = \[2, 3\], got shape \[2, 4\]"),
        ({"bandwidth_hz": [1e6, 0.0]}, r"bandwidth_hz\[1\] must be positive, got 0.0"),
        ({"receive_power_w": -0.1}, "receive_power_w must be at least 0, got -0.1"),
        ({"batch": None}, "batch must be a Batch, got NoneType"),
    ],
)
def test_wrong_input(change, words):
    batch = random_batch(np.random.default_rng(4), 2, 3)
    arguments = {"batch": batch, "payload_bit": 1e6, "power_w": 1.0} | change
    with pytest.raises(InvalidInputError, match=words):
        broadcast(**arguments)
