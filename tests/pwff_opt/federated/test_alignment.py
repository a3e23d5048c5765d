"""The losses of alignment against plain transformers, by hand; and what a round leaves as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_language import save_decoder
from torch.nn import functional
from transformers import AutoModelForCausalLM

from pwff_opt.federated.exchange.exchange import Exchange
from pwff_opt.federated.learning.alignment import AXES, Dialogues, grouped
from pwff_opt.federated.model.backbone import Stack
from pwff_opt.federated.model.blocks import Tensors
from pwff_opt.federated.model.passes import Passes
from pwff_opt.federated.training.evaluator import FederatedEvaluator
from pwff_opt.runs import identity
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.schedule import Schedule

PEOPLE = (
    "nurse",
    "teacher",
    "driver",
    "farmer",
    "baker",
    "pilot",
    "lawyer",
    "cook",
    "judge",
    "poet",
)
PLACES = ("town", "village", "harbour", "forest", "market", "school")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model and preference pairs, both small."""
    folder = tmp_path_factory.mktemp("alignment")
    save_decoder(folder / "decoder")
    rows = ["prompt,chosen,rejected,axis"]
    for person in PEOPLE:
        for place in PLACES:
            prompt = f"The {person} came from the {place}."
            rows.append(f"{prompt},The {person} was home.,Stones are heavy.,helpfulness")
            rows.append(f"{prompt},The {person} was kind.,The {person} was cruel to us.,safety")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def scenario(
    small: Scenario,
    folder: Path,
    small_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Scenario:
    monkeypatch.setenv("PWFF_DATA", str(tmp_path / "data"))
    return replace(
        small,
        folder=str(folder),
        model=replace(small.model, source="decoder", pooling="model", max_tokens=40),
        data=replace(
            small.data,
            source="file",
            path="pairs.csv",
            train_per_device=6,
            validation_per_device=2,
            test_per_device=2,
        ),
        devices=tuple(
            replace(device, helpfulness=share)
            for device, share in zip(small.devices, (0.8, 0.5, 0.25), strict=True)
        ),
        training=replace(
            small.training, stage="alignment", local_steps=2, batch_size=2, validate_after=(3,)
        ),
        alignment=replace(
            small.alignment,
            kl=0.4,
            answer_tokens=5,
            answers=3,
            reward_model=str(small_model),
            reward_steps=3,
        ),
    )


def variant(scenario: Scenario, **alignment: Any) -> Scenario:
    return replace(scenario, alignment=replace(scenario.alignment, **alignment))


Made = Callable[[Scenario], FederatedEvaluator]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    def make(scenario: Scenario) -> FederatedEvaluator:
        return FederatedEvaluator(scenario, tmp_path / "checkpoints", workers=1)

    return make


def lora_blocks(evaluator: FederatedEvaluator, seed: int) -> Tensors:
    rng = torch.Generator().manual_seed(seed)
    own: Tensors = {}
    for name, (inputs, outputs) in evaluator.material.backbone.lora_shapes(2).items():
        own[f"lora.2.{name}.A"] = 0.4 * torch.randn(2, inputs, generator=rng)
        own[f"lora.2.{name}.B"] = 0.4 * torch.randn(outputs, 2, generator=rng)
    return own


def plain(folder: Path, own: Tensors, scale: float = 2.0) -> Any:
    """Return the model with LoRA in its weights."""
    model = AutoModelForCausalLM.from_pretrained(folder / "decoder").eval()
    with torch.no_grad():
        for name in ("q_proj", "v_proj"):
            if own:
                change = own[f"lora.2.{name}.B"] @ own[f"lora.2.{name}.A"]
                getattr(model.model.layers[2].self_attn, name).weight += scale * change
    return model


def answer_tokens(
    model: Any, held: Dialogues, sequence: int, temperature: float = 1.0
) -> torch.Tensor:
    """Return the log-probabilities of an answer's tokens, one sequence at a time."""
    ids = held.tokens.ids[held.tokens.offsets[sequence] : held.tokens.offsets[sequence + 1]]
    text = torch.from_numpy(ids)[None]
    start = int(held.starts[sequence])
    logs = (model(text).logits[0] / temperature).log_softmax(-1)
    return logs[torch.arange(start - 1, len(ids) - 1), text[0, start:]]


@pytest.mark.on_cpu
@pytest.mark.parametrize("optimiser", ["dpo", "modpo"])
def test_losses_of_pairs_are_those_by_hand(
    scenario: Scenario, folder: Path, made: Made, optimiser: str
) -> None:
    evaluator = made(variant(scenario, optimiser=optimiser))
    stage: Any = evaluator.material.stage
    held, rewards = stage._dialogues, evaluator.material.rewards
    devices = [0, 2]
    batches = [evaluator.material.shards[k].train[:3] for k in devices]
    blocks = [lora_blocks(evaluator, k) for k in devices]
    passes = Passes(evaluator.material.backbone, devices, Stack(blocks, [2.0, 2.0]))
    found = list(stage.losses(batches, passes))
    assert [loss.objective for loss in found] == [0, 1]
    reference = plain(folder, {})
    for loss in found:
        axis, place = loss.objective, 0
        for device, batch, own in zip(devices, batches, blocks, strict=True):
            policy = plain(folder, own)
            share = scenario.devices[device].helpfulness
            wish = (share, 1 - share)[axis]
            for example in batch:
                pair = held.pairs[example, axis]
                better, worse = held.chosen[pair], held.rejected[pair]
                ratio = [
                    answer_tokens(policy, held, s).sum() - answer_tokens(reference, held, s).sum()
                    for s in (better, worse)
                ]
                odds = 0.4 * (ratio[0] - ratio[1])
                if optimiser == "modpo":
                    prompt = held.prompts[held.prompt_of[better]]
                    assert held.prompt_of[better] == held.prompt_of[worse]
                    other = rewards[1 - axis].rewards(
                        [prompt] * 2, [held.answers[better], held.answers[worse]]
                    )
                    odds = (odds - (1 - wish) * (other[0] - other[1])) / wish
                expected = functional.softplus(-odds)
                assert float(loss.each[place]) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)
                place += 1
        assert place == len(loss.each)


def test_untrained_devices_have_the_loss_of_a_coin(scenario: Scenario, made: Made) -> None:
    evaluator = made(variant(scenario, optimiser="dpo"))
    passes = Passes(evaluator.material.backbone, [1], Stack([{}], [1.0]))
    stage: Any = evaluator.material.stage
    for loss in stage.losses([evaluator.material.shards[1].train], passes):
        torch.testing.assert_close(
            loss.each, torch.full_like(loss.each, float(np.log(2))), atol=1e-5, rtol=0
        )
    measured = stage.measures(evaluator.material.shards[1].test, passes)
    assert measured["accuracy"] == pytest.approx(0.5)
    assert measured["win_safety"] == measured["win_helpfulness"] == 0.5


@pytest.mark.on_cpu
def test_sampled_answers_are_learned_from_by_hand(
    scenario: Scenario, folder: Path, made: Made
) -> None:
    """Losses and gradients of a second step on the same answers, which have been drawn by another policy."""
    evaluator = made(variant(scenario, optimiser="grpo", clip=0.02, temperature=1.7))
    stage: Any = evaluator.material.stage
    held, settings = stage._dialogues, stage._settings
    batches = [evaluator.material.shards[k].train[:2] for k in (0, 1)]
    before = [lora_blocks(evaluator, k) for k in (0, 1)]
    after = [
        {
            name: (t + 0.05 * lora_blocks(evaluator, 7)[name]).requires_grad_(True)
            for name, t in own.items()
        }
        for own in before
    ]
    backbone = evaluator.material.backbone
    drawn = Passes(backbone, [0, 1], Stack(before, [2.0, 2.0]))
    lesson, ready = stage.lesson(batches, drawn, seed=1, round=1, step=0)
    again, _ = stage.lesson(batches, drawn, seed=1, round=1, step=0)
    np.testing.assert_array_equal(lesson.tokens.ids, again.tokens.ids)  # keyed, not by chance
    assert [len(own) for own in ready] == [6, 6]
    first = list(lesson.losses(ready, drawn))
    # At the policy that drew them, ratios are one, and the loss is the divergence less the advantage.
    second = list(lesson.losses(ready, Passes(backbone, [0, 1], Stack(after, [2.0, 2.0]))))
    answers = Dialogues(
        tokens=lesson.tokens, starts=lesson._starts, prompt_of=np.zeros(12, dtype=int),
        answers=("",) * 12, prompts=("",), prompt_tokens=lesson.tokens, pairs=held.pairs,
        chosen=held.chosen, rejected=held.rejected,
    )  # fmt: skip
    reference = plain(folder, {})
    cut = 0
    for number, (own, new) in enumerate(zip(before, after, strict=True)):
        old_model = plain(folder, own)
        new_model = plain(folder, {name: t.detach() for name, t in new.items()})
        for answer in ready[number]:
            old = answer_tokens(old_model, answers, answer, 1.7)
            ref = answer_tokens(reference, answers, answer, 1.7)
            for axis in range(len(AXES)):
                advantage = float(lesson._advantages[axis, answer])
                for losses, now in (
                    (first, old),
                    (second, answer_tokens(new_model, answers, answer, 1.7)),
                ):
                    ratio = (now - old).exp()
                    clipped = ratio.clamp(0.98, 1.02)
                    away = ref - now
                    gain = torch.minimum(ratio * advantage, clipped * advantage)
                    cut += int((gain != ratio * advantage).sum())
                    kl = away.exp() - away - 1
                    expected = (settings.kl * kl - gain).mean() / settings.answers
                    ours = float(losses[axis].each[answer])
                    assert ours == pytest.approx(float(expected), rel=2e-4, abs=1e-5)
    assert cut > 0  # or clipping is not tested
    total = sum(loss.each.sum() for loss in second)
    total.backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in after[0].values())


@pytest.mark.on_cpu
def test_a_step_makes_rewarded_answers_likelier(scenario: Scenario, made: Made) -> None:
    """The sign of the gradient, by finite differences: advantage up, probability up."""
    evaluator = made(variant(scenario, optimiser="grpo", kl=1e-6))
    stage: Any = evaluator.material.stage
    backbone = evaluator.material.backbone
    own = {n: t.requires_grad_(True) for n, t in lora_blocks(evaluator, 1).items()}
    passes = Passes(backbone, [0], Stack([own], [2.0]))
    lesson, ready = stage.lesson(
        [evaluator.material.shards[0].train[:2]], passes, seed=1, round=0, step=0
    )

    def likelihood() -> torch.Tensor:
        """Return the mean log-probability of answers, weighed by how good they are."""
        from pwff_opt.federated.learning.language import Scored

        with torch.no_grad():
            packed, hidden = passes.own(lesson.tokens, ready)
            scored = Scored.next_tokens(packed, lesson._starts)
            each = scored.sums(scored.log_probabilities(backbone, hidden)) / scored.counts
        return (each * lesson._advantages[0]).sum()

    loss = next(iter(lesson.losses(ready, passes)))
    loss.each.sum().backward()
    before = likelihood()
    with torch.no_grad():
        for tensor in own.values():
            assert tensor.grad is not None
            tensor -= 1e-2 * tensor.grad
    assert likelihood() > before


def test_advantages() -> None:
    rng = np.random.default_rng(1)
    rewards = rng.standard_normal(12) * 5 + 3
    rewards[4:8] = 2.5
    found = grouped(rewards, 4).reshape(3, 4)
    np.testing.assert_allclose(found.mean(1), 0, atol=1e-12)
    np.testing.assert_allclose(found[[0, 2]].std(1), 1)
    assert (found[1] == 0).all()  # nothing to choose between
    assert (np.argsort(found[0]) == np.argsort(rewards[:4])).all()


@pytest.mark.parametrize("optimiser", ["dpo", "modpo", "grpo"])
@pytest.mark.parametrize("reconcile", ["weighted", "mgda", "regularised"])
def test_rounds_train_and_leave_the_reference_alone(
    scenario: Scenario, made: Made, optimiser: str, reconcile: str
) -> None:
    evaluator = made(variant(scenario, optimiser=optimiser, reconcile=reconcile))
    backbone = evaluator.material.backbone
    weights = [layer._up.weight.clone() for layer in backbone.layers]  # type: ignore[attr-defined]
    done = evaluator.train(Schedule.parse("3x2:fpa", devices=3))
    assert done.status == "done", done.reason
    last = done.rounds[-1]
    assert len(last.accuracy) == 3
    assert all(0 < value < 1 for value in last.accuracy)
    told = {"conflict", "stationarity", "weight", "drift"}
    told |= {f"{what}_{axis}" for what in ("reward", "win", "preferred") for axis in AXES}
    assert set(last.notes) == told
    wishes = [device.helpfulness for device in scenario.devices]
    if reconcile == "weighted":
        np.testing.assert_allclose(last.notes["weight"], wishes, rtol=1e-5)
    else:
        assert max(abs(np.subtract(last.notes["weight"], wishes))) > 1e-4
    assert all(-1 <= cosine <= 1 for cosine in last.notes["conflict"])
    for layer, weight in zip(backbone.layers, weights, strict=True):
        assert torch.equal(layer._up.weight, weight)  # type: ignore[attr-defined]


@pytest.mark.parametrize("optimiser", ["modpo", "grpo"])
def test_killed_and_resumed_ends_the_same(
    scenario: Scenario, tmp_path: Path, optimiser: str
) -> None:
    changed = variant(scenario, optimiser=optimiser)
    schedule = Schedule.parse("3x2:fpa", devices=3)
    straight = FederatedEvaluator(changed, tmp_path / "a").train(schedule)
    FederatedEvaluator(changed, tmp_path / "b", workers=1).train(schedule.prefix(2))
    resumed = FederatedEvaluator(changed, tmp_path / "b").train(schedule)
    assert [entry.loss for entry in resumed.rounds] == [entry.loss for entry in straight.rounds]
    assert resumed.rounds[-1].accuracy == straight.rounds[-1].accuracy
    assert resumed.rounds[-1].notes == straight.rounds[-1].notes


def test_users_and_rewards_are_part_of_the_key(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    learning_key = identity.learning_key
    schedule = Schedule.parse("3x2:fpa", devices=3)
    key = learning_key(scenario, schedule)
    with monkeypatch.context() as other_rewards:
        other_rewards.setattr(identity, "REWARDS_VERSION", -1)
        assert learning_key(scenario, schedule) != key
    others = tuple(replace(device, helpfulness=0.4) for device in scenario.devices)
    assert learning_key(replace(scenario, devices=others), schedule) != key
    assert learning_key(variant(scenario, kl=0.2), schedule) != key
    plain_stage = replace(scenario.training, stage="pretraining")
    unaligned = replace(scenario, training=plain_stage)
    assert learning_key(replace(unaligned, devices=others), schedule) == learning_key(
        unaligned, schedule
    )


def test_drift_is_what_aggregation_takes_back(scenario: Scenario, made: Made) -> None:
    """By hand, from what devices learned in a round and what they have after it."""
    evaluator = made(variant(scenario, optimiser="dpo"))
    trainer = evaluator.trainer
    (decision,) = Schedule.parse("1x2:fpa", devices=3).rounds
    state = trainer.initial()
    before = [
        trainer._prepared(own, 2, (False, True, True), 0, k) for k, own in enumerate(state.devices)
    ]
    exchange = Exchange(trainer.scenario, 0, decision)
    learned = trainer._local_steps(
        {k: trainer.batches(0, k) for k in range(3)}, before, decision, exchange, 0
    )
    new, report = trainer.round(state, 0, decision, (False, True, True))
    sent = [name for name in before[0] if name.startswith("adapter.2.")]
    assert len(sent) == 4
    for device, own in enumerate(learned):
        away = [own.blocks[name] - new.devices[device][name] for name in sent]
        expected = torch.cat([t.flatten() for t in away]).norm()
        assert report.notes["drift"][device] == pytest.approx(float(expected), rel=1e-5)
        assert expected > 0
