"""Answers, sampled or likeliest, token by token, by devices with blocks of their own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pwff_opt.federated.model.attention import Around
from pwff_opt.federated.model.backbone import Backbone, Stack, Start
from pwff_opt.federated.model.products import filled
from pwff_opt.federated.model.workers import out_of_memory
from pwff_opt.federated.text.tokens import Indices, Packed, Tokens

logger = logging.getLogger(__name__)

LEFT_BEHIND = 0.25  # share of a batch that is over, from which on copying the rest is less work


def generate(
    backbone: Backbone,
    stack: Stack,
    prompts: Tokens,
    batches: Sequence[Indices],
    *,
    longest: int,
    stop: int,
    draws: NDArray[np.float64] | None = None,
    temperature: float = 1.0,
) -> list[Indices]:
    """Return an answer to each prompt, device after device, its end included where it came to one.

    Where memory does not suffice for all prompts together, they are answered in halves.

    Parameters
    ----------
    backbone : with a head over its vocabulary, of a family that is causal.
    stack : blocks of the devices.
    prompts, batches : sequences, and which of them each device answers.
    longest : most tokens of an answer.
    stop : the token that ends an answer.
    draws : [prompt, longest], evenly in [0, 1): the tokens are drawn by them, from the model's
        distribution at ``temperature``. None: always the likeliest token.
    """
    how: dict[str, Any] = {"longest": longest, "stop": stop, "temperature": temperature}
    try:
        return _together(backbone, stack, prompts, batches, draws=draws, **how)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error) or max(map(len, batches)) < 2:
            raise
    logger.warning("out of memory: %d prompts are now answered in halves", sum(map(len, batches)))
    parts = []
    owners = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
    later = np.concatenate([np.arange(len(batch)) >= len(batch) / 2 for batch in batches])
    for half in (~later, later):
        own = [prompt[half[owners == k]] for k, prompt in enumerate(batches)]
        drawn = None if draws is None else draws[half]
        parts.append(iter(generate(backbone, stack, prompts, own, draws=drawn, **how)))
    return [next(parts[half]) for half in later.astype(int)]


def _together(
    backbone: Backbone,
    stack: Stack,
    prompts: Tokens,
    batches: Sequence[Indices],
    *,
    longest: int,
    stop: int,
    draws: NDArray[np.float64] | None,
    temperature: float,
) -> list[Indices]:
    device = backbone.device
    with torch.inference_mode():
        packed = Packed.of(prompts, batches, device=device)
        memory = _Memory(packed, longest)
        hidden = backbone.run(
            packed, stack, backbone.embed(packed), around=memory.first(backbone, packed)
        )
        rows = packed.last(hidden)
        owner = torch.arange(len(batches), device=device).repeat_interleave(
            torch.tensor(packed.sequence_counts, device=device)
        )
        # What goes on: which sequences, where their next token comes, whether they are over already.
        alive, place = torch.arange(packed.sequences, device=device), packed.lengths
        over = torch.zeros_like(alive, dtype=torch.bool)
        table = torch.full((packed.sequences, longest), stop, device=device)
        for number in range(longest):
            logits = backbone.tokens(rows)
            if draws is None:
                token = logits.argmax(-1)
            else:
                shares = (logits / temperature).softmax(-1).double().cumsum(-1)
                drawn = torch.from_numpy(draws[:, number]).to(device)[alive, None]
                token = torch.searchsorted(shares, drawn * shares[:, -1:], right=True)[:, 0]
                token = token.clamp_max(logits.shape[1] - 1)
            table[alive, number] = token  # after its end a sequence only writes what is not read
            over |= token == stop
            if bool(over.all()) or number == longest - 1:
                break
            if int(over.sum()) >= LEFT_BEHIND * len(alive):
                going = (~over).nonzero()[:, 0]
                memory.keep(going)
                alive, place, token, over = (x[going] for x in (alive, place, token, over))
            counts = owner[alive].bincount(minlength=len(batches)).tolist()
            step = _one_more(token, place, counts)
            start = Start(layer=0, hidden=backbone.ends.embed(step))
            rows = backbone.run(step, stack, start, around=memory.next(backbone, step))
            place = place + 1
    found = table.cpu().numpy()
    ends = np.where((found == stop).any(1), (found == stop).argmax(1) + 1, longest)
    return [row[:end] for row, end in zip(found, ends, strict=True)]


def _one_more(token: torch.Tensor, place: torch.Tensor, counts: Sequence[int]) -> Packed:
    """Return a batch of one token for each sequence, at its place there; ``counts``: of every device."""
    order = torch.arange(len(token), device=token.device)
    return Packed(
        ids=token,
        positions=place,
        lengths=torch.ones_like(place),
        width=1,
        sequence_of=order,
        places=order,
        slots=order,
        inside=None,
        token_counts=tuple(counts),
        sequence_counts=tuple(counts),
    )


class _Memory:
    """Keys and values of all layers, of prompts and of what has been answered so far."""

    def __init__(self, packed: Packed, longest: int) -> None:
        self.room = packed.width + longest
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        """[sequence, head, place, size] of each layer."""

    def keep(self, sequences: torch.Tensor) -> None:
        """Forget all but some sequences."""
        self.layers = [(keys[sequences], values[sequences]) for keys, values in self.layers]

    def first(self, backbone: Backbone, packed: Packed) -> Around:
        return _Writing(backbone.ends.around(packed), self)

    def next(self, backbone: Backbone, packed: Packed) -> Around:
        return _Reading(backbone.ends.around(packed), self)


class _Writing(Around):
    """Attention among the prompt's tokens, which remembers their keys and values."""

    def __init__(self, plain: Around, memory: _Memory) -> None:
        super().__init__(plain.packed, causal=True, rotary=plain.rotary, window=plain.window)
        self._memory = memory

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float
    ) -> torch.Tensor:
        packed, kept = self.packed, []
        for x in (keys, values):
            room = x.new_zeros(packed.sequences, x.shape[1], self._memory.room, x.shape[2])
            room[packed.sequence_of, :, packed.positions] = x[: len(packed.ids)]
            kept.append(room)
        self._memory.layers.append((kept[0], kept[1]))
        return super().attend(queries, keys, values, scale=scale)


class _Reading(Around):
    """Attention of one token of each sequence to those before it, layer after layer."""

    def __init__(self, plain: Around, memory: _Memory) -> None:
        super().__init__(plain.packed, causal=False, rotary=plain.rotary)
        self._layers = iter(memory.layers)
        own = self.packed.positions[:, None]
        places = torch.arange(memory.room, device=own.device)[None]
        self._unseen = places > own
        if plain.window is not None:
            self._unseen |= plain.window.bars(own, places)

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float
    ) -> torch.Tensor:
        known_keys, known_values = next(self._layers)
        order, place = self.packed.sequence_of, self.packed.positions
        queries, keys, values = (x[: len(order)] for x in (queries, keys, values))
        known_keys[order, :, place] = keys
        known_values[order, :, place] = values
        # Several heads of queries share one of keys and values, in order.
        grouped = queries.unflatten(1, (keys.shape[1], -1))
        scores = (grouped * scale) @ known_keys.transpose(2, 3)
        scores = scores.masked_fill(self._unseen[:, None, None], -torch.inf)
        return filled((scores.softmax(-1) @ known_values).flatten(1))
