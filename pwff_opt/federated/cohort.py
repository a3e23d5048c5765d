"""Local steps of several devices at once: one pass through the frozen model, blocks of their own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional

from pwff_opt.errors import TrainingError
from pwff_opt.federated.backbone import Backbone, Stack, Start
from pwff_opt.federated.blocks import Tensors, layer_of
from pwff_opt.federated.tokens import Indices, Packed, Tokens
from pwff_opt.federated.workers import out_of_memory
from pwff_opt.scenario import Training

logger = logging.getLogger(__name__)

StartOf = Callable[[Sequence[Indices]], Start]


class Cohort:
    """Devices that train together.

    What they learn lies in one flat vector, of which every block is a view, so that gradients are
    cleared and AdamW steps are taken once for all.  Rows of a product, sequences in attention and
    elements of a step do not mix, so each device learns what it would learn alone, and one that
    diverges spoils no other.

    Parameters
    ----------
    backbone, tokens, labels
    blocks : every device's blocks at the start of the round.
    learns : whether a block of this name is trained.
    pulled : whether a block of this name is pulled back to its start by ``proximal`` (FedProx).
    """

    def __init__(
        self,
        backbone: Backbone,
        tokens: Tokens,
        labels: torch.Tensor,
        blocks: Sequence[Tensors],
        scales: Sequence[float],
        *,
        common_scale: float,
        training: Training,
        learns: Callable[[str], bool],
        pulled: Callable[[str], bool] = lambda _: False,
        proximal: float = 0.0,
    ) -> None:
        self._backbone, self._tokens, self._labels = backbone, tokens, labels
        self._batch = training.batch_size
        self._pieces = 1
        # Heads last: they have a learning rate of their own. By name, not as they come: where a number
        # lies in the vector can show in its last bit, and a checkpoint keeps no order.
        places = sorted(
            ((k, name) for k, own in enumerate(blocks) for name in own if learns(name)),
            key=lambda place: (layer_of(place[1]) is None, *place),
        )
        tensors = [blocks[k][name] for k, name in places]
        sizes = [tensor.numel() for tensor in tensors]
        heads = sum(n for (_, name), n in zip(places, sizes, strict=True) if layer_of(name) is None)
        device = backbone.device
        self._flat = torch.cat([tensor.flatten() for tensor in tensors]).to(device)
        self._grad = torch.zeros_like(self._flat)
        self._blocks = [
            {n: t if learns(n) else t.to(device) for n, t in own.items()} for own in blocks
        ]
        self._learned: list[Tensors] = [{} for _ in blocks]
        views = zip(places, tensors, self._flat.split(sizes), self._grad.split(sizes), strict=True)
        for (k, name), tensor, value, grad in views:
            leaf = value.view(tensor.shape).detach().requires_grad_(True)
            leaf.grad = grad.view(tensor.shape)
            self._blocks[k][name] = self._learned[k][name] = leaf
        self._pull = None
        if proximal > 0:
            self._anchor = self._flat.clone()
            self._pull = torch.cat(
                [
                    torch.full((n,), proximal if pulled(name) else 0.0)
                    for (_, name), n in zip(places, sizes, strict=True)
                ]
            ).to(device)
        self._stack = Stack(self._blocks, scales, common_scale=common_scale)
        groups = []
        rates = (training.learning_rate, training.head_learning_rate)
        split = [len(self._flat) - heads, heads]
        for rate, value, grad in zip(
            rates, self._flat.split(split), self._grad.split(split), strict=True
        ):
            parameter = value.detach().requires_grad_(True)
            parameter.grad = grad
            groups.append({"params": [parameter], "lr": rate})
        # It starts afresh every round: its moments would be those of other parameters after an
        # aggregation, and a device need not store them between rounds.
        self._optimiser = torch.optim.AdamW(
            groups, weight_decay=training.weight_decay, fused=len(self._flat) > 0
        )

    def train(self, batches: Sequence[Sequence[Indices]], start: StartOf) -> list[float]:
        """Take a step a batch, ``batches`` [device][step]; return every device's mean loss."""
        losses = []
        for step in zip(*batches, strict=True):
            losses.append(self._gradients(step, start))
            if self._pull is not None:
                self._grad.addcmul_(self._pull, self._flat - self._anchor)
            self._optimiser.step()
        return torch.stack(losses).double().mean(0).tolist()

    def collect(self) -> list[Tensors]:
        """Return copies of what each device has learned."""
        return [
            {name: tensor.detach().clone().cpu() for name, tensor in own.items()}
            for own in self._learned
        ]

    def _gradients(self, batches: Sequence[Indices], start: StartOf) -> torch.Tensor:
        """Leave the gradients of the mean losses, which are returned, [device]."""
        while True:
            self._grad.zero_()
            try:
                return self._accumulate(batches, start)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                if self._pieces >= self._batch:
                    raise TrainingError(
                        "a step with one sequence a device must fit into memory; choose a smaller "
                        f"model.max_tokens or fewer layers ({error})"
                    ) from error
                self._pieces = min(2 * self._pieces, self._batch)
                logger.warning("out of memory: mini-batches are now cut into %d", self._pieces)

    def _accumulate(self, batches: Sequence[Indices], start: StartOf) -> torch.Tensor:
        total = torch.zeros(len(batches))
        cut = [np.array_split(batch, self._pieces) for batch in batches]
        for piece in zip(*cut, strict=True):
            packed = Packed.of(self._tokens, piece, device=self._backbone.device)
            labels = self._labels[np.concatenate(piece)].to(self._backbone.device)
            logits = self._backbone.logits(packed, self._stack, start(piece))
            each = functional.cross_entropy(logits, labels, reduction="none") / self._batch
            each.sum().backward()
            parts = each.detach().cpu().split([len(part) for part in piece])
            total += torch.stack([part.sum() for part in parts])
        return total
