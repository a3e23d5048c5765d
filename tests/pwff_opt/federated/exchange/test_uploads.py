"""Codecs of uploads: exact sizes, bounded errors, and nothing lost for good."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from safetensors.torch import load, save

from pwff_opt.errors import TrainingError
from pwff_opt.federated.exchange.uploads import Upload, UploadDtype, encode
from pwff_opt.federated.model.blocks import Tensors

DTYPES = get_args(UploadDtype)


def blocks(seed: int, *, size: float = 0.1) -> Tensors:
    """An adapter of width 5 on 24 units, and a bias of one element."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "adapter.0.down.weight": (5, 24),
        "adapter.0.up.weight": (24, 5),
        "adapter.0.up.bias": (24,),
        "head.out.bias": (1,),
    }
    return {name: size * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("float32", 32 * 265), ("float16", 16 * 265), ("int8", 8 * 265 + 4 * 32)],
)
def test_bits_are_those_of_the_serialised_payload(dtype: UploadDtype, bits: int) -> None:
    upload, _ = encode(blocks(0), dtype)
    file = save(upload.tensors)
    header = 8 + int.from_bytes(file[:8], "little")
    assert upload.bits == bits == 8 * (len(file) - header)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_payload_and_the_reference_are_all_the_receiver_needs(dtype: UploadDtype) -> None:
    start, values = blocks(0), blocks(1)
    upload, _ = encode(values, dtype, reference=start)
    received = Upload(load(save(upload.tensors)))
    for name, tensor in upload.decode(start).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, received.decode(start)[name])


def test_float32_is_exact_and_float16_rounds_to_nearest() -> None:
    values = blocks(0)
    for dtype, bound in (("float32", 0.0), ("float16", 2.0**-11)):
        upload, residual = encode(values, dtype, residual=blocks(1))
        decoded = upload.decode({})
        assert not residual
        assert decoded.keys() == values.keys()
        for name, value in values.items():
            assert ((decoded[name] - value).abs() <= bound * value.abs()).all()


def test_int8_errs_by_half_a_level_of_the_change_and_owes_the_error() -> None:
    start = blocks(0, size=10.0)
    values = {name: start[name] + step for name, step in blocks(1, size=1e-2).items()}
    upload, residual = encode(values, "int8", reference=start)
    decoded = upload.decode(start)
    for name, value in values.items():
        largest = (value - start[name]).abs().max()
        rounding = 2.0**-24 * value.abs().max()  # of the decoded value to float32
        assert ((decoded[name] - value).abs() <= largest / 254 + rounding).all()
        assert torch.equal(decoded[name] + residual[name], value)
    # Had the values been coded instead of their change, the error would be that of the weights.
    plain, _ = encode(values, "int8")
    name = "adapter.0.down.weight"
    assert (plain.decode({})[name] - values[name]).abs().max() > 100 * residual[name].abs().max()


def test_error_feedback_makes_the_mean_of_uploads_converge() -> None:
    """Without it the same value is rounded to the same wrong level every time."""
    values = blocks(0)
    rounds = 200
    feedback = {
        name: torch.zeros_like(value, dtype=torch.float64) for name, value in values.items()
    }
    residual: Tensors = {}
    for _ in range(rounds):
        upload, residual = encode(values, "int8", residual=residual)
        for name, tensor in upload.decode({}).items():
            feedback[name] += tensor.double() / rounds
    once = encode(values, "int8")[0].decode({})
    for name in ("adapter.0.down.weight", "adapter.0.up.weight", "adapter.0.up.bias"):
        level = values[name].abs().max() / 127
        without = (once[name] - values[name]).abs().max()
        assert without > 0.4 * level
        # The sum of all errors is one residual, however many rounds: at most half a level.
        assert (feedback[name] - values[name]).abs().max() <= 0.51 * level * 1.01 / rounds + 1e-7


def test_error_feedback_keeps_small_steps_that_rounding_would_lose() -> None:
    """One large element sets the scale; the others move by a tenth of a level a round."""
    step = torch.tensor([1.27, 0.001, -0.001])
    held = {True: torch.zeros(3), False: torch.zeros(3)}
    residual: Tensors = {}
    for _ in range(100):
        for feedback, start in held.items():
            reference = {"head.out.bias": start}
            upload, owes = encode(
                {"head.out.bias": start + step},
                "int8",
                reference=reference,
                residual=residual if feedback else {},
            )
            residual = owes if feedback else residual
            held[feedback] = upload.decode(reference)["head.out.bias"]
    assert held[False][1:].tolist() == [0.0, 0.0]
    torch.testing.assert_close(held[True], 100 * step, rtol=1e-3, atol=6e-3)


def test_residuals_wait_for_their_tensor_and_go_with_its_rank() -> None:
    residual = {"adapter.1.up.bias": torch.ones(3), "head.out.bias": torch.ones(7)}
    _, after = encode(blocks(0), "int8", residual=residual)
    assert after["adapter.1.up.bias"] is residual["adapter.1.up.bias"]
    assert torch.equal(after["head.out.bias"], encode(blocks(0), "int8")[1]["head.out.bias"])


def test_nothing_is_written_in_place() -> None:
    values, start, residual = blocks(0), blocks(1), blocks(2)
    encode(values, "int8", reference=start, residual=residual)[0].decode(start)
    for given, seed in ((values, 0), (start, 1), (residual, 2)):
        assert given.keys() == blocks(seed).keys()
        assert all(torch.equal(given[name], value) for name, value in blocks(seed).items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_empty_tensors_and_no_tensors(dtype: UploadDtype) -> None:
    values = {"head.out.bias": torch.zeros(4), "head.out.weight": torch.zeros(0, 4)}
    upload, residual = encode(values, dtype)
    decoded = upload.decode({})
    for name, value in values.items():
        assert torch.equal(decoded[name], value)
        assert torch.equal(residual.get(name, value), value)
    upload, residual = encode({}, dtype)
    assert (upload.bits, upload.decode({}), residual) == (0, {}, {})


def test_a_change_too_small_for_a_scale_is_owed() -> None:
    values = {"head.out.bias": torch.tensor([1e-45, 0.0])}
    upload, residual = encode(values, "int8")
    assert upload.tensors["head.out.bias"].tolist() == [0, 0]
    assert upload.decode({})["head.out.bias"].tolist() == [0.0, 0.0]
    assert torch.equal(residual["head.out.bias"], values["head.out.bias"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_tensor_that_is_not_finite_is_named(dtype: UploadDtype, value: float) -> None:
    values = blocks(0) | {"adapter.0.up.bias": torch.tensor([0.0, value])}
    with pytest.raises(TrainingError, match=rf"adapter\.0\.up\.bias must be finite, got {value}"):
        encode(values, dtype)


def test_a_value_beyond_float16_is_named() -> None:
    fits = {"head.out.bias": torch.tensor([65504.0, -65519.0])}
    assert encode(fits, "float16")[0].decode({})["head.out.bias"].tolist() == [65504.0, -65504.0]
    with pytest.raises(TrainingError, match=r"head\.out\.bias must be within \+-65504 .* -70000;"):
        encode({"head.out.bias": torch.tensor([1.0, -70000.0])}, "float16")


def test_a_reference_of_another_shape_is_named() -> None:
    values, start = {"head.out.bias": torch.zeros(4)}, {"head.out.bias": torch.zeros(1)}
    with pytest.raises(TrainingError, match=r"head\.out\.bias must have the shape .*\(1,\), got"):
        encode(values, "int8", reference=start)
