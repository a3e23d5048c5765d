"""What language models do in every stage, with plain transformers: what the costs are checked against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional


@dataclass
class Texts:
    """Sequences of one length, the tokens that are scored, and the target of each of these."""

    ids: torch.Tensor
    mask: torch.Tensor
    scored: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def draw(cls, sequences: int, length: int, *, answer: int) -> Texts:
        """``answer``: how many tokens of each are scored, so that the last of them is not."""
        ids = torch.randint(1, 100, (sequences, length))
        positions = torch.arange(sequences * length).view(sequences, length)
        scored = positions[:, length - 1 - answer : length - 1].flatten()
        return cls(ids, torch.ones_like(ids), scored, ids.flatten()[scored + 1])

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.ids, self.mask, self.scored, self.targets]


def log_probabilities(model: Any, texts: Texts) -> torch.Tensor:
    """Return the log-probability of the target of every scored token. [scored]"""
    hidden = model.base_model(input_ids=texts.ids, attention_mask=texts.mask).last_hidden_state
    head = model.cls if hasattr(model, "cls") else model.lm_head
    logits = head(hidden.flatten(0, 1)[texts.scored])
    return -functional.cross_entropy(logits, texts.targets, reduction="none")


def margins(log_probability: torch.Tensor, sequences: int) -> torch.Tensor:
    """Return by how much the first half of the sequences is likelier than the second."""
    chosen, rejected = log_probability.view(sequences, -1).sum(1).chunk(2)
    return chosen - rejected


def dpo(step: Any, texts: Texts) -> None:
    """Make the gradients of DPO's loss, the reference being the model without its blocks."""
    with torch.no_grad(), step.disabled():
        reference = margins(log_probabilities(step.model, texts), len(texts.ids))
    policy = margins(log_probabilities(step.model, texts), len(texts.ids))
    (-functional.logsigmoid(0.1 * (policy - reference)).mean()).backward()


def read(model: Any, sequences: int, length: int) -> torch.Tensor:
    """Return what a reward model says of so many sequences."""
    ids = torch.randint(1000, 2000, (sequences, length))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def sample(model: Any, ids: torch.Tensor, answer: int) -> torch.Tensor:
    """Return prompts with their sampled answers, by transformers' own generation and cache."""
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        top_k=0,
        temperature=0.7,
        min_new_tokens=answer,
        max_new_tokens=answer,
        use_cache=True,
        eos_token_id=None,
    )


def learn(step: Any, texts: Texts, backwards: int) -> None:
    """Make the gradients of a loss of either objective (2), or of one of both together (1)."""
    ratio = log_probabilities(step.model, texts)
    advantages = torch.randn(2, len(ratio))
    losses = [-(ratio * advantage).mean() for advantage in advantages]
    if backwards == 1:
        (losses[0] + losses[1]).backward()
        return
    first = torch.autograd.grad(losses[0], step.trained, retain_graph=True)
    second = torch.autograd.grad(losses[1], step.trained)
    for parameter, one, other in zip(step.trained, first, second, strict=True):
        parameter.grad = one.add_(other)
