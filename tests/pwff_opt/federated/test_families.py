"""Layers as arithmetic on packed tokens against transformers' own, padded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from pwff_opt.data.models import model_source
from pwff_opt.errors import ModelError
from pwff_opt.federated.model.adapters import pool_by_mean
from pwff_opt.federated.model.attention import Window
from pwff_opt.federated.model.backbone import NOTHING, Backbone
from pwff_opt.federated.text.tokens import Packed, Tokens, tokenise

DECODER = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
CONFIGS: dict[str, tuple[str, Any]] = {
    "bert": (
        "bert",
        BertConfig(
            vocab_size=97,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=48,
            initializer_range=0.3,
            hidden_act="relu",
        ),
    ),
    "bert, compiled": (
        "bert",
        BertConfig(
            vocab_size=97,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=48,
            initializer_range=0.3,
        ),
    ),
    "llama": ("llama", LlamaConfig(**DECODER, attention_bias=True)),
    "llama, head_dim": ("llama", LlamaConfig(**DECODER, head_dim=16, rope_theta=500.0)),
    "mistral": ("llama", MistralConfig(**DECODER, sliding_window=64)),
    "qwen2": ("llama", Qwen2Config(**DECODER)),
}


@pytest.fixture
def tokens() -> Tokens:
    rng = np.random.default_rng(1)
    lengths = np.array([5, 17, 1, 9, 17, 3])
    return Tokens(
        ids=rng.integers(1, 97, lengths.sum()),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        pad_id=0,
    )


def padded(tokens: Tokens, batch: np.ndarray[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = tokens.lengths[batch]
    ids = torch.zeros(len(batch), int(lengths.max()), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, i in enumerate(batch):
        ids[row, : lengths[row]] = torch.from_numpy(
            tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]]
        )
        mask[row, : lengths[row]] = 1
    return ids, mask


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch", [[0, 1, 2, 3, 4, 5], [1, 4], [2]])
def test_logits_are_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: Tokens, name: str, batch: list[int]
) -> None:
    family, config = CONFIGS[name]
    torch.manual_seed(2)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():  # biases and norms are born as zeros and ones, and would hide an error
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("pwff_opt.federated.model.backbone.pad_token_id", lambda _: 0)
    backbone = Backbone(
        str(tmp_path), family=family, classes=2, pooling="model", max_tokens=17, device="cpu"
    )
    indices = np.array(batch)
    ids, mask = padded(tokens, indices)
    packed = Packed.of(tokens, [indices])
    with torch.inference_mode():
        expected = model.eval()(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        for layer in range(1, 3):
            ours = backbone.run(packed, NOTHING, backbone.embed(packed), stop=layer)
            theirs = expected.hidden_states[layer].flatten(0, 1)[packed.places]
            assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
        pooled = backbone.ends.pool(backbone.run(packed, NOTHING, backbone.embed(packed)), packed)
        head = model.classifier if family == "bert" else model.score
        torch.testing.assert_close(head(pooled), expected.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 2e-6), ("bfloat16", 0.05)])
def test_minilm_says_what_transformers_says(dtype: str, error: float) -> None:
    from transformers import AutoTokenizer

    source = model_source("minilm")
    texts = ["A short one.", "A sentence that goes on for rather longer than the others do.", "Hm"]
    tokens = tokenise(texts, AutoTokenizer.from_pretrained(source), max_tokens=32, pad_id=0)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=3)
    pool_by_mean(model)
    backbone = Backbone(
        source, family="bert", classes=3, pooling="mean", max_tokens=32, dtype=dtype, device="cpu"
    )
    batch = np.arange(3)
    ids, mask = padded(tokens, batch)
    packed = Packed.of(tokens, [batch])
    with torch.inference_mode():
        expected = model.eval().base_model(input_ids=ids, attention_mask=mask).pooler_output
        hidden = backbone.run(packed, NOTHING, backbone.embed(packed))
        ours = backbone.ends.pool(hidden, packed)
    assert ours.dtype == torch.float32
    assert (ours - expected).norm() <= error * expected.norm()


def test_a_window_of_attention_shorter_than_the_texts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    AutoModelForSequenceClassification.from_config(
        MistralConfig(**DECODER, sliding_window=8)
    ).save_pretrained(tmp_path)
    monkeypatch.setattr("pwff_opt.federated.model.backbone.pad_token_id", lambda _: 0)
    how = {"family": "llama", "classes": 2, "pooling": "model", "max_tokens": 17}
    with pytest.raises(ModelError, match=r"attention window \(8\), unless .*; got 17"):
        Backbone(str(tmp_path), **how)
    with pytest.raises(ModelError, match=r"attention window \(8\), unless .*; got 17"):
        Backbone(str(tmp_path), **how, window=Window(width=9, sinks=0))
    Backbone(str(tmp_path), **how, window=Window(width=8, sinks=0))


def test_more_tokens_than_positions_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BertConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    monkeypatch.setattr("pwff_opt.federated.model.backbone.pad_token_id", lambda _: 0)
    options = {"family": "bert", "classes": 2, "pooling": "model"}
    Backbone(str(tmp_path), max_tokens=16, **options)
    with pytest.raises(ModelError, match=r"max_tokens .* table of positions \(16\), got 17"):
        Backbone(str(tmp_path), max_tokens=17, **options)


def test_packing(tokens: Tokens) -> None:
    packed = Packed.of(tokens, [np.array([1, 0]), np.array([3])])
    x = torch.randn(31, 4)
    there = x[packed.slots].view(3, 17, 4)
    assert torch.equal(there.flatten(0, 1)[packed.places], x)
    assert torch.equal(there[1, 5:], x[17].expand(12, 4))
    assert packed.inside is not None
    assert packed.inside.sum(1).tolist() == [17, 5, 9]
    assert packed.token_counts == (22, 9)
    assert packed.sequence_counts == (2, 1)
    torch.testing.assert_close(packed.mean(x)[1], x[17:22].mean(0))
    assert torch.equal(packed.first(x), x[[0, 17, 22]])
    assert torch.equal(packed.last(x), x[[16, 21, 30]])
    assert Packed.of(tokens, [np.array([1]), np.array([1])]).inside is None
