"""From decisions to what a round demands of every device, and to the allocator's problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from pwff_opt.channel import rate_bps
from pwff_opt.costs.blocks import Blocks
from pwff_opt.costs.payload import broadcast_payload_bit, uplink_payload_bit
from pwff_opt.costs.steps import local_step
from pwff_opt.costs.workload import FloatArray, Workload
from pwff_opt.errors import DecisionError
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.participation import participants
from pwff_opt.scenario.schedule import RoundDecision, Schedule
from pwff_solvers.allocation import Batch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Demand:
    """What the rounds of a schedule demand: arrays [round] and [round, device].

    A device that does not take part in a round uploads, computes and holds nothing: 0.
    """

    payload_bit: FloatArray
    """[round, device]: upload."""
    broadcast_bit: FloatArray
    """[round]: the one transmission that all participants hear."""
    work_cycles: FloatArray
    """[round, device]: CPU cycles of the local steps."""
    memory_byte: FloatArray
    """[round, device]: peak memory of a local step."""

    @property
    def shape(self) -> tuple[int, int]:
        rounds, devices = self.work_cycles.shape
        return rounds, devices

    @property
    def takes_part(self) -> NDArray[np.bool_]:
        """[round, device]: whether a device takes part, which always takes memory."""
        return self.memory_byte > 0

    @classmethod
    def joined(cls, parts: Sequence[Demand]) -> Demand:
        """Return the rounds of all parts, one part after another."""
        return cls(
            payload_bit=np.concatenate([part.payload_bit for part in parts]),
            broadcast_bit=np.concatenate([part.broadcast_bit for part in parts]),
            work_cycles=np.concatenate([part.work_cycles for part in parts]),
            memory_byte=np.concatenate([part.memory_byte for part in parts]),
        )

    def only(self, number: int) -> Demand:
        """Return what one round (counted from 0) demands."""
        one = slice(number, number + 1)
        return Demand(
            payload_bit=self.payload_bit[one],
            broadcast_bit=self.broadcast_bit[one],
            work_cycles=self.work_cycles[one],
            memory_byte=self.memory_byte[one],
        )


class CostModel:
    """Demand of schedules in one scenario, and the allocation problem they pose.

    Parameters
    ----------
    scenario : Scenario
    workload : Workload
        Of the devices' data; see :meth:`Workload.padded` where there are none.
    """

    def __init__(self, scenario: Scenario, workload: Workload) -> None:
        for name, values in workload.lengths().items():
            if values.shape != (len(scenario.devices),):
                raise DecisionError(
                    f"workload.{name} must have shape [{len(scenario.devices)}], "
                    f"got {list(values.shape)}"
                )
        self.scenario, self.workload = scenario, workload
        self._step = local_step(scenario, workload)
        self.architecture = self._step.architecture
        self._flops_per_cycle = np.array([device.flops_per_cycle for device in scenario.devices])
        self._setting = cache(
            lambda number: (Blocks.of(scenario, round=number), participants(scenario, number))
        )
        self._known: dict[
            tuple[RoundDecision, tuple[bool, ...], Blocks, tuple[bool, ...]], Demand
        ] = {}

    def demand(self, schedule: Schedule) -> Demand:
        """Return what every round of a schedule demands; its first round is the run's round 0."""
        return Demand.joined(
            [
                self._round(decision, present, *self._setting(number))
                for number, (decision, present) in enumerate(
                    zip(schedule.rounds, schedule.present, strict=True)
                )
            ]
        )

    def batch(self, demand: Demand, gain: FloatArray) -> Batch:
        """Return the allocation problems of all rounds, one instance each (``gain``: [round, device]).

        Fixed parts are the broadcast, at the rate of the weakest participant, and the energy of the
        participants to receive it. Energy is that of the devices; the base station's is not counted.
        """
        if gain.shape != demand.shape:
            raise DecisionError(
                f"gain must have shape {list(demand.shape)}, got {list(gain.shape)}"
            )
        cell, devices = self.scenario.cell, self.scenario.devices
        broadcast_bps = rate_bps(
            bandwidth_hz=cell.downlink_bandwidth_hz,
            power_w=cell.downlink_power_w,
            gain=np.where(demand.takes_part, gain, np.inf).min(axis=1),
            noise_psd_w_per_hz=cell.noise_psd_w_per_hz,
        )
        broadcast_s = demand.broadcast_bit / broadcast_bps
        receive_w = np.array([device.receive_power_w for device in devices])
        return Batch(
            payload_bit=demand.payload_bit,
            work_cycles=demand.work_cycles,
            gain=gain,
            power_max_w=np.array([device.power_max_w for device in devices]),
            frequency_min_hz=np.array([device.frequency_min_hz for device in devices]),
            frequency_max_hz=np.array([device.frequency_max_hz for device in devices]),
            kappa=np.array([device.kappa for device in devices]),
            bandwidth_hz=cell.bandwidth_hz,
            noise_psd_w_per_hz=cell.noise_psd_w_per_hz,
            fixed_energy_j=demand.takes_part * receive_w * broadcast_s[:, None],
            fixed_delay_s=broadcast_s,
        )

    def fits(self, demand: Demand) -> bool:
        """Return whether every device has the memory for every round."""
        limit = np.array([device.memory_byte for device in self.scenario.devices])
        return bool((demand.memory_byte <= limit).all())

    def _round(
        self,
        decision: RoundDecision,
        present: tuple[bool, ...],
        blocks: Blocks,
        taking_part: tuple[bool, ...],
    ) -> Demand:
        known = self._known.get((decision, present, blocks, taking_part))
        if known is not None:
            return known
        if len(decision.states) != self.architecture.layers:
            raise DecisionError(
                f"{decision} must give {self.architecture.layers} layers a state, "
                f"got {len(decision.states)}"
            )
        if len(decision.ranks) != len(self.scenario.devices):
            raise DecisionError(
                f"{decision} must give {len(self.scenario.devices)} devices a rank, "
                f"got {len(decision.ranks)}"
            )
        flops = self._step.flops(
            blocks, rank=np.array(decision.ranks), states=decision.states, present=present
        )
        ranks = [rank for rank, here in zip(decision.ranks, taking_part, strict=True) if here]
        upload, memory = {}, {}
        for rank in set(ranks):
            upload[rank] = uplink_payload_bit(self.architecture, blocks, decision.states, rank=rank)
            memory[rank] = self._step.memory_byte(
                blocks, rank=rank, states=decision.states, present=present
            )
        broadcast = broadcast_payload_bit(self.architecture, blocks, decision.states, ranks=ranks)

        def by_device(values: dict[int, int]) -> FloatArray:
            return np.array(
                [
                    [
                        float(values[rank]) if here else 0.0
                        for rank, here in zip(decision.ranks, taking_part, strict=True)
                    ]
                ]
            )

        work = self.scenario.training.local_steps * flops / self._flops_per_cycle
        demand = Demand(
            payload_bit=by_device(upload),
            broadcast_bit=np.array([float(broadcast)]),
            work_cycles=np.where(taking_part, work, 0.0)[None, :],
            memory_byte=by_device(memory),
        )
        self._known[decision, present, blocks, taking_part] = demand
        return demand
