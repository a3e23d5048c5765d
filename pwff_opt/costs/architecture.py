"""The sizes of a frozen language model that its costs depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pwff_opt.errors import ModelError

Family = Literal["bert", "llama"]
Pooling = Literal["model", "mean"]
Head = Literal["classifier", "language"]

_FAMILIES: Mapping[str, Family] = {
    "bert": "bert",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
}

_POSITIVE: tuple[str, ...] = (
    "layers",
    "hidden",
    "heads",
    "key_value_heads",
    "head_dim",
    "intermediate",
)
_POSITIVE += ("vocabulary", "classes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    r"""Sizes of a Hugging Face model of the BERT or the Llama family: classifier or language model.

    Symbols used by every formula of :mod:`pwff_opt.costs`: :math:`L` layers, :math:`h` hidden
    width, :math:`a` = heads x head_dim (query width), :math:`k` = key_value_heads x head_dim,
    :math:`i` intermediate width of the MLP, :math:`c` classes, :math:`V` vocabulary.

    Parameters
    ----------
    family
        ``"bert"``: learned positions, LayerNorm after each residual, plain MLP, pooler, head with
        bias. ``"llama"``: rotary positions, RMSNorm before each block, gated MLP, head without
        bias.
    layers, hidden, heads, key_value_heads, head_dim, intermediate, vocabulary
        As in the configuration of the model, counts.
    positions, token_types
        Rows of the learned position and token type tables; 0 where there is no table.
    qkv_bias, output_bias, mlp_bias
        Whether the query, key and value, the attention output, and the MLP projections have biases.
    head
        ``"classifier"``: a classification head, trained and not part of the frozen model.
        ``"language"``: the head over the vocabulary, frozen with the model: of the llama family it says
        the next token, without bias; of the bert family a masked one, after a dense layer and a norm,
        with bias.
    classes
        Outputs of the head; for a language head the vocabulary.
    tied
        Whether the matrix of a language head is that of the token embeddings.
    pooling
        What the head sees. ``"model"``: BERT's pooler of the first token, Llama's last token.
        ``"mean"``: the mean of the tokens, in the place of BERT's pooler.

    Raises
    ------
    ModelError
        A size is not a positive integer, the family is unknown, the query heads do not divide into
        the key and value heads, or head and classes do not fit.
    """

    family: Family
    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    positions: int = 0
    token_types: int = 0
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head: Head = "classifier"
    classes: int = 2
    tied: bool = False
    pooling: Pooling = "model"

    def __post_init__(self) -> None:
        if self.family not in ("bert", "llama"):
            raise ModelError(f"family must be 'bert' or 'llama', got {self.family!r}")
        if self.pooling not in ("model", "mean"):
            raise ModelError(f"pooling must be 'model' or 'mean', got {self.pooling!r}")
        if self.pooling == "mean" and self.family != "bert":
            raise ModelError(
                f"pooling 'mean' needs a model of the bert family, got {self.family!r}"
            )
        if self.head not in ("classifier", "language"):
            raise ModelError(f"head must be 'classifier' or 'language', got {self.head!r}")
        if self.head == "language" and self.classes != self.vocabulary:
            raise ModelError(
                f"classes must be the vocabulary ({self.vocabulary}) for head 'language', "
                f"got {self.classes!r}"
            )
        for name in _POSITIVE:
            _integer(name, getattr(self, name), least=1)
        for name in ("positions", "token_types"):
            _integer(name, getattr(self, name), least=0)
        if self.heads % self.key_value_heads:
            raise ModelError(
                f"heads must be a multiple of key_value_heads ({self.key_value_heads}), "
                f"got {self.heads}"
            )
        if self.family == "bert" and self.hidden != self.heads * self.head_dim:
            raise ModelError(
                f"hidden must be heads x head_dim ({self.heads} x {self.head_dim}) "
                f"in the bert family, got {self.hidden}"
            )

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        classes: int | None,
        pooling: Pooling = "model",
    ) -> Architecture:
        """Read the sizes from the contents of a Hugging Face ``config.json``.

        Parameters
        ----------
        config
            The JSON object; ``model_type`` is one of bert, llama, mistral, qwen2.
        classes
            Outputs of the classification head; configurations of base models do not say it. None:
            the head is the model's own language head.
        pooling
            "model" or "mean", as the field.

        Raises
        ------
        ModelError
            A key is missing, or its value is one that the cost model does not know; the message
            names the key, the rule and the value.

        Examples
        --------
        >>> config = dict(model_type="llama", vocab_size=100, hidden_size=64, num_hidden_layers=2,
        ...               num_attention_heads=4, num_key_value_heads=2, intermediate_size=128)
        >>> Architecture.from_config(config, classes=3).key_value_width
        32
        """
        model_type = config.get("model_type")
        family = _FAMILIES.get(str(model_type))
        if family is None:
            raise ModelError(
                f"config.model_type must be one of {', '.join(_FAMILIES)}, got {model_type!r}"
            )
        for key in ("is_decoder", "add_cross_attention"):
            if family == "bert" and config.get(key):
                raise ModelError(f"config.{key} must be false in an encoder, got {config[key]!r}")
        hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
        if config.get("head_dim") is None and hidden % heads:
            raise ModelError(
                f"config.hidden_size must be a multiple of num_attention_heads ({heads}), "
                f"got {hidden}"
            )
        bias = _biases(str(model_type), config)
        language = classes is None
        return cls(
            family=family,
            layers=_size(config, "num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            key_value_heads=_key_value_heads(str(model_type), config, heads),
            head_dim=hidden // heads
            if family == "bert"
            else _size(config, "head_dim", hidden // heads),
            intermediate=_size(config, "intermediate_size"),
            vocabulary=_size(config, "vocab_size"),
            positions=_size(config, "max_position_embeddings") if family == "bert" else 0,
            token_types=_size(config, "type_vocab_size", 2) if family == "bert" else 0,
            qkv_bias=bias[0],
            output_bias=bias[1],
            mlp_bias=bias[2],
            head="language" if language else "classifier",
            classes=_size(config, "vocab_size") if classes is None else classes,
            # Absent means untied for llama, mistral and qwen2 alike.
            tied=language and bool(config.get("tie_word_embeddings", family == "bert")),
            pooling=pooling,
        )

    @property
    def query_width(self) -> int:
        """Width a of the query projection, heads x head_dim."""
        return self.heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        """Width k of the key and of the value projection, key_value_heads x head_dim."""
        return self.key_value_heads * self.head_dim

    def parameters(self) -> int:
        r"""Return the number of parameters of the frozen model, without a classification head.

        .. math::
            \text{BERT: } (V+P+Y)h + 2h + L\,[\,2ha + 2hk + 2hi + 4h + \text{biases}\,] + h^2 + h

        .. math::
            \text{Llama: } Vh + L\,[\,2ha + 2hk + 3hi + 2h + \text{biases}\,] + h + \lambda Vh

        ``V``: vocabulary; ``P``: positions; ``Y``: token types; the last :math:`h^2 + h` is BERT's
        pooler (none with mean pooling), the last :math:`h` Llama's final norm; :math:`\lambda`: an
        untied language head. BERT's language head has :math:`h^2 + 3h + V + \lambda V(h + 1)` in the place
        of the pooler (untied, one bias of two is not used). Equal to the count of the real model.
        """
        h, a, k, i = self.hidden, self.query_width, self.key_value_width, self.intermediate
        language = self.head == "language"
        untied = language and not self.tied
        attention = 2 * h * (a + k) + self.qkv_bias * (a + 2 * k) + self.output_bias * h
        if self.family == "bert":
            mlp = 2 * h * i + self.mlp_bias * (i + h)
            embeddings = (self.vocabulary + self.positions + self.token_types) * h + 2 * h
            top = h * h + h if language or self.pooling == "model" else 0
            top += language * (2 * h + self.vocabulary) + untied * self.vocabulary * (h + 1)
            return embeddings + self.layers * (attention + mlp + 4 * h) + top
        mlp = 3 * h * i + self.mlp_bias * (2 * i + h)
        return (
            self.vocabulary * h
            + self.layers * (attention + mlp + 2 * h)
            + h
            + untied * self.vocabulary * h
        )


def _integer(name: str, value: Any, *, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ModelError(f"{name} must be an integer of at least {least}, got {value!r}")
    return value


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    return _integer(f"config.{key}", default if value is None else value, least=1)


def _key_value_heads(model_type: str, config: Mapping[str, Any], heads: int) -> int:
    if model_type == "bert":
        return heads
    # Only for llama does an absent key mean "as many as query heads"; others default to a number.
    if model_type != "llama" and "num_key_value_heads" not in config:
        raise ModelError(f"config.num_key_value_heads must be given for {model_type}, got nothing")
    return _size(config, "num_key_value_heads", heads)


def _biases(model_type: str, config: Mapping[str, Any]) -> tuple[bool, bool, bool]:
    """Return whether qkv, attention output and MLP projections have biases."""
    if model_type == "bert":
        return True, True, True
    if model_type == "llama":
        attention = bool(config.get("attention_bias", False))
        return attention, attention, bool(config.get("mlp_bias", False))
    return model_type == "qwen2", False, False
