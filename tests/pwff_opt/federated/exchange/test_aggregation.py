"""Partial aggregation."""

from __future__ import annotations

import torch

from pwff_opt.federated.exchange.average import average


def test_mean_is_weighted_over_the_senders_of_each_tensor() -> None:
    uploads = [
        {"adapter.0.up": torch.tensor([1.0, 2.0]), "adapter.1.up": torch.tensor([5.0])},
        {"adapter.0.up": torch.tensor([4.0, 8.0])},
    ]
    result = average(uploads, [1.0, 2.0])
    assert result["adapter.0.up"].tolist() == [3.0, 6.0]
    assert result["adapter.1.up"].tolist() == [5.0]
    assert uploads[0]["adapter.0.up"].tolist() == [1.0, 2.0]


def test_order_of_arrival_is_immaterial() -> None:
    generator = torch.Generator().manual_seed(0)
    uploads = [{"x": torch.randn(1000, generator=generator)} for _ in range(7)]
    weights = [float(k + 1) for k in range(7)]
    forward = average(uploads, weights)["x"]
    backward = average(uploads[::-1], weights[::-1])["x"]
    torch.testing.assert_close(forward, backward, rtol=1e-7, atol=1e-7)


def test_equal_tensors_average_to_themselves() -> None:
    tensor = torch.randn(100, generator=torch.Generator().manual_seed(1))
    assert torch.equal(average([{"x": tensor}] * 3, [1.0, 5.0, 2.0])["x"], tensor)
