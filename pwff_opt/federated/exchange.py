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
from pwff_opt.scenario import Scenario

AVERAGING = ("fedit", "ffa", "fedsa", "rolora")
"""Rules that send plain averages of factors, which noise and server optimisers can act on."""


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
        weights = [1.0 if private else weights[k] for k in senders]
        residuals = list(state.residuals or ({} for _ in after))
        reference = self._known(before, state)
        bits = [0] * len(after)
        received: dict[int, Tensors] = {}
        for k in senders:
            own = {name: t for name, t in sorted(after[k].items()) if self.sends(name)}
            known = {
                name: reference[name]
                for name, tensor in own.items()
                if name in reference and reference[name].shape == tensor.shape
            }
            try:
                upload, residuals[k] = encode(
                    own, self._peft.upload_dtype, reference=known, residual=residuals[k]
                )
            except TrainingError as error:
                raise TrainingError(f"device {k}, round {self._number}: {error}") from error
            bits[k] = upload.bits
            received[k] = upload.decode(known)
            if table.clip_norm > 0:
                # After decoding: what rounding adds must not go past the bound either.
                received[k] = _clipped(received[k], known, table.clip_norm)
        shared = average(
            [{n: t for n, t in received[k].items() if not _is_lora(n)} for k in senders], weights
        )
        devices = [dict(own) for own in after]
        factors = self._merge_factors(devices, received, senders, weights, fresh)
        if self._table.lora in AVERAGING:
            shared |= factors
        if private and shared:
            # One that diverged counts as no change: how many do must not show in the average.
            share = len(senders) / planned
            shared = {
                n: t * share + reference.get(n, torch.zeros_like(t)) * (1.0 - share)
                for n, t in shared.items()
            }
            shared = add_noise(
                shared,
                noise_multiplier=table.noise_multiplier,
                clip_norm=table.clip_norm,
                participants=planned,
                seed=self._scenario.seeds.training,
                round=self._number,
            )
        previous = {name: reference[name] for name in shared if name in reference}
        shared, moments = step(table, previous, shared, state.moments)
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

    def _merge_factors(
        self,
        devices: Sequence[Tensors],
        received: Mapping[int, Tensors],
        senders: Sequence[int],
        weights: Sequence[float],
        fresh: Callable[[int, int, str], torch.Tensor],
    ) -> Tensors:
        """Give every device its merged LoRA; return the factors that are averages, by name."""
        averages: Tensors = {}
        rule, number = self._rule, self._number
        if rule is None or not senders:
            return averages
        names = sorted({n for own in devices for n in own if _is_lora(n) and n.endswith(".A")})
        for a in names:
            b, (_, layer, projection, _) = f"{a[:-1]}B", a.split(".")
            if not (self.sends(a) or self.sends(b)):
                continue
            holders = [k for k, own in enumerate(devices) if a in own]
            scales = {k: lora_scale(self._peft, devices[k][a].shape[0]) for k in holders}
            held = {k: Factors(a=devices[k][a], b=devices[k][b], scale=scales[k]) for k in holders}
            sending = [(k, w) for k, w in zip(senders, weights, strict=True) if k in held]
            merged = rule.merge(
                [
                    Factors(
                        a=received[k].get(a, held[k].a),
                        b=received[k].get(b, held[k].b),
                        scale=scales[k],
                    )
                    for k, _ in sending
                ],
                [w for _, w in sending],
                [held[k] for k in holders],
                round=number,
                fresh=lambda item, held=holders, at=(int(layer), projection): fresh(
                    held[item], *at
                ),  # type: ignore[misc]
            )
            for k, own in zip(holders, merged.factors, strict=True):
                devices[k][a], devices[k][b] = self._broadcast(own.a), self._broadcast(own.b)
            averages |= {n: devices[holders[0]][n] for n in (a, b) if self.sends(n)}
            if merged.delta is not None:
                name = f"delta.{layer}.{projection}"
                delta = self._broadcast(merged.delta)
                old = devices[0].get(name)
                total = delta if old is None else old + delta
                for every in devices:
                    every[name] = total
        return averages

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


def _clipped(own: Tensors, reference: Tensors, norm: float) -> Tensors:
    """Return the blocks with their change since the reference cut to a norm."""
    start = {name: reference.get(name, torch.zeros_like(tensor)) for name, tensor in own.items()}
    change, length = clip({name: tensor - start[name] for name, tensor in own.items()}, norm)
    if length <= norm:
        return own
    return {name: start[name] + tensor for name, tensor in change.items()}
