"""Energy-delay curves against energies computed one by one, brute force and closed forms."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest
from allocation_cells import random_batch

from pwff_solvers.allocation import (
    TDMA,
    Batch,
    InvalidInputError,
    LeastEnergy,
    Shortest,
    Status,
    Weighted,
    solve,
)
from pwff_solvers.allocation import curve as module
from pwff_solvers.allocation.curve import energy_delay_curve, least_energy_within

ACCESS = pytest.mark.parametrize("access", ["fdma", "tdma"])
CELL = {
    "payload_bit": [[1e5, 2e5]],
    "work_cycles": 1e9,
    "gain": [[1e-10, 1e-11]],
    "power_max_w": 0.1,
    "frequency_min_hz": 0.0,
    "frequency_max_hz": 2e9,
    "kappa": 1e-28,
    "bandwidth_hz": 1e6,
    "noise_psd_w_per_hz": 4e-21,
    "fixed_delay_s": 0.3,
    "fixed_energy_j": 1e-3,
}


def cells(seed, instances=3, devices=4, **how):
    return random_batch(np.random.default_rng(seed), instances, devices, **how)


def delays_between(curve, rng, number=60):
    """Random delays between the points, dense where they are."""
    return np.interp(
        rng.uniform(0, curve.delay_s.size - 1, number),
        np.arange(curve.delay_s.size),
        curve.delay_s,
    )


def true_energy(batch, i, delay_s, access):
    many = solve(batch.take(np.full(delay_s.size, i)), LeastEnergy(delay_s), access)
    good = many.status == Status.OPTIMAL
    assert good.mean() > 0.9
    return np.where(good, many.energy_j, np.nan)


@ACCESS
@pytest.mark.parametrize("tolerance", [3e-2, 2e-3])
def test_bounds_hold_the_energies_computed_one_by_one(access, tolerance):
    batch, rng = cells(1, zeros=True), np.random.default_rng(2)
    curves = energy_delay_curve(batch, tolerance, access)
    for i, curve in enumerate(curves):
        assert curve.error <= tolerance
        assert curve.gap <= 1e-6
        delay_s = np.append(delays_between(curve, rng), curve.delay_s[-1] * np.array([1.5, 40.0]))
        energy_j = true_energy(batch, i, delay_s, access)
        upper, lower = curve.upper_j(delay_s), curve.lower_j(delay_s)
        known = np.isfinite(energy_j)
        assert (lower <= energy_j * (1 + 1e-9))[known].all()
        assert (energy_j <= upper * (1 + 1e-7))[known].all()
        # the certified error is true, and not bought by bounds so wide that nothing is said
        calm = delay_s > curve.delay_s[0] * (1 + 1e-6)
        assert ((upper - lower) <= tolerance * upper * (1 + 1e-6))[calm].all()
        # some point misses the curve by a fair part of the tolerance: no point is wasted
        assert np.nanmax((upper - energy_j) / energy_j) > 0.1 * tolerance


@ACCESS
def test_convex_falling_and_of_the_right_slope(access):
    batch = cells(3, floors=False)
    for i, curve in enumerate(energy_delay_curve(batch, 1e-2, access)):
        assert (np.diff(curve.delay_s) > 0).all()
        assert (np.diff(curve.energy_j) < 0).all()
        chords = -np.diff(curve.energy_j) / np.diff(curve.delay_s)
        assert (np.diff(chords) < 0).all()
        # each chord is between the prices of its ends, the first price being the steepest
        price = curve.price_of_time_w
        assert (price[:-1] >= chords * (1 - 1e-6)).all()
        assert (chords >= price[1:] * (1 - 1e-6)).all()
        inner = curve.delay_s[1:-1][curve.delay_s[1:-1] > 1.01 * curve.delay_s[0]]
        step = 1e-5
        up, down = (true_energy(batch, i, inner * (1 + s), access) for s in (step, -step))
        slope = (down - up) / (2 * step * inner)
        np.testing.assert_allclose(slope, curve.price_w(inner), rtol=1e-3)


@ACCESS
def test_ends_are_the_shortest_round_and_the_infimum(access):
    batch = cells(4)
    fastest = solve(batch, Shortest(), access)
    endless = solve(batch, Weighted(1e-16), access)
    for i, curve in enumerate(energy_delay_curve(batch, 1e-2, access)):
        assert curve.delay_s[0] == pytest.approx(fastest.round_s[i], rel=1e-12)
        assert curve.energy_j[0] == pytest.approx(fastest.energy_j[i], rel=1e-7)
        assert curve.least_energy_j == pytest.approx(endless.energy_j[i], rel=1e-5)
        assert curve.least_energy_j <= endless.energy_j[i]
        assert curve.energy_j[-1] <= 1.01 * curve.least_energy_j
        assert curve.energy_j[-2] > 1.01 * curve.least_energy_j
        early = np.array([0.0, 0.9 * curve.delay_s[0]])
        for bound in (curve.upper_j, curve.lower_j, curve.price_w):
            assert np.isnan(bound(early)).all()
            assert np.isfinite(bound(curve.delay_s[0] * (1 - 1e-13)))
        with pytest.raises(ValueError, match="read-only"):
            curve.energy_j[0] = 0.0


def test_points_grow_like_one_over_the_root_of_the_tolerance():
    batch = cells(5, floors=False)
    number = [
        sum(c.delay_s.size for c in energy_delay_curve(batch, tolerance, "tdma"))
        for tolerance in (1e-2, 1e-3, 1e-4)
    ]
    for few, many in pairwise(number):
        assert 2.2 < many / few < 4.2  # sqrt(10) = 3.2


def test_every_sweep_is_one_call_and_every_answer_a_point(monkeypatch):
    batch, asked = cells(6, floors=False), []

    def counting(part, objective, access):
        asked.append(part.instances)
        return solve(part, objective, access)

    monkeypatch.setattr(module, "solve", counting)
    curves = energy_delay_curve(batch, 1e-3, "tdma")
    assert len(asked) < 20
    assert sum(asked) == sum(c.delay_s.size for c in curves)


@ACCESS
def test_order_of_instances_does_not_matter(access):
    batch, order = cells(7, devices=3), np.array([2, 0, 1])
    here, there = (energy_delay_curve(b, 1e-2, access) for b in (batch, batch.take(order)))
    one, two = (
        energy_delay_curve(b, 1e-2, access, shared=True)[0] for b in (batch, batch.take(order))
    )
    for i, curve in zip(order, there, strict=True):
        np.testing.assert_allclose(curve.delay_s, here[i].delay_s, rtol=1e-6)
        np.testing.assert_allclose(curve.energy_j, here[i].energy_j, rtol=1e-6)
    np.testing.assert_allclose(two.energy_j, one.energy_j, rtol=1e-6)
    np.testing.assert_allclose(two.round_s, one.round_s[order], rtol=1e-6)


# --- rounds that share a delay ----------------------------------------------------------------


@ACCESS
def test_shared_curve_is_the_best_split_of_two_rounds(access):
    """A line search over the split, each round at its least energy: no price is involved."""
    batch, rng = cells(8, instances=2), np.random.default_rng(9)
    (curve,) = energy_delay_curve(batch, 1e-3, access, shared=True)
    assert curve.error <= 1e-3
    least = solve(batch, Shortest(), access).round_s
    for total_s in delays_between(curve, rng, 3):
        first = np.linspace(least[0], total_s - least[1], 200)
        for _ in range(3):  # zoom
            both = true_energy(batch, 0, first, access) + true_energy(
                batch, 1, total_s - first, access
            )
            k = int(np.nanargmin(both))
            first = np.linspace(first[max(k - 1, 0)], first[min(k + 1, first.size - 1)], 60)
        best = np.nanmin(both)
        assert curve.lower_j(total_s) <= best * (1 + 1e-8)
        assert best <= curve.upper_j(total_s) * (1 + 1e-7)
        plan, _ = least_energy_within(batch, total_s, access)
        assert plan.energy_j.sum() == pytest.approx(best, rel=1e-6)
        assert plan.energy_j.sum() <= best * (1 + 1e-8)


@ACCESS
def test_shared_curve_beats_equal_rounds_and_adds_up(access):
    batch, rng = cells(10), np.random.default_rng(11)
    (curve,) = energy_delay_curve(batch, 1e-2, access, shared=True)
    np.testing.assert_allclose(curve.round_s.sum(0), curve.delay_s, rtol=1e-12)
    np.testing.assert_allclose(curve.round_energy_j.sum(0), curve.energy_j, rtol=1e-12)
    floor = 3 * solve(batch, Shortest(), access).round_s.max()
    total_s = floor * rng.uniform(1.001, 8.0, 20)
    equal = sum(true_energy(batch, i, total_s / 3, access) for i in range(3))
    assert (curve.lower_j(total_s) <= equal * (1 + 1e-8)).all()
    assert (curve.lower_j(total_s) < 0.99 * equal).any()
    # the rounds of a point are good for the energy of that point
    k = curve.delay_s.size // 2
    again = solve(batch, LeastEnergy(curve.round_s[:, k]), access)
    np.testing.assert_allclose(again.energy_j, curve.round_energy_j[:, k], rtol=1e-7)


def test_shared_curve_of_equal_rounds_is_the_curve_of_one():
    batch = cells(12, instances=1)
    (one,) = energy_delay_curve(batch, 1e-3, "tdma")
    (three,) = energy_delay_curve(batch.take([0, 0, 0]), 1e-3, "tdma", shared=True)
    np.testing.assert_allclose(three.delay_s, 3 * one.delay_s, rtol=1e-9)
    np.testing.assert_allclose(three.energy_j, 3 * one.energy_j, rtol=1e-9)


@ACCESS
def test_deadline_is_met_at_one_price(access):
    batch = cells(13, floors=False)
    shortest_s = solve(batch, Shortest(), access).round_s.sum()
    for factor in (1.001, 1.3, 4.0, 1e3, 1e6):
        plan, price_w = least_energy_within(batch, factor * shortest_s, access)
        assert plan.round_s.sum() == pytest.approx(factor * shortest_s, rel=1e-12)
        assert (plan.status == Status.OPTIMAL).all()
        # all rounds have that price, but for those that cannot be any shorter
        inner = plan.round_s > 1.0001 * solve(batch, Shortest(), access).round_s
        assert inner.any()
        np.testing.assert_allclose(plan.price_of_time_w[inner], price_w, rtol=1e-5)
        assert (plan.price_of_time_w[~inner] <= price_w * (1 + 1e-5)).all()


def test_deadline_below_at_and_beyond_everything():
    batch = cells(14)
    fastest = solve(batch, Shortest())
    shortest_s = float(fastest.round_s.sum())
    message = f"delay_max_s must be at least {shortest_s!r} s, the shortest total delay, got"
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        least_energy_within(batch, 0.999 * shortest_s)
    plan, price_w = least_energy_within(batch, shortest_s)
    np.testing.assert_allclose(plan.round_s, fastest.round_s, rtol=1e-12)
    assert price_w == fastest.price_of_time_w.max()
    # computing only, with least frequencies: everything there is to save is saved after 1 s a round
    still = Batch(**{**CELL, "payload_bit": [[0.0, 0.0]] * 2, "frequency_min_hz": 1e9})
    plan, price_w = least_energy_within(still, 50.0)
    assert price_w == 0.0
    np.testing.assert_allclose(plan.round_s, 1.3)
    np.testing.assert_allclose(plan.energy_j, 2 * (1e-28 * 1e9 * 1e18 + 1e-3))


def test_deadline_of_rounds_that_only_compute_in_closed_form():
    """With a least frequency V ends at a kink, where the price jumps to 0."""
    batch = Batch(
        **{
            **CELL,
            "payload_bit": [[0.0], [0.0]],
            "gain": 1e-10,
            "work_cycles": [[1e9], [3e9]],
            "frequency_min_hz": 1e9,
            "fixed_delay_s": 0.0,
            "fixed_energy_j": 0.0,
        }
    )
    # equal prices mean equal frequencies: 4e9 cycles in D
    for delay_s in (2.1, 3.0, 3.999, 4.0):
        plan, price_w = least_energy_within(batch, delay_s)
        f = 4e9 / delay_s
        np.testing.assert_allclose(plan.round_s, [delay_s / 4, 3 * delay_s / 4], rtol=1e-7)
        assert plan.round_s.sum() == pytest.approx(delay_s, rel=1e-12)
        if delay_s < 4.0:
            assert price_w == pytest.approx(2e-28 * f**3, rel=1e-6)


def test_jump_is_met_by_interpolation(monkeypatch):
    """Straight pieces: an allocator that only answers with the ends of one, as at a true jump."""
    batch = cells(15, instances=2)
    plan, price_w = least_energy_within(batch, 2 * solve(batch, Shortest()).round_s.sum())
    ends = [solve(batch, Weighted(w)) for w in (2 * price_w, price_w / 2)]
    target = 0.3 * ends[0].round_s.sum() + 0.7 * ends[1].round_s.sum()

    def jumping(part, objective, access):
        if isinstance(objective, Weighted):
            return ends[0] if objective.price_of_time_w > price_w else ends[1]
        return solve(part, objective, access)

    monkeypatch.setattr(module, "solve", jumping)
    plan, found_w = least_energy_within(batch, target)
    assert found_w == pytest.approx(price_w, rel=1e-9)
    np.testing.assert_allclose(
        plan.round_s, 0.3 * ends[0].round_s + 0.7 * ends[1].round_s, rtol=1e-12
    )


# --- degenerate curves ------------------------------------------------------------------------


@ACCESS
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"work_cycles": 0.0},
        {"payload_bit": [[0.0, 0.0]]},
        {"payload_bit": [[0.0, 0.0]], "fixed_energy_j": 0.0},  # the infimum is 0
        {"payload_bit": [[0.0, 0.0]], "frequency_min_hz": 1e9},  # reached after 1 s
        {"payload_bit": [[0.0, 0.0]], "work_cycles": 0.0},
        {"payload_bit": [[0.0, 0.0]], "work_cycles": 0.0, "fixed_delay_s": 0.0},
        {"payload_bit": [[0.0, 0.0]], "work_cycles": 0.0, "fixed_energy_j": 0.0},
        {"kappa": 0.0},
        {"kappa": [[0.0, 1e-27]], "payload_bit": [[1e5, 0.0]]},
        {"kappa": 0.0, "payload_bit": [[0.0, 0.0]]},
        {"frequency_min_hz": 2e9},
        {"frequency_min_hz": 2e9, "payload_bit": [[0.0, 0.0]]},
        {"payload_bit": [[0.0, 1e5]], "work_cycles": [[2e10, 0.0]]},  # an idle device is last
        {"payload_bit": [[0.0, 1e5]], "work_cycles": [[2e10, 0.0]], "frequency_min_hz": 2e9},
    ],
)
def test_degenerate_cells(access, shared, change):
    batch = Batch(**{**CELL, **change}).take([0, 0])
    curves = energy_delay_curve(batch, 1e-2, access, shared=shared)
    assert len(curves) == (1 if shared else 2)
    rounds = 2 if shared else 1
    for curve in curves:
        assert curve.error <= 1e-2
        assert np.isfinite(curve.energy_j).all()
        assert (np.diff(curve.delay_s) > 0).all()
        assert curve.round_s.shape == (rounds, curve.delay_s.size)
        last, least = curve.energy_j[-1], curve.least_energy_j
        assert last - least <= 1e-2 * max(least, 1e-6 * curve.energy_j[0])
        delay_s = delays_between(curve, np.random.default_rng(0), 12) + 1e-12
        energy_j = rounds * true_energy(batch, 0, delay_s / rounds, access)
        assert (curve.lower_j(delay_s) <= energy_j * (1 + 1e-8)).all()
        assert (energy_j <= curve.upper_j(delay_s) * (1 + 1e-7)).all()
    shortest_s = float(solve(batch, Shortest(), access).round_s.sum())
    if shortest_s > 0:
        for factor in (1.0, 1.5, 20.0):
            plan, price_w = least_energy_within(batch, factor * shortest_s, access)
            assert (plan.status == Status.OPTIMAL).all()
            assert price_w >= 0
            assert plan.round_s.sum() <= factor * shortest_s * (1 + 1e-12)
            equal = 2 * true_energy(batch, 0, np.array([factor * shortest_s / 2]), access)
            assert plan.energy_j.sum() == pytest.approx(float(equal[0]), rel=1e-7)


def test_one_point_is_enough_where_nothing_can_be_saved():
    for change in (
        {"payload_bit": [[0.0, 0.0]], "work_cycles": 0.0},
        {"payload_bit": [[0.0, 0.0]], "frequency_min_hz": 2e9},
        {"payload_bit": [[0.0, 0.0]], "kappa": 0.0},
    ):
        (curve,) = energy_delay_curve(Batch(**{**CELL, **change}))
        assert curve.delay_s.size == 1
        assert curve.error <= 1e-12
        assert curve.energy_j[0] == pytest.approx(curve.least_energy_j, rel=1e-12)
        assert curve.upper_j(99.0) == curve.energy_j[0]


def test_least_power_with_tdma_reaches_the_infimum():
    batch = Batch(**{**CELL, "power_min_w": 0.02, "frequency_min_hz": 5e8})
    (curve,) = energy_delay_curve(batch, 1e-3, "tdma")
    late = solve(batch, LeastEnergy(1e6), "tdma").energy_j[0]
    assert curve.least_energy_j == pytest.approx(late, rel=1e-12)
    assert curve.error <= 1e-3


def test_wide_range_of_cells_keeps_its_word():
    """Cells with gains over six decades, where prices near the shortest round are extreme."""
    batch = cells(16, instances=4, devices=5, decades=6.0, zeros=True)
    for curve in energy_delay_curve(batch, 2e-2):
        assert curve.error <= 2e-2


# --- certificates and input -------------------------------------------------------------------


def test_bad_certificates_loosen_the_bound_and_nothing_else(monkeypatch):
    batch, honest = cells(17, instances=2), TDMA.energy_bound
    (good, _) = energy_delay_curve(batch, 1e-2, "tdma")
    for spoil in (lambda bound: 0.9 * bound, lambda bound: np.full_like(bound, np.nan)):
        monkeypatch.setattr(TDMA, "energy_bound", lambda *a, spoil=spoil: spoil(honest(*a)))
        (bad, _) = energy_delay_curve(batch, 1e-2, "tdma")
        assert bad.error > 1e-2
        delay_s = np.geomspace(good.delay_s[0], good.delay_s[-1], 50)
        assert (bad.lower_j(delay_s) <= good.upper_j(delay_s) * (1 + 1e-12)).all()
        assert (bad.upper_j(delay_s) >= good.lower_j(delay_s) * (1 - 1e-12)).all()
        # and the error is what it says: the bounds really are that far apart
        seen = (bad.upper_j(delay_s) - bad.lower_j(delay_s)) / bad.upper_j(delay_s)
        assert 0.5 * bad.error < seen.max() <= bad.error * (1 + 1e-6)


def test_error_is_the_largest_distance_of_the_bounds():
    for curve in energy_delay_curve(cells(18), 5e-2, "tdma"):
        fine = np.concatenate(
            [curve.delay_s, *(np.linspace(a, b, 200) for a, b in pairwise(curve.delay_s))]
        )
        seen = (curve.upper_j(fine) - curve.lower_j(fine)) / curve.upper_j(fine)
        seen = np.append(seen, 1 - curve.least_energy_j / curve.energy_j[-1])
        assert 0.95 * curve.error <= seen.max() <= curve.error * (1 + 1e-6) + 1e-9


def test_bad_input():
    batch = Batch(**CELL)
    for value, rule in (
        (0.0, "from 1e-07 to 0.5, got 0.0"),
        (1e-8, "from 1e-07 to 0.5, got 1e-08"),
        (0.6, "from 1e-07 to 0.5, got 0.6"),
        (np.nan, "finite, got nan"),
        ([0.1], r"one number, got shape \[1\]"),
        ("a", "a real number, got 'a'"),
    ):
        with pytest.raises(InvalidInputError, match=f"^tolerance must be {rule}"):
            energy_delay_curve(batch, value)
    for value, rule in (
        (0.0, "positive, got 0.0"),
        (-1.0, "positive, got -1.0"),
        (np.nan, "finite, got nan"),
        (np.inf, "finite, got inf"),
        ([1.0, 2.0], r"one number, got shape \[2\]"),
        ("a", "a real number, got 'a'"),
    ):
        with pytest.raises(InvalidInputError, match=f"^delay_max_s must be {rule}"):
            least_energy_within(batch, value)
    with pytest.raises(InvalidInputError, match=r"^access must be"):
        energy_delay_curve(batch, access="cdma")
