"""A saved device model, loaded by plain transformers and peft, scores what was reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pwff_opt.decision import Schedule
from pwff_opt.errors import DataError, ModelError
from pwff_opt.federated.data import load_corpus
from pwff_opt.federated.evaluator import FederatedEvaluator
from pwff_opt.federated.export import load_adapters, load_device_model
from pwff_opt.federated.partition import partition
from pwff_opt.scenario import Scenario


@pytest.mark.parametrize("text", ["3x4:fap", "3x0:paf", "3x0:fff", "1x2:ffa 2x4:paa"])
@pytest.mark.parametrize("pooling", ["mean", "model"])
def test_loads_with_plain_transformers_and_peft(
    small: Scenario, tmp_path: Path, text: str, pooling: Any
) -> None:
    scenario = replace(small, model=replace(small.model, pooling=pooling))
    evaluator = FederatedEvaluator(scenario, tmp_path / "checkpoints")
    schedule = Schedule.parse(text, devices=3)
    reported = evaluator.test(schedule)
    # The device's sentences, found again without the evaluator.
    corpus = load_corpus(scenario.data, folder=Path())
    shards = partition(corpus, scenario.data, devices=3, seed=scenario.seeds.data)
    tokenizer = AutoTokenizer.from_pretrained(scenario.model.source)
    for device in range(3):
        folder = tmp_path / f"device{device}"
        evaluator.save_device(schedule, device, folder)
        assert (folder / "adapter_model.safetensors").is_file()
        assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
        model = AutoModelForSequenceClassification.from_pretrained(
            scenario.model.source, num_labels=3, ignore_mismatched_sizes=True
        )
        load_adapters(model, folder)
        model = PeftModel.from_pretrained(model, folder).eval()
        test = shards[device].test
        batch = tokenizer(
            [corpus.texts[i] for i in test],
            truncation=True,
            max_length=scenario.model.max_tokens,
            padding=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            logits = model(**batch).logits
            ours = load_device_model(folder)(**batch).logits
        torch.testing.assert_close(logits, ours)
        right = (logits.argmax(-1) == torch.from_numpy(corpus.labels[test])).double().mean()
        assert right.item() == pytest.approx(reported[device])
        if any(decision.trained != (False,) * 3 for decision in schedule.rounds):
            with model.disable_adapter(), torch.inference_mode():
                base = model(**batch).logits
            assert not torch.allclose(base, logits, atol=1e-4)


def test_bad_requests_are_refused(small: Scenario, tmp_path: Path) -> None:
    evaluator = FederatedEvaluator(small, tmp_path)
    with pytest.raises(DataError, match=r"device must be in 0\.\.2, got 3"):
        evaluator.save_device(Schedule.parse("1x0:fff", devices=3), 3, tmp_path / "x")
    with pytest.raises(ModelError, match="must hold a device model"):
        load_device_model(tmp_path / "none")
    lost = replace(small, model=replace(small.model, source=str(tmp_path / "no-model")))
    with pytest.raises(ModelError, match="no-model"):
        FederatedEvaluator(lost, tmp_path)
