"""Payload in bits equals eight times the bytes of the tensors that would be serialised."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import save

from pwff_opt.costs import (
    Architecture,
    Blocks,
    broadcast_payload_bit,
    head_parameters,
    lora_parameters,
    trained_parameters,
    uplink_payload_bit,
)
from pwff_opt.errors import DecisionError
from pwff_opt.scenario.schedule import LayerState

# Factors of the sized LoRA that a device uploads, by rule and round.
UPLOADED = {
    ("personal", 0): "",
    ("fedit", 0): "AB",
    ("ffa", 0): "B",
    ("ffa", 1): "B",
    ("fedsa", 0): "A",
    ("rolora", 0): "B",
    ("rolora", 1): "A",
    ("rolora", 2): "B",
    ("hetlora", 0): "AB",
    ("flora", 0): "AB",
    ("flexlora", 0): "AB",
    ("fedex", 0): "AB",
    ("raflora", 0): "AB",
}
COMMON_RANK_RULES = ("fedit", "ffa", "fedsa", "rolora", "fedex")


def encoded(tensors, dtype):
    """Return the tensors as they are sent: int8 ones with a float32 scale each."""
    if dtype != "int8":
        return {name: value.to(getattr(torch, dtype)) for name, value in tensors.items()}
    sent = {name: torch.zeros(value.shape, dtype=torch.int8) for name, value in tensors.items()}
    return sent | {f"{name}/scale": torch.zeros(()) for name in tensors}


def upload(subject, step, states, *, head_shared, dtype, factors=""):
    tensors = {}
    layers = next(m for m in step.model.modules() if isinstance(m, torch.nn.ModuleList))
    kinds = ["adapter.", ".common."] + [f".lora_{factor}.sized." for factor in factors]
    for index, layer in enumerate(layers):
        for name, value in layer.named_parameters():
            if states[index] == LayerState.AGGREGATED and any(kind in name for kind in kinds):
                tensors[f"layers.{index}.{name}"] = value.detach()
    if head_shared and subject.head is not None:
        for name, value in subject.head.state_dict().items():
            tensors[f"head.{name}"] = value
    return save(encoded(tensors, dtype))


def header_byte(blob):
    """A safetensors file starts with the header's length, 8 byte, and the header."""
    return 8 + int.from_bytes(blob[:8], "little")


@pytest.mark.parametrize("name", ["minilm", "llama", "llama_language"])
@pytest.mark.parametrize("head_shared", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("lowest", range(5))
def test_payload_is_the_serialised_size(
    subject, make_step, draw_states, name, head_shared, dtype, lowest
):
    case = subject(name)
    states, present = draw_states(case.architecture.layers, lowest, 3)
    step = make_step(name, width=5, rank=2, states=states, present=present)
    blob = upload(case, step, states, head_shared=head_shared, dtype=dtype)
    blocks = Blocks(adapter_width=5, upload_dtype=dtype, head_shared=head_shared)
    payload = uplink_payload_bit(case.architecture, blocks, states, rank=2)
    assert payload == 8 * (len(blob) - header_byte(blob))
    broadcast = broadcast_payload_bit(case.architecture, blocks, states, ranks=[2, 0])
    sent = upload(
        case, step, states, head_shared=head_shared, dtype=dtype.replace("int8", "float32")
    )
    assert broadcast == 8 * (len(sent) - header_byte(sent))


@pytest.mark.parametrize(("rule", "number"), UPLOADED)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize(
    ("width", "rank", "common"), [(5, 3, 0), (0, 3, 0), (5, 0, 2), (0, 3, 2), (0, 0, 0)]
)
def test_upload_of_every_rule_is_the_serialised_size(
    subject, make_step, draw_states, rule, number, dtype, width, rank, common
):
    case = subject("llama")
    states, present = draw_states(case.architecture.layers, 1, 3)
    options = {"width": width, "rank": rank, "states": states, "present": present}
    step = make_step("llama", common=common, **options)
    blob = upload(case, step, states, head_shared=True, dtype=dtype, factors=UPLOADED[rule, number])
    blocks = Blocks(
        adapter_width=width,
        common_rank=common,
        lora_rule=rule,
        round=number,
        head_shared=True,
        upload_dtype=dtype,
    )
    payload = uplink_payload_bit(case.architecture, blocks, states, rank=rank)
    assert payload == 8 * (len(blob) - header_byte(blob))


# Queries wider, keys and values narrower than the hidden state: no two of the sizes are equal.
ODD = Architecture(
    family="llama",
    layers=3,
    hidden=8,
    heads=4,
    key_value_heads=2,
    head_dim=3,
    intermediate=12,
    vocabulary=10,
)
STATES = [LayerState.PERSONAL, LayerState.AGGREGATED, LayerState.AGGREGATED]


def broadcast_tensors(rule, number, n, m, ranks):
    """Return what the base station sends of one projection, computed as each rule computes it."""
    generator = torch.Generator().manual_seed(0)
    a = [torch.randn(r, n, generator=generator) for r in ranks]
    b = [torch.randn(m, r, generator=generator) for r in ranks]
    dense = sum((y @ x for x, y in zip(a, b, strict=True)), torch.zeros(m, n)) / len(ranks)
    top = max(ranks)
    stacked = [torch.cat(a), torch.cat(b, dim=1)]
    if rule == "flora":
        return min(stacked, [dense], key=size)
    if rule == "flexlora":
        u, s, v = torch.linalg.svd(dense)
        return [s[:top, None] * v[:top], u[:, :top]]
    padded_a = [torch.cat([x, torch.zeros(top - len(x), n)]) for x in a]
    padded_b = [torch.cat([y, torch.zeros(m, top - y.shape[1])], dim=1) for y in b]
    mean_a, mean_b = torch.stack(padded_a).mean(0), torch.stack(padded_b).mean(0)
    if rule == "fedex":
        return min(stacked, [mean_a, mean_b, dense - mean_b @ mean_a], key=size)
    return [{"A": mean_a, "B": mean_b}[factor] for factor in UPLOADED[rule, number]]


def size(tensors):
    return sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize(("rule", "number"), UPLOADED)
@pytest.mark.parametrize(("dtype", "bits"), [("float32", 32), ("float16", 16), ("int8", 32)])
@pytest.mark.parametrize("ranks", [[2], [2, 2], [3] * 6, [0, 0], [1, 4, 2], [0, 5]])
def test_broadcast_of_every_rule_is_the_size_of_its_tensors(rule, number, dtype, bits, ranks):
    if rule in COMMON_RANK_RULES and len(set(ranks)) > 1:
        return  # refused by the scenario
    blocks = Blocks(
        adapter_width=3, common_rank=2, lora_rule=rule, round=number, upload_dtype=dtype
    )
    layer = 3 * 8 + 3 + 8 * 3 + 8  # adapter
    for m in (12, 6):
        layer += size(broadcast_tensors(rule, number, 8, m, ranks))
        layer += size([torch.zeros(2, 8), torch.zeros(m, 2)])  # common LoRA
    assert broadcast_payload_bit(ODD, blocks, STATES, ranks=ranks) == bits * 2 * layer


def test_both_ways_to_send_an_exact_average_occur():
    def per_layer(rule, devices):
        blocks = Blocks(adapter_width=0, lora_rule=rule)
        return broadcast_payload_bit(ODD, blocks, STATES, ranks=[1] * devices) / 32 / 2

    assert per_layer("flora", 2) == 2 * (20 + 14)
    assert per_layer("flora", 9) == 12 * 8 + 6 * 8
    assert per_layer("fedex", 2) == 2 * (20 + 14)
    assert per_layer("fedex", 9) == (20 + 12 * 8) + (14 + 6 * 8)


def test_personal_adapters_are_not_sent():
    blocks = Blocks(adapter_width=3, lora_rule="fedit", adapter_shared=False)
    assert uplink_payload_bit(ODD, blocks, STATES, rank=1) == 32 * 2 * (20 + 14)
    assert broadcast_payload_bit(ODD, blocks, STATES, ranks=[1, 1]) == 32 * 2 * (20 + 14)


def test_header_size_is_as_documented(subject, make_step):
    case = subject("minilm")
    every = [LayerState.AGGREGATED] * 6
    step = make_step("minilm", width=16, rank=0, states=every, present=[True] * 6)
    blob = upload(case, step, every, head_shared=False, dtype="float32")
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


@pytest.mark.parametrize(("rule", "number", "factors"), [("ffa", 0, "B"), ("rolora", 1, "A")])
def test_trained_parameters_leave_out_what_a_rule_holds_fixed(
    subject, make_step, draw_states, rule, number, factors
):
    case = subject("llama")
    states, present = draw_states(case.architecture.layers, 1, 0)
    for width, rank, common in itertools.product((0, 5), (0, 3), (0, 2)):
        options = {"width": width, "rank": rank, "states": states}
        options |= {"present": present, "common": common}
        personal = "B" if rule == "ffa" else "AB"
        step = make_step("llama", factors=factors, personal=personal, **options)
        blocks = Blocks(adapter_width=width, common_rank=common, lora_rule=rule, round=number)
        predicted = trained_parameters(case.architecture, blocks, rank=rank, states=states)
        assert predicted == sum(p.numel() for p in step.trained)


def test_lora_and_head_do_not_depend_on_the_adapter(subject):
    architecture = subject("minilm").architecture
    assert lora_parameters(architecture, 4) == 4 * 4 * 384
    assert head_parameters(architecture) == 384 * 3 + 3


def test_bad_decisions_are_refused(subject):
    architecture, blocks = subject("minilm").architecture, Blocks(adapter_width=4)
    for call, ranks in (
        (uplink_payload_bit, {"rank": 1}),
        (broadcast_payload_bit, {"ranks": [1]}),
    ):
        with pytest.raises(
            DecisionError, match=r"states must have one entry per layer \(6\), got 5"
        ):
            call(architecture, blocks, [LayerState.FROZEN] * 5, **ranks)
    every = [LayerState.FROZEN] * 6
    with pytest.raises(DecisionError, match="rank must not be negative, got -1"):
        uplink_payload_bit(architecture, blocks, every, rank=-1)
    with pytest.raises(DecisionError, match="rank must not be negative, got -2"):
        broadcast_payload_bit(architecture, blocks, every, ranks=[1, -2])
    with pytest.raises(DecisionError, match="at least one device, got none"):
        broadcast_payload_bit(architecture, blocks, every, ranks=[])
