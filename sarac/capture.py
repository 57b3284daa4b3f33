"""The whole model as one graph, from torch.export: which weights really feed linear operations, how often, on what.

The capture only tells; nothing runs from it (it freezes the mode and the class). Its graph is not decomposed, so that a linear
layer is still one node.
"""

import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx, nn

from sarac.ir.check import leaves
from sarac.ir.errors import SaracWarning
from sarac.ir.graph import ModelGraph, Whole, output_size
from sarac.ir.inputs import Inputs
from sarac.ir.layers import evaluating

_LINEAR = {"linear": (0, 1), "addmm": (1, 2), "matmul": (0, 1), "mm": (0, 1), "bmm": (0, 1)}  # where x and W stand
_PASSES_ON = {
    "t",
    "numpy_T",
    "mT",
    "transpose",
    "permute",
    "detach",
    "to",
    "_to_copy",
    "alias",
    "view",
    "reshape",
    "clone",
}


class _Tensors(nn.Module):
    """Gives a model's output tensors alone: a cache among the outputs is of no type that torch.export knows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        return [tensor for _, tensor in leaves(self.model(*args, **kwargs))]


def capture(graph: ModelGraph, inputs: Inputs) -> Whole | None:
    """The dataflow of `graph.module` on `inputs`, in eval mode: calls, FLOPs and siblings by site name.

    None, with a warning, where torch.export cannot capture the model: the sites do not depend on it.
    """
    with torch.no_grad(), evaluating(graph.module):
        inputs.call(graph.module)  # a model that rejects its inputs says so more clearly than a failed export
        try:
            program = torch.export.export(_Tensors(graph.module), inputs.args, dict(inputs.kwargs), strict=False)
        except Exception as error:  # noqa: BLE001  torch.export raises many kinds
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            warnings.warn(
                f"torch.export cannot capture {type(graph.module).__name__} on {inputs.describe()} ({reason}): going on "
                "without its dataflow, from the modules alone.",
                SaracWarning,
                stacklevel=4,
            )
            return None
    names = {f"model.{name}": site.name for site in graph.sites.values() for name in site.names}
    weights = {
        spec.arg.name: names[spec.target]
        for spec in program.graph_signature.input_specs
        if spec.target in names and hasattr(spec.arg, "name")
    }
    calls = _calls(program.graph, weights)
    readers: dict[fx.Node, list[str]] = defaultdict(list)
    for _, site, x in calls:
        if site not in readers[x]:
            readers[x].append(site)
    flops: Counter[str] = Counter()
    for node, site, _ in calls:
        flops[site] += 2 * output_size(node) * graph.sites[site].shape[1]
    siblings = tuple(tuple(group) for group in readers.values() if len(group) > 1)
    flow = _flow({node: site for node, site, _ in calls}, program.graph)
    return Whole(program.graph, Counter(site for _, site, _ in calls), siblings, flops, flow)


def _calls(graph: fx.Graph, weights: Mapping[str, str]) -> list[tuple[fx.Node, str, fx.Node]]:
    """Every linear node over a known weight, with the site's name and the node that x comes from."""
    carries = {node: weights[node.name] for node in graph.nodes if node.op == "placeholder" and node.name in weights}
    found = []
    for node in graph.nodes:
        name = _operator(node)
        if name in _PASSES_ON and node.args and node.args[0] in carries:
            carries[node] = carries[node.args[0]]
        elif name in _LINEAR:
            x, weight = (node.args[i] for i in _LINEAR[name])
            if weight in carries and isinstance(x, fx.Node):
                found.append((node, carries[weight], _source(x)))
    return found


def _source(x: fx.Node) -> fx.Node:
    """The node whose values x holds: a linear call in another shape or dtype still reads the same input."""
    while _operator(x) in _PASSES_ON and isinstance(x.args[0], fx.Node):
        x = x.args[0]
    return x


def _flow(calls: Mapping[fx.Node, str], graph: fx.Graph) -> Any:
    """The directed graph of sites: an edge where one's output reaches another's input through no third site."""
    flow = nx.DiGraph()
    flow.add_nodes_from(dict.fromkeys(calls.values()))
    reaching: dict[fx.Node, frozenset[str]] = {}
    for node in graph.nodes:
        arriving = frozenset().union(*(reaching[source] for source in node.all_input_nodes))
        if node in calls:
            flow.add_edges_from((source, calls[node]) for source in arriving)
            arriving = frozenset([calls[node]])
        reaching[node] = arriving
    return flow


def _operator(node: fx.Node) -> str:
    return str(getattr(node.target, "_opname", "")) if node.op == "call_function" else ""
