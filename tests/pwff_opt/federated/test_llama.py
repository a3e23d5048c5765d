"""A decoder in the trainer: padding, caching and export must not change what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pwff_opt.federated.export.export import load_device_model
from pwff_opt.federated.model.backbone import Stack
from pwff_opt.federated.model.features import Level, below
from pwff_opt.federated.text.tokens import Packed
from pwff_opt.federated.training.evaluator import FederatedEvaluator
from pwff_opt.scenario import Scenario
from pwff_opt.scenario.schedule import Schedule


@pytest.mark.on_cpu
def test_packing_and_cache_change_nothing(llama: Scenario, tmp_path: Path) -> None:
    """Against the same model by transformers, padded, with its weights merged by hand."""
    evaluator = FederatedEvaluator(llama, tmp_path / "a", workers=1)
    trainer, backbone, tokens = (
        evaluator.trainer,
        evaluator.material.backbone,
        evaluator.material.stage.tokens,
    )
    (decision,) = Schedule.parse("1x2:fpa", devices=3).rounds
    state, _ = trainer.round(trainer.initial(), 0, decision, (False, True, True))
    evaluator.save_device(Schedule.parse("1x2:fpa", devices=3), 0, tmp_path / "device")
    plain = load_device_model(tmp_path / "device")
    shard = evaluator.material.shards[0].train
    short = shard[tokens.lengths[shard].argmin()]
    long = shard[tokens.lengths[shard].argmax()]
    batch = np.array([short, long])
    ids = torch.full((2, int(tokens.lengths[long])), tokens.pad_id)
    for row, i in enumerate(batch):
        ids[row, : tokens.lengths[i]] = torch.from_numpy(
            tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]]
        )
    mask = (torch.arange(ids.shape[1]) < torch.from_numpy(tokens.lengths[batch])[:, None]).long()
    stack = Stack([state.devices[0]], [llama.peft.lora_scale])
    with torch.inference_mode():
        expected = plain(input_ids=ids, attention_mask=mask).logits
        packed = Packed.of(tokens, [batch])
        from_below = backbone.logits(packed, stack, backbone.embed(packed))
        known = below(state.devices[0], Level(1))
        start = trainer.features.start(Level(1), [0], [batch], [known], [2.0], 1.0)
        from_cache = backbone.logits(packed, stack, start)
        alone = Packed.of(tokens, [batch[:1]])
        by_itself = backbone.logits(alone, stack, backbone.embed(alone))
    torch.testing.assert_close(from_below, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(from_cache, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(by_itself, expected[:1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)


@pytest.mark.parametrize("text", ["3x4:fap", "3x0:fff"])
def test_a_saved_decoder_scores_what_was_reported(
    llama: Scenario, tmp_path: Path, text: str
) -> None:
    evaluator = FederatedEvaluator(llama, tmp_path / "a")
    schedule = Schedule.parse(text, devices=3)
    reported = evaluator.test(schedule)
    tokens, tokenizer = (
        evaluator.material.stage.tokens,
        AutoTokenizer.from_pretrained(llama.model.source),
    )
    for device, shard in enumerate(evaluator.material.shards):
        folder = tmp_path / f"device{device}"
        evaluator.save_device(schedule, device, folder)
        model = AutoModelForSequenceClassification.from_pretrained(
            llama.model.source, num_labels=3, ignore_mismatched_sizes=True
        )
        model.config.pad_token_id = evaluator.material.stage.tokens.pad_id
        model = PeftModel.from_pretrained(model, folder / "lora").merge_and_unload()
        model = PeftModel.from_pretrained(model, folder / "bottleneck").eval()
        ids = [tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]].tolist() for i in shard.test]
        batch = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
        with torch.inference_mode():
            right = model(**batch).logits.argmax(-1) == torch.from_numpy(
                evaluator.material.labels[shard.test]
            )
        assert right.double().mean().item() == pytest.approx(reported[device])
