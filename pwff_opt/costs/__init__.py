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
from pwff_opt.costs.memory import (
    forward_memory_byte,
    resident_byte,
    sampling_memory_byte,
    training_memory_byte,
    weights_byte,
)
from pwff_opt.costs.payload import broadcast_payload_bit, uplink_payload_bit
from pwff_opt.costs.steps import (
    LocalStep,
    Preferences,
    Rewards,
    Sampling,
    Supervised,
    local_step,
    model_architecture,
)
from pwff_opt.costs.workload import Workload, attention_span, masked

__all__ = [
    "Architecture",
    "Blocks",
    "LocalStep",
    "Preferences",
    "Rewards",
    "Sampling",
    "Supervised",
    "TokenCount",
    "Workload",
    "adapter_parameters",
    "attention_span",
    "broadcast_payload_bit",
    "forward_flops",
    "forward_memory_byte",
    "head_parameters",
    "local_step",
    "lora_parameters",
    "masked",
    "model_architecture",
    "resident_byte",
    "sampling_memory_byte",
    "step_flops",
    "trained_parameters",
    "training_memory_byte",
    "uplink_payload_bit",
    "weights_byte",
]
