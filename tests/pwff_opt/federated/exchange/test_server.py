"""The server's optimisers against numpy, torch and their own special cases."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from pwff_opt.federated.exchange.server import step
from pwff_opt.federated.model.blocks import Tensors
from pwff_opt.scenario import Aggregation

SERVERS: tuple[Literal["average", "momentum", "adam"], ...] = ("average", "momentum", "adam")


def means(count: int) -> list[Tensors]:
    """What a few rounds' averages might be: apart by steps of 0.1, in two tensors."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"adapter.0.up.bias": (7,), "adapter.0.up.weight": (4, 3)}
    return [
        {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def run(rule: Aggregation, rounds: list[Tensors]) -> tuple[Tensors, Tensors]:
    """Start from the first and step through the rest; the moments go through a file each round."""
    shared, moments = dict(rounds[0]), {}
    for mean in rounds[1:]:
        shared, moments = step(rule, shared, mean, moments)
        moments = load(save(moments))
    return shared, moments


def test_average_returns_the_mean_bit_for_bit() -> None:
    before, mean = means(2)
    after, moments = step(Aggregation(), before, mean, {})
    assert all(after[name] is tensor for name, tensor in mean.items())
    assert moments == {}


def test_average_with_a_learning_rate_goes_that_part_of_the_way() -> None:
    before, mean = means(2)
    after, _ = step(Aggregation(server_learning_rate=0.25), before, mean, {})
    for name in mean:
        torch.testing.assert_close(after[name], 0.75 * before[name] + 0.25 * mean[name])


@pytest.mark.parametrize("server", SERVERS)
def test_several_rounds_against_numpy(server: Literal["average", "momentum", "adam"]) -> None:
    rule = Aggregation(
        server=server,
        server_learning_rate=0.3,
        server_momentum=0.8,
        server_second_momentum=0.95,
        server_adaptivity=0.01,
    )
    rounds = means(7)
    shared, moments = run(rule, rounds)
    for name, first in rounds[0].items():
        x = first.numpy().astype(np.float64)
        m, v = np.zeros_like(x), np.zeros_like(x)
        for mean in rounds[1:]:
            delta = mean[name].numpy() - x
            if server == "average":
                x = x + 0.3 * delta
            elif server == "momentum":
                m = 0.8 * m + delta
                x = x + 0.3 * m
            else:
                m = 0.8 * m + 0.2 * delta
                v = 0.95 * v + 0.05 * delta**2
                x = x + 0.3 * m / (np.sqrt(v) + 0.01)
        np.testing.assert_allclose(shared[name].numpy(), x, rtol=1e-5, atol=1e-6)
        if server != "average":
            np.testing.assert_allclose(moments[f"momentum/{name}"], m, rtol=1e-5, atol=1e-6)
        if server == "adam":
            np.testing.assert_allclose(moments[f"second/{name}"], v, rtol=1e-5, atol=1e-8)
    kinds = {"average": set(), "momentum": {"momentum"}, "adam": {"momentum", "second"}}
    assert moments.keys() == {f"{kind}/{name}" for kind in kinds[server] for name in shared}


def test_momentum_is_torch_sgd_on_the_pseudo_gradient() -> None:
    rounds = means(9)
    rule = Aggregation(server="momentum", server_learning_rate=0.5, server_momentum=0.9)
    shared, _ = run(rule, rounds)
    parameters = {name: torch.nn.Parameter(t.double()) for name, t in rounds[0].items()}
    optimiser = torch.optim.SGD(parameters.values(), lr=0.5, momentum=0.9)
    for mean in rounds[1:]:
        for name, parameter in parameters.items():
            parameter.grad = parameter.detach() - mean[name].double()
        optimiser.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(shared[name], parameter.detach().float(), rtol=1e-5, atol=1e-6)


def test_adam_is_torch_adam_once_its_bias_correction_is_undone() -> None:
    """torch divides m by 1 - b1^t and the root of v by that of 1 - b2^t; rate and eps make up for it."""
    rounds = means(9)
    rate, b1, b2, tau = 0.05, 0.9, 0.99, 1e-3
    rule = Aggregation(server="adam", server_learning_rate=rate)
    assert (rule.server_momentum, rule.server_second_momentum) == (b1, b2)
    shared, _ = run(rule, rounds)
    parameters = {name: torch.nn.Parameter(t.double()) for name, t in rounds[0].items()}
    optimiser = torch.optim.Adam(parameters.values(), betas=(b1, b2))
    for number, mean in enumerate(rounds[1:], start=1):
        root = (1 - b2**number) ** 0.5
        optimiser.param_groups[0] |= {"lr": rate * (1 - b1**number) / root, "eps": tau / root}
        for name, parameter in parameters.items():
            parameter.grad = parameter.detach() - mean[name].double()
        optimiser.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(shared[name], parameter.detach().float(), rtol=1e-5, atol=1e-6)


def test_momentum_of_zero_is_the_average() -> None:
    rounds = means(5)
    shared, _ = run(Aggregation(server="momentum", server_momentum=0.0), rounds)
    for name, mean in rounds[-1].items():
        torch.testing.assert_close(shared[name], mean, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("server", SERVERS)
def test_tensors_without_a_previous_value_pass_and_start_at_zero(
    server: Literal["average", "momentum", "adam"],
) -> None:
    rule = Aggregation(server=server, server_learning_rate=0.1)
    before, first, second = means(3)
    after, moments = step(rule, before, first | {"adapter.1.up.bias": torch.ones(3)}, {})
    assert torch.equal(after["adapter.1.up.bias"], torch.ones(3))
    assert not any("adapter.1" in key for key in moments)
    # From the next round on it is stepped like any other, as if from no moments.
    one = {"adapter.1.up.bias": torch.tensor([1.0, 2.0, 3.0])}
    late, _ = step(rule, after, second | one, moments)
    alone, _ = step(rule, {"adapter.1.up.bias": torch.ones(3)}, one, {})
    assert torch.equal(late["adapter.1.up.bias"], alone["adapter.1.up.bias"])


@pytest.mark.parametrize("server", SERVERS)
def test_moments_outlast_rounds_without_their_tensor_and_nothing_is_written_in_place(
    server: Literal["average", "momentum", "adam"],
) -> None:
    rule = Aggregation(server=server, server_learning_rate=0.1)
    before, mean = means(2)
    moments = {"momentum/adapter.5.up.bias": torch.ones(2)} | {
        f"{kind}/{name}": torch.ones_like(t)
        for kind in ("momentum", "second")
        for name, t in mean.items()
    }
    given = dict(moments)
    after, kept = step(rule, before | {"head.out.bias": torch.ones(1)}, mean, moments)
    assert after.keys() == mean.keys()
    assert kept["momentum/adapter.5.up.bias"] is moments["momentum/adapter.5.up.bias"]
    assert moments == given
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in moments.values())
    assert all(torch.equal(means(2)[0][name], tensor) for name, tensor in before.items())
