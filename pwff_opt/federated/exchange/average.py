"""Partial aggregation: the average of what was uploaded, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pwff_opt.federated.model.blocks import Tensors


def average(uploads: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    r"""Return, for every tensor, the weighted mean over the devices that sent it.

    .. math:: \bar\theta = \sum_{k \in S} w_k \theta_k / \sum_{k \in S} w_k

    with S the senders of that tensor and w_k the number of training examples (McMahan et al., AISTATS
    2017). Sums are taken in float64 and in the order of devices, so the order of arrival is immaterial.
    """
    result: Tensors = {}
    for name in sorted({name for upload in uploads for name in upload}):
        senders = [(u[name], w) for u, w in zip(uploads, weights, strict=True) if name in u]
        total = sum(weight for _, weight in senders)
        mean = torch.zeros_like(senders[0][0], dtype=torch.float64)
        for tensor, weight in senders:
            mean += tensor.double() * (weight / total)
        result[name] = mean.float()
    return result
