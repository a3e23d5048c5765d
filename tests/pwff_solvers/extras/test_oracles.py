"""Agreement with a published case, with cvxpy and with scipy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from allocation_cells import random_batch
from scipy.optimize import minimize

from pwff_solvers.allocation import (
    Batch,
    InvalidInputError,
    LeastEnergy,
    Shortest,
    Status,
    Weighted,
    solve,
)
from pwff_solvers.extras import solve_cvxpy

FEDL = json.loads(
    (Path(__file__).parents[2] / "oracles" / "fedl_5_devices.json").read_text(encoding="utf-8")
)


def fedl_batch():
    """Nats to bit, noise over gain to gain, alpha/2 to kappa."""
    noise_w = 1e-10
    return Batch(
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


@pytest.mark.parametrize("case", FEDL["optimum"], ids=lambda c: str(c["kappa"]))
def test_fedl_published_optimum(case):
    batch = fedl_batch()
    result = solve(batch, Weighted(case["kappa"]), access="tdma")
    assert result.status[0] == Status.OPTIMAL
    send = (result.power_w * result.upload_s).sum()
    compute = (batch.kappa * batch.work_cycles * result.frequency_hz**2).sum()
    assert result.compute_s.max() == pytest.approx(case["T_cmp"], abs=1e-6)
    assert compute == pytest.approx(case["E_cmp"], abs=1e-6)
    assert result.upload_s.sum() == pytest.approx(case["T_com"], abs=1e-6)
    assert send == pytest.approx(case["E_com"], abs=1e-6)


def test_fedl_published_decision():
    result = solve(fedl_batch(), Weighted(0.1), access="tdma")
    published = FEDL["at_kappa_0.1"]
    np.testing.assert_allclose(result.frequency_hz[0] / 1e9, published["f_ghz"], atol=5.1e-5)
    np.testing.assert_allclose(result.power_w[0], published["p_w"], atol=5.1e-5)


def test_least_energy_against_cvxpy_at_our_frequencies():
    batch = random_batch(np.random.default_rng(0), 12, 5)
    shortest = solve(batch, Shortest()).round_s
    ours = solve(batch, LeastEnergy(2 * shortest))
    theirs = solve_cvxpy(batch, LeastEnergy(2 * shortest), frequency_hz=ours.frequency_hz)
    np.testing.assert_allclose(ours.energy_j, theirs.energy_j, rtol=2e-6)


@pytest.mark.parametrize("factor", [1.05, 2.0])
def test_one_frequency_against_cvxpy(factor):
    batch = random_batch(np.random.default_rng(5), 12, 5, floors=False)
    batch = batch.replace(frequency_min_hz=batch.frequency_max_hz)
    target = LeastEnergy(factor * solve(batch, Shortest()).round_s)
    theirs = solve_cvxpy(batch, target, frequency_hz=batch.frequency_max_hz)
    np.testing.assert_allclose(solve(batch, target).energy_j, theirs.energy_j, rtol=2e-6)


@pytest.mark.parametrize("name", ["least", "weighted", "shortest"])
def test_joint_problem_against_cvxpy(name):
    batch = random_batch(np.random.default_rng(1), 3, 3, decades=2.0)
    shortest = solve(batch, Shortest())
    objective = {
        "least": LeastEnergy(1.7 * shortest.round_s),
        "weighted": Weighted(0.3),
        "shortest": Shortest(),
    }[name]
    ours = solve(batch, objective)
    theirs = solve_cvxpy(batch, objective)
    if name != "shortest":
        price = 0.3 if name == "weighted" else 0.0
        np.testing.assert_allclose(
            ours.energy_j + price * ours.round_s,
            theirs.energy_j + price * theirs.round_s,
            rtol=1e-6,
        )
    np.testing.assert_allclose(
        ours.round_s, theirs.round_s, rtol=1e-6 if price_free(name) else 1e-3
    )


def price_free(name):
    return name != "weighted"  # T is only as sharp as the square root of the objective


def test_cvxpy_with_fdma_needs_work_and_payload():
    batch = random_batch(np.random.default_rng(1), 2, 3)
    idle = batch.payload_bit.copy()
    idle[1, 2] = 0.0
    message = r"^payload_bit\[1, 2\] must be positive for cvxpy with FDMA, got 0.0"
    with pytest.raises(InvalidInputError, match=message):
        solve_cvxpy(batch.replace(payload_bit=idle), Shortest())


@pytest.mark.parametrize("name", ["least", "weighted", "shortest"])
def test_tdma_against_cvxpy(name):
    batch = random_batch(np.random.default_rng(2), 4, 4, decades=2.0, zeros=True)
    shortest = solve(batch, Shortest(), "tdma")
    objective = {
        "least": LeastEnergy(1.7 * shortest.round_s),
        "weighted": Weighted(0.3),
        "shortest": Shortest(),
    }[name]
    ours, theirs = solve(batch, objective, "tdma"), solve_cvxpy(batch, objective, "tdma")
    price = 0.3 if name == "weighted" else 0.0
    if name == "shortest":
        np.testing.assert_allclose(ours.round_s, theirs.round_s, rtol=1e-6)
    else:
        np.testing.assert_allclose(
            ours.energy_j + price * ours.round_s,
            theirs.energy_j + price * theirs.round_s,
            rtol=2e-6,
        )


def ipopt(batch, round_s, price_w=0.0):
    """Least energy [J] of the first instance by IPOPT, or with a price energy + price x round [J].

    From the definition, in logarithms of b/B, t/round_s and f/F, with a price that of the round too
    (``round_s`` is its first guess); p follows from the rate.  In logarithms the constraints have
    slopes near 1: as they are IPOPT's own scaling loosens them, and it ends 1e-4 off.
    """
    casadi = pytest.importorskip("casadi")
    devices, band, delay = batch.devices, batch.bandwidth_hz[0], batch.fixed_delay_s[0]
    a, g = batch.payload_bit[0] * np.log(2), batch.gain[0] / batch.noise_psd_w_per_hz[0]
    power, kappa = batch.power_max_w[0], batch.kappa[0]
    work, f_max = batch.work_cycles[0], batch.frequency_max_hz[0]
    x = casadi.SX.sym("x", 3 * devices + 1)
    b, t = band * casadi.exp(x[:devices]), round_s * casadi.exp(x[devices : 2 * devices])
    f, whole = f_max * casadi.exp(x[2 * devices : -1]), round_s * casadi.exp(x[-1])
    p = b * (casadi.exp(a / (b * t)) - 1) / g
    value = casadi.sum1(p * t + kappa * work * f**2 + batch.fixed_energy_j[0]) + price_w * whole
    rules = casadi.log(
        casadi.vertcat(casadi.sum1(b) / band, p / power, (t + work / f + delay) / whole)
    )
    unit_j = float((kappa * work * f_max**2).sum() + price_w * round_s)
    solver = casadi.nlpsol(
        "solver", "ipopt", {"x": x, "f": value / unit_j, "g": rules},
        {"print_time": False, "ipopt": {
            "print_level": 0, "sb": "yes", "tol": 1e-12, "nlp_scaling_method": "none"}},
    )  # fmt: skip
    slow = np.log(np.maximum(batch.frequency_min_hz[0] / f_max, 1e-9))
    stretch = [20.0 if price_w else 0.0]
    low = np.concatenate([np.full(2 * devices, -30.0), slow, np.negative(stretch)])
    high = np.concatenate([np.zeros(devices), np.full(devices, 20.0), np.zeros(devices), stretch])
    half = np.log(0.5 * (round_s - delay - work / f_max) / round_s)
    start = np.concatenate([np.full(devices, -np.log(devices)), half, np.zeros(devices + 1)])
    found = solver(x0=start, lbx=low, ubx=high, lbg=-np.inf, ubg=0.0)
    assert solver.stats()["success"], solver.stats()["return_status"]
    return float(found["f"]) * unit_j


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 5, 7, 10, 13, 17, 20])
def test_against_ipopt(devices):
    rng = np.random.default_rng(devices)
    batch = random_batch(rng, 1, devices)
    round_s = rng.uniform(1.2, 5.0) * solve(batch, Shortest()).round_s[0]
    ours = solve(batch, LeastEnergy(round_s))
    assert ipopt(batch, round_s) == pytest.approx(ours.energy_j[0], rel=1e-7)
    price = 3.0 * max(ours.price_of_time_w[0], 1e-3)
    ours = solve(batch, Weighted(price))
    value = ours.energy_j[0] + price * ours.round_s[0]
    assert ipopt(batch, round_s, price) == pytest.approx(value, rel=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_least_energy_against_slsqp(seed):
    """Natural variables b and t, straight from the definition of the problem."""
    batch = random_batch(np.random.default_rng(20 + seed), 1, 3, decades=1.0, floors=False)
    shortest = solve(batch, Shortest()).round_s
    ours = solve(batch, LeastEnergy(2 * shortest))
    a, g = batch.payload_bit[0] * np.log(2), batch.gain[0] / batch.noise_psd_w_per_hz[0]
    band, time = batch.bandwidth_hz[0], 2 * shortest[0] - batch.fixed_delay_s[0]
    work, kappa, devices = batch.work_cycles[0], batch.kappa[0], batch.devices

    def energy(x):
        b, t = x[:devices] * band, x[devices:] * time
        send = b * t * np.expm1(a / (b * t)) / g
        return (send + kappa * work**3 / (time - t) ** 2).sum() / ours.energy_j[0]

    def room(x):
        b, t = x[:devices] * band, x[devices:] * time
        power = b * np.expm1(a / (b * t)) / g / batch.power_max_w[0]
        speed = work / (time - t) / batch.frequency_max_hz[0]
        return np.concatenate([1 - power, 1 - speed, [1 - x[:devices].sum()]])

    edge = solve(batch, LeastEnergy(1.3 * shortest))
    start = np.concatenate([edge.bandwidth_hz[0] / band, edge.upload_s[0] / time])
    found = minimize(
        energy,
        start,
        method="SLSQP",
        bounds=[(1e-6, 1 - 1e-9)] * (2 * devices),
        constraints={"type": "ineq", "fun": room},
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    fixed = batch.fixed_energy_j.sum() / ours.energy_j[0]
    assert found.fun + fixed == pytest.approx(1.0, abs=2e-6)
