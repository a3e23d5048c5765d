"""Named methods: what they put into a scenario, and what follows from that for certain."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from pwff_opt import Planner, Scenario, Schedule, Workload, read_scenario
from pwff_opt.errors import DecisionError
from pwff_opt.methods import ALIGNMENTS, METHODS, Method, apply, schedule
from pwff_opt.runs.identity import learning_key
from pwff_opt.scenario import Aggregation, Data, Peft
from pwff_opt.scenario.files import resolved


def uplink(scenario: Scenario, name: str) -> np.ndarray:
    """Upload [round, device] in bit."""
    changed = apply(scenario, METHODS[name])
    planner = Planner(changed, Workload.padded(changed, classes=3))
    return planner.costs.demand(schedule(changed, METHODS[name], 2)).payload_bit


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_configuration(small: Scenario, name: str) -> None:
    method = METHODS[name]
    assert set(method.peft) <= {entry.name for entry in fields(Peft)}
    assert set(method.aggregation) <= {entry.name for entry in fields(Aggregation)}
    assert method.text
    assert "\n" not in method.text
    changed = apply(small, method)
    plan = schedule(changed, method, 2)
    assert len(plan) == small.training.rounds
    assert set(plan.rounds[0].ranks) <= set(changed.decisions.ranks)
    assert Schedule.parse(str(plan), devices=3) == plan
    # Whatever else the scenario says, it still says; and applying twice is applying once.
    for table in ("cell", "devices", "data", "model", "training", "seeds", "thresholds"):
        assert getattr(changed, table) == getattr(small, table)
    assert apply(changed, method) == changed


def test_no_two_methods_are_the_same(small: Scenario) -> None:
    keys = {
        learning_key(apply(small, method), schedule(small, method, 2))
        for method in METHODS.values()
    }
    assert len(keys) == len(METHODS)


def test_shapes_of_schedules(small: Scenario) -> None:
    assert str(schedule(small, METHODS["pwff"], 2)) == "3x8:faa"
    assert str(schedule(small, METHODS["pftt"], 2)) == "3x8:aaa"
    assert str(schedule(small, METHODS["local"], 1)) == "3x8:ffp"
    assert str(schedule(small, METHODS["shared"], 2)) == "3x0:faa"
    assert str(schedule(small, METHODS["flora-mixed"], 2)) == "3x2,4,8:faa"
    for depth in (0, 4):
        with pytest.raises(DecisionError, match=r"1\.\.3"):
            schedule(small, METHODS["pwff"], depth)


def test_decisions_are_widened_only_where_a_method_needs_it(small: Scenario) -> None:
    method = Method(text="two", lora="fedit", ranks=(2,))
    assert apply(small, method).decisions == small.decisions
    assert apply(small, replace(method, ranks=(16,))).decisions.ranks == (0, 2, 4, 16)
    assert apply(small, METHODS["raflora-mixed"]).decisions.rank_scope == "per_device"


def test_what_is_sent(small: Scenario) -> None:
    head = uplink(small, "shared") - uplink(replace_head(small), "pwff-head")
    assert (uplink(small, "local") == 0).all()
    assert (uplink(small, "pwff") == uplink(small, "shared")).all()  # a LoRA of one's own is free
    assert (uplink(small, "pftt") - head == 1.5 * (uplink(small, "pwff") - head)).all()
    assert (uplink(small, "feddpa") == uplink(small, "fedit")).all()
    assert (uplink(small, "fedavg") == uplink(small, "fedit") + uplink(small, "pwff") - head).all()
    assert (2 * (uplink(small, "ffa") - head) == uplink(small, "fedit") - head).all()
    assert (uplink(small, "rolora") == uplink(small, "ffa")).all()  # A is as large as B here
    for rule in ("hetlora", "flora", "flexlora", "fedex", "raflora"):
        assert (uplink(small, rule) == uplink(small, "fedit")).all()
    mixed = uplink(small, "flora-mixed") - head
    assert (4 * mixed[:, 0] == mixed[:, 2]).all()
    assert (mixed[:, 2] + head[:, 2] == uplink(small, "flora")[:, 2]).all()


def replace_head(scenario: Scenario) -> Scenario:
    return replace(scenario, peft=replace(scenario.peft, head="personal"))


@pytest.mark.parametrize(("rule", "same_as"), [("hetlora", "fedit"), ("raflora", "flexlora")])
def test_rules_that_are_the_same_at_equal_ranks(
    small: Scenario, tmp_path: Path, rule: str, same_as: str
) -> None:
    from pwff_opt.federated.training.evaluator import FederatedEvaluator

    losses = []
    for name in (rule, same_as):
        scenario = apply(small, METHODS[name])
        trained = FederatedEvaluator(scenario, tmp_path).train(schedule(scenario, METHODS[name], 2))
        assert trained.status == "done", trained.reason
        losses.append([entry.loss for entry in trained.rounds])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_no_torch_is_loaded() -> None:
    code = "import sys, pwff_opt.methods; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_key_of_a_training_is_that_of_what_it_reads(small: Scenario, tmp_path: Path) -> None:
    """A name on the hub is one, whatever lies beside the scenario; a local folder is all that is in it."""
    plan = schedule(small, METHODS["pwff"], 2)

    def key(folder: Path, source: str = "minilm", data: Data = small.data) -> str:
        return learning_key(
            replace(
                small,
                folder=str(folder),
                model=replace(small.model, source=source),
                data=data,
            ),
            plan,
        )

    beside, empty = tmp_path / "beside", tmp_path / "empty"
    empty.mkdir()
    for name in ("ag_news", "imdb", "minilm"):
        (beside / name).mkdir(parents=True)
    (beside / "minilm" / "config.json").write_text("{}")
    hub = [replace(small.data, source="hub", path=name) for name in ("ag_news", "imdb")]
    assert len({key(beside, data=data) for data in hub}) == 2
    assert key(beside) == key(empty)
    keys = []
    for number in range(2):
        local = tmp_path / f"{number}" / "model"
        shutil.copytree(small.model.source, local)
        keys.append(key(local.parent, "model"))
        for name in ("tokenizer.model", "merges.bpe"):
            (local / name).write_bytes(b"other")
            keys.append(key(local.with_name(f"{number}.{name}"), str(local)))
    assert keys[:3] == keys[3:]
    assert len(set(keys)) == 3


def test_names_of_files_in_a_folder_are_in_the_key(small: Scenario, tmp_path: Path) -> None:
    """HH-RLHF tells its axes by them; a file alone may be called anything."""
    plan = schedule(small, METHODS["pwff"], 2)

    def key(path: Path) -> str:
        data = replace(small.data, source="file", path=str(path))
        return learning_key(replace(small, data=data), plan)

    files = []
    for name in ("helpful-base", "harmless-base"):
        files.append(tmp_path / name / "inside" / name / "train.csv")
        files[-1].parent.mkdir(parents=True)
        files[-1].write_text("text,label\na,b\n")
    assert key(files[0]) == key(files[1])
    assert key(tmp_path / "helpful-base" / "inside") != key(tmp_path / "harmless-base" / "inside")


def test_a_window_is_in_the_key_where_there_is_one(small: Scenario) -> None:
    plan = schedule(small, METHODS["pwff"], 2)
    models = [{}, {"attention_sinks": 0}, {"attention_window": 8}]
    models.append({"attention_window": 8, "attention_sinks": 0})
    keys = [learning_key(replace(small, model=replace(small.model, **own)), plan) for own in models]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_methods_go_by_their_names(small: Scenario) -> None:
    assert apply(small, "feddpa") == apply(small, METHODS["feddpa"])
    assert schedule(small, "pwff", 2) == schedule(small, METHODS["pwff"], 2)
    with pytest.raises(DecisionError, match=r"method must be one of pwff, .* got 'fedprox'"):
        apply(small, "fedprox")


# -- alignment --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_methods_that_align_are_configurations(name: str) -> None:
    given = read_scenario("alignment")
    changed = apply(given, name)
    assert changed != given
    for table in ("cell", "devices", "data", "training", "seeds", "thresholds"):
        assert getattr(changed, table) == getattr(given, table)
    assert apply(changed, name) == changed
    assert resolved(changed)["alignment"] == resolved(given)["alignment"] | dict(
        ALIGNMENTS[name].alignment
    )


def test_pfit_is_what_its_paper_names(tmp_path: Path) -> None:
    """Two rewards in one, sampled answers, sparse attention, the upper two layers; less work than without."""
    config = {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = read_scenario("alignment")
    given = replace(
        given,
        model=replace(given.model, source=str(tmp_path)),
        decisions=replace(given.decisions, layer_groups=0),
    )
    changed = apply(given, "pfit")
    own = changed.alignment
    assert (own.optimiser, own.reconcile) == ("grpo", "weighted")
    assert 0 < changed.model.attention_window < changed.model.max_tokens
    plan = schedule(changed, "pfit", 4)
    assert str(plan) == "4x8:ffaa"
    full = replace(changed, model=given.model)
    costs = [Planner(s, Workload.padded(s)).costs.demand(plan) for s in (changed, full)]
    assert (costs[0].work_cycles < costs[1].work_cycles).all()
    assert (costs[0].payload_bit == costs[1].payload_bit).all()


def test_a_method_that_aligns_needs_that_stage(small: Scenario) -> None:
    with pytest.raises(DecisionError, match=r"training\.stage must be 'alignment' .*got 'class"):
        apply(small, "pfit")


def test_a_method_that_needs_more_layers_is_refused(small: Scenario) -> None:
    with pytest.raises(DecisionError, match=r"depth must be in 1\.\.3, .* got 5"):
        schedule(small, Method(text="five", upper=5), 2)
