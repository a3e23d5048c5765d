"""Local steps of several devices at once: one pass through the frozen model, blocks of their own."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pwff_opt.errors import TrainingError
from pwff_opt.federated.learning import Lesson, Stage
from pwff_opt.federated.learning.adamw import AdamW
from pwff_opt.federated.learning.reconcile import conflict, gram, stationarity, weights
from pwff_opt.federated.model.backbone import Backbone, Stack
from pwff_opt.federated.model.blocks import Tensors, layer_of
from pwff_opt.federated.model.passes import Passes
from pwff_opt.federated.model.workers import go_on, out_of_memory
from pwff_opt.federated.text.tokens import Indices
from pwff_opt.scenario import Training

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What local steps have made of one device."""

    loss: float
    """Mean over the steps; of several objectives as the user weighs them."""
    blocks: Tensors
    """Those that were trained."""
    notes: dict[str, float]
    """Of several objectives, means over the steps: "conflict", "stationarity" (see
    :mod:`pwff_opt.federated.learning.reconcile`), and "weight", that of the first gradient."""


class Cohort:
    """Devices that train together.

    What they learn lies in one flat vector, of which every block is a view, so that gradients are
    cleared and AdamW steps are taken once for all.  Rows of a product, sequences in attention and
    elements of a step do not mix, so each device learns what it would learn alone, up to rounding, and one
    that diverges spoils no other.

    Parameters
    ----------
    backbone, stage
    blocks : every device's blocks at the start of the round.
    passes : makes passes through the model of the blocks as they are.
    wishes : [device, objective], see :class:`pwff_opt.federated.learning.Stage`.
    regularisation : see :func:`pwff_opt.federated.learning.reconcile.weights`.
    learns : whether a block of this name is trained.
    pulled : whether a block of this name is pulled back to its start by ``proximal`` (FedProx).
    """

    def __init__(
        self,
        backbone: Backbone,
        stage: Stage,
        blocks: Sequence[Tensors],
        scales: Sequence[float],
        *,
        common_scale: float,
        passes: Callable[[Stack], Passes],
        training: Training,
        wishes: NDArray[np.float64],
        regularisation: float = math.inf,
        learns: Callable[[str], bool],
        pulled: Callable[[str], bool] = lambda _: False,
        proximal: float = 0.0,
    ) -> None:
        self._stage = stage
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
        self._wishes = torch.from_numpy(wishes).float().to(device)
        self._regularisation = regularisation
        self._device_of = torch.repeat_interleave(
            torch.tensor([k for k, _ in places], dtype=torch.int64),
            torch.tensor(sizes, dtype=torch.int64),
        ).to(device)
        # Without a head to train, all layers may be frozen.
        flat = [tensor.flatten() for tensor in tensors] or [torch.zeros(0)]
        self._flat = torch.cat(flat).to(device)
        self._grad = torch.zeros_like(self._flat)
        """Where a backward pass leaves the gradient of one objective, and a step finds that of all."""
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
        if proximal > 0 and tensors:
            self._anchor = self._flat.clone()
            self._pull = torch.cat(
                [
                    torch.full((n,), proximal if pulled(name) else 0.0)
                    for (_, name), n in zip(places, sizes, strict=True)
                ]
            ).to(device)
        self._passes = passes(Stack(self._blocks, scales, common_scale=common_scale))
        # It starts afresh every round: its moments would be those of other parameters after an
        # aggregation, and a device need not store them between rounds.
        split = [len(self._flat) - heads, heads]
        self._optimiser = AdamW(
            [*self._flat.split(split)],
            [*self._grad.split(split)],
            [training.learning_rate, training.head_learning_rate],
            weight_decay=training.weight_decay,
        )

    def train(
        self, batches: Sequence[Sequence[Indices]], *, seed: int, round: int
    ) -> list[Learned]:
        """Take the steps of a round, ``batches`` [device][step]; return what each device has learned."""
        losses, notes = [], []
        for number, step in enumerate(zip(*batches, strict=True)):
            go_on()
            lesson, ready = self._stage.lesson(
                step, self._passes, seed=seed, round=round, step=number
            )
            for _ in range(lesson.updates):
                loss, note = self._gradients(lesson, ready)
                losses.append(loss)
                notes.append(note)
                if self._pull is not None:
                    self._grad.addcmul_(self._pull, self._flat - self._anchor)
                self._optimiser.step()
        mean = torch.stack(losses).double().mean(0).tolist()
        noted = {
            name: torch.stack([note[name] for note in notes]).double().mean(0).tolist()
            for name in notes[0]
        }
        return [
            Learned(
                loss=mean[k],
                blocks={name: tensor.detach().clone().cpu() for name, tensor in own.items()},
                notes={name: values[k] for name, values in noted.items()},
            )
            for k, own in enumerate(self._learned)
        ]

    def _gradients(
        self, lesson: Lesson, batches: Sequence[Indices]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Leave the reconciled gradients of the mean losses; return these, [device], and notes."""
        while True:
            self._grad.zero_()
            try:
                losses, gradients = self._accumulate(lesson, batches)
                break
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                if self._pieces >= self._batch:
                    raise TrainingError(
                        "a step with one example a device must fit into memory; choose a smaller "
                        f"model.max_tokens or fewer layers ({error})"
                    ) from error
                self._pieces = min(2 * self._pieces, self._batch)
                logger.warning("out of memory: mini-batches are now cut into %d", self._pieces)
        loss = (losses * self._wishes.cpu()).sum(1)
        if gradients is None:
            return loss, {}
        products = gram(gradients, self._device_of, len(batches))
        shares = weights(products, self._wishes, self._regularisation)
        torch.sum(shares.T.to(gradients)[:, self._device_of] * gradients, 0, out=self._grad)
        notes = {"conflict": conflict(products), "stationarity": stationarity(products)}
        notes["weight"] = shares[:, 0]
        return loss, {name: values.cpu() for name, values in notes.items()}

    def _accumulate(
        self, lesson: Lesson, batches: Sequence[Indices]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the losses [device, objective], and of several the gradients [objective, parameter].

        The gradient of a single one is left where it is.
        """
        count = len(self._stage.objectives)
        total = torch.zeros(len(batches), count)
        gradients = torch.zeros(count, len(self._grad)).to(self._grad) if count > 1 else None
        cut = [np.array_split(batch, self._pieces) for batch in batches]
        for piece in zip(*cut, strict=True):
            for loss in lesson.losses(piece, self._passes):
                each = loss.each / self._batch
                if each.requires_grad:
                    each.sum().backward(retain_graph=loss.graph_goes_on)
                parts = each.detach().cpu().split([len(part) for part in piece])
                total[:, loss.objective] += torch.stack([part.sum() for part in parts])
                if gradients is not None:
                    gradients[loss.objective] += self._grad
                    self._grad.zero_()
        return total, gradients
