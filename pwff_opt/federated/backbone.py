"""The frozen language model, held once, with slots for the blocks of whichever device is at work."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from pwff_opt.errors import ModelError
from pwff_opt.federated.adapters import attach_adapters, pool_by_mean, transformer_layers
from pwff_opt.federated.blocks import Tensors

logger = logging.getLogger(__name__)

# The projections that carry a LoRA: queries and values (Hu et al., ICLR 2022, section 4.2).
LORA_TARGETS = {"bert": ("query", "value"), "llama": ("q_proj", "v_proj")}
HEADS = {"bert": "classifier", "llama": "score"}


class Backbone:
    """A sequence classifier whose own weights never change, with a slot for every trainable tensor.

    Parameters
    ----------
    source : folder with a Hugging Face model (safetensors) or a hub name.
    family : "bert" or "llama", as the cost model names it.
    classes : number of labels.
    ranks : every LoRA rank that can occur; 0 stands for none.
    adapter_width : width of the bottleneck adapters.
    lora_scale : alpha / r, the same for every rank.
    pooling : "model" or "mean", what the head sees.
    """

    def __init__(
        self,
        source: str,
        *,
        family: str,
        classes: int,
        ranks: Iterable[int],
        adapter_width: int,
        lora_scale: float,
        pooling: str,
    ) -> None:
        model = load_classifier(source, classes=classes)
        self.pooling = pooling
        if pooling == "mean":
            pool_by_mean(model)
        self.source, self.family, self.classes = source, family, classes
        self.adapter_width, self.lora_scale = adapter_width, lora_scale
        self.ranks = tuple(sorted({rank for rank in ranks if rank > 0}))
        self._adapters = attach_adapters(model, adapter_width)
        for rank in self.ranks:
            # One slot a rank. peft's own layers do the arithmetic, so an exported device is exact.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                inject_adapter_in_model(lora_config(family, rank, lora_scale), model, _slot(rank))
        self.model = model.eval()  # no dropout: below the blocks, the output is a constant
        self.model.requires_grad_(False)
        self._owner, self._attribute = transformer_layers(model)
        self._layers = list(getattr(self._owner, self._attribute))
        self._loras: list[dict[str, LoraLayer]] = [
            {
                name.rsplit(".", 1)[-1]: module
                for name, module in layer.named_modules()
                if isinstance(module, LoraLayer)
            }
            for layer in self._layers
        ]
        self._head: nn.Module = getattr(model, HEADS[family])
        self._slots: dict[str, nn.Parameter] = {}
        self._resumed: _Resumed | None = None

    def twin(self) -> Backbone:
        """Return another backbone with slots of its own; the frozen weights are shared."""
        other = Backbone(
            self.source,
            family=self.family,
            classes=self.classes,
            ranks=self.ranks,
            adapter_width=self.adapter_width,
            lora_scale=self.lora_scale,
            pooling=self.pooling,
        )
        own = dict(self.model.named_parameters())
        for name, parameter in other.model.named_parameters():
            if not (".lora_" in name or ".adapter." in name or name.startswith(HEADS[self.family])):
                parameter.data = own[name].data
        return other

    @property
    def layer_count(self) -> int:
        return len(self._layers)

    @property
    def hidden(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def head_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self._head.named_parameters()}

    def lora_shapes(self, layer: int) -> dict[str, tuple[int, int]]:
        """Return (inputs, outputs) of every projection of a layer that carries a LoRA."""
        return {
            name: (module.in_features, module.out_features)
            for name, module in self._loras[layer].items()
        }

    def configure(
        self, rank: int, present: Sequence[bool], trained: Sequence[bool], *, resume: bool
    ) -> int:
        """Show the blocks of the ``present`` layers, let those of the ``trained`` ones learn.

        Returns the first layer that will run. With ``resume`` it is the first one that has blocks:
        everything below is the base model, whose output :meth:`logits` then wants to be given.
        """
        self.model.requires_grad_(False)
        self._slots = {f"head.{part}": value for part, value in self._head.named_parameters()}
        for value in self._slots.values():
            value.requires_grad_(True)
        for layer, adapter in enumerate(self._adapters):
            adapter.enabled = present[layer]
            for module in self._loras[layer].values():
                module.enable_adapters(present[layer] and rank > 0)
            if not present[layer]:
                continue
            slots = {f"adapter.{layer}.{part}": value for part, value in adapter.named_parameters()}
            if rank > 0:
                for name, module in self._loras[layer].items():
                    module.set_adapter(_slot(rank))
                    slots[f"lora.{layer}.{name}.A"] = module.lora_A[_slot(rank)].weight
                    slots[f"lora.{layer}.{name}.B"] = module.lora_B[_slot(rank)].weight
            for value in slots.values():
                value.requires_grad_(trained[layer])
            self._slots |= slots
        first = 0
        if resume:
            first = next((layer for layer, here in enumerate(present) if here), self.layer_count)
        self._resumed = _Resumed(self._layers[first - 1]) if first else None
        kept = (
            self._layers[first:]
            if self._resumed is None
            else [self._resumed, *self._layers[first:]]
        )
        setattr(self._owner, self._attribute, nn.ModuleList(kept))
        return first

    def load(self, blocks: Tensors) -> None:
        """Copy a device's tensors into the slots in use."""
        with torch.no_grad():
            for name, slot in self._slots.items():
                slot.copy_(blocks[name])

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the slots that learn, by name."""
        return {name: slot for name, slot in self._slots.items() if slot.requires_grad}

    def collect(self) -> Tensors:
        """Return copies of the slots that learn."""
        return {name: slot.detach().clone() for name, slot in self.trained().items()}

    def logits(
        self, ids: torch.Tensor, mask: torch.Tensor, hidden: torch.Tensor | None
    ) -> torch.Tensor:
        """Return [sequence, class] from token ids, and from ``hidden`` [sequence, token, hidden]
        where layers were left out: the base model's output just below the first layer with blocks.
        """
        if self._resumed is not None:
            self._resumed.hidden = hidden
        logits: torch.Tensor = self.model(input_ids=ids, attention_mask=mask).logits
        return logits

    def base_outputs(self, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """Return the output of every layer of the base model, each [sequence, token, hidden]."""
        outputs: list[torch.Tensor] = []
        nothing = [False] * self.layer_count
        self.configure(0, nothing, nothing, resume=False)

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)

        handles = [layer.register_forward_hook(keep) for layer in self._layers]
        try:
            with torch.inference_mode():
                self.model(input_ids=ids, attention_mask=mask)
        finally:
            for handle in handles:
                handle.remove()
        return outputs


class _Resumed(nn.Module):
    """Stands in for the layers below the first one with blocks: returns their known output."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        self.hidden: torch.Tensor | None = None
        if hasattr(replaced, "attention_type"):  # some families choose a layer's mask by it
            self.attention_type = replaced.attention_type

    def forward(self, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        if self.hidden is None:
            raise ModelError("hidden states below the first layer with blocks were not given")
        return self.hidden


def lora_config(family: str, rank: int, lora_scale: float, **more: Any) -> LoraConfig:
    """Return the peft configuration of our LoRA: queries and values, no dropout, no bias."""
    return LoraConfig(
        r=rank,
        lora_alpha=lora_scale * rank,  # peft only ever divides it by r
        target_modules=list(LORA_TARGETS[family]),
        **more,
    )


def load_classifier(source: str, *, classes: int) -> Any:
    """Load a sequence classifier from a folder or hub name; only safetensors weights are read."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a new head is expected, not worth a warning
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            source,
            num_labels=classes,
            use_safetensors=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # a head for other labels is replaced
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"model {source!r} could not be loaded: {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    # Decoders pool the last token that is not this one; a key-value cache only costs memory here.
    model.config.pad_token_id = pad_token_id(source)
    model.config.use_cache = False
    return model


def pad_token_id(source: str) -> int:
    """Return the token id that fills up short sequences.

    It must be no token of a text, or decoders would pool too early: the tokenizer's own padding token,
    else its unknown or end token.
    """
    tokenizer = AutoTokenizer.from_pretrained(source)
    for token in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ModelError(f"the tokenizer of {source!r} must have a padding, unknown or end token")


def _slot(rank: int) -> str:
    return f"rank{rank}"
