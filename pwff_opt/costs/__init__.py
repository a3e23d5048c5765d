"""Costs of a round: payload, FLOPs and memory, hence energy and delay; no torch here."""

from pwff_opt.costs.architecture import Architecture
from pwff_opt.costs.blocks import (
    Blocks,
    adapter_parameters,
    head_parameters,
    lora_parameters,
    trained_parameters,
)
from pwff_opt.costs.flops import TokenCount, forward_flops, step_flops
from pwff_opt.costs.memory import training_memory_byte
from pwff_opt.costs.payload import broadcast_payload_bit, uplink_payload_bit
from pwff_opt.costs.round import CostModel, Demand, Workload

__all__ = [
    "Architecture",
    "Blocks",
    "CostModel",
    "Demand",
    "TokenCount",
    "Workload",
    "adapter_parameters",
    "broadcast_payload_bit",
    "forward_flops",
    "head_parameters",
    "lora_parameters",
    "step_flops",
    "trained_parameters",
    "training_memory_byte",
    "uplink_payload_bit",
]
