"""The study of methods: its journal, its numbers, its figure, and what rules do for a rank of one's own."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pwff_opt.data import corpora as corpora
from pwff_opt.errors import RunError
from pwff_opt.federated.exchange.rules import Factors
from pwff_opt.federated.training.evaluator import FederatedEvaluator
from pwff_opt.registry import RULES
from pwff_opt.runs.records import RunFolder

sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))

import fig_methods as figure
import run_methods as study

METHODS = ("pwff", "local", "fedsa", "flora-mixed")


@pytest.fixture(scope="module")
def text(small_model):
    """The study's scenario on a small model, with little of everything."""
    given = study.SCENARIO.read_text(encoding="utf-8")
    for old, new in {
        '"minilm"': f'"{small_model}"',
        "max_tokens = 64": "max_tokens = 16",
        "train_per_device = 240": "train_per_device = 24",
        "validation_per_device = 40": "validation_per_device = 4",
        "test_per_device = 120": "test_per_device = 12",
        "rounds = 8": "rounds = 2",
        "validate_after = [8]": "validate_after = [2]",
        "local_steps = 5": "local_steps = 2",
        "batch_size = 8": "batch_size = 4",
    }.items():
        assert old in given
        given = given.replace(old, new)
    return given


def run(out, text, **others):
    arguments = {"seeds": 2, "data": ["hutto"], "methods": METHODS, "dtype": "float32", "depth": 2}
    return study.run(out, text=text, **(arguments | others))


def forbid(*_):
    raise AssertionError("nothing is to be trained")


@pytest.fixture(scope="module")
def results(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "methods"
    return out, run(out, text)


def test_rows_hold_what_was_measured(results):
    out, summary = results
    rows = pd.read_csv(out / "methods.csv")
    assert len(rows) == len(METHODS) * 2
    assert (rows["status"] == "done").all()
    assert rows["accuracy"].between(0, 1).all()
    assert (rows["accuracy_worst_device"] <= rows["accuracy"]).all()
    assert (rows["delay_s"] <= rows["deadline_s"] * (1 + 1e-6)).all()
    assert (rows["shortest_s"] <= rows["deadline_s"] / study.DEADLINE * (1 + 1e-9)).all()
    # All methods of a setting and seed are to be done within the same time.
    assert (rows.groupby("seed")["deadline_s"].nunique() == 1).all()
    assert (rows.loc[rows["method"] == "local", "uplink_bit"] == 0).all()
    assert not (out / "checkpoints").exists()
    assert RunFolder(out).info()["status"] == "done"
    first = summary[summary["method"] == "pwff"].iloc[0]
    assert first["difference"] == first["difference_se"] == 0
    accuracy = rows.pivot(index="seed", columns="method", values="accuracy")
    paired = (accuracy["local"] - accuracy["pwff"]).to_numpy()
    local = summary[summary["method"] == "local"].iloc[0]
    assert local["difference"] == pytest.approx(paired.mean())
    assert local["difference_se"] == pytest.approx(abs(paired[0] - paired[1]) / 2)
    assert "pwff" in study.report(summary)


def test_costs_are_those_of_what_was_sent(text, tmp_path):
    base = study.base_scenario("float32", text, tmp_path)
    group = study.Group(base, "hutto", 1, tmp_path, 2)
    for method in ("pwff", "rolora", "flora-mixed"):
        row = group.train(method)
        scenario, plan = group.configured(method)
        planner = study.Planner(scenario, study.Workload.padded(scenario, classes=3))
        assert row["uplink_bit"] == planner.costs.demand(plan).payload_bit.mean()


@pytest.mark.parametrize("method", ["hetlora-mixed", "flexlora-mixed", "raflora-mixed"])
def test_mixed_ranks_train(text, tmp_path, method):
    base = study.base_scenario("float32", text, tmp_path)
    row = study.Group(base, "hutto", 1, tmp_path, 2).train(method)
    assert row["status"] == "done", row["reason"]


def test_a_second_call_trains_nothing(results, text, monkeypatch):
    out, summary = results
    before = (out / "methods.csv").read_bytes()
    monkeypatch.setattr(study.Group, "train", forbid)
    pd.testing.assert_frame_equal(run(out, text), summary)
    assert (out / "methods.csv").read_bytes() == before


def test_a_killed_run_goes_on_where_it_was(results, text, tmp_path, monkeypatch):
    _, summary = results
    train, trained = study.Group.train, []

    def until_killed(group, method):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(method)
        return train(group, method)

    monkeypatch.setattr(study.Group, "train", until_killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", text)
    assert RunFolder(tmp_path / "run").info()["status"] == "interrupted"
    assert len(pd.read_csv(tmp_path / "run" / "methods.csv")) == 3
    monkeypatch.setattr(
        study.Group,
        "train",
        lambda group, method: (trained.append(method), train(group, method))[1],
    )
    again = run(tmp_path / "run", text)
    assert trained == [*METHODS, *METHODS]
    spent = ["wall_s", "cpu_s"]
    pd.testing.assert_frame_equal(again.drop(columns=spent), summary.drop(columns=spent))


def test_another_scenario_is_refused(results, text):
    out, _ = results
    with pytest.raises(RunError, match="local_steps"):
        run(out, text.replace("local_steps = 2", "local_steps = 3"))


def test_figure_reads_the_folder(results):
    out, _ = results
    for against in figure.AXES:
        for path in figure.methods_figure(RunFolder(out), against):
            assert path.stat().st_size > 5000


def test_every_method_has_a_mark_of_its_own():
    compared = {name for setting in study.SETTINGS.values() for name in setting.methods}
    assert compared == set(figure.MARKS)
    assert len(set(figure.MARKS.values())) == len(figure.MARKS)


def test_one_device_holds_a_class_and_a_rank_of_its_own(text, tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 1500)
    corpus = corpora.Corpus(
        texts=tuple(f"word {n} of {label}" for n, label in enumerate(labels)),
        labels=labels,
        domains=np.zeros(1500, dtype=np.int64),
        class_names=("acq", "crude", "earn", "ship"),
        domain_names=("all",),
    )
    monkeypatch.setattr(corpora, "load_corpus", lambda *_, **__: corpus)
    methods = ("fedit-low", "fedit-high", "flora-mixed")
    summary = run(tmp_path / "run", text, data=["own-class"], methods=methods, seeds=1)
    assert len(summary) == len(methods)
    assert summary["own_class"].notna().all()
    dealt = pd.read_parquet(tmp_path / "run" / "data" / "own-class.parquet")
    assert set(dealt.loc[dealt["label"] == "crude", "device"]) == {"device 5"}
    assert not dealt["text"].duplicated().any()
    assert "own class" in study.report(summary)
    figure.methods_figure(RunFolder(tmp_path / "run"))


def test_slices_that_one_device_alone_has_come_back_by_known_factors():
    """Of six devices one has rank 16, the others 2, and B of theirs is zero: all that is learned is its.

    Its slices above rank 2 come back to it times p^2 by HetLoRA (p of either factor, p = 1/6), times p by
    FLoRA and FlexLoRA (the average it is), undiluted by raFLoRA.  With a low rank a device gets what two
    singular directions hold of that, or, by FLoRA, all of it.
    """
    torch.manual_seed(2)
    share, low, high, size = 1 / 6, 2, 16, 24
    a, b = torch.randn(high, size), torch.randn(size, high)
    b[:, :low] = 0.0  # it has learned in its own slices alone
    held = [Factors(a=a[:low].clone(), b=torch.zeros(size, low), scale=2.0) for _ in range(5)] + [
        Factors(a=a, b=b, scale=2.0)
    ]
    own = (2.0 * b @ a).double()
    singular = torch.linalg.svdvals(own)
    for name, factor in {
        "hetlora": share**2,
        "flora": share,
        "flexlora": share,
        "raflora": 1.0,
    }.items():
        merged = RULES[name].merge(
            held, [1.0] * 6, held, round=0, fresh=lambda item: torch.zeros_like(held[item].a)
        )
        delta = torch.zeros(size, size) if merged.delta is None else merged.delta
        others, holder = (
            (2.0 * factors.b @ factors.a + delta).double()
            for factors in (merged.factors[0], merged.factors[-1])
        )
        torch.testing.assert_close(holder, factor * own, rtol=1e-4, atol=1e-4)
        if name == "flora":
            reached = 1.0
        elif name == "hetlora":
            reached = 0.0  # the slices are cut off
        else:
            reached = math.sqrt(float((singular[:low] ** 2).sum() / (singular**2).sum()))
        assert float(others.norm() / (factor * own).norm()) == pytest.approx(
            reached, rel=1e-4, abs=1e-6
        )


@pytest.mark.parametrize(
    ("known", "dtype"),
    [
        ({}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bfloat16"),
    ],
)
def test_dtype_is_what_the_cpu_multiplies_in(monkeypatch, known, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert study.fast_dtype() == dtype


def test_methods_that_are_one_training_both_have_a_row(text, tmp_path):
    """At full depth pftt is pwff: trained once, reported twice, and again when it is called again."""
    options = {"methods": ("pwff", "pftt"), "seeds": 1, "depth": 3}
    first = run(tmp_path / "run", text, **options)
    assert list(first["method"]) == ["pwff", "pftt"]
    assert first["accuracy"].nunique() == first["energy_j"].nunique() == 1
    written = (tmp_path / "run" / "methods.csv").read_bytes()
    pd.testing.assert_frame_equal(run(tmp_path / "run", text, **options), first)
    assert (tmp_path / "run" / "methods.csv").read_bytes() == written


def test_no_test_text_of_the_class_is_a_missing_number(text, tmp_path, monkeypatch):
    base = study.base_scenario("float32", text, tmp_path)
    group = study.Group(base, "hutto", 1, tmp_path, 2)
    scenario, plan = group.configured("shared")
    evaluator = FederatedEvaluator(scenario, tmp_path)
    names = (*evaluator.material.class_names, "never seen")
    evaluator.material = study.replace(evaluator.material, class_names=names)
    group.setting = study.replace(group.setting, own_class="never seen")
    assert all(map(math.isnan, group._own_class(evaluator, plan).values()))
