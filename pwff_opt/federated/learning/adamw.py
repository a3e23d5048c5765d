"""AdamW (Loshchilov and Hutter, ICLR 2019) on flat vectors, by torch's fused kernel.

``torch.optim.AdamW(fused=True)`` takes the same steps; what its Python does around the kernel is 2 % of
a training step at this size.
"""

from __future__ import annotations

import torch

BETAS, EPSILON = (0.9, 0.999), 1e-8  # torch's defaults


class AdamW:
    """Steps of some vectors, each at a learning rate of its own.

    Parameters
    ----------
    vectors : changed in place.
    gradients : read at every step, [n] each like the vectors.
    rates : learning rates.
    weight_decay
    """

    def __init__(
        self,
        vectors: list[torch.Tensor],
        gradients: list[torch.Tensor],
        rates: list[float],
        *,
        weight_decay: float,
    ) -> None:
        groups = zip(vectors, gradients, rates, strict=True)
        self._groups = [
            (vector, gradient, torch.zeros_like(vector), torch.zeros_like(vector), rate)
            for vector, gradient, rate in groups
            if len(vector)
        ]
        self._weight_decay = weight_decay
        self._steps = torch.zeros((), device=vectors[0].device)

    def step(self) -> None:
        """Take one step along the gradients as they are."""
        with torch.no_grad():
            self._steps += 1
            for vector, gradient, first, second, rate in self._groups:
                # Not torch's public interface, but what its optimiser calls; a test compares both.
                torch._fused_adamw_(
                    [vector],
                    [gradient],
                    [first],
                    [second],
                    [],
                    [self._steps],
                    lr=rate,
                    beta1=BETAS[0],
                    beta2=BETAS[1],
                    weight_decay=self._weight_decay,
                    eps=EPSILON,
                    amsgrad=False,
                    maximize=False,
                )
