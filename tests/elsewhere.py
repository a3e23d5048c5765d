"""A second device where there is none: its tensors lie in the CPU's memory, but are not to be mixed with it.

It has what goes wrong on a GPU: operations with operands in two places, numbers read out of a tensor's
memory, operations that only CPUs have. All are refused here as there, in any thread, also on the way
back. What it lacks is arithmetic and speed of its own: its results are the CPU's to the bit.

``pytest --device elsewhere tests/pwff_opt/federated`` runs the trainer's tests on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "elsewhere"

_aten = torch.ops.aten
# Copies go from one device to another, and the CPU may say which rows are meant: so it is with CUDA.
_COPYING = {_aten._to_copy.default, _aten.copy_.default}
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
# Made without a tensor to tell where.
_MAKING = ("empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step")


class Elsewhere(torch.Tensor):
    """A tensor of that device; ``held`` is the same on the CPU."""

    held: torch.Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Elsewhere:
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self) -> str:
        return f"{NAME}({self.held!r})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace != "aten":
            raise NotImplementedError(f"{func} is not to be had on device {NAME!r}")
        leaves, form = tree_flatten((args, kwargs or {}))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        here = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
        foreign = [t for t in tensors if not isinstance(t, Elsewhere) and t.dim()]
        if func in _INDEXING:
            foreign = [t for t in foreign if t.dtype not in (torch.int64, torch.bool)]
        if foreign and func not in _COPYING:
            raise RuntimeError(f"{func}: all tensors must be on one device, got cpu and {NAME}")
        if func is _aten.copy_.default:
            return _copied(args[1], args[0])
        stays = all(leaf.type == NAME for leaf in leaves if isinstance(leaf, torch.device))
        known = {id(tensor.held): tensor for tensor in here}

        def back(found: Any) -> Any:
            if not isinstance(found, torch.Tensor) or not stays:
                return found
            return known[id(found)] if id(found) in known else Elsewhere(found)

        plain, named = tree_unflatten([_held(leaf) for leaf in leaves], form)
        # A view is of inference mode if what it shows is; all else, if that is on.
        inference = here[0].is_inference() if func.is_view else torch.is_inference_mode_enabled()
        with torch.inference_mode(inference):
            return tree_map(back, func(*plain, **named))


def install() -> None:
    """Make the device known to torch, for the rest of the process: it cannot be undone."""
    _setup_privateuseone_for_python_backend(NAME)
    torch.get_device_module(
        NAME
    ).get_amp_supported_dtype = list  # torch's checkpointing asks for it
    for name in _MAKING:
        operation, _, overload = name.partition(".")
        make = getattr(getattr(_aten, operation), overload or "default")
        torch.library.impl(f"aten::{name}", "PrivateUse1", _making(make))
    torch.library.impl("aten::_copy_from", "PrivateUse1", _copied)


def _held(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    return leaf.held if isinstance(leaf, Elsewhere) else leaf


def _making(make: Callable[..., torch.Tensor]) -> Callable[..., Elsewhere]:
    def made(*args: Any, **kwargs: Any) -> Elsewhere:
        kwargs |= {"device": torch.device("cpu"), "pin_memory": False}
        return Elsewhere(make(*args, **kwargs))

    return made


def _copied(source: torch.Tensor, to: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _held(to).copy_(_held(source))
    return to
