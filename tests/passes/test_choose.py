"""Choose: which sites, which method, at which rank; and every way to ask for what cannot be."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from zoo import Own, Shared, TiedHead, adapt, ids, llama, mlp, trainables

from sarac.ir.adapters import MoSara, Sara
from sarac.ir.errors import PlanError, SaracWarning, SpectrumError
from sarac.ir.gram import spectrum
from sarac.ir.pipeline import run
from sarac.ir.plan import Plan
from sarac.passes.analyze import Analyze
from sarac.passes.choose import Choose
from sarac.trace import trace


def chosen(model: nn.Module, *args: Any, **kwargs: Any) -> Plan:
    return run(trace(model), Choose(*args, **kwargs)).plan


def test_rank_follows_the_rule_with_or_without_analysis() -> None:
    model = mlp(6, 5, 4)
    plan = chosen(model, "threshold:0.6")
    assert plan.sites == {name: Sara(spectrum(model.get_parameter(name)).rank_at(0.6)) for name in ("0.weight", "2.weight")}
    assert run(trace(model), Analyze(0.2), Choose("threshold:0.6")).plan == plan
    assert plan.rule == "threshold:0.6"
    assert chosen(model, "threshold:0.99") != plan


def test_options_reach_the_method() -> None:
    model = mlp(6, 5)
    assert chosen(model, "rank:2,train=factors,init=random").sites["0.weight"] == Sara(2, "factors", "random")
    wanted = MoSara(2, sets=3, router="topk:2", bottleneck=1)
    assert chosen(model, "rank:2,sets=3,router=topk:2,bottleneck=1", method="mosara").sites["0.weight"] == wanted


def test_default_leaves_out_the_head_and_embeddings() -> None:
    graph = trace(llama())
    taken = set(chosen(graph.module).sites)
    assert len(taken) == 14
    assert not [name for name in taken if "embed" in name or "lm_head" in name]
    head = next(site for site in graph.sites.values() if "lm_head.weight" in site.names)
    assert (head.default, head.reason) == (False, "the output head")
    assert set(chosen(graph.module, where="lm_head.weight").sites) == {head.name}
    tied = trace(TiedHead(8)).site("head.weight")
    assert (tied.default, tied.reason) == (False, "shared with an embedding")


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("0.*", ["0.weight"]),
        (["2.weight", "0.weight"], ["0.weight", "2.weight"]),
        ("*", ["0.weight", "2.weight", "4.weight"]),
        (lambda site: site.shape[0] == 5, ["0.weight"]),
    ],
)
def test_where_takes_globs_and_predicates(where: Any, expected: list[str]) -> None:
    assert sorted(chosen(mlp(6, 5, 4, 3), where=where).sites) == expected


def test_where_knows_every_name_of_a_shared_weight() -> None:
    assert list(chosen(Shared(4), where="second.*").sites) == ["first.weight"]


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (
            "model.layers.*.mlp.gate.weight",
            r"'model\.layers\.\*\.mlp\.gate\.weight' in `where` matches no weight\. Near names: .*gate_proj",
        ),
        (["*q_proj*", "nope"], "'nope' in `where` matches no weight"),
        ([], "`where` takes none of the 15 linear sites, for example"),
        (lambda site: False, "`where` takes none of the 15 linear sites"),
    ],
)
def test_where_that_takes_nothing_is_told(where: Any, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        chosen(llama(), where=where)


def test_also_train_takes_globs() -> None:
    model = mlp(6, 5, 4)
    assert chosen(model, also_train="*.bias").also_train == ("0.bias", "2.bias")
    assert chosen(model, where="0.weight", also_train=["2.*", "*.bias"]).also_train == ("0.bias", "2.weight", "2.bias")
    with pytest.raises(PlanError, match=r"'norm\.\*' in `also_train` matches no"):
        chosen(model, also_train="norm.*")
    with pytest.raises(PlanError, match=r"0\.weight would be both adapted and trained whole"):
        chosen(model, also_train="0.*")


def test_model_without_linear_weights_is_told() -> None:
    for model in (nn.Sequential(nn.ReLU()), nn.LayerNorm(4), nn.Embedding(4, 4, max_norm=1.0)):
        with pytest.raises(
            PlanError, match=rf"{type(model).__name__} has no linear weight that sarac can adapt\..* sarac\.analyze"
        ):
            chosen(model)


def test_weight_of_zeros_is_left_out_or_told() -> None:
    model = mlp(6, 5, 4)
    nn.init.zeros_(model[2].weight)
    with pytest.warns(SaracWarning, match=r"2\.weight is all zeros.* Left out: 1 such"):
        assert list(chosen(model).sites) == ["0.weight"]
    for asked in ({"where": "2.weight"}, {"plan": Plan({"2.weight": Sara(2)})}):
        with pytest.raises(PlanError, match=r"2\.weight is all zeros: it has no singular directions to train"):
            chosen(model, **asked)
    nn.init.zeros_(model[0].weight)
    with pytest.raises(PlanError, match=r"0\.weight is all zeros"):
        chosen(model)


def test_weight_of_one_number_is_adapted() -> None:
    model = nn.Linear(1, 1)
    assert chosen(model).sites == {"weight": Sara(1)}
    assert trainables(adapt(model)) == {"sara_shift"}


def test_nan_in_a_chosen_weight_is_named() -> None:
    model = mlp(6, 5, 4)
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(SpectrumError, match=r"0\.weight contains NaN"):
        chosen(model)
    assert list(chosen(model, where="2.weight").sites) == ["2.weight"]


@pytest.mark.parametrize(
    ("plan", "method", "said"),
    [
        ("threshold:1.5", "sara", r"\(0, 1\]; 1\.5 is not"),
        ("rank:99", "sara", r"rank:99 is above min\(out, in\) of every weight; the largest is 5"),
        ("rank:2", "lora", "'lora' is unknown"),
        ("rank:2,sets=3", "sara", "sara has no option 'sets'"),
        ("rank:2,router=topk:9", "mosara", "router=topk:9"),
        ("budget:1", "sara", "budget of 1 numbers fits nothing: the least that this plan trains is 2"),
        ("nowhere.json", "sara", r"nowhere\.json cannot be read"),
        (Path("nowhere"), "sara", "nowhere cannot be read"),
        (Plan({"0.wait": Sara(1)}), "sara", r"'0\.wait', which the model does not have as a linear site\. Near names: 0\.weight"),
        (Plan({"0.weight": Sara(6)}), "sara", r"gives 0\.weight rank 6, above min\(out, in\) = 5 of its shape \(5, 6\)"),
        (Plan({"0.weight": Sara(1)}, also_train=("nope",)), "sara", "nope"),
        (Plan({"0.weight": Sara(1)}, also_train=("0.weight",)), "sara", r"0\.weight would be both adapted and trained whole"),
    ],
)
def test_plan_that_does_not_fit_is_told(plan: Any, method: str, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        chosen(mlp(6, 5, 4), plan, method)


def test_finished_plan_is_taken_as_it_is(tmp_path: Path) -> None:
    plan = Plan({"2.weight": MoSara(3), "0.weight": Sara(1)}, "by hand", ("0.bias",))
    assert chosen(mlp(6, 5, 4), plan) == plan
    plan.save(tmp_path / "p.json")
    assert chosen(mlp(6, 5, 4), tmp_path / "p.json") == chosen(mlp(6, 5, 4), str(tmp_path / "p.json")) == plan
    assert chosen(mlp(6, 5, 4), plan, also_train="2.bias").also_train == ("0.bias", "2.bias")
    with pytest.raises(PlanError, match="A finished plan names its sites itself"):
        chosen(mlp(6, 5, 4), plan, where="0.*")


def test_budget_is_counted_in_what_trains() -> None:
    model = mlp(30, 20, 10)
    for plan, method, most in (("budget:25", "sara", 25), ("budget:25%", "sara", 222), ("budget:100", "mosara", 100)):
        adapted = adapt(model, plan, method=method)
        count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert 0 < count <= most
        assert count > most // 2 or method == "sara"


def test_routed_adapter_needs_a_call() -> None:
    with pytest.raises(PlanError, match=r"w cannot carry a routed adapter, .*computed from it\. Use method=\"sara\""):
        chosen(Own("sliced", 5, 6), method="mosara")
    assert chosen(Own("sliced", 5, 6), "rank:2,router=uniform", method="mosara").sites == {"w": MoSara(2, router="uniform")}
    assert torch.is_tensor(adapt(Own("sliced", 5, 6)).w)


# Overrides.


def test_last_override_that_matches_holds() -> None:
    model = llama()
    plain = chosen(model, "rank:2")
    overrides = {"*.0.*": "rank:5", "*.down_proj.weight": "threshold:0.3", "*.1.*.o_proj.weight": "none"}
    plan = chosen(model, "rank:2", overrides=overrides)
    down = "model.layers.0.mlp.down_proj.weight"
    assert plan.sites[down] == Sara(spectrum(model.get_parameter(down)).rank_at(0.3)) != Sara(5)
    assert {name for name, adapter in plan.sites.items() if adapter == Sara(5)} == {
        name for name in plan.sites if ".0." in name and name != down
    }
    assert set(plain.sites) - set(plan.sites) == {"model.layers.1.self_attn.o_proj.weight"}
    text = "rank:2; *.0.*=rank:5; *.down_proj.weight=threshold:0.3; *.1.*.o_proj.weight=none"
    assert plan.rule == text
    assert chosen(model, text) == plan != chosen(model, f"{text}; *.0.*=rank:5")


def test_override_may_have_a_method_of_its_own() -> None:
    plan = chosen(mlp(6, 5, 4), "rank:2,train=factors", overrides={"0.*": "rank:3,method=mosara,sets=2"})
    assert plan.sites == {"0.weight": MoSara(3, sets=2), "2.weight": Sara(2, "factors")}


def test_budget_counts_what_overrides_fixed_first() -> None:
    model = llama()
    plan = chosen(model, "budget:80", overrides={"*.o_proj.weight": "rank:9", "*.down_proj.weight": "budget:20"})
    spent = {kind: sum(a.rank for name, a in plan.sites.items() if kind in name) for kind in ("o_proj", "down_proj", "")}
    assert (spent["o_proj"], spent[""] <= 80, spent["down_proj"] <= 20) == (18, True, True)
    rest = {name: a for name, a in plan.sites.items() if "o_proj" not in name and "down_proj" not in name}
    left = 80 - spent["o_proj"] - spent["down_proj"]
    assert rest == chosen(model, f"budget:{left}", where=list(rest)).sites != chosen(model, "budget:80", where=list(rest)).sites
    assert plan.note.startswith("*.down_proj.weight: threshold:")
    with pytest.raises(PlanError, match=r"fits nothing: .* is 30\. Overrides and also_train alone take 18"):
        chosen(model, "budget:29", overrides={"*.o_proj.weight": "rank:9"})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"*.o_projj.weight": "none"}, "'.*o_projj.*' in `overrides` matches no weight. Near names"),
        ({"lm_head.weight": "rank:2"}, "none of the weights that are taken, only such as lm_head.weight"),
        ({"*": "none"}, "leave none of the 14 weights"),
        ({"*": "rank:2,sets=3"}, "sara has no option 'sets'"),
    ],
)
def test_override_that_does_not_fit_is_told(overrides: dict[str, str], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        chosen(llama(), "rank:2", overrides=overrides)
    with pytest.raises(PlanError, match="A finished plan names its ranks itself"):
        chosen(mlp(6, 4), Plan({"0.weight": Sara(1)}), overrides=overrides)


def test_uniform_spends_no_more_than_what_it_is_like() -> None:
    model = llama()
    like, uniform = (chosen(model, rule) for rule in ("threshold:0.6", "uniform:like=threshold:0.6"))
    counts = [sum(plan.trainable.values()) for plan in (like, uniform)]
    assert counts[1] <= counts[0] < counts[1] + 14
    (rank,) = {adapter.rank for adapter in uniform.sites.values()}
    assert (
        uniform.note == f"rank {rank} everywhere; {counts[0] - counts[1]} of the {counts[0]} numbers of threshold:0.6 left over"
    )


# Siblings.


def test_siblings_come_from_the_dataflow() -> None:
    model, x = llama(), ids()
    plan = run(trace(model, x), Choose("rank:2", where=["*.q_proj.*", "*.v_proj.*", "*.o_proj.*"])).plan
    pairs = [tuple(f"model.layers.{i}.self_attn.{kind}_proj.weight" for kind in "qv") for i in range(2)]
    assert plan.siblings == tuple(pairs)
    assert chosen(model, "rank:2").siblings == ()
    assert run(trace(model), Choose(plan)).plan.siblings == plan.siblings


def test_router_scope_needs_siblings_that_are_known() -> None:
    rule, x = "rank:2,router_scope=group", ids()
    with pytest.raises(PlanError, match=r"which weights read one input: give example_inputs \(--input\)"):
        chosen(llama(), rule, "mosara")
    with pytest.raises(PlanError, match="no two of these weights that read one input: leave it out"):
        run(trace(mlp(6, 5, 4), torch.ones(2, 6)), Choose(rule, "mosara"))
    assert set(chosen(llama(), f"{rule},router=uniform", "mosara").sites.values()) == {
        MoSara(2, router="uniform", router_scope="group")
    }
    plan = run(
        trace(llama(), x), Choose(rule, "mosara", overrides={"*.1.*": "rank:3,sets=2", "*.0.*.v_proj.*": "rank:3,sets=2"})
    ).plan
    shared = {name.removeprefix("model.layers."): a.router_of.removeprefix("model.layers.") for name, a in plan.sites.items()}
    assert {name: of for name, of in shared.items() if of} == {  # v's router has other sets than q's
        "0.self_attn.k_proj.weight": "0.self_attn.q_proj.weight",
        "0.mlp.up_proj.weight": "0.mlp.gate_proj.weight",
        "1.self_attn.k_proj.weight": "1.self_attn.q_proj.weight",
        "1.self_attn.v_proj.weight": "1.self_attn.q_proj.weight",
        "1.mlp.up_proj.weight": "1.mlp.gate_proj.weight",
    }


def test_shared_router_is_paid_once() -> None:
    graph = trace(llama(), ids())
    alone, shared = (run(graph, Choose(f"budget:400,router_scope={scope}", "mosara")).plan for scope in ("site", "group"))
    assert sum(shared.trainable.values()) <= 400 < sum(alone.trainable.values()) + 100
    assert sum(a.rank for a in shared.sites.values()) > sum(a.rank for a in alone.sites.values())
