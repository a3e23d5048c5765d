"""Sparse attention in transformers' own models, as saved device models need it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

from pwff_opt.federated.model.attention import Window

NAME = "pwff_window"


def attend_within(model: Any, window: Window) -> None:
    """Let a model of transformers attend as :class:`Window` says, in generation too.

    Sequences must begin at their first token: padding comes last, or what all see is padding.
    """
    model.config.pwff_window = (window.width, window.sinks)
    model.set_attn_implementation(NAME)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **how: Any,
) -> Any:
    """Eager attention with the window in its mask; what is asked are the last of the known tokens."""
    width, sinks = module.config.pwff_window
    known, asked = key.shape[2], query.shape[2]
    places = torch.arange(known, device=query.device)
    far = Window(width=width, sinks=sinks).bars(places[known - asked :, None], places)
    bias = torch.zeros(far.shape, dtype=query.dtype, device=query.device)
    bias = bias.masked_fill(far, torch.finfo(query.dtype).min)
    mask = bias if attention_mask is None else torch.minimum(attention_mask, bias)
    return eager_attention_forward(_Groups(module), query, key, value, mask, **how)


class _Groups:
    """What eager attention asks of a layer; encoders do not say that their heads share nothing."""

    def __init__(self, module: Any) -> None:
        self.num_key_value_groups = getattr(module, "num_key_value_groups", 1)
        self.training = module.training


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)
