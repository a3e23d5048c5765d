"""Compiled loops against float64, and an encoder's layer made of them against torch's operations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import BertConfig, BertModel

from pwff_opt.families.bert.layers import BertLayer
from pwff_opt.federated.model import memory
from pwff_opt.federated.model.adapters import BottleneckAdapter
from pwff_opt.federated.model.attention import Around
from pwff_opt.federated.model.bottleneck import Bottleneck, adapted
from pwff_opt.federated.model.encoder import AddNorm
from pwff_opt.federated.model.low_rank import LowRank, Updates
from pwff_opt.federated.model.products import filled
from pwff_opt.federated.text.tokens import Packed, Tokens
from pwff_solvers.compiled import transformer as kernels

pytestmark = pytest.mark.skipif(not kernels.AVAILABLE, reason="numba does not compile here")

NAMES = ("query", "key", "value")


def gelu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out, slope = torch.empty_like(x), torch.empty_like(x)
    kernels.gelu(*map(memory.flat, (x, out, slope)))
    return out, slope


def test_gelu_and_its_derivative() -> None:
    x = torch.linspace(-15, 15, 16 * 4001)
    out, slope = gelu(x)
    exact = x.double().requires_grad_(True)
    expected = exact * torch.special.erfc(-exact * 0.5**0.5) / 2
    expected.sum().backward()
    assert exact.grad is not None
    # What float32 has of numbers of this size, and of their tails.
    torch.testing.assert_close(out.double(), expected.detach(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(slope.double(), exact.grad, rtol=4e-7, atol=2e-7)
    near = x.abs() < 6
    torch.testing.assert_close(
        out[near].double(), expected.detach()[near], rtol=3e-6, atol=0
    )  # torch's own loses all digits below -5.4


def test_gelu_at_the_ends() -> None:
    ends = torch.tensor([0.0, -0.0, 1e30, -1e30, torch.inf, torch.nan, 1e-30, -1e-30] * 2)
    out, slope = gelu(ends)
    assert out[[0, 1, 3]].tolist() == [0, 0, 0]
    assert out[[2, 4]].tolist() == ends[[2, 4]].tolist()
    assert out[5].isnan()
    assert slope[5].isnan()
    assert slope[[0, 1, 2, 3]].tolist() == [0.5, 0.5, 1, 0]


def test_gelu_without_a_derivative_and_in_place() -> None:
    x = torch.randn(3, 32)
    expected, _ = gelu(x)
    kernels.gelu(memory.flat(x), memory.flat(x), memory.flat(x[:0]))
    assert torch.equal(x, expected)


def test_bfloat16_is_rounded_as_torch_does() -> None:
    bits = torch.arange(0, 2**32, 65521, dtype=torch.int64)
    x = bits.to(torch.int32).view(torch.float32)
    x = torch.cat([x, x.bfloat16().float(), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, torch.nan])])
    x = torch.cat([x, x.new_zeros(-len(x) % 16)])
    kept = torch.zeros_like(x, dtype=torch.bfloat16)
    kernels.add(memory.flat(kept), memory.flat(x))
    expected = (x + 0.0).bfloat16()
    assert torch.equal(kept.isnan(), expected.isnan())
    there = ~expected.isnan()
    assert torch.equal(kept[there], expected[there])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_of_a_sum_and_its_gradient(dtype: torch.dtype) -> None:
    norm = torch.nn.LayerNorm(48, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x, residual = (3 * torch.randn(8, 48)).to(dtype), torch.randn(8, 48) + 5
    ours = AddNorm(norm)
    out, low, kept = ours.forward(x, residual, dtype, learns=True)
    exact = (x.double() + residual.double()).requires_grad_(True)
    expected = functional.layer_norm(
        exact, (48,), norm.weight.double(), norm.bias.double(), norm.eps
    )
    torch.testing.assert_close(out.double(), expected.detach(), rtol=1e-5, atol=2e-6)
    assert torch.equal(low, out.to(dtype))
    grad, more = torch.randn(8, 48), torch.randn(8, 48).to(dtype)
    found, found_low = ours.backward(grad, more, kept, dtype)
    expected.backward(grad.double() + more.double())
    assert exact.grad is not None
    torch.testing.assert_close(found.double(), exact.grad, rtol=1e-5, atol=2e-6)
    assert torch.equal(found_low, found.to(dtype))
    again, _, _ = ours.forward(x, residual, dtype, learns=False)
    assert torch.equal(again, out)


def packing(*lengths: int) -> Packed:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = Tokens(ids=np.arange(offsets[-1]), offsets=offsets, pad_id=0)
    return Packed.of(tokens, [np.arange(len(lengths))])


def layer(dtype: torch.dtype) -> BertLayer:
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=9,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=96,
        initializer_range=0.2,
    )
    model: Any = BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return BertLayer(model.eval().requires_grad_(False).encoder.layer[0], config, dtype)


def updates(rows: int, *ranks: int | None, learned: bool = True) -> Updates:
    """Return updates of queries and values by devices of these ranks, None for none, in two passes."""
    found: dict[str, list[list[LowRank]]] = {"query": [[], []], "value": [[], []]}
    ends = np.linspace(0, rows, len(ranks) + 1).astype(int)
    for name, passes in found.items():
        for number, own in enumerate(passes):
            for start, stop, rank in zip(ends[:-1], ends[1:], ranks, strict=True):
                if rank is None or (number and name == "value"):
                    continue
                a, b = 0.2 * torch.randn(rank, 64), 0.2 * torch.randn(64, rank)
                for factor in (a, b):
                    factor.requires_grad_(learned)
                own.append(LowRank(start=start, stop=stop, scale=0.7, a=a, b=b))
    return {name: [own for own in passes if own] for name, passes in found.items()}


def factors(given: Updates) -> list[torch.Tensor]:
    return [f for passes in given.values() for own in passes for u in own for f in (u.a, u.b)]


@pytest.mark.parametrize("ranks", [(3,), (1, 20), (4, None, 2), (None,)])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_that_of_torch(
    ranks: tuple[int | None, ...], known: bool, dtype: torch.dtype
) -> None:
    own = layer(dtype)
    assert own._compiled is not None
    compiled, own._compiled = own._compiled, None
    around = Around(packing(7, 16, 1, 12), causal=False)
    x = filled(torch.randn(36, 64))
    projected = own.project(x) if known else None
    before = None if projected is None else projected.clone()
    given = updates(len(x), *ranks)
    towards = torch.randn(len(x), 64)
    towards[36:] = 0
    results = []
    for kind in (None, compiled):
        own._compiled = kind
        entered = x.clone().requires_grad_(not known)
        out = own.run(entered, around, given, projected=projected)
        wanted = [*([] if known else [entered]), *factors(given)]
        grads = torch.autograd.grad(out, wanted, towards) if wanted else ()
        with torch.inference_mode():
            assert torch.equal(own.run(entered, around, given, projected=projected), out)
        results.append([out[:36], *grads])
    if before is not None:
        assert torch.equal(projected, before)
    bound = 2e-6 if dtype == torch.float32 else 0.02
    for expected, got in zip(*results, strict=True):
        assert (got - expected).norm() <= bound * expected.norm()


def test_in_bfloat16_a_layer_is_no_further_from_float32_than_torch_is() -> None:
    around = Around(packing(16, 16), causal=False)
    x, given = torch.randn(32, 64), updates(32, 4)
    towards = torch.randn(32, 64)

    def passed(own: BertLayer) -> list[torch.Tensor]:
        entered = x.clone().requires_grad_(True)
        out = own.run(entered, around, given)
        return [out, *torch.autograd.grad(out, [entered, *factors(given)], towards)]

    plain = layer(torch.float32)
    plain._compiled = None
    exact = passed(plain)
    ours = layer(torch.bfloat16)
    got = passed(ours)
    ours._compiled = None
    torchs = passed(ours)
    errors = [
        [float((a - b).norm() / b.norm()) for a, b in zip(side, exact, strict=True)]
        for side in (got, torchs)
    ]
    assert np.mean(errors[0]) <= 1.1 * np.mean(errors[1])


def bottlenecks(*widths: int | None) -> list[Bottleneck]:
    """Return adapters of devices with nine rows each, None for none."""
    found = []
    for number, width in enumerate(widths):
        if width is None:
            continue
        shapes = ((width, 48), (width,), (48, width), (48,))
        tensors = [(0.3 * torch.randn(shape)).requires_grad_(True) for shape in shapes]
        found.append(Bottleneck(9 * number, 9 * number + 9, *tensors))
    return found


def tensors_of(own: Bottleneck) -> list[torch.Tensor]:
    return [own.down, own.down_bias, own.up, own.up_bias]


@pytest.mark.parametrize("widths", [(16,), (5,), (1, 40), (None, 32, None), (3, None)])
@pytest.mark.parametrize("lowest", [False, True])
def test_bottlenecks_and_their_gradients(widths: tuple[int | None, ...], lowest: bool) -> None:
    """Against the module that peft trains, in float64; ``lowest``: nothing below learns."""
    x, towards = torch.randn(9 * len(widths) + 4, 48), torch.randn(9 * len(widths) + 4, 48)
    own = bottlenecks(*widths)
    entered, exact = (x.clone().to(t).requires_grad_(not lowest) for t in (x, x.double()))
    out = adapted(entered, own)
    rows, wanted = list(exact.split(1)), [] if lowest else [exact]
    for one in own:
        module = BottleneckAdapter(48, len(one.down)).double()
        parts = (module.down.weight, module.down.bias, module.up.weight, module.up.bias)
        for into, tensor in zip(parts, tensors_of(one), strict=True):
            into.data.copy_(tensor)
        rows[one.start : one.stop] = module(exact[one.start : one.stop]).split(1)
        wanted += parts
    expected = torch.cat(rows)
    got = [out, *torch.autograd.grad(
        out, [*([] if lowest else [entered]), *(t for one in own for t in tensors_of(one))], towards
    )]  # fmt: skip
    right = [expected, *torch.autograd.grad(expected, wanted, towards.double())]
    for ours, theirs in zip(got, right, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    with torch.inference_mode():
        assert torch.equal(adapted(entered, own), out)


def test_bottlenecks_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    own, towards = bottlenecks(7, None, 16), torch.randn(30, 48)
    x = torch.randn(30, 48, requires_grad=True)
    leaves = [x, *(t for one in own for t in tensors_of(one))]
    results = []
    for available in (True, False):
        monkeypatch.setattr(kernels, "AVAILABLE", available)
        out = adapted(x, own)
        results.append([out, *torch.autograd.grad(out, leaves, towards)])
    for ours, torchs in zip(*results, strict=True):
        assert (ours - torchs).norm() <= 2e-6 * torchs.norm()


def test_a_bottleneck_that_diverged_stays_alone() -> None:
    bad, good = own = bottlenecks(4, 4)
    with torch.no_grad():
        bad.up[0, 0] = torch.nan
    x = torch.randn(20, 48, requires_grad=True)
    out = adapted(x, own)
    out.sum().backward()
    assert out[:9].isnan().any()
    assert out[9:].isfinite().all()
    assert x.grad is not None
    assert x.grad[9:].isfinite().all()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in tensors_of(good))


def test_inputs_may_lie_as_they_like() -> None:
    own, around = layer(torch.float32), Around(packing(16), causal=False)
    x, towards = torch.randn(16, 64), torch.randn(16, 64)
    results = []
    for lie in (torch.Tensor.contiguous, lambda t: t.t().contiguous().t()):
        a, b = torch.linspace(-1, 1, 256).view(4, 64), torch.linspace(0, 1, 256).view(64, 4)
        leaves = [lie(t).requires_grad_(True) for t in (a, b)]
        update = LowRank(start=0, stop=16, scale=0.1, a=leaves[0], b=leaves[1])
        given = {"value": [[update]]}
        entered = lie(x).requires_grad_(True)
        out = own.run(entered, around, given)
        results.append([out, *torch.autograd.grad(out, [entered, *leaves], lie(towards))])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_device_that_diverged_stays_alone() -> None:
    own = layer(torch.float32)
    around = Around(packing(8, 8), causal=False)
    given = updates(16, 2, 2)
    bad = given["query"][0][0]
    with torch.no_grad():
        bad.a[0, 0] = torch.nan
    x = torch.randn(16, 64, requires_grad=True)
    out = own.run(x, around, given)
    assert out[:8].isnan().all()
    assert out[8:].isfinite().all()
    out.sum().backward()
    assert x.grad is not None
    assert x.grad[8:].isfinite().all()
    for update in (own for passes in given.values() for part in passes for own in part):
        assert update.a.grad is not None
        assert bool(update.a.grad.isfinite().all()) == (update.start == 8)


@pytest.mark.parametrize(
    "change", [{"hidden_act": "relu"}, {"num_attention_heads": 8}, {"intermediate_size": 90}]
)
def test_what_is_not_compiled_is_left_to_torch(change: dict[str, Any]) -> None:
    kind = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96, "vocab_size": 9}
    config = BertConfig(num_hidden_layers=1, **(kind | change))
    model: Any = BertModel(config)
    own = BertLayer(model.encoder.layer[0], config, torch.float32)
    assert own._compiled is None
    given = updates(16, 2)
    own.run(torch.randn(16, 64), Around(packing(16), causal=False), given).sum().backward()
    assert all(factor.grad is not None for factor in factors(given))


def test_what_is_changed_before_going_backwards_is_refused() -> None:
    own, given = layer(torch.float32), updates(16, 2)
    out = own.run(torch.randn(16, 64), Around(packing(16), causal=False), given)
    with torch.no_grad():
        given["query"][0][0].b.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("place", range(5))
def test_what_a_bottleneck_reads_is_not_changed_before_going_backwards(place: int) -> None:
    (own,), x = bottlenecks(4), torch.randn(9, 48, requires_grad=True)
    out = adapted(x, [own])
    with torch.no_grad():
        [x, *tensors_of(own)][place].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_gradients_of_gradients_are_refused() -> None:
    x = torch.randn(16, 64, requires_grad=True)
    around = Around(packing(16), causal=False)
    heads = torch.randn(16, 2, 32, requires_grad=True)
    whole = layer(torch.float32)
    (own,) = [Bottleneck(0, 16, *(torch.randn(s) for s in ((4, 64), (4,), (64, 4), (64,))))]
    for out, read in (
        (adapted(x, [own]), x),
        (whole.run(x, around, {}), x),
        (whole._up(x), x),
        (around.attend(heads, heads, heads, scale=1.0), heads),
    ):
        (gradient,) = torch.autograd.grad(out.square().sum(), read, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_bottlenecks_of_another_type_are_left_to_torch(dtype: torch.dtype) -> None:
    x, (own,) = torch.randn(9, 48), bottlenecks(4)
    cast = Bottleneck(0, 9, *(t.detach().to(dtype) for t in tensors_of(own)))
    torch.testing.assert_close(
        adapted(x.to(dtype), [cast]).float(), adapted(x, [own]), rtol=0.05, atol=0.05
    )


def test_a_kernel_refuses_memory_with_gaps() -> None:
    with pytest.raises(ValueError, match="must be contiguous"):
        memory.flat(torch.zeros(4, 32)[:, ::2])
