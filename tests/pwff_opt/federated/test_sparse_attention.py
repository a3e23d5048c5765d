"""Sparse attention (windows with sinks) against transformers with masks written out, and its costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_language import assert_equals_plain, row
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pwff_opt import Workload
from pwff_opt.costs import Architecture, Blocks, TokenCount, attention_span, local_step, step_flops
from pwff_opt.data.models import model_source
from pwff_opt.federated.export.export import load_device_model
from pwff_opt.federated.learning import Causal
from pwff_opt.federated.model.attention import Around, Window
from pwff_opt.federated.model.backbone import NOTHING, Backbone
from pwff_opt.federated.model.generation import generate
from pwff_opt.federated.text.tokens import Packed, Tokens
from pwff_opt.federated.training.evaluator import FederatedEvaluator
from pwff_opt.scenario import Alignment, Scenario
from pwff_opt.scenario.schedule import LayerState, Schedule

SMALL = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}
DECODER = SMALL | {"num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 7}


def sequences(*lengths: int, vocabulary: int = 90) -> Tokens:
    rng = np.random.default_rng(1)
    return Tokens(
        ids=rng.integers(8, vocabulary, sum(lengths)),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        pad_id=0,
    )


def seen(length: int, window: int, sinks: int, *, causal: bool) -> torch.Tensor:
    """Return who sees whom, [token, token], told token by token."""
    rows = [
        [(abs(i - j) < window or j < sinks) and (j <= i or not causal) for j in range(length)]
        for i in range(length)
    ]
    return torch.tensor(rows)


def written_out(allowed: torch.Tensor) -> torch.Tensor:
    """Return the mask that transformers adds to scores, [1, 1, token, token]."""
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[
        None, None
    ]


def ours(backbone: Backbone, tokens: Tokens, batch: Sequence[int]) -> torch.Tensor:
    """Return logits of all tokens of some sequences computed together."""
    packed = Packed.of(tokens, [np.array(batch)])
    with torch.inference_mode():
        return backbone.tokens(backbone.run(packed, NOTHING, backbone.embed(packed)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (1, 2), (3, 0), (3, 1), (4, 4), (30, 0)])
@pytest.mark.parametrize("lengths", [(9, 9), (11, 2, 6), (5,), (40,)])
@pytest.mark.parametrize("size", [8, 16])  # of 8, it is not compiled
def test_attention_and_gradients(
    causal: bool, window: int, sinks: int, lengths: tuple[int, ...], size: int
) -> None:
    packed = Packed.of(sequences(*lengths), [np.arange(len(lengths))])
    inputs = [torch.randn(sum(lengths), heads, size, requires_grad=True) for heads in (4, 2, 2)]
    # In double precision: where a token sees itself alone, torch's own gradients are nought but rounding.
    twins = [x.detach().double().requires_grad_(True) for x in inputs]
    around = Around(packed, causal=causal, window=Window(width=window, sinks=sinks))
    got = around.attend(*inputs, scale=0.4)
    parts = []
    for q, k, v in zip(*(x.split(lengths) for x in twins), strict=True):
        mask = seen(len(q), window, sinks, causal=causal)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=0.4, enable_gqa=True
            )[0]
            .transpose(0, 1)
            .flatten(1)
        )
    expected = torch.cat(parts)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    towards = torch.randn_like(got)
    got.backward(towards)
    expected.backward(towards.double())
    for mine, its in zip(inputs, twins, strict=True):
        torch.testing.assert_close(mine.grad.double(), its.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.on_cpu
def test_without_sinks_it_is_mistrals_sliding_window(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = MistralForCausalLM(
        MistralConfig(**DECODER, sliding_window=5, attn_implementation="eager")
    )
    model.save_pretrained(tmp_path)
    tokens = sequences(17, 4, 9)
    backbone = Backbone(
        str(tmp_path),
        family="llama",
        classes=None,
        pooling="model",
        max_tokens=17,
        window=Window(width=5, sinks=0),
    )
    got = ours(backbone, tokens, [0, 1, 2]).split([17, 4, 9])
    model.eval().double()
    with torch.inference_mode():
        for i, logits in enumerate(got):
            expected = model(row(tokens, i)).logits[0]
            assert (logits - expected).norm() <= 2e-6 * expected.norm()


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    LlamaForCausalLM(LlamaConfig(**DECODER)).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def windowed(folder: Path, window: int, sinks: int) -> Backbone:
    return Backbone(
        str(folder),
        family="llama",
        classes=None,
        pooling="model",
        max_tokens=64,
        window=Window(width=window, sinks=sinks),
    )


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (4, 2), (40, 1)])
def test_sampled_and_likeliest_answers(llama_folder: Path, window: int, sinks: int) -> None:
    """Token by token from remembered keys, as by whole passes of transformers with the mask written out."""
    backbone = windowed(llama_folder, window, sinks)
    model = LlamaForCausalLM.from_pretrained(llama_folder, attn_implementation="eager").eval()
    prompts = sequences(3, 12, 1, 7)
    draws = np.random.default_rng(2).random((4, 10))
    for drawn in (None, draws):
        found = generate(
            backbone, NOTHING, prompts, [np.arange(4)], longest=10, stop=7, draws=drawn
        )
        for i, answer in enumerate(found):
            ids = row(prompts, i)
            for place, token in enumerate(answer):
                mask = written_out(seen(ids.shape[1], window, sinks, causal=True))
                with torch.inference_mode():
                    logits = model(ids, attention_mask=mask).logits[0, -1]
                if drawn is None:
                    assert token == int(logits.argmax())
                else:
                    shares = logits.softmax(-1).double().cumsum(-1)
                    assert token == int(torch.searchsorted(shares, drawn[i, place], right=True))
                ids = torch.cat([ids, torch.tensor([[token]])], 1)


@pytest.mark.on_cpu
def test_an_encoder_looks_both_ways(tmp_path: Path) -> None:
    torch.manual_seed(4)
    BertForMaskedLM(BertConfig(**SMALL)).save_pretrained(tmp_path)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    backbone = Backbone(
        str(tmp_path),
        family="bert",
        classes=None,
        pooling="model",
        max_tokens=17,
        window=Window(width=3, sinks=1),
    )
    tokens = sequences(17, 4, 9)
    got = ours(backbone, tokens, [0, 1, 2]).split([17, 4, 9])
    for i, logits in enumerate(got):
        mask = written_out(seen(len(logits), 3, 1, causal=False))
        with torch.inference_mode():
            expected = model(row(tokens, i), attention_mask=mask).logits[0]
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def sparse(small: Scenario, tmp_path: Path) -> Scenario:
    """Pre-training of a decoder that sees five tokens back, and the first two."""
    AutoTokenizer.from_pretrained(model_source("minilm")).save_pretrained(tmp_path / "decoder")
    torch.manual_seed(3)
    config = LlamaConfig(**(DECODER | {"vocab_size": 30522, "initializer_range": 0.1}))
    LlamaForCausalLM(config).save_pretrained(tmp_path / "decoder")
    return replace(
        small,
        folder=str(tmp_path),
        model=replace(
            small.model, source="decoder", pooling="model", attention_window=5, attention_sinks=2
        ),
        data=replace(small.data, train_per_device=8, validation_per_device=3, test_per_device=4),
        training=replace(small.training, stage="pretraining"),
    )


def test_training_equals_plain_peft(sparse: Scenario, tmp_path: Path) -> None:
    """Cached activations, adapters and LoRA with sparse attention, one device after another."""
    evaluator = FederatedEvaluator(sparse, tmp_path / "checkpoints")
    stage = evaluator.material.stage
    assert isinstance(stage, Causal)
    assert (stage.tokens.lengths > 7).mean() > 0.5

    def loss(model: Any, _device: int, batch: Sequence[int]) -> torch.Tensor:
        each = []
        for i in batch:
            ids = row(stage.tokens, i)
            mask = written_out(seen(ids.shape[1], 5, 2, causal=True))
            mask = mask.to(model.lm_head.weight.dtype)
            each.append(model(ids, attention_mask=mask, labels=ids).loss)
        return torch.stack(each).mean()

    schedule = Schedule.parse("3x2:fpa", devices=3)
    # Plain training in float32 is itself 2e-5 from float64 here.
    assert_equals_plain(sparse, evaluator, schedule, loss, to_float64=True)


@pytest.mark.on_cpu
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_saved_model_attends_as_it_has_learned(
    sparse: Scenario, tmp_path: Path, family: str
) -> None:
    """Logits, and a decoder's likeliest answers by transformers' own ``generate``, by peft alone."""
    if family == "bert":
        folder = tmp_path / "encoder"
        AutoTokenizer.from_pretrained(model_source("minilm")).save_pretrained(folder)
        torch.manual_seed(3)
        BertForMaskedLM(BertConfig(**(SMALL | {"vocab_size": 30522}))).save_pretrained(folder)
        sparse = replace(sparse, model=replace(sparse.model, source="encoder"))
    # Large steps, or the answers of a random model are the same whatever was learned.
    scenario = replace(sparse, training=replace(sparse.training, learning_rate=0.05))
    evaluator = FederatedEvaluator(scenario, tmp_path / "checkpoints")
    schedule = Schedule.parse("2x2:fpa", devices=3)
    evaluator.train(schedule)
    evaluator.save_device(schedule, 1, tmp_path / "device")
    model = load_device_model(tmp_path / "device")
    passes, stage = evaluator.model(schedule, 1), evaluator.material.stage
    for sequence in evaluator.material.shards[1].test:
        batch = np.array([sequence])
        with torch.inference_mode():
            expected = passes.backbone.tokens(passes.own(stage.tokens, [batch])[1])
            logits = model(input_ids=row(stage.tokens, sequence)).logits[0]
            torch.testing.assert_close(logits, expected, rtol=2e-5, atol=2e-5)
            if family == "bert":
                continue
            said = model.generate(
                input_ids=row(stage.tokens, sequence),
                attention_mask=torch.ones_like(row(stage.tokens, sequence)),
                max_new_tokens=8,
                do_sample=False,
                eos_token_id=7,
                pad_token_id=0,
            )
        (answer,) = generate(
            passes.backbone, passes.stack, stage.tokens, [batch], longest=8, stop=7
        )
        assert said[0, stage.tokens.lengths[sequence] :].tolist() == answer.tolist()


# -- costs ------------------------------------------------------------------------------------------


def banded(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **how: Any
) -> tuple[torch.Tensor, None]:
    """Attention that gathers, for every token, the ``module.span`` ones that it may see, and no more."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    length = query.shape[2]
    span = min(banded.span, length)  # type: ignore[attr-defined]
    allowed = banded.allowed[:length, :length]  # type: ignore[attr-defined]
    # Places that are seen come first; what fills up the span is barred.
    places = (~allowed).int().argsort(dim=1, stable=True)[:, :span]
    barred = ~allowed.gather(1, places)
    near_keys, near_values = key[:, :, places], value[:, :, places]  # [., head, token, span, size]
    scores = (query[:, :, :, None] @ near_keys.transpose(3, 4))[:, :, :, 0] * how["scaling"]
    weights = scores.masked_fill(barred, torch.finfo(torch.float32).min).softmax(-1)
    return (weights[:, :, :, None] @ near_values)[:, :, :, 0].transpose(1, 2), None


@pytest.mark.parametrize(("window", "sinks", "length"), [(4, 0, 12), (5, 2, 30), (16, 4, 11)])
@pytest.mark.parametrize("lowest", [0, 2])
def test_flops_are_those_of_attention_in_bands(
    monkeypatch: pytest.MonkeyPatch, window: int, sinks: int, length: int, lowest: int
) -> None:
    """Of a decoder with plain LoRA whose attention computes a band, and nothing beyond it."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(5)
    config = LlamaConfig(**DECODER, use_cache=False, attn_implementation="eager")
    model = LlamaForCausalLM(config).eval()
    architecture = Architecture.from_config(config.to_dict(), classes=None)
    inject_adapter_in_model(
        LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=list(range(lowest, 3))
        ),
        model,
    )
    ids = torch.randint(8, 90, (3, length))
    allowed = seen(length, window, sinks, causal=True)
    with torch.inference_mode():
        expected = model(ids, attention_mask=written_out(allowed).expand(3, 1, -1, -1)).logits
    banded.span, banded.allowed = window + sinks, allowed  # type: ignore[attr-defined]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "banded", banded)
    model.config._attn_implementation = "banded"
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    states = [LayerState.FROZEN] * lowest + [LayerState.PERSONAL] * (3 - lowest)
    count = TokenCount.batch(sequences=3, length=length, scored=length).within(window + sinks)
    assert count.squared_tokens == 3 * length * min(length, window + sinks)
    assert counter.get_total_flops() == step_flops(
        architecture,
        Blocks(adapter_width=0),
        rank=4,
        states=states,
        present=[state != LayerState.FROZEN for state in states],
        count=count,
    )


def test_the_workload_counts_what_is_seen(sparse: Scenario, tmp_path: Path) -> None:
    """Exactly, of sequences shorter and longer than the span; and less work than with full attention."""
    evaluator = FederatedEvaluator(sparse, tmp_path / "checkpoints")
    for device, shard in enumerate(evaluator.material.shards):
        lengths = evaluator.material.stage.tokens.lengths[shard.train]
        counted = [int(seen(n, 5, 2, causal=True).sum()) for n in lengths]
        told = evaluator.workload.mean_squared_tokens[device]
        assert told == pytest.approx(np.mean([n * min(n, 7) for n in lengths]))
        # A band of equal width is charged, its corner included, which nobody sees.
        assert np.mean(counted) <= told <= np.mean(counted) + 7 * 8 / 2
    decision: dict[str, Any] = {"states": [LayerState.PERSONAL] * 3, "present": [True] * 3}

    def flops(scenario: Scenario, workload: Workload) -> Any:
        step = local_step(scenario, workload)
        return step.flops(Blocks.of(scenario, round=0), rank=np.full(3, 2), **decision)

    full = replace(sparse, model=replace(sparse.model, attention_window=0))
    whole = FederatedEvaluator(full, tmp_path / "checkpoints").workload
    squares = [
        np.mean(evaluator.material.stage.tokens.lengths[shard.train].astype(float) ** 2)
        for shard in evaluator.material.shards
    ]
    np.testing.assert_allclose(whole.mean_squared_tokens, squares)
    assert (flops(sparse, evaluator.workload) < flops(full, whole)).all()
    # Of four attention products forward, and backward, only what is seen.
    saved = sparse.training.batch_size * (
        whole.mean_squared_tokens - evaluator.workload.mean_squared_tokens
    )
    forward, backward = 2 * 3, 3 + 2 * 4
    np.testing.assert_allclose(
        flops(full, whole) - flops(sparse, evaluator.workload),
        2 * saved * 32 * (forward + backward),
    )


def test_spans() -> None:
    from pwff_opt import read_scenario

    scenario = read_scenario("alignment")
    assert attention_span(scenario, "llama") is None
    sparse = replace(scenario, model=replace(scenario.model, attention_window=16))
    assert attention_span(sparse, "llama") == 20
    assert attention_span(sparse, "bert") == 35


def test_sampling_is_bounded_by_the_span(sparse: Scenario) -> None:
    """Every sampled token sees the span at most: exact where all prompts are longer, an upper bound else."""
    scenario = replace(
        sparse,
        data=replace(sparse.data, source="stereoset"),
        training=replace(sparse.training, stage="alignment"),
        alignment=Alignment(optimiser="grpo", answer_tokens=6, answers=2),
    )
    step: Any = local_step(scenario, Workload.padded(scenario))
    prompts, length = 2 * scenario.training.batch_size, scenario.model.max_tokens
    assert length > 7
    assert (step.sampled.squared_tokens == prompts * (length + 5) * 7).all()
    assert (step.policy.count.squared_tokens == prompts * (length + 6) * 7).all()
