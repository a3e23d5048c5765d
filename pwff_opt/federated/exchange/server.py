"""The server's step: from the average of what was uploaded to the new shared blocks."""

from __future__ import annotations

import torch

from pwff_opt.federated.model.blocks import Tensors
from pwff_opt.scenario import Aggregation

_MOMENTUM, _SECOND = "momentum/", "second/"


def step(
    rule: Aggregation, previous: Tensors, mean: Tensors, moments: Tensors
) -> tuple[Tensors, Tensors]:
    r"""Return the new shared blocks, those named in ``mean``, and the server's new moments.

    With the pseudo-gradient :math:`\Delta = \bar\theta - \theta` of each tensor (``mean`` less
    ``previous``), the learning rate :math:`\eta` and ``rule.server``:

    - "average": :math:`\theta + \eta\Delta`; with :math:`\eta = 1` this is ``mean`` itself;
    - "momentum": :math:`m' = \beta_1 m + \Delta`, :math:`\theta + \eta m'` (FedAvgM: Hsu et al.,
      arXiv 1909.06335);
    - "adam": :math:`m' = \beta_1 m + (1 - \beta_1)\Delta`,
      :math:`v' = \beta_2 v + (1 - \beta_2)\Delta^2`, :math:`\theta + \eta m' / (\sqrt{v'} + \tau)`
      (FedAdam: Reddi et al., ICLR 2021, algorithm 2, without bias correction as there; v starts at
      0 where they leave any start from :math:`\tau^2` up, and tau bounds the step either way).

    A tensor without a previous value (of a layer that devices have trained alone so far) passes through
    as it is. Moments of tensors that are not in ``mean`` are kept. ``moments`` is flat and float32,
    ``momentum/NAME`` and ``second/NAME``, so that a checkpoint holds all of it; a moment that is absent is
    zero: the caller leaves out those of a LoRA whose rank has changed. Arithmetic is in float64.
    """
    after: Tensors = {}
    kept = dict(moments)
    for name, target in mean.items():
        start = previous.get(name)
        if start is None or (rule.server == "average" and rule.server_learning_rate == 1):
            after[name] = target
        else:
            gradient = target.double() - start.double()
            moved = rule.server_learning_rate * _direction(rule, name, gradient, kept)
            after[name] = (start.double() + moved).float()
    return after, kept


def _direction(
    rule: Aggregation, name: str, gradient: torch.Tensor, moments: Tensors
) -> torch.Tensor:
    """Return the step at learning rate 1, in float64; replace the tensor's entries in ``moments``."""
    if rule.server == "average":
        return gradient
    fresh = 1.0 if rule.server == "momentum" else 1.0 - rule.server_momentum
    momentum = _decayed(moments, _MOMENTUM + name, rule.server_momentum, fresh * gradient)
    if rule.server == "momentum":
        return momentum
    decay = rule.server_second_momentum
    second = _decayed(moments, _SECOND + name, decay, (1.0 - decay) * gradient.square())
    return momentum / (second.sqrt() + rule.server_adaptivity)


def _decayed(moments: Tensors, key: str, decay: float, fresh: torch.Tensor) -> torch.Tensor:
    """Replace a moment by ``decay`` times it plus ``fresh``; return it in float64.

    What is returned is what was stored, rounded: a run that is resumed takes the same steps.
    """
    old = moments.get(key)
    moments[key] = (fresh if old is None else decay * old.double() + fresh).float()
    return moments[key].double()
