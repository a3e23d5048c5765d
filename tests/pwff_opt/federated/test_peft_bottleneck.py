"""The bottleneck adapter by peft's own functions, against the one of the trainer."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from plain_adapters import attach_adapters
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from pwff_opt.errors import ModelError
from pwff_opt.federated.export.peft_bottleneck import BottleneckConfig, BottleneckLayer
from pwff_opt.federated.model.adapters import transformer_layers

IDS = torch.tensor([[3, 5, 7, 9, 11], [2, 4, 6, 8, 10]])
SIZES = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
    "num_labels": 3,
}


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """Peft warns of what it does not expect."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.fixture(params=["bert", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(1)
    model: Any
    if request.param == "bert":
        model = BertForSequenceClassification(BertConfig(**SIZES))
    else:
        model = LlamaForSequenceClassification(LlamaConfig(**SIZES, pad_token_id=0))
    model.save_pretrained(tmp_path / "base")
    return tmp_path


def base(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder / "base").eval()


def scores(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def randomise(model: Any, part: str, *, seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def test_the_arithmetic_is_the_trainers(folder: Path) -> None:
    model = get_peft_model(base(folder), BottleneckConfig(width=4, layers_to_transform=[0, 2]))
    plain = scores(base(folder))
    torch.testing.assert_close(scores(model), plain)  # new adapters compute the identity
    randomise(model, ".bottleneck_")
    ours = base(folder)
    adapters = attach_adapters(ours, 4)
    adapters[1].enabled = False
    parent, name = transformer_layers(model)
    for layer, adapter in zip(getattr(parent, name), adapters, strict=True):
        if adapter.enabled:
            adapter.down = layer.bottleneck.bottleneck_down["default"]
            adapter.up = layer.bottleneck.bottleneck_up["default"]
        assert hasattr(layer, "bottleneck") == adapter.enabled
    expected = scores(ours.eval())
    assert not torch.allclose(expected, plain, atol=1e-2)
    torch.testing.assert_close(scores(model), expected, rtol=0, atol=0)
    hidden = model(input_ids=IDS, output_hidden_states=True).hidden_states
    reference = ours(input_ids=IDS, output_hidden_states=True).hidden_states
    assert len(hidden) == 4
    for got, wanted in zip(hidden, reference, strict=True):
        torch.testing.assert_close(got, wanted)


def test_saved_and_loaded_by_peft(folder: Path) -> None:
    config = BottleneckConfig(width=4, layers_to_transform=[1], task_type=TaskType.SEQ_CLS)
    model = get_peft_model(base(folder), config)
    randomise(model, ".bottleneck_")
    randomise(model, "modules_to_save")
    model.save_pretrained(folder / "saved")
    stored = load_file(folder / "saved" / "adapter_model.safetensors")
    assert sum(".bottleneck_" in name for name in stored) == 4
    written = json.loads((folder / "saved" / "adapter_config.json").read_text())
    assert (written["peft_type"], written["width"]) == ("BOTTLENECK", 4)
    for cheap in (False, True):
        loaded = PeftModel.from_pretrained(base(folder), folder / "saved", low_cpu_mem_usage=cheap)
        torch.testing.assert_close(scores(loaded.eval()), scores(model), rtol=0, atol=0)
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        with loaded.disable_adapter():
            torch.testing.assert_close(scores(loaded), scores(base(folder)), rtol=0, atol=0)
    status = loaded.get_model_status()
    assert (status.peft_types, status.enabled) == ({"default": "BOTTLENECK"}, True)


def test_only_adapters_and_head_are_trained(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = get_peft_model(base(folder), BottleneckConfig(width=4, task_type=TaskType.SEQ_CLS))
    learned = {name for name, value in model.named_parameters() if value.requires_grad}
    assert all(".bottleneck_" in name or "modules_to_save" in name for name in learned)
    adapters = 3 * (2 * 4 * 16 + 4 + 16)
    head = sum(p.numel() for name, p in model.named_parameters() if "modules_to_save" in name)
    model.print_trainable_parameters()
    assert f"trainable params: {adapters + head} " in capsys.readouterr().out
    model.gradient_checkpointing_enable()
    model.train()
    model(input_ids=IDS, labels=torch.tensor([0, 1])).loss.backward()
    up = [p.grad for name, p in model.named_parameters() if "bottleneck_up" in name]
    assert len(up) == 6
    assert all(grad is not None and grad.abs().sum() > 0 for grad in up)


def test_two_adapters_beside_each_other(folder: Path) -> None:
    model = get_peft_model(base(folder), BottleneckConfig(width=4, layers_to_transform=[0]))
    randomise(model, ".bottleneck_")
    first = scores(model)
    model.add_adapter("second", BottleneckConfig(width=2, layers_to_transform=[0, 2]))
    randomise(model, ".second.", seed=3)
    torch.testing.assert_close(scores(model), first, rtol=0, atol=0)
    model.set_adapter("second")
    second = scores(model)
    assert not torch.allclose(second, first, atol=1e-2)
    model.save_pretrained(folder / "both")
    again = PeftModel.from_pretrained(base(folder), folder / "both")
    again.load_adapter(folder / "both" / "second", "second")
    torch.testing.assert_close(scores(again), first, rtol=0, atol=0)
    again.set_adapter("second")
    torch.testing.assert_close(scores(again), second, rtol=0, atol=0)
    again.set_adapter("default")
    again.delete_adapter("second")
    with pytest.raises(ValueError, match="second"):
        again.set_adapter("second")


def test_unloading_gives_the_model_back_and_merging_is_refused(folder: Path) -> None:
    plain = scores(base(folder))
    model = get_peft_model(base(folder), BottleneckConfig(width=4))
    randomise(model, ".bottleneck_")
    twin = copy.deepcopy(model)
    with pytest.raises(ModelError, match="cannot be merged"):
        model.merge_and_unload()
    with pytest.raises(ModelError, match="cannot be merged"):
        model.merge_adapter()
    adapted = scores(model)
    back = model.unload()
    torch.testing.assert_close(scores(back), plain, rtol=0, atol=0)
    assert not any(isinstance(module, BottleneckLayer) for module in back.modules())
    torch.testing.assert_close(scores(twin), adapted, rtol=0, atol=0)
    torch.testing.assert_close(scores(twin.unload()), plain, rtol=0, atol=0)
    get_peft_model(back, BottleneckConfig(width=2))


def test_lora_comes_before_or_after(folder: Path) -> None:
    """No module changes its name, so a LoRA is loaded into a model with adapters too."""
    names = ["query", "value"] if base(folder).config.model_type == "bert" else ["q_proj", "v_proj"]
    lora = get_peft_model(base(folder), LoraConfig(r=2, target_modules=names))
    randomise(lora, ".lora_")
    lora.save_pretrained(folder / "lora")
    merged = PeftModel.from_pretrained(base(folder), folder / "lora").merge_and_unload()
    model = get_peft_model(merged, BottleneckConfig(width=4))
    randomise(model, ".bottleneck_")
    model.save_pretrained(folder / "bottleneck")
    expected = scores(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns that one model holds adapters of two kinds
        below = PeftModel.from_pretrained(base(folder), folder / "bottleneck").get_base_model()
        both = PeftModel.from_pretrained(below, folder / "lora", adapter_name="lora").eval()
    torch.testing.assert_close(scores(both), expected, rtol=1e-4, atol=1e-4)


def test_a_bfloat16_model_keeps_its_type(folder: Path) -> None:
    model = get_peft_model(base(folder).to(torch.bfloat16), BottleneckConfig(width=4))
    randomise(model, ".bottleneck_")
    assert scores(model).dtype == torch.bfloat16
    adapters = [p for name, p in model.named_parameters() if ".bottleneck_" in name]
    assert all(parameter.dtype == torch.float32 for parameter in adapters)


def test_bad_configurations_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="width must be at least 1, got 0"):
        BottleneckConfig(width=0)
    for layers in ([], [3], [-1]):
        with pytest.raises(ModelError, match=r"layers_to_transform must name .* in 0\.\.2"):
            get_peft_model(base(folder), BottleneckConfig(layers_to_transform=layers))
