"""Plans as people make them: in Python and on the command line, held side by side and against another base."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import refused, run, told
from torch import nn
from zoo import ids, llama, mlp, t5, trainables

import sarac
from sarac.checkpoint import adapted_weights, base_hashes
from sarac.ir.adapters import MoSara, Sara
from sarac.ir.record import record_of
from sarac.plans import table
from sarac.report import as_text


def test_plan_is_the_one_that_transform_carries_out() -> None:
    model, choice = llama(), {"method": "mosara", "where": "*_proj.weight", "overrides": {"*.o_proj.weight": "none"}}
    before = trainables(model)
    plan = sarac.plan(model, "budget:400,multiple=2", also_train="*norm*", **choice)
    assert trainables(model) == before
    direct = sarac.transform(model, "budget:400,multiple=2", also_train="*norm*", **choice)
    assert record_of(direct).plan.sites == plan.sites == record_of(sarac.transform(model, plan)).plan.sites
    assert plan.sites != sarac.plan(model, "budget:250,multiple=2", **choice).sites
    adapters = [p for name, p in direct.named_parameters() if p.requires_grad and "norm" not in name]
    assert sum(plan.trainable.values()) == sum(p.numel() for p in adapters)
    assert plan.base == base_hashes(adapted_weights(direct))["float32"]
    assert sarac.plan(model).sites == sarac.plan(model, "threshold:0.6", method="sara").sites != plan.sites


def test_adapted_model_gives_the_plan_that_it_has() -> None:
    plan = sarac.plan(mlp(6, 5, 4), "rank:2")
    model = sarac.transform(mlp(6, 5, 4), "rank:3,train=factors")
    assert sarac.plan(model).sites == record_of(model).plan.sites != plan.sites
    for asked, said in (({"rule": "rank:2"}, "`rule`"), ({"where": "*"}, "`where`")):
        with pytest.raises(sarac.PlanError, match=f"is adapted, and its plan is made: leave {said} out"):
            sarac.plan(model, **asked)


def changed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model[2].weight[0, 0] += 1.0
    return model


@pytest.mark.parametrize("kept", ["hashes", "base"])
def test_plan_for_another_base_warns_and_applies(kept: str, tmp_path: Path) -> None:
    model = mlp(6, 5, 4, 3)
    plan = sarac.plan(model, "rank:2")
    data = json.loads(plan.to_json())
    if kept == "hashes":  # a plan that was edited is of the same base
        del data["sites"]["4.weight"]
        data["sites"]["0.weight"]["rank"] = 3
    else:
        data["sites"] = {name: {k: v for k, v in entry.items() if k != "hash"} for name, entry in data["sites"].items()}
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sarac.transform(model, tmp_path / "plan.json")
    with pytest.warns(sarac.SaracWarning, match=r"made for another base: .*weight has other values here \(\d of \d weights\)"):
        other = sarac.transform(changed(model), tmp_path / "plan.json")
    assert record_of(other).plan.sites["0.weight"] == Sara(3 if kept == "hashes" else 2)


def test_table_says_what_is_decided() -> None:
    torch.manual_seed(0)
    plan = sarac.plan(llama(), "rank:3,router_scope=group", method="mosara", example_inputs=ids())
    shown, by_site = as_text(table(plan), 200), as_text(table(plan, by_site=True), 200)
    assert "mosara router_scope=group router of q_proj" in shown
    assert "k_proj, v_proj" in shown
    assert "330" in shown
    assert by_site.count("router of gate_proj") == 2
    assert shown.count("router of gate_proj") == 1


# The command line.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("plans")
    llama().save_pretrained(path / "llama")
    return path


def test_plan_is_written_edited_and_carried_out(folder: Path, tmp_path: Path) -> None:
    where, file = folder / "llama", tmp_path / "plan.json"
    words = ("--rule", "threshold:0.6", "--override", "*.down_proj.weight=rank:2", "--override", "*.o_proj.weight=none")
    shown = run("plan", where, *words, "--multiple", 4, "--max", 12, "--out", file).stdout
    assert "threshold:0.6,max=12,multiple=4; *.down_proj.weight=rank:2; *.o_proj.weight=none: 12 weights" in " ".join(
        shown.split()
    )
    assert f"sarac transform {where} --plan {file} carries it out" in shown
    assert "k_proj, v_proj" in shown  # seen on the token ids that a transformers model takes
    data = json.loads(file.read_text())
    assert {entry["rank"] for entry in data["sites"].values()} <= {4, 8}
    assert told("plan", where, *words, "--multiple", 4, "--max", 12) == data
    name = "model.layers.0.mlp.down_proj.weight"
    data["sites"][name]["rank"] = 3
    (tmp_path / "edited.json").write_text(json.dumps(data))
    made = told("transform", where, "--plan", tmp_path / "edited.json", "--out", tmp_path / "m.pt")
    assert made["trainable"] == data["totals"]["trainable"] - 1
    assert told("plan", tmp_path / "m.pt")["sites"][name]["rank"] == 3
    for wrong, said in (({"rank": 17}, f"{name} rank 17, above"), ({"rnk": 2}, "'rnk'"), ({"shape": [16, 25]}, "made for")):
        entry = {**data["sites"][name], **wrong}
        (tmp_path / "edited.json").write_text(json.dumps({**data, "sites": {**data["sites"], name: entry}}))
        assert said in refused(2, "transform", where, "--plan", tmp_path / "edited.json", "--out", tmp_path / "n.pt")
    assert "leave `rule` out" in refused(2, "plan", tmp_path / "m.pt", "--rule", "rank:2")
    assert "no GLOB=RULE" in refused(2, "plan", where, "--override", "rank:3")


def test_transform_takes_overrides(folder: Path, tmp_path: Path) -> None:
    words = ("--plan", "rank:2", "--override", "*=none", "--override", "*.q_proj.weight=rank:3", "--out", tmp_path / "m.pt")
    assert told("transform", folder / "llama", *words)["trainable"] == 6


def test_diff_says_where_two_plans_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a, b = Path("a.json"), Path("b.json")
    shapes = {"x": (5, 6), "y": (5, 6), "z": (5, 6)}
    sarac.Plan({"x": Sara(2), "y": Sara(4)}, "rank:2", shapes=shapes).save(a)
    sarac.Plan({"x": Sara(2), "z": MoSara(1, sets=2)}, "by hand", ("n",), shapes=shapes).save(b)
    assert "decide the same for 2 weights" in run("plan", "diff", a, a).stdout
    shown = run("plan", "diff", a, b, status=1).stdout
    rows = {line.replace("│", " ").split()[0]: line.replace("│", " ").split()[1:] for line in shown.splitlines() if "│" in line}
    assert rows == {
        "y": ["4,", "sara", "none"],
        "z": ["none", "1,", "mosara", "sets=2"],
        "n": ["none", "whole"],
        "weights": ["2", "2"],
        "trainable": ["6", "6"],
        "rule": ["rank:2", "by", "hand"],
    }
    data = json.loads(run("plan", "diff", a, b, "--json", status=1).stdout)
    assert (data["same"], list(data["sites"])) == (False, ["y", "z"])
    assert data["sites"]["y"] == {"a": {"method": "sara", "rank": 4, "train": "singular_values", "init": "svd"}, "b": None}
    assert json.loads(run("plan", "diff", a, a, "--json").stdout)["same"] is True
    assert "cannot be read" in refused(2, "plan", "diff", a, tmp_path / "none.json")


def test_schema_is_printed_without_a_model() -> None:
    assert json.loads(run("plan", "--schema").stdout)["title"] == "A plan of sarac"
    assert "MODEL" in refused(2, "plan")


def test_model_whose_inputs_are_unknown_is_planned_without_its_dataflow(tmp_path: Path) -> None:
    t5().save_pretrained(tmp_path / "t5")  # takes token ids, and says that it wants more than these
    found: Any = told("plan", tmp_path / "t5", "--rule", "rank:2")
    assert found["siblings"] == []
    assert len(found["sites"]) > 20
