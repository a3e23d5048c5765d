"""Clipping, noise, and the epsilon they buy."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm as gaussian

from pwff_opt.errors import TrainingError
from pwff_opt.federated.exchange.privacy import add_noise, clip, spent_epsilon
from pwff_opt.federated.model.blocks import Tensors


def update(seed: int, *, size: float = 1.0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        "adapter.0.up.weight": size * torch.randn(40, 30, generator=generator),
        "adapter.0.up.bias": size * torch.randn(40, generator=generator),
    }


def flat(tensors: Tensors) -> torch.Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


@pytest.mark.parametrize("seed", range(20))
def test_clipping_bounds_the_norm_of_the_whole_and_keeps_its_direction(seed: int) -> None:
    given = update(seed)
    clipped, length = clip(given, 0.7)
    assert length == pytest.approx(float(flat(given).norm()), rel=1e-12)
    assert 0.7 * (1 - 1e-6) < float(flat(clipped).norm()) <= 0.7
    torch.testing.assert_close(flat(clipped), flat(given) * (0.7 / length), rtol=1e-6, atol=0)
    assert torch.equal(flat(given), flat(update(seed)))


def test_updates_within_the_bound_stay_as_they_are() -> None:
    given = update(0)
    exactly = float(flat(given).norm()) * (1 + 1e-12)
    for bound in (exactly, 100.0, math.inf):
        clipped, _ = clip(given, bound)
        assert all(clipped[name] is tensor for name, tensor in given.items())
    zeros = {"head.out.bias": torch.zeros(3)}
    assert clip(zeros, 1.0) == (zeros, 0.0)
    assert clip({}, 1.0) == ({}, 0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_no_factor_bounds_is_named(value: float) -> None:
    with pytest.raises(TrainingError, match=r"head\.out\.bias must be finite"):
        clip({"head.out.bias": torch.tensor([0.0, value])}, 1.0)
    with pytest.raises(TrainingError, match="clipping norm must be greater than 0, got 0"):
        clip(update(0), 0.0)


def test_noise_has_the_stated_spread_on_every_element() -> None:
    mean = {"a.0.x": torch.full((200, 300), 5.0), "b.0.x": torch.full((50_000,), -5.0)}
    noisy = add_noise(mean, noise_multiplier=1.5, clip_norm=0.2, participants=6, seed=3, round=2)
    std = 1.5 * 0.2 / 6
    for name, tensor in noisy.items():
        drawn = (tensor - mean[name]).double().flatten()
        # Five standard errors of a mean and of a standard deviation.
        assert abs(float(drawn.mean())) < 5 * std / math.sqrt(drawn.numel())
        assert abs(float(drawn.std()) / std - 1) < 5 / math.sqrt(2 * drawn.numel())
    joint = [(noisy[name] - mean[name]).flatten()[:50_000].numpy() for name in sorted(mean)]
    assert abs(np.corrcoef(joint)[0, 1]) < 5 / math.sqrt(50_000)


def test_noise_is_keyed_by_seed_and_round_and_by_nothing_else() -> None:
    def draw(mean: Tensors, seed: int, round: int) -> Tensors:
        return add_noise(
            mean, noise_multiplier=1.0, clip_norm=1.0, participants=4, seed=seed, round=round
        )

    mean = update(0)
    again = draw(dict(reversed(mean.items())), 1, 0)
    assert torch.equal(flat(draw(mean, 1, 0)), flat(again))
    for seed, round in ((2, 0), (1, 1)):
        assert not torch.isclose(flat(again), flat(draw(mean, seed, round))).any()
    assert torch.equal(flat(mean), flat(update(0)))
    silent = add_noise(mean, noise_multiplier=0.0, clip_norm=1.0, participants=4, seed=1, round=0)
    assert silent is mean


# --- what it costs ---------------------------------------------------------------------------------


def analytic(noise_multiplier: float, rounds: int, delta: float) -> float:
    """Balle and Wang (ICML 2018), theorem 8: the least epsilon of a Gaussian mechanism.

    Sensitivity 2 and standard deviation z, T times: as one of sensitivity 2 sqrt(T).
    """
    ratio = 2 * math.sqrt(rounds) / noise_multiplier

    def excess(epsilon: float) -> float:
        low = gaussian.cdf(ratio / 2 - epsilon / ratio)
        return low - math.exp(epsilon) * gaussian.cdf(-ratio / 2 - epsilon / ratio) - delta

    return float(brentq(excess, 0.0, 100.0, xtol=1e-12))


def spent(
    noise_multiplier: float,
    rounds: int = 1,
    *,
    drawn: int = 0,
    devices: int = 1000,
    delta: float = 1e-5,
) -> float:
    pytest.importorskip("dp_accounting")
    return spent_epsilon(
        noise_multiplier=noise_multiplier,
        rounds=rounds,
        devices_per_round=drawn,
        devices=devices,
        delta=delta,
    )


@pytest.mark.parametrize("noise_multiplier", [1.0, 4.0, 20.0])
@pytest.mark.parametrize("rounds", [1, 10])
@pytest.mark.parametrize("delta", [1e-5, 1e-3])
def test_epsilon_of_all_devices_is_the_closed_form(
    noise_multiplier: float, rounds: int, delta: float
) -> None:
    least = analytic(noise_multiplier, rounds, delta)
    epsilon = spent(noise_multiplier, rounds, delta=delta)
    assert least * (1 - 1e-6) <= epsilon <= least * (1 + 1e-6)
    assert epsilon == spent(noise_multiplier, rounds, drawn=1000, delta=delta)


@pytest.mark.parametrize("drawn", [0, 50, 900])
def test_epsilon_falls_with_noise_and_rises_with_rounds(drawn: int) -> None:
    by_noise = [spent(z, 10, drawn=drawn) for z in (1.0, 2.0, 4.0, 8.0)]
    assert by_noise == sorted(by_noise, reverse=True)
    assert len(set(by_noise)) == 4
    by_rounds = [spent(2.0, rounds, drawn=drawn) for rounds in (1, 5, 25, 125)]
    assert by_rounds == sorted(by_rounds)
    assert len(set(by_rounds)) == 4


def test_drawing_fewer_devices_costs_less_and_never_more_than_all() -> None:
    costs = [spent(2.0, 10, drawn=drawn) for drawn in (10, 50, 200, 999, 1000)]
    assert costs == sorted(costs)
    assert costs[0] < costs[-1] / 5


def exact_delta_of_one_draw(noise_multiplier: float, share: float, epsilon: float) -> float:
    """The delta of one round's worst pair of data sets that we know in closed form, by quadrature.

    All devices but one send 0; that one sends +C, its replacement -C (here C = 1): mixtures of
    N(0, z^2) with N(+1, z^2) and with N(-1, z^2), weighted by the share drawn.
    """
    x = np.linspace(-40 * noise_multiplier, 40 * noise_multiplier, 2_000_001)
    p, q = (
        (1 - share) * gaussian.pdf(x, 0, noise_multiplier)
        + share * gaussian.pdf(x, side, noise_multiplier)
        for side in (1, -1)
    )
    return float(np.trapezoid(np.maximum(p - math.exp(epsilon) * q, 0), x))


@pytest.mark.parametrize("noise_multiplier", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_epsilon_of_drawn_devices_covers_a_pair_that_is_really_hard(
    noise_multiplier: float, share: float
) -> None:
    """An accountant told sensitivity C instead of 2 C fails this."""
    epsilon = spent(noise_multiplier, 1, drawn=int(1000 * share))
    assert exact_delta_of_one_draw(noise_multiplier, share, epsilon) <= 1e-5


def test_the_ends_need_no_accountant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    common = {"devices_per_round": 2, "devices": 4, "delta": 1e-5}
    assert spent_epsilon(noise_multiplier=0.0, rounds=3, **common) == math.inf
    assert spent_epsilon(noise_multiplier=1.0, rounds=0, **common) == 0.0
    with pytest.raises(TrainingError, match=r"pip install 'pwff-opt\[privacy\]'"):
        spent_epsilon(noise_multiplier=1.0, rounds=1, **common)
    with pytest.raises(
        TrainingError, match=r"devices_per_round must be within 0 and devices \(1\)"
    ):
        spent_epsilon(noise_multiplier=1.0, rounds=1, devices_per_round=2, devices=1, delta=1e-5)
