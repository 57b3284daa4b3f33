"""The front end: from any nn.Module to a ModelGraph.

Every module that owns a parameter of two or more dimensions is traced on its own with torch.fx (children stay calls), once in
train and once in eval mode; the linear nodes that read its parameters become the uses of a Site. What a trace would
freeze (optional arguments, attributes that cannot be guarded) is found out here, and such a site takes the weight form.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import ParametrizationList

from sarac.capture import capture
from sarac.ir.errors import TraceError
from sarac.ir.graph import ModelGraph, Region, Site, Use
from sarac.ir.inputs import Inputs
from sarac.ir.layers import adapted, hooked
from sarac.ir.layout import Layout, kernel, matrices
from sarac.ir.match import Match, readers
from sarac.ir.terms import EMBEDDING
from sarac.known import holds_only, known_weights, parameters_kept, read_from_outside, untraced_weights
from sarac.regions import ForwardTrace

# Children by which models without `get_output_embeddings` name their output head.
_HEADS = ("lm_head", "classifier", "score", "qa_outputs", "embed_out")


@dataclass
class _Found:
    """What is known of one tensor while the modules are walked."""

    names: list[str]
    shape: tuple[int, ...]
    dtype: torch.dtype
    uses: list[tuple[Use, Match]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # what else reads it
    weight_form: str = ""  # why a linear node's rewrite would not be enough, or not be safe
    layout: Layout | None = None  # where no match tells it
    skipped: str = ""
    opt_in: str = ""  # why the default `where` leaves it out
    barred: str = ""  # why no adapter can be right on it


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
        read_by_others = isinstance(module, ParametrizationList | nn.ModuleList | nn.ModuleDict) or holds_only(module)
        if "_sara" not in module.__dict__ and _own_matrices(module) and not read_by_others:
            region = _trace_region(path, module, found)
            if region is not None:
                regions[path] = region
    heads = {id(tensor) for tensor in _head_weights(model)}
    sites = dict(_adapted_sites(model, found))
    for key, item in found.items():
        site = None if item.names[0] in sites else _site(item, key in heads)
        if site is not None:
            sites[site.name] = site
    skipped = {
        item.names[0]: item.skipped or "its module is adapted already" for item in found.values() if item.names[0] not in sites
    }
    graph = ModelGraph(model, sites, regions, skipped, example_inputs=inputs)
    if inputs is None:
        return graph
    whole = capture(graph, inputs)
    known = {} if whole is None else whole.others
    for name, operation in known.items():  # the modules alone do not show who reads a weight from outside
        if sites[name].form == "call":
            sites[name] = replace(sites[name], others=tuple(dict.fromkeys((*sites[name].others, operation))))
    return replace(graph, whole=whole)


def _parameters(model: nn.Module) -> dict[int, _Found]:
    """Every parameter with two or more dimensions, by identity, with all its names; adapters' own are left out."""
    own = {
        id(tensor) for _, module, state in adapted(model) for s in state.slots.values() for tensor in s.tensors(module).values()
    }
    found: dict[int, _Found] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.ndim >= 2 and id(parameter) not in own:
            found.setdefault(id(parameter), _Found([], tuple(parameter.shape), parameter.dtype)).names.append(name)
            if parameter.is_complex() or parameter.numel() == 0:
                found[id(parameter)].barred = "it has no values" if parameter.numel() == 0 else "it is complex"
    for path, module in model.named_modules():
        for name, kept in parameters_kept(module):
            if id(kept) in found:
                found[id(kept)].barred = f"{f'{path}.{name}'.lstrip('.')} keeps the parameter itself, where no adapter reaches it"
    return found


def _own_matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of two or more dimensions that a module's own forward reads: also those of children without a forward."""
    own: dict[str, Any] = {**module._parameters, **_held(module)}
    return {name: parameter for name, parameter in own.items() if parameter is not None and parameter.ndim >= 2}


def _held(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of children without a forward, also of those in lists and dicts of modules, by their names in `module`."""
    held: dict[str, nn.Parameter] = {}
    for child, kept in module._modules.items():
        if kept is not None and (child == "parametrizations" or holds_only(kept)):
            held |= {f"{child}.{name}": parameter for name, parameter in kept.named_parameters()}
        elif isinstance(kept, nn.ModuleList | nn.ModuleDict):
            held |= {f"{child}.{name}": parameter for name, parameter in _held(kept).items()}
    return held


def _trace_region(path: str, module: nn.Module, found: Mapping[int, _Found]) -> Region | None:
    """Trace one module and note on `found` what its graphs say about its parameters; None if it cannot be traced."""
    own = {name: found[id(p)] for name, p in _own_matrices(module).items() if id(p) in found}
    if isinstance(module, torch.jit.ScriptModule):
        for item in own.values():
            item.skipped = f"its {type(module).__name__} was scripted with torch.jit: transform the plain model"
        return None
    known = known_weights(module)
    for child, param in read_from_outside(module):
        read = found.get(id(module.get_submodule(child)._parameters[param]))
        if read is not None:
            read.others.append(f"its {type(module).__name__}")
    for name in known.keys() & own.keys():
        own[name].weight_form, own[name].layout = known[name]
    try:
        traces = [ForwardTrace.of(module, training) for training in (True, False)]
    except Exception as error:  # noqa: BLE001  whatever a model's forward does with proxies
        _note_untraced(module, own, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        return None
    graphs = [trace.graph for trace in traces]
    if graphs[0].python_code("self").src == graphs[1].python_code("self").src:
        graphs = graphs[:1]
    frozen = next((trace.frozen for trace in traces if trace.frozen), "")
    if "forward" in module.__dict__ and not hooked(module):
        frozen = "its forward was replaced on the instance"
    for mode, graph in zip(("train", "eval") if len(graphs) == 2 else ("both",), graphs, strict=True):
        _note_uses(path, module, mode, graph, own, frozen)
        _note_foreign(module, graph, found, own)
    guards = {path: value for trace in traces for path, value in trace.reads.items()}
    return Region(path, graphs[0], graphs[-1], tuple(guards.items()))


def _note_untraced(module: nn.Module, own: Mapping[str, _Found], error: str) -> None:
    kind = type(module).__name__
    reason, known = f"{kind} cannot be traced ({error})", known_weights(module)
    supposed = untraced_weights(module, own, reason)
    for name, item in own.items():
        if name in supposed and name not in known:
            item.weight_form, item.layout = supposed[name]
        elif known and name not in known:
            item.skipped = f"no matrix that {kind} is known to multiply with"
        elif name not in known:
            item.weight_form = item.opt_in = reason


def _note_uses(path: str, module: nn.Module, mode: str, graph: fx.Graph, own: Mapping[str, _Found], frozen: str) -> None:
    read = readers(graph, {name: item.shape for name, item in own.items()})
    for match in read.matches:
        item = own[match.param]
        item.uses.append((Use(path, match.param, match.node.name, mode), match))
        if frozen:
            item.weight_form = f"{type(module).__name__} keeps its forward: {frozen}"
        elif "." in match.param:
            item.weight_form = "it is kept in a module of its own"
    for param, (operation, why) in read.indirect.items():
        own[param].others.append(operation)
        if not own[param].uses:
            own[param].weight_form = own[param].weight_form or why
            own[param].layout = own[param].layout or _supposed(own[param].shape, operation)
            own[param].opt_in = "an embedding" if operation.startswith("embedding") else own[param].opt_in
    for param, operation in read.others.items():
        own[param].others.append(operation)
        own[param].skipped = own[param].skipped or f"read by {operation}, which is no linear operation that sarac adapts"
    for param in read.lookups:
        if not (own[param].uses or own[param].weight_form):
            own[param].weight_form = own[param].opt_in = "rows of it are looked up"
    for item in own.values():
        unread = not (item.uses or item.weight_form or item.others)
        if unread or (item.others == ["output"] and not item.weight_form):  # another module may multiply with it
            what = "does not read it itself" if unread else "gives it out"
            item.weight_form = item.opt_in = f"{type(module).__name__}'s forward {what}"


def _note_foreign(module: nn.Module, graph: fx.Graph, found: Mapping[int, _Found], own: Mapping[str, _Found]) -> None:
    """Note what a module reads of its children's weights: it gets the effective ones, and those of routed adapters are none."""
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in own and node.users:
            path, _, name = str(node.target).rpartition(".")
            item = found.get(id(module.get_submodule(path)._parameters.get(name))) if _reaches(module, path) else None
            if item is not None:
                item.others.append(f"the {type(module).__name__} around it")


def _reaches(module: nn.Module, path: str) -> bool:
    return any(path == name for name, _ in module.named_modules())


def _supposed(shape: tuple[int, ...], operation: str) -> Layout:
    """How a parameter lies of which no linear node tells: a kernel where it goes into one, else a matrix or a stack."""
    if operation.startswith("conv") or operation == "bilinear" or len(shape) > 3:
        return kernel(len(shape))
    return matrices(len(shape))


def _site(item: _Found, head: bool) -> Site | None:
    """The Site of one tensor, None where no linear use of it is known and none can be supposed."""
    if item.barred or not (item.uses or item.weight_form):
        item.skipped = item.barred or item.skipped
        return None
    # A lookup takes rows where a linear layer multiplies with them, so the matrix lies as for the latter.
    lookups = [match.how == EMBEDDING for _, match in item.uses]
    layouts = [match.layout.flipped if match.how == EMBEDDING else match.layout for _, match in item.uses]
    layout = item.layout or (layouts[lookups.index(False)] if False in lookups else layouts[0] if layouts else None)
    layout = layout or _supposed(item.shape, "")
    parts, out, inner = layout.sizes(item.shape)
    if layouts and all(one not in (layout, layout.flipped) for one in layouts):
        item.weight_form = item.weight_form or "it lies otherwise than its use supposes"
    opt_in = "the output head" if head else item.opt_in
    if any(lookups):
        opt_in = opt_in or ("an embedding" if all(lookups) else "shared with an embedding")
    if item.weight_form and min(out, inner) == 1:
        opt_in = opt_in or "a vector in the shape of a matrix"
    return Site(
        name=item.names[0],
        names=tuple(item.names),
        shape=(out, inner),
        dtype=item.dtype,
        form="weight" if item.weight_form else "call",
        layout=layout,
        parts=parts,
        reason=opt_in or item.weight_form,
        default=not opt_in,
        uses=tuple(use for use, _ in item.uses),
        others=tuple(dict.fromkeys(item.others)),
    )


def _adapted_sites(model: nn.Module, found: Mapping[int, _Found]) -> Iterable[tuple[str, Site]]:
    for _, module, state in adapted(model):
        for slot in state.slots.values():
            tensor = module._parameters[slot.param]
            assert tensor is not None
            parts, out, inner = slot.layout.sizes(tuple(tensor.shape))
            names = tuple(found[id(tensor)].names)
            yield slot.site, Site(slot.site, names, (out, inner), tensor.dtype, "call", slot.layout, parts, "adapted")


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
