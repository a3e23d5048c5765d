r"""Two objectives on one device: what weights their gradients get in a step.

With gradients :math:`g_1, g_2` of a device's losses and its user's weights :math:`w`, 1 in sum, the step
goes along :math:`\lambda_1 g_1 + \lambda_2 g_2`, where

.. math:: \lambda = \arg\min_{\lambda \ge 0,\; \lambda_1 + \lambda_2 = 1}
          \tfrac{1}{s}\,\lVert \lambda_1 g_1 + \lambda_2 g_2 \rVert^2 + \rho\,\lVert \lambda - w \rVert^2,
          \qquad s = \tfrac12(\lVert g_1 \rVert^2 + \lVert g_2 \rVert^2).

:math:`\rho = 0` is MGDA (Désidéri 2012, Comptes Rendus Mathématique 350): the shortest vector in the hull of
the gradients, along which neither loss rises, and which is zero where the device is Pareto stationary.
:math:`\rho \to \infty` is the weighted sum.  In between, weights cannot jump from one mini-batch or
device to the next, which is what FIRM (arXiv 2511.16992) regularises for; the pull to the user's weights, and
the scale :math:`s`, which makes :math:`\rho` a number without unit, are ours.

With :math:`d = g_1 - g_2` the minimum is at

.. math:: \lambda_1 = \frac{2 \rho\, w_1 - d \cdot g_2 / s}{2 \rho + d \cdot d / s},

cut to [0, 1].
"""

from __future__ import annotations

import math

import torch


def gram(gradients: torch.Tensor, device_of: torch.Tensor, devices: int) -> torch.Tensor:
    """Return the products of every device's gradients, [device, objective, objective], in float64.

    ``gradients``: [objective, parameter]; ``device_of``: [parameter], whose it is.  One sum over millions of
    parameters in float32 is off by some thousandths, which is more than gradients may differ by.
    """

    def product(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        each = one.double() * other.double()
        return each.new_zeros(devices).index_add(0, device_of, each)

    return torch.stack(
        [torch.stack([product(one, other) for other in gradients], 1) for one in gradients], 1
    )


def weights(products: torch.Tensor, wishes: torch.Tensor, regularisation: float) -> torch.Tensor:
    """Return the weights of the gradients, [device, objective], 1 in sum.

    Parameters
    ----------
    products : [device, 2, 2], as :func:`gram` gives them; or [device, 1, 1].
    wishes : [device, objective], the users' weights.
    regularisation : rho, 0 to infinity.
    """
    if products.shape[1] == 1 or math.isinf(regularisation):
        return wishes.to(products)
    first, both, second = products[:, 0, 0], products[:, 0, 1], products[:, 1, 1]
    # Where a device stands still all directions are the same: then its user's.
    scale = ((first + second) / 2).clamp_min(torch.finfo(products.dtype).tiny)
    apart = (first - 2 * both + second) / scale
    ahead = (both - second) / scale
    pull = max(2 * regularisation, torch.finfo(products.dtype).eps)
    share = ((pull * wishes[:, 0].to(products) - ahead) / (apart + pull)).clamp(0.0, 1.0)
    return torch.stack([share, 1.0 - share], 1)


def conflict(products: torch.Tensor) -> torch.Tensor:
    """Return the cosine between the two gradients, [device]; below 0 they conflict."""
    lengths = (products[:, 0, 0] * products[:, 1, 1]).sqrt()
    return products[:, 0, 1] / lengths.clamp_min(torch.finfo(products.dtype).tiny)


def stationarity(products: torch.Tensor) -> torch.Tensor:
    """Return the length of the shortest vector in the hull of the gradients, over their root mean square.

    [device]; 0 where a device is Pareto stationary.
    """
    shares = weights(products, torch.full_like(products[:, 0], 0.5), 0.0)
    shortest = torch.einsum("ki,kij,kj->k", shares, products, shares).clamp_min(0.0)
    scale = products.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(products.dtype).tiny)
    return (shortest / scale).sqrt()
