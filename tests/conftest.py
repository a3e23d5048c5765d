"""A real (untrained) BERT of three small layers, with MiniLM's tokenizer: tests take seconds with it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from pwff_opt.data.models import model_source
from pwff_opt.federated.model import backbone

sys.path.insert(0, str(Path(__file__).parent))  # for elsewhere


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", help="where models compute: cuda, say, or 'elsewhere' (elsewhere.py)"
    )


def pytest_configure(config: pytest.Config) -> None:
    device = config.getoption("--device")
    if device is None:  # a GPU is not asked for, nor by a process that a test starts
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        device = "cpu"
    if device == "elsewhere":
        from elsewhere import install

        install()
    backbone.default_device = lambda: str(device)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") is None:
        return
    reason = "puts what goes through the model together on the CPU, by hand"
    for item in items:
        if item.get_closest_marker("on_cpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    AutoTokenizer.from_pretrained(model_source("minilm")).save_pretrained(folder)
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder
