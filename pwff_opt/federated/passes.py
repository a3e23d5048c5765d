"""Passes through the model for devices with blocks of their own, from cached activations where they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pwff_opt.federated.backbone import NOTHING, Backbone, Stack, Start
from pwff_opt.federated.blocks import Tensors
from pwff_opt.federated.features import Features, Level
from pwff_opt.federated.tokens import Indices, Packed, Tokens


class Passes:
    """Passes from the bottom of the model to its top.

    Parameters
    ----------
    backbone
    devices : who they are, in the order of ``stack``.
    stack : their blocks.
    """

    def __init__(self, backbone: Backbone, devices: Sequence[int], stack: Stack) -> None:
        self.backbone, self.devices, self.stack = backbone, devices, stack

    def own(self, tokens: Tokens, batches: Sequence[Indices]) -> tuple[Packed, torch.Tensor]:
        """Return sequences of ``tokens``, a batch for each device, packed, and what leaves the last layer.

        The latter is [token, hidden], by each device's own blocks.
        """
        packed = Packed.of(tokens, batches, device=self.backbone.device)
        return packed, self.backbone.run(packed, self.stack, self._start(tokens, batches, packed))

    def base(self, tokens: Tokens, sequences: Indices) -> tuple[Packed, torch.Tensor]:
        """Return the same of some sequences by the frozen model alone, without a gradient."""
        packed = Packed.of(tokens, [sequences], device=self.backbone.device)
        with torch.inference_mode():
            return packed, self.backbone.run(packed, NOTHING, self.backbone.embed(packed))

    def groups(self, sequences: Indices) -> list[Indices]:
        """Return sequences to be computed together, so that results do not depend on the past."""
        return [sequences]

    def _start(self, tokens: Tokens, batches: Sequence[Indices], packed: Packed) -> Start:
        return self.backbone.embed(packed)


class CachedPasses(Passes):
    """The same from cached activations, for the sequences that ``features`` has.

    Parameters
    ----------
    features
    level : up to where nothing is trained.
    blocks, scales, common_scale : what is below ``level`` is as in here, for as long as this object lives;
        what is above may be on its way in ``stack``.
    """

    def __init__(
        self,
        backbone: Backbone,
        devices: Sequence[int],
        stack: Stack,
        *,
        features: Features,
        level: Level,
        blocks: Sequence[Tensors],
        scales: Sequence[float],
        common_scale: float,
    ) -> None:
        super().__init__(backbone, devices, stack)
        self._features, self._level = features, level
        self._blocks, self._scales, self._common_scale = blocks, scales, common_scale

    def base(self, tokens: Tokens, sequences: Indices) -> tuple[Packed, torch.Tensor]:
        if tokens is not self._features.tokens:
            return super().base(tokens, sequences)
        top = Level(self.backbone.layer_count)
        with torch.inference_mode():
            start = self._features.start(top, self.devices[:1], [sequences], [{}], [1.0], 1.0)
        return Packed.of(tokens, [sequences], device=self.backbone.device), start.hidden

    def groups(self, sequences: Indices) -> list[Indices]:
        return self._features.groups(sequences)

    def _start(self, tokens: Tokens, batches: Sequence[Indices], packed: Packed) -> Start:
        if tokens is not self._features.tokens:
            return super()._start(tokens, batches, packed)
        return self._features.start(
            self._level, self.devices, batches, self._blocks, self._scales, self._common_scale
        )
