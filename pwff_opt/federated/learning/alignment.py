r"""Alignment tuning: two rewards, as each device's user weighs them.

Device k is to maximise, over the answers y of its model to prompts x,

.. math:: w_k\,r_\text{help}(x, y) + (1 - w_k)\,r_\text{safe}(x, y)
          - \tfrac{\lambda_1}{2}\,\lVert \theta_k - \theta_\text{shared} \rVert^2
          - \lambda_2\,\mathrm{KL}(\pi_k \,\Vert\, \pi_\text{ref})

with the weight :math:`w_k` of its user (``devices.helpfulness``), :math:`\lambda_1` =
``aggregation.proximal``, :math:`\lambda_2` = ``alignment.kl``, and the frozen model without any block as the
reference.  Each reward is an objective with a loss of its own;
:mod:`pwff_opt.federated.learning.reconcile` makes one step of their gradients.

The published text of PWFF (arXiv 2404.13238) names these parts (two reward models, a personalised loss,
local multi-objective alignment) without formulas; these are ours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch.nn import functional

from pwff_opt.data.conversations import AXES
from pwff_opt.federated.learning.language import Scored
from pwff_opt.federated.learning.rewards import RewardModel
from pwff_opt.federated.learning.stage import Lesson, Loss
from pwff_opt.federated.model.backbone import NOTHING, Backbone
from pwff_opt.federated.model.generation import generate
from pwff_opt.federated.model.passes import Passes
from pwff_opt.federated.text.encoding import end_id
from pwff_opt.federated.text.tokens import Indices, Tokens
from pwff_opt.rng import stream
from pwff_opt.scenario import Alignment, Scenario

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dialogues:
    """Preference pairs as token sequences: a prompt with an answer each.

    An example is a pair of each axis, ``pairs`` [example, axis]; ``chosen`` and ``rejected`` [pair] name
    sequences.
    """

    tokens: Tokens
    starts: Indices
    """[sequence]: tokens of the prompt."""
    prompt_of: Indices
    """[sequence]"""
    answers: tuple[str, ...]
    """[sequence]"""
    prompts: tuple[str, ...]
    prompt_tokens: Tokens
    pairs: Indices
    chosen: Indices
    rejected: Indices


class References:
    """What is known of the reference and of the data's answers: none of it ever changes."""

    def __init__(self, sequences: int) -> None:
        self.log_probability = torch.full((sequences,), torch.nan)
        """[sequence]: of answers, by the reference."""
        self.rewards = [np.full(sequences, np.nan) for _ in AXES]
        """[axis][sequence]"""
        self.judged: dict[bytes, list[FloatArray]] = {}
        """Rewards of the reference's likeliest answers, by prompts: [axis][prompt]."""


class Aligned(ABC):
    """What pairs and sampled answers have in common: examples, users, and how answers are measured."""

    objectives: tuple[str, ...] = AXES

    def __init__(
        self,
        scenario: Scenario,
        backbone: Backbone,
        tokenizer: Any,
        dialogues: Dialogues,
        rewards: Sequence[RewardModel],
        references: References,
    ) -> None:
        self._backbone, self._tokenizer, self._rewards = backbone, tokenizer, rewards
        self._dialogues, self._settings = dialogues, scenario.alignment
        helpfulness = np.array([device.helpfulness for device in scenario.devices])
        self._wishes = np.stack([helpfulness, 1.0 - helpfulness], 1)
        self._stop = end_id(tokenizer)
        self._references = references

    @classmethod
    def of(
        cls,
        scenario: Scenario,
        backbone: Backbone,
        tokenizer: Any,
        dialogues: Dialogues,
        rewards: Sequence[RewardModel],
    ) -> Aligned:
        """Return the stage that ``alignment.optimiser`` asks for."""
        references = References(len(dialogues.tokens))
        return _kind(scenario)(scenario, backbone, tokenizer, dialogues, rewards, references)

    def by(self, scenario: Scenario) -> Aligned:
        """Return the stage with another scenario's settings and users, of the same data and models."""
        held = self._backbone, self._tokenizer, self._dialogues, self._rewards, self._references
        return _kind(scenario)(scenario, *held)

    @abstractmethod
    def lesson(
        self, batches: Sequence[Indices], passes: Passes, *, seed: int, round: int, step: int
    ) -> tuple[Lesson, Sequence[Indices]]:
        """See :class:`pwff_opt.federated.learning.Stage`."""

    @property
    def tokens(self) -> Tokens:
        return self._dialogues.tokens

    def sequences(self, examples: Indices) -> Indices:
        """Return chosen and rejected answer on each axis, four an example."""
        held = self._dialogues
        pairs = held.pairs[examples]
        return np.stack([held.chosen[pairs], held.rejected[pairs]], 2).ravel()

    def wishes(self, devices: Sequence[int]) -> FloatArray:
        return self._wishes[list(devices)]

    def measures(
        self, examples: Indices, passes: Passes, against: Sequence[FloatArray] | None = None
    ) -> dict[str, float]:
        """Return how the answers to the examples' prompts please the user, the likeliest ones.

        "accuracy" is the probability that the user prefers them to those of the reference, as the reward
        models have it, each axis ("preferred_AXIS") by the user's weight: 0.5 where nothing was learned.
        "reward_AXIS": mean reward; "win_AXIS": share of prompts where it is above the reference's, a tie
        counting half. ``against``: what :meth:`judged` says of other answers, to take the reference's place.
        """
        ours = self.judged(examples, passes)
        if against is None:
            known, key = self._references.judged, self._asked(examples).tobytes()
            if key not in known:
                known[key] = self.judged(examples, Passes(self._backbone, [0], NOTHING))
            against = known[key]
        wishes = self._wishes[passes.devices[0]]
        found = {"accuracy": 0.0}
        for axis, mine, reference, wish in zip(AXES, ours, against, wishes, strict=True):
            found[f"reward_{axis}"] = float(mine.mean())
            found[f"win_{axis}"] = float(((mine > reference) + 0.5 * (mine == reference)).mean())
            preferred = float(expit(mine - reference).mean())
            found[f"preferred_{axis}"] = preferred
            found["accuracy"] += float(wish) * preferred
        return found

    def answered(
        self, prompts: Indices, passes: Passes, draws: FloatArray | None = None
    ) -> list[str]:
        """Return one device's answers to prompts: the likeliest, or by ``draws``."""
        found = generate(
            self._backbone,
            passes.stack,
            self._dialogues.prompt_tokens,
            [prompts],
            longest=self._settings.answer_tokens,
            stop=self._stop,
            draws=draws,
            temperature=self._settings.temperature,
        )
        return self._text(found)

    def judged(self, examples: Indices, passes: Passes) -> list[FloatArray]:
        """Return the rewards of one device's likeliest answers to the examples' prompts, [axis][prompt]."""
        prompts = self._asked(examples)
        texts = [self._dialogues.prompts[prompt] for prompt in prompts]
        answers = self.answered(prompts, passes)
        return [model.rewards(texts, answers) for model in self._rewards]

    def _asked(self, examples: Indices) -> Indices:
        """Return the prompts of examples, each once."""
        prompts: Indices = np.unique(self._dialogues.prompt_of[self.sequences(examples)])
        return prompts

    def _text(self, answers: Sequence[Indices]) -> list[str]:
        texts: list[str] = self._tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [text.strip() for text in texts]


class PreferencePairs(Aligned):
    r"""Alignment by preference pairs.

    With :math:`h = \lambda_2 \big[\ln\frac{\pi(y_+|x)}{\pi_\text{ref}(y_+|x)} -
    \ln\frac{\pi(y_-|x)}{\pi_\text{ref}(y_-|x)}\big]`, the loss of a pair on axis o is

    .. math:: \text{DPO: } -\ln\sigma(h), \qquad \text{MODPO: } -\ln\sigma\Big(\frac{1}{w_o}
              \big(h - (1 - w_o)\,[r_{\bar o}(x, y_+) - r_{\bar o}(x, y_-)]\big)\Big)

    with :math:`w_o` the user's weight of the axis and :math:`r_{\bar o}` the reward of the other: what is
    preferred on one axis may cost on the other, and MODPO's optimum is that of the weighted rewards. Sources:
    Rafailov et al., NeurIPS 2023; Zhou et al., Findings of ACL 2024 (arXiv 2310.03708).
    """

    updates = 1

    def lesson(
        self, batches: Sequence[Indices], passes: Passes, *, seed: int, round: int, step: int
    ) -> tuple[Lesson, Sequence[Indices]]:
        return self, batches

    def losses(self, batches: Sequence[Indices], passes: Passes) -> Iterator[Loss]:
        held, settings = self._dialogues, self._settings
        wishes = np.repeat(self.wishes(passes.devices), [len(batch) for batch in batches], axis=0)
        for objective in range(len(AXES)):
            pairs = [held.pairs[batch, objective] for batch in batches]
            both = [np.stack([held.chosen[own], held.rejected[own]], 1).ravel() for own in pairs]
            packed, hidden = passes.own(self.tokens, both)
            sequences = np.concatenate(both)
            scored = Scored.next_tokens(packed, held.starts[sequences])
            ours = scored.sums(scored.log_probabilities(self._backbone, hidden))
            ratio = (ours - self._referred(sequences, passes).to(ours)).view(-1, 2)
            odds = settings.kl * (ratio[:, 0] - ratio[:, 1])
            if settings.optimiser == "modpo":
                wish = torch.from_numpy(wishes[:, objective]).to(odds)
                rewards = self._rewarded(1 - objective, sequences, passes).reshape(-1, 2)
                margin = torch.from_numpy(rewards[:, 0] - rewards[:, 1]).to(odds)
                odds = (odds - (1.0 - wish) * margin) / wish
            yield Loss(objective=objective, each=-functional.logsigmoid(odds))

    def _referred(self, sequences: Indices, passes: Passes) -> torch.Tensor:
        """Return the log-probabilities of answers by the reference, [sequence]; each is computed once."""
        known = self._references.log_probability
        missing = sequences[known[sequences].isnan().numpy()]
        for group in passes.groups(missing) if len(missing) else ():
            packed, hidden = passes.base(self.tokens, group)
            scored = Scored.next_tokens(packed, self._dialogues.starts[group])
            with torch.inference_mode():
                sums = scored.sums(scored.log_probabilities(self._backbone, hidden)).cpu()
            known[group] = sums.clone()
        return known[sequences]

    def _rewarded(self, axis: int, sequences: Indices, passes: Passes) -> FloatArray:
        """Return the rewards of answers on an axis, [sequence]; each is computed once."""
        held, known = self._dialogues, self._references.rewards[axis]
        missing = sequences[np.isnan(known[sequences])]
        for group in passes.groups(missing) if len(missing) else ():
            prompts = [held.prompts[prompt] for prompt in held.prompt_of[group]]
            answers = [held.answers[sequence] for sequence in group]
            known[group] = self._rewards[axis].rewards(prompts, answers)
        return known[sequences]


class SampledAnswers(Aligned):
    r"""Alignment by sampled answers: a policy gradient for each reward.

    For every prompt several answers are drawn; an answer's advantage on an axis is its reward less the
    mean of its group, over the group's standard deviation (GRPO, Shao et al. 2024, arXiv 2402.03300). With
    :math:`\rho_t` the ratio of a token's probability now to that when it was drawn, and :math:`q_t` that of
    the reference to now, all at the temperature of the draw, an answer's loss on axis o is

    .. math:: -\frac{1}{T} \sum_t \Big[\min\big(\rho_t A_o,\;
              \mathrm{clip}(\rho_t, 1 - \epsilon, 1 + \epsilon) A_o\big)
              - \lambda_2\,(q_t - \ln q_t - 1)\Big]

    whose last part estimates the divergence from the reference (Schulman's k3), the same on both axes.
    """

    def lesson(
        self, batches: Sequence[Indices], passes: Passes, *, seed: int, round: int, step: int
    ) -> tuple[Lesson, Sequence[Indices]]:
        held, settings = self._dialogues, self._settings
        each = settings.answers
        # In turn a prompt of either axis, in mini-batches of one too; where pairs share it, that one.
        axes = [(round + step + np.arange(len(batch))) % 2 for batch in batches]
        prompts = [
            np.repeat(held.prompt_of[held.chosen[held.pairs[batch, axis]]], each)
            for batch, axis in zip(batches, axes, strict=True)
        ]
        draws = np.concatenate(
            [
                stream(seed, "answers", round=round, device=device, item=step).random(
                    (len(own), settings.answer_tokens)
                )
                for device, own in zip(passes.devices, prompts, strict=True)
            ]
        )
        answers = generate(
            self._backbone,
            passes.stack,
            held.prompt_tokens,
            prompts,
            longest=settings.answer_tokens,
            stop=self._stop,
            draws=draws,
            temperature=settings.temperature,
        )
        flat = np.concatenate(prompts)
        texts = [held.prompts[prompt] for prompt in flat]
        answer_texts = self._text(answers)
        advantages = np.stack(
            [grouped(model.rewards(texts, answer_texts), each) for model in self._rewards]
        )
        starts = held.prompt_tokens.lengths[flat]
        asked = np.split(
            held.prompt_tokens.ids[held.prompt_tokens.rows(flat)], starts.cumsum()[:-1]
        )
        whole = [np.concatenate(pair) for pair in zip(asked, answers, strict=True)]
        tokens = Tokens(
            ids=np.concatenate(whole),
            offsets=np.cumsum([0, *map(len, whole)]).astype(np.int64),
            pad_id=held.tokens.pad_id,
        )
        sizes = np.cumsum([len(own) for own in prompts])[:-1]
        return (
            _Answers(self._backbone, tokens, starts, advantages, settings),
            np.split(np.arange(len(flat)), sizes),
        )


class _Answers:
    """Sampled answers, to learn from in ``updates`` steps; an example is an answer."""

    def __init__(
        self,
        backbone: Backbone,
        tokens: Tokens,
        starts: Indices,
        advantages: FloatArray,
        settings: Alignment,
    ) -> None:
        self.tokens, self.updates = tokens, settings.updates
        self._backbone, self._starts, self._settings = backbone, starts, settings
        self._advantages = torch.from_numpy(advantages).float()
        # By token: a mini-batch may be cut anew between two steps, when memory runs out.
        self._drawn = torch.full((len(tokens.ids),), torch.nan)
        self._reference = self._drawn.clone()

    def losses(self, batches: Sequence[Indices], passes: Passes) -> Iterator[Loss]:
        settings, answers = self._settings, np.concatenate(batches)
        packed, hidden = passes.own(self.tokens, batches)
        scored = Scored.next_tokens(packed, self._starts[answers])
        now = scored.log_probabilities(self._backbone, hidden, settings.temperature)
        places = self.tokens.rows(answers)[scored.rows.cpu().numpy()]
        # The first step's own pass is that by which they were drawn.
        drawn = self._drawn[places].to(now)
        drawn = torch.where(drawn.isnan(), now.detach(), drawn)
        self._drawn[places] = drawn.cpu()
        if self._reference[places].isnan().any():
            base_packed, base = passes.base(self.tokens, answers)
            with torch.inference_mode():
                found = Scored.next_tokens(base_packed, self._starts[answers])
                reference = found.log_probabilities(
                    self._backbone, base, settings.temperature
                ).cpu()
            self._reference[places] = reference.clone()
        away = self._reference[places].to(now) - now
        divergence = away.exp() - away - 1.0
        ratio = (now - drawn).exp()
        cut = ratio.clamp(1.0 - settings.clip, 1.0 + settings.clip)
        for objective in range(len(AXES)):
            advantage = self._advantages[objective, answers].to(now)[scored.sequence_of]
            gain = torch.minimum(ratio * advantage, cut * advantage)
            each = scored.sums(settings.kl * divergence - gain) / scored.counts
            # A mini-batch counts prompts, each of which has several answers.
            yield Loss(
                objective=objective,
                each=each / settings.answers,
                graph_goes_on=objective + 1 < len(AXES),
            )


def grouped(rewards: FloatArray, size: int) -> FloatArray:
    """Return the advantages of answers in groups of ``size``, one after another: mean 0, variance 1.

    Where all of a group are rewarded alike there is nothing to learn: 0.
    """
    groups = rewards.reshape(-1, size)
    away = groups - groups.mean(1, keepdims=True)
    spread = groups.std(1, keepdims=True)
    shares: FloatArray = np.divide(away, spread, out=np.zeros_like(away), where=spread > 1e-6)
    return shares.ravel()


def _kind(scenario: Scenario) -> type[Aligned]:
    return SampledAnswers if scenario.alignment.optimiser == "grpo" else PreferencePairs
