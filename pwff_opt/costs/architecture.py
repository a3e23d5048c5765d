"""The sizes of a frozen language model that its costs depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pwff_opt.errors import ModelError
from pwff_opt.registry import FAMILIES

Pooling = Literal["model", "mean"]
Head = Literal["classifier", "language"]

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
    r"""Sizes of a Hugging Face model of a known family: classifier or language model.

    Symbols used by every formula of :mod:`pwff_opt.costs`: :math:`L` layers, :math:`h` hidden
    width, :math:`a` = heads x head_dim (query width), :math:`k` = key_value_heads x head_dim,
    :math:`i` intermediate width of the MLP, :math:`c` classes, :math:`V` vocabulary.

    Parameters
    ----------
    family
        Name of a family (:data:`pwff_opt.registry.FAMILIES`), which knows the rest.
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

    family: str
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
        if self.family not in FAMILIES:
            known = " or ".join(map(repr, FAMILIES))
            raise ModelError(f"family must be {known}, got {self.family!r}")
        if self.pooling not in ("model", "mean"):
            raise ModelError(f"pooling must be 'model' or 'mean', got {self.pooling!r}")
        if self.pooling not in self.facts.poolings:
            able = " or ".join(n for n, own in FAMILIES.items() if self.pooling in own.poolings)
            raise ModelError(
                f"pooling {self.pooling!r} needs a model of the {able} family, got {self.family!r}"
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
        self.facts.check(self)

    @property
    def facts(self) -> Any:
        """What the model's family knows of itself (``pwff_opt.families``)."""
        return FAMILIES[self.family]

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
            The JSON object; ``model_type`` is one that a family reads: bert, llama, mistral, qwen2.
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
        name = family_of(config)
        family: Any = FAMILIES[name]
        family.check_config(config)
        hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
        if config.get("head_dim") is None and hidden % heads:
            raise ModelError(
                f"config.hidden_size must be a multiple of num_attention_heads ({heads}), "
                f"got {hidden}"
            )
        language = classes is None
        return cls(
            family=name,
            layers=size(config, "num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            intermediate=size(config, "intermediate_size"),
            vocabulary=size(config, "vocab_size"),
            **family.sizes(config, hidden, heads),
            head="language" if language else "classifier",
            classes=size(config, "vocab_size") if classes is None else classes,
            tied=language and bool(config.get("tie_word_embeddings", family.tied)),
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
        found: int = self.facts.parameters(self)
        return found


def family_of(config: Mapping[str, Any]) -> str:
    """Return the name of the family that reads models of a configuration's ``model_type``.

    Raises
    ------
    ModelError
        No family does.
    """
    model_type = config.get("model_type")
    for name, family in FAMILIES.items():
        if model_type in family.model_types:
            return name
    known = sorted(kind for family in FAMILIES.values() for kind in family.model_types)
    raise ModelError(f"config.model_type must be one of {', '.join(known)}, got {model_type!r}")


def _integer(name: str, value: Any, *, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ModelError(f"{name} must be an integer of at least {least}, got {value!r}")
    return value


def size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return a size of a configuration, a positive integer; refuse any other value."""
    value = config.get(key)
    return _integer(f"config.{key}", default if value is None else value, least=1)
