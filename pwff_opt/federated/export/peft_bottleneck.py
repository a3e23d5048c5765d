"""The bottleneck adapter as a method of peft; importing this module makes it known to peft.

``get_peft_model(model, BottleneckConfig(width=16))``, ``save_pretrained``,
``PeftModel.from_pretrained`` and ``disable_adapter`` then treat it as they treat peft's own methods.
It can be unloaded, but not merged: it is not linear.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Any, NoReturn

import torch
from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from pwff_opt.errors import ModelError
from pwff_opt.federated.model.adapters import BottleneckAdapter, transformer_layers


class BottleneckType(str, Enum):  # noqa: UP042, peft reads "NAME" out of str(member)
    """What stands for a member of peft's ``PeftType``, an enumeration that cannot be extended."""

    BOTTLENECK = "BOTTLENECK"


@dataclass
class BottleneckConfig(PeftConfig):  # type: ignore[misc]
    """Where bottleneck adapters go, and how wide they are."""

    width: int = 16
    layers_to_transform: list[int] | None = None
    """Transformer layers, counted from 0, that get an adapter; None: all."""
    modules_to_save: list[str] | None = None
    """Modules that are trained and saved beside the adapters, such as a head."""
    target_modules: str | None = None
    """The names of those layers in the model at hand, as a regular expression; filled in by peft."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BottleneckType.BOTTLENECK
        if self.width < 1:
            raise ModelError(f"width must be at least 1, got {self.width}")


class BottleneckLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    r"""The adapters of one transformer layer, by peft's adapter names; see ``BottleneckAdapter``.

    .. math:: y = x + W_u\,\mathrm{gelu}(W_d x + b_d) + b_u

    ``x``: [..., hidden], the layer's output. Several active adapters act one after another.

    It is the layer's child ``bottleneck`` and acts through a forward hook. Were it wrapped around the
    layer, as peft wraps projections, the modules within would change their names, on which a LoRA's
    keys depend, and ``output_hidden_states`` would show what enters the adapter.
    """

    # Named so that peft finds the method's prefix in parameters, but not in the module's own name.
    adapter_layer_names = ("bottleneck_down", "bottleneck_up")

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self._parent = (layer,)  # in a tuple, or the parent would become a child
        self._hook = layer.register_forward_hook(_apply)

    def get_base_layer(self) -> nn.Module:
        return self._parent[0]

    def update_layer(self, adapter_name: str, *, hidden: int, width: int) -> None:
        """Add an adapter; it computes the identity."""
        adapter = BottleneckAdapter(hidden, width)
        self.bottleneck_down[adapter_name] = adapter.down
        self.bottleneck_up[adapter_name] = adapter.up
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # peft calls it after loading with low_cpu_mem_usage. Its own looks for the layer's ``weight``,
        # which a transformer layer has not.
        device = device or next(self.get_base_layer().parameters()).device
        for parts in (self.bottleneck_down, self.bottleneck_up):
            part = parts[adapter_name]
            if not any(parameter.is_meta for parameter in part.parameters()):
                part.to(device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.disable_adapters:
            return x
        active: Any = self.active_adapters
        for name in active:
            if name in self.bottleneck_down:
                down: Any = self.bottleneck_down[name]
                inner = down(x.to(down.weight.dtype))  # adapters stay float32 in a bfloat16 model
                x = x + self.bottleneck_up[name](nn.functional.gelu(inner)).to(x.dtype)
        return x

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        raise ModelError("a bottleneck adapter is not linear, so it cannot be merged into weights")

    def remove(self) -> None:
        """Leave the transformer layer as it was."""
        self._hook.remove()
        del self.get_base_layer().bottleneck


def _apply(layer: Any, _args: Any, output: Any) -> Any:
    # It reads ``layer.bottleneck`` so that a deep copy of a model runs its own adapters.
    if isinstance(output, tuple):
        return (layer.bottleneck(output[0]), *output[1:])
    return layer.bottleneck(output)


class BottleneckModel(BaseTuner):  # type: ignore[misc]
    """A model with bottleneck adapters in some of its transformer layers."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        parent, attribute = transformer_layers(self.model)
        stack = getattr(parent, attribute)
        path = next(name for name, module in self.model.named_modules() if module is stack)
        count = len(stack)
        chosen = peft_config.layers_to_transform
        chosen = sorted(set(range(count) if chosen is None else chosen))
        if not chosen or chosen[0] < 0 or chosen[-1] >= count:
            raise ModelError(
                f"layers_to_transform must name at least one layer in 0..{count - 1}, got {chosen}"
            )
        # A string: peft shortens long lists of names, and then matches more than they said.
        peft_config.target_modules = rf"{re.escape(path)}\.({'|'.join(map(str, chosen))})"
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        """Add an adapter to the transformer layer ``target``, which is not replaced."""
        if not hasattr(target, "bottleneck"):
            target.bottleneck = BottleneckLayer(target)
        target.bottleneck.update_layer(
            adapter_name, hidden=self.model.config.hidden_size, width=peft_config.width
        )

    def merge_and_unload(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise ModelError(
            "a bottleneck adapter is not linear, so it cannot be merged into weights; "
            "unload() takes it away"
        )

    def unload(self) -> nn.Module:
        for module in list(self.model.modules()):
            if isinstance(module, BottleneckLayer):
                module.remove()
        return super().unload()  # type: ignore[no-any-return]


def _register() -> None:
    """Enter the method in the dictionaries by which peft finds its own.

    ``peft.utils.register_peft_method`` fills the same ones, but insists on a member of ``PeftType``; so
    does saving before peft 0.21.
    """
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(BottleneckType.BOTTLENECK)
    if known is not None and known.__module__ != __name__:
        raise ImportError(f"peft has a method of its own called BOTTLENECK now: {known}")
    PEFT_TYPE_TO_CONFIG_MAPPING[BottleneckType.BOTTLENECK] = BottleneckConfig
    PEFT_TYPE_TO_TUNER_MAPPING[BottleneckType.BOTTLENECK] = BottleneckModel
    PEFT_TYPE_TO_PREFIX_MAPPING[BottleneckType.BOTTLENECK] = BottleneckModel.prefix


_register()
