"""The study of alignment on a small decoder: its journal, its numbers, its figure."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pwff_opt import read_scenario
from pwff_opt.data.models import model_source
from pwff_opt.data.packages import fetch
from pwff_opt.errors import DataError, RunError
from pwff_opt.federated.model.attention import Window
from pwff_opt.federated.model.backbone import NOTHING
from pwff_opt.federated.model.passes import Passes
from pwff_opt.federated.training.evaluator import FederatedEvaluator

sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))

import fig_alignment as figure
import run_alignment as study

VARIANTS = ("pfit", "pwff", "sampled", "fedavg")


@pytest.fixture(scope="module")
def base(tmp_path_factory, small_model):
    for name in ("alpaca-demo", "stereoset"):
        try:
            fetch(name)
        except DataError as error:
            pytest.skip(f"{name} cannot be fetched: {error}")
    folder = tmp_path_factory.mktemp("decoder")
    tokenizer = AutoTokenizer.from_pretrained(model_source("minilm"))
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=30522,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=101,
        eos_token_id=102,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    given = read_scenario("alignment")
    return replace(
        given,
        devices=given.devices[:2],
        model=replace(given.model, source=str(folder), max_tokens=40),
        data=replace(
            given.data, train_per_device=8, validation_per_device=2, test_per_device=3
        ),
        training=replace(
            given.training, rounds=2, validate_after=(2,), local_steps=1, batch_size=2,
            base_dtype="float32",
        ),
        alignment=replace(
            given.alignment, reward_model=str(small_model), reward_steps=2, answer_tokens=4, answers=2
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "alignment"
    return out, *study.run(base, out, variants=VARIANTS, seeds=1)


def test_a_row_for_every_variant_seed_and_device(results):
    _, rows, table = results
    assert len(rows) == len(VARIANTS) * 2
    assert list(table.index) == list(VARIANTS)
    assert not rows.isna().any().any()
    own, others = rows["liking"], rows["liking_of_others"]
    share = rows["helpfulness"]
    expected = share * rows["preferred_helpfulness"] + (1 - share) * rows["preferred_safety"]
    np.testing.assert_allclose(own, expected)
    np.testing.assert_allclose(
        own + others, rows["preferred_helpfulness"] + rows["preferred_safety"]
    )
    np.testing.assert_allclose(
        table["worst"],
        rows.groupby(["variant", "seed"])["liking"].min().groupby("variant").mean()[table.index],
    )
    # Nothing goes up where nothing is sent, and more where more is shared.
    bits = rows.groupby("variant")["uplink_bit"].mean()
    assert bits["fedavg"] > bits["pwff"] > 0
    assert (rows["energy_j"] > 0).all()
    assert (rows["shortest_s"] < rows["deadline_s"]).all()


def test_what_rounds_told_is_kept(results):
    """A row a round and device; its means are those of the table of devices."""
    out, rows, table = results
    rounds = pd.read_csv(out / "rounds.csv")
    assert len(rounds) == len(VARIANTS) * 2 * 2
    assert {"loss", "conflict", "stationarity", "weight", "drift"} <= set(rounds)
    means = rounds.groupby(["variant", "seed", "device"])["conflict"].mean()
    told = rows.set_index(["variant", "seed", "device"])["conflict"]
    np.testing.assert_allclose(means[told.index], told)
    last = rounds[rounds["round"] == 2]
    assert last["reward_safety"].notna().all()
    assert (table["weight_unrest"] >= 0).all()


def test_all_are_measured_against_the_model_that_attends_to_all(base, results, tmp_path):
    """Also where a variant comes first that does not."""
    _, rows, _ = results
    assert rows["variant"].iloc[0] == "pfit"
    evaluator = FederatedEvaluator(base, tmp_path)
    assert evaluator.material.backbone.ends.window is None
    general = study.language(evaluator)
    frozen = Passes(evaluator.material.backbone, [0], NOTHING)
    expected = general.measures(np.arange(len(general.tokens)), frozen)["perplexity"]
    np.testing.assert_allclose(rows["perplexity_reference"], expected, rtol=1e-6)
    sparse = evaluator.material.backbone.ends
    sparse.window = Window(width=16, sinks=4)
    other = general.measures(np.arange(len(general.tokens)), frozen)["perplexity"]
    assert abs(other / expected - 1) > 1e-4


def test_one_model_for_all_is_one(results):
    _, rows, _ = results
    shared = rows[rows["variant"] == "fedavg"].groupby("seed")
    for name in ("reward_helpfulness", "reward_safety", "perplexity"):
        assert (shared[name].nunique() == 1).all()


def test_nothing_is_trained_twice(base, results, monkeypatch):
    out, rows, _ = results
    written = (out / "alignment.csv").read_bytes()
    monkeypatch.setattr(FederatedEvaluator, "train", None)
    again, _ = study.run(base, out, variants=VARIANTS, seeds=1)
    assert (out / "alignment.csv").read_bytes() == written
    assert len(again) == len(rows)


def test_what_a_kill_left_is_gone_on_with(base, results, tmp_path):
    """A table that lacks its last rows comes to the same end."""
    _, rows, _ = results
    lost = rows[rows["variant"] != "fedavg"]
    (tmp_path / "run").mkdir()
    lost.to_csv(tmp_path / "run" / "alignment.csv", index=False)
    again, _ = study.run(base, tmp_path / "run", variants=VARIANTS, seeds=1)
    key = ["variant", "seed", "device"]
    old, new = (t.sort_values(key, ignore_index=True).drop(columns="wall_s") for t in (rows, again))
    pd.testing.assert_frame_equal(old, new[old.columns], check_exact=False, rtol=1e-6)


def test_figure(results, tmp_path):
    out, _, _ = results
    pdf, png = figure.figure(out)
    assert pdf.read_bytes().startswith(b"%PDF")
    assert png.stat().st_size > 20_000
    with pytest.raises(RunError, match=r"has no alignment\.csv"):
        figure.figure(tmp_path)
