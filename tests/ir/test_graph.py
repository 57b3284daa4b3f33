"""Site and ModelGraph: names, facts on nodes, and owners of a weight."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch import nn
from zoo import Shared, Twice, llama, mlp

from sarac.ir.errors import TraceError
from sarac.ir.gram import spectrum
from sarac.ir.graph import META, fact, owners
from sarac.ir.layout import TRANSPOSED
from sarac.ir.pipeline import run
from sarac.passes.analyze import Analyze
from sarac.trace import trace


@pytest.mark.parametrize(
    ("name", "kind", "depth"),
    [
        ("model.layers.12.mlp.up.weight", "model.layers.*.mlp.up.weight", 12),
        ("0.weight", "0.weight", 0),
        ("h.3.experts.7.w1", "h.*.experts.*.w1", 3),
        ("lm_head.weight", "lm_head.weight", None),
        ("conv2d.weight", "conv2d.weight", None),
    ],
)
def test_kind_and_depth_are_read_from_the_name(name: str, kind: str, depth: int | None) -> None:
    site = replace(next(iter(trace(nn.Linear(2, 2)).sites.values())), name=name)
    assert (site.kind, site.depth) == (kind, depth)


def test_site_is_found_by_any_of_its_names() -> None:
    graph = trace(Shared(4))
    assert list(graph.sites) == ["first.weight"]
    assert graph.site("second.weight") is graph.site("first.weight")
    with pytest.raises(TraceError, match=r"no linear site 'second\.wait'\. Near names: first\.weight"):
        graph.site("second.wait")


def test_weight_is_out_by_in_whatever_its_layout() -> None:
    model = nn.Linear(6, 5)
    graph = trace(model)
    assert torch.equal(graph.weight(graph.site("weight")), model.weight)
    flipped = replace(graph.site("weight"), layout=TRANSPOSED)
    assert torch.equal(graph.weight(flipped), model.weight.T)
    assert not graph.weight(flipped).requires_grad


def test_facts_are_mirrored_to_every_node_of_the_weight() -> None:
    graph = run(trace(Twice(5, 6)), Analyze(0.5))
    site = graph.site("w")
    found = [fact(node) for node in graph.nodes(site)]
    expected = {"site": "w", "shape": (5, 6), "threshold": 0.5, "rank": spectrum(graph.weight(site)).rank_at(0.5)}
    assert found == [expected, expected]


def test_facts_do_not_reach_the_graph_they_were_computed_from() -> None:
    before = trace(mlp(6, 5, 4))
    after = run(before, Analyze())
    for graph, known in ((before, False), (after, True)):
        for site in graph.sites.values():
            assert (site.spectrum is not None) is known
            assert [fact(node) is not None for node in graph.nodes(site)] == [known]


def test_only_linear_nodes_have_facts() -> None:
    graph = run(trace(Twice(5, 6)), Analyze())
    nodes = [node for region in graph.regions.values() for each in region.graphs().values() for node in each.nodes]
    known = [node for node in nodes if META in node.meta]
    assert len(known) == 2 < len(nodes)
    assert all(fact(node) is None for node in nodes if node not in known)


def test_values_are_frozen() -> None:
    graph = trace(nn.Linear(2, 2))
    for value, name in ((graph, "sites"), (graph.site("weight"), "name"), (graph.regions[""], "train")):
        with pytest.raises(FrozenInstanceError):
            setattr(value, name, None)


def test_owners_are_each_named_once() -> None:
    model = Shared(4)
    model.third = model.first
    found = owners(model, trace(model).site("first.weight").names)
    assert [(owner, param) for owner, param, _ in found] == [(model.first, "weight"), (model.second, "weight")]
    assert [path for _, _, path in found] == ["first", "second"]


def test_sites_of_a_deep_model_share_their_kind() -> None:
    graph = trace(llama())
    layers = [site for site in graph.sites.values() if site.default]
    assert len(layers) == 14
    assert len({site.kind for site in layers}) == 7
    assert {site.depth for site in layers} == {0, 1}
