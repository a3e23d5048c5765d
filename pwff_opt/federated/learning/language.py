"""Pre-training and instruction tuning: next tokens, of whole texts or of answers alone, and masked ones."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from pwff_opt.federated.learning.stage import Loss, Plain
from pwff_opt.federated.model.backbone import Backbone
from pwff_opt.federated.model.passes import Passes
from pwff_opt.federated.text.tokens import Indices, Packed, Tokens, by_length


class Language(Plain):
    """Cross-entropy of the tokens that are asked for.

    Every sequence weighs the same, however many of its tokens are asked for; one of which none is has nothing
    to teach.  Measured by the share of tokens that would have been named right, and by the perplexity, the
    exponential of their mean loss, both over all tokens that are asked for.

    Parameters
    ----------
    backbone : with a head over its vocabulary.
    tokens : the sequences.
    learned : [sequence], how many tokens are asked for.
    """

    asked: str
    """What is asked for, in the plural."""

    def __init__(self, backbone: Backbone, tokens: Tokens, learned: Indices) -> None:
        super().__init__(tokens)
        self.backbone, self.learned = backbone, learned

    @abstractmethod
    def scored(self, packed: Packed, sequences: Indices) -> Scored:
        """Return what is asked for in a batch of some sequences."""

    def losses(self, batches: Sequence[Indices], passes: Passes) -> Iterator[Loss]:
        packed, hidden = passes.own(self.tokens, batches)
        scored = self.scored(packed, np.concatenate(batches))
        sums = scored.sums(scored.log_probabilities(self.backbone, hidden))
        yield Loss(objective=0, each=-sums / scored.counts.clamp_min(1))

    def measures(self, examples: Indices, passes: Passes) -> dict[str, float]:
        right, total, count = 0, 0.0, 0
        for batch in by_length(self.tokens, examples):
            packed, hidden = passes.own(self.tokens, [batch])
            scored = self.scored(packed, batch)
            logits = scored.logits(self.backbone, hidden)
            right += int((logits.argmax(-1) == scored.targets).sum())
            total -= float(scored.picked(logits).double().sum())
            count += len(scored.rows)
        with np.errstate(over="ignore"):  # of a model that has gone far off: infinite
            return {"accuracy": right / count, "perplexity": float(np.exp(total / count))}


class Causal(Language):
    r"""The tokens of an answer are asked for, given all before them.

    .. math:: \ell = -\frac{1}{S - a} \sum_{t = a}^{S - 1} \ln p(x_t \mid x_{<t})

    ``a``: tokens of the prompt, at least one; where whole texts are learned, as in pre-training, it is one.

    Parameters
    ----------
    backbone : a decoder.
    tokens, starts : the sequences and, [sequence], how many tokens of each are given.
    """

    asked = "tokens"

    def __init__(self, backbone: Backbone, tokens: Tokens, starts: Indices) -> None:
        super().__init__(backbone, tokens, tokens.lengths - starts)
        self._starts = starts

    def scored(self, packed: Packed, sequences: Indices) -> Scored:
        return Scored.next_tokens(packed, self._starts[sequences])


class Masked(Language):
    """Tokens that were masked are asked for, given all others on both sides (Devlin et al., NAACL 2019).

    Parameters
    ----------
    backbone : an encoder with a head over its vocabulary.
    tokens : the texts, masks put in.
    targets : [token], end to end as ``tokens.ids``: what was there, or -1 where nothing is learned.
    """

    asked = "masked tokens"

    def __init__(self, backbone: Backbone, tokens: Tokens, targets: Indices) -> None:
        sequences = np.arange(len(tokens)).repeat(tokens.lengths)
        super().__init__(
            backbone, tokens, np.bincount(sequences[targets >= 0], minlength=len(tokens))
        )
        self._targets = targets

    def scored(self, packed: Packed, sequences: Indices) -> Scored:
        targets = torch.from_numpy(self._targets[self.tokens.rows(sequences)])
        rows = (targets >= 0).nonzero()[:, 0]
        device = packed.ids.device
        return Scored(packed, rows.to(device), targets[rows].to(device))


class Scored:
    """The tokens that a language model is asked for in a batch, and the rows that name them.

    ``rows``: places among the batch's tokens; ``targets`` [row]: which token it is.
    """

    def __init__(self, packed: Packed, rows: torch.Tensor, targets: torch.Tensor) -> None:
        self.rows, self.targets = rows, targets
        self.sequence_of = packed.sequence_of[rows]
        """[row]"""
        self.counts = torch.bincount(self.sequence_of, minlength=packed.sequences)
        """[sequence]: how many tokens are asked for."""

    @classmethod
    def next_tokens(cls, packed: Packed, starts: Indices) -> Scored:
        """Return those of answers after ``starts`` [sequence] tokens of a prompt, at least one."""
        first = torch.from_numpy(starts).to(packed.lengths.device)
        place, of = packed.positions, packed.sequence_of
        inside = (place >= first[of] - 1) & (place < packed.lengths[of] - 1)
        rows = inside.nonzero()[:, 0]
        return cls(packed, rows, packed.ids[rows + 1])

    def logits(self, backbone: Backbone, hidden: torch.Tensor) -> torch.Tensor:
        """Return [row, vocabulary] of what leaves the last layer, [token, hidden]."""
        return backbone.tokens(hidden.index_select(0, self.rows))

    def picked(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities of the targets, [row]."""
        return -torch.nn.functional.cross_entropy(logits, self.targets, reduction="none")

    def log_probabilities(
        self, backbone: Backbone, hidden: torch.Tensor, temperature: float = 1.0
    ) -> torch.Tensor:
        """Return the log-probabilities of the targets, [row], by what leaves the last layer."""
        logits = self.logits(backbone, hidden)
        return self.picked(logits if temperature == 1.0 else logits / temperature)

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sums of rows' values over each sequence, [sequence]."""
        return values.new_zeros(len(self.counts)).index_add(0, self.sequence_of, values)
