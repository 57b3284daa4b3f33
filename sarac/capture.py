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
from sarac.ir.clone import clone
from sarac.ir.errors import RewriteError, SaracWarning
from sarac.ir.graph import ModelGraph, Site, Whole, output_size, output_sizes
from sarac.ir.inputs import Inputs
from sarac.ir.layers import evaluating
from sarac.ir.match import Call, Readers, operation, readers

# What gives the values of its input in another shape or type: a linear call behind it still reads the same input.
_SAME = frozenset("t numpy_T mT transpose permute detach to _to_copy alias view reshape clone contiguous".split())


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
    try:
        module = clone(graph.module, frozen=True)  # a call may move buffers, which are the model's
    except RewriteError:
        module = graph.module
    with torch.no_grad(), evaluating(module):
        inputs.call(module)  # a model that rejects its inputs says so more clearly than a failed export
        try:
            program = torch.export.export(_Tensors(module), inputs.args, dict(inputs.kwargs), strict=False)
        except Exception as error:  # noqa: BLE001  torch.export raises many kinds
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            warnings.warn(
                f"torch.export cannot capture {type(graph.module).__name__} on {inputs.describe()} ({reason}): going on "
                "without its dataflow, from the modules alone.",
                SaracWarning,
                stacklevel=4,
            )
            return None
    return _whole(graph, program)


def _whole(graph: ModelGraph, program: torch.export.ExportedProgram) -> Whole:
    parameters = dict(graph.module.named_parameters(remove_duplicate=False))
    canonical = {name: site.name for site in graph.sites.values() for name in site.names} | {name: name for name in graph.skipped}
    lifted = {
        spec.arg.name: canonical[spec.target.removeprefix("model.")]
        for spec in program.graph_signature.input_specs
        if spec.target is not None and spec.target.removeprefix("model.") in canonical and hasattr(spec.arg, "name")
    }
    shapes = {name: tuple(parameters[name].shape) for name in dict.fromkeys(lifted.values())}
    read = readers(program.graph, shapes, lifted)
    inputs: dict[Any, list[str]] = defaultdict(list)
    calls, flops = Counter[str](), Counter[str]()
    at: dict[fx.Node, frozenset[str]] = {}
    for call in read.calls:
        sites = [graph.sites[name] for name in sorted(call.params) if name in graph.sites]
        at[call.node] = frozenset(site.name for site in sites)
        for site in sites:
            calls[site.name] += 1
            flops[site.name] += _flops(site, sites, call)
            group = inputs[_source(call.x)]
            group += [site.name] if site.name not in group else []
    siblings = tuple(tuple(group) for group in inputs.values() if len(group) > 1)
    _warn_of_disagreement(graph, read, calls)
    known = {name: how for name, (how, _) in read.indirect.items() if not how.startswith("embedding")}  # torch's own lookup
    others = {name: how for name, how in {**known, **read.others}.items() if name in graph.sites}
    flow, depths = _flow(at, program.graph)
    return Whole(program.graph, calls, siblings, flops, flow, others, depths)


def _flops(site: Site, sites: list[Site], call: Call) -> int:
    """2 · outputs · in, the outputs shared out by size where one operation has several weights; a lookup has none."""
    if operation(call.node) in ("embedding", "embedding_bag"):
        return 0
    outputs = output_size(call.node) * site.size // sum(one.size for one in sites)
    inner = site.shape[0] if _turned_over(site, call) else site.shape[1]
    return 2 * outputs * inner


def _turned_over(site: Site, call: Call) -> bool:
    """Whether the call multiplies with the transposed matrix: its outputs are then as many as there are columns."""
    value = output_sizes(call.node)
    return len(set(site.shape)) == 2 and bool(value) and value[-1] == site.shape[1] != site.shape[0]


def _warn_of_disagreement(graph: ModelGraph, read: Readers, calls: Mapping[str, int]) -> None:
    """Where the modules and the whole model say different things of a parameter, the reader must look."""
    for name, site in graph.sites.items():
        if site.uses and name not in calls and name in read.others:
            _warn(f"{name} has a linear use in its module, but in the whole model it is read by {read.others[name]} alone.")
    unknown = [name for name in graph.skipped if any(name in call.params for call in read.calls)]
    for name in unknown:
        _warn(f"{name} feeds a linear operation of the whole model, and its module did not show it: {graph.skipped[name]}.")
    unreached = [name for name, site in graph.sites.items() if site.default and name not in calls and name not in read.others]
    if unreached:
        _warn(
            f"These example inputs never reach {unreached[0]} ({len(unreached)} sites): its adapter would not train. Give inputs "
            "that do, or leave it out of `where`."
        )


def _warn(sentence: str) -> None:
    warnings.warn(sentence, SaracWarning, stacklevel=6)


def _source(x: Any) -> Any:
    """The node whose values x holds: a linear call in another shape or dtype still reads the same input."""
    while isinstance(x, fx.Node) and operation(x) in _SAME and isinstance(x.args[0], fx.Node):
        x = x.args[0]
    return x


def _flow(calls: Mapping[fx.Node, frozenset[str]], graph: fx.Graph) -> tuple[Any, dict[str, int]]:
    """The directed graph of sites, an edge where one's output reaches another's input through no third; and their depths."""
    flow = nx.DiGraph()
    flow.add_nodes_from(dict.fromkeys(name for names in calls.values() for name in sorted(names)))
    reaching: dict[fx.Node, frozenset[str]] = {}
    steps: dict[fx.Node, int] = {}
    depths: dict[str, int] = {}
    for node in graph.nodes:
        arriving = frozenset().union(*(reaching[source] for source in node.all_input_nodes))
        steps[node] = max((steps[source] for source in node.all_input_nodes), default=0)
        if node in calls:
            flow.add_edges_from((source, name) for source in arriving for name in calls[node] if source != name)
            depths |= {name: steps[node] for name in calls[node] if name not in depths}
            arriving, steps[node] = calls[node] or arriving, steps[node] + 1
        reaching[node] = arriving
    return flow, depths
