"""Task tuning: sentences with a class each, and a head of the device's or of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from pwff_opt.federated.learning.stage import Loss, Plain
from pwff_opt.federated.model.backbone import Backbone
from pwff_opt.federated.model.passes import Passes
from pwff_opt.federated.text.tokens import Indices, Tokens, by_length


class Classification(Plain):
    """Cross-entropy of the classes; measured by the share of sentences that are named right."""

    def __init__(self, backbone: Backbone, tokens: Tokens, labels: NDArray[np.int64]) -> None:
        super().__init__(tokens)
        self._backbone = backbone
        self._labels = torch.from_numpy(labels)

    def losses(self, batches: Sequence[Indices], passes: Passes) -> Iterator[Loss]:
        packed, hidden = passes.own(self.tokens, batches)
        logits = self._backbone.classify(hidden, packed, passes.stack)
        labels = self._labels[np.concatenate(batches)].to(logits.device)
        yield Loss(objective=0, each=functional.cross_entropy(logits, labels, reduction="none"))

    def measures(self, examples: Indices, passes: Passes) -> dict[str, float]:
        right = 0
        for batch in by_length(self.tokens, examples):
            packed, hidden = passes.own(self.tokens, [batch])
            logits = self._backbone.classify(hidden, packed, passes.stack).cpu()
            right += int((logits.argmax(-1) == self._labels[batch]).sum())
        return {"accuracy": right / len(examples)}
