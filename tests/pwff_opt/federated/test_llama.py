"""A decoder in the trainer: padding, caching and export must not change what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from pwff_opt.decision import Schedule
from pwff_opt.federated.evaluator import FederatedEvaluator
from pwff_opt.federated.export import load_adapters
from pwff_opt.models import model_source
from pwff_opt.scenario import Scenario


@pytest.fixture
def llama(small: Scenario, tmp_path: Path) -> Scenario:
    folder = tmp_path / "llama"
    AutoTokenizer.from_pretrained(model_source("minilm")).save_pretrained(folder)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=30522,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=None,
        bos_token_id=101,
        eos_token_id=102,
        initializer_range=0.2,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return replace(small, model=replace(small.model, source=str(folder), pooling="model"))


def test_padding_and_cache_change_nothing(llama: Scenario, tmp_path: Path) -> None:
    evaluator = FederatedEvaluator(llama, tmp_path / "a", workers=1)
    trainer, backbone = evaluator.trainer, evaluator.backbone
    schedule = Schedule.parse("1x2:fpa", devices=3)
    states, _ = evaluator._trained(schedule)
    lengths = trainer.inputs.tokens.lengths
    short, long = int(lengths.argmin()), int(lengths.argmax())
    outputs = []
    for resume in (True, False):
        first = backbone.configure(2, (False, True, True), (False,) * 3, resume=resume)
        backbone.load(states[0])
        with torch.inference_mode():
            alone = backbone.logits(*trainer.inputs.batch(np.array([short]), first))
            beside = backbone.logits(*trainer.inputs.batch(np.array([short, long]), first))
        torch.testing.assert_close(alone[0], beside[0], atol=1e-5, rtol=1e-5)
        outputs.append(beside)
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(outputs[0][0], outputs[0][1], atol=1e-3)


@pytest.mark.parametrize("text", ["3x4:fap", "3x0:fff"])
def test_a_saved_decoder_scores_what_was_reported(
    llama: Scenario, tmp_path: Path, text: str
) -> None:
    evaluator = FederatedEvaluator(llama, tmp_path / "a")
    schedule = Schedule.parse(text, devices=3)
    reported = evaluator.test(schedule)
    tokens, tokenizer = evaluator.tokens, AutoTokenizer.from_pretrained(llama.model.source)
    for device, shard in enumerate(evaluator.shards):
        folder = tmp_path / f"device{device}"
        evaluator.save_device(schedule, device, folder)
        model = AutoModelForSequenceClassification.from_pretrained(
            llama.model.source, num_labels=3, ignore_mismatched_sizes=True
        )
        load_adapters(model, folder)
        model = PeftModel.from_pretrained(model, folder).eval()
        ids = [tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]].tolist() for i in shard.test]
        batch = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
        with torch.inference_mode():
            right = model(**batch).logits.argmax(-1) == torch.from_numpy(
                evaluator.labels[shard.test]
            )
        assert right.double().mean().item() == pytest.approx(reported[device])
