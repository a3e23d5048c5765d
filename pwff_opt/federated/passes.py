"""Passes through the model for devices with blocks of their own, from cached activations where they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pwff_opt.federated.backbone import NOTHING, Backbone, Stack
from pwff_opt.federated.blocks import Tensors
from pwff_opt.federated.features import Features, Level
from pwff_opt.federated.tokens import Indices, Packed, Tokens


class CachedPasses:
    """Passes of the sequences that ``features`` knows, and of any others from the bottom.

    Parameters
    ----------
    backbone, features
    level : up to where nothing is trained.
    devices : who they are.
    blocks, scales, common_scale : what is below ``level`` is as in here, for as long as this object lives.
    stack : the blocks as they are in the pass; those above ``level`` may be on their way.
    """

    def __init__(
        self,
        backbone: Backbone,
        features: Features,
        level: Level,
        devices: Sequence[int],
        blocks: Sequence[Tensors],
        scales: Sequence[float],
        common_scale: float,
        stack: Stack,
    ) -> None:
        self._backbone, self._features, self._level = backbone, features, level
        self.devices, self.stack = devices, stack
        self._blocks, self._scales, self._common_scale = blocks, scales, common_scale

    def own(self, tokens: Tokens, batches: Sequence[Indices]) -> tuple[Packed, torch.Tensor]:
        packed = Packed.of(tokens, batches, device=self._backbone.device)
        if tokens is self._features.tokens:
            start = self._features.start(
                self._level, self.devices, batches, self._blocks, self._scales, self._common_scale
            )
        else:
            start = self._backbone.embed(packed)
        return packed, self._backbone.run(packed, self.stack, start)

    def base(self, tokens: Tokens, batches: Sequence[Indices]) -> tuple[Packed, torch.Tensor]:
        packed = Packed.of(tokens, batches, device=self._backbone.device)
        with torch.inference_mode():
            if tokens is not self._features.tokens:
                return packed, self._backbone.run(packed, NOTHING, self._backbone.embed(packed))
            start = self._features.start(
                Level(self._backbone.layer_count),
                self.devices,
                batches,
                [{}] * len(batches),
                [1.0] * len(batches),
                1.0,
            )
        return packed, start.hidden
