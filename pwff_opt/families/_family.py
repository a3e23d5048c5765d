"""What a family of language models states of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from pwff_opt.costs.architecture import Architecture
from pwff_opt.costs.flops import Quantity, TokenCount


class Family(Protocol):
    """A family of language models: its sizes, its costs and, where torch is imported, its layers."""

    model_types: tuple[str, ...]
    """Values of ``model_type`` in a ``config.json`` that this family reads."""
    causal: bool
    """Whether a token sees only those before it, and a language head says the next one."""
    poolings: tuple[str, ...]
    """What a classification head may see: "model", "mean"."""
    head: str
    """Name of the classification head's module."""
    head_bias: bool
    """Whether the classification head has a bias."""
    classifies_tokens: bool
    """Whether the classification head is computed at every token, not once a sequence."""
    masked_head: str
    """How names of weights of the head over the vocabulary begin, of an encoder; "" for a decoder."""
    tied: bool
    """Whether a head over the vocabulary is the token embeddings where a configuration does not say."""
    always_masked: bool
    """Whether attention has a mask also in batches without padding."""
    mlp_products: int
    """Number of matrix products in an MLP."""
    lora_targets: tuple[str, str]
    """Names of the projections that carry a LoRA: queries and values (Hu et al., ICLR 2022, 4.2)."""
    memory: Any
    """The module that replays a training step's tensors, as ``pwff_opt.families.bert.memory`` does."""

    def check(self, architecture: Architecture) -> None:
        """Refuse sizes that no model of this family has."""

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Refuse a configuration that asks for what this family does not compute."""

    def sizes(self, config: Mapping[str, Any], hidden: int, heads: int) -> dict[str, Any]:
        """Return the fields of an architecture in which families differ, from a configuration."""

    def parameters(self, architecture: Architecture) -> int:
        """Return the number of parameters of the frozen model, without a classification head."""

    def transform_flops(self, architecture: Architecture, count: TokenCount) -> Quantity:
        """Return the FLOPs between the last layer and the head over the vocabulary."""

    def pooler_flops(self, architecture: Architecture, count: TokenCount) -> Quantity:
        """Return the FLOPs of the model's own pooler."""

    def layer(self, layer: Any, config: Any, dtype: Any) -> Any:
        """Return a layer of a transformers model as a ``pwff_opt.federated.model.layers.Layer``."""

    def ends(self, model: Any, pooling: str, **how: Any) -> Any:
        """Return what comes before and after the layers, a ``pwff_opt.federated.model.layers.Ends``."""

    def head_shapes(self, model: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the classification head's parameters by name."""

    def pool_by_mean(self, model: Any) -> None:
        """Let a transformers classifier pool by the mean."""
