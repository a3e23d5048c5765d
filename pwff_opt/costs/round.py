"""From decisions to what a round demands of every device, and to the allocator's problem."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pwff_opt.costs.architecture import Architecture
from pwff_opt.costs.blocks import Blocks
from pwff_opt.costs.flops import TokenCount, step_flops
from pwff_opt.costs.memory import training_memory_byte
from pwff_opt.costs.payload import uplink_payload_bit
from pwff_opt.decision import RoundDecision, Schedule
from pwff_opt.errors import DecisionError
from pwff_opt.models import model_config, model_source
from pwff_opt.scenario import Scenario
from pwff_opt.wireless import rate_bps
from pwff_solvers.allocation import Batch

FloatArray = NDArray[np.float64]
UPLOAD_BITS = {"float32": 32, "float16": 16}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Workload:
    """What the data contribute to the costs: number of classes, and lengths of the sequences.

    ``mean_tokens`` and ``mean_squared_tokens`` [device] are means over each device's training
    sequences; work is linear in them, so costs are exact expectations over random mini-batches
    without padding.
    """

    classes: int
    mean_tokens: FloatArray
    mean_squared_tokens: FloatArray

    @classmethod
    def padded(cls, scenario: Scenario, *, classes: int) -> Workload:
        """Return the upper bound that needs no data: every sequence is ``model.max_tokens`` long."""
        length = np.full(len(scenario.devices), float(scenario.model.max_tokens))
        return cls(classes=classes, mean_tokens=length, mean_squared_tokens=length**2)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Demand:
    """What the rounds of a schedule demand: arrays [round] and [round, device]."""

    payload_bit: FloatArray
    """[round]: upload of each device, and size of the broadcast."""
    work_cycles: FloatArray
    """[round, device]: CPU cycles of the local steps."""
    memory_byte: FloatArray
    """[round, device]: peak memory of a local step."""

    @property
    def shape(self) -> tuple[int, int]:
        rounds, devices = self.work_cycles.shape
        return rounds, devices


class CostModel:
    """Demand of schedules in one scenario, and the allocation problem they pose.

    Parameters
    ----------
    scenario : Scenario
    workload : Workload
        Of the devices' data; see :meth:`Workload.padded` where there are none.
    """

    def __init__(self, scenario: Scenario, workload: Workload) -> None:
        if workload.mean_tokens.shape != (len(scenario.devices),):
            raise DecisionError(
                f"workload must have {len(scenario.devices)} devices, got {workload.mean_tokens.shape}"
            )
        source = model_source(scenario.model.source, folder=scenario.folder)
        self.scenario, self.workload = scenario, workload
        self.architecture = Architecture.from_config(
            model_config(source), classes=workload.classes, pooling=scenario.model.pooling
        )
        self.blocks = Blocks(
            adapter_width=scenario.peft.adapter_width,
            bits_per_parameter=UPLOAD_BITS[scenario.peft.upload_dtype],
            head_shared=scenario.peft.head == "shared",
        )
        batch = scenario.training.batch_size
        self._count = TokenCount(
            sequences=np.full(len(scenario.devices), float(batch)),
            tokens=batch * workload.mean_tokens,
            squared_tokens=batch * workload.mean_squared_tokens,
        )
        self._flops_per_cycle = np.array([device.flops_per_cycle for device in scenario.devices])
        self._known: dict[tuple[RoundDecision, tuple[bool, ...]], Demand] = {}

    def demand(self, schedule: Schedule) -> Demand:
        """Return what every round of a schedule demands."""
        rounds = [
            self._round(decision, present)
            for decision, present in zip(schedule.rounds, schedule.present, strict=True)
        ]
        return Demand(
            payload_bit=np.concatenate([demand.payload_bit for demand in rounds]),
            work_cycles=np.concatenate([demand.work_cycles for demand in rounds]),
            memory_byte=np.concatenate([demand.memory_byte for demand in rounds]),
        )

    def batch(self, demand: Demand, gain: FloatArray) -> Batch:
        """Return the allocation problems of all rounds, one instance each (``gain``: [round, device]).

        Fixed parts are the broadcast, at the rate of the weakest receiver, and the energy to receive
        it. Energy is that of the devices; the base station's is not counted.
        """
        if gain.shape != demand.shape:
            raise DecisionError(f"gain must have shape {demand.shape}, got {gain.shape}")
        cell, devices = self.scenario.cell, self.scenario.devices
        broadcast_bps = rate_bps(
            bandwidth_hz=cell.downlink_bandwidth_hz,
            power_w=cell.downlink_power_w,
            gain=gain.min(axis=1),
            noise_psd_w_per_hz=cell.noise_psd_w_per_hz,
        )
        broadcast_s = demand.payload_bit / broadcast_bps
        receive_w = np.array([device.receive_power_w for device in devices])
        return Batch(
            payload_bit=np.broadcast_to(demand.payload_bit[:, None], demand.shape),
            work_cycles=demand.work_cycles,
            gain=gain,
            power_max_w=np.array([device.power_max_w for device in devices]),
            frequency_min_hz=np.array([device.frequency_min_hz for device in devices]),
            frequency_max_hz=np.array([device.frequency_max_hz for device in devices]),
            kappa=np.array([device.kappa for device in devices]),
            bandwidth_hz=cell.bandwidth_hz,
            noise_psd_w_per_hz=cell.noise_psd_w_per_hz,
            fixed_energy_j=receive_w * broadcast_s[:, None],
            fixed_delay_s=broadcast_s,
        )

    def fits(self, demand: Demand) -> bool:
        """Return whether every device has the memory for every round."""
        limit = np.array([device.memory_byte for device in self.scenario.devices])
        return bool((demand.memory_byte <= limit).all())

    def _round(self, decision: RoundDecision, present: tuple[bool, ...]) -> Demand:
        known = self._known.get((decision, present))
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
        training = self.scenario.training
        flops = step_flops(
            self.architecture,
            self.blocks,
            rank=np.array(decision.ranks),
            states=decision.states,
            present=present,
            count=self._count,
        )
        memory = {
            rank: training_memory_byte(
                self.architecture,
                self.blocks,
                rank=rank,
                states=decision.states,
                present=present,
                sequences=training.batch_size,
                length=self.scenario.model.max_tokens,
            )
            for rank in set(decision.ranks)
        }
        payload = uplink_payload_bit(self.architecture, self.blocks, decision.states)
        demand = Demand(
            payload_bit=np.array([float(payload)]),
            work_cycles=(training.local_steps * flops / self._flops_per_cycle)[None, :],
            memory_byte=np.array([[float(memory[rank]) for rank in decision.ranks]]),
        )
        self._known[decision, present] = demand
        return demand
