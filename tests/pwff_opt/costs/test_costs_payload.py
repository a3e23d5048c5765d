"""Payload in bits equals eight times the bytes of the tensors a device would serialise."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import save

from pwff_opt.costs import (
    Blocks,
    head_parameters,
    lora_parameters,
    trained_parameters,
    uplink_payload_bit,
)
from pwff_opt.decision import LayerState
from pwff_opt.errors import DecisionError


def upload(subject, step, states, *, head_shared, dtype):
    tensors = {}
    layers = next(m for m in step.model.modules() if isinstance(m, torch.nn.ModuleList))
    for index, layer in enumerate(layers):
        if states[index] == LayerState.AGGREGATED:
            for name, value in layer.adapter.state_dict().items():
                tensors[f"layers.{index}.adapter.{name}"] = value.to(dtype)
    if head_shared:
        for name, value in subject.head.state_dict().items():
            tensors[f"head.{name}"] = value.to(dtype)
    return save(tensors)


def header_byte(blob):
    """A safetensors file starts with the header's length, 8 byte, and the header."""
    return 8 + int.from_bytes(blob[:8], "little")


@pytest.mark.parametrize("name", ["minilm", "llama"])
@pytest.mark.parametrize("head_shared", [False, True])
@pytest.mark.parametrize(("bits", "dtype"), [(32, torch.float32), (16, torch.bfloat16)])
@pytest.mark.parametrize("lowest", range(5))
def test_payload_is_the_serialised_size(
    subject, make_step, draw_states, name, head_shared, bits, dtype, lowest
):
    case = subject(name)
    states, present = draw_states(case.architecture.layers, lowest, bits)
    step = make_step(name, width=5, rank=2, states=states, present=present)
    blob = upload(case, step, states, head_shared=head_shared, dtype=dtype)
    blocks = Blocks(adapter_width=5, bits_per_parameter=bits, head_shared=head_shared)
    payload = uplink_payload_bit(case.architecture, blocks, states)
    assert payload == 8 * (len(blob) - header_byte(blob))


def test_header_size_is_as_documented(subject, make_step):
    case = subject("minilm")
    every = [LayerState.AGGREGATED] * 6
    step = make_step("minilm", width=16, rank=0, states=every, present=[True] * 6)
    blob = upload(case, step, every, head_shared=False, dtype=torch.float32)
    assert header_byte(blob) == pytest.approx(2176, rel=0.1)


@pytest.mark.parametrize("name", ["minilm", "llama", "llama_bias"])
def test_trained_parameters_equal_the_real_count(subject, make_step, draw_states, name):
    case = subject(name)
    for rank, lowest in itertools.product((0, 3), range(case.architecture.layers + 1)):
        states, present = draw_states(case.architecture.layers, lowest, rank)
        step = make_step(name, width=5, rank=rank, states=states, present=present)
        blocks = Blocks(adapter_width=5)
        predicted = trained_parameters(case.architecture, blocks, rank=rank, states=states)
        assert predicted == sum(p.numel() for p in step.trained)


def test_lora_and_head_do_not_depend_on_the_adapter(subject):
    architecture = subject("minilm").architecture
    assert lora_parameters(architecture, 4) == 4 * 4 * 384
    assert head_parameters(architecture) == 384 * 3 + 3


def test_wrong_number_of_states_is_refused(subject):
    with pytest.raises(DecisionError, match=r"states must have one entry per layer \(6\), got 5"):
        uplink_payload_bit(
            subject("minilm").architecture, Blocks(adapter_width=4), [LayerState.FROZEN] * 5
        )
