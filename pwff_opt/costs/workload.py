"""What the data contribute to the costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pwff_opt.errors import DecisionError
from pwff_opt.registry import FAMILIES, STAGES
from pwff_opt.scenario import Scenario

FloatArray = NDArray[np.float64]

MASKED = 0.15
"""Share of the tokens that masked pre-training asks for (Devlin et al., NAACL 2019, section 3.1)."""

_REQUIRED = ("mean_tokens", "mean_squared_tokens")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Workload:
    """What the data contribute to the costs: number of classes, and lengths of the sequences.

    All lengths [device] are means over each device's training examples, and work is linear in them, so
    costs are exact expectations over random mini-batches without padding. An example is what
    ``training.batch_size`` counts: a text; a prompt and its answer in one sequence (instruction); a
    preference pair for either objective, four such sequences (alignment by dpo and modpo); or a prompt,
    for which answers are sampled (grpo).
    """

    classes: int | None = None
    """At least 2; None where nothing is classified."""
    mean_tokens: FloatArray
    """Tokens of an example, all its sequences together."""
    mean_squared_tokens: FloatArray
    """How often a token of an example sees a token: the sum of its sequences' squared lengths. With
    sparse attention, of min(S, span) S for S tokens (:func:`attention_span`); more than that, up to the
    squares, is cut to span times ``mean_tokens``."""
    mean_scored_tokens: FloatArray | None = None
    """Tokens of an example at which what comes next is learned; neither for classification, nor for
    grpo, where they are those sampled."""
    mean_reward_tokens: FloatArray | None = None
    """Tokens of one prompt and answer as a reward model reads them (modpo, grpo)."""
    mean_squared_reward_tokens: FloatArray | None = None
    """Their number squared."""

    def __post_init__(self) -> None:
        if self.classes is not None and (not isinstance(self.classes, int) or self.classes < 2):
            raise DecisionError(
                f"workload.classes must be a whole number of at least 2, got {self.classes!r}"
            )
        for name, given in self.lengths().items():
            try:
                values = np.asarray(given)
            except ValueError:  # rows of unequal length
                values = np.asarray(given, dtype=object)
            if values.dtype.kind not in "fiu" or not (np.isfinite(values) & (values > 0)).all():
                raise DecisionError(f"workload.{name} must be positive and finite, got {values}")
            object.__setattr__(self, name, values.astype(float))

    @classmethod
    def padded(cls, scenario: Scenario, *, classes: int | None = None) -> Workload:
        """Return the upper bound that needs no data.

        Every sequence and every prompt is ``model.max_tokens`` long, and all but its first token are
        learned (of an encoder's, only as many as are masked are charged). A reward model reads as many of
        its own tokens and, of a sampled answer, ``alignment.answer_tokens`` more.
        """

        def everywhere(value: float) -> FloatArray:
            return np.full(len(scenario.devices), float(value))

        length, read = scenario.model.max_tokens, longest_sequence(scenario)
        sequences = sequences_per_example(scenario)
        return cls(
            classes=classes,
            mean_tokens=everywhere(sequences * length),
            mean_squared_tokens=everywhere(sequences * length**2),
            mean_scored_tokens=everywhere(sequences * (length - 1)),
            mean_reward_tokens=everywhere(read),
            mean_squared_reward_tokens=everywhere(read**2),
        )

    def lengths(self) -> dict[str, FloatArray]:
        """Return the fields that hold one number a device, by name, those that are given."""
        named = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {
            name: value
            for name, value in named.items()
            if name != "classes" and (value is not None or name in _REQUIRED)
        }

    def to_json(self) -> dict[str, Any]:
        """Return what :meth:`from_json` reads: numbers and lists of numbers."""
        return {"classes": self.classes} | {k: v.tolist() for k, v in self.lengths().items()}

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Workload:
        """Return the workload that :meth:`to_json` wrote.

        Raises
        ------
        DecisionError
            A length is missing, a key is unknown, or a value cannot be one.
        """
        if not isinstance(given, Mapping):
            raise DecisionError(f"workload must be an object, got {given!r}")
        known = {entry.name for entry in fields(cls)}
        for name in _REQUIRED:
            if name not in given:
                raise DecisionError(f"workload.{name} must be given, got none")
        for name in given:
            if name not in known:
                raise DecisionError(
                    f"workload must hold only {', '.join(sorted(known))}; got {name!r}"
                )
        return cls(**given)


def sequences_per_example(scenario: Scenario) -> int:
    """Return how many sequences an example of the scenario's stage is: two preference pairs are four."""
    return int(STAGES[scenario.training.stage].sequences_per_example(scenario))


def longest_sequence(scenario: Scenario) -> int:
    """Return the tokens of the longest sequence: sampled answers come after a prompt."""
    return scenario.model.max_tokens + samples(scenario) * scenario.alignment.answer_tokens


def most_scored(length: int, family: str) -> int:
    """Return how many tokens of a sequence a language model learns at most.

    A decoder all but the first; an encoder those that were masked (:func:`masked`).
    """
    return length - 1 if FAMILIES[family].causal else masked(length)


def masked(candidates: int) -> int:
    """Return how many of a sequence's tokens are masked: ``MASKED`` of them, at least one."""
    return max(1, round(MASKED * candidates))


def attention_span(scenario: Scenario, family: str) -> int | None:
    """Return how many tokens a token sees at most under sparse attention; None: as many as there are.

    With a window w and s sinks, w + s in a decoder and 2 w - 1 + s in an encoder, which looks both ways.
    """
    window, sinks = scenario.model.attention_window, scenario.model.attention_sinks
    if not window:
        return None
    return (window if FAMILIES[family].causal else 2 * window - 1) + sinks


def samples(scenario: Scenario) -> bool:
    """Return whether devices sample answers to learn from them."""
    return bool(STAGES[scenario.training.stage].samples(scenario))
