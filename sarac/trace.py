"""The front end: from any nn.Module to a ModelGraph.

Every module that owns a parameter of two or more dimensions is traced on its own with torch.fx (children stay calls), once in
train and once in eval mode; the linear nodes that read its parameters become the uses of a Site. What a trace would
freeze (optional arguments, attributes that cannot be guarded) is found out here, and such a site takes the weight form.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn

from sarac.capture import capture
from sarac.ir.errors import TraceError
from sarac.ir.graph import ModelGraph, Region, Site, Use
from sarac.ir.inputs import Inputs
from sarac.ir.layers import adapted, simple
from sarac.ir.match import Match, linear_nodes

# Modules of torch whose packed parameters are linear weights although fx cannot trace them.
_KNOWN_WEIGHTS = {nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")}
_INTERNAL = frozenset(vars(nn.Module()))
# Children by which models without `get_output_embeddings` name their output head.
_HEADS = ("lm_head", "classifier", "score", "qa_outputs", "embed_out")


@dataclass
class _Found:
    """What is known of one tensor while the modules are walked."""

    names: list[str]
    uses: list[tuple[Use, Match]] = field(default_factory=list)
    weight_form: str = ""  # why a linear node's rewrite would not be enough, or not be safe
    skipped: str = ""


def trace(model: nn.Module, example_inputs: Any = None) -> ModelGraph:
    """Find every linear weight of `model` and how it is used; with example inputs also the whole model's dataflow.

    The model is not changed. An adapted model gives the sites of its adapters.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"sarac traces a torch.nn.Module, not {type(model).__name__}: give the model itself.")
    inputs = None if example_inputs is None else Inputs.of(example_inputs)
    found = _parameters(model)
    regions: dict[str, Region] = {}
    for path, module in model.named_modules():
        if "_sara" not in module.__dict__ and _owns_matrices(module):
            region = _trace_region(path, module, found)
            if region is not None:
                regions[path] = region
    heads = {id(tensor) for tensor in _head_weights(model)}
    sites = dict(_adapted_sites(model, found))
    for key, item in found.items():
        site = None if item.names[0] in sites else _site(model, item, key in heads)
        if site is not None:
            sites[site.name] = site
    skipped = {
        item.names[0]: item.skipped or "its module is adapted already" for item in found.values() if item.names[0] not in sites
    }
    graph = ModelGraph(model, sites, regions, skipped, example_inputs=inputs)
    return graph if inputs is None else replace(graph, whole=capture(graph, inputs))


def _parameters(model: nn.Module) -> dict[int, _Found]:
    """Every parameter with two or more dimensions, by identity, with all its names; adapters' own are left out."""
    own = {
        id(tensor) for _, module, state in adapted(model) for s in state.slots.values() for tensor in s.tensors(module).values()
    }
    found: dict[int, _Found] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.ndim >= 2 and id(parameter) not in own:
            found.setdefault(id(parameter), _Found([])).names.append(name)
    return found


def _owns_matrices(module: nn.Module) -> bool:
    return any(parameter is not None and parameter.ndim >= 2 for parameter in module._parameters.values())


def _trace_region(path: str, module: nn.Module, found: Mapping[int, _Found]) -> Region | None:
    """Trace one module and note on `found` what its graphs say about its parameters; None if it cannot be traced."""
    own = {name: found[id(p)] for name, p in module._parameters.items() if p is not None and id(p) in found}
    try:
        traces = [_Trace.of(module, training) for training in (True, False)]
    except Exception as error:  # noqa: BLE001  whatever a model's forward does with proxies
        reason = f"{type(module).__name__} cannot be traced ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
        for name, item in own.items():
            _note_untraced(module, name, item, reason)
        return None
    graphs = [trace.graph for trace in traces]
    if graphs[0].python_code("self").src == graphs[1].python_code("self").src:
        graphs = graphs[:1]
    frozen = next((trace.frozen for trace in traces if trace.frozen), "")
    if "forward" in module.__dict__:
        frozen = "its forward was replaced on the instance"
    for mode, graph in zip(("train", "eval") if len(graphs) == 2 else ("both",), graphs, strict=True):
        _note_uses(path, module, mode, graph, own, frozen)
    guards = {path: value for trace in traces for path, value in trace.reads.items()}
    return Region(path, graphs[0], graphs[-1], tuple(guards.items()))


def _note_uses(path: str, module: nn.Module, mode: str, graph: fx.Graph, own: Mapping[str, _Found], frozen: str) -> None:
    matches, others = linear_nodes(graph, own)
    for match in matches:
        own[match.param].uses.append((Use(path, match.param, match.node.name, mode), match))
        if match.left:
            own[match.param].weight_form = "it multiplies from the left"
        if frozen:
            own[match.param].weight_form = f"{type(module).__name__} keeps its forward: {frozen}"
    for param, operation in others.items():
        own[param].skipped = own[param].skipped or f"read by {operation}, which is no linear operation that sarac adapts"
    for param in own:
        if not own[param].uses:
            own[param].skipped = own[param].skipped or f"{type(module).__name__}'s forward does not read it"


def _note_untraced(module: nn.Module, name: str, item: _Found, reason: str) -> None:
    known = next((names for kind, names in _KNOWN_WEIGHTS.items() if isinstance(module, kind)), ())
    if name in known:
        item.weight_form = "a packed weight that its module reads directly"
    else:
        item.weight_form, item.skipped = reason, reason


def _site(model: nn.Module, item: _Found, head: bool) -> Site | None:
    """The Site of one tensor, None where no linear use of it is known and none can be supposed."""
    path, _, param = item.names[0].rpartition(".")
    tensor = model.get_submodule(path)._parameters[param]
    assert tensor is not None
    if tensor.ndim != 2:
        item.skipped = f"a parameter of {tensor.ndim} dimensions: only matrices are adapted yet"
        return None
    if not item.uses and not item.weight_form:
        return None
    layouts = {match.transposed for _, match in item.uses}
    transposed = layouts == {True}
    if len(layouts) > 1:
        item.weight_form = "used both as it lies and transposed"
    rows, columns = tensor.shape
    embedding = any(isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding) for name in item.names)
    opt_in = not item.uses and bool(item.skipped)
    reason = (
        "the output head" if head else "shared with an embedding" if embedding else item.skipped if opt_in else item.weight_form
    )
    return Site(
        name=item.names[0],
        names=tuple(item.names),
        shape=(columns, rows) if transposed else (rows, columns),
        dtype=tensor.dtype,
        transposed=transposed,
        form="weight" if item.weight_form else "call",
        reason=reason,
        default=not (head or embedding or opt_in),
        uses=tuple(use for use, _ in item.uses),
    )


def _adapted_sites(model: nn.Module, found: Mapping[int, _Found]) -> Iterable[tuple[str, Site]]:
    for _, module, state in adapted(model):
        for slot in state.slots.values():
            tensor = module._parameters[slot.param]
            assert tensor is not None
            rows, columns = tensor.shape
            shape = (columns, rows) if slot.transposed else (rows, columns)
            yield (
                slot.site,
                Site(slot.site, tuple(found[id(tensor)].names), shape, tensor.dtype, slot.transposed, "call", "adapted"),
            )


def _head_weights(model: nn.Module) -> Iterable[Tensor]:
    """The weights of the output head, as transformers and timm name it."""
    for method in ("get_output_embeddings", "get_classifier"):
        finder = getattr(model, method, None)
        try:
            head = finder() if callable(finder) else None
        except Exception:  # noqa: BLE001  a model may define it and not implement it
            head = None
        if isinstance(head, nn.Module):
            yield from head.parameters()
    if callable(getattr(model, "save_pretrained", None)):
        for name in _HEADS:
            head = getattr(model, name, None)
            if isinstance(head, nn.Module):
                yield from head.parameters()


class _RegionTracer(fx.Tracer):
    """Traces one module's own forward: every child stays a call, parameters and buffers are read where they are used."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


@dataclass
class _Trace:
    """One trace of one module in one mode, what it read off the module on the way, and what it would freeze."""

    graph: fx.Graph
    reads: dict[tuple[str, ...], Any]
    frozen: str = ""

    @classmethod
    def of(cls, module: nn.Module, training: bool) -> "_Trace":
        notes = _Notes()
        shadow = notes.shadow(module, ())
        shadow.__dict__["training"] = training
        shadow.__dict__.pop("forward", None)
        notes.on = True
        found = cls(_RegionTracer().trace(shadow), notes.reads)
        odd = [path for path, value in notes.reads.items() if not simple(value)]
        inputs = [node for node in found.graph.nodes if node.op == "placeholder"]
        if any(name.startswith("_tensor_constant") for name in notes.writes):
            found.frozen = "it makes tensors of its own"
        elif notes.writes:
            found.frozen = f"it assigns {notes.writes[0]} while it runs"
        elif odd:
            found.frozen = f"it reads the attribute {'.'.join(odd[0])} of type {type(notes.reads[odd[0]]).__name__}"
        elif any(node.args or str(node.target).startswith("*") for node in inputs):
            found.frozen = "it takes optional arguments"
        elif any(node.op == "get_attr" and not _reachable(module, str(node.target)) for node in found.graph.nodes):
            found.frozen = "it makes tensors of its own"
        return found


@dataclass
class _Notes:
    """Every plain attribute that a forward reads or assigns, on its module and on the modules below, by path."""

    reads: dict[tuple[str, ...], Any] = field(default_factory=dict)
    writes: list[str] = field(default_factory=list)
    on: bool = False
    _made: dict[int, nn.Module] = field(default_factory=dict)

    def shadow(self, module: nn.Module, path: tuple[str, ...]) -> nn.Module:
        """A copy that shares tensors, takes notes, and whose containers can be appended to without harm."""
        if id(module) in self._made or type(type(module)) is not type:  # the latter: a compiled script
            return self._made.get(id(module), module)
        self._made[id(module)] = shadow = copy.copy(module)
        own = vars(module).items()
        shadow.__dict__ = {name: copy.copy(value) if isinstance(value, list | dict | set) else value for name, value in own}
        shadow.__dict__["_modules"] = {
            name: child if child is None else self.shadow(child, (*path, name)) for name, child in module._modules.items()
        }
        shadow.__class__ = self._recorder(type(module), path)
        return shadow

    def _recorder(self, base: Any, path: tuple[str, ...]) -> type:
        notes = self

        class Recorder(base):  # type: ignore[misc]
            def __getattribute__(self, name: str) -> Any:
                value = super().__getattribute__(name)
                mode = name == "training" and path  # a child's mode is not this region's
                if notes.on and (mode or name not in _INTERNAL) and not name.startswith("__"):
                    value_or_function = getattr(value, "__func__", value)
                    own = name in object.__getattribute__(self, "__dict__")
                    if (own or simple(value_or_function)) and not callable(getattr(nn.Module, name, None)):
                        notes.reads[*path, name] = value_or_function
                return value

            def __setattr__(self, name: str, value: Any) -> None:
                if notes.on:
                    notes.writes.append(name)
                super().__setattr__(name, value)

        return Recorder


def _reachable(module: nn.Module, target: str) -> bool:
    path, _, name = target.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        return False
    return name in owner._parameters or name in owner._buffers
