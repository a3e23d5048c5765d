"""Pre-training and instruction tuning: the next token, of whole texts or of answers alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from pwff_opt.federated.backbone import Backbone
from pwff_opt.federated.passes import Passes
from pwff_opt.federated.stages.stage import Loss, Plain
from pwff_opt.federated.tokens import Indices, Packed, Tokens, by_length


class Language(Plain):
    r"""Cross-entropy of the tokens of an answer, given all before them.

    .. math:: \ell = -\frac{1}{S - a} \sum_{t = a}^{S - 1} \ln p(x_t \mid x_{<t})

    ``a``: tokens of the prompt, at least one; where whole texts are learned, as in pre-training, it is one.
    Every sequence weighs the same; in one of a single token there is nothing to learn.  Measured by the
    share of tokens that would have been named right, and by the perplexity, both over all tokens of the
    answers.

    Parameters
    ----------
    backbone : with a head over its vocabulary.
    tokens, starts : the sequences and, [sequence], how many tokens of each are given.
    """

    def __init__(self, backbone: Backbone, tokens: Tokens, starts: Indices) -> None:
        super().__init__(tokens)
        self._backbone, self._starts = backbone, starts

    def losses(self, batches: Sequence[Indices], passes: Passes) -> Iterator[Loss]:
        packed, hidden = passes.own(self.tokens, batches)
        scored = Scored(packed, self._starts[np.concatenate(batches)])
        sums = scored.sums(scored.log_probabilities(self._backbone, hidden))
        yield Loss(objective=0, each=-sums / scored.counts.clamp_min(1))

    def measures(self, examples: Indices, passes: Passes) -> dict[str, float]:
        right, total, count = 0, 0.0, 0
        for batch in by_length(self.tokens, examples):
            packed, hidden = passes.own(self.tokens, [batch])
            scored = Scored(packed, self._starts[batch])
            logits = scored.logits(self._backbone, hidden)
            right += int((logits.argmax(-1) == scored.targets).sum())
            total -= float(scored.picked(logits).double().sum())
            count += len(scored.rows)
        with np.errstate(over="ignore"):  # of a model that has gone far off: infinite
            return {"accuracy": right / count, "perplexity": float(np.exp(total / count))}


class Scored:
    """The tokens of answers in a batch, and the rows that predict them.

    ``starts`` [sequence]: tokens of the prompt, at least one.
    """

    def __init__(self, packed: Packed, starts: Indices) -> None:
        first = torch.from_numpy(starts).to(packed.lengths.device)
        place, of = packed.positions, packed.sequence_of
        inside = (place >= first[of] - 1) & (place < packed.lengths[of] - 1)
        self.rows = inside.nonzero()[:, 0]
        """[row]: in the batch's tokens."""
        self.targets = packed.ids[self.rows + 1]
        """[row]: what comes next."""
        self.sequence_of = of[self.rows]
        """[row]"""
        self.counts = packed.lengths - first
        """[sequence]: tokens of the answer."""

    def logits(self, backbone: Backbone, hidden: torch.Tensor) -> torch.Tensor:
        """Return [row, vocabulary] of what leaves the last layer, [token, hidden]."""
        return backbone.next_tokens(hidden.index_select(0, self.rows))

    def picked(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities of what comes next, [row]."""
        return -torch.nn.functional.cross_entropy(logits, self.targets, reduction="none")

    def log_probabilities(
        self, backbone: Backbone, hidden: torch.Tensor, temperature: float = 1.0
    ) -> torch.Tensor:
        """Return the log-probabilities of what comes next, [row], of what leaves the last layer."""
        logits = self.logits(backbone, hidden)
        return self.picked(logits if temperature == 1.0 else logits / temperature)

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sums of rows' values over each sequence, [sequence]."""
        return values.new_zeros(len(self.counts)).index_add(0, self.sequence_of, values)
