"""What devices and server exchange in a round: uploads, their merging, the broadcast."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from pwff_opt.decision import LayerState, RoundDecision
from pwff_opt.errors import TrainingError
from pwff_opt.federated.aggregation import RULES, Factors, average
from pwff_opt.federated.blocks import Tensors, layer_of, lora_scale
from pwff_opt.federated.privacy import add_noise, clip
from pwff_opt.federated.server import step
from pwff_opt.federated.uploads import encode, require_finite
from pwff_opt.scenario import AVERAGING, Scenario


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All that a round leaves to the next."""

    devices: tuple[Tensors, ...]
    """Every device's blocks."""
    sent: Tensors = field(default_factory=dict)
    """What the server has sent to all, as last sent."""
    moments: Tensors = field(default_factory=dict)
    """Of the server's optimiser."""
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
        self._rule = None if self._table.lora == "personal" else RULES[self._table.lora]

    def learns(self, name: str) -> bool:
        """Return whether the blocks of this name are trained."""
        layer = layer_of(name)
        if layer is None:
            return True
        state = self._decision.states[layer]
        if state is LayerState.FROZEN or name.startswith("delta."):
            return False
        if self._rule and name.startswith("lora.") and state is LayerState.AGGREGATED:
            return self._rule.learns(self._number)[name.endswith(".B")]
        return True

    def sends(self, name: str) -> bool:
        """Return whether the blocks of this name are uploaded."""
        layer = layer_of(name)
        if layer is None:
            return self._peft.head == "shared"
        if self._decision.states[layer] is not LayerState.AGGREGATED:
            return False
        if name.startswith("lora."):
            return self._rule is not None and self._rule.sends(self._number)[name.endswith(".B")]
        if name.startswith("adapter."):
            return self._table.adapter == "average"
        return name.startswith("common.")

    def merge(
        self,
        before: Sequence[Tensors],
        after: Sequence[Tensors],
        present: Sequence[bool],
        planned: int,
        weights: Sequence[float],
        state: State,
        *,
        fresh: Callable[[int, int, str], torch.Tensor],
    ) -> tuple[State, tuple[int, ...]]:
        """Return the state after the round, and how many bits each device has uploaded.

        Parameters
        ----------
        before, after : blocks of every device before and after its local steps.
        present : whether a device's upload counts: it took part and did not diverge.
        planned : how many were to take part.
        weights : of the devices in averages. Where noise is added all weigh the same.
        state : as the round found it.
        fresh : (device, layer, projection) -> a new A, for rules that start anew.
        """
        table = self._table
        private = table.clip_norm > 0 and table.noise_multiplier > 0
        senders = [k for k, here in enumerate(present) if here]
        shares = {k: 1.0 if private else weights[k] for k in senders}
        residuals = list(state.residuals or ({} for _ in after))
        reference = self._known(before, state)
        bits = [0] * len(after)
        received: dict[int, Tensors] = {}
        for k in senders:
            received[k], residuals[k], bits[k] = self._receive(k, after[k], reference, residuals[k])
        shared = average(
            [{n: t for n, t in received[k].items() if not _is_lora(n)} for k in senders],
            list(shares.values()),
        )
        devices = [dict(own) for own in after]
        shared |= self._merge_factors(devices, received, shares, fresh)
        if private and shared:
            # One that diverged counts as no change: how many do must not show in the average.
            share, start = len(senders) / planned, _matching(reference, shared)
            shared = {
                name: tensor * share + start.get(name, torch.zeros_like(tensor)) * (1.0 - share)
                for name, tensor in shared.items()
            }
            shared = add_noise(
                shared,
                noise_multiplier=table.noise_multiplier,
                clip_norm=table.clip_norm,
                participants=planned,
                seed=self._scenario.seeds.training,
                round=self._number,
            )
        shared, moments = step(table, _matching(reference, shared), shared, state.moments)
        # Every device then holds the same object.
        shared = {name: self._broadcast(tensor) for name, tensor in shared.items()}
        try:
            require_finite(shared)
        except TrainingError as error:
            raise TrainingError(
                f"round {self._number}: {error} after the server's step; lower "
                f"aggregation.server_learning_rate ({table.server_learning_rate:g}) or upload float32"
            ) from error
        for own in devices:
            own.update({name: tensor for name, tensor in shared.items() if name in own})
        return (
            State(
                devices=tuple(devices),
                sent=state.sent | shared,
                moments=moments,
                residuals=tuple(residuals),
            ),
            tuple(bits),
        )

    def _receive(
        self, device: int, blocks: Tensors, reference: Tensors, residual: Tensors
    ) -> tuple[Tensors, Tensors, int]:
        """Return what arrives of a device's blocks, what the upload owes, and its size in bits."""
        own = {name: tensor for name, tensor in sorted(blocks.items()) if self.sends(name)}
        known = _matching(reference, own)
        try:
            upload, residual = encode(
                own, self._peft.upload_dtype, reference=known, residual=residual
            )
        except TrainingError as error:
            raise TrainingError(f"device {device}, round {self._number}: {error}") from error
        received = upload.decode(known)
        if self._table.clip_norm > 0:
            # After decoding: what rounding adds must not go past the bound either.
            received = _clipped(received, known, self._table.clip_norm)
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
        if self._rule is None:
            return averages
        names = sorted({n for own in devices for n in own if _is_lora(n) and n.endswith(".A")})
        for a in names:
            b = f"{a[:-1]}B"
            if self.sends(a) or self.sends(b):
                first = self._merge_projection(a, b, devices, received, weights, fresh)
                if self._table.lora in AVERAGING:
                    averages |= {name: first[name] for name in (a, b) if self.sends(name)}
        return averages

    def _merge_projection(
        self,
        a: str,
        b: str,
        devices: Sequence[Tensors],
        received: Mapping[int, Tensors],
        weights: Mapping[int, float],
        fresh: Callable[[int, int, str], torch.Tensor],
    ) -> Tensors:
        """Merge the factors named ``a`` and ``b``; return the blocks of the first device with them."""
        assert self._rule is not None
        _, layer, projection, _ = a.split(".")
        holders = [k for k, own in enumerate(devices) if a in own]
        held = {k: self._factors(devices[k], a, b) for k in holders}
        sending = [k for k in received if k in held]
        merged = self._rule.merge(
            [self._factors(devices[k] | received[k], a, b) for k in sending],
            [weights[k] for k in sending],
            [held[k] for k in holders],
            round=self._number,
            fresh=lambda place: fresh(holders[place], int(layer), projection),
        )
        for k, own in zip(holders, merged.factors, strict=True):
            devices[k][a], devices[k][b] = self._broadcast(own.a), self._broadcast(own.b)
        if merged.delta is not None:
            name = f"delta.{layer}.{projection}"
            delta, old = self._broadcast(merged.delta), devices[0].get(name)
            total = delta if old is None else old + delta
            for every in devices:
                every[name] = total
        return devices[holders[0]]

    def _factors(self, blocks: Tensors, a: str, b: str) -> Factors:
        return Factors(a=blocks[a], b=blocks[b], scale=lora_scale(self._peft, len(blocks[a])))

    def _known(self, before: Sequence[Tensors], state: State) -> Tensors:
        """Return what server and devices both hold, whatever the data: what was sent to all, and what
        is new in this round, which comes from a common seed."""
        new = {name: tensor for name, tensor in before[0].items() if name not in state.devices[0]}
        return {name: t for name, t in (new | state.sent).items() if self.sends(name)}

    def _broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor as it arrives; averages of int8 uploads have no grid and go as float32."""
        return tensor.half().float() if self._peft.upload_dtype == "float16" else tensor


def _is_lora(name: str) -> bool:
    return name.startswith("lora.")


def _matching(reference: Tensors, blocks: Tensors) -> Tensors:
    """Return what the reference has of these blocks; one whose rank has changed since has none."""
    return {
        name: reference[name]
        for name, tensor in blocks.items()
        if name in reference and reference[name].shape == tensor.shape
    }


def _clipped(own: Tensors, reference: Tensors, norm: float) -> Tensors:
    """Return the blocks with their change since the reference cut to a norm."""
    start = {name: reference.get(name, torch.zeros_like(tensor)) for name, tensor in own.items()}
    change, length = clip({name: tensor - start[name] for name, tensor in own.items()}, norm)
    if length <= norm:
        return own
    return {name: start[name] + tensor for name, tensor in change.items()}
