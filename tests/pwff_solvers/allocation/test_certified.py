"""Gap and violation on random instances, and a certificate that can fail."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from allocation_cells import random_batch

from pwff_solvers.allocation import (
    FDMA,
    Batch,
    LeastEnergy,
    Shortest,
    Status,
    Weighted,
    certificate,
    solve,
)
from pwff_solvers.allocation.fdma.bracketed import Cell, least_energy
from pwff_solvers.allocation.solve import named

HOW = [{"floors": False}, {"decades": 10.0}, {"decades": 10.0, "zeros": True}, {"zeros": True}]


def check(result):
    good = result.status == Status.OPTIMAL
    assert good.all(), (result.gap[~good], result.violation[~good])
    assert np.abs(result.gap[good]).max() <= 1e-8
    assert result.violation[good].max() <= 1e-9


@pytest.mark.parametrize("access", ["fdma", "tdma"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("devices", "instances"), [(1, 100), (3, 200), (10, 300), (50, 60), (200, 8)]
)
def test_least_energy_and_shortest_are_certified(devices, instances, how, access):
    rng = np.random.default_rng(devices)
    batch = random_batch(rng, instances, devices, **how)
    shortest = solve(batch, Shortest(), access)
    check(shortest)
    factor = rng.choice([1.02, 1.1, 1.5, 3.0, 10.0, 100.0], instances)
    check(solve(batch, LeastEnergy(0.01 + (shortest.round_s - 0.01) * factor), access))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("devices", "instances"), [(1, 60), (3, 60), (10, 60), (50, 10)])
def test_weighted_is_certified(devices, instances, how):
    rng = np.random.default_rng(devices + 1)
    batch = random_batch(rng, instances, devices, **how)
    for price in (1e-3, 1.0, 1e3):
        check(solve(batch, Weighted(price)))
        check(solve(batch, Weighted(price), "tdma"))


def test_the_round_at_the_edge_is_the_shortest():
    """Feasible, the same point; no certificate of energy is that sharp, and the status says so."""
    batch = random_batch(np.random.default_rng(5), 50, 8, zeros=True)
    shortest = solve(batch, Shortest())
    again = solve(batch, LeastEnergy(shortest.round_s))
    assert (again.status != Status.INFEASIBLE).all()
    assert again.violation.max() <= 1e-9
    np.testing.assert_allclose(again.energy_j, shortest.energy_j, rtol=1e-6)
    sharp = np.abs(again.gap) <= 1e-8
    np.testing.assert_array_equal(again.status == Status.OPTIMAL, sharp)
    assert not sharp.all()


def wild_batch(seed, instances):
    """Cells of four devices whose quantities spread over several decades."""
    rng = np.random.default_rng(seed)

    def draw(low, high, *shape):
        return 10 ** rng.uniform(low, high, (instances, *shape))

    return Batch(
        payload_bit=draw(2, 8, 4),
        work_cycles=draw(5, 12, 4),
        gain=draw(-16, -6, 4),
        power_max_w=draw(-3, 1, 4),
        frequency_min_hz=draw(6, 8, 4),
        frequency_max_hz=draw(8.1, 10, 4),
        kappa=draw(-30, -26, 4),
        bandwidth_hz=draw(3, 8),
        noise_psd_w_per_hz=4e-21,
    )


def test_a_price_that_asks_for_nearly_the_shortest_round_is_certified():
    batch = wild_batch(1, 4000)
    for price in (1e-6, 1e3, 1e6, 1e9):
        result = solve(batch, Weighted(price))
        assert (result.status != Status.OPTIMAL).sum() <= 4, price
        assert result.gap.max() <= 1e-7


def test_at_full_power_the_bound_needs_no_price_of_bandwidth():
    """The point alone tells the one that meets the price of time; nothing makes up for a bad point."""
    batch = random_batch(np.random.default_rng(15), 200, 4, floors=False)
    price = 10.0 * solve(batch, Shortest()).price_of_time_w
    point, prices = parts(batch, solve(batch, Weighted(price)))
    for factor in (0.5, 2.0):
        wrong = replace(prices, bandwidth_j_per_hz=factor * prices.bandwidth_j_per_hz)
        gap = FDMA.energy_gap(batch, point, wrong, price)
        assert np.abs(gap).max() <= 1e-8
    slow = changed(point, round_s=1.01 * point.round_s)
    assert (FDMA.energy_gap(batch, slow, prices, price) > 1e-3).all()


def test_the_search_does_not_go_in_circles():
    """Its two kinds of steps undid each other here, and it ended 4 % and 16 % above the optimum."""
    batch = wild_batch(4, 20_000).take([8191, 10859])
    round_s = solve(batch, Shortest()).round_s * [1.0 + 1e-6, 1.0 + 1e-4]
    found = least_energy(Cell(batch, slice(None)), round_s, np.zeros(2))
    sent = (found.b * np.expm1(found.z) * found.t / batch.gain.T).sum(0) * batch.noise_psd_w_per_hz
    energy = sent + (batch.kappa * batch.work_cycles * found.f.T**2).sum(1)
    np.testing.assert_allclose(energy, solve(batch, LeastEnergy(round_s)).energy_j, rtol=1e-6)


def test_full_power_is_no_excuse():
    """A point at the shortest round is not optimal for a low price of time, nor is an idle hurry."""
    batch = random_batch(np.random.default_rng(11), 60, 4, floors=False)
    point, prices = parts(batch, solve(batch, Shortest()))
    price = np.full(60, 1e-6)
    best = solve(batch, Weighted(price))
    cost = certificate.variable_energy(batch, point) + price * point.round_s
    least = certificate.variable_energy(batch, parts(batch, best)[0]) + price * best.round_s
    gap = FDMA.energy_gap(batch, point, prices, price)
    assert (gap >= (cost - least) / cost * (1 - 1e-6)).all()
    assert (gap > 0.1).any()


@pytest.mark.parametrize("access", ["fdma", "tdma"])
def test_no_bound_exceeds_the_optimum_from_any_feasible_point(access):
    """Points of other rounds, prices off by decades, both objectives."""
    rng = np.random.default_rng(12)
    batch = random_batch(rng, 150, 5, decades=4.0, zeros=True)
    shortest = solve(batch, Shortest(), access).round_s
    round_s = 2.0 * shortest
    least = certificate.variable_energy(
        batch, parts(batch, solve(batch, LeastEnergy(round_s), access))[0]
    )
    price = 10.0 ** rng.uniform(-3, 0, 150)
    weighted = solve(batch, Weighted(price), access)
    value = certificate.variable_energy(batch, parts(batch, weighted)[0]) + price * weighted.round_s
    for factor in (1.1, 1.7, 2.0):
        other = solve(batch, LeastEnergy(factor * shortest), access)
        point, prices = parts(batch, other)
        for _ in range(5):
            noise = 10.0 ** rng.uniform(-2, 2, 150)
            wrong = certificate.Multipliers(
                bandwidth_j_per_hz=noise * prices.bandwidth_j_per_hz,
                time_w=noise * prices.time_w,
            )
            bound = named(access).energy_bound(batch, point, wrong, price)
            assert (bound <= value * (1 + 1e-9)).all()
            late = changed(point, round_s=round_s)
            bound = named(access).energy_bound(batch, late, wrong, None)
            assert (bound <= least * (1 + 1e-9)).all()


def test_one_absurd_instance_spoils_no_other():
    batch = random_batch(np.random.default_rng(13), 20, 3)
    for name, value in (("gain", 1e280), ("payload_bit", 1e-300), ("work_cycles", 1e100)):
        absurd = getattr(batch, name).copy()
        absurd[7] = value
        spoilt = batch.replace(**{name: absurd})
        for access in ("fdma", "tdma"):
            for objective in (Shortest(), LeastEnergy(50.0), Weighted(0.1)):
                result = solve(spoilt, objective, access)
                good = solve(batch, objective, access)
                rest = np.arange(20) != 7
                np.testing.assert_array_equal(result.status[rest], good.status[rest])
                assert (result.status[7] != Status.INFEASIBLE) | isinstance(objective, LeastEnergy)
                fine = result.status == Status.OPTIMAL
                assert np.isfinite(result.energy_j[fine]).all()


@pytest.mark.parametrize("access", ["fdma", "tdma"])
def test_a_long_fixed_delay_does_not_make_the_shortest_round_infeasible(access):
    for delay in (1e4, 1e6):
        batch = random_batch(np.random.default_rng(14), 100, 4, delay=delay)
        again = solve(batch, LeastEnergy(solve(batch, Shortest(), access).round_s), access)
        assert (again.status != Status.INFEASIBLE).all()


def parts(batch, result):
    point = certificate.Primal(
        bandwidth_hz=result.bandwidth_hz,
        power_w=result.power_w,
        frequency_hz=result.frequency_hz,
        upload_s=result.upload_s,
        round_s=result.round_s,
    )
    prices = certificate.Multipliers(
        bandwidth_j_per_hz=result.price_of_bandwidth_j_per_hz, time_w=result.price_of_time_w
    )
    return point, prices


def changed(point, **change):
    names = ("bandwidth_hz", "power_w", "frequency_hz", "upload_s", "round_s")
    return certificate.Primal(**{**{n: getattr(point, n) for n in names}, **change})


def relative_gap(batch, point, prices, price=None, access="fdma"):
    value = certificate.variable_energy(batch, point)
    if price is not None:
        value = value + price * point.round_s
    return (value - named(access).energy_bound(batch, point, prices, price)) / value


def test_wrong_multipliers_open_the_gap():
    batch = random_batch(np.random.default_rng(6), 40, 6, decades=1.0, floors=False)
    round_s = 2 * solve(batch, Shortest()).round_s
    point, prices = parts(batch, solve(batch, LeastEnergy(round_s)))
    assert np.abs(relative_gap(batch, point, prices)).max() < 1e-9
    for factor in (0.9, 1.1):
        wrong = replace(prices, bandwidth_j_per_hz=factor * prices.bandwidth_j_per_hz)
        gap = relative_gap(batch, point, wrong)
        assert (gap > 1e-5).all()
        # ... and never below zero: the bound is valid whatever the multipliers
    tdma = solve(batch, LeastEnergy(2 * solve(batch, Shortest(), "tdma").round_s), "tdma")
    point, prices = parts(batch, tdma)
    wrong = replace(prices, time_w=1.1 * prices.time_w)
    assert (relative_gap(batch, point, wrong, access="tdma") > 1e-5).all()


def test_a_feasible_but_worse_point_opens_the_gap():
    """Move band from one device to another and pay for it in power: feasible, not optimal."""
    batch = random_batch(np.random.default_rng(7), 40, 6, decades=1.0, floors=False)
    round_s = 3 * solve(batch, Shortest()).round_s
    point, prices = parts(batch, solve(batch, LeastEnergy(round_s)))
    b = point.bandwidth_hz.copy()
    shift = 0.3 * np.minimum(b[:, 0], b[:, 1])
    b[:, 0] += shift
    b[:, 1] -= shift
    z = batch.payload_bit * np.log(2) / (b * point.upload_s)
    power = b * np.expm1(z) * batch.noise_psd_w_per_hz[:, None] / batch.gain
    moved = changed(point, bandwidth_hz=b, power_w=power)
    assert (relative_gap(batch, moved, prices) > 1e-9).all()
    slower = changed(point, frequency_hz=1.01 * point.frequency_hz)
    assert (relative_gap(batch, slower, prices) > 1e-4).any()


@pytest.mark.parametrize("name", ["bandwidth_hz", "power_w", "upload_s", "frequency_hz"])
def test_any_changed_decision_is_seen_as_a_violation(name):
    batch = random_batch(np.random.default_rng(8), 20, 5, floors=False)
    result = solve(batch, LeastEnergy(2 * solve(batch, Shortest()).round_s))
    point, _ = parts(batch, result)
    assert FDMA.violation(batch, point).max() < 1e-9
    wrong = [0.999, 1.001] if name in ("bandwidth_hz", "upload_s") else [0.999]
    for factor in wrong:
        bad = changed(point, **{name: factor * getattr(point, name)})
        assert (FDMA.violation(batch, bad) > 1e-6).all(), (name, factor)


def test_bound_of_the_shortest_round_moves_away_from_a_worse_point():
    batch = random_batch(np.random.default_rng(9), 30, 6, floors=False)
    point, _ = parts(batch, solve(batch, Shortest()))
    value = point.round_s
    bound = FDMA.shortest_bound(batch, point)
    assert np.abs(1 - bound / value).max() < 1e-9
    late = changed(point, upload_s=1.05 * point.upload_s)
    assert (FDMA.shortest_bound(batch, late) < bound * (1 - 1e-7)).any()


def test_no_bound_exceeds_any_feasible_value():
    """Weak duality with multipliers drawn at random."""
    rng = np.random.default_rng(10)
    batch = random_batch(rng, 200, 5, decades=6.0, zeros=True)
    result = solve(batch, LeastEnergy(2 * solve(batch, Shortest()).round_s))
    point, prices = parts(batch, result)
    for _ in range(20):
        noise = 10 ** rng.uniform(-2, 2, batch.instances)
        any_price = replace(prices, bandwidth_j_per_hz=noise * prices.bandwidth_j_per_hz)
        assert (relative_gap(batch, point, any_price) > -1e-9).all()


def test_statuses_say_what_to_do():
    assert [s.name for s in Status] == ["OPTIMAL", "INACCURATE", "INFEASIBLE"]
    assert all(s.sentence.endswith(".") for s in Status)
