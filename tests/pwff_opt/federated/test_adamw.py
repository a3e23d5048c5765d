"""Steps of AdamW against torch's own optimiser."""

from __future__ import annotations

import pytest
import torch

from pwff_opt.federated.learning.adamw import AdamW


@pytest.mark.parametrize("sizes", [(40, 3), (40, 0), (0, 3), (0, 0)])
def test_steps_are_those_of_torch(sizes: tuple[int, int]) -> None:
    rates, decay = [0.01, 0.1], 0.3
    ours = [torch.randn(n) for n in sizes]
    gradients = [torch.zeros(n) for n in sizes]
    optimiser = AdamW(ours, gradients, rates, weight_decay=decay)
    theirs = [x.clone().requires_grad_(True) for x in ours]
    groups = [{"params": [x], "lr": rate} for x, rate in zip(theirs, rates, strict=True)]
    torchs = torch.optim.AdamW(groups, weight_decay=decay, foreach=False)
    for _ in range(5):
        for own, other in zip(gradients, theirs, strict=True):
            own.copy_(torch.randn(len(own)))
            other.grad = own.clone()
        optimiser.step()
        torchs.step()
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other.detach(), rtol=1e-6, atol=1e-7)
