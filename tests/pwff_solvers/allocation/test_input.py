"""Bad input, infeasible instances, shapes."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import re
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
from allocation_cells import random_arguments, random_batch

from pwff_solvers.allocation import (
    Batch,
    InvalidInputError,
    LeastEnergy,
    Shortest,
    Status,
    Weighted,
    energy_delay_curve,
    solve,
)

GOOD = {
    "payload_bit": [[1e5, 2e5]],
    "work_cycles": 1e9,
    "gain": [[1e-10, 1e-11]],
    "power_max_w": 0.1,
    "frequency_min_hz": 0.0,
    "frequency_max_hz": 2e9,
    "kappa": 1e-28,
    "bandwidth_hz": 1e6,
    "noise_psd_w_per_hz": 4e-21,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gain": [[1e-10, -1.0]]}, "gain[0, 1] must be positive, got -1.0"),
        ({"gain": [[np.nan, 1.0]]}, "gain[0, 0] must be finite, got nan"),
        ({"payload_bit": -1.0}, "payload_bit must be at least 0, got -1.0"),
        ({"work_cycles": np.inf}, "work_cycles must be finite, got inf"),
        ({"kappa": [-1.0, 0.0]}, "kappa[0] must be at least 0, got -1.0"),
        ({"bandwidth_hz": 0.0}, "bandwidth_hz must be positive, got 0.0"),
        ({"noise_psd_w_per_hz": [0.0]}, "noise_psd_w_per_hz[0] must be positive, got 0.0"),
        ({"power_max_w": 0.0}, "power_max_w must be positive, got 0.0"),
        ({"fixed_delay_s": -1.0}, "fixed_delay_s must be at least 0, got -1.0"),
        ({"fixed_energy_j": -1.0}, "fixed_energy_j must be at least 0, got -1.0"),
        ({"power_min_w": 0.2},
         "power_min_w[0, 0] must be at most power_max_w[0, 0] = 0.1, got 0.2"),
        ({"frequency_min_hz": 3e9},
         "frequency_min_hz[0, 0] must be at most frequency_max_hz[0, 0] = 2000000000.0, "
         "got 3000000000.0"),
        ({"work_cycles": [1.0, 2.0, 3.0]},
         "payload_bit and work_cycles must have equal sizes along the device axis, got 2 and 3"),
        ({"gain": [[1e-10, 1e-11]] * 3, "bandwidth_hz": [1e6, 1e6]},
         "gain and bandwidth_hz must have equal sizes along the instance axis, got 3 and 2"),
        ({"bandwidth_hz": [[1e6]]}, "bandwidth_hz must broadcast to [instance], got shape [1, 1]"),
        ({"gain": "loud"}, "gain must be an array of real numbers, got 'loud'"),
        ({"gain": ["1e-10", "1e-11"]}, "gain[0] must be a real number, got '1e-10'"),
        ({"gain": [1e-10, "1e-11"]}, "gain[1] must be a real number, got '1e-11'"),
        ({"gain": np.array([["a", "b"]])}, "gain[0, 0] must be a real number, got 'a'"),
        ({"gain": b"1"}, "gain must be an array of real numbers, got b'1'"),
        ({"gain": 1j}, "gain must be an array of real numbers, got 1j"),
        ({"gain": {1.0}}, "gain must be an array of real numbers, got {1.0}"),
        ({"gain": [[1e-10], [1e-10, 1e-11]]}, "gain must be an array of real numbers, got [["),
        ({"kappa": None}, "kappa must be an array of real numbers, got None"),
        ({"kappa": [1e-28, None]}, "kappa[1] must be a real number, got None"),
        ({"kappa": True}, "kappa must be an array of real numbers, got True"),
        ({"kappa": [1e-28, False]}, "kappa[1] must be a real number, got False"),
        ({"kappa": np.array([[True, False]])}, "kappa[0, 0] must be a real number, got True"),
        ({"bandwidth_hz": 10**400}, "bandwidth_hz must be finite, got an integer of 1329 bits"),
        ({"work_cycles": [[1, 10**5000]]}, "work_cycles[0, 1] must be finite, got an integer of"),
        ({"gain": np.ma.array([[1e-10, 1e-11]], mask=[[False, True]])},
         "gain[0, 1] must not be masked"),
        ({"gain": [np.ma.array([1e-10, 1e-11], mask=[False, True])]},
         "gain[0, 1] must not be masked"),
        ({"gain": [[1e-10, np.ma.masked]]}, "gain[0, 1] must not be masked"),
        ({"bandwidth_hz": np.ma.masked}, "bandwidth_hz must not be masked"),
        ({"gain": 1e-300, "noise_psd_w_per_hz": 1e300},
         "gain[0, 0] = 1e-300 and noise_psd_w_per_hz[0] = 1e+300 must give a positive, finite "
         "G = h/N0, got 0.0"),
        ({"power_max_w": [0.1, 1e-300], "payload_bit": 1e300},
         "payload_bit[0, 1] = 1e+300, power_max_w[0, 1] = 1e-300, gain[0, 1] = 1e-11 and "
         "noise_psd_w_per_hz[0] = 4e-21 must give a positive, finite a/(P G), got inf"),
        ({"bandwidth_hz": 1e-300, "gain": 1e30},
         "power_max_w[0, 0] = 0.1, gain[0, 0] = 1e+30, noise_psd_w_per_hz[0] = 4e-21 and "
         "bandwidth_hz[0] = 1e-300 must give a positive, finite P G/B, got inf"),
        ({"work_cycles": 1e300, "frequency_max_hz": 1e-100},
         "work_cycles[0, 0] = 1e+300 and frequency_max_hz[0, 0] = 1e-100 must give a positive, "
         "finite c/f_max, got inf"),
        ({"work_cycles": [1e9, 1e150]},
         "kappa[0, 1] = 1e-28 and work_cycles[0, 1] = 1e+150 must give a positive, finite "
         "kappa c^3, got inf"),
        ({"work_cycles": 1e-10, "kappa": 1e-320}, "kappa[0, 0] = 1e-320 and work_cycles[0, 0]"),
    ],
)  # fmt: skip
def test_bad_batch(change, message):
    with pytest.raises(InvalidInputError, match="^" + re.escape(message)):
        Batch(**{**GOOD, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"work_cycles": 10**9, "gain": [Fraction(1, 10**10), 1e-11]},
        {"power_max_w": np.float32(0.1), "kappa": np.array([0, 0])},
        {"gain": np.ma.array([1e-10, 1e-11]), "payload_bit": ([1e5, 2e5],)},
        # far out, but every quantity made of several is a number
        {"gain": 1e-90, "noise_psd_w_per_hz": 4e-101},
        {"payload_bit": [0.0, 1e-80], "work_cycles": 0.0, "kappa": 1e200},
    ],
)
def test_unusual_numbers_are_taken(change):
    batch = Batch(**{**GOOD, **change})
    for access in ("fdma", "tdma"):
        assert np.isfinite(solve(batch, Shortest(), access).round_s).all()


def test_bad_objective_and_access():
    batch = Batch(**GOOD)
    for objective, message in (
        (LeastEnergy(-1.0), "round_s must be positive, got -1.0"),
        (LeastEnergy([1.0, 2.0]), r"round_s must have shape \[1\] or be a scalar, got shape \[2\]"),
        (
            Weighted([1.0, 2.0, 3.0]),
            r"got shape \[3\]; ask one cell often with batch.take\(np.zeros\(3, int\)\)$",
        ),
        (Weighted(0.0), "price_of_time_w must be positive, got 0.0"),
        (Weighted([np.nan]), r"price_of_time_w\[0\] must be finite, got nan"),
        ("cheap", "objective must be Shortest"),
        (LeastEnergy(True), "round_s must be an array of real numbers, got True"),
        (LeastEnergy("5"), "round_s must be an array of real numbers, got '5'"),
        (LeastEnergy(10**400), "round_s must be finite, got an integer of 1329 bits"),
        (LeastEnergy(1e300), r"round_s must be between 2.2e-308 and 1e\+150, got 1e\+300"),
        (LeastEnergy(np.ma.masked), "round_s must not be masked"),
        (Weighted([False]), r"price_of_time_w\[0\] must be a real number, got False"),
        (Weighted(np.ma.array([1.0], mask=[1])), r"price_of_time_w\[0\] must not be masked"),
        (Weighted([1e-320]), r"price_of_time_w\[0\] must be between 2.2e-308 and 1e\+150"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            solve(batch, objective)
    with pytest.raises(InvalidInputError, match="access must be 'fdma' or 'tdma', got 'cdma'"):
        solve(batch, Shortest(), "cdma")
    with pytest.raises(InvalidInputError, match=r"power_min_w\[0, 0\] must be 0 .* not a convex"):
        solve(Batch(**GOOD, power_min_w=0.01), Shortest())


@pytest.mark.parametrize("access", ["fdma", "tdma"])
def test_infeasible_inside_a_batch(access):
    batch = random_batch(np.random.default_rng(1), 20, 4, zeros=True)
    shortest = solve(batch, Shortest(), access).round_s
    factor = np.where(np.arange(20) % 3 == 0, 0.9, 1.5)
    result = solve(batch, LeastEnergy(factor * shortest), access)
    bad = factor < 1
    assert (result.status[bad] == Status.INFEASIBLE).all()
    assert (result.status[~bad] == Status.OPTIMAL).all()
    np.testing.assert_allclose(result.shortest_round_s[bad], shortest[bad], rtol=1e-10)
    assert np.isnan(result.bandwidth_hz[bad]).all()
    assert np.isnan(result.energy_j[bad]).all()
    assert (np.abs(result.gap[bad]) < 1e-8).all()
    assert (result.binding_device[bad] >= 0).all()
    assert (result.binding_device[~bad] == -1).all()
    # less delay than the fixed one is infeasible too
    tiny = solve(batch, LeastEnergy(0.005), access)
    assert (tiny.status == Status.INFEASIBLE).all()


def test_relieving_the_binding_device_shortens_the_round_most():
    given = random_arguments(np.random.default_rng(2), 1, 5, floors=False)
    base = solve(Batch(**given), Shortest()).round_s[0]
    binding = solve(Batch(**given), LeastEnergy(0.9 * base)).binding_device[0]
    relief = []
    for k in range(5):
        # one more microsecond for one device
        work = given["work_cycles"].copy()
        work[0, k] -= 1e-6 * base * given["frequency_max_hz"][0, k]
        relief.append(base - solve(Batch(**{**given, "work_cycles": work}), Shortest()).round_s[0])
    assert int(np.argmax(relief)) == binding


def test_inputs_stay_as_they_were_and_batches_are_read_only():
    given = random_arguments(np.random.default_rng(3), 5, 4, zeros=True)
    before = {k: np.copy(v) for k, v in given.items()}
    batch = Batch(**given)
    round_s = np.full(5, 1e3)
    for objective in (Shortest(), LeastEnergy(round_s), Weighted(1.0)):
        for access in ("fdma", "tdma"):
            solve(batch, objective, access)
    for name, value in before.items():
        np.testing.assert_array_equal(given[name], value)
    assert (round_s == 1e3).all()
    with pytest.raises(ValueError, match="read-only"):
        batch.gain[0, 0] = 1.0
    with pytest.raises(AttributeError):
        batch.gain = 1.0


def test_batches_survive_pickling_and_copying():
    batch = random_batch(np.random.default_rng(4), 3, 2)
    for again in (pickle.loads(pickle.dumps(batch)), copy.deepcopy(batch), copy.copy(batch)):  # noqa: S301
        np.testing.assert_array_equal(again.device, batch.device)
        np.testing.assert_array_equal(again.cell, batch.cell)
        assert not again.device.flags.writeable
        assert not again.cell.flags.writeable
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        there = pool.submit(solve, batch, Shortest()).result(timeout=300)
    np.testing.assert_array_equal(there.round_s, solve(batch, Shortest()).round_s)


@pytest.mark.parametrize(
    ("which", "rows"),
    [
        ([2, 0], [2, 0]),
        ([-1], [2]),
        ([1, 1, 1, 1], [1, 1, 1, 1]),
        ([], []),
        (np.array([], bool).astype(int), []),
        ([True, False, True], [0, 2]),
        (slice(1, None), [1, 2]),
    ],
)
def test_parts_of_a_batch(which, rows):
    batch = random_batch(np.random.default_rng(5), 3, 2)
    part = batch.take(which)
    assert (part.instances, part.devices) == (len(rows), 2)
    np.testing.assert_array_equal(part.gain, batch.gain[rows])
    np.testing.assert_array_equal(part.bandwidth_hz, batch.bandwidth_hz[rows])
    assert solve(part, LeastEnergy(1e3)).energy_j.shape == (len(rows),)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (1, "instances must be a list of indices, a mask or a slice, got 1"),
        (np.int64(1), "instances must be a list of indices, a mask or a slice, got "),
        ([[0, 1]], "instances must be a list of indices, a mask or a slice, got [[0, 1]]"),
        ([[0], [1, 2]], "instances must be one list, got [[0], [1, 2]]"),
        ([0, 7], "instances[1] must be at least -3 and below 3, got 7"),
        ([-4], "instances[0] must be at least -3 and below 3, got -4"),
        ([True, False], "instances must have 3 entries as a mask, got 2"),
        ([0.0, 1.0], "instances must be whole numbers or booleans, got [0.0, 1.0]"),
        ("ab", "instances must be a list of indices, a mask or a slice, got 'ab'"),
    ],
)
def test_parts_that_a_batch_does_not_have(which, message):
    with pytest.raises(InvalidInputError, match="^" + re.escape(message)):
        random_batch(np.random.default_rng(5), 3, 2).take(which)


def test_results_say_in_one_line_what_they_are():
    batch = random_batch(np.random.default_rng(6), 3, 2)
    assert repr(batch) == "Batch(3 instances x 2 devices)"
    shortest = solve(batch, Shortest()).round_s
    mixed = solve(batch, LeastEnergy(shortest * [2.0, 0.5, 2.0]))
    outcome = r"3 instances x 2 devices: 2 OPTIMAL, 1 INFEASIBLE; worst gap -?\d\.\de-\d+"
    assert re.fullmatch(rf"Allocation\({outcome}\)", repr(mixed))
    assert repr(solve(batch.take([]), Shortest())) == "Allocation(0 instances x 2 devices)"
    (curve,) = energy_delay_curve(batch, shared=True)
    assert re.fullmatch(
        rf"EnergyDelayCurve\({curve.delay_s.size} points: {curve.delay_s[0]:.4g} to .* s, "
        r".* to .* J; error \S+, worst gap \S+\)",
        repr(curve),
    )


def test_shapes_broadcast():
    batch = Batch(**{**GOOD, "gain": [1e-10, 1e-11], "bandwidth_hz": [1e6, 2e6, 3e6]})
    assert (batch.instances, batch.devices) == (3, 2)
    result = solve(batch, Weighted(1.0))
    assert result.power_w.shape == (3, 2)
    assert result.energy_j.shape == (3,)
    assert np.diff(result.energy_j + result.round_s).max() < 0
    empty = Batch(**{**GOOD, "payload_bit": np.zeros((0, 2)), "gain": 1e-10})
    assert solve(empty, Shortest()).round_s.shape == (0,)


def test_adding_constants_only_shifts():
    base = solve(Batch(**GOOD), LeastEnergy(5.0))
    moved = solve(Batch(**GOOD, fixed_delay_s=1.0, fixed_energy_j=2.0), LeastEnergy(6.0))
    np.testing.assert_allclose(moved.energy_j, base.energy_j + 4.0, rtol=1e-12)
    np.testing.assert_allclose(moved.bandwidth_hz, base.bandwidth_hz, rtol=1e-9)
