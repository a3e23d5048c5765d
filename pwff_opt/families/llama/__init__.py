"""The Llama family: rotary positions, norms before the parts of a layer, a gated MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pwff_opt.costs.architecture import Architecture, size
from pwff_opt.costs.flops import Quantity, TokenCount
from pwff_opt.errors import ModelError
from pwff_opt.families.llama import memory
from pwff_opt.registry import FAMILIES


class Llama:
    """Decoders as Touvron et al. (2023) made them; Mistral and Qwen2 differ in biases and sizes."""

    model_types: tuple[str, ...] = ("llama", "mistral", "qwen2")
    causal = True
    poolings = ("model",)
    head = "score"
    head_bias = False
    classifies_tokens = True
    masked_head = ""
    # Absent means untied for llama, mistral and qwen2 alike.
    tied = False
    always_masked = True
    mlp_products = 3
    lora_targets = ("q_proj", "v_proj")
    memory: Any = memory

    def check(self, architecture: Architecture) -> None:
        """Accept all sizes."""

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Accept all configurations."""

    def sizes(self, config: Mapping[str, Any], hidden: int, heads: int) -> dict[str, Any]:
        """Return heads and biases, which depend on the ``model_type``."""
        kind = config["model_type"]
        # Only for llama does an absent key mean "as many as query heads"; others default to a number.
        if kind != "llama" and "num_key_value_heads" not in config:
            raise ModelError(f"config.num_key_value_heads must be given for {kind}, got nothing")
        attention = kind == "llama" and bool(config.get("attention_bias", False))
        return {
            "key_value_heads": size(config, "num_key_value_heads", heads),
            "head_dim": size(config, "head_dim", hidden // heads),
            "qkv_bias": attention or kind == "qwen2",
            "output_bias": attention,
            "mlp_bias": kind == "llama" and bool(config.get("mlp_bias", False)),
        }

    def parameters(self, architecture: Architecture) -> int:
        r"""Return the number of parameters of the frozen model, without a classification head.

        .. math:: Vh + L\,[\,2ha + 2hk + 3hi + 2h + \text{biases}\,] + h + \lambda Vh

        ``V``: vocabulary; the last :math:`h` is the final norm; :math:`\lambda`: an untied language head.
        """
        a = architecture
        h, q, k, i = a.hidden, a.query_width, a.key_value_width, a.intermediate
        attention = 2 * h * (q + k) + a.qkv_bias * (q + 2 * k) + a.output_bias * h
        mlp = 3 * h * i + a.mlp_bias * (2 * i + h)
        untied = a.head == "language" and not a.tied
        embeddings = a.vocabulary * h
        return embeddings + a.layers * (attention + mlp + 2 * h) + h + untied * a.vocabulary * h

    def transform_flops(self, architecture: Architecture, count: TokenCount) -> Quantity:
        """Return 0: the head over the vocabulary sees the hidden states as they are."""
        return 0

    def pooler_flops(self, architecture: Architecture, count: TokenCount) -> Quantity:
        """Return 0: the head sees the hidden states as they are."""
        return 0

    def layer(self, layer: Any, config: Any, dtype: Any) -> Any:
        """Return a layer of a transformers model as arithmetic on packed tokens."""
        from pwff_opt.families.llama.layers import LlamaLayer

        return LlamaLayer(layer, config, dtype)

    def ends(self, model: Any, pooling: str, **how: Any) -> Any:
        """Return embeddings, rotations and the last norm."""
        from pwff_opt.families.llama.layers import LlamaEnds

        return LlamaEnds(model, pooling, **how)

    def head_shapes(self, model: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the classification head's parameters by name."""
        head = getattr(model, self.head)
        return {name: tuple(value.shape) for name, value in head.named_parameters()}

    def pool_by_mean(self, model: Any) -> None:
        """Refuse: a decoder's head sees the last token."""
        raise ModelError(f"mean pooling needs a model with a pooler, got {type(model).__name__}")


FAMILIES.add("llama", Llama())
