"""The bottleneck adapter, pooling by the mean, and where a model keeps its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pwff_opt.errors import ModelError


class BottleneckAdapter(nn.Module):
    r"""A bottleneck adapter at the output of a transformer layer.

    .. math:: y = x + W_u\,\mathrm{gelu}(W_d x + b_d) + b_u

    ``x``: [..., hidden]; ``W_d``: [width, hidden]; ``W_u``: [hidden, width]. ``W_u`` and ``b_u`` start
    at zero, so a fresh adapter is the identity. Source: Houlsby et al., "Parameter-Efficient Transfer
    Learning for NLP", ICML 2019, figure 2; one adapter a layer, as Pfeiffer et al. 2021 found enough.
    """

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, width)
        self.up = nn.Linear(width, hidden)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.up(nn.functional.gelu(self.down(x)))
        return y


class MeanPooling(nn.Module):
    r"""What the head sees: the mean over a sequence's tokens, normalised.

    .. math:: y = \mathrm{norm}\Big(\frac{1}{S} \sum_{t \le S} h_t\Big)

    ``h``: [sequence, token, hidden]; padding is left out; norm is LayerNorm without parameters, so that
    the head's inputs have unit variance. Sentence encoders are trained to put their meaning into the mean
    (Reimers and Gurevych, EMNLP 2019); BERT's own pooler reads the first token.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mask: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        mask = (
            hidden.new_ones(hidden.shape[:2]) if self.mask is None else self.mask.to(hidden.dtype)
        )
        mean = torch.bmm((mask / mask.sum(1, keepdim=True)).unsqueeze(1), hidden).squeeze(1)
        return nn.functional.layer_norm(mean, mean.shape[-1:])


def pool_by_mean(model: Any) -> None:
    """Put :class:`MeanPooling` in the place of the pooler of a BERT-like classifier."""
    if not isinstance(getattr(model.base_model, "pooler", None), nn.Module):
        raise ModelError(f"mean pooling needs a model with a pooler, got {type(model).__name__}")
    model.base_model.pooler = MeanPooling()
    model.base_model.register_forward_pre_hook(_keep_mask, with_kwargs=True)


def _keep_mask(base: Any, _args: Any, kwargs: dict[str, Any]) -> None:
    base.pooler.mask = kwargs.get("attention_mask")


def transformer_layers(model: Any) -> tuple[nn.Module, str]:
    """Return the module that owns the stack of transformer layers and the attribute that holds it.

    It is the only ``ModuleList`` with ``config.num_hidden_layers`` entries, whatever the family.
    """
    count = model.config.num_hidden_layers
    found = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    if len(found) != 1:
        raise ModelError(
            f"model must hold exactly one list of {count} transformer layers "
            f"(config.num_hidden_layers), found {len(found)} in {type(model).__name__}"
        )
    return found[0]
