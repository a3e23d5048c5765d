"""What devices and server exchange in a round: uploads, their merging, the broadcast."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from pwff_opt.errors import TrainingError
from pwff_opt.federated.exchange.average import average
from pwff_opt.federated.exchange.privacy import add_noise, clip
from pwff_opt.federated.exchange.rules import Factors, LoraRule, Merged
from pwff_opt.federated.exchange.rules._factors import ideal
from pwff_opt.federated.exchange.server import step
from pwff_opt.federated.exchange.uploads import encode, require_finite
from pwff_opt.federated.model.blocks import Tensors, layer_of, lora_scale
from pwff_opt.registry import RULES
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.schedule import LayerState, RoundDecision


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All that a round leaves to the next."""

    devices: tuple[Tensors, ...]
    """Every device's blocks."""
    sent: Tensors = field(default_factory=dict)
    """What the server has sent to all, as last sent; at the rank that the devices have by now."""
    moments: Tensors = field(default_factory=dict)
    """Moments of the server's optimiser."""
    residuals: tuple[Tensors, ...] = ()
    """What each device's uploads owe to the server: error feedback of int8."""


class Exchange:
    """The rules of ``[aggregation]``, applied to one round.

    Parameters
    ----------
    scenario
    number : the round, counted from 0.
    decision : its ranks and layer states.
    """

    def __init__(self, scenario: Scenario, number: int, decision: RoundDecision) -> None:
        self._scenario, self._number, self._decision = scenario, number, decision
        self._table, self._peft = scenario.aggregation, scenario.peft
        self._private = self._table.clip_norm > 0 and self._table.noise_multiplier > 0
        self._rule: LoraRule = RULES[self._table.lora]

    def learns(self, name: str) -> bool:
        """Return whether the blocks of this name are trained."""
        layer = layer_of(name)
        if layer is None:
            return True
        state = self._decision.states[layer]
        if state is LayerState.FROZEN or name.startswith("delta."):
            return False
        if not _is_lora(name):
            return True
        aggregated = state is LayerState.AGGREGATED
        return self._rule.trains(self._number, aggregated=aggregated)[name.endswith(".B")]

    def sends(self, name: str) -> bool:
        """Return whether the blocks of this name are uploaded."""
        layer = layer_of(name)
        if layer is None:
            return self._peft.head == "shared"
        if self._decision.states[layer] is not LayerState.AGGREGATED:
            return False
        if _is_lora(name):
            return self._rule.sends(self._number)[name.endswith(".B")]
        if name.startswith("adapter."):
            return self._table.adapter == "average"
        return name.startswith("common.")

    def is_sound(self, learned: Tensors) -> bool:
        """Return whether all that a device has learned is finite, on the air too if it is uploaded."""
        return all(
            bool(torch.isfinite(self._on_air(t) if self.sends(name) else t).all())
            for name, t in learned.items()
        )

    def merge(
        self,
        before: Sequence[Tensors],
        after: Sequence[Tensors],
        present: Sequence[bool],
        planned: int,
        weights: Sequence[float],
        state: State,
        *,
        public: Tensors,
        fresh: Callable[[int, int, str], torch.Tensor],
    ) -> tuple[State, tuple[int, ...]]:
        """Return the state after the round, and how many bits each device has uploaded.

        Updates are clipped as changes since ``before``. Where noise is added they are changes since
        ``public``, for what has been learned in personal rounds is private too.

        Parameters
        ----------
        before, after : blocks of every device before and after its local steps.
        present : whether a device's upload counts: it took part and did not diverge.
        planned : how many were to take part.
        weights : of the devices in averages. Where noise is added all weigh the same.
        state : as the round found it.
        public : the blocks as server and devices know them whatever the data, at this round's rank: as
            last sent to all, or as drawn in common. It has no LoRA that the rule does not average.
        fresh : (device, layer, projection) -> a new A, for rules that start anew.
        """
        senders = [k for k, here in enumerate(present) if here]
        shares = {k: 1.0 if self._private else weights[k] for k in senders}
        received, residuals, bits = self._receive_all(senders, before, after, public, state)
        shared = average(
            [{n: t for n, t in received[k].items() if not _is_lora(n)} for k in senders],
            list(shares.values()),
        )
        devices = [dict(own) for own in after]
        shared |= self._merge_factors(devices, received, shares, fresh)
        if self._private:
            shared = self._noised(shared, public, len(senders), planned)
        shared, moments = self._stepped(shared, public, state)
        for own in devices:  # all hold the same objects
            own.update({name: tensor for name, tensor in shared.items() if name in own})
        return (
            State(
                devices=tuple(devices),
                sent={n: t for n, t in public.items() if n in state.sent} | shared,
                moments=moments,
                residuals=residuals,
            ),
            bits,
        )

    def _receive_all(
        self,
        senders: Sequence[int],
        before: Sequence[Tensors],
        after: Sequence[Tensors],
        public: Tensors,
        state: State,
    ) -> tuple[dict[int, Tensors], tuple[Tensors, ...], tuple[int, ...]]:
        """Return what arrives of every sender; for all devices, what uploads owe and their size in bits.

        What was owed of a LoRA that was given up or resized goes with it.
        """
        residuals = [
            {name: tensor for name, tensor in owed.items() if _is_kept(name, old, new)}
            for owed, old, new in zip(
                state.residuals or ({},) * len(after), state.devices, before, strict=True
            )
        ]
        bits = [0] * len(after)
        received: dict[int, Tensors] = {}
        for k in senders:
            received[k], residuals[k], bits[k] = self._receive(
                k, before[k], after[k], public, residuals[k]
            )
        return received, tuple(residuals), tuple(bits)

    def _noised(self, mean: Tensors, public: Tensors, sent: int, planned: int) -> Tensors:
        """Return the new values of what was averaged as changes since ``public``, with noise.

        One that diverged counts as no change: how many do must not show in the average.
        """
        changes = add_noise(
            {name: change * (sent / planned) for name, change in mean.items()},
            noise_multiplier=self._table.noise_multiplier,
            clip_norm=self._table.clip_norm,
            participants=planned,
            seed=self._scenario.seeds.training,
            round=self._number,
        )
        return {
            name: (public[name].double() + change.double()).float()
            for name, change in changes.items()
        }

    def _stepped(self, mean: Tensors, public: Tensors, state: State) -> tuple[Tensors, Tensors]:
        """Return the shared blocks after the server's step, as they arrive, and the server's new moments.

        Moments of a LoRA that was given up or resized go with it.
        """
        moments = {
            key: tensor
            for key, tensor in state.moments.items()
            if _is_kept(key.split("/", 1)[1], state.sent, public)
        }
        # Devices that have trained a block alone so far did not start from the server's.
        previous = {
            name: public[name]
            for name in mean
            if name in state.sent or name not in state.devices[0]
        }
        shared, moments = step(self._table, previous, mean, moments)
        shared = {name: self._on_air(tensor) for name, tensor in shared.items()}
        try:
            require_finite(shared)
        except TrainingError as error:
            raise TrainingError(
                f"round {self._number}: {error} after the server's step; lower aggregation."
                f"server_learning_rate ({self._table.server_learning_rate:g}) or upload float32"
            ) from error
        return shared, moments

    def _receive(
        self, device: int, before: Tensors, after: Tensors, public: Tensors, residual: Tensors
    ) -> tuple[Tensors, Tensors, int]:
        """Return what arrives of a device's blocks, what the upload owes, and its size in bits.

        Where noise is added, it is their change since ``public`` that is returned.
        """
        own = {name: tensor for name, tensor in sorted(after.items()) if self.sends(name)}
        known = {name: public[name] for name in own if name in public}
        try:
            upload, residual = encode(
                own, self._peft.upload_dtype, reference=known, residual=residual
            )
        except TrainingError as error:
            raise TrainingError(f"device {device}, round {self._number}: {error}") from error
        if not self._rule.keeps_basis:
            residual = {name: owed for name, owed in residual.items() if not _is_lora(name)}
        received = upload.decode(known)
        if self._table.clip_norm > 0:
            # After decoding: what rounding adds must not go past the bound either.
            start = known if self._private else before
            change = {name: tensor - start[name] for name, tensor in received.items()}
            change, length = clip(change, self._table.clip_norm)
            if self._private:
                received = change
            elif length > self._table.clip_norm:
                # In float64: rounded to float32, the sum may be further off than the change is long.
                received = {n: start[n].double() + tensor.double() for n, tensor in change.items()}
        return received, residual, upload.bits

    def _merge_factors(
        self,
        devices: Sequence[Tensors],
        received: Mapping[int, Tensors],
        weights: Mapping[int, float],
        fresh: Callable[[int, int, str], torch.Tensor],
    ) -> Tensors:
        """Give every device its merged LoRA; return the factors that are averages, by name."""
        averages: Tensors = {}
        names = sorted({n for own in devices for n in own if _is_lora(n) and n.endswith(".A")})
        for a in names:
            b = f"{a[:-1]}B"
            if not (self.sends(a) or self.sends(b)):
                continue
            holders = [k for k, own in enumerate(devices) if a in own]
            merged = self._merged(a, b, holders, devices, received, weights, fresh)
            if self._rule.averages:
                both = {a: merged.factors[0].a, b: merged.factors[0].b}
                averages |= {name: tensor for name, tensor in both.items() if self.sends(name)}
            else:
                self._deal(a, b, holders, devices, merged)
        return averages

    def _merged(
        self,
        a: str,
        b: str,
        holders: Sequence[int],
        devices: Sequence[Tensors],
        received: Mapping[int, Tensors],
        weights: Mapping[int, float],
        fresh: Callable[[int, int, str], torch.Tensor],
    ) -> Merged:
        """Return what the rule makes of the factors named ``a`` and ``b``, for all who hold them."""
        _, layer, projection, _ = a.split(".")
        sending = [k for k in received if k in holders]
        return self._rule.merge(
            [self._factors(devices[k] | received[k], a, b) for k in sending],
            [weights[k] for k in sending],
            [self._factors(devices[k], a, b) for k in holders],
            round=self._number,
            fresh=lambda place: fresh(holders[place], int(layer), projection),
        )

    def _deal(
        self, a: str, b: str, holders: Sequence[int], devices: Sequence[Tensors], merged: Merged
    ) -> None:
        """Give every device its factors, and all of them what is added to the frozen weight."""
        arrived = [replace(f, a=self._on_air(f.a), b=self._on_air(f.b)) for f in merged.factors]
        for k, own in zip(holders, arrived, strict=True):
            devices[k][a], devices[k][b] = own.a, own.b
        if merged.delta is None:
            return
        # All factors are equal here, or zero: what they have lost on the air goes with the weight.
        lost = ideal(merged.factors[:1], [1.0]) - ideal(arrived[:1], [1.0])
        name = a.removesuffix(".A").replace("lora.", "delta.", 1)
        delta, old = self._on_air(merged.delta + lost.float()), devices[0].get(name)
        total = delta if old is None else old + delta
        for every in devices:
            every[name] = total

    def _factors(self, blocks: Tensors, a: str, b: str) -> Factors:
        return Factors(a=blocks[a], b=blocks[b], scale=lora_scale(self._peft, len(blocks[a])))

    def _on_air(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor as it arrives; averages of int8 uploads have no grid and go as float32."""
        return tensor.half().float() if self._peft.upload_dtype == "float16" else tensor


def _is_lora(name: str) -> bool:
    return name.startswith("lora.")


def _is_kept(name: str, old: Tensors, new: Tensors) -> bool:
    """Return whether a block is the very same in both."""
    return name in new and new[name] is old.get(name)
