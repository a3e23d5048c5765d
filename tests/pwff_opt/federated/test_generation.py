"""Generation and next-token losses against transformers, one sequence at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pwff_opt.federated.learning.language import Scored
from pwff_opt.federated.model.backbone import NOTHING, Backbone, Stack
from pwff_opt.federated.model.blocks import Tensors, fresh_adapter, fresh_lora
from pwff_opt.federated.model.generation import generate
from pwff_opt.federated.text.tokens import Packed, Tokens

STOP = 7


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=request.param,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=STOP,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def backbone(source: str) -> Backbone:
    return Backbone(source, family="llama", classes=None, pooling="model", max_tokens=64)


@pytest.fixture(scope="module")
def plain(source: str) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(source).eval()


@pytest.fixture(scope="module")
def prompts() -> Tokens:
    rng = np.random.default_rng(3)
    lengths = [5, 2, 9, 1, 5, 7]
    ids = rng.integers(8, 60, sum(lengths))
    return Tokens(ids=ids, offsets=np.concatenate([[0], np.cumsum(lengths)]), pad_id=0)


def test_out_of_memory_halves_the_prompts_and_changes_no_answer(
    backbone: Backbone, prompts: Tokens, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    batches = [np.array([0, 1, 2]), np.array([3]), np.array([4, 5, 0, 2])]
    stack = Stack([{}] * 3, [1.0] * 3)
    how: dict[str, Any] = {
        "longest": 6,
        "stop": STOP,
        "draws": np.random.default_rng(1).random((8, 6)),
    }
    expected = generate(backbone, stack, prompts, batches, **how)
    through = Backbone.run
    most = []

    def short_of_memory(self: Backbone, packed: Packed, *rest: Any, **more: Any) -> torch.Tensor:
        if max(packed.sequence_counts) > 1:
            torch.empty(10**15)  # what torch itself says when memory runs out
        most.append(packed.sequences)
        return through(self, packed, *rest, **more)

    monkeypatch.setattr(Backbone, "run", short_of_memory)
    found = generate(backbone, stack, prompts, batches, **how)
    assert [answer.tolist() for answer in found] == [answer.tolist() for answer in expected]
    assert "answered in halves" in caplog.text
    assert max(most) <= 3
    monkeypatch.setattr(Backbone, "run", lambda *_, **__: torch.empty(10**15))
    with pytest.raises(RuntimeError, match="allocate memory"):  # one prompt a device, and no more
        generate(backbone, stack, prompts, [batch[:1] for batch in batches], longest=6, stop=STOP)


def text(tokens: Tokens, number: int) -> torch.Tensor:
    return torch.from_numpy(tokens.ids[tokens.offsets[number] : tokens.offsets[number + 1]])[None]


def blocks(backbone: Backbone, seed: int) -> Tensors:
    """Return blocks that do something."""
    rng = torch.Generator().manual_seed(seed)
    own: Tensors = {}
    for layer in (1, 2):
        own |= fresh_adapter(layer, hidden=32, width=4, seed=seed)
        shapes = backbone.lora_shapes(layer)
        own |= fresh_lora(layer, 2, shapes, seed=seed, round=0, device=0)
    moved = {name: t + 0.3 * torch.randn(t.shape, generator=rng) for name, t in own.items()}
    return {name: t.to(backbone.device) for name, t in moved.items()}


def test_likeliest_answers_are_those_of_transformers(
    backbone: Backbone, plain: LlamaForCausalLM, prompts: Tokens
) -> None:
    order = np.array([2, 0, 5, 3, 1, 4])
    ours = generate(
        backbone,
        Stack([{}, {}], [1.0, 1.0]),
        prompts,
        [order[:4], order[4:]],
        longest=12,
        stop=STOP,
    )
    ended = 0
    for number, answer in zip(order, ours, strict=True):
        prompt = text(prompts, number)
        whole = plain.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        assert answer.tolist() == whole[0, prompt.shape[1] :].tolist()
        ended += answer[-1] == STOP
    assert ended > 0 or len(set(map(tuple, ours))) > 1


def test_every_device_answers_by_its_own_blocks(backbone: Backbone, prompts: Tokens) -> None:
    """Token by token with remembered keys, against whole sequences again and again."""
    devices = [blocks(backbone, 1), {}, blocks(backbone, 2)]
    batches = [np.array([0, 2]), np.array([1]), np.array([4, 3, 5])]
    together = generate(
        backbone, Stack(devices, [2.0, 1.0, 2.0]), prompts, batches, longest=6, stop=STOP
    )
    owners = [device for device, batch in enumerate(batches) for _ in batch]
    for number, owner, answer in zip(np.concatenate(batches), owners, together, strict=True):
        stack = Stack([devices[owner]], [2.0])
        known = text(prompts, int(number))[0].numpy()
        for token in answer:
            so_far = Tokens(ids=known, offsets=np.array([0, len(known)]), pad_id=0)
            packed = Packed.of(so_far, [np.array([0])], device=backbone.device)
            with torch.inference_mode():
                hidden = backbone.run(packed, stack, backbone.embed(packed))
                logits = backbone.tokens(packed.last(hidden))
            assert int(logits.argmax()) == token
            known = np.append(known, token)
    alone = generate(
        backbone, Stack([devices[2]], [2.0]), prompts, batches[2:], longest=6, stop=STOP
    )
    for one, other in zip(alone, together[3:], strict=True):
        np.testing.assert_array_equal(one, other)


def test_draws_follow_the_model(
    backbone: Backbone, plain: LlamaForCausalLM, prompts: Tokens
) -> None:
    count = 4000
    draws = np.random.default_rng(1).random((count, 1))
    answers = generate(
        backbone, NOTHING, prompts, [np.full(count, 2)], longest=1, stop=STOP, draws=draws,
        temperature=2.0,
    )  # fmt: skip
    with torch.inference_mode():
        shares = (plain(text(prompts, 2)).logits[0, -1] / 2.0).softmax(-1).double().numpy()
    seen = np.bincount([answer[0] for answer in answers], minlength=60)
    order = np.argsort(shares)
    few = np.cumsum(shares[order]) * count < 10  # together, for chi squared
    groups = np.where(few, 0, np.arange(60))[np.argsort(order)]
    expected = np.bincount(groups, shares / shares.sum() * count)
    there = expected > 0
    assert chisquare(np.bincount(groups, seen)[there], expected[there]).pvalue > 1e-3


def test_log_probabilities_of_answers(
    backbone: Backbone, plain: LlamaForCausalLM, prompts: Tokens
) -> None:
    order, starts = np.array([2, 0, 5, 1]), np.array([4, 1, 6, 1])
    packed = Packed.of(prompts, [order[:3], order[3:]], device=backbone.device)
    with torch.inference_mode():
        hidden = backbone.run(packed, Stack([{}, {}], [1.0, 1.0]), backbone.embed(packed))
        scored = Scored.next_tokens(packed, starts)
        sums = scored.sums(scored.log_probabilities(backbone, hidden))
        for place, (number, start) in enumerate(zip(order, starts, strict=True)):
            ids = text(prompts, number)
            logits = plain(ids).logits[0].log_softmax(-1)
            expected = sum(float(logits[t - 1, ids[0, t]]) for t in range(start, ids.shape[1]))
            assert float(sums[place]) == pytest.approx(expected, rel=1e-4)
            assert int(scored.counts[place]) == ids.shape[1] - start


def test_those_that_end_early_are_left_behind(backbone: Backbone, prompts: Tokens) -> None:
    """An answer is what comes before its first end, whoever else goes on, and however long."""
    rng = np.random.default_rng(9)
    batches = [np.repeat([0, 2, 3], 6), np.repeat([5, 1], 6)]
    devices = [blocks(backbone, 1), blocks(backbone, 2)]
    how = {"longest": 10, "draws": rng.random((30, 10)), "temperature": 3.0}
    stack = Stack(devices, [2.0, 2.0])
    endless = generate(backbone, stack, prompts, batches, stop=-1, **how)
    assert all(len(answer) == 10 for answer in endless)
    tokens, counts = np.unique(np.concatenate(endless), return_counts=True)
    stop = int(tokens[counts.argmax()])
    ended = generate(backbone, stack, prompts, batches, stop=stop, **how)
    lengths = set()
    for whole, answer in zip(endless, ended, strict=True):
        at = np.flatnonzero(whole == stop)
        np.testing.assert_array_equal(answer, whole[: at[0] + 1] if len(at) else whole)
        lengths.add(len(answer))
    assert len(lengths) > 4
