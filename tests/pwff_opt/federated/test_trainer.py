"""The trainer against plain peft, one device after another, and against itself run otherwise."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from plain_adapters import attach_adapters
from plain_language import assert_agree, distances

from pwff_opt.errors import DecisionError
from pwff_opt.federated.exchange.exchange import Exchange, State
from pwff_opt.federated.model.adapters import pool_by_mean, transformer_layers
from pwff_opt.federated.model.backbone import Backbone, load_classifier, lora_config
from pwff_opt.federated.model.blocks import Tensors, fresh_lora, lora_scale, resize_lora
from pwff_opt.federated.text.tokens import Packed
from pwff_opt.federated.training.checkpoint import load_checkpoint, save_checkpoint
from pwff_opt.federated.training.evaluator import FederatedEvaluator
from pwff_opt.planning.demand import CostModel
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.participation import participants
from pwff_opt.scenario.schedule import RoundDecision, Schedule


def same(a: State, b: State) -> None:
    for own, other in zip(a.devices, b.devices, strict=True):
        assert own.keys() == other.keys()
        for name, tensor in own.items():
            assert torch.equal(tensor, other[name]), name


@cache
def plain_base(source: str) -> torch.nn.Module:
    model: torch.nn.Module = load_classifier(source, classes=3)
    pool_by_mean(model)
    return model


def plain_device(
    scenario: Scenario, start: Tensors, rank: int
) -> tuple[torch.nn.Module, dict[str, torch.nn.Parameter]]:
    """Return an ordinary peft model that holds the tensors of one device, and its parameters by name."""
    peft = scenario.peft
    model = copy.deepcopy(plain_base(scenario.model.source))
    adapters = attach_adapters(model, peft.adapter_width) if peft.adapter_width else []
    parent, attribute = transformer_layers(model)
    layers = getattr(parent, attribute)
    with torch.no_grad():
        for name, tensor in start.items():
            if name.startswith("delta."):
                _, layer, projection = name.split(".")
                getattr(layers[int(layer)].attention.self, projection).weight += tensor
    kinds = {"lora": rank, "common": peft.common_lora_rank}
    kinds = {kind: size for kind, size in kinds.items() if size}
    for kind, size in kinds.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            config = lora_config("bert", size, lora_scale(peft, size))
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
                projection, factor = name.split(".")[2], name.split(".lora_")[1][0]
                kind = name.split(".")[-2]
                ours = f"{kind}.{number}.{projection}.{factor}"
            elif name.startswith("adapter."):
                ours = f"adapter.{number}.{name.removeprefix('adapter.')}"
            else:
                continue
            if ours in start:
                named[ours] = parameter
            else:
                assert name.startswith("adapter.") or factor == "A" or not parameter.any()
    for part, parameter in model.classifier.named_parameters():
        named[f"head.{part}"] = parameter
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
    *,
    dtype: torch.dtype = torch.float32,
    turned: bool = False,
) -> Tensors:
    """Train one device for a round with plain transformers, peft and torch; return its blocks.

    With the examples of a batch in order, or ``turned``.
    """
    trainer, exchange = evaluator.trainer, Exchange(scenario, number, decision)
    model, named = plain_device(scenario, start, decision.ranks[device])
    model.to(dtype)
    for name, parameter in named.items():
        parameter.requires_grad_(exchange.learns(name))
    optimiser = torch.optim.AdamW(
        [{"params": [p], "lr": 0.01} for p in named.values() if p.requires_grad],
        weight_decay=scenario.training.weight_decay,
    )
    anchors = {name: p.detach().clone() for name, p in named.items() if exchange.sends(name)}
    for batch in trainer.batches(number, device):
        batch = batch[:: -1 if turned else 1]
        tokens = evaluator.material.stage.tokens
        texts = [tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]] for i in batch]
        ids = torch.zeros(len(batch), max(map(len, texts)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)], mask[row, : len(text)] = torch.from_numpy(text), 1
        labels = torch.from_numpy(evaluator.material.labels[batch])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        for name, anchor in anchors.items():
            if named[name].requires_grad and scenario.aggregation.proximal:
                distance = (named[name] - anchor).square().sum()
                loss = loss + 0.5 * scenario.aggregation.proximal * distance
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return start | {name: p.detach().clone().float() for name, p in named.items()}


def plain_rounds(
    scenario: Scenario,
    evaluator: FederatedEvaluator,
    schedule: Schedule,
    **how: Any,
) -> Iterator[State]:
    """Train one device after another by ``plain_steps``; yield the state after every round."""
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
            plain_steps(scenario, evaluator, start, number, device, decision, **how)
            for device, start in enumerate(before)
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


def with_tables(scenario: Scenario, peft: dict[str, Any], table: dict[str, Any]) -> Scenario:
    return replace(
        scenario,
        peft=replace(scenario.peft, **peft),
        aggregation=replace(scenario.aggregation, **table),
    )


@pytest.mark.parametrize(
    ("text", "peft", "table"),
    [
        ("3x2:aaa", {}, {}),
        ("3x4:fpa", {"head": "shared"}, {}),
        ("3x0:fap", {}, {}),
        ("3x0:fff", {"head": "shared"}, {}),
        ("3x0,2,4:paf", {}, {}),
        ("1x2:ffa 2x2:pfa", {"head": "shared"}, {}),
        ("1x2:aaa 1x4:ffa 1x2:fpf", {}, {}),
        ("1x4:aaa 2x2:ffa", {"lora_scaling": "rslora"}, {}),
        ("3x2:fpa", {"adapter_width": 0, "common_lora_rank": 3}, {}),
        ("3x0:fpa", {"common_lora_rank": 3}, {}),
        ("2x0:faa 1x0:ffa", {"adapter_width": 0}, {}),
        ("3x2:paa", {"head": "shared"}, {"proximal": 0.5}),
        ("3x2:aaf", {}, {"lora": "fedit"}),
        ("3x2:faa", {}, {"lora": "ffa"}),
        ("3x2:faa", {}, {"lora": "rolora", "adapter": "personal"}),
        ("3x2:paa", {"lora_scaling": "standard"}, {"lora": "fedex"}),
        ("3x2,4,4:aaa", {"lora_scaling": "rslora"}, {"lora": "flora"}),
    ],
)
def test_equals_plain_peft_one_device_after_another(
    small: Scenario, tmp_path: Path, text: str, peft: dict[str, Any], table: dict[str, Any]
) -> None:
    """Only what each device does on its own is done twice; the exchange has tests of its own."""
    mixed = replace(small, decisions=replace(small.decisions, rank_scope="per_device"))
    scenario = with_tables(mixed if "," in text else small, peft, table)
    evaluator = FederatedEvaluator(scenario, tmp_path)
    schedule = Schedule.parse(text, devices=3)
    ours = evaluator.trainer.initial()
    for number, (plain, turned, exact) in enumerate(
        zip(
            plain_rounds(scenario, evaluator, schedule),
            plain_rounds(scenario, evaluator, schedule, turned=True),
            plain_rounds(scenario, evaluator, schedule, dtype=torch.float64),
            strict=True,
        )
    ):
        decision, present = schedule.rounds[number], schedule.present[number]
        ours, _ = evaluator.trainer.round(ours, number, decision, present)
        assert_agree(ours, plain, turned, exact, to=plain)


@pytest.mark.parametrize("wrong", [math.nan, 1.0002])
def test_agreement_notices_one_wrong_block(wrong: float) -> None:
    def state(factor: float = 1.0) -> State:
        generator = torch.Generator().manual_seed(1)
        names = ("adapter.0.up.weight", "lora.0.query.A", "lora.1.query.A")
        blocks = {name: torch.randn(8, 8, generator=generator) for name in names}
        blocks["lora.1.query.A"] = blocks["lora.1.query.A"] * factor
        return replace(empty, devices=(blocks,))

    empty = State(devices=(), moments={}, residuals=())
    good = state()
    assert_agree(state(), good, good, good, to=good)
    with pytest.raises(AssertionError, match=r"lora\.1"):
        assert_agree(state(wrong), good, good, good, to=good)


def test_default_exchange_averages_adapters_and_shared_heads_and_nothing_else(
    small: Scenario, tmp_path: Path
) -> None:
    scenario = with_tables(small, {"head": "shared"}, {})
    evaluator = FederatedEvaluator(scenario, tmp_path)
    decision = Schedule.parse("1x2:fpa", devices=3).rounds[0]
    before = [
        evaluator.trainer._prepared(own, 2, (False, True, True), 0, k)
        for k, own in enumerate(evaluator.trainer.initial().devices)
    ]
    after = [plain_steps(scenario, evaluator, own, 0, k, decision) for k, own in enumerate(before)]
    state, _ = evaluator.trainer.round(
        evaluator.trainer.initial(), 0, decision, (False, True, True)
    )
    for device in range(3):
        for name, tensor in state.devices[device].items():
            shared = name.startswith(("head.", "adapter.2."))
            mean = torch.stack([own[name] for own in after]).mean(0)
            expected = mean if shared else after[device][name]
            assert (tensor - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.fixture
def run(small: Scenario, tmp_path: Path) -> Callable[..., tuple[State, Any]]:
    def go(text: str = "1x2:fpa 2x4:paa", **options: Any) -> tuple[State, Any]:
        scenario = options.pop("scenario", small)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        evaluator = FederatedEvaluator(scenario, folder, **options)
        return evaluator._trained(Schedule.parse(text, devices=len(scenario.devices)))

    return go


def test_workers_change_nothing(run: Callable[..., Any]) -> None:
    one, three = run(workers=1), run(workers=3)
    same(one[0], three[0])
    assert one[1] == three[1]


def test_cores_of_the_process_change_nothing(
    run: Callable[..., Any], small: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who trains together goes by the machine: a run that is moved to one core goes on the same."""
    before, there = run(), FederatedEvaluator(small, tmp_path / "other").trainer._cores
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    after = run()
    same(before[0], after[0])
    assert before[1] == after[1]
    assert FederatedEvaluator(small, tmp_path / "other").trainer._cores == there


def test_the_cache_changes_nothing_but_rounding(small: Scenario, run: Callable[..., Any]) -> None:
    without = replace(small, training=replace(small.training, feature_cache_byte=0.0))
    cached, plain = run("3x2:ffa"), run("3x2:ffa", scenario=without)
    for own, other in zip(cached[0].devices, plain[0].devices, strict=True):
        assert max(distances(own, other).values()) <= 1e-5


def test_another_seed_is_another_training(small: Scenario, run: Callable[..., Any]) -> None:
    other = replace(small, seeds=replace(small.seeds, training=2))
    assert run()[1] != run(scenario=other)[1]
    same(run()[0], run()[0])


def test_goes_on_from_the_last_checkpoint_bit_for_bit(small: Scenario, tmp_path: Path) -> None:
    schedule = Schedule.parse("1x2:fpa 2x4:paa", devices=3)
    whole = FederatedEvaluator(small, tmp_path / "whole")
    expected = whole._trained(schedule)
    assert whole.device_rounds == 9
    FederatedEvaluator(small, tmp_path / "parts")._trained(schedule.prefix(2))
    rest = FederatedEvaluator(small, tmp_path / "parts")
    same(rest._trained(schedule)[0], expected[0])
    assert rest.device_rounds == 3  # the third round only
    other = rest._trained(Schedule.parse("1x2:fpa 2x0:faf", devices=3))
    assert rest.device_rounds == 3 + 6  # the first round is shared
    assert other[1][0] == expected[1][0]
    # A checkpoint cut short counts for nothing: its round is trained again, to the same end.
    newest = max((tmp_path / "parts").iterdir(), key=lambda path: path.stat().st_mtime)
    for path in (tmp_path / "parts").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert newest.stat().st_size == 100
    again = FederatedEvaluator(small, tmp_path / "parts")
    same(again._trained(schedule)[0], expected[0])
    assert again.device_rounds == 9


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("head", ["personal", "shared"])
def test_measured_upload_is_the_payload_of_the_cost_model(
    small: Scenario, tmp_path: Path, dtype: Any, head: Any
) -> None:
    scenario = replace(small, peft=replace(small.peft, upload_dtype=dtype, head=head))
    evaluator = FederatedEvaluator(scenario, tmp_path)
    costs = CostModel(scenario, evaluator.workload)
    schedule = Schedule.parse("1x2:fpa 1x0:aaa 1x2:fff", devices=3)
    rounds = evaluator.train(schedule).rounds
    payload = costs.demand(schedule).payload_bit
    assert [list(entry.uplink_bit) for entry in rounds] == payload.tolist()
    state, _ = evaluator._trained(schedule)
    shared = state.devices[0]["adapter.0.up.weight"]
    assert all(own["adapter.0.up.weight"] is shared for own in state.devices)
    assert torch.equal(shared, shared.to(getattr(torch, dtype)).float())


def test_only_marked_rounds_are_validated(small: Scenario, tmp_path: Path) -> None:
    every = FederatedEvaluator(small, tmp_path / "a").train(Schedule.parse("3x2:ffa", devices=3))
    marked = replace(small, training=replace(small.training, validate_after=(1, 3)))
    some = FederatedEvaluator(marked, tmp_path / "b").train(Schedule.parse("3x2:ffa", devices=3))
    assert [bool(entry.accuracy) for entry in some.rounds] == [True, False, True]
    assert some.rounds[2].accuracy == every.rounds[2].accuracy
    assert [entry.loss for entry in some.rounds] == [entry.loss for entry in every.rounds]


def test_a_training_that_diverges_is_named_and_recorded(small: Scenario, tmp_path: Path) -> None:
    wild = replace(small, training=replace(small.training, learning_rate=1e30))
    evaluation = FederatedEvaluator(wild, tmp_path).train(Schedule.parse("3x2:aaa", devices=3))
    assert evaluation.status == "failed"
    assert "round 1: losses and blocks must stay finite" in evaluation.reason
    assert (
        "diverged on device 0, 1, 2 of 3; lower training.learning_rate (1e+30)" in evaluation.reason
    )
    assert "training.head_learning_rate" in evaluation.reason
    assert evaluation.rounds == ()


@pytest.mark.parametrize("size", [1, 3])
def test_a_diverged_device_spoils_no_other(
    small: Scenario, tmp_path: Path, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Device 1 holds a NaN: it is named, its round is undone, and the others go on without it."""
    evaluator = FederatedEvaluator(small, tmp_path)
    trainer = evaluator.trainer
    trainer._most_together, trainer._cores = size, 1
    (decision,) = Schedule.parse("1x2:paa", devices=3).rounds
    present = (True,) * 3
    start, _ = trainer.round(trainer.initial(), 0, decision, present)
    own = start.devices[1]
    bad = own | {"lora.1.query.B": torch.full_like(own["lora.1.query.B"], torch.nan)}
    sick = replace(start, devices=(start.devices[0], bad, start.devices[2]))
    state, report = trainer.round(sick, 1, decision, present)
    assert report.diverged == (1,)
    assert (
        "round 2: losses and blocks must stay finite, but diverged on device 1 of 3" in caplog.text
    )
    assert [math.isnan(loss) for loss in report.loss] == [False, True, False]
    assert report.uplink_bit[1] == 0 < report.uplink_bit[0]
    well, _ = trainer.round(start, 1, decision, present)
    for device in (0, 2):
        for name, tensor in state.devices[device].items():
            if name.startswith("lora."):
                torch.testing.assert_close(tensor, well.devices[device][name], rtol=1e-5, atol=1e-7)
            assert torch.isfinite(tensor).all()
    name = "adapter.2.up.weight"
    assert state.devices[1][name] is state.devices[0][name]  # it hears what the others made
    assert state.devices[1]["adapter.0.up.weight"] is own["adapter.0.up.weight"]  # personal: undone
    # and it is written down, and read again
    save_checkpoint(tmp_path / "x.safetensors", state, [report])
    loaded = load_checkpoint(tmp_path / "x.safetensors")
    assert loaded is not None
    assert loaded[1][0].diverged == (1,)
    assert math.isnan(loaded[1][0].loss[1])


def test_out_of_memory_cuts_the_mini_batch_and_goes_on(
    small: Scenario, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    expected = run("2x2:faa")
    through = Backbone.run

    def short_of_memory(self: Backbone, packed: Packed, *rest: Any, **how: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and max(packed.sequence_counts) > 1:
            torch.empty(10**15)  # what torch itself says when memory runs out
        return through(self, packed, *rest, **how)

    monkeypatch.setattr(Backbone, "run", short_of_memory)
    cut = run("2x2:faa")
    assert "mini-batches are now cut into" in caplog.text
    for own, other in zip(cut[0].devices, expected[0].devices, strict=True):
        assert max(distances(own, other).values()) <= 1e-5


def test_memory_that_never_suffices_is_an_error(
    small: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backbone, "classify", lambda *_: torch.empty(10**15))
    evaluation = FederatedEvaluator(small, tmp_path).train(Schedule.parse("1x2:faa", devices=3))
    assert evaluation.status == "failed"
    assert "one example a device must fit into memory" in evaluation.reason


def test_only_those_drawn_take_part(small: Scenario, tmp_path: Path) -> None:
    scenario = with_tables(small, {"head": "shared"}, {"devices_per_round": 2})
    trainer = FederatedEvaluator(scenario, tmp_path).trainer
    (decision,) = Schedule.parse("1x2:paa", devices=3).rounds
    state, report = trainer.round(trainer.initial(), 0, decision, (True,) * 3)
    here = participants(scenario, 0)
    assert sum(here) == 2
    assert [bits > 0 for bits in report.uplink_bit] == list(here)
    assert [not math.isnan(loss) for loss in report.loss] == list(here)
    absent = here.index(False)
    assert not state.devices[absent]["lora.0.query.B"].any()
    for name in ("adapter.2.up.weight", "head.weight"):
        assert state.devices[absent][name] is state.devices[here.index(True)][name]
    drawn = [participants(scenario, number) for number in range(30)]
    assert len(set(drawn)) == 3


def test_unknown_ranks_are_refused(small: Scenario, tmp_path: Path) -> None:
    evaluator = FederatedEvaluator(small, tmp_path)
    with pytest.raises(DecisionError, match=r"one of decisions\.ranks \(2, 4\) or 0, got 16"):
        evaluator.train("1x16:fpa")


@pytest.mark.parametrize(("old", "new"), [(2, 4), (2, 2), (4, 2), (8, 1)])
def test_a_change_of_rank_keeps_what_was_learned(old: int, new: int) -> None:
    generator = torch.Generator().manual_seed(old * 10 + new)
    a = torch.randn(old, 20, generator=generator)
    b = torch.randn(30, old, generator=generator)
    fresh = fresh_lora(0, new, {"query": (20, 30)}, seed=1, round=0, device=0)["lora.0.query.A"]
    new_a, new_b = resize_lora(a, b, fresh)
    assert new_a.shape == (new, 20)
    assert new_b.shape == (30, new)
    u, s, v = np.linalg.svd((b @ a).numpy())
    best = (u[:, :new] * s[:new]) @ v[:new] if new < old else (b @ a).numpy()
    np.testing.assert_allclose((new_b @ new_a).numpy(), best, atol=1e-4)


def test_no_direction_dies_when_the_rank_shrinks() -> None:
    """What nothing was learned in is drawn anew: zero in both factors, it would have no gradient ever."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(6, 20, generator=generator)
    fresh = fresh_lora(0, 4, {"query": (20, 30)}, seed=1, round=0, device=0)["lora.0.query.A"]
    new_a, new_b = resize_lora(a, torch.zeros(30, 6), fresh)  # not drawn to take part yet, say
    assert torch.equal(new_a, fresh)
    assert new_b.shape == (30, 4)
    assert not new_b.any()
    b = torch.cat([torch.randn(30, 1, generator=generator), torch.zeros(30, 5)], dim=1)
    new_a, new_b = resize_lora(a, b, fresh)  # grown from rank 1 while it was frozen
    torch.testing.assert_close(new_b @ new_a, b @ a)
    assert torch.equal(new_a[1:], fresh[1:])
    assert not new_b[:, 1:].any()


def test_a_rank_beyond_the_matrix_stays_the_rank() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(64, 32, generator=generator), torch.randn(32, 64, generator=generator)
    fresh = fresh_lora(0, 40, {"query": (32, 32)}, seed=1, round=0, device=0)["lora.0.query.A"]
    new_a, new_b = resize_lora(a, b, fresh)
    assert (new_a.shape, new_b.shape) == ((40, 32), (32, 40))
    torch.testing.assert_close(new_b @ new_a, b @ a, rtol=1e-4, atol=1e-4)


def test_slices_are_cut_off_where_a_factor_is_common() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(4, 20, generator=generator), torch.randn(30, 4, generator=generator)
    new_a, new_b = resize_lora(a, b, torch.zeros(2, 20), stretch=0.5, by_slices=True)
    assert torch.equal(new_a, a[:2])
    assert torch.equal(new_b, 0.5 * b[:, :2])


def test_checkpoints_make_room_and_nothing_is_learned_otherwise(
    small: Scenario, tmp_path: Path
) -> None:
    schedules = [Schedule.parse(f"3x2:{states}", devices=3) for states in ("aaa", "ffa", "fpa")]
    free = FederatedEvaluator(small, tmp_path / "free")
    for schedule in schedules:
        free.train(schedule)
    every = sorted((tmp_path / "free").glob("*.safetensors"))
    limit = 4.5 * max(path.stat().st_size for path in every)
    scenario = replace(small, training=replace(small.training, checkpoint_byte=limit))
    tight = FederatedEvaluator(scenario, tmp_path / "tight")
    for schedule in schedules:
        assert tight.train(schedule).rounds == free.train(schedule).rounds
        tight.test(schedules[0])  # in use, so others go first
    left = sorted(path.name for path in (tmp_path / "tight").glob("*.safetensors"))
    assert 3 <= len(left) < len(every) == 9
    assert set(left) <= {path.name for path in every}
    assert sum(path.stat().st_size for path in (tmp_path / "tight").iterdir()) <= limit
    assert [tight.test(s) for s in schedules] == [free.test(s) for s in schedules]
