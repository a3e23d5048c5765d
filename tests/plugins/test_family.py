"""A family of models from outside the package: RoBERTa, in one folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification

from pwff_opt.data.models import model_source

FAMILY = '''
"""RoBERTa (Liu et al. 2019): BERT whose positions begin behind that of padding."""

from pwff_opt.families.bert import Bert
from pwff_opt.registry import FAMILIES


class Roberta(Bert):
    model_types = ("roberta",)
    poolings = ("mean",)

    def ends(self, model, pooling, **how):
        from roberta.layers import RobertaEnds

        return RobertaEnds(model, pooling, **how)

    def head_shapes(self, model):
        config = model.config
        return {"weight": (config.num_labels, config.hidden_size), "bias": (config.num_labels,)}

    def pool_by_mean(self, model):
        """Do nothing: there is no pooler."""


FAMILIES.add("roberta", Roberta())
'''
LAYERS = """
import torch

from pwff_opt.families.bert.layers import BertEnds


class RobertaEnds(BertEnds):
    def _offset(self):
        return self._base.config.pad_token_id + 1

    def positions(self):
        return super().positions() - self._offset()

    def _embedded(self, packed):
        return self._base.embeddings(
            input_ids=packed.ids[None],
            token_type_ids=torch.zeros_like(packed.ids)[None],
            position_ids=packed.positions[None] + self._offset(),
        )[0]
"""
SAME = """
import numpy as np
import torch
from transformers import RobertaModel

from pwff_opt.federated.model.backbone import NOTHING, Backbone
from pwff_opt.federated.text.tokens import Packed, Tokens

ids = np.array([101, 2023, 2003, 102, 101, 2307, 102])
tokens = Tokens(ids=ids, offsets=np.array([0, 4, 7]), pad_id=0)
own = Backbone("model", family="roberta", classes=2, pooling="mean", max_tokens=24, device="cpu")
packed = Packed.of(tokens, [np.array([0, 1])])
with torch.inference_mode():
    ours = own.run(packed, NOTHING, own.embed(packed))
    model = RobertaModel.from_pretrained("model", add_pooling_layer=False).eval()
    parts = [model(torch.tensor(part[None]))[0][0] for part in (ids[:4], ids[4:])]
torch.testing.assert_close(ours, torch.cat(parts), rtol=1e-5, atol=1e-5)
"""
FRONT = """
from pathlib import Path

from pwff_opt.federated.training.evaluator import FederatedEvaluator
from pwff_opt.front import pareto_front
from pwff_opt.scenario.files import parse_scenario

scenario = parse_scenario(Path("scenario.toml").read_text())
evaluator = FederatedEvaluator(scenario, "checkpoints")
front = pareto_front(scenario, evaluator, trainings=2)
assert len(front.points) > 0
"""

SCENARIO = """
name = "roberta"
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
source = "model"
max_tokens = 24
pooling = "mean"
[data]
train_per_device = 24
validation_per_device = 10
test_per_device = 12
[peft]
adapter_width = 4
[training]
rounds = 2
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


def _save(folder: Path) -> None:
    """Write a small RoBERTa, with MiniLM's tokenizer."""
    AutoTokenizer.from_pretrained(model_source("minilm")).save_pretrained(folder)
    torch.manual_seed(5)
    config = RobertaConfig(
        vocab_size=30522,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=66,
        type_vocab_size=1,
        pad_token_id=0,
        initializer_range=0.3,
    )
    RobertaForSequenceClassification(config).save_pretrained(folder)


def test_a_family_from_outside_trains_a_front(
    tmp_path: Path, run_with_plugin: Callable[..., Any]
) -> None:
    _save(tmp_path / "model")
    plug = {"__init__.py": FAMILY, "layers.py": LAYERS}
    run_with_plugin(SAME, roberta=plug)
    text = SCENARIO.replace('"model"', f'"{tmp_path / "model"}"', 1)
    (tmp_path / "scenario.toml").write_text(text)
    run_with_plugin(FRONT, roberta=plug)
