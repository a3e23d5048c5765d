"""A scenario small enough for tests: real sentences, a real (untrained) BERT of three small layers."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from pwff_opt.data.models import model_source
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.files import parse_scenario

sys.path.insert(0, str(Path(__file__).parent))  # for plain_adapters

SMALL = """
name = "small"
[cell]
bandwidth_hz = 1e6
downlink_bandwidth_hz = 1e6
downlink_power_w = 1
[devices]
count = 3
distance_m = { disc = [50, 300] }
power_max_w = 0.1
frequency_max_hz = { uniform = [1e9, 2e9] }
frequency_min_hz = 1e8
[model]
source = "MODEL"
max_tokens = 24
pooling = "mean"
[data]
train_per_device = 24
validation_per_device = 10
test_per_device = 12
[peft]
adapter_width = 4
[training]
rounds = 3
local_steps = 2
batch_size = 4
learning_rate = 0.01
head_learning_rate = 0.01
[decisions]
ranks = [0, 2, 4]
[search]
population = 4
curve_points = 5
"""


@pytest.fixture(scope="session")
def small_text(small_model: Path) -> str:
    return SMALL.replace("MODEL", str(small_model))


@pytest.fixture(scope="session")
def small(small_text: str) -> Scenario:
    return parse_scenario(small_text)


@pytest.fixture
def llama(small: Scenario, tmp_path: Path) -> Scenario:
    """The same with a decoder, whose tokenizer's padding token its configuration does not know."""
    folder = tmp_path / "llama"
    AutoTokenizer.from_pretrained(model_source("minilm")).save_pretrained(folder)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=30522,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=None,
        bos_token_id=101,
        eos_token_id=102,
        initializer_range=0.2,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return replace(small, model=replace(small.model, source=str(folder), pooling="model"))
