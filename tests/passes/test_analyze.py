"""Analyze: spectra on the sites, ranks in node.meta."""

import math

import pytest
import torch
from torch import nn
from zoo import Own, Shared, mlp, require_untouched, snapshot

from sarac.ir.errors import PlanError, SpectrumError
from sarac.ir.gram import spectrum
from sarac.ir.graph import fact
from sarac.ir.pipeline import run
from sarac.passes.analyze import Analyze
from sarac.trace import trace


def ranks(graph) -> set[int]:
    return {fact(node)["rank"] for site in graph.sites.values() for node in graph.nodes(site)}


def test_every_site_gets_its_spectrum_and_its_nodes_the_rank() -> None:
    model = mlp(6, 5, 4)
    graph = run(trace(model), Analyze(0.5))
    for name, weight in (("0.weight", model[0].weight), ("2.weight", model[2].weight)):
        assert torch.equal(graph.sites[name].spectrum.values, spectrum(weight).values)
        (node,) = graph.nodes(graph.sites[name])
        assert fact(node)["rank"] == spectrum(weight).rank_at(0.5)


def test_train_and_eval_graphs_both_carry_the_rank() -> None:
    graph = run(trace(Own("at", 5, 6)), Analyze(0.6))
    nodes = list(graph.nodes(graph.sites["w"]))
    assert len(nodes) == 2 == len(graph.regions[""].graphs())
    assert all(fact(node)["site"] == "w" for node in nodes)


def test_another_threshold_gives_other_facts_and_keeps_the_spectra() -> None:
    low = run(trace(nn.Linear(9, 9)), Analyze(0.2))
    high = run(low, Analyze(0.9))
    assert high.sites["weight"].spectrum is low.sites["weight"].spectrum
    assert max(ranks(low)) < min(ranks(high))


def test_names_limit_the_work_and_progress_tells_it() -> None:
    told: list[str] = []
    graph = run(trace(mlp(6, 5, 4)), Analyze(names=frozenset(["2.weight"]), progress=told.append))
    assert told == ["2.weight"]
    assert [name for name, site in graph.sites.items() if site.spectrum] == ["2.weight"]
    run(graph, Analyze(progress=told.append))
    assert told == ["2.weight", "0.weight"]


def test_shared_weight_is_measured_once() -> None:
    told: list[str] = []
    graph = run(trace(Shared(4)), Analyze(progress=told.append))
    assert told == ["first.weight"]
    assert len(list(graph.nodes(graph.sites["first.weight"]))) == 2


@pytest.mark.parametrize(("value", "said"), [(math.nan, "NaN"), (math.inf, "Inf")])
def test_weight_with_nan_or_inf_is_named(value: float, said: str) -> None:
    model = mlp(6, 5, 4)
    model[2].weight.data[1, 2] = value
    with pytest.raises(SpectrumError, match=rf"^2\.weight contains {said}: .* Mend the checkpoint"):
        run(trace(model), Analyze())
    run(trace(model), Analyze(names=frozenset(["0.weight"])))


def test_meta_weight_is_named() -> None:
    with pytest.raises(SpectrumError, match=r"^0\.weight lies on the meta device .* load the model's weights first"):
        run(trace(mlp(6, 5).to("meta")), Analyze())


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.1, math.nan])
def test_threshold_outside_its_range_is_refused(threshold: float) -> None:
    with pytest.raises(PlanError, match=r"\(0, 1\]"):
        run(trace(mlp(6, 5)), Analyze(threshold))


def test_model_is_only_read() -> None:
    model = mlp(6, 5, 4)
    before = snapshot(model)
    run(trace(model, torch.ones(2, 6)), Analyze())
    require_untouched(model, before)
