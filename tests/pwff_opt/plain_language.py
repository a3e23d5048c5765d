"""A small decoder, and what the language stages are checked against: transformers, peft and torch alone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from plain_adapters import attach_adapters
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from pwff_opt.data.models import model_source
from pwff_opt.federated.exchange.exchange import Exchange, State
from pwff_opt.federated.model.adapters import transformer_layers
from pwff_opt.federated.model.backbone import lora_config
from pwff_opt.federated.model.blocks import Tensors, lora_scale
from pwff_opt.federated.model.workers import one_thread_each
from pwff_opt.federated.text.tokens import Tokens
from pwff_opt.federated.training.evaluator import FederatedEvaluator
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.schedule import RoundDecision, Schedule

Loss = Callable[[Any, int, Sequence[int]], torch.Tensor]
"""(model, device, batch) -> the loss that a device's step goes down."""


def save_decoder(folder: Path) -> None:
    """Write a random llama of three small layers, with MiniLM's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(model_source("minilm"))
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=30522,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=101,
        eos_token_id=102,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def row(tokens: Tokens, sequence: int) -> torch.Tensor:
    """Return the ids of a sequence, [1, token]."""
    return torch.from_numpy(tokens.ids[tokens.offsets[sequence] : tokens.offsets[sequence + 1]])[
        None
    ]


def answer_loss(model: Any, ids: torch.Tensor, start: int) -> torch.Tensor:
    """Return transformers' own loss of what follows ``start`` tokens of a sequence, alone in its batch."""
    labels = ids.clone()
    labels[:, :start] = -100
    loss: torch.Tensor = model(input_ids=ids, labels=labels).loss
    return loss


def answer_logs(model: Any, ids: torch.Tensor, start: int) -> torch.Tensor:
    """Return the log-probability of what follows ``start`` tokens of a sequence."""
    logits = model(input_ids=ids).logits[0, start - 1 : -1]
    return -functional.cross_entropy(logits, ids[0, start:], reduction="sum")


@cache
def _base(source: str) -> Any:
    kind = AutoModelForMaskedLM if _family(source) == "bert" else AutoModelForCausalLM
    return kind.from_pretrained(source, attn_implementation="eager")


def _family(source: str) -> str:
    return "bert" if AutoConfig.from_pretrained(source).model_type == "bert" else "llama"


def plain_device(
    scenario: Scenario, start: Tensors, rank: int
) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """Return a peft model that holds the tensors of one device, and its parameters by name."""
    peft = scenario.peft
    source = model_source(scenario.model.source, folder=scenario.folder)
    model, family = copy.deepcopy(_base(source)), _family(source)
    adapters = attach_adapters(model, peft.adapter_width) if peft.adapter_width else []
    owner, attribute = transformer_layers(model)
    layers = getattr(owner, attribute)
    with torch.no_grad():
        for name, tensor in start.items():
            if name.startswith("delta."):
                _, layer, projection = name.split(".")
                own = layers[int(layer)]
                own = own.attention.self if family == "bert" else own.self_attn
                getattr(own, projection).weight += tensor
    kinds = {"lora": rank, "common": peft.common_lora_rank}
    kinds = {kind: size for kind, size in kinds.items() if size}
    for kind, size in kinds.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            config = lora_config(family, size, lora_scale(peft, size))
            inject_adapter_in_model(config, model, kind)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter(list(kinds))
    model.requires_grad_(False)
    model.eval()
    named: dict[str, torch.nn.Parameter] = {}
    for number, layer in enumerate(layers):
        if adapters:
            adapters[number].enabled = f"adapter.{number}.up.bias" in start
        for name, parameter in layer.named_parameters():
            if ".lora_" in name:
                projection, factor, kind, _ = name.split(".")[-4:]
                ours = f"{kind}.{number}.{projection}.{factor.removeprefix('lora_')}"
            elif name.startswith("adapter."):
                ours = f"adapter.{number}.{name.removeprefix('adapter.')}"
            else:
                continue
            if ours in start:
                named[ours] = parameter
    assert {name for name in start if not name.startswith("delta.")} == named.keys()
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(start[name])
    return model, named


def plain_steps(
    scenario: Scenario,
    evaluator: FederatedEvaluator,
    start: Tensors,
    number: int,
    device: int,
    decision: RoundDecision,
    loss: Loss,
    *,
    dtype: torch.dtype,
    turned: bool,
) -> Tensors:
    """Train one device for a round, with the examples of a batch in order or ``turned``; return blocks."""
    exchange = Exchange(scenario, number, decision)
    model, named = plain_device(scenario, start, decision.ranks[device])
    model.to(dtype)
    for name, parameter in named.items():
        parameter.requires_grad_(exchange.learns(name))
    learned = [parameter for parameter in named.values() if parameter.requires_grad]
    if not learned:
        return start
    optimiser = torch.optim.AdamW(
        learned, lr=scenario.training.learning_rate, weight_decay=scenario.training.weight_decay
    )
    anchors = {name: p.detach().clone() for name, p in named.items() if exchange.sends(name)}
    for batch in evaluator.trainer.batches(number, device):
        value = loss(model, device, batch[:: -1 if turned else 1].tolist())
        for name, anchor in anchors.items():
            if named[name].requires_grad and scenario.aggregation.proximal:
                distance = (named[name] - anchor).square().sum()
                value = value + 0.5 * scenario.aggregation.proximal * distance
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    return start | {name: p.detach().clone().float() for name, p in named.items()}


def plain_rounds(
    scenario: Scenario,
    evaluator: FederatedEvaluator,
    schedule: Schedule,
    loss: Loss,
    *,
    dtype: torch.dtype = torch.float32,
    turned: bool = False,
) -> Iterator[State]:
    """Train one device after another; yield the state after every round.

    Only what each device does on its own is done without the trainer; the exchange has tests of its own.
    """
    trainer = evaluator.trainer
    state = trainer.initial()
    for number, (decision, present) in enumerate(
        zip(schedule.rounds, schedule.present, strict=True)
    ):
        before = [
            trainer._prepared(own, decision.ranks[k], present, number, k)
            for k, own in enumerate(state.devices)
        ]
        after = [
            plain_steps(
                scenario, evaluator, own, number, k, decision, loss, dtype=dtype, turned=turned
            )
            for k, own in enumerate(before)
        ]
        state, _ = Exchange(scenario, number, decision).merge(
            before,
            after,
            [True] * len(before),
            len(before),
            [1.0] * len(before),
            state,
            public=trainer._public(state.sent, decision, present, number),
            fresh=lambda k, layer, name, at=(decision, number + 1): trainer._fresh_a(  # type: ignore[misc]
                at[0].ranks[k], layer, name, at[1], k
            ),
        )
        yield state


def block_of(name: str) -> str:
    kind, layer = name.replace("delta.", "lora.").split(".")[:2]
    return kind if kind == "head" else f"{kind}.{layer}"


def distances(a: Tensors, b: Tensors) -> dict[str, float]:
    """Return the relative error of every block (an adapter, a layer's LoRA, the head) in the Euclidean norm.

    What aggregation has left in frozen weights counts with the LoRA that it is a remainder of.
    """
    assert a.keys() == b.keys()
    blocks: dict[str, list[str]] = {}
    for name in a:
        blocks.setdefault(block_of(name), []).append(name)
    errors = {}
    for block, names in blocks.items():
        ours, theirs = (torch.cat([x[name].flatten() for name in names]) for x in (a, b))
        errors[block] = float((ours - theirs).norm() / theirs.norm())
    return errors


def assert_agree(ours: State, plain: State, turned: State, exact: State, *, to: State) -> None:
    """Assert that every device's blocks are ``to``'s as far as float32 determines them.

    AdamW divides a gradient by its own size, so numbers whose gradient is all rounding go either way.  How
    far is told by plain training alone: in float32 with the examples of a batch in order (``plain``) and
    ``turned``, against float64 (``exact``).  The bound is 1e-5, or what two trainings as far from float64
    as these may be apart: the sum of both distances; from float64 itself, the larger one.  A block beyond
    may owe it to single numbers, at most a twentieth, in which plain training is further from float64 than
    1e-6 of the tensor's norm: then the others must keep to 1e-5, and all to 5e-5.
    """
    for device, own in enumerate(ours.devices):
        truth, goal = exact.devices[device], to.devices[device]
        others = [state.devices[device] for state in (plain, turned)]
        rounding = [distances(other, truth) for other in others]
        unsure = {
            name: torch.stack([(other[name] - tensor).abs() for other in others])
            .gt(1e-6 * tensor.norm())
            .any(0)
            for name, tensor in truth.items()
        }
        sure = {name: torch.where(unsure[name], goal[name], tensor) for name, tensor in own.items()}
        rest = distances(sure, goal)
        for block, error in distances(own, goal).items():
            known = [distance[block] for distance in rounding]
            if error <= max(1e-5, max(known) if to is exact else sum(known)):
                continue
            assert error <= 5e-5, (device, block, error)
            assert rest[block] <= 1e-5, (device, block, error, rest[block])
            excused = torch.cat([m.flatten() for n, m in unsure.items() if block_of(n) == block])
            assert excused.sum() <= max(1, excused.numel() / 20), (device, block, error)


def assert_equals_plain(
    scenario: Scenario,
    evaluator: FederatedEvaluator,
    schedule: Schedule,
    loss: Loss,
    *,
    to_float64: bool = False,
) -> State:
    """Train by the trainer and plainly, both with one thread a product; return the trainer's state.

    They must agree (:func:`assert_agree`), or with ``to_float64`` the trainer and plain training in float64.
    """
    ours = evaluator.trainer.initial()
    with one_thread_each():
        for number, (plain, turned, exact) in enumerate(
            zip(
                plain_rounds(scenario, evaluator, schedule, loss),
                plain_rounds(scenario, evaluator, schedule, loss, turned=True),
                plain_rounds(scenario, evaluator, schedule, loss, dtype=torch.float64),
                strict=True,
            )
        ):
            decision, present = schedule.rounds[number], schedule.present[number]
            ours, _ = evaluator.trainer.round(ours, number, decision, present)
            assert_agree(ours, plain, turned, exact, to=exact if to_float64 else plain)
    return ours
