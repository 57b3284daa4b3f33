"""Rewrite: an exact no-op at first, on every way to write a linear operation; then what trains, and nothing else."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from zoo import (
    CALLS,
    Own,
    Shared,
    TiedHead,
    Twice,
    adapt,
    close,
    differ,
    folded,
    ids,
    mlp,
    outputs,
    roles,
    same,
    shake,
    trainables,
)

from sarac.ir.adapters import Sara
from sarac.ir.errors import CheckFailed, PlanError, RewriteError
from sarac.ir.graph import fact
from sarac.ir.layers import adapted
from sarac.ir.pipeline import run
from sarac.ir.plan import Plan
from sarac.passes.analyze import Analyze
from sarac.passes.choose import Choose
from sarac.passes.fold import Fold
from sarac.passes.rewrite import Rewrite
from sarac.trace import trace


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("out", [5, 6])
@pytest.mark.parametrize("call", CALLS)
def test_every_linear_call_is_rewritten_right(call: str, out: int, training: bool) -> None:
    model, x = Own(call, out, 6).train(training), torch.randn(8, 6)
    site = trace(model).sites["w"]
    stored = (6, out) if CALLS[call].transposed and CALLS[call].form == "weight" else (out, 6)
    assert (site.shape, site.form) == (stored, CALLS[call].form)
    assert site.transposed is (CALLS[call].transposed and site.form == "call")
    model_adapted = adapt(model, "rank:3")
    same(outputs(model_adapted, x), outputs(model, x))
    assert trainables(model_adapted) == {"w_sara_shift"}
    shake(model_adapted)
    merged = folded(model_adapted)
    close(outputs(merged, x), outputs(model_adapted, x))
    differ(outputs(model_adapted, x), outputs(model, x))
    close(model_adapted.w, merged.w)
    assert type(merged) is Own


@pytest.mark.parametrize("call", [name for name, call in CALLS.items() if call.form == "call"])
def test_linear_calls_use_the_factors_and_not_the_product(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = shake(adapt(Own(call, 5, 6).eval())), torch.randn(8, 6)
    expected = outputs(model, x)
    monkeypatch.setattr("sarac.ir.weight.effective", None)
    same(outputs(model, x), expected)


def test_permute_that_permutes_nothing_is_no_transpose() -> None:
    class Permuted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w.permute(0, 1)

    model, x = adapt(Permuted()), torch.randn(3, 6)
    shake(model)
    close(x @ model.w, model(x))
    close(folded(model, checked=False)(x), model(x))


def test_weight_used_twice_gets_one_adapter() -> None:
    model, x = Twice(5, 6), torch.randn(8, 6)
    model_adapted = adapt(model)
    assert trainables(model_adapted) == {"w_sara_shift"}
    same(model_adapted(x), model(x))
    shake(model_adapted)
    close(torch.tanh(x @ model_adapted.w.T) @ model_adapted.w, model_adapted(x))
    close(folded(model_adapted)(x), model_adapted(x))
    differ(model_adapted(x), model(x))


def test_weight_of_two_modules_gets_one_adapter() -> None:
    model, x = Shared(4), torch.randn(8, 4)
    model_adapted = adapt(model)
    assert roles(model_adapted) == {"first.weight": ("second.sara_shift",)}
    assert trainables(model_adapted) == {"first.sara_shift"}
    assert model_adapted.first.sara_shift is model_adapted.second.sara_shift
    same(model_adapted(x), model(x))
    shake(model_adapted)
    merged = folded(model_adapted)
    assert merged.first.weight is merged.second.weight
    close(merged(x), model_adapted(x))
    differ(model_adapted(x), model(x))


def test_tied_head_moves_with_its_embedding() -> None:
    model, tokens = TiedHead(8), ids()
    model_adapted = adapt(model, where="*")
    same(model_adapted(tokens), model(tokens))
    shake(model_adapted)
    merged = folded(model_adapted)
    assert merged.head.weight is merged.embed.weight
    close(merged(tokens), model_adapted(tokens))
    close(model_adapted.embed(tokens), merged.embed(tokens))
    differ(model_adapted.embed(tokens), model.embed(tokens))
    model_adapted(tokens).sum().backward()
    assert (model_adapted.embed.sara_shift.grad != 0).all()


def test_layers_of_one_kind_share_a_class_and_others_do_not() -> None:
    model = adapt(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)))
    assert type(model[0]) is type(model[1])
    assert isinstance(model[2], nn.Linear)
    functions = nn.Sequential(Own("at", 6, 6), Own("at_T", 6, 6))
    same(outputs(adapt(functions), torch.ones(2, 6)), outputs(functions, torch.ones(2, 6)))


def test_facts_stay_on_the_base_call_of_the_rewritten_graph() -> None:
    graph = run(trace(mlp(6, 5)), Analyze(0.6), Choose(), Rewrite())
    region = graph.regions["0"]
    known = [node for node in region.train.nodes if fact(node)]
    assert [fact(node)["site"] for node in known] == ["0.weight"]
    reads = [node.target for node in region.train.nodes if node.op == "get_attr"]
    assert set(reads) == {"weight_base", "bias", "sara_u", "sara_v", "sara_scale", "sara_shift", "sara_schedule", "sara_siblings"}


def test_graph_that_was_given_is_not_rewritten() -> None:
    graph = run(trace(mlp(6, 5)), Choose())
    before = str(graph.regions["0"].train)
    result = run(graph, Rewrite())
    assert str(graph.regions["0"].train) == before != str(result.regions["0"].train)
    assert not list(adapted(graph.module))


def test_start_depends_on_seed_and_name_alone() -> None:
    model, plan = mlp(6, 5, 4), "rank:2,train=factors,init=random"
    both, one, other = (adapt(model, plan, **kw) for kw in ({}, {"where": "2.weight"}, {"seed": 1}))
    assert torch.equal(both[2].sara_u, one[2].sara_u)
    assert not torch.equal(both[2].sara_u, other[2].sara_u)
    twin = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    twin = adapt(twin, plan)
    assert not torch.equal(twin[0].sara_u, twin[1].sara_u)


def test_start_that_changes_the_last_bits_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    start = Sara.init
    monkeypatch.setattr(Sara, "init", lambda *args: {**start(*args), "shift": torch.full((3,), 1e-6)})
    with pytest.raises(CheckFailed, match="before and after Rewrite must be bit-exact"):
        adapt(nn.Linear(6, 5), "rank:3")
    adapt(nn.Linear(6, 5), "rank:3", checked=False)


def test_transforming_twice_is_refused() -> None:
    model = adapt(mlp(6, 5))
    with pytest.raises(RewriteError, match=r"already transformed: fold it first \(sarac\.fold\)"):
        adapt(model)
    adapt(folded(model))


def test_without_a_plan_there_is_nothing_to_do() -> None:
    for graph in (trace(mlp(6, 5)), replace(trace(mlp(6, 5)), plan=Plan({}))):
        with pytest.raises(PlanError, match="The plan holds no weight to adapt"):
            run(graph, Rewrite())


def test_model_of_one_layer_is_adapted_at_its_root() -> None:
    model, x = nn.Linear(6, 5), torch.randn(3, 6)
    graph = run(trace(model), Choose(Plan({"weight": Sara(2)})), Rewrite(), Analyze(), check=True)
    assert isinstance(graph.module, nn.Linear)
    same(graph.module(x), model(x))
    assert type(run(trace(shake(graph.module)), Fold()).module) is nn.Linear


def test_lstm_weight_that_is_asked_for_moves_the_output() -> None:
    model, x = nn.LSTM(6, 5), torch.randn(4, 2, 6)
    assert trace(model).sites["weight_ih_l0"].default
    model_adapted = adapt(model, "rank:3", where="weight_ih_l0")
    same(outputs(model_adapted, x), outputs(model, x))
    shake(model_adapted)
    differ(outputs(model_adapted, x)[0], outputs(model, x)[0])
    close(outputs(folded(model_adapted), x), outputs(model_adapted, x))
