"""Selections against full enumeration, and what must hold where enumeration is out of reach."""

from __future__ import annotations

import time
from itertools import pairwise, product

import numpy as np
import pytest
from allocation_cells import random_batch

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
from pwff_solvers.extras import selection
from pwff_solvers.extras.selection import drop_out, most_devices, serve

DEVICE = (
    "payload_bit", "work_cycles", "gain", "power_max_w", "frequency_min_hz",
    "frequency_max_hz", "kappa", "power_min_w", "fixed_energy_j",
)  # fmt: skip
CELL = ("bandwidth_hz", "noise_psd_w_per_hz", "fixed_delay_s")


def energies(batch, round_s):
    """Masks of all subsets [subset, device] and their least energies [instance, subset]."""
    masks = np.array(list(product([False, True], repeat=batch.devices)))
    found = np.zeros((batch.instances, len(masks)))
    for size in range(1, batch.devices + 1):
        # the devices left out are not there at all, rather than idle
        which = np.flatnonzero(masks.sum(1) == size)
        kept = np.array([np.flatnonzero(mask) for mask in masks[which]])
        part = Batch(
            **{name: getattr(batch, name)[:, kept].reshape(-1, size) for name in DEVICE},
            **{name: np.repeat(getattr(batch, name), len(which)) for name in CELL},
        )
        plan = solve(part, LeastEnergy(np.repeat(round_s, len(which))))
        energy = np.where(plan.status == Status.INFEASIBLE, np.inf, plan.energy_j)
        found[:, which] = energy.reshape(batch.instances, -1)
    return masks, found


def knapsack(rng, instances, devices, spread=0.5):
    """Alike devices and a scarce band: what is chosen matters, the least bandwidths decide."""

    def around():
        return np.exp(rng.uniform(-spread, spread, (instances, devices)))

    batch = Batch(
        payload_bit=2e5 * around(),
        work_cycles=1e9 * around(),
        gain=1e-11 * around(),
        power_max_w=0.05,
        frequency_min_hz=0.0,
        frequency_max_hz=2e9 * around(),
        kappa=1e-28 * around(),
        bandwidth_hz=5e4 * devices,
        noise_psd_w_per_hz=4e-21,
    )
    return batch, 0.85 * solve(batch, Shortest()).round_s


def cells(seed):
    """Batches and rounds of many kinds, with the enumeration of each."""
    rng = np.random.default_rng(seed)
    for devices, instances, how in (
        (1, 20, {}),
        (3, 30, {"zeros": True}),
        (6, 30, {"decades": 8.0, "zeros": True}),
        (8, 15, {"floors": False}),
    ):
        batch = random_batch(rng, instances, devices, **how)
        shortest = solve(batch, Shortest()).round_s - 0.01
        factor = rng.choice([0.2, 0.5, 0.9, 1.0, 1.1, 2.0, 10.0], instances)
        yield rng, batch, 0.01 + shortest * factor
    yield rng, *knapsack(rng, 25, 7)


def check_plan(batch, round_s, plan):
    """The allocation serves whom it says it serves, within every constraint."""
    good = plan.status != Status.INFEASIBLE
    only = {
        name: np.where(plan.served, getattr(batch, name), 0.0)
        for name in ("payload_bit", "work_cycles", "fixed_energy_j")
    }
    part, a = batch.replace(**only), plan.allocation
    point = certificate.Primal(
        bandwidth_hz=a.bandwidth_hz, power_w=a.power_w, frequency_hz=a.frequency_hz,
        upload_s=a.upload_s, round_s=round_s,
    )  # fmt: skip
    assert FDMA.violation(part, point)[good].max(initial=0.0) <= 1e-9
    spent = a.device_energy_j[good]
    assert (spent[~plan.served[good]] == 0).all()
    assert (a.bandwidth_hz[good][~plan.served[good]] == 0).all()
    assert np.isnan(plan.value_j[~good]).all()
    assert not plan.served[~good].any()


def check_status(status, gap):
    """Where the round is the shortest of those served no certificate is sharp, and it says so."""
    assert (np.abs(gap[status == Status.OPTIMAL]) <= 1e-8).all()
    assert (status == Status.OPTIMAL).mean() > 0.9


def check_optimum(plan, best):
    """Value, bound, gap and status against the known optimum, infinite where infeasible."""
    good = np.isfinite(best)
    np.testing.assert_array_equal(plan.status == Status.INFEASIBLE, ~good)
    check_status(plan.status[good], plan.gap[good])
    value, bound = plan.value_j[good], plan.bound_j[good]
    np.testing.assert_allclose(value, best[good], rtol=1e-8)
    # the enumerated optima come from `solve`, whose points keep every limit to 1e-9
    assert (bound <= best[good] * (1 + 1e-9)).all()
    assert (plan.gap[good] <= 1e-5).all()
    np.testing.assert_allclose(bound, value * (1 - plan.gap[good]), rtol=1e-14)


def test_most_devices_by_enumeration():
    for _, batch, round_s in cells(1):
        masks, energy = energies(batch, round_s)
        best = np.where(np.isfinite(energy), masks.sum(1), 0).max(1)
        plan = most_devices(batch, round_s)
        np.testing.assert_array_equal(plan.served.sum(1), best)
        index = plan.served @ (2 ** np.arange(batch.devices)[::-1])
        np.testing.assert_allclose(plan.value_j, energy[np.arange(len(index)), index], rtol=1e-9)
        assert (plan.bound_j <= plan.value_j).all()
        check_status(plan.status, plan.gap)
        check_plan(batch, round_s, plan)


def test_serve_by_enumeration():
    infeasible = 0
    for rng, batch, round_s in cells(2):
        masks, energy = energies(batch, round_s)
        count = rng.integers(0, batch.devices + 1, batch.instances)
        best = np.where(masks.sum(1) == count[:, None], energy, np.inf).min(1)
        plan = serve(batch, round_s, count)
        check_optimum(plan, best)
        good = np.isfinite(best)
        np.testing.assert_array_equal(plan.served[good].sum(1), count[good])
        check_plan(batch, round_s, plan)
        infeasible += (~good).sum()
    assert infeasible > 5


def test_most_devices_is_not_always_the_cheapest_of_its_size():
    """So that the search has something to find."""
    batch, round_s = knapsack(np.random.default_rng(12), 40, 8)
    greedy = most_devices(batch, round_s)
    same = serve(batch, round_s, greedy.served.sum(1))
    assert (same.value_j <= greedy.value_j * (1 + 1e-9)).all()
    assert (same.value_j < greedy.value_j * (1 - 1e-6)).sum() > 2


def test_drop_out_by_enumeration():
    some = 0
    for rng, batch, round_s in cells(3):
        masks, energy = energies(batch, round_s)
        shape = (batch.instances, batch.devices)
        for scale in (0.03, 1.0, 100.0):
            value = scale * 10 ** rng.uniform(-1, 0.5, shape)
            total = energy + (~masks * value[:, None, :]).sum(2)
            plan = drop_out(batch, round_s, value)
            check_optimum(plan, total.min(1))
            check_plan(batch, round_s, plan)
            some += (plan.served.any(1) & ~plan.served.all(1)).sum()
    assert some > 100


def test_the_dual_never_exceeds_the_optimum_and_nearly_reaches_it():
    """At every price of bandwidth, whatever is chosen; reversed choices likewise."""
    for rng, batch, round_s in cells(14):
        masks, energy = energies(batch, round_s)
        count = rng.integers(0, batch.devices + 1, batch.instances)
        value = 10 ** rng.uniform(-2, 1, (batch.instances, batch.devices))
        total = energy + (~masks * value[:, None, :]).sum(2)
        sized = np.where(masks.sum(1) == count[:, None], energy, np.inf)
        need = selection._least_bandwidth(batch, round_s)
        rows = np.arange(batch.instances)
        state = np.where(np.isfinite(need), 0, -1).astype(np.int8)
        for values, number, table in ((value, None, total), (0.0 * value, count, sized)):
            tree = selection._Tree(batch, round_s, need, values, number)
            good = np.isfinite(table.min(1))
            best, highest = table.min(1), np.full(batch.instances, -np.inf)
            for exponent in np.linspace(-8, 4, 121):
                price = best / batch.bandwidth_hz * 10**exponent
                price = np.where(good & (best > 0), price, 1.0)
                with np.errstate(all="ignore"):
                    low, chosen, reverse = tree.lower(rows, state, price)
                assert (low[good] <= (best * (1 + 1e-12))[good]).all()
                highest = np.maximum(highest, low)
                # the best selection in which device k is not as chosen costs at least as much
                for k in range(batch.devices):
                    turned = np.where(masks[:, k] != chosen[:, k, None], table, np.inf).min(1)
                    at = good & (state[:, k] == 0)
                    assert (low + reverse[:, k] <= turned * (1 + 1e-12) + 1e-12 * best)[at].all()
            gap = (1 - highest / np.where(best > 0, best, 1.0))[good & (best > 0)]
            assert np.median(gap) < 0.01


def test_hard_knapsacks_by_enumeration():
    """Values in proportion to the bandwidth needed: every selection is nearly as good."""
    rng = np.random.default_rng(13)
    batch, round_s = knapsack(rng, 40, 8)
    masks, energy = energies(batch, round_s)
    need = solve(batch, Shortest()).bandwidth_hz / batch.bandwidth_hz[:, None]
    for scale in (30.0, 1000.0):
        value = scale * need * np.exp(rng.uniform(-0.1, 0.1, (40, 8)))
        plan = drop_out(batch, round_s, value)
        check_optimum(plan, (energy + (~masks * value[:, None, :]).sum(2)).min(1))
        assert np.median(plan.nodes) > 2


def test_a_cut_search_stays_honest():
    """With one node the optimum is missed at times, and the bound says so, never too much."""
    rng = np.random.default_rng(4)
    batch, round_s = knapsack(rng, 60, 8)
    masks, energy = energies(batch, round_s)
    value = 10.0 * np.exp(rng.uniform(-0.3, 0.3, (60, 8)))
    best = (energy + (~masks * value[:, None, :]).sum(2)).min(1)
    plan = drop_out(batch, round_s, value, nodes=1)
    assert (plan.bound_j <= best * (1 + 1e-11)).all()
    assert (plan.value_j >= best * (1 - 1e-9)).all()
    opened = plan.status == Status.INACCURATE
    assert opened.any()
    np.testing.assert_array_equal(opened, plan.gap > 1e-8)
    assert (plan.nodes == 1).all()
    full = drop_out(batch, round_s, value)
    assert (full.status == Status.OPTIMAL).all()
    assert (full.bound_j >= plan.bound_j * (1 - 1e-12)).all()


def test_value_moves_the_choice_one_way():
    rng = np.random.default_rng(5)
    batch, _ = knapsack(rng, 20, 8)
    round_s = 1.3 * solve(batch, Shortest()).round_s
    factor = [0.0, 0.3, 1.0, 3.0, 1e9]
    base = solve(batch, LeastEnergy(round_s)).device_energy_j
    plans = [drop_out(batch, round_s, x * base) for x in factor]
    for low, high in pairwise(plans):
        assert (low.value_j <= high.value_j * (1 + 1e-8)).all()
    # the value given up falls as everything becomes worth more (same direction of all values)
    lost = np.array([(np.where(p.served, 0.0, base)).sum(1) for p in plans])
    assert (np.diff(lost, axis=0) <= 1e-8 * lost[0]).all()
    assert not plans[0].served.any()
    assert (plans[0].value_j == 0).all()
    assert (plans[0].gap == 0).all()
    assert plans[-1].served.all()
    np.testing.assert_allclose(plans[-1].value_j, base.sum(1), rtol=1e-9)


def test_serving_more_never_costs_less():
    batch, round_s = knapsack(np.random.default_rng(6), 8, 9)
    values = np.array([serve(batch, round_s, m).value_j for m in range(10)])
    assert (values[0] == 0).all()
    steps = np.diff(values, axis=0)
    assert (steps[~np.isnan(steps)] > 0).all()
    most = most_devices(batch, round_s).served.sum(1)
    np.testing.assert_array_equal((~np.isnan(values)).sum(0) - 1, most)


def test_permutation_of_devices():
    rng = np.random.default_rng(7)
    batch, round_s = knapsack(rng, 15, 9)
    order = rng.permutation(9)
    turned = batch.replace(**{name: getattr(batch, name)[:, order] for name in DEVICE})
    value = np.exp(rng.uniform(-1, 1, (15, 9)))
    for one, other in (
        (most_devices(batch, round_s), most_devices(turned, round_s)),
        (serve(batch, round_s, 4), serve(turned, round_s, 4)),
        (drop_out(batch, round_s, value), drop_out(turned, round_s, value[:, order])),
    ):
        np.testing.assert_array_equal(one.served[:, order], other.served)
        np.testing.assert_allclose(one.value_j, other.value_j, rtol=1e-9)


def test_instances_do_not_know_of_each_other():
    rng = np.random.default_rng(8)
    batch, round_s = knapsack(rng, 6, 8)
    value = 5.0 * np.exp(rng.uniform(-1, 1, (6, 8)))
    together = drop_out(batch, round_s, value)
    for i in range(6):
        alone = drop_out(batch.take([i]), round_s[i], value[i])
        np.testing.assert_array_equal(alone.served[0], together.served[i])
        assert alone.value_j[0] == pytest.approx(together.value_j[i], rel=1e-10)


@pytest.mark.parametrize("scale", [0.02, 100.0])
def test_fifty_devices(scale):
    rng = np.random.default_rng(9)
    batch, round_s = knapsack(rng, 4, 50, spread=0.3)
    value = scale * np.exp(rng.uniform(-1, 1, (4, 50)))
    start = time.perf_counter()
    plan = drop_out(batch, round_s, value)
    few = serve(batch, round_s, most_devices(batch, round_s).served.sum(1) - 5)
    assert time.perf_counter() - start < 60.0  # about 1 s where nobody else computes
    for found in (plan, few):
        assert (found.status == Status.OPTIMAL).all(), found.gap
        assert (found.nodes <= 2000).all()
        check_plan(batch, round_s, found)
    # exchanging any two devices finds nothing better
    for i in range(4):
        inside, outside = np.flatnonzero(few.served[i]), np.flatnonzero(~few.served[i])
        swaps = np.array(
            [
                np.where(np.isin(np.arange(50), (a, b)), ~few.served[i], few.served[i])
                for a in inside
                for b in outside
            ]
        )
        many = batch.take(np.full(len(swaps), i))
        names = ("payload_bit", "work_cycles")
        many = many.replace(**{n: np.where(swaps, getattr(many, n), 0.0) for n in names})
        energy = solve(many, LeastEnergy(round_s[i])).energy_j
        assert np.nanmin(energy, initial=np.inf) >= few.value_j[i] * (1 - 1e-9)


def test_the_shortest_round_serves_everyone():
    """The round a user got from ``Shortest`` is enough for all, rounding or not."""
    for how in ({}, {"zeros": True}, {"decades": 6.0}):
        batch = random_batch(np.random.default_rng(10), 60, 6, **how)
        round_s = solve(batch, Shortest()).round_s
        assert most_devices(batch, round_s).served.all()
        full = serve(batch, round_s, 6)
        assert (full.status != Status.INFEASIBLE).all()
        assert (serve(batch, 0.999 * round_s, 6).status == Status.INFEASIBLE).all()
        assert not most_devices(batch, 0.999 * round_s).served.all(1).any()


def test_edge_cases():
    def cell(**change):
        arguments = {
            "payload_bit": [1e5, 0.0, 1e5, 0.0], "work_cycles": [1e8, 1e8, 0.0, 2e9],
            "gain": 1e-10, "power_max_w": 0.1, "frequency_min_hz": 1e7, "frequency_max_hz": 1e9,
            "kappa": 1e-27, "bandwidth_hz": 1e6, "noise_psd_w_per_hz": 4e-21,
            "fixed_energy_j": [0.0, 0.0, 0.0, 1.0],
        }  # fmt: skip
        return Batch(**(arguments | change))

    # the last device computes for 2 s: no bandwidth helps it
    plan = most_devices(cell(), 1.0)
    assert plan.served.tolist() == [[True, True, True, False]]
    assert most_devices(cell(), 2.0).served.all()
    # hardly any bandwidth: the device that sends nothing costs none
    narrow = most_devices(cell(bandwidth_hz=1.0), 2.0)
    assert narrow.served.tolist() == [[False, True, False, True]]
    assert narrow.value_j[0] == pytest.approx(1e-27 * (1e8**3 / 4 + 2e9 * 1e18) + 1.0, rel=1e-9)
    one = serve(cell(), 1.0, 1)
    assert one.served.sum() == 1
    assert one.status[0] == Status.OPTIMAL
    nobody = serve(cell(), 1.0, 0)
    assert (nobody.value_j[0], nobody.bound_j[0], nobody.gap[0]) == (0.0, 0.0, 0.0)
    assert not nobody.served.any()
    assert nobody.status[0] == Status.OPTIMAL
    assert serve(cell(), 1.0, [4]).status[0] == Status.INFEASIBLE
    assert serve(cell(), 2.0, [4]).status[0] == Status.OPTIMAL
    # a device nobody can serve costs its value
    lost = drop_out(cell(), 1.0, 50.0)
    assert lost.served.tolist() == [[True, True, True, False]]
    assert lost.value_j[0] == pytest.approx(50.0 + plan.value_j[0], rel=1e-12)
    # nobody sends anything
    quiet = drop_out(cell(payload_bit=0.0), 2.0, [1.0, 0.0, 0.0, 1.0])
    assert quiet.served.tolist() == [[True, False, False, False]]
    assert quiet.gap[0] <= 1e-8
    # rows that cannot be met stand beside those that can
    mixed = cell(fixed_delay_s=[0.0, 0.5, 3.0])
    for found in (most_devices(mixed, 2.5), serve(mixed, 2.5, 4), drop_out(mixed, 2.5, 1e3)):
        assert found.status.tolist() == [0, 0, 2]
        assert not found.served[2].any()
        assert np.isnan(found.bound_j[2])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda b: serve(b, 1.0, 4), "devices must be at most the number of devices, 3, got 4.0"),
        (lambda b: serve(b, 1.0, [1, -1]), r"devices\[1\] must be at least 0, got -1.0"),
        (lambda b: serve(b, 1.0, 1.5), "devices must be a whole number, got 1.5"),
        (lambda b: serve(b, 1.0, [1, 1, 1]), r"devices must have shape \[2\]"),
        (lambda b: serve(b, 1.0, 1, nodes=0), "nodes must be a whole number of at least 1, got 0"),
        (lambda b: serve(b, 1.0, 1, nodes=1.5), "nodes must be a whole number of at least 1"),
        (lambda b: drop_out(b, 1.0, 1.0, nodes="a"), "nodes must be a real number, got 'a'"),
        (lambda b: serve(b, [1.0, 0.0], 1), r"round_s\[1\] must be positive, got 0.0"),
        (lambda b: most_devices(b, np.nan), "round_s must be finite, got nan"),
        (lambda b: most_devices(None, 1.0), "batch must be a Batch, got NoneType"),
        (lambda b: drop_out(b, 1.0, [0.0, -2.0, 0.0]), r"value_j\[1\] must be at least 0, got -2"),
        (lambda b: drop_out(b, 1.0, np.inf), "value_j must be finite, got inf"),
        (lambda b: drop_out(b, 1.0, [1.0, 1.0]), r"value_j must broadcast to .* = \[2, 3\]"),
    ],
)
def test_wrong_input(call, words):
    with pytest.raises(InvalidInputError, match=words):
        call(random_batch(np.random.default_rng(11), 2, 3))
