"""Cached activations: what layers below the lowest trained one say about every sentence.

Those layers, and the blocks in them, do not change while they are frozen, so their output is worth
keeping.  Where a device has no blocks down there it is the base model's, and holds for good; where it
has, it is the device's own and holds until one of those blocks changes.  There is one place for every
sentence, its owner's: what a device with blocks down there says about others' sentences is not kept.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pwff_opt.errors import TrainingError
from pwff_opt.federated.model.backbone import NOTHING, Backbone, Stack, Start
from pwff_opt.federated.model.blocks import Tensors, layer_of
from pwff_opt.federated.model.workers import out_of_memory
from pwff_opt.federated.text.tokens import Indices, Packed, Tokens, by_length

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Level:
    """A place in the model: the input of a layer, or its output before the adapter acts."""

    layer: int
    completed: bool = False


class _Store:
    """The activations at one level, [token of the corpus, ...], as far as they are known."""

    def __init__(
        self,
        hidden: torch.Tensor,
        projected: torch.Tensor | None,
        sequences: int,
        *,
        memory_byte: int,
    ) -> None:
        self.hidden, self.projected = hidden, projected
        self.memory_byte = memory_byte
        """What it takes of the budget; nothing where it lies in a file."""
        self.known = np.zeros(sequences, dtype=bool)
        self.below: dict[int, Tensors] = {}
        """The blocks of a device that its activations were computed with."""


class Features:
    """Starts for batches, from cached activations where they are known, computed where not.

    Parameters
    ----------
    backbone, tokens
    parts : the sequences that each device holds, [device][part].
    budget_byte : memory for activations; what does not fit is kept in files.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokens: Tokens,
        parts: Sequence[Sequence[Indices]],
        *,
        budget_byte: float,
    ) -> None:
        self._backbone, self.tokens = backbone, tokens
        self._owner = np.zeros(len(tokens), dtype=np.int64)
        # Sequences are always computed in the same company: who else is in a product can show in the
        # last bit, and what a run has asked for before must not.
        self._chunks: list[Indices] = []
        self._chunk_of = np.zeros(len(tokens), dtype=np.int64)
        placed = np.zeros(len(tokens), dtype=bool)
        for device, held in enumerate(parts):
            for part in held:
                # One that examples share has one place: with the first of them.
                own = part[np.sort(np.unique(part, return_index=True)[1])]
                own = own[~placed[own]]
                placed[own] = True
                self._owner[own] = device
                for chunk in by_length(tokens, own):
                    self._chunk_of[chunk] = len(self._chunks)
                    self._chunks.append(chunk)
        self._left_byte = budget_byte
        self._base: dict[Level, _Store] = {}
        self._own: dict[Level, _Store] = {}
        self._lock = threading.Lock()

    def start(
        self,
        level: Level,
        devices: Sequence[int],
        batches: Sequence[Indices],
        blocks: Sequence[Tensors],
        scales: Sequence[float],
        common_scale: float,
    ) -> Start:
        """Return the start at ``level`` of one batch for each device.

        ``blocks``: those that each device has below (:func:`below`).
        """
        tokens = [int(self.tokens.lengths[batch].sum()) for batch in batches]
        rows, width, backbone = sum(tokens), self._width(level), self._backbone
        # Made here, also for a single one: what inference mode made serves no backward pass.
        hidden = torch.empty(rows, backbone.hidden)
        projected = torch.empty(rows, width, dtype=backbone.dtype) if width else None
        stop = 0
        for device, batch, count, own, scale in zip(
            devices, batches, tokens, blocks, scales, strict=True
        ):
            start, stop = stop, stop + count
            moved = {name: tensor.to(backbone.device) for name, tensor in own.items()}
            stack = Stack([moved], [scale], common_scale=common_scale) if own else NOTHING
            if own and (self._owner[batch] != device).any():
                x, p = self._computed(level, batch, stack, own)
                hidden[start:stop] = x
                if projected is not None and p is not None:
                    projected[start:stop] = p
                continue
            store = self._filled(level, device, batch, stack, own)
            places = torch.from_numpy(self.tokens.rows(batch))
            torch.index_select(store.hidden, 0, places, out=hidden[start:stop])
            if projected is not None and store.projected is not None:
                torch.index_select(store.projected, 0, places, out=projected[start:stop])
        return Start(
            layer=level.layer,
            hidden=hidden.to(backbone.device),
            projected=None if projected is None else projected.to(backbone.device),
            completed=level.completed,
        )

    def groups(self, sequences: Indices) -> list[Indices]:
        """Return the sequences in whose company these are always computed, group by group."""
        return [self._chunks[number] for number in np.unique(self._chunk_of[sequences])]

    def _filled(
        self,
        level: Level,
        device: int,
        batch: Indices,
        stack: Stack,
        below: Tensors,
    ) -> _Store:
        """Return the store that holds the activations of a batch at a level."""
        with self._lock:
            stores = self._own if below else self._base
            if level not in stores:
                if below:
                    # Schedules move on: their lowest trained layer of before is not asked for again.
                    self._discard(self._own)
                stores[level] = self._new_store(level)
            store = stores[level]
            known = store.below.get(device, {})
            if known.keys() != below.keys() or any(known[n] is not t for n, t in below.items()):
                store.known[self._owner == device] = False
                store.below[device] = below
        missing = np.unique(self._chunk_of[batch[~store.known[batch]]])
        for number in missing:
            part = self._chunks[number]
            hidden, projected = self._computed(level, part, stack, below)
            rows = torch.from_numpy(self.tokens.rows(part))
            store.hidden[rows] = hidden
            if store.projected is not None and projected is not None:
                store.projected[rows] = projected
            store.known[part] = True
        return store

    def _computed(
        self, level: Level, part: Indices, stack: Stack, below: Tensors
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the activations of some sequences, and what ``_width`` says goes with them."""
        backbone = self._backbone
        packed = Packed.of(self.tokens, [part], device=backbone.device)
        with torch.inference_mode():
            start = self._nearest(level, part, packed, below)
            hidden = backbone.run(packed, stack, start, stop=level.layer, completed=level.completed)
            projected = backbone.project(level.layer, hidden) if self._width(level) else None
        return hidden.cpu(), None if projected is None else projected.cpu().to(backbone.dtype)

    def _width(self, level: Level) -> int:
        """Return how many columns of queries, keys and values are kept beside a level's activations."""
        if level.completed or level.layer == self._backbone.layer_count:
            return 0
        return sum(self._backbone.layers[level.layer].widths.values())

    def _nearest(self, level: Level, part: Indices, packed: Packed, below: Tensors) -> Start:
        """Return the highest start that is known for a batch without any block having acted."""
        layers = [layer for name in below if (layer := layer_of(name)) is not None]
        for layer in range(min(layers, default=level.layer), 0, -1):
            store = self._base.get(Level(layer))
            if store is not None and store.known[part].all():
                rows = torch.from_numpy(self.tokens.rows(part))
                return Start(layer=layer, hidden=store.hidden[rows].to(self._backbone.device))
        return self._backbone.embed(packed)

    def _new_store(self, level: Level) -> _Store:
        rows, backbone, width = int(self.tokens.offsets[-1]), self._backbone, self._width(level)
        need = rows * (backbone.hidden * torch.float32.itemsize + width * backbone.dtype.itemsize)

        def store(
            room: Callable[[int, int, torch.dtype], torch.Tensor], memory_byte: int
        ) -> _Store:
            with torch.inference_mode(False):  # it will be read and written in either mode
                return _Store(
                    room(rows, backbone.hidden, torch.float32),
                    room(rows, width, backbone.dtype) if width else None,
                    len(self.tokens),
                    memory_byte=memory_byte,
                )

        if need <= self._left_byte:
            try:
                new = store(_memory, need)
            except (MemoryError, RuntimeError) as error:
                # The budget is more than there is; a smaller step, the cohort's way out, is no help.
                if not out_of_memory(error):
                    raise
            else:
                self._left_byte -= need
                return new
        logger.info("cached activations: %.2f GB in files in %s", need / 1e9, tempfile.gettempdir())
        return store(_file, 0)

    def _discard(self, stores: dict[Level, _Store]) -> None:
        self._left_byte += sum(store.memory_byte for store in stores.values())
        stores.clear()


def _memory(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(rows, width, dtype=dtype)


def _file(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Return room in a file that goes with the tensor: it has lost its name once it is mapped."""
    need = rows * width * dtype.itemsize
    with tempfile.NamedTemporaryFile(prefix="pwff_opt-features-") as file:
        try:
            # The blocks themselves, now: a write to a mapped file on a full disk kills the process.
            os.posix_fallocate(file.fileno(), 0, need)
        except OSError as error:
            raise TrainingError(
                f"cached activations need {need / 1e9:.2f} GB in {tempfile.gettempdir()} "
                f"({error.strerror}); make room, set TMPDIR, or raise training.feature_cache_byte"
            ) from error
        return torch.from_file(file.name, shared=True, size=rows * width, dtype=dtype).view(
            rows, width
        )


def below(blocks: Tensors, level: Level) -> Tensors:
    """Return those of a device's blocks that act before a level."""
    return {name: tensor for name, tensor in blocks.items() if _is_below(name, level)}


def _is_below(name: str, level: Level) -> bool:
    layer = layer_of(name)
    if layer is None:
        return False
    acts_in_layer = level.completed and not name.startswith("adapter.")
    return layer < level.layer or (layer == level.layer and acts_in_layer)
