"""Scenario files: everything wrong is said at once, with path, rule and value."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from pwff_opt.errors import ScenarioError
from pwff_opt.scenario import Cell, Device, Scenario
from pwff_opt.scenario.files import (
    built_in_names,
    from_resolved,
    parse_scenario,
    read_scenario,
    resolved,
    scenario_text,
)

GOOD = """
[cell]
bandwidth_hz = 1e6
downlink_bandwidth_hz = 1e6
downlink_power_w = 1
[devices]
count = 3
distance_m = 100
power_max_w = 0.1
frequency_max_hz = 1e9
"""


def problems_of(text: str) -> tuple[str, ...]:
    with pytest.raises(ScenarioError) as caught:
        parse_scenario(text)
    return caught.value.problems


@pytest.mark.parametrize("name", built_in_names())
def test_built_in_scenarios_are_good_and_survive_json(name: str) -> None:
    scenario = read_scenario(name)
    assert from_resolved(resolved(scenario)) == scenario


def test_examples_in_comments_of_the_template_are_good() -> None:
    text, _ = scenario_text("hutto")
    used = parse_scenario(re.sub(r"^# (\[|\w+ = )", r"\1", text, flags=re.MULTILINE))
    assert used.thresholds.delay_max_s == 120.0
    assert used.devices[0].distance_m == 120.0


def test_every_problem_is_reported_at_once() -> None:
    text = """
nme = "x"
[cell]
bandwidth_hz = -1
downlink_bandwith_hz = 3
downlink_power_w = 1
access = "cdma"
noise_psd_w_per_hz = nan
[devices]
count = 3
distance_m = { disk = [1, 2] }
power_max_w = 0
frequency_max_hz = { uniform = [3e9, 1e9] }
kapa = 3
[data]
source = "file"
train_per_device = 1.5
[training]
local_steps = true
[decisions]
ranks = [1, 1, -2]
[thresholds]
accuracy_min = 1.2
"""
    problems = problems_of(text)
    for start in (
        "nme is not a known key; did you mean 'name'?",
        "cell.downlink_bandwith_hz is not a known key; did you mean 'downlink_bandwidth_hz'?",
        "cell.downlink_bandwidth_hz is required, and missing",
        "cell.bandwidth_hz must be greater than 0, got -1.0",
        "cell.noise_psd_w_per_hz must be finite, got nan",
        "cell.access must be one of 'fdma', 'tdma', got 'cdma'",
        "devices.distance_m must be a value or one distribution",
        "devices.power_max_w must be greater than 0, got 0.0",
        "devices.frequency_max_hz.uniform must be [low, high] with low <= high",
        "devices.kapa is not a known key; did you mean 'kappa'?",
        "data.train_per_device must be a whole number, got 1.5",
        "data.path must name the data",
        "training.local_steps must be a whole number, got True",
        "decisions.ranks[2] must be at least 0, got -2",
        "decisions.ranks must hold at least one value and none twice",
        "thresholds.accuracy_min must be at most 1, got 1.2",
    ):
        assert sum(line.startswith(start) for line in problems) == 1, (start, problems)
    assert len(problems) == len(set(problems))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("frequency_min_hz = 2e9", "devices[0].frequency_min_hz must not exceed frequency_max_hz"),
        ("frequency_max_hz = inf", "devices.frequency_max_hz must be finite, got inf"),
        ("count = 0", "devices.count must be a whole number of at least 1"),
        ("kappa = '1'", "devices.kappa must be a number, got '1'"),
        ("kappa = { choice = [1e-28, -1.0] }", "devices.kappa.choice[1] must be greater than 0"),
        ("kappa = { log_uniform = [1e-28] }", "devices.kappa.log_uniform must be [low, high]"),
    ],
)
def test_devices_are_checked(change: str, problem: str) -> None:
    key = change.split(" ")[0]
    kept = [line for line in GOOD.splitlines() if not line.startswith(f"{key} =")]
    found = problems_of("\n".join([*kept, change]))
    assert any(line.startswith(problem) for line in found), found


@pytest.mark.parametrize(
    "text", ["[cell", "folder = '/'", "devices = 3", "device = [1]", "cell = 1"]
)
def test_broken_documents_are_errors_not_crashes(text: str) -> None:
    assert problems_of(text)


def test_devices_one_by_one_replace_what_was_drawn() -> None:
    text = GOOD + "[[device]]\npower_max_w = 0.5\n[[device]]\n"
    devices = parse_scenario(text).devices
    assert [device.power_max_w for device in devices] == [0.5, 0.1, 0.1]
    only = GOOD.split("[devices]")[0] + (
        "[[device]]\ndistance_m = 5\npower_max_w = 1\nfrequency_max_hz = 1e9\n"
    )
    assert len(parse_scenario(only).devices) == 1


def test_draws_of_a_device_do_not_depend_on_the_others() -> None:
    few = GOOD.replace("distance_m = 100", "distance_m = { disc = [50, 400] }")
    many = few.replace("count = 3", "count = 400")
    assert parse_scenario(many).devices[:3] == parse_scenario(few).devices
    distances = [device.distance_m for device in parse_scenario(many).devices]
    assert min(distances) >= 50
    assert max(distances) <= 400
    # Even over the area: the mean square is the middle of the squared range.
    mean_square = sum(d**2 for d in distances) / len(distances)
    assert mean_square == pytest.approx((50**2 + 400**2) / 2, rel=0.1)
    other = "[seeds]\ndevices = 2\n" + few
    assert parse_scenario(other).devices != parse_scenario(few).devices


@pytest.mark.parametrize("number", ["9" * 400, "1e999", "-" + "9" * 400])
@pytest.mark.parametrize("key", ["cell.bandwidth_hz", "training.rounds", "seeds.devices"])
def test_absurd_numbers_are_errors_not_crashes(key: str, number: str) -> None:
    table, name = key.split(".")
    text = GOOD.replace("bandwidth_hz = 1e6\n", "", 1) if table == "cell" else GOOD
    text = (
        text.replace("[cell]", f"[cell]\n{name} = {number}")
        if table == "cell"
        else (f"{text}\n[{table}]\n{name} = {number}")
    )
    assert any(line.startswith(key) for line in problems_of(text))


def test_python_scenarios_obey_the_same_rules() -> None:
    cell = Cell(bandwidth_hz=1e6, downlink_bandwidth_hz=1e6, downlink_power_w=1.0)
    device = Device(distance_m=10.0, power_max_w=0.1, frequency_max_hz=1e9)
    scenario = Scenario(cell=cell, devices=(device,))
    with pytest.raises(ScenarioError, match=r"devices\[0\].kappa must be finite, got nan"):
        replace(scenario, devices=(replace(device, kappa=math.nan),))
    with pytest.raises(ScenarioError, match="devices must hold at least one device"):
        replace(scenario, devices=())
    for marks in ((1, 2), (2, 1, 4), (1, 1, 4)):
        with pytest.raises(ScenarioError, match="validate_after must ascend and end with"):
            replace(scenario, training=replace(scenario.training, validate_after=marks))
    with pytest.raises(ScenarioError, match="phases must not exceed"):
        replace(scenario, decisions=replace(scenario.decisions, phases=9))


def test_unknown_scenario_names_the_built_in_ones(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="hutto"):
        read_scenario(tmp_path / "none.toml")


@pytest.mark.parametrize("key", ["server_momentum", "server_second_momentum"])
def test_a_server_that_never_forgets_is_refused(key: str) -> None:
    """At 1 FedAdam never takes in an update, and FedAvgM never lets go of one."""
    assert (
        getattr(parse_scenario(f"{GOOD}[aggregation]\n{key} = 0.999\n").aggregation, key) == 0.999
    )
    assert f"aggregation.{key} must be less than 1, got 1.0" in problems_of(
        f"{GOOD}[aggregation]\n{key} = 1.0\n"
    )


def test_noise_needs_factors_of_one_rank_only_where_they_are_sent() -> None:
    noisy = f"{GOOD}[aggregation]\nclip_norm = 1.0\nnoise_multiplier = 1.0\nlora = 'RULE'\n"
    mixed = f"{noisy}[decisions]\nrank_scope = 'per_device'\n"
    parse_scenario(mixed.replace("RULE", "personal"))
    for rule in ("fedit", "ffa", "fedsa", "rolora"):
        parse_scenario(noisy.replace("RULE", rule))
        problem = f"decisions.rank_scope must be 'common' for aggregation.lora {rule!r}"
        assert any(line.startswith(problem) for line in problems_of(mixed.replace("RULE", rule)))


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "{ disc = [50, 300] }",
            "{ disk = [50, 300] }",
            "devices.distance_m must be a value or one",
        ),
        ("{ disc = [50, 300] }", "{ disc = [300, 50] }", "devices.distance_m.disc must be"),
        (
            "frequency_min_hz = 1e8",
            'frequency_min_hz = "low"',
            "devices.frequency_min_hz must be a",
        ),
        ("[model]", "[[device]]\nindex = 1\n[model]", "devices[0].index is not a known key"),
        ("[model]", "[[device]]\nkappa = 0\n[model]", "devices[0].kappa must be greater than 0"),
        ("frequency_min_hz = 1e8", "kappa = nan", "devices.kappa must be finite, got nan"),
        ("count = 3", "count = 0", "devices.count must be a whole number of at least 1"),
        (
            "count = 3",
            "coun = 3",
            "devices.count is missing (or [[device]] entries); devices.coun is not",
        ),
        # what is left out altogether is missing once, not once a device
        ("distance_m = { disc = [50, 300] }", "", "devices.distance_m is required, and missing"),
        # nor does the least frequency exceed a largest one that could not be read
        (
            "{ uniform = [1e9, 2e9] }",
            "{ uniform = [2e9, 1e9] }",
            "devices.frequency_max_hz.uniform",
        ),
    ],
)
def test_a_mistake_is_one_problem(small_text: str, old: str, new: str, problem: str) -> None:
    assert old in small_text
    with pytest.raises(ScenarioError) as caught:
        parse_scenario(small_text.replace(old, new))
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(problem)


def test_a_missing_table_tells_the_keys_it_needs() -> None:
    text = "[devices]" + GOOD.split("[devices]")[1]
    keys = "bandwidth_hz, downlink_bandwidth_hz, downlink_power_w"
    assert problems_of(text) == (f"cell is required, and missing; it needs at least {keys}",)


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ('[data]\nsource = "fil"\npath = "x.csv"\n', "data.source must be one of 'hutto'"),
        ("[training]\nlocal_steps = true\n", "training.local_steps must be a whole number"),
        ("[training]\nrounds = 0\n", "training.rounds must be greater than 0"),
        ('[training]\nstage = "aling"\n', "training.stage must be one of 'alignment'"),
        (
            '[training]\nstage = "pretraining"\n[peft]\nadapter_width = 0\n[decisions]\nranks = [0]\n',
            "peft.adapter_width, peft.common_lora_rank or a rank of decisions.ranks must be above 0",
        ),
    ],
)
def test_what_rests_on_a_mistake_is_no_other_mistake(text: str, start: str) -> None:
    (problem,) = problems_of(GOOD + text)
    assert problem.startswith(start)
