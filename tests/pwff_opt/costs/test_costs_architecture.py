"""Sizes read from configurations: parameter counts of real models, and messages for bad ones."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from pwff_opt.costs import Architecture, Blocks, head_parameters
from pwff_opt.errors import ModelError, PwffError

NAMES = [
    "minilm",
    "minilm_mean",
    "llama",
    "llama_equal_heads",
    "llama_one_key_head",
    "llama_bias",
    "mistral",
    "qwen2",
    "llama_language",
    "llama_language_tied",
    "mistral_language",
    "qwen2_language",
    "bert_language",
    "bert_language_untied",
]


def frozen_count(model: torch.nn.Module) -> int:
    names = ("classifier.", "score.")
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(names))


@pytest.mark.parametrize("name", NAMES)
def test_parameters_equal_the_real_count(subject, name):
    case = subject(name)
    assert case.architecture.parameters() == frozen_count(case.model)


@pytest.mark.parametrize("config", [BertConfig(), LlamaConfig(), Qwen2Config()])
def test_parameters_equal_the_real_count_at_full_size(config):
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    architecture = Architecture.from_config(json.loads(config.to_json_string()), classes=2)
    assert architecture.parameters() == frozen_count(model)


@pytest.mark.parametrize("tied", [None, False, True])
@pytest.mark.parametrize("kind", [BertConfig, LlamaConfig, MistralConfig, Qwen2Config])
def test_language_models_have_the_real_count_at_full_size(kind, tied):
    config = kind() if tied is None else kind(tie_word_embeddings=tied)
    with torch.device("meta"):
        model = (AutoModelForMaskedLM if kind is BertConfig else AutoModelForCausalLM).from_config(
            config
        )
    model.tie_weights()
    given = config.to_dict()
    if tied is None:
        del given["tie_word_embeddings"]
    architecture = Architecture.from_config(given, classes=None)
    assert architecture.tied == (kind is BertConfig if tied is None else tied)
    assert architecture.classes == architecture.vocabulary
    assert architecture.parameters() == sum(p.numel() for p in model.parameters())
    assert head_parameters(architecture) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": "regression"}, "head must be 'classifier' or 'language', got 'regression'"),
        ({"classes": 7}, r"classes must be the vocabulary \(101\) for head 'language', got 7"),
    ],
)
def test_heads_that_do_not_fit_are_refused(subject, change, message):
    with pytest.raises(ModelError, match=message):
        replace(subject("llama_language").architecture, **change)


def test_absent_optional_keys_take_hugging_face_defaults():
    config = LlamaConfig().to_dict()
    for key in ("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias"):
        del config[key]
    assert Architecture.from_config(config, classes=2) == Architecture.from_config(
        LlamaConfig().to_dict(), classes=2
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "config.model_type must be one of bert, llama.*got 'gpt2'"),
        ({"model_type": None}, "config.model_type must be one of .*got None"),
        ({"hidden_size": None}, "config.hidden_size must be an integer of at least 1, got None"),
        ({"hidden_size": 2.5}, "config.hidden_size must be an integer of at least 1, got 2.5"),
        ({"num_hidden_layers": 0}, "config.num_hidden_layers must be .*at least 1, got 0"),
        ({"vocab_size": True}, "config.vocab_size must be .*got True"),
        ({"hidden_size": 385}, "config.hidden_size must be a multiple .*12.*got 385"),
        ({"is_decoder": True}, "config.is_decoder must be false in an encoder, got True"),
    ],
)
def test_bad_configuration_names_key_rule_and_value(subject, change, message):
    with pytest.raises(ModelError, match=message):
        Architecture.from_config(subject("minilm").config | change, classes=3)


def test_key_value_heads_must_be_given_where_the_default_is_a_number(subject):
    config = {k: v for k, v in subject("qwen2").config.items() if k != "num_key_value_heads"}
    with pytest.raises(ModelError, match=r"config\.num_key_value_heads must be given for qwen2"):
        Architecture.from_config(config, classes=3)


def test_key_value_heads_must_divide_heads(subject):
    with pytest.raises(
        ModelError, match=r"heads must be a multiple of key_value_heads \(3\), got 4"
    ):
        Architecture.from_config(subject("llama").config | {"num_key_value_heads": 3}, classes=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter_width": -1}, "adapter_width must be an integer of at least 0, got -1"),
        ({"common_rank": 1.5}, "common_rank must be an integer of at least 0, got 1.5"),
        ({"round": True}, "round must be an integer of at least 0, got True"),
        ({"lora_rule": "mean"}, "lora_rule must be one of fedex, fedit, .*, got 'mean'"),
        ({"upload_dtype": "int4"}, "upload_dtype must be one of float32, .*, got 'int4'"),
    ],
)
def test_bad_blocks_are_refused(change, message):
    with pytest.raises(PwffError, match=message):
        Blocks(**({"adapter_width": 4} | change))


def test_costs_import_neither_torch_nor_transformers():
    code = "import sys, pwff_opt.costs; print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
