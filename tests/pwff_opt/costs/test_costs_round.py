"""What rounds demand of devices: rules that change by round, partial participation, old figures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pwff_opt import Planner, Scenario, Schedule, Workload
from pwff_opt.channel import rate_bps
from pwff_opt.costs import broadcast_payload_bit, uplink_payload_bit
from pwff_opt.costs.blocks import Blocks
from pwff_opt.planning.demand import CostModel
from pwff_opt.scenario.files import read_scenario
from pwff_opt.scenario.participation import participants
from pwff_opt.scenario.schedule import LayerState, RoundDecision


def changed(scenario: Scenario, *, peft=None, **aggregation) -> Scenario:
    return replace(
        scenario,
        peft=replace(scenario.peft, **(peft or {})),
        aggregation=replace(scenario.aggregation, **aggregation),
    )


def costs_of(scenario: Scenario) -> CostModel:
    return CostModel(scenario, Workload.padded(scenario, classes=3))


def test_figures_of_the_default_rule_are_what_they_were_before_there_were_rules():
    scenario = read_scenario("hutto")
    workload = Workload(
        classes=3,
        mean_tokens=np.linspace(17.3, 29.1, 4),
        mean_squared_tokens=np.linspace(400.7, 990.3, 4),
    )
    planner = Planner(scenario, workload)
    schedule = Schedule.parse("1x4:fppaaa 1x8:aaafpa 1x0:ffffaa 1x2:ffffff", devices=4)
    demand = planner.costs.demand(schedule)
    payload = [1255008.0, 1661024.0, 848992.0, 36960.0]
    assert demand.broadcast_bit.tolist() == payload
    assert demand.payload_bit.tolist() == [[bits] * 4 for bits in payload]
    assert demand.work_cycles[:, [0, 1, 3]].tolist() == [
        [3385941887.9999995, 4168313216.000001, 5733055871.999999],
        [3722130815.9999995, 4582557568.000001, 6303411071.999999],
        [2187812352.0, 2691703808.000001, 3699486720.0],
        [1871209344.0, 2301501056.0000005, 3162084480.0],
    ]
    memory = [117615824.0, 122077968.0, 98729188.0, 95417316.0]
    assert demand.memory_byte.tolist() == [[size] * 4 for size in memory]
    half = replace(scenario, peft=replace(scenario.peft, upload_dtype="float16", head="personal"))
    assert CostModel(half, workload).demand(schedule).broadcast_bit.tolist() == [
        609024.0,
        812032.0,
        406016.0,
        0.0,
    ]
    plan = planner.plan(schedule, price_of_time_w=1.0)
    assert plan.energy_j == pytest.approx(7.57847716324377, rel=1e-9)
    assert plan.delay_s == pytest.approx(15.63993536130555, rel=1e-9)


@pytest.mark.parametrize("rule", ["rolora", "ffa", "fedit"])
def test_equal_decisions_differ_by_round_only_where_the_rule_does(small, rule):
    costs = costs_of(changed(small, lora=rule))
    demand = costs.demand(Schedule.parse("3x4:aaa", devices=3))
    assert demand.shape == (3, 3)
    assert (demand.payload_bit == demand.broadcast_bit[:, None]).all()
    differ = [float(quantity[0, 0]) != float(quantity[1, 0]) for quantity in quantities(demand)]
    again = [float(quantity[0, 0]) == float(quantity[2, 0]) for quantity in quantities(demand)]
    assert all(again)
    # Square projections: A and B are equally large, but only A's gradient goes through B.
    assert any(differ) == (rule == "rolora")
    expected = Blocks(adapter_width=4, lora_rule=rule, round=1, adapter_shared=True)
    states = [LayerState.AGGREGATED] * 3
    assert demand.payload_bit[1, 0] == uplink_payload_bit(
        costs.architecture, expected, states, rank=4
    )
    both = costs_of(changed(small, lora="fedit")).demand(Schedule.parse("3x4:aaa", devices=3))
    assert (demand.work_cycles <= both.work_cycles).all()
    assert (demand.memory_byte <= both.memory_byte).all()


def quantities(demand):
    return demand.payload_bit, demand.work_cycles, demand.memory_byte


def test_common_lora_is_trained_and_sent_by_all(small):
    none = costs_of(small)
    with_common = costs_of(changed(small, peft={"common_lora_rank": 3}))
    schedule = Schedule.parse("1x4:ffa 2x0:faa", devices=3)
    before, after = none.demand(schedule), with_common.demand(schedule)
    added = 32 * 3 * 4 * 32 * np.array([1, 2, 2])  # A and B on two projections, hidden size 32
    assert (after.broadcast_bit - before.broadcast_bit == added).all()
    assert (after.payload_bit - before.payload_bit == added[:, None]).all()
    assert (after.work_cycles > before.work_cycles).all()
    assert (after.memory_byte > before.memory_byte).all()


@pytest.fixture(params=["fdma", "tdma"])
def drawn(small, request) -> Scenario:
    """Two of three devices a round, each with a rank of its own."""
    scenario = changed(small, lora="hetlora", devices_per_round=2)
    return replace(scenario, cell=replace(scenario.cell, access=request.param))


RANKS = (4, 0, 2)
SCHEDULE = Schedule(rounds=(RoundDecision(ranks=RANKS, states=(LayerState.AGGREGATED,) * 3),) * 3)


def test_devices_that_do_not_take_part_have_no_demand(drawn):
    costs = costs_of(drawn)
    demand = costs.demand(SCHEDULE)
    everyone = costs_of(changed(drawn, devices_per_round=0)).demand(SCHEDULE)
    part = np.array([participants(drawn, number) for number in range(3)])
    assert (part.sum(axis=1) == 2).all()
    assert len(np.unique(part, axis=0)) > 1
    assert (demand.takes_part == part).all()
    for own, whole in zip(quantities(demand), quantities(everyone), strict=True):
        assert (own == np.where(part, whole, 0.0)).all()
    for number in range(3):
        ranks = [rank for rank, here in zip(RANKS, part[number], strict=True) if here]
        expected = broadcast_payload_bit(
            costs.architecture,
            Blocks.of(drawn, round=number),
            SCHEDULE.rounds[number].states,
            ranks=ranks,
        )
        assert demand.broadcast_bit[number] == expected


def test_devices_that_do_not_take_part_cost_nothing_and_hold_nobody_up(drawn):
    planner = Planner(drawn, Workload.padded(drawn, classes=3))
    plan = planner.plan(SCHEDULE, price_of_time_w=1.0)
    part = plan.demand.takes_part
    problem = planner.costs.batch(plan.demand, planner.gain)
    for quantity in (problem.payload_bit, problem.work_cycles, problem.fixed_energy_j):
        assert ((quantity > 0) == part).all()
    broadcast_s = plan.demand.broadcast_bit / rate_bps(
        bandwidth_hz=drawn.cell.downlink_bandwidth_hz,
        power_w=drawn.cell.downlink_power_w,
        gain=np.array([row[here].min() for row, here in zip(planner.gain, part, strict=True)]),
        noise_psd_w_per_hz=drawn.cell.noise_psd_w_per_hz,
    )
    np.testing.assert_allclose(problem.fixed_delay_s, broadcast_s, rtol=1e-12)
    # Whatever the channel of one who stays away, nothing changes.
    number, away = np.argwhere(~part)[0]
    for factor in (1e-3, 1e3):
        gain = planner.gain[number].copy()
        gain[away] *= factor
        again = planner.reallocate(SCHEDULE, int(number), gain, price_of_time_w=1.0)
        assert again.energy_j[0] == pytest.approx(plan.allocation.energy_j[number], rel=1e-6)
        assert again.round_s[0] == pytest.approx(plan.allocation.round_s[number], rel=1e-6)
        assert again.gap[0] < 1e-8


def test_memory_binds_only_in_rounds_a_device_takes_part_in(drawn):
    once = replace(drawn, aggregation=replace(drawn.aggregation, devices_per_round=1))
    first = participants(once, 0).index(True)
    one_round = SCHEDULE.prefix(1)
    for poor in range(3):
        devices = tuple(
            replace(device, memory_byte=1.0) if number == poor else device
            for number, device in enumerate(once.devices)
        )
        costs = costs_of(replace(once, devices=devices))
        assert costs.fits(costs.demand(one_round)) == (poor != first)


def test_reallocation_knows_the_number_of_its_round(small):
    scenario = changed(small, lora="rolora", devices_per_round=2)
    planner = Planner(scenario, Workload.padded(scenario, classes=3))
    schedule = Schedule.parse("3x4:aaa", devices=3)
    plan = planner.plan(schedule, price_of_time_w=1.0)
    for number in range(3):
        now = planner.reallocate(schedule, number, planner.gain[number], price_of_time_w=1.0)
        assert now.energy_j[0] == pytest.approx(plan.allocation.energy_j[number], rel=1e-7)
        assert now.round_s[0] == pytest.approx(plan.allocation.round_s[number], rel=1e-7)


@pytest.mark.parametrize("head", ["personal", "shared"])
def test_rounds_without_upload_are_planned(drawn, head):
    nothing = changed(drawn, peft={"adapter_width": 0, "head": head})
    planner = Planner(nothing, Workload.padded(nothing, classes=3))
    plan = planner.plan(Schedule.parse("3x0:aaa", devices=3), price_of_time_w=1.0)
    assert (plan.demand.payload_bit > 0).any() == (head == "shared")
    assert plan.energy_j > 0
    assert plan.delay_s > 0
