"""Round decisions, schedules and their genome: what the search chooses and the trainer carries out.

A *round decision* gives every device a LoRA rank and every layer a state; a *schedule* is one
decision per round. Allocation (bandwidth, power, frequency) is not part of it: it does not change
what is learned, so it is optimised exactly afterwards (see :mod:`pwff_opt.planning.planner`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate, groupby

import numpy as np
from numpy.typing import NDArray

from pwff_opt.errors import DecisionError
from pwff_opt.scenario import Decisions


class LayerState(IntEnum):
    """What happens to the trainable blocks of one transformer layer in one round.

    ``FROZEN``: nothing is trained; the backward pass stops below the lowest layer that is not frozen.
    ``PERSONAL``: adapter and LoRA are trained and stay on the device.
    ``AGGREGATED``: adapter and LoRA are trained; what ``[aggregation]`` names, the adapter unless it says
    otherwise, is uploaded, averaged and sent back.
    """

    FROZEN = 0
    PERSONAL = 1
    AGGREGATED = 2


MOST_ROUNDS = 10_000  # that a text may ask for: a slip of the finger must not take all memory
_LETTERS = "fpa"
_RANKS = r"[0-9]{1,4000}(?:,[0-9]{1,4000})*"  # Python reads no numbers of more digits than 4300


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundDecision:
    """Ranks [device] and layer states [layer], lowest layer first, of one round.

    The rank is that of every layer with blocks, also of one that is frozen by now: a LoRA is resized when
    the rank changes between phases, and given up at rank 0.

    Its text, ``4:ffppaa`` or ``2,4,8:ffppaa``, names it in tables and keys: the common rank or one a
    device, then a letter a layer (frozen, personal, aggregated).
    """

    ranks: tuple[int, ...]
    states: tuple[LayerState, ...]

    def __post_init__(self) -> None:
        if not self.ranks or not self.states:
            raise DecisionError("a round decision needs at least one device and one layer")
        for device, rank in enumerate(self.ranks):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
                raise DecisionError(f"ranks[{device}] must be a whole number >= 0, got {rank!r}")
        object.__setattr__(self, "states", tuple(LayerState(state) for state in self.states))

    @property
    def trained(self) -> tuple[bool, ...]:
        """Whether each layer's blocks learn."""
        return tuple(state is not LayerState.FROZEN for state in self.states)

    def __str__(self) -> str:
        common = len(set(self.ranks)) == 1
        ranks = str(self.ranks[0]) if common else ",".join(map(str, self.ranks))
        return f"{ranks}:{''.join(_LETTERS[state] for state in self.states)}"

    @classmethod
    def parse(cls, text: str, *, devices: int) -> RoundDecision:
        """Read ``4:ffppaa`` (a rank common to all ``devices``) or one rank a device."""
        match = re.fullmatch(rf"({_RANKS}):([fpa]+)", text.strip())
        if match is None:
            raise DecisionError(
                "a round decision must read like '4:ffppaa' (a rank, or one a device, then a letter a layer: "
                f"f frozen, p personal, a aggregated), got {text!r}"
            )
        ranks = tuple(int(rank) for rank in match[1].split(","))
        if len(ranks) == 1:
            ranks *= devices
        if len(ranks) != devices:
            raise DecisionError(f"{text!r} must give 1 or {devices} ranks, got {len(ranks)}")
        return cls(ranks=ranks, states=tuple(LayerState(_LETTERS.index(x)) for x in match[2]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One decision per round. Its text, ``2x4:ffaaaa 2x0:ffffpp``, counts equal rounds in a row."""

    rounds: tuple[RoundDecision, ...]

    def __post_init__(self) -> None:
        if not self.rounds:
            raise DecisionError("a schedule needs at least one round")
        for number, decision in enumerate(self.rounds):
            shape = (len(decision.ranks), len(decision.states))
            first = (len(self.rounds[0].ranks), len(self.rounds[0].states))
            if shape != first:
                raise DecisionError(
                    f"rounds[{number}] must have {first[0]} ranks and {first[1]} layers like "
                    f"rounds[0], got {shape[0]} and {shape[1]}"
                )

    def __len__(self) -> int:
        return len(self.rounds)

    @property
    def present(self) -> tuple[tuple[bool, ...], ...]:
        """Whether each layer has blocks in its forward pass, [round][layer].

        It has them from the first round it is not frozen in: until then they are the identity.
        """
        return tuple(
            accumulate(
                (decision.trained for decision in self.rounds),
                lambda before, now: tuple(a or b for a, b in zip(before, now, strict=True)),
            )
        )

    def canonical(self) -> Schedule:
        """Return the schedule with rank 0 in rounds where no layer has blocks to carry a LoRA."""
        nothing = (0,) * len(self.rounds[0].ranks)
        return Schedule(
            rounds=tuple(
                decision if any(present) else RoundDecision(ranks=nothing, states=decision.states)
                for decision, present in zip(self.rounds, self.present, strict=True)
            )
        )

    def prefix(self, rounds: int) -> Schedule:
        """Return the first rounds of this schedule: training is nested, so it is trained too."""
        return Schedule(rounds=self.rounds[:rounds])

    def __str__(self) -> str:
        runs = [(len(list(group)), text) for text, group in groupby(map(str, self.rounds))]
        return " ".join(f"{count}x{text}" for count, text in runs)

    @classmethod
    def parse(cls, text: str, *, devices: int) -> Schedule:
        """Read the text of a schedule; ``2x`` before a decision repeats it."""
        rounds: list[RoundDecision] = []
        for part in text.split():
            match = re.fullmatch(rf"(?:([0-9]{{1,4000}})x)?({_RANKS}:[fpa]+)", part)
            if match is None:
                raise DecisionError(
                    "a schedule must read like '4x8:ffffpa 2x4:ffffaa' (rounds x rank, or one rank a "
                    "device, then a letter a layer, lowest first: f frozen, p personal, a aggregated), "
                    f"got {part!r}" + (f" in {text!r}" if part != text else "")
                )
            count = int(match[1] or 1)
            if count > MOST_ROUNDS - len(rounds):
                raise DecisionError(
                    f"a schedule must have at most {MOST_ROUNDS} rounds, got {count} of {match[2]!r}"
                )
            rounds += [RoundDecision.parse(match[2], devices=devices)] * count
        if not rounds:
            raise DecisionError(f"a schedule must have at least one round, got {text!r}")
        return cls(rounds=tuple(rounds))


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """Between schedules and genomes, the integer arrays that the search varies.

    A genome holds, phase after phase:

    - one gene a rank (one, or one a device), an index into ``space.ranks``;
    - the depth: groups of layers below the last ``depth`` ones are frozen. What a schedule costs goes
      with it before all, so it is one ordered gene: a mutation is a small step in cost, and random
      genomes are spread evenly over cheap and dear ones. Without "frozen" in the space it has one value;
    - one gene a group of layers, an index into ``space.layer_states``, idle below the depth.

    Phases are stretches of rounds, groups stretches of layers, as equal as can be, longer ones first.
    """

    space: Decisions
    devices: int
    layers: int
    rounds: int

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Number of layers of every group, lowest first."""
        groups = min(self.space.layer_groups, self.layers) or self.layers
        return tuple(len(part) for part in np.array_split(np.arange(self.layers), groups))

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Layers below each group, and last the number of layers: where it may freeze."""
        return tuple(np.cumsum([0, *self.group_sizes]).tolist())

    @property
    def _rank_genes(self) -> int:
        return 1 if self.space.rank_scope == "common" else self.devices

    @property
    def _freezes(self) -> bool:
        return LayerState.FROZEN in self._states

    def _rank_index(self, rank: int) -> int:
        # Rank 0 stands in a canonical schedule where any rank would do.
        return self.space.ranks.index(rank) if rank or 0 in self.space.ranks else 0

    @property
    def _states(self) -> tuple[LayerState, ...]:
        return tuple(LayerState[name.upper()] for name in self.space.layer_states)

    @property
    def cardinalities(self) -> NDArray[np.int64]:
        """Number of values of every gene."""
        phase = [len(self.space.ranks)] * self._rank_genes
        groups = len(self.group_sizes)
        phase += [groups + 1 if self._freezes else 1]
        phase += [len(self.space.layer_states)] * groups
        return np.array(phase * self.space.phases)

    @property
    def ordinal(self) -> NDArray[np.bool_]:
        """Whether a gene's values have an order (ranks, depth): a step is a smaller change."""
        phase = [True] * (self._rank_genes + 1) + [False] * len(self.group_sizes)
        return np.array(phase * self.space.phases)

    @property
    def _phase_lengths(self) -> list[int]:
        return [len(part) for part in np.array_split(np.arange(self.rounds), self.space.phases)]

    def decode(self, genome: NDArray[np.integer]) -> Schedule:
        """Return the canonical schedule of a genome [gene]."""
        cardinalities = self.cardinalities
        if genome.shape != cardinalities.shape:
            raise DecisionError(f"genome must have {len(cardinalities)} genes, got {genome.shape}")
        outside = np.flatnonzero((genome < 0) | (genome >= cardinalities))
        if len(outside):
            gene = outside[0]
            raise DecisionError(
                f"genome[{gene}] must be in 0..{cardinalities[gene] - 1}, got {genome[gene]}"
            )
        alphabet, rounds, present = self._states, list[RoundDecision](), False
        sizes = self.group_sizes
        phases = genome.reshape(self.space.phases, -1).tolist()
        for part, length in zip(phases, self._phase_lengths, strict=True):
            depth = part[self._rank_genes] if self._freezes else len(sizes)
            by_group = [LayerState.FROZEN] * (len(sizes) - depth)
            by_group += [alphabet[gene] for gene in part[-depth:] if depth]
            states = tuple(
                state for state, size in zip(by_group, sizes, strict=True) for _ in range(size)
            )
            present = present or any(state is not LayerState.FROZEN for state in states)
            # canonical: no layer with blocks, no rank
            ranks = tuple(self.space.ranks[gene] * present for gene in part[: self._rank_genes])
            if self._rank_genes == 1:
                ranks *= self.devices
            rounds += [RoundDecision(ranks=ranks, states=states)] * length
        return Schedule(rounds=tuple(rounds))

    def normalised(self, genomes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return genomes [genome, gene] with idle genes 0: those of layers below the depth."""
        if not self._freezes:
            return genomes
        phases = genomes.reshape(len(genomes), self.space.phases, -1)
        depth = phases[:, :, self._rank_genes]
        groups = len(self.group_sizes)
        idle = np.arange(groups) < groups - depth[:, :, None]
        states = phases[:, :, self._rank_genes + 1 :]
        result = phases.copy()
        result[:, :, self._rank_genes + 1 :] = np.where(idle, 0, states)
        return result.reshape(genomes.shape)

    def encode(self, schedule: Schedule) -> NDArray[np.int64]:
        """Return the genome of a schedule; decoding it gives the schedule back."""
        starts = np.concatenate([[0], np.cumsum(self._phase_lengths)])[:-1]
        genome: list[int] = []
        if len(schedule) != self.rounds:
            raise DecisionError(f"schedule must have {self.rounds} rounds, got {len(schedule)}")
        for start in starts:
            decision = schedule.rounds[start]
            try:
                genome += [self._rank_index(rank) for rank in decision.ranks[: self._rank_genes]]
                by_group = [decision.states[lowest] for lowest in self.boundaries[:-1]]
                trained = [state is not LayerState.FROZEN for state in by_group]
                if self._freezes:
                    frozen = trained.index(True) if any(trained) else len(trained)
                    genome += [len(trained) - frozen]
                else:
                    genome += [0]
                genome += [self._states.index(state) for state in by_group]
            except ValueError as error:
                raise DecisionError(f"{decision} is outside the decision space: {error}") from None
        result = np.array(genome)
        if self.decode(result) != schedule.canonical():
            raise DecisionError(
                f"{schedule} does not fit {self.space.phases} phase(s) of {self.rounds} rounds and "
                f"{len(self.group_sizes)} group(s) of {self.layers} layers"
            )
        return result
