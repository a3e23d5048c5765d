"""The frozen language model, held once for any number of devices."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging

from pwff_opt.costs.architecture import family_of
from pwff_opt.data.models import model_config
from pwff_opt.errors import ModelError
from pwff_opt.federated.model.adapters import transformer_layers
from pwff_opt.federated.model.attention import Around, Window
from pwff_opt.federated.model.blocks import Tensors
from pwff_opt.federated.model.bottleneck import Bottleneck, adapted
from pwff_opt.federated.model.layers import Ends, Layer, fused
from pwff_opt.federated.model.low_rank import LowRank, Updates, joined
from pwff_opt.federated.model.products import Frozen, filled
from pwff_opt.federated.text.tokens import Packed
from pwff_opt.registry import FAMILIES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Start:
    """Where a pass through the layers begins, and with what."""

    layer: int
    """The number of layers: only the head is left."""
    hidden: torch.Tensor
    """[token, hidden]: the input of ``layer``; if ``completed``, its output but for the adapter."""
    projected: torch.Tensor | None = None
    """Queries, keys and values of ``layer`` by its frozen weights, where they are known."""
    completed: bool = False


class Stack:
    """The blocks of several devices, by layer.

    ``blocks``: a dict for each device of the batch, in order.  ``scales``: what multiplies B A of a
    device's ``lora``, and ``common_scale`` of ``common``.
    """

    def __init__(
        self, blocks: Sequence[Tensors], scales: Sequence[float], *, common_scale: float = 1.0
    ) -> None:
        self._blocks, self._scales, self._common_scale = blocks, scales, common_scale
        self._names = set().union(*blocks)

    def low_rank(self, layer: int, names: Sequence[str], counts: Sequence[int]) -> Updates:
        """Return what the devices, of ``counts`` rows each, add to a layer's projections."""
        return {name: self._updates(f"{layer}.{name}", counts) for name in names}

    def _updates(self, place: str, counts: Sequence[int]) -> list[list[LowRank]]:
        passes = []
        for kind in ("lora", "common"):
            a, b = f"{kind}.{place}.A", f"{kind}.{place}.B"
            if a not in self._names:
                continue
            updates, stop = [], 0
            for own, scale, count in zip(self._blocks, self._scales, counts, strict=True):
                start, stop = stop, stop + count
                if a in own:
                    scale = scale if kind == "lora" else self._common_scale
                    updates.append(LowRank(start=start, stop=stop, scale=scale, a=own[a], b=own[b]))
            passes.append(updates)
        return passes

    def adapt(self, layer: int, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Return ``x`` through each device's bottleneck adapter, where the layer has one."""
        prefix = f"adapter.{layer}."
        if f"{prefix}up.bias" not in self._names:
            return x
        adapters, stop = [], 0
        for own, count in zip(self._blocks, counts, strict=True):
            start, stop = stop, stop + count
            if f"{prefix}up.bias" in own:
                down, up = (
                    (own[f"{prefix}{part}.weight"], own[f"{prefix}{part}.bias"])
                    for part in ("down", "up")
                )
                adapters.append(Bottleneck(start, stop, *down, *up))
        return adapted(x, adapters)

    def deltas(self, layer: int) -> Tensors:
        """Return what aggregation has added to a layer's frozen weights: the same for all devices."""
        prefix = f"delta.{layer}."
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self._blocks[0].items()
            if name.startswith(prefix)
        }

    def classify(self, pooled: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Return [sequence, class] by each device's own head."""
        return joined(
            [
                functional.linear(part, own["head.weight"], own.get("head.bias"))
                for part, own in zip(self._parts(pooled, counts), self._blocks, strict=True)
            ]
        )

    def _parts(self, x: torch.Tensor, counts: Sequence[int]) -> Sequence[torch.Tensor]:
        """Return the rows of every device."""
        return [x] if len(self._blocks) == 1 else x.split(list(counts))


NOTHING = Stack([{}], [1.0])


class Backbone:
    """A language model whose own weights never change; devices bring their blocks with them.

    Parameters
    ----------
    source : folder with a Hugging Face model (safetensors) or a hub name.
    family : name of the model's family (:data:`pwff_opt.registry.FAMILIES`).
    classes : number of labels, for which devices bring heads; None: the model's own head over its
        vocabulary.
    pooling : "model" or "mean", what the head sees.
    max_tokens : longest sequence that will come.
    window : who sees whom; None: all tokens of a sequence, in a decoder those before.
    dtype : "float32" or "bfloat16", of the frozen weights and of products with them.
    device : where it computes; a GPU if there is one and nothing else is said.
    """

    def __init__(
        self,
        source: str,
        *,
        family: str,
        classes: int | None,
        pooling: str,
        max_tokens: int,
        window: Window | None = None,
        dtype: str = "float32",
        device: torch.device | str | None = None,
    ) -> None:
        own = FAMILIES[family]
        model = (
            load_language_model(source)
            if classes is None
            else load_classifier(source, classes=classes)
        )
        if classes is not None and pooling == "mean":
            own.pool_by_mean(model)
        self.source, self.family, self.pooling = source, family, pooling
        self.device = torch.device(device or default_device())
        self.dtype = DTYPES[dtype]
        model = model.eval().requires_grad_(False)  # no dropout: below the blocks all is constant
        owner, attribute = transformer_layers(model)
        model.to(self.device)
        self.layers: list[Layer] = [
            own.layer(layer, model.config, self.dtype) for layer in getattr(owner, attribute)
        ]
        setattr(owner, attribute, nn.ModuleList())  # their weights are held by self.layers now
        self.ends: Ends = own.ends(model, pooling, max_tokens=max_tokens, window=window)
        self.hidden = int(model.config.hidden_size)
        self.head_shapes: dict[str, tuple[int, ...]] = {}
        self._vocabulary: Frozen | None = None
        if classes is None:
            self._vocabulary = fused({"": model.get_output_embeddings()}, self.dtype)
        else:
            self.head_shapes = own.head_shapes(model)
        self._changed: dict[int, tuple[Tensors, Any]] = {}
        self._lock = threading.Lock()

    @property
    def layer_count(self) -> int:
        return len(self.layers)

    def lora_shapes(self, layer: int) -> dict[str, tuple[int, int]]:
        """Return (inputs, outputs) of every projection of a layer that carries a LoRA."""
        widths = self.layers[layer].widths
        return {name: (self.hidden, widths[name]) for name in FAMILIES[self.family].lora_targets}

    def embed(self, packed: Packed) -> Start:
        """Return the start below all layers."""
        return Start(layer=0, hidden=self.ends.embed(packed))

    def project(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return queries, keys and values of a layer by its frozen weights, side by side."""
        own = self.layers[layer]
        return own.project(own.enter(hidden))

    def run(
        self,
        packed: Packed,
        stack: Stack,
        start: Start,
        *,
        stop: int | None = None,
        completed: bool = False,
        around: Around | None = None,
    ) -> torch.Tensor:
        """Return the input of layer ``stop`` (none given: what leaves the last layer), [token, hidden].

        With ``completed`` the pass goes on into layer ``stop``, up to where its adapter would act.
        ``around``: attention that remembers, say; that among the packed tokens if none is given.
        """
        stop = self.layer_count if stop is None else stop
        around = around or self.ends.around(packed)
        x = filled(start.hidden)
        *counts, last = packed.token_counts
        counts.append(last + len(x) - len(start.hidden))  # what fills up goes with the last device
        for number in range(start.layer, stop + completed):
            layer, known = self.layers[number], number == start.layer
            if not (known and start.completed):
                deltas = stack.deltas(number)
                x = layer.run(
                    x,
                    around,
                    stack.low_rank(number, FAMILIES[self.family].lora_targets, counts),
                    project=self._projection(number, deltas) if deltas else None,
                    projected=start.projected if known and not deltas else None,
                )
            if number < stop:
                x = stack.adapt(number, x, counts)
        return x if len(x) == len(start.hidden) else x[: len(start.hidden)]

    def classify(self, hidden: torch.Tensor, packed: Packed, stack: Stack) -> torch.Tensor:
        """Return [sequence, class] of what leaves the last layer, [token, hidden]."""
        return stack.classify(self.ends.pool(hidden, packed), packed.sequence_counts)

    def tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [row, vocabulary] of what leaves the last layer, [row, hidden].

        A decoder says which token comes next, an encoder which is at the place itself.
        """
        assert self._vocabulary is not None
        return self._vocabulary(self.ends.norm(hidden)).float()

    def logits(self, packed: Packed, stack: Stack, start: Start) -> torch.Tensor:
        """Return [sequence, class]."""
        return self.classify(self.run(packed, stack, start), packed, stack)

    def _projection(self, number: int, deltas: Tensors) -> Any:
        """Return a layer's projection with ``deltas`` in its weights; the latest is kept."""
        with self._lock:
            known, project = self._changed.get(number, ({}, None))
            same = known.keys() == deltas.keys() and all(known[n] is t for n, t in deltas.items())
            if not same:
                with torch.inference_mode(False):  # it may serve a backward pass later
                    project = self.layers[number].change(deltas)
                self._changed[number] = (deltas, project)
            return project


def default_device() -> str:
    """Return where models compute if nothing else is said: a GPU if torch sees one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def lora_config(family: str, rank: int, lora_scale: float, **more: Any) -> LoraConfig:
    """Return the peft configuration of our LoRA: queries and values, no dropout, no bias."""
    return LoraConfig(
        r=rank,
        lora_alpha=lora_scale * rank,  # peft only ever divides it by r
        target_modules=list(FAMILIES[family].lora_targets),
        **more,
    )


def load_classifier(source: str, *, classes: int) -> Any:
    """Load a sequence classifier from a folder or hub name; only safetensors weights are read."""
    model, _ = _loaded(
        AutoModelForSequenceClassification,
        source,
        num_labels=classes,
        ignore_mismatched_sizes=True,  # a head for other labels is replaced
    )
    # Decoders pool the last token that is not this one.
    model.config.pad_token_id = pad_token_id(source)
    return model


def load_language_model(source: str) -> Any:
    """Load a language model, an encoder's or a decoder's, as :func:`load_classifier` does.

    Raises
    ------
    ModelError
        It cannot be loaded, or lacks weights, of its head say: they would be drawn, and never trained.
    """
    causal = FAMILIES[family_of(model_config(source))].causal
    kind = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    model, missing = _loaded(kind, source)
    if missing:
        raise ModelError(
            "model.source must name a language model with its head for a training.stage other than "
            f"'classification'; {source!r} lacks {', '.join(missing)}"
        )
    return model


def _loaded(kind: Any, source: str, **more: Any) -> tuple[Any, list[str]]:
    """Return the model, and the names of the weights that it lacks."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a new head is expected, not worth a warning
    transformers_logging.disable_progress_bar()
    try:
        model, told = kind.from_pretrained(
            source,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **more,
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"model {source!r} could not be loaded: {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    model.config.use_cache = False  # of keys and values, which only costs memory in training
    return model, sorted(told["missing_keys"])


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
