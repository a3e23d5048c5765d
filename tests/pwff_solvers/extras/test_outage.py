"""Outage probability, and the least energy under a limit on it."""

from __future__ import annotations

import re

import cvxpy as cp
import numpy as np
import pytest
from allocation_cells import random_arguments, random_batch

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
from pwff_solvers.extras import (
    outage_bound,
    outage_probability,
    round_to_blocks,
    serve,
    solve_outage,
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
HOW = [{"floors": False}, {}, {"decades": 10.0, "zeros": True}]


def cells(seed, instances, devices, factor, q_factor, **how):
    """Random cells, rounds of some shortest rounds, and limits at some multiple of the outage."""
    rng = np.random.default_rng(seed)
    batch = random_batch(rng, instances, devices, **how)
    base = solve(batch, Shortest()).round_s
    free = solve(batch, LeastEnergy(0.01 + (base - 0.01) * factor))
    q = outage_probability(batch, free) * rng.choice(q_factor, (instances, devices))
    q_max = np.clip(q, 1e-9, 0.999)
    shortest = solve_outage(batch, 0.011, q_max).shortest_round_s
    shortest = np.where(np.isnan(shortest), 0.011, shortest)  # nothing to do
    return batch, 0.01 + (shortest - 0.01) * factor, q_max


def primal(result, **change):
    names = ("bandwidth_hz", "power_w", "frequency_hz", "upload_s", "round_s")
    return certificate.Primal(**{**{name: getattr(result, name) for name in names}, **change})


def check(batch, result, q_max):
    good = result.status == Status.OPTIMAL
    assert good.all(), (result.gap[~good], result.violation[~good])
    assert np.abs(result.gap).max() <= 1e-8
    assert result.violation.max() <= 1e-9
    assert FDMA.violation(batch, primal(result)).max() <= 1e-9
    assert (outage_probability(batch, result) <= q_max * (1 + 1e-9)).all()


def dgp_energy(one, round_s, q_max, m=1.08):
    """Least energy by cvxpy in log variables: the limit is the monomial b t <= a / z_min."""
    a = one.payload_bit[0] * np.log(2.0)
    g = one.gain[0] / one.noise_psd_w_per_hz[0]
    band, unit = float(one.bandwidth_hz[0]), float(round_s - one.fixed_delay_s[0])
    z_min = np.log1p(m / -np.log1p(-q_max))
    work, f_max = one.work_cycles[0], one.frequency_max_hz[0]
    x, w = np.polynomial.legendre.leggauss(16)
    b, t, f = (cp.Variable(one.devices, pos=True) for _ in range(3))
    limits, energy = [cp.sum(b) <= 1, f <= 1], []
    for k in range(one.devices):
        z = float(a[k] / (band * unit)) * b[k] ** -1 * t[k] ** -1
        nodes = [float(v / 2) * cp.exp(float((u + 1) / 2) * z) for u, v in zip(x, w, strict=True)]
        send = float(a[k] / g[k]) * cp.sum(cp.hstack(nodes))
        energy += [send, float(one.kappa[0, k] * work[k] * f_max[k] ** 2) * f[k] ** 2]
        limits += [
            send * t[k] ** -1 * float(1 / (unit * one.power_max_w[0, k])) <= 1,
            t[k] + float(work[k] / (f_max[k] * unit)) * f[k] ** -1 <= 1,
            b[k] * t[k] * float(band * unit * z_min[k] / a[k]) <= 1,
            f[k] >= max(float(one.frequency_min_hz[0, k] / f_max[k]), 1e-6),
        ]
    problem = cp.Problem(cp.Minimize(cp.sum(cp.hstack(energy))), limits)
    problem.solve(solver=cp.CLARABEL, gp=True, tol_gap_abs=1e-10, tol_gap_rel=1e-10)
    assert problem.status in ("optimal", "optimal_inaccurate")
    return float(problem.value) + one.fixed_energy_j.sum()


@pytest.mark.filterwarnings("ignore::UserWarning")  # what cvxpy thinks of its own accuracy
@pytest.mark.parametrize("factor", [1.3, 3.0])
def test_agrees_with_a_geometric_program(factor):
    batch, round_s, q_max = cells(1, 5, 3, factor, [0.5, 1e9], decades=2.0)
    result = solve_outage(batch, round_s, q_max)
    check(batch, result, q_max)
    q = outage_probability(batch, result)
    bound = q > q_max * (1 - 1e-9)
    assert bound.any()
    assert (~bound).any()
    assert (result.price_of_bandwidth_j_per_hz > 0).any()
    for i in range(batch.instances):
        energy = dgp_energy(batch.take([i]), round_s[i], q_max[i])
        # sending takes some 1 % of the energy: 1e-6 of that
        np.testing.assert_allclose(result.energy_j[i], energy, rtol=1e-8)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("devices", "instances"), [(1, 60), (3, 100), (10, 60), (40, 6)])
def test_is_certified(devices, instances, how):
    rng = np.random.default_rng(devices)
    factor = rng.choice([1.001, 1.02, 1.5, 3.0, 30.0, 1000.0], instances)
    batch, round_s, q_max = cells(devices, instances, devices, factor, [0.1, 0.8, 2.0, 1e9], **how)
    check(batch, solve_outage(batch, round_s, q_max), q_max)


@pytest.mark.parametrize("how", HOW)
def test_loose_limits_change_nothing(how):
    batch = random_batch(np.random.default_rng(2), 60, 6, **how)
    round_s = 1.3 * solve(batch, Shortest()).round_s
    free = solve(batch, LeastEnergy(round_s))
    q = outage_probability(batch, free)
    loose = (q < 0.99).all(1)
    assert loose.sum() > 10
    batch, round_s = batch.take(loose), round_s[loose]
    same = solve_outage(batch, round_s, 0.999999)
    free = solve(batch, LeastEnergy(round_s))
    np.testing.assert_allclose(same.energy_j, free.energy_j, rtol=1e-9)
    np.testing.assert_allclose(same.bandwidth_hz, free.bandwidth_hz, rtol=1e-5)
    for name in ("price_of_bandwidth_j_per_hz", "price_of_time_w"):
        np.testing.assert_allclose(getattr(same, name), getattr(free, name), rtol=1e-6)


def test_a_tighter_limit_costs_more():
    batch, round_s, q_max = cells(3, 40, 5, 1.5, [0.3])
    steps = [solve_outage(batch, round_s, np.minimum(c * q_max, 0.999)) for c in (1, 1.3, 2, 4, 16)]
    energy = np.array([s.energy_j for s in steps])
    assert (np.diff(energy, axis=0) <= 1e-9 * energy[1:]).all()
    assert (energy[0] > energy[-1] * (1 + 1e-6)).mean() > 0.7


def test_bandwidth_without_use_has_no_price():
    batch, round_s, q_max = cells(4, 60, 4, 3.0, [0.02])
    result = solve_outage(batch, round_s, q_max)
    check(batch, result, q_max)
    spare = result.bandwidth_hz.sum(1) < batch.bandwidth_hz * (1 - 1e-9)
    assert spare.sum() > 10
    assert (~spare).sum() > 0
    assert (result.price_of_bandwidth_j_per_hz[spare] == 0).all()
    assert (result.price_of_bandwidth_j_per_hz[~spare] > 0).all()
    # every device sits at its limit then, and one without a floor sends at full power
    np.testing.assert_allclose(outage_probability(batch, result)[spare], q_max[spare], rtol=1e-9)
    free = spare[:, None] & (batch.frequency_min_hz == 0)
    np.testing.assert_allclose(result.power_w[free], batch.power_max_w[free], rtol=1e-9)


@pytest.mark.parametrize("strict", [0.05, 0.8])
def test_prices_are_derivatives(strict):
    rng = np.random.default_rng(5)
    given = random_arguments(rng, 30, 4, decades=2.0)
    batch, round_s, q_max = cells(5, 30, 4, 1.7, [strict, 2.0], decades=2.0)
    np.testing.assert_array_equal(batch.gain, given["gain"])
    base = solve_outage(batch, round_s, q_max)
    step = 1e-5
    longer, shorter = (
        solve_outage(batch, round_s + s * (round_s - 0.01), q_max).energy_j for s in (step, -step)
    )
    slope = (shorter - longer) / (2 * step * (round_s - 0.01))
    scale = base.energy_j / round_s
    # a bend within the step shows as a small difference; medians would hide a wrong formula
    close = np.abs(slope - base.price_of_time_w) < 1e-3 * base.price_of_time_w + 1e-5 * scale
    assert close.mean() > 0.9
    narrow, wide = (
        solve_outage(
            Batch(**{**given, "bandwidth_hz": s * given["bandwidth_hz"]}), round_s, q_max
        ).energy_j
        for s in (1 - step, 1 + step)
    )
    worth = (narrow - wide) / (2 * step)
    price = base.price_of_bandwidth_j_per_hz * batch.bandwidth_hz
    assert (np.abs(worth - price) < 1e-3 * price + 1e-5 * base.energy_j).mean() > 0.9


def test_wrong_multipliers_open_the_gap_and_no_bound_exceeds_the_optimum():
    batch, round_s, q_max = cells(6, 60, 5, 1.5, [0.5, 0.9, 3.0], decades=1.0, floors=False)
    result = solve_outage(batch, round_s, q_max)
    point, lam = primal(result), result.price_of_bandwidth_j_per_hz
    value = certificate.variable_energy(batch, point)

    def gap(price, at=point):
        return (value - outage_bound(batch, at, price, q_max)) / value

    assert np.abs(gap(lam)).max() < 1e-9
    priced = lam > 0
    assert priced.sum() > 10
    for factor in (0.9, 1.1):
        wrong = gap(factor * lam)[priced]
        assert (wrong > gap(lam)[priced]).all()
        # where energy for sending is a small part of the whole, so is what its price can spoil
        assert (wrong > 1e-6).mean() > 0.7
    assert (gap(lam + 1e-3 * value / batch.bandwidth_hz)[~priced] > 1e-6).all()
    rng = np.random.default_rng(7)
    for _ in range(30):
        noise = 10 ** rng.uniform(-2, 2, batch.instances)
        assert (gap(noise * lam) > -1e-9).all()
        # the tangent at any other point of the box bounds the optimum too
        other = primal(
            result,
            bandwidth_hz=result.bandwidth_hz * rng.uniform(0.3, 1.0, q_max.shape),
            frequency_hz=result.frequency_hz * rng.uniform(0.3, 1.0, q_max.shape),
        )
        assert (gap(lam, other) > -1e-9).all()
    # the bound knows the outage limits: it lies above the energy that ignores them
    free = solve(batch, LeastEnergy(round_s)).energy_j - batch.fixed_energy_j.sum(1)
    assert (value * (1 - gap(lam)) > free * (1 + 1e-5)).mean() > 0.9


def test_no_feasible_perturbation_is_better():
    batch, round_s, q_max = cells(8, 30, 4, 2.0, [0.3, 0.9, 3.0], decades=1.0)
    result = solve_outage(batch, round_s, q_max)
    a = batch.payload_bit * np.log(2.0)
    g = batch.gain / batch.noise_psd_w_per_hz[:, None]
    limit = a / np.log1p(1.08 / -np.log1p(-q_max))
    time = (round_s - batch.fixed_delay_s)[:, None]
    rng = np.random.default_rng(9)
    tried = 0
    for size in 10 ** rng.uniform(-4, -0.3, 400):
        t = result.upload_s * np.exp(size * rng.standard_normal(a.shape))
        b = result.bandwidth_hz * np.exp(size * rng.standard_normal(a.shape))
        t = np.minimum(t, time - batch.work_cycles / batch.frequency_max_hz)
        b = np.minimum(b, limit / t)
        b *= np.minimum(batch.bandwidth_hz / b.sum(1), 1.0)[:, None]
        power = b * np.expm1(a / (b * t)) / g
        f = np.maximum(batch.work_cycles / (time - t), batch.frequency_min_hz)
        ok = (power <= batch.power_max_w).all(1) & (f <= batch.frequency_max_hz * (1 + 1e-12)).all(
            1
        )
        energy = power * t + batch.kappa * batch.work_cycles * f**2 + batch.fixed_energy_j
        tried += ok.sum()
        assert (energy.sum(1) >= result.energy_j * (1 - 1e-12))[ok].all()
    assert tried > 500


def test_infeasible_inside_a_batch():
    batch, shortest, q_max = cells(10, 60, 4, 1.0, [1e-4, 0.5, 1.0, 1e9], zeros=True)
    factor = np.where(np.arange(60) % 3 == 0, 0.999, 1.001)
    result = solve_outage(batch, shortest * factor, q_max)
    bad = factor < 1
    assert (result.status[bad] == Status.INFEASIBLE).all()
    check(batch.take(~bad), solve_outage(batch.take(~bad), (shortest * factor)[~bad], q_max[~bad]),
          q_max[~bad])  # fmt: skip
    np.testing.assert_allclose(result.shortest_round_s[bad], shortest[bad], rtol=1e-12)
    assert (np.abs(result.gap[bad]) < 1e-8).all()
    for name in ("bandwidth_hz", "power_w", "energy_j", "price_of_time_w", "violation"):
        assert np.isnan(getattr(result, name)[bad]).all()
        assert not np.isnan(getattr(result, name)[~bad]).any()
    assert (result.binding_device[~bad] == -1).all()
    assert np.isnan(outage_probability(batch, result)[bad]).any(1).all()
    # a limit on outage lengthens some rounds and leaves others as they were
    longer = shortest > solve(batch, Shortest()).round_s * (1 + 1e-9)
    assert longer[bad].any()
    assert not longer[bad].all()
    # relieving the limit of the binding device shortens those rounds, and no other device's does
    for i in np.flatnonzero(bad & longer):
        one = batch.take([i])
        for k in range(4):
            relief = q_max[i].copy()
            relief[k] = 0.999
            again = solve_outage(one, 0.011, relief).shortest_round_s[0]
            assert (again < shortest[i] * (1 - 1e-9)) == (k == result.binding_device[i])
    for i in np.flatnonzero(bad & ~longer):
        base = solve(batch.take([i]), LeastEnergy(0.9 * shortest[i])).binding_device[0]
        assert result.binding_device[i] == base
    assert (solve_outage(batch, 0.005, q_max).status == Status.INFEASIBLE).all()


def test_at_the_shortest_round_power_and_frequency_are_at_their_limits():
    batch = Batch(**GOOD)
    q_max = [[1e-5, 0.5]]
    shortest = solve_outage(batch, 0.1, q_max).shortest_round_s
    result = solve_outage(batch, shortest, q_max)
    check(batch, result, np.array(q_max))
    np.testing.assert_allclose(result.power_w[0, 0], 0.1, rtol=1e-9)
    np.testing.assert_allclose(result.frequency_hz[0, 0], 2e9, rtol=1e-9)
    assert result.frequency_hz[0, 1] < 1.9e9
    z_min = np.log1p(1.08 / -np.log1p(-1e-5))
    send = 1e5 * np.log(2) * 4e-21 / 1e-10 * np.expm1(z_min) / z_min / 0.1
    np.testing.assert_allclose(shortest, send + 0.5, rtol=1e-12)


def test_devices_without_payload_or_work():
    given = {**GOOD, "payload_bit": [[1e5, 0.0, 2e5, 0.0]], "work_cycles": [[1e9, 1e9, 0.0, 0.0]],
             "gain": 1e-10, "frequency_min_hz": [0.0, 0.0, 1e8, 1e8]}  # fmt: skip
    batch = Batch(**given)
    result = solve_outage(batch, 2.0, 0.01)
    check(batch, result, 0.01)
    q = outage_probability(batch, result)[0]
    np.testing.assert_array_equal(q[[1, 3]], 0.0)
    assert (q[[0, 2]] > 1e-6).all()
    for name in ("bandwidth_hz", "power_w", "upload_s"):
        np.testing.assert_array_equal(getattr(result, name)[0, [1, 3]], 0.0)
    np.testing.assert_allclose(result.frequency_hz[0, 1:], [5e8, 1e8, 1e8])
    np.testing.assert_array_equal(result.compute_s[0, 2:], 0.0)
    np.testing.assert_allclose(result.upload_s[0, 2], 2.0)  # the whole round
    idle = solve_outage(Batch(**{**given, "payload_bit": 0.0}), 2.0, 0.01)
    assert idle.status[0] == Status.OPTIMAL
    np.testing.assert_allclose(idle.energy_j[0], 2 * 1e-28 * 1e9 * 5e8**2)
    late = solve_outage(Batch(**{**given, "payload_bit": 0.0}), 0.4, 0.01)
    assert late.status[0] == Status.INFEASIBLE
    np.testing.assert_allclose(late.shortest_round_s, 0.5)
    nothing = Batch(**{**GOOD, "payload_bit": 0.0, "work_cycles": 0.0, "fixed_delay_s": 1.0})
    assert solve_outage(nothing, [1.0], 0.5).status.tolist() == [Status.OPTIMAL]
    assert solve_outage(nothing, [0.9], 0.5).shortest_round_s.tolist() == [1.0]
    empty = Batch(**{**GOOD, "payload_bit": np.zeros((0, 2)), "gain": 1e-10})
    assert solve_outage(empty, 1.0, 0.5).energy_j.shape == (0,)


def test_order_of_devices_and_instances_does_not_matter():
    given = random_arguments(np.random.default_rng(11), 12, 5, zeros=True)
    batch, round_s, q_max = cells(11, 12, 5, 1.4, [0.3, 3.0], zeros=True)
    base = solve_outage(batch, round_s, q_max)
    order, rows = np.array([3, 0, 4, 1, 2]), np.arange(12)[::-1]
    moved = Batch(
        **{k: v[:, order] if getattr(v, "ndim", 0) == 2 else v for k, v in given.items()}
    ).take(rows)
    again = solve_outage(moved, round_s[rows], q_max[rows][:, order])
    for name in ("bandwidth_hz", "frequency_hz", "device_energy_j"):
        np.testing.assert_allclose(
            getattr(again, name), getattr(base, name)[rows][:, order], rtol=1e-6
        )
    np.testing.assert_allclose(again.energy_j, base.energy_j[rows], rtol=1e-11)


def test_adding_constants_only_shifts():
    base = solve_outage(Batch(**GOOD), 5.0, 0.01)
    moved = solve_outage(Batch(**GOOD, fixed_delay_s=1.0, fixed_energy_j=2.0), 6.0, 0.01)
    np.testing.assert_allclose(moved.energy_j, base.energy_j + 4.0, rtol=1e-12)
    np.testing.assert_allclose(moved.bandwidth_hz, base.bandwidth_hz, rtol=1e-9)


@pytest.mark.parametrize("access", ["fdma", "tdma"])
def test_outage_probability_is_the_formula(access):
    batch = random_batch(np.random.default_rng(12), 20, 5, zeros=True)
    result = solve(batch, LeastEnergy(2.0 * solve(batch, Shortest(), access).round_s), access)
    q = outage_probability(batch, result, waterfall=2.0, interference_w=1e-15)
    for i, k in np.ndindex(q.shape):
        if batch.payload_bit[i, k] == 0:
            assert q[i, k] == 0
            continue
        noise = 1e-15 + batch.noise_psd_w_per_hz[i] * result.bandwidth_hz[i, k]
        ratio = 2.0 * noise / (result.power_w[i, k] * batch.gain[i, k])
        assert q[i, k] == pytest.approx(-np.expm1(-ratio), rel=1e-12)
    assert (q >= outage_probability(batch, result, waterfall=2.0)).all()
    # tiny probabilities keep their digits, where 1 - exp would round to zero
    strong = Batch(**{**GOOD, "gain": 1e6})
    tiny = outage_probability(strong, solve(strong, Shortest()))
    assert (tiny > 0).all()
    assert tiny.max() < 1e-16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outage_max": [[0.5, 1.0]]}, "outage_max[0, 1] must be above 0 and below 1, got 1.0"),
        ({"outage_max": 0.0}, "outage_max must be above 0 and below 1, got 0.0"),
        ({"outage_max": [np.nan, 0.5]}, "outage_max[0] must be finite, got nan"),
        (
            {"outage_max": [0.5] * 3},
            "outage_max must broadcast to [instance, device] = [1, 2], got shape [3]",
        ),
        ({"outage_max": "rare"}, "outage_max must be an array of real numbers, got 'rare'"),
        ({"round_s": -1.0}, "round_s must be positive, got -1.0"),
        ({"round_s": [1.0, 2.0]}, "round_s must have shape [1] or be a scalar, got shape [2]"),
        ({"waterfall": 0.0}, "waterfall must be positive, got 0.0"),
        (
            {"batch": Batch(**GOOD, power_min_w=[0.0, 0.01])},
            "power_min_w[0, 1] must be 0 with FDMA",
        ),
        ({"batch": None}, "batch must be a Batch, got NoneType"),
    ],
)
def test_bad_input(change, message):
    given = {"batch": Batch(**GOOD), "round_s": 2.0, "outage_max": 0.1, "waterfall": 1.08}
    with pytest.raises(InvalidInputError, match="^" + re.escape(message)):
        solve_outage(**{**given, **change})


def test_bad_input_of_the_outage_probability():
    batch = Batch(**GOOD)
    result = solve(batch, Shortest())
    with pytest.raises(InvalidInputError, match=r"interference_w\[1\] must be at least 0, got -1"):
        outage_probability(batch, result, interference_w=[0.0, -1.0])
    with pytest.raises(InvalidInputError, match="waterfall must be positive, got 0"):
        outage_probability(batch, result, waterfall=0.0)
    other = Batch(**{**GOOD, "bandwidth_hz": [1e6, 2e6]})
    with pytest.raises(InvalidInputError, match=r"allocation must have shape \[2, 2\] like the "):
        outage_probability(other, result)
    with pytest.raises(InvalidInputError, match=r"^allocation must be .*, got Selection$"):
        outage_probability(batch, serve(batch, 3.0, 1))
    blocks = round_to_blocks(batch, 3.0, 10)
    assert (outage_probability(batch, blocks) > 0).all()
