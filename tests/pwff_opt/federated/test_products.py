"""Products with frozen weights and attention among packed tokens against torch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from pwff_opt.federated.model import products
from pwff_opt.federated.model.attention import Around
from pwff_opt.federated.model.products import Frozen, filled
from pwff_opt.federated.text.tokens import Packed, Tokens


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("rows", [1, 8, 21, 96])
@pytest.mark.parametrize("biased", [True, False])
def test_product_and_gradient(
    onednn: bool, rows: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_ONEDNN", onednn and products._ONEDNN)
    weight, bias = torch.randn(48, 32), torch.randn(48) if biased else None
    x = torch.randn(rows, 64)[:, ::2].requires_grad_(True)  # not contiguous
    towards = torch.randn(rows, 48)
    ours = Frozen(weight, bias)(x)
    ours.backward(towards)
    assert x.grad is not None
    torch.testing.assert_close(ours, functional.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, towards @ weight, rtol=1e-5, atol=1e-5)
    assert torch.equal(Frozen(weight, bias)(x.detach()), ours)


def test_product_in_half_precision() -> None:
    weight, bias = torch.randn(48, 32).bfloat16(), torch.randn(48).bfloat16()
    x = torch.randn(21, 32, requires_grad=True)
    towards = torch.randn(21, 48).bfloat16()
    ours = Frozen(weight, bias)(x)
    ours.backward(towards)
    assert ours.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    exact = functional.linear(x.bfloat16().float(), weight.float(), bias.float())
    assert (ours.float() - exact).norm() <= 4e-3 * exact.norm()
    exact = towards.float() @ weight.float()
    assert (x.grad - exact).norm() <= 4e-3 * exact.norm()


def test_rows_do_not_mix() -> None:
    x = torch.randn(21, 32)
    x[3] = torch.nan
    result = Frozen(torch.randn(48, 32), torch.randn(48))(x)
    assert result.isnan().any(1).nonzero().flatten().tolist() == [3]


def packing(*lengths: int) -> Packed:
    count = sum(lengths)
    tokens = Tokens(
        ids=np.arange(count), offsets=np.concatenate([[0], np.cumsum(lengths)]), pad_id=0
    )
    return Packed.of(tokens, [np.arange(len(lengths))])


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...], causal: bool
) -> torch.Tensor:
    """Attention of [token, head, size], a sequence after the other."""
    parts = []
    for one, two, three in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        heads = [x.transpose(0, 1)[None] for x in (one, two, three)]
        done = functional.scaled_dot_product_attention(*heads, is_causal=causal, enable_gqa=True)
        parts.append(done[0].transpose(0, 1).flatten(1))
    return torch.cat(parts)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(5, 5, 5), (7, 1, 4), (3,), (16, 40, 33)])
@pytest.mark.parametrize("size", [8, 16, 48])  # of 8, it is not compiled
def test_attention_and_gradients(
    causal: bool, shared: int, lengths: tuple[int, ...], size: int
) -> None:
    count, heads = sum(lengths), 4
    shapes = [(count, heads, size), (count, heads // shared, size), (count, heads // shared, size)]
    ours = [torch.randn(shape, requires_grad=True) for shape in shapes]
    theirs = [x.detach().double().requires_grad_(True) for x in ours]
    around = Around(packing(*lengths), causal=causal)
    got = around.attend(*ours, scale=size**-0.5)
    expected = plain(*theirs, lengths, causal)
    towards = torch.randn(count, heads * size)
    got.backward(towards)
    expected.backward(towards.double())
    grads = [(mine.grad, its.grad) for mine, its in zip(ours, theirs, strict=True)]
    for mine, its in [(got, expected), *grads]:
        assert mine is not None
        assert its is not None
        assert (mine - its).norm() <= 1e-6 * its.norm()


@pytest.mark.parametrize("size", [4, 16])
def test_rows_that_fill_up_are_not_attended_to_and_stay_zero(size: int) -> None:
    lengths, count = (7, 1, 3), 11
    inputs = [torch.randn(16, 2, size, requires_grad=True) for _ in range(3)]
    with torch.no_grad():
        for x in inputs:
            x[count:] = torch.nan  # whoever reads them
    got = Around(packing(*lengths), causal=False).attend(*inputs, scale=size**-0.5)
    assert torch.equal(got[count:], torch.zeros(5, 2 * size))
    towards = torch.randn(16, 2 * size)
    got.backward(towards)
    twins = [x.detach()[:count].clone().requires_grad_(True) for x in inputs]
    expected = plain(*twins, lengths, causal=False)
    expected.backward(towards[:count])
    torch.testing.assert_close(got[:count], expected, rtol=1e-5, atol=1e-6)
    for mine, its in zip(inputs, twins, strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad[:count], its.grad, rtol=1e-5, atol=1e-6)
        assert torch.equal(mine.grad[count:], torch.zeros(5, 2, size))


@pytest.mark.parametrize("rows", [1, 8, 21])
def test_filled_up_with_zeros(rows: int) -> None:
    x = torch.randn(rows, 3, 2)
    whole = filled(x)
    assert len(whole) % products.ROWS == 0
    assert len(whole) - rows < products.ROWS
    assert torch.equal(whole[:rows], x)
    assert not whole[rows:].any()


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("size", [4, 16])
def test_attention_when_only_some_gradients_are_needed(needed: tuple[bool, ...], size: int) -> None:
    lengths = (6, 2)
    inputs = [torch.randn(8, 2, size, requires_grad=wanted) for wanted in needed]
    Around(packing(*lengths), causal=False).attend(*inputs, scale=size**-0.5).sum().backward()
    twins = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    plain(*twins, lengths, causal=False).sum().backward()
    for mine, its in zip(inputs, twins, strict=True):
        assert (mine.grad is None) == (its.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, its.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [4, 16])
def test_a_sequence_that_diverged_stays_alone(size: int) -> None:
    inputs = [torch.randn(12, 2, size) for _ in range(3)]
    for x in inputs:
        x[7:9] = torch.nan
        x.requires_grad_(True)
    attended = Around(packing(7, 2, 3), causal=False).attend(*inputs, scale=size**-0.5)
    attended.sum().backward()
    others = [n for n in range(12) if n not in (7, 8)]
    assert attended[others].isfinite().all()
    for x in inputs:
        assert x.grad is not None
        assert x.grad[others].isfinite().all()
