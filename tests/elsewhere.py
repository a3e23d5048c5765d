"""A second device where there is none: its tensors lie in the CPU's memory, but are not to be mixed with it.

It has most of what goes wrong on a GPU: operations with operands in two places, numbers read out of a
tensor's memory, operations that only CPUs have. They are refused here as there, in any thread, also on
the way back. What it lacks is arithmetic and speed of its own: its results are the CPU's to the bit.

``pytest --device elsewhere tests/pwff_opt/federated`` runs the trainer's tests on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "elsewhere"

_aten = torch.ops.aten
_COPYING = {_aten._to_copy.default, _aten.copy_.default}  # from one device to another
# The CPU may say which places are meant, here alone.
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
# A number may come from the CPU, but here it is one of these operations' indices.
_SELECTING = {_aten.index_select, _aten.index_add, _aten.index_add_, _aten.gather, _aten.scatter}
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

    def data_ptr(self) -> int:
        raise RuntimeError(f"memory of device {NAME!r} is not to be read from here")

    def __repr__(self) -> str:
        return f"{NAME}({self.held!r})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace != "aten":
            raise NotImplementedError(f"{func} is not to be had on device {NAME!r}")
        if func not in _COPYING and _mixes(func, args, kwargs or {}):
            raise RuntimeError(f"{func}: all tensors must be on one device, got cpu and {NAME}")
        leaves, form = tree_flatten((args, kwargs or {}))
        here = [leaf for leaf in leaves if isinstance(leaf, Elsewhere)]
        if any(isinstance(leaf, torch.Generator) for leaf in leaves):
            raise RuntimeError(f"{func}: a generator of the CPU cannot draw on device {NAME!r}")
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
    device: Any = torch.get_device_module(NAME)
    device.get_amp_supported_dtype = list  # torch's checkpointing asks for it
    for name in _MAKING:
        operation, _, overload = name.partition(".")
        make = getattr(getattr(_aten, operation), overload or "default")
        torch.library.impl(f"aten::{name}", "PrivateUse1", _making(make))
    torch.library.impl("aten::_copy_from", "PrivateUse1", _copied)


def _mixes(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether an operation has a tensor of the CPU where CUDA would not take it."""
    numbers = func.overloadpacket not in _SELECTING  # as tensors without a dimension
    for place, argument in enumerate(func._schema.arguments):
        given = args[place] if place < len(args) else kwargs.get(argument.name)
        if isinstance(given, torch.Tensor):
            foreign = not isinstance(given, Elsewhere)
            written = argument.alias_info is not None and argument.alias_info.is_write
            read_as_number = numbers and given.dim() == 0 and not written
            if foreign and not read_as_number:
                return True
        elif isinstance(given, Sequence) and not isinstance(given, str):
            tensors = [each for each in given if isinstance(each, torch.Tensor)]
            foreign = any(not isinstance(each, Elsewhere) for each in tensors)
            if foreign and not (func in _INDEXING and argument.name == "indices"):
                return True
    return False


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
