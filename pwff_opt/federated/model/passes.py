"""Passes through the model for devices with blocks of their own, from cached activations where they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pwff_opt.federated.model.backbone import NOTHING, Backbone, Stack, Start
from pwff_opt.federated.model.blocks import Tensors
from pwff_opt.federated.model.features import Features, Level, below
from pwff_opt.federated.text.tokens import Indices, Packed, Tokens

REMEMBERED_TOKENS = 8192  # a step's sampled answers, with room to spare


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
    """The same from cached activations.

    Those of the data are in ``features``. Other sequences, answers sampled just now, are gone through several
    times in a row, by the device's model and by the reference: what the latest of them are below ``level``
    is remembered.

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
        self._scales, self._common_scale = scales, common_scale
        self._below = [below(own, level) for own in blocks]
        self._latest: Tokens | None = None
        self._starts: dict[bytes, Start] = {}
        """Of ``_latest``, by sequences."""

    def base(self, tokens: Tokens, sequences: Indices) -> tuple[Packed, torch.Tensor]:
        if tokens is not self._features.tokens:
            if any(self._below):  # else the devices' models are the frozen one, there
                return super().base(tokens, sequences)
            packed = Packed.of(tokens, [sequences], device=self.backbone.device)
            with torch.inference_mode():
                start = self._remembered(tokens, sequences, packed)
                return packed, self.backbone.run(packed, NOTHING, start)
        top = Level(self.backbone.layer_count)
        with torch.inference_mode():
            start = self._features.start(top, self.devices[:1], [sequences], [{}], [1.0], 1.0)
        return Packed.of(tokens, [sequences], device=self.backbone.device), start.hidden

    def groups(self, sequences: Indices) -> list[Indices]:
        return self._features.groups(sequences)

    def _start(self, tokens: Tokens, batches: Sequence[Indices], packed: Packed) -> Start:
        if tokens is not self._features.tokens:
            return self._remembered(tokens, np.concatenate(batches), packed)
        return self._features.start(
            self._level, self.devices, batches, self._below, self._scales, self._common_scale
        )

    def _remembered(self, tokens: Tokens, sequences: Indices, packed: Packed) -> Start:
        """Return the start at ``level`` of sequences that ``features`` does not have."""
        if tokens is not self._latest:
            self._latest, self._starts = tokens, {}
        key, level = sequences.tobytes(), self._level
        if key in self._starts:
            return self._starts[key]
        # Not in inference mode: a backward pass may read it later.
        with torch.inference_mode(False), torch.no_grad():
            hidden = self.backbone.run(
                packed,
                self.stack,
                self.backbone.embed(packed),
                stop=level.layer,
                completed=level.completed,
            )
        start = Start(layer=level.layer, hidden=hidden, completed=level.completed)
        known = sum(len(other.hidden) for other in self._starts.values())
        if known + len(hidden) <= REMEMBERED_TOKENS:
            self._starts[key] = start
        return start
