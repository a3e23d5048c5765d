"""Path loss, fading and rate against closed forms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from pwff_opt.channel import channel_gain, fading_gain, mean_gain, rate_bps
from pwff_opt.scenario import Radio, Scenario
from pwff_opt.scenario.files import read_scenario


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return read_scenario("hutto")


def test_path_loss_at_the_published_points() -> None:
    radio = Radio()
    assert -10 * np.log10(mean_gain(1000.0, radio=radio)) == pytest.approx(128.1)
    assert -10 * np.log10(mean_gain(100.0, radio=radio)) == pytest.approx(128.1 - 37.6)
    assert mean_gain(200.0, radio=radio, shadowing_db=10.0) == pytest.approx(
        mean_gain(200.0, radio=radio) / 10
    )
    assert np.isfinite(mean_gain(0.0, radio=radio))


@pytest.mark.parametrize(("fading", "k"), [("rayleigh", 0.0), ("rician", 4.0)])
def test_fading_follows_its_distribution(fading: str, k: float) -> None:
    radio = Radio(fading=fading, rician_factor=4.0)
    drawn = fading_gain(20_000, radio=radio, rng=np.random.default_rng(3))
    # 2 (K + 1) |g|^2 is noncentral chi-squared with 2 degrees of freedom and noncentrality 2 K.
    law = stats.ncx2(2, 2 * k) if k else stats.chi2(2)
    assert stats.kstest(drawn * 2 * (k + 1), law.cdf).pvalue > 0.01
    assert drawn.mean() == pytest.approx(1.0, abs=0.03)


def test_no_fading_is_constant() -> None:
    assert (fading_gain(3, radio=Radio(fading="none"), rng=np.random.default_rng(0)) == 1).all()


def test_draws_do_not_depend_on_how_many_there_are(scenario: Scenario) -> None:
    gain = channel_gain(scenario)
    assert gain.shape == (scenario.training.rounds, len(scenario.devices))
    fewer = replace(
        scenario,
        training=replace(scenario.training, rounds=2, validate_after=()),
        devices=scenario.devices[:3],
        decisions=replace(scenario.decisions, phases=1),
    )
    np.testing.assert_array_equal(channel_gain(fewer), gain[:2, :3])
    reseeded = replace(scenario, seeds=replace(scenario.seeds, channel=2))
    assert (channel_gain(reseeded) != gain).all()


def test_shadowing_is_per_device_and_fading_per_round(scenario: Scenario) -> None:
    still = replace(scenario, radio=replace(scenario.radio, fading="none"))
    gain = channel_gain(still)
    assert (gain == gain[0]).all()
    distance = np.array([device.distance_m for device in scenario.devices])
    shadowing_db = -10 * np.log10(gain[0] / mean_gain(distance, radio=scenario.radio))
    assert shadowing_db.std() > 1
    flat = replace(still, radio=replace(still.radio, shadowing_std_db=0.0))
    np.testing.assert_allclose(channel_gain(flat)[0], mean_gain(distance, radio=scenario.radio))


def test_rate_is_shannons() -> None:
    rate = rate_bps(bandwidth_hz=[1e6, 0.0], power_w=3.0, gain=1e-15, noise_psd_w_per_hz=1e-21)
    np.testing.assert_allclose(rate, [2e6, 0.0])
    # With ever more band the rate tends to p h / (N0 ln 2).
    wide = rate_bps(bandwidth_hz=1e15, power_w=3.0, gain=1e-15, noise_psd_w_per_hz=1e-21)
    assert wide == pytest.approx(3e-15 / 1e-21 / np.log(2), rel=1e-6)
