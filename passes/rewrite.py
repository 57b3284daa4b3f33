"""Carry out the plan: linear nodes become adapter subgraphs, in a new module tree that shares every base tensor."""

import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from sarac.ir.adapters import Adapter
from sarac.ir.cache import Store, store
from sarac.ir.clone import clone
from sarac.ir.errors import PlanError, RewriteError
from sarac.ir.graph import ModelGraph, Region, Site, owners, take_place
from sarac.ir.layers import adapted, compile_forward, install
from sarac.ir.match import Match, linear_call, readers
from sarac.ir.measure import leading
from sarac.ir.record import Record, attach
from sarac.ir.siblings import Siblings
from sarac.ir.start import Factors
from sarac.ir.weight import Slot, base_attribute

Tensors = Mapping[str, nn.Parameter]
_SOME_SHAPE = (1, 1)  # which tensors an adapter has does not depend on the weight's shape


@dataclass(frozen=True)
class Rewrite:
    """Rewrite every site of the plan; the outputs stay the same to the last bit, and only the adapters train.

    `seed` is for what starts at random; `inplace` changes the given module instead of a copy; `given` has tensors by site
    and role, read from a file, that need no decomposition (the outputs then are those of the saved adapters).
    """

    seed: int = 0
    inplace: bool = False
    given: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    exact: ClassVar[bool] = True

    def __call__(self, graph: ModelGraph) -> ModelGraph:
        """The graph with an adapted module and rewritten region graphs."""
        plan = graph.plan
        if plan is None or not plan.sites:
            raise PlanError("The plan holds no weight to adapt: give one with at least one site, or a rule.")
        if any(True for _ in adapted(graph.module)):
            raise RewriteError("The model is already transformed: fold it first (sarac.fold), or transform the source.")
        for name in plan.sites:
            dtype = graph.module.get_parameter(name).dtype
            if dtype.is_floating_point and dtype.itemsize == 1:
                raise RewriteError(
                    f"{name} is stored as {str(dtype).removeprefix('torch.')}, in which torch cannot compute: convert the model, "
                    "for example with .to(torch.bfloat16), or leave the weight out with `where`."
                )
        cache = store()
        tensors = {name: self._tensors(graph, graph.site(name), adapter, cache) for name, adapter in plan.sites.items()}
        for name, adapter in plan.sites.items():  # one Parameter under two names, as of tied weights
            tensors[name] |= {role: tensors[adapter.router_of][theirs] for role, theirs in adapter.borrowed.items()}
        trained = {name: parameter.requires_grad for name, parameter in graph.module.named_parameters()}
        originals = {name: graph.module.get_parameter(name).detach() for name in plan.also_train}
        if self.inplace:
            originals = {name: tensor.clone() for name, tensor in originals.items()}
        module = clone(graph.module, frozen=True, own=frozenset(plan.also_train), inplace=self.inplace)
        regions = self._install(graph, module, tensors)
        _join(module, plan.siblings)
        attach(module, Record(plan, trained, originals))
        return replace(graph, module=module, regions={**graph.regions, **regions})

    def _tensors(self, graph: ModelGraph, site: Site, adapter: Adapter, cache: Store | None) -> dict[str, nn.Parameter]:
        # A seed of its own for each site: what one starts at does not depend on which others are adapted.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {site.name}".encode()))
        weight, own = graph.weight(site), [role for role in adapter.shapes(*site.shape) if role not in adapter.borrowed]
        made = {role: tensor for role, tensor in self.given.get(site.name, {}).items() if role in own}
        if set(made) != set(own):
            made = {**adapter.init(weight, generator, site.name, _factors(site, cache)), **made}
        parameters = {}
        for role, tensor in made.items():
            parameters[role] = nn.Parameter(tensor.to(weight.device), requires_grad=role in adapter.trainable)
            parameters[role].__dict__["_sara_lr"] = adapter.lr
        return parameters

    def _install(self, graph: ModelGraph, module: nn.Module, tensors: Mapping[str, Tensors]) -> dict[str, Region]:
        """Give every owner of an adapted weight its slots, and its forward where all graphs of it could be rewritten."""
        assert graph.plan is not None
        slots: dict[str, dict[str, Slot]] = defaultdict(dict)
        for name, adapter in graph.plan.sites.items():
            site = graph.site(name)
            for _, param, path in owners(module, site.names):
                slots[path][param] = Slot(site.name, param, adapter, site.layout)
        rewritten = {}
        for path, chosen in slots.items():
            owner = module.get_submodule(path)
            region = graph.regions.get(path)
            calls = {param: slot for param, slot in chosen.items() if graph.site(slot.site).form == "call"}
            forward = None
            if region is not None and calls:
                region = region.copy()
                done = [_rewrite(one, calls, owner) for one in region.graphs().values()]
                if any(done):
                    forward, rewritten[path] = compile_forward(region.train, region.evaluate), region
            named = {param: tensors[slot.site] for param, slot in chosen.items()}
            install(owner, list(chosen.values()), named, forward, region.guards if region and forward else ())
        return rewritten


def _factors(site: Site, cache: Store | None) -> Factors:
    """The factors of a site's weight or of a matrix of it, with no second decomposition where the first has kept vectors."""
    found = site.spectrum
    measured = {f"{site.name}[{i}]": part for i, part in enumerate(found.parts)} if found else {}

    def factors(weight: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor, Tensor, float]:
        return leading(weight, rank, name, cache, measured.get(name, found))

    return factors


def _rewrite(graph: fx.Graph, slots: Mapping[str, Slot], owner: nn.Module) -> bool:
    """Replace linear nodes over these parameters of `owner` by their adapters' subgraphs; whether there was one to replace.

    Another linear node reads the effective weight.
    """
    shapes = {param: tuple(owner._parameters[param].shape) for param in slots}  # type: ignore[union-attr]  # there
    adapted_of: dict[fx.Node, fx.Node] = {}  # a linear node may feed the next one directly
    for match in readers(graph, shapes).matches:
        slot, users = slots[match.param], list(match.node.users)
        if not _worthwhile(match, slot):
            continue
        weight = _read_base(graph, match, base_attribute(slot.param))
        with graph.inserting_before(match.node.next):
            roles = slot.adapter.shapes(*_SOME_SHAPE)
            read = {role: fx.Proxy(graph.get_attr(slot.attribute(role))) for role in roles}
            if match.layout != slot.layout:  # the transposed matrix has its factors the other way round
                read |= {"u": read["v"].mT, "v": read["u"].mT}
            x = fx.Proxy(adapted_of.get(match.x, match.x))
            call = linear_call(match)
            if call is None or slot.adapter.parts or slot.adapter.borrowed or not _row_or_none(call[1], owner):
                result = slot.adapter.apply(x, fx.Proxy(match.node), read, match.how).node
            else:
                bias = call[1] and fx.Proxy(call[1])
                chosen = (fx.Proxy(graph.get_attr(name)) for name in (slot.schedule, slot.siblings))
                result = slot.adapter.linear(x, fx.Proxy(weight), bias, read, next(chosen), call[0], next(chosen)).node
        for user in users:
            user.replace_input_with(match.node, result)
        if not match.node.users:
            take_place(match.node, result)
        adapted_of[match.node] = result
    graph.lint()
    return bool(adapted_of)


def _join(module: nn.Module, siblings: tuple[tuple[str, ...], ...]) -> None:
    """Let the sites of each group project their input together, those that stand in the module once and whose V is frozen."""
    places: dict[str, list[tuple[nn.Module, Slot]]] = defaultdict(list)
    for _, owner, state in adapted(module):
        for slot in state.slots.values():
            places[slot.site].append((owner, slot))
    for group in siblings:
        found = [places[name][0] for name in group if len(places[name]) == 1]
        members = [(owner, slot) for owner, slot in found if not slot.adapter.parts and "v" not in slot.adapter.trainable]
        joint = Siblings([(owner, slot.attribute("v")) for owner, slot in members]) if len(members) > 1 else None
        for owner, slot in members:
            owner.__dict__[slot.siblings] = joint


def _row_or_none(bias: fx.Node | None, owner: nn.Module) -> bool:
    """Whether a bias is none, or a vector of the module's own: addmm adds any matrix."""
    found = getattr(owner, str(bias.target), None) if bias is not None and bias.op == "get_attr" else None
    return bias is None or (isinstance(found, Tensor) and found.ndim == 1)


def _worthwhile(match: Match, slot: Slot) -> bool:
    """Whether the adapter's subgraph serves this node: it must lie as its site does, and not cost more than a sum of weights.

    A grouped convolution would run V for every group: k maps a channel where the effective kernel is a few numbers.
    """
    if not slot.serves(match.layout):
        return False
    grouped = match.how[:1] == ("conv",) and match.how[-1] != 1
    return not (grouped and slot.adapter.foldable)


def _read_base(graph: fx.Graph, match: Match, attribute: str) -> fx.Node:
    """Let the linear node read the base, through the same transposes; other readers keep the effective weight. What it reads."""
    value: fx.Node | None = None
    with graph.inserting_before(match.node):
        for step in match.chain:
            value = graph.get_attr(attribute) if value is None else graph.node_copy(step, _always(value))
    assert value is not None
    match.node.replace_input_with(match.chain[-1], value)
    for step in reversed(match.chain):
        if not step.users:
            graph.erase_node(step)
    return value


def _always(node: fx.Node) -> Callable[[fx.Node], fx.Node]:
    return lambda _: node
