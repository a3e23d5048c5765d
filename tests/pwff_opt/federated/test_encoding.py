"""Prompts and answers as tokens: where the answer begins, and what is cut."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pwff_opt.data.models import model_source
from pwff_opt.errors import DataError, ModelError
from pwff_opt.federated.text.encoding import Encoded, encode_answers, encode_prompts, encode_texts

CHAT = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    + CHAT
)


@pytest.fixture(scope="module")
def plain() -> Any:
    return AutoTokenizer.from_pretrained(model_source("minilm"))


@pytest.fixture
def chat() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(model_source("minilm"))
    tokenizer.chat_template = CHAT
    return tokenizer


def _rows(encoded: Encoded) -> list[list[int]]:
    ends = encoded.tokens.offsets
    return [encoded.tokens.ids[a:b].tolist() for a, b in pairwise(ends)]


def _answers(tokenizer: Any, prompts: list[str], answers: list[str], **options: Any) -> Encoded:
    settings = {"system_prompt": "", "max_tokens": 64, "pad_id": 0} | options
    return encode_answers(prompts, answers, tokenizer, **settings)


def _parts(encoded: Encoded, tokenizer: Any, row: int = 0) -> tuple[str, str]:
    ids, start = _rows(encoded)[row], encoded.answer_start[row]
    return tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])


def test_a_prompt_is_what_the_template_says(chat: Any) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why me ?"}]
    expected = chat.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    encoded = _answers(chat, ["why me ?"], ["so it is"], system_prompt="be brief")
    start = encoded.answer_start[0]
    assert _rows(encoded)[0][:start] == expected
    assert _parts(encoded, chat)[1] == "so it is [SEP]"
    assert (encoded.prompts_cut, encoded.answers_cut) == (0, 0)
    alone = encode_prompts(["why me ?"], chat, system_prompt="be brief", max_tokens=64, pad_id=0)
    assert _rows(alone) == [expected]
    assert alone.answer_start.tolist() == [len(expected)]


def test_without_a_template_a_message_is_a_line(plain: Any) -> None:
    encoded = _answers(plain, ["why me ?"], ["so it is"], system_prompt="be brief")
    assert _parts(encoded, plain) == ("[CLS] be brief why me?", "so it is [SEP]")
    encoded = _answers(plain, ["why me ?"], ["so it is"])
    assert _parts(encoded, plain) == ("[CLS] why me?", "so it is [SEP]")


def test_messages_lose_their_beginning_and_the_template_stays(chat: Any) -> None:
    frame = len(_rows(_answers(chat, ["a"], ["b"]))[0]) - 3
    message = " ".join(f"{c} {c}" for c in "abcdefghijklmnopqrst")  # 40 tokens
    encoded = _answers(chat, [message], ["so it is"], max_tokens=frame + 24)
    given, said = _parts(encoded, chat)
    assert said == "so it is [SEP]"
    assert "[ system ] [SEP] [ user ] k k l l" in given
    assert given.endswith("t t [SEP] [ assistant ]")
    assert len(encoded.tokens.ids) == frame + 24
    assert (encoded.prompts_cut, encoded.answers_cut) == (1, 0)


def test_a_prompt_keeps_half_then_answers_lose_their_end(plain: Any) -> None:
    message, answer = " ".join("abcdefghijklmnop"), " ".join("qrstuvwxyzabcdef")  # 16 tokens each
    encoded = _answers(plain, [message], [answer], max_tokens=21)
    assert _parts(encoded, plain) == ("[CLS] " + " ".join("ghijklmnop"), " ".join("qrstuvwxyz"))
    assert (encoded.prompts_cut, encoded.answers_cut) == (1, 1)
    short = _answers(plain, ["a b"], [answer], max_tokens=12)  # a short prompt leaves its room
    assert _parts(short, plain) == ("[CLS] a b", " ".join("qrstuvwxy"))
    assert (short.prompts_cut, short.answers_cut) == (0, 1)


def test_answers_of_a_pair_answer_the_same(plain: Any) -> None:
    message = " ".join("abcdefghijklmnop")
    for answers in (["no", " ".join("qrstuvw")], [" ".join("qrstuvw"), "no"]):
        pair = _answers(plain, [message, message], answers, max_tokens=18)
        assert [_parts(pair, plain, row)[0] for row in (0, 1)] == ["[CLS] h i j k l m n o p"] * 2
    alone = _answers(plain, [message], ["no"], max_tokens=18)
    assert _parts(alone, plain)[0].startswith("[CLS] b c")


def test_nothing_is_lost_uncounted(plain: Any) -> None:
    texts = ["a b c", " ".join("abcdefghij"), "d"]
    encoded = encode_texts(texts, plain, max_tokens=6, pad_id=0)
    assert encoded.tokens.lengths.tolist() == [5, 6, 3]
    assert encoded.answer_start.tolist() == [1, 1, 1]
    assert encoded.answers_cut == 1
    assert plain.decode(_rows(encoded)[1]) == "[CLS] a b c d e"
    prompts = encode_prompts(texts, plain, system_prompt="", max_tokens=6, pad_id=0)
    assert prompts.prompts_cut == 1
    assert plain.decode(_rows(prompts)[1]) == "[CLS] f g h i j"


def test_no_room_is_said(chat: Any) -> None:
    with pytest.raises(
        DataError, match=r"model\.max_tokens must leave a prompt more than the 11 tokens"
    ):
        _answers(chat, ["a b c d"], ["so it is"], max_tokens=14)


def test_templates_without_a_system(chat: Any) -> None:
    chat.chat_template = NO_SYSTEM
    encoded = _answers(chat, ["why?"], ["so"])
    assert _parts(encoded, chat)[0] == "[ user ] why? [SEP] [ assistant ]"
    with pytest.raises(ModelError, match=r"model\.system_prompt .*got 'be brief': no system here"):
        _answers(chat, ["why?"], ["so"], system_prompt="be brief")


def test_a_turn_must_have_an_end(chat: Any) -> None:
    chat.eos_token = chat.sep_token = None
    with pytest.raises(ModelError, match="must have a token that ends a turn"):
        _answers(chat, ["why?"], ["so"])


def test_smollm2_is_told_whom_it_plays(smollm2: str) -> None:
    """Its template is followed to the token, and its own long system message never comes in."""
    tokenizer = AutoTokenizer.from_pretrained(Path(smollm2))
    prompts = ["What is 12 + 30?", "\"Yes\" or 'no'…?", "Write  a\nlist"]
    encoded = _answers(tokenizer, prompts, ["42", "No.", "1. this"], pad_id=2)
    for row, prompt in enumerate(prompts):
        messages = [{"role": "system", "content": ""}, {"role": "user", "content": prompt}]
        start = encoded.answer_start[row]
        assert _rows(encoded)[row][:start] == tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
    assert _parts(encoded, tokenizer)[1] == "42<|im_end|>"
