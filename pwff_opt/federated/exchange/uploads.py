"""What goes over the air: blocks coded as float32, float16 or int8, and the exact size of the code."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pwff_opt.errors import TrainingError
from pwff_opt.federated.model.blocks import Tensors
from pwff_opt.scenario import UploadDtype
from pwff_opt.units import BITS_PER_BYTE

_SCALE = "/scale"
_LEVELS = 127


@dataclass(frozen=True, slots=True)
class Upload:
    """One upload: ``tensors`` is all that is sent, in the dtypes in which it is sent.

    int8 blocks come with their scale, a float32 scalar ``NAME/scale``.
    """

    tensors: Tensors

    @property
    def bits(self) -> int:
        """Size of the payload [bit]: what safetensors stores of it, without the header."""
        return BITS_PER_BYTE * sum(t.numel() * t.element_size() for t in self.tensors.values())

    def decode(self, reference: Tensors) -> Tensors:
        """Return the blocks in float32; ``reference`` as it was given to :func:`encode`."""
        decoded: Tensors = {}
        for name, tensor in self.tensors.items():
            if name.endswith(_SCALE):
                continue
            scale = self.tensors.get(name + _SCALE)
            decoded[name] = (
                tensor.float()
                if scale is None
                else (_known(reference, name, tensor) + tensor.double() * scale.double()).float()
            )
        return decoded


def encode(
    tensors: Tensors,
    dtype: UploadDtype,
    *,
    reference: Tensors | None = None,
    residual: Tensors | None = None,
) -> tuple[Upload, Tensors]:
    r"""Return the upload of ``tensors``, and what its rounding still owes to the receiver.

    float32 and float16 send the values, rounded to nearest, and owe nothing: the residual is empty.
    int8 sends each tensor's change d since ``reference``, the values both ends hold at the start of
    the round (zero where there is none), at 127 levels either side of zero:

    .. math:: d = \theta + e - \theta_0, \quad s = \max|d| / 127, \quad q = \mathrm{round}(d / s),
              \quad \hat\theta = \theta_0 + s q, \quad e' = \theta + e - \hat\theta

    The change, because its range, and with it the rounding error (at most s / 2), is that of a
    round's steps and not that of the weights. The residual e joins the next upload (error feedback:
    Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019), so that rounding
    delays what is learned but does not lose it. Residuals of tensors that are not sent this time are
    kept; one of another shape than its tensor (the rank has changed) is dropped.

    Raises
    ------
    TrainingError
        Naming the tensor that is not finite, that float16 cannot hold, or whose reference has
        another shape.
    """
    reference, residual = reference or {}, residual or {}
    require_finite(tensors)
    if dtype == "float32":
        return Upload({name: tensor.float() for name, tensor in tensors.items()}), {}
    if dtype == "float16":
        return Upload({name: _half(name, tensor) for name, tensor in tensors.items()}), {}
    payload: Tensors = {}
    targets: Tensors = {}
    for name, tensor in tensors.items():
        targets[name] = tensor.double()
        owed = residual.get(name)
        if owed is not None and owed.shape == tensor.shape:
            targets[name] = targets[name] + owed.double()
        change = targets[name] - _known(reference, name, tensor)
        scale = _largest(change) / _LEVELS
        # A scale that underflows sends zeros; all of the change is then owed.
        steps = change / scale.double() if scale > 0 else torch.zeros_like(change)
        payload[name] = steps.round().clamp(-_LEVELS, _LEVELS).to(torch.int8)
        payload[name + _SCALE] = scale
    upload = Upload(payload)
    decoded = upload.decode(reference)
    owes = {name: (target - decoded[name].double()).float() for name, target in targets.items()}
    return upload, residual | owes


def require_finite(tensors: Tensors) -> None:
    """Raise a TrainingError that names the first tensor with a value that is not finite."""
    for name, tensor in tensors.items():
        finite = torch.isfinite(tensor)
        if not finite.all():
            raise TrainingError(f"{name} must be finite, got {tensor[~finite][0].item()}")


def _half(name: str, tensor: torch.Tensor) -> torch.Tensor:
    half = tensor.half()
    if torch.isinf(half).any():
        limit = torch.finfo(torch.float16).max
        raise TrainingError(
            f"{name} must be within +-{limit:g} to be sent as float16, "
            f"got {tensor[torch.isinf(half)][0].item():g}; upload float32 or int8"
        )
    return half


def _known(reference: Tensors, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return what both ends hold of a tensor, in float64: its reference, or zero."""
    if name not in reference:
        return torch.zeros_like(tensor, dtype=torch.float64)
    if reference[name].shape != tensor.shape:
        raise TrainingError(
            f"{name} must have the shape of its reference, {tuple(reference[name].shape)}, "
            f"got {tuple(tensor.shape)}"
        )
    return reference[name].double()


def _largest(change: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude as a float32 scalar; 0 for no elements."""
    return (change.abs().max() if change.numel() else change.new_zeros(())).float()
