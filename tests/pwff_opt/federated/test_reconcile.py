"""The weights of two gradients against cvxpy, and what they must do at the ends."""

from __future__ import annotations

import math

import cvxpy as cp
import numpy as np
import pytest
import torch

from pwff_opt.federated.learning.reconcile import conflict, gram, stationarity, weights


def products(gradients: torch.Tensor) -> torch.Tensor:
    """Return the products of [device, 2, parameter]."""
    return gradients @ gradients.transpose(1, 2)


@pytest.fixture
def gradients() -> torch.Tensor:
    """[device, 2, parameter]: of like and unlike size, in conflict and not."""
    rng = np.random.default_rng(8)
    drawn = rng.standard_normal((40, 2, 6)) * 10.0 ** rng.uniform(-3, 3, (40, 2, 1))
    drawn[:20, 1] *= np.linalg.norm(drawn[:20, 0], axis=1, keepdims=True) / np.linalg.norm(
        drawn[:20, 1], axis=1, keepdims=True
    )
    return torch.from_numpy(drawn)


@pytest.mark.parametrize("regularisation", [0.0, 0.01, 0.3, 1.0, 30.0])
def test_weights_are_the_optimum(gradients: torch.Tensor, regularisation: float) -> None:
    rng = np.random.default_rng(4)
    wish = rng.random(len(gradients))
    wishes = torch.from_numpy(np.stack([wish, 1 - wish], 1))
    ours = weights(products(gradients), wishes, regularisation).numpy()
    for g, w, found in zip(gradients.numpy(), wishes.numpy(), ours, strict=True):
        scale = np.sqrt(np.square(g).sum() / 2)
        share = cp.Variable(2, nonneg=True)
        objective = cp.sum_squares((g / scale).T @ share) + regularisation * cp.sum_squares(
            share - w
        )
        cp.Problem(cp.Minimize(objective), [cp.sum(share) == 1]).solve(solver=cp.CLARABEL)
        np.testing.assert_allclose(found, share.value, atol=2e-5)  # what Clarabel gives


def test_without_regularisation_no_loss_rises(gradients: torch.Tensor) -> None:
    """MGDA: along the step's direction both losses fall, or it is zero."""
    shares = weights(products(gradients), torch.full((len(gradients), 2), 0.5), 0.0)
    step = torch.einsum("ko,kop->kp", shares, gradients)
    falls = torch.einsum("kop,kp->ko", gradients, step)
    length = step.square().sum(1, keepdim=True)
    # Both at least as steep as the step is long: the property of the shortest vector of a hull.
    assert (falls >= length * (1 - 1e-6) - 1e-12).all()


def test_ends(gradients: torch.Tensor) -> None:
    wishes = torch.tensor([[0.2, 0.8]]).expand(len(gradients), 2).double()
    assert torch.equal(weights(products(gradients), wishes, math.inf), wishes)
    near = weights(products(gradients), wishes, 1e9)
    torch.testing.assert_close(near, wishes, atol=1e-6, rtol=0)
    # Opposite gradients: stationary, and the weights say which mixture stands still.
    pair = torch.tensor([[[2.0, 0.0], [-6.0, 0.0]]])
    shares = weights(products(pair), torch.tensor([[0.5, 0.5]]), 0.0)
    torch.testing.assert_close(shares, torch.tensor([[0.75, 0.25]]), atol=1e-6, rtol=0)
    assert float(stationarity(products(pair))) == pytest.approx(0.0, abs=1e-6)
    assert float(conflict(products(pair))) == pytest.approx(-1.0)
    # No gradient at all: the user's weights, and no NaN.
    nothing = torch.zeros(1, 2, 2)
    torch.testing.assert_close(
        weights(nothing, torch.tensor([[0.3, 0.7]]), 0.0), torch.tensor([[0.3, 0.7]])
    )
    assert float(stationarity(nothing)) == 0.0
    # One objective: its weight is one whatever the gradient.
    assert float(weights(torch.ones(1, 1, 1), torch.ones(1, 1), 1.0)) == 1.0


def test_stationarity_is_of_no_unit(gradients: torch.Tensor) -> None:
    told = stationarity(products(gradients))
    torch.testing.assert_close(told, stationarity(products(1e3 * gradients)))
    assert ((told >= 0) & (told <= 1 + 1e-9)).all()


def test_each_device_by_its_own_parameters() -> None:
    rng = np.random.default_rng(2)
    flat = torch.from_numpy(rng.standard_normal((2, 9)))
    owner = torch.tensor([1, 0, 0, 1, 2, 2, 2, 0, 1])
    found = gram(flat, owner, 3)
    for device in range(3):
        own = flat[:, owner == device]
        torch.testing.assert_close(found[device], own @ own.T)
    # One that has diverged spoils no other.
    flat[0, 1] = torch.nan
    shares = weights(gram(flat, owner, 3), torch.full((3, 2), 0.5).double(), 1.0)
    assert shares[0].isnan().any()
    assert not shares[1:].isnan().any()


def test_products_over_millions_of_parameters() -> None:
    """Against numpy in float64; the cosine was off by 4e-3 when it was summed in float32."""
    rng = np.random.default_rng(5)
    first = rng.standard_normal(3_000_000).astype(np.float32)
    second = first + 0.5 * rng.standard_normal(len(first)).astype(np.float32)
    both = np.stack([first, second])
    products = gram(torch.from_numpy(both), torch.zeros(len(first), dtype=torch.int64), 1)
    exact = both.astype(np.float64) @ both.astype(np.float64).T
    np.testing.assert_allclose(products[0].numpy(), exact, rtol=1e-9)
    cosine = exact[0, 1] / np.sqrt(exact[0, 0] * exact[1, 1])
    assert float(conflict(products)[0]) == pytest.approx(cosine, rel=1e-9)
