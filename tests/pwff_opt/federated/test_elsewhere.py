"""Models compute on another device than the CPU; what that stand-in refuses (``tests/elsewhere.py``)."""

from __future__ import annotations

import operator
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pwff_opt.federated.model.backbone import Backbone
from pwff_opt.federated.model.layers import fused
from pwff_opt.federated.model.products import Frozen

HERE = Path(__file__).parent


@pytest.fixture
def elsewhere(request: pytest.FixtureRequest) -> torch.device:
    if request.config.getoption("--device") != "elsewhere":
        pytest.skip("is run again with --device elsewhere")
    return torch.device("elsewhere")


@pytest.mark.timeout(1500)  # a suite of its own, in which each test has the usual limit
def test_rounds_of_every_stage_on_another_device(request: pytest.FixtureRequest) -> None:
    """In a process of its own, for torch never forgets a device."""
    if request.config.getoption("--device"):
        pytest.skip("is what runs")
    some = ["trainer", "language", "masked", "alignment_rounds", "sparse_attention"]
    whole = ["rewards", "generation", "features", "elsewhere"]
    files = [HERE / f"test_{name}.py" for name in some + whole]
    chosen = " or ".join(["equals_plain_peft", "resumed", "one_wish", *whole])
    options = ["-q", "-p", "no:cacheprovider", "--device", "elsewhere", "-k", chosen]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=HERE.parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


def test_parts_without_a_bias_get_one_where_the_others_are() -> None:
    parts = {
        "query": torch.nn.Linear(4, 6, device="meta"),
        "key": torch.nn.Linear(4, 2, bias=False),
    }
    parts["key"].to("meta")
    bias = fused(parts, torch.float32).bias
    assert bias is not None
    assert (bias.device.type, len(bias)) == ("meta", 8)


def test_models_are_there_if_nothing_else_is_said(
    elsewhere: torch.device, small_model: Path
) -> None:
    how = {"family": "bert", "classes": 2, "pooling": "mean", "max_tokens": 16}
    assert Backbone(str(small_model), **how).device == elsewhere  # type: ignore[arg-type]
    assert Backbone(str(small_model), **how, device="cpu").device.type == "cpu"  # type: ignore[arg-type]


def test_it_computes_what_the_cpu_does_and_back(elsewhere: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(*size, generator=generator) for size in ((8, 4), (6, 4)))
    grads = []
    for device in ("cpu", elsewhere):
        given = x.clone().to(device).requires_grad_()
        out = Frozen(weight.to(device), None)(given)[2:].relu().cumsum(0)
        assert out.device.type == torch.device(device).type
        out.square().sum().backward()
        assert given.grad is not None
        grads.append(given.grad.cpu())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=0)


def test_it_refuses_what_a_gpu_refuses(elsewhere: torch.device) -> None:
    x, y = torch.ones(2, device=elsewhere), torch.ones(2)
    here, there = torch.tensor([0, 1]), torch.tensor([0, 1], device=elsewhere)
    count = torch.zeros(())
    for mixed in (
        lambda: x + y,
        lambda: torch.cat([x, y]),
        lambda: torch.stack([x[0], y[0]]),
        lambda: y.add_(x),
        lambda: count.add_(x[0]),
        lambda: here[there],
        lambda: operator.setitem(there, there, here),
        lambda: x.index_select(0, torch.tensor(1)),
        lambda: torch._fused_adamw_(
            *([t] for t in (x, x, x, x)), [], [count],
            lr=0.1, beta1=0.9, beta2=0.9, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
        ),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="one device"):
            mixed()
    with pytest.raises(RuntimeError, match="generator"):
        x.uniform_(generator=torch.Generator())
    with pytest.raises(RuntimeError, match="memory"):
        x.data_ptr()
    with pytest.raises(RuntimeError, match="numpy"):
        x.numpy()
    with pytest.raises(NotImplementedError, match="mkldnn"):
        torch.ops.mkldnn._linear_pointwise(x[None], x[None], None, "none", [], "")
    assert (x * torch.tensor(2.0)).tolist() == [2.0, 2.0]  # a number may come from the CPU
    assert x[torch.tensor([0])].device.type == "elsewhere"  # and rows may be named by it
