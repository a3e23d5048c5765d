"""What a scenario's devices learn from: data, dealt out and encoded, and the model that they share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from pwff_opt.costs import Workload, attention_span, model_architecture
from pwff_opt.data.conversations import (
    AXES,
    Preferences,
    load_demonstrations,
    load_preferences,
)
from pwff_opt.data.corpora import Corpus, load_corpus, load_texts
from pwff_opt.data.models import data_folder, model_config, model_source
from pwff_opt.data.partition import Shard, partition, partition_preferences
from pwff_opt.errors import DataError
from pwff_opt.federated.learning import Causal, Classification, Language, Masked, Stage
from pwff_opt.federated.learning.alignment import Aligned, Dialogues
from pwff_opt.federated.learning.rewards import Pairs, Reader, RewardModel
from pwff_opt.federated.model.attention import Window
from pwff_opt.federated.model.backbone import Backbone, pad_token_id
from pwff_opt.federated.model.workers import Workers
from pwff_opt.federated.text.encoding import (
    Encoded,
    encode_answers,
    encode_masked,
    encode_prompts,
    encode_texts,
)
from pwff_opt.federated.text.tokens import Indices, Tokens, tokenise
from pwff_opt.registry import FAMILIES, STAGES
from pwff_opt.rng import stream
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.files import resolved

FEW_PAIRS = 50
"""Held-out pairs of an axis, below which their share that is told right has a standard error of 0.07."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What the data are like, to be told before the work begins."""

    sentence: str
    baseline: float | None = None
    """Accuracy that takes no learning; None where none is known."""
    baseline_per_device: float | None = None
    """Where it differs between devices, each by its own."""
    baseline_name: str = ""
    notes: tuple[str, ...] = ()
    """More sentences."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Material:
    """All that training needs but the schedule."""

    source: str
    """Folder or hub name of the model."""
    backbone: Backbone
    stage: Stage
    shards: Sequence[Shard]
    """[device]: of the stage's examples."""
    workload: Workload
    summary: Summary
    labels: NDArray[np.int64] | None = None
    """[example], of classification."""
    class_names: tuple[str, ...] | None = None
    rewards: tuple[RewardModel, ...] = ()
    """One an axis, of alignment."""
    origin: str = ""
    """What it was made from."""

    @classmethod
    def of(
        cls, scenario: Scenario, like: Material | None = None, *, workers: int | None = None
    ) -> Material:
        """Load model and data of a scenario, and deal these out; or take them from ``like``.

        What ``like`` has been made from may be the same but for what devices do with it: then it is used
        again, and only the losses of an alignment are made anew.  ``workers``: reward models trained side
        by side; all cores if none is given.

        Raises
        ------
        DataError, ModelError
            They are not there, cannot be read, or do not suffice.
        """
        origin = _origin(scenario)
        if like is None or like.origin != origin:
            made: Material = STAGES[scenario.training.stage].material(scenario, workers)
            return replace(made, origin=origin)
        if isinstance(like.stage, Aligned):
            return replace(like, stage=like.stage.by(scenario))
        return like


def classification(scenario: Scenario, _: int | None) -> Material:
    """Return the material of labelled texts; see :meth:`Material.of`."""
    corpus = load_corpus(scenario.data, folder=Path(scenario.folder))
    shards, used = _dealt(corpus, scenario)
    source, tokenizer, pad_id = _model(scenario)
    tokens = tokenise(
        [corpus.texts[index] for index in used],
        tokenizer,
        max_tokens=scenario.model.max_tokens,
        pad_id=pad_id,
    )
    labels = corpus.labels[used]
    backbone = _backbone(scenario, source, classes=len(corpus.class_names))
    return Material(
        source=source,
        backbone=backbone,
        stage=Classification(backbone, tokens, labels),
        shards=shards,
        workload=Workload(
            classes=len(corpus.class_names),
            **_lengths(tokens, [shard.train for shard in shards], scenario, backbone.family),
        ),
        summary=_classes_summary(corpus, labels, shards),
        labels=labels,
        class_names=corpus.class_names,
    )


def pretraining(scenario: Scenario, _: int | None) -> Material:
    """Return the material of texts; see :meth:`Material.of`."""
    corpus = load_texts(scenario.data, folder=Path(scenario.folder))
    shards, used = _dealt(corpus, scenario)
    source, tokenizer, pad_id = _model(scenario)
    backbone = _backbone(scenario, source, classes=None)
    texts = [corpus.texts[index] for index in used]
    how: dict[str, Any] = {"max_tokens": scenario.model.max_tokens, "pad_id": pad_id}
    if not FAMILIES[backbone.family].causal:
        found = encode_masked(texts, tokenizer, seed=scenario.seeds.data, **how)
        stage: Language = Masked(backbone, found.tokens, found.targets)
        notes = _cuts(scenario, len(texts), 0, found.texts_cut)
    else:
        encoded = encode_texts(texts, tokenizer, **how)
        stage = Causal(backbone, encoded.tokens, encoded.answer_start)
        notes = _encoded_cuts(scenario, encoded)
    return _language(scenario, source, stage, shards, corpus, "texts", notes)


def instruction(scenario: Scenario, _: int | None) -> Material:
    """Return the material of prompts with answers; see :meth:`Material.of`."""
    corpus = load_demonstrations(scenario.data, folder=Path(scenario.folder))
    shards, used = _dealt(corpus, scenario)
    source, tokenizer, pad_id = _model(scenario)
    encoded = encode_answers(
        [corpus.texts[index] for index in used],
        [corpus.answers[index] for index in used],
        tokenizer,
        system_prompt=scenario.model.system_prompt,
        max_tokens=scenario.model.max_tokens,
        pad_id=pad_id,
    )
    backbone = _backbone(scenario, source, classes=None)
    stage = Causal(backbone, encoded.tokens, encoded.answer_start)
    notes = _encoded_cuts(scenario, encoded)
    return _language(scenario, source, stage, shards, corpus, "prompts with answers", notes)


def _language(
    scenario: Scenario,
    source: str,
    stage: Language,
    shards: Sequence[Shard],
    corpus: Corpus,
    what: str,
    notes: tuple[str, ...],
) -> Material:
    for device, shard in enumerate(shards):
        for part in ("train", "validation", "test"):
            if not (stage.learned[getattr(shard, part)] > 0).any():
                raise DataError(
                    f"data must hold {what} of which there is something to learn, in tokens, in every part; "
                    f"got none in {part} of device {device} (data.{part}_per_device)"
                )
    held = [shard.train for shard in shards]
    return Material(
        source=source,
        backbone=stage.backbone,
        stage=stage,
        shards=shards,
        workload=Workload(
            **_lengths(stage.tokens, held, scenario, stage.backbone.family),
            mean_scored_tokens=_means(stage.learned, held),
        ),
        summary=Summary(
            sentence=f"{len(stage.tokens)} {what} of {len(corpus.domain_names)} domain(s); accuracy is the "
            f"share of {stage.asked} named right",
            notes=notes,
        ),
    )


def alignment(scenario: Scenario, workers: int | None) -> Material:
    """Return the material of preference pairs and reward models; see :meth:`Material.of`."""
    settings, devices = scenario.alignment, len(scenario.devices)
    preferences = load_preferences(scenario.data, folder=Path(scenario.folder))
    dealt = partition_preferences(
        preferences,
        scenario.data,
        reward_share=settings.reward_share,
        devices=devices,
        seed=scenario.seeds.data,
    )
    source, tokenizer, pad_id = _model(scenario)
    dialogues, encoded = _dialogues(preferences, dealt.pairs, tokenizer, scenario, pad_id)
    reader = Reader(
        model_source(settings.reward_model, folder=scenario.folder),
        dtype=scenario.training.base_dtype,
    )
    learned, held_out = dealt.reward_train, dealt.reward_held_out
    rewards = tuple(
        Workers(workers).map(
            lambda axis: _reward(reader, preferences, learned, held_out, axis, scenario),
            range(len(AXES)),
        )
    )
    backbone = _backbone(
        scenario,
        source,
        classes=None,
        more_tokens=settings.answer_tokens,  # answers are measured whatever they are learned from
    )
    stage = Aligned.of(scenario, backbone, tokenizer, dialogues, rewards)
    told = [
        f"{axis} told right in {model.reliability.accuracy:.3f} of {model.reliability.pairs} held-out "
        f"pairs (calibration error {model.reliability.calibration_error:.3f})"
        for axis, model in zip(AXES, rewards, strict=True)
    ]
    few = min(model.reliability.pairs for model in rewards)
    if few < FEW_PAIRS:
        told.append(
            f"{few} held-out pairs say little of how far rewards, and so accuracies, can be trusted: "
            f"alignment.reward_share {settings.reward_share:g} of more data would say more"
        )
    return Material(
        source=source,
        backbone=backbone,
        stage=stage,
        shards=dealt.shards,
        workload=_alignment_workload(
            stage, dealt.shards, dialogues, encoded, reader, scenario, backbone.family
        ),
        summary=Summary(
            sentence=f"{len(dealt.pairs)} pairs of answers on either axis; accuracy is the probability that "
            "the user prefers an answer to the reference model's",
            baseline=0.5,
            baseline_name="the reference model",
            notes=(f"reward models: {'; '.join(told)}", *_encoded_cuts(scenario, encoded)),
        ),
        rewards=rewards,
    )


def _origin(scenario: Scenario) -> str:
    """Return what a material is made from, but for what it leaves to be changed."""
    everything, alignment = resolved(scenario), scenario.alignment
    made_from = {name: everything[name] for name in ("folder", "model", "data")} | {
        "stage": scenario.training.stage,
        "dtype": scenario.training.base_dtype,
        "devices": len(scenario.devices),
        "seed": scenario.seeds.data,
    }
    if STAGES[scenario.training.stage].aligns:
        made_from["rewards"] = [
            alignment.reward_share,
            alignment.reward_model,
            alignment.reward_steps,
        ]
        made_from["samples"] = [alignment.optimiser == "grpo", alignment.answer_tokens]
    return json.dumps(made_from, sort_keys=True)


# -- parts ----------------------------------------------------------------------------------------


def _dealt(corpus: Corpus, scenario: Scenario) -> tuple[list[Shard], Indices]:
    """Return who holds what of the texts used, and which of the corpus those are."""
    devices = len(scenario.devices)
    held = partition(corpus, scenario.data, devices=devices, seed=scenario.seeds.data)
    parts = [part for own in held for part in (own.train, own.validation, own.test)]
    used = np.concatenate(parts)
    places = np.split(np.arange(len(used)), np.cumsum([len(part) for part in parts])[:-1])
    return [
        Shard(train=places[3 * k], validation=places[3 * k + 1], test=places[3 * k + 2])
        for k in range(devices)
    ], used


def _model(scenario: Scenario) -> tuple[str, Any, int]:
    """Return where the model is, its tokenizer, and the token that fills up short sequences."""
    source = model_source(scenario.model.source, folder=scenario.folder)
    model_config(source)  # says clearly what is wrong, where there is no model
    return source, AutoTokenizer.from_pretrained(source), pad_token_id(source)


def _backbone(
    scenario: Scenario, source: str, *, classes: int | None, more_tokens: int = 0
) -> Backbone:
    model = scenario.model
    return Backbone(
        source,
        family=model_architecture(scenario, classes).family,
        classes=classes,
        pooling=model.pooling,
        max_tokens=model.max_tokens + more_tokens,
        window=Window(width=model.attention_window, sinks=model.attention_sinks)
        if model.attention_window
        else None,
        dtype=scenario.training.base_dtype,
    )


def _lengths(
    tokens: Tokens, held: Sequence[Indices], scenario: Scenario, family: str, each: int = 1
) -> dict[str, Any]:
    """Return the moments of an example's lengths, [device]; ``each``: its sequences."""
    lengths = [tokens.lengths[sequences].astype(float) for sequences in held]
    span = attention_span(scenario, family) or np.inf
    return {
        "mean_tokens": np.array([each * own.mean() for own in lengths]),
        "mean_squared_tokens": np.array(
            [each * (own * np.minimum(own, span)).mean() for own in lengths]
        ),
    }


def _means(values: Indices, held: Sequence[Indices], each: int = 1) -> NDArray[np.float64]:
    """Return the means of an example's values, [device]; ``each``: its sequences."""
    return np.array([each * values[sequences].mean() for sequences in held])


def _encoded_cuts(scenario: Scenario, encoded: Encoded) -> tuple[str, ...]:
    return _cuts(scenario, len(encoded.tokens), encoded.prompts_cut, encoded.answers_cut)


def _cuts(scenario: Scenario, sequences: int, beginnings: int, ends: int) -> tuple[str, ...]:
    if not beginnings and not ends:
        return ()
    return (
        f"model.max_tokens {scenario.model.max_tokens} cut the beginning of {beginnings} and the "
        f"end of {ends} of {sequences} sequences",
    )


def _classes_summary(corpus: Corpus, labels: NDArray[np.int64], shards: Sequence[Shard]) -> Summary:
    count = len(corpus.class_names)
    train = [np.bincount(labels[shard.train], minlength=count) for shard in shards]
    test = [np.bincount(labels[shard.test], minlength=count) / len(shard.test) for shard in shards]
    common = int(np.sum(train, axis=0).argmax())
    majority = float(np.mean([shares[common] for shares in test]))
    own = float(np.mean([shares[t.argmax()] for shares, t in zip(test, train, strict=True)]))
    return Summary(
        sentence=f"{len(labels)} texts of {len(corpus.domain_names)} domain(s), {count} classes",
        baseline=majority,
        baseline_per_device=own,
        baseline_name="always the most common class",
    )


def _dialogues(
    preferences: Preferences, pairs: Indices, tokenizer: Any, scenario: Scenario, pad_id: int
) -> tuple[Dialogues, Encoded]:
    """Return the pairs of some examples [example, axis] as sequences, every answer to a prompt once."""
    held = pairs.ravel()
    prompts = list(dict.fromkeys(preferences.prompts[pair] for pair in held))
    place_of = {prompt: place for place, prompt in enumerate(prompts)}
    answers = [
        (preferences.prompts[pair], answer)
        for pair in held
        for answer in (preferences.chosen[pair], preferences.rejected[pair])
    ]
    sequences = list(dict.fromkeys(answers))
    sequence_of = {one: place for place, one in enumerate(sequences)}
    how: dict[str, Any] = {
        "system_prompt": scenario.model.system_prompt,
        "max_tokens": scenario.model.max_tokens,
        "pad_id": pad_id,
    }
    encoded = encode_answers(
        [prompt for prompt, _ in sequences], [answer for _, answer in sequences], tokenizer, **how
    )
    places = np.array([sequence_of[one] for one in answers]).reshape(-1, 2)
    return (
        Dialogues(
            tokens=encoded.tokens,
            starts=encoded.answer_start,
            prompt_of=np.array([place_of[prompt] for prompt, _ in sequences]),
            answers=tuple(answer for _, answer in sequences),
            prompts=tuple(prompts),
            prompt_tokens=encode_prompts(prompts, tokenizer, **how).tokens,
            pairs=np.arange(len(held)).reshape(pairs.shape),
            chosen=places[:, 0],
            rejected=places[:, 1],
        ),
        encoded,
    )


def _reward(
    reader: Reader,
    preferences: Preferences,
    learned: Indices,
    held_out: Indices,
    axis: int,
    scenario: Scenario,
) -> RewardModel:
    """Return the reward model of an axis; half of the groups held out calibrate it, half check it."""
    own = held_out[preferences.axes[held_out] == axis]
    groups = np.unique(preferences.groups[own])
    order = stream(scenario.seeds.data, "rewards-held-out", item=axis).permutation(groups)
    first = np.isin(preferences.groups[own], order[: max(1, len(order) // 2)])
    parts = (learned[preferences.axes[learned] == axis], own[first], own[~first])
    learn, calibrate, check = (
        Pairs(
            prompts=tuple(preferences.prompts[pair] for pair in part),
            chosen=tuple(preferences.chosen[pair] for pair in part),
            rejected=tuple(preferences.rejected[pair] for pair in part),
        )
        for part in parts
    )
    return RewardModel.of(
        reader,
        learn,
        calibrate,
        check if len(check) else calibrate,
        steps=scenario.alignment.reward_steps,
        seed=scenario.seeds.data,
        folder=data_folder() / "rewards",
    )


def _alignment_workload(
    stage: Stage,
    shards: Sequence[Shard],
    dialogues: Dialogues,
    encoded: Encoded,
    reader: Reader,
    scenario: Scenario,
    family: str,
) -> Workload:
    held = [stage.sequences(shard.train) for shard in shards]
    read = reader.read(
        [dialogues.prompts[prompt] for prompt in dialogues.prompt_of], dialogues.answers
    ).lengths.astype(float)
    rewards: dict[str, Any] = {
        "mean_reward_tokens": np.array([read[own].mean() for own in held]),
        "mean_squared_reward_tokens": np.array([(read[own] ** 2).mean() for own in held]),
    }
    if scenario.alignment.optimiser == "grpo":
        prompts = [dialogues.prompt_of[own] for own in held]
        return Workload(**_lengths(dialogues.prompt_tokens, prompts, scenario, family), **rewards)
    return Workload(
        **_lengths(encoded.tokens, held, scenario, family, 4),
        mean_scored_tokens=_means(encoded.tokens.lengths - encoded.answer_start, held, 4),
        **rewards,
    )
