"""The BERT family: learned positions, norms after the parts of a layer, a plain MLP, a pooler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pwff_opt.costs.architecture import Architecture, size
from pwff_opt.costs.flops import Quantity, TokenCount
from pwff_opt.errors import ModelError
from pwff_opt.families.bert import memory
from pwff_opt.registry import FAMILIES


class Bert:
    """Encoders as Devlin et al. (NAACL 2019) made them."""

    model_types: tuple[str, ...] = ("bert",)
    causal = False
    poolings = ("model", "mean")
    head = "classifier"
    head_bias = True
    classifies_tokens = False
    masked_head = "cls.predictions."
    tied = True
    always_masked = False
    mlp_products = 2
    lora_targets = ("query", "value")
    memory: Any = memory

    def check(self, architecture: Architecture) -> None:
        """Refuse a hidden width that is not that of all heads together."""
        if architecture.hidden != architecture.query_width:
            raise ModelError(
                f"hidden must be heads x head_dim ({architecture.heads} x {architecture.head_dim}) "
                f"in the {architecture.family} family, got {architecture.hidden}"
            )

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Refuse decoders of this name."""
        for key in ("is_decoder", "add_cross_attention"):
            if config.get(key):
                raise ModelError(f"config.{key} must be false in an encoder, got {config[key]!r}")

    def sizes(self, config: Mapping[str, Any], hidden: int, heads: int) -> dict[str, Any]:
        """Return heads, tables and biases: all projections have one."""
        return {
            "key_value_heads": heads,
            "head_dim": hidden // heads,
            "positions": size(config, "max_position_embeddings"),
            "token_types": size(config, "type_vocab_size", 2),
            "qkv_bias": True,
            "output_bias": True,
            "mlp_bias": True,
        }

    def parameters(self, architecture: Architecture) -> int:
        r"""Return the number of parameters of the frozen model, without a classification head.

        .. math:: (V+P+Y)h + 2h + L\,[\,2ha + 2hk + 2hi + 4h + \text{biases}\,] + h^2 + h

        ``V``: vocabulary; ``P``: positions; ``Y``: token types; the last :math:`h^2 + h` is the pooler
        (none with mean pooling). A language head has :math:`h^2 + 3h + V + \lambda V(h + 1)` in its place
        (untied, :math:`\lambda = 1`, one bias of two is not used).
        """
        a = architecture
        h, q, k, i = a.hidden, a.query_width, a.key_value_width, a.intermediate
        language = a.head == "language"
        attention = 2 * h * (q + k) + a.qkv_bias * (q + 2 * k) + a.output_bias * h
        mlp = 2 * h * i + a.mlp_bias * (i + h)
        embeddings = (a.vocabulary + a.positions + a.token_types) * h + 2 * h
        top = h * h + h if language or a.pooling == "model" else 0
        untied = language and not a.tied
        top += language * (2 * h + a.vocabulary) + untied * a.vocabulary * (h + 1)
        return embeddings + a.layers * (attention + mlp + 4 * h) + top

    def transform_flops(self, architecture: Architecture, count: TokenCount) -> Quantity:
        """Return the FLOPs of the dense layer before the head over the vocabulary."""
        return 2 * count.scored * architecture.hidden * architecture.hidden

    def pooler_flops(self, architecture: Architecture, count: TokenCount) -> Quantity:
        """Return the FLOPs of the pooler of the first token."""
        return 2 * count.sequences * architecture.hidden * architecture.hidden

    def layer(self, layer: Any, config: Any, dtype: Any) -> Any:
        """Return a layer of a transformers model as arithmetic on packed tokens."""
        from pwff_opt.families.bert.layers import BertLayer

        return BertLayer(layer, config, dtype)

    def ends(self, model: Any, pooling: str, **how: Any) -> Any:
        """Return embeddings, pooler and the head's dense layer."""
        from pwff_opt.families.bert.layers import BertEnds

        return BertEnds(model, pooling, **how)

    def head_shapes(self, model: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the classification head's parameters by name."""
        head = getattr(model, self.head)
        return {name: tuple(value.shape) for name, value in head.named_parameters()}

    def pool_by_mean(self, model: Any) -> None:
        """Let a transformers classifier pool by the mean."""
        from pwff_opt.federated.model.adapters import pool_by_mean

        pool_by_mean(model)


FAMILIES.add("bert", Bert())
