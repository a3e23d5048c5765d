"""From texts, and from prompts with answers, to the tokens that a language model learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from jinja2 import TemplateError

from pwff_opt.costs import masked
from pwff_opt.errors import DataError, ModelError
from pwff_opt.federated.text.tokens import Indices, Tokens, tokenise
from pwff_opt.rng import stream


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoded:
    """Sequences of tokens: first what is given, then what is learned; what did not fit is counted."""

    tokens: Tokens
    answer_start: Indices
    """[sequence]: number of tokens that are given."""
    prompts_cut: int
    """Sequences whose prompt lost its beginning."""
    answers_cut: int
    """Sequences whose answer, or text, lost its end."""


def encode_texts(texts: Sequence[str], tokenizer: Any, *, max_tokens: int, pad_id: int) -> Encoded:
    """Encode plain texts, cut to ``max_tokens`` each; all but the first token is learned."""
    rows = tokenizer(list(texts))["input_ids"]
    return Encoded(
        tokens=_tokens([ids[:max_tokens] for ids in rows], pad_id),
        answer_start=np.ones(len(rows), dtype=np.int64),
        prompts_cut=0,
        answers_cut=sum(len(ids) > max_tokens for ids in rows),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MaskedTexts:
    """Texts with some tokens masked."""

    tokens: Tokens
    """What the model reads."""
    targets: Indices
    """[token], end to end as ``tokens.ids``: what was there, or -1 where nothing is learned."""
    texts_cut: int
    """Texts that lost their end."""


def encode_masked(
    texts: Sequence[str], tokenizer: Any, *, max_tokens: int, pad_id: int, seed: int
) -> MaskedTexts:
    """Encode texts for masked pre-training, cut to ``max_tokens`` each.

    Of a text's tokens but the special ones, 15 % and at least one are to be named. 80 % of them are replaced
    by the mask, 10 % by any token and 10 % are left (Devlin et al., NAACL 2019, section 3.1). Masks are drawn
    once a text, so that what frozen layers make of a text stays the same; BERT drew ten for every text,
    RoBERTa (Liu et al., arXiv 1907.11692) a new one each time.

    Raises
    ------
    ModelError
        The tokenizer has no mask.
    """
    if tokenizer.mask_token_id is None:
        raise ModelError(
            "the tokenizer must have a mask (mask_token) to pre-train an encoder, got none"
        )
    plain = tokenise(texts, tokenizer, max_tokens=max_tokens, pad_id=pad_id)
    special = np.array(tokenizer.all_special_ids)
    others = np.setdiff1d(np.arange(len(tokenizer)), special)
    ids, targets = plain.ids.copy(), np.full(len(plain.ids), -1)
    for text, (start, stop) in enumerate(pairwise(plain.offsets)):
        candidates = start + (~np.isin(plain.ids[start:stop], special)).nonzero()[0]
        if not len(candidates):
            continue
        rng = stream(seed, "masks", item=text)
        chosen = rng.choice(candidates, masked(len(candidates)), replace=False)
        targets[chosen] = plain.ids[chosen]
        kind = rng.random(len(chosen))
        ids[chosen[kind < 0.8]] = tokenizer.mask_token_id
        drawn = (kind >= 0.8) & (kind < 0.9)
        ids[chosen[drawn]] = rng.choice(others, drawn.sum())
    return MaskedTexts(
        tokens=replace(plain, ids=ids),
        targets=targets,
        texts_cut=sum(len(row) > max_tokens for row in tokenizer(list(texts))["input_ids"]),
    )


def encode_prompts(
    prompts: Sequence[str], tokenizer: Any, *, system_prompt: str, max_tokens: int, pad_id: int
) -> Encoded:
    """Encode prompts, up to where the answer begins, as :func:`encode_answers` does.

    Each may take all of ``max_tokens``; nothing is learned.
    """
    frame = _Frame.of(tokenizer, system_prompt)
    rows, cut = frame.encode(prompts, [max_tokens] * len(prompts))
    return Encoded(
        tokens=_tokens(rows, pad_id),
        answer_start=np.array([len(ids) for ids in rows], dtype=np.int64),
        prompts_cut=cut,
        answers_cut=0,
    )


def encode_answers(
    prompts: Sequence[str],
    answers: Sequence[str],
    tokenizer: Any,
    *,
    system_prompt: str,
    max_tokens: int,
    pad_id: int,
) -> Encoded:
    """Encode prompts with the answers to be learned, at most ``max_tokens`` together.

    A prompt is the user's message in the tokenizer's template for chats, after the system's, also where
    that is empty: some templates would put in one of their own. Without a template, either message is a
    line. An answer ends with the token that ends a turn.

    Where both together are too long, first the user's message loses its beginning, as far as the prompt
    is longer than half of ``max_tokens``; then the answer loses its end. Equal prompts are cut equally,
    for the longest of their answers, so that the answers of a pair are answers to the same.

    Raises
    ------
    DataError
        The template alone takes more than a prompt may.
    ModelError
        The tokenizer has no token that ends a turn, or its template refuses the messages.
    """
    frame = _Frame.of(tokenizer, system_prompt)
    end = end_id(tokenizer)
    learned = [
        [*ids, end] for ids in tokenizer(list(answers), add_special_tokens=False)["input_ids"]
    ]
    longest: dict[str, int] = {}
    for prompt, ids in zip(prompts, learned, strict=True):
        longest[prompt] = max(longest.get(prompt, 0), len(ids))
    half = max_tokens - max_tokens // 2
    given, prompts_cut = frame.encode(
        prompts, [max(half, max_tokens - longest[prompt]) for prompt in prompts]
    )
    rows = [[*before, *after] for before, after in zip(given, learned, strict=True)]
    return Encoded(
        tokens=_tokens([ids[:max_tokens] for ids in rows], pad_id),
        answer_start=np.array([len(ids) for ids in given], dtype=np.int64),
        prompts_cut=prompts_cut,
        answers_cut=sum(len(ids) > max_tokens for ids in rows),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Frame:
    """What stands around the user's message in a prompt."""

    tokenizer: Any
    start: list[int]
    """Tokens at the very start."""
    before: str
    after: str

    @classmethod
    def of(cls, tokenizer: Any, system_prompt: str) -> _Frame:
        if tokenizer.chat_template is None:
            start = tokenizer("")["input_ids"]  # what the tokenizer puts around a text
            end = end_id(tokenizer)
            return cls(
                tokenizer=tokenizer,
                start=[token for token in start if token != end],
                before=f"{system_prompt}\n" if system_prompt else "",
                after="\n",
            )
        message = "\ue000"  # of private use: in no template
        user = {"role": "user", "content": message}
        conversations = [[{"role": "system", "content": system_prompt}, user]]
        if not system_prompt:
            conversations.append([user])  # for templates that take no system's message at all
        for conversation in conversations:
            try:
                text = tokenizer.apply_chat_template(
                    conversation, add_generation_prompt=True, tokenize=False
                )
            except TemplateError as error:
                refusal = error
                continue
            before, _, after = text.partition(message)
            return cls(tokenizer=tokenizer, start=[], before=before, after=after)
        raise ModelError(
            f"model.system_prompt must fit the model's chat template, got {system_prompt!r}: {refusal}"
        ) from refusal

    def encode(self, messages: Sequence[str], rooms: Sequence[int]) -> tuple[list[list[int]], int]:
        """Return the tokens of prompts, each in its room, and how many messages lost their beginning."""
        encoded = self.tokenizer(
            [f"{self.before}{message}{self.after}" for message in messages],
            add_special_tokens=False,
            return_offsets_mapping=True,
        )
        rows, cut = [], 0
        for message, room, ids, spans in zip(
            messages, rooms, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            first = sum(start < len(self.before) for start, _ in spans)
            own = sum(start < len(self.before) + len(message) for start, _ in spans) - first
            over = max(0, len(self.start) + len(ids) - room)
            if over >= own:
                raise DataError(
                    f"model.max_tokens must leave a prompt more than the {len(self.start) + len(ids) - own} "
                    f"tokens that stand around the user's message, got room for {room}"
                )
            cut += over > 0
            rows.append([*self.start, *ids[:first], *ids[first + over :]])
        return rows, cut


def end_id(tokenizer: Any) -> int:
    """Return the token that ends a turn; encoders such as BERT end a text with another one."""
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if token is not None:
            return int(token)
    raise ModelError("the tokenizer must have a token that ends a turn (eos_token), got none")


def _tokens(rows: Sequence[Sequence[int]], pad_id: int) -> Tokens:
    return Tokens(
        ids=np.concatenate([np.asarray(ids, dtype=np.int64) for ids in rows]),
        offsets=np.concatenate([[0], np.cumsum([len(ids) for ids in rows])]).astype(np.int64),
        pad_id=pad_id,
    )
