"""The two values that everything speaks of: a Site (a weight and every linear use of it) and the ModelGraph.

Facts live on the site and are mirrored into `node.meta["sarac"]` of every linear node that reads the weight; decisions
live in the plan; the live module is carried along. This is the only module that touches `node.meta`.
"""

import copy
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx
import torch
from torch import fx, nn

from sarac.ir.errors import TraceError, near
from sarac.ir.inputs import Inputs
from sarac.ir.layout import MATRIX, TRANSPOSED, Layout, dense
from sarac.ir.plan import Plan
from sarac.ir.spectrum import Spectrum
from sarac.ir.weight import Guard

META = "sarac"


@dataclass(frozen=True)
class Use:
    """One linear node of a region's graph that reads a weight: `y = node(x, weight)`."""

    region: str
    param: str
    node: str
    mode: str  # "train", "eval" or "both": which of the region's graphs has the node


@dataclass(frozen=True)
class Site:
    """A weight, shape (out, in), or a stack of `parts` such, and its uses. A weight used twice is one site with two uses."""

    name: str
    names: tuple[str, ...]
    shape: tuple[int, int]
    dtype: torch.dtype
    form: str  # "call": its linear nodes are rewritten; "weight": the parameter becomes its effective value
    layout: Layout = MATRIX
    parts: int = 0  # how many matrices it is a stack of; 0 for one that is no stack
    reason: str = ""  # why not "call", or why the default `where` leaves it out
    default: bool = True  # whether the default `where` takes it
    uses: tuple[Use, ...] = ()
    others: tuple[str, ...] = ()  # what else reads the weight, and gets its effective value
    spectrum: Spectrum | None = field(default=None, compare=False, repr=False)

    @property
    def transposed(self) -> bool:
        """Whether it is one matrix, stored as (in, out)."""
        return self.layout == TRANSPOSED

    @property
    def full_shape(self) -> tuple[int, ...]:
        """(out, in), or (parts, out, in)."""
        return (self.parts, *self.shape) if self.parts else self.shape

    @property
    def size(self) -> int:
        """How many numbers the weight has."""
        return math.prod(self.full_shape)

    @property
    def kind(self) -> str:
        """The name with its numbers starred: what equal weights of all layers share."""
        return starred(self.name)

    @property
    def depth(self) -> int | None:
        """The first number in the name: the layer, by the convention of nearly every model."""
        return layer_of(self.name)

    def facts(self, threshold: float) -> dict[str, Any]:
        """What goes into `node.meta`: the weight, its shape and the threshold rank, where what was measured tells it."""
        assert self.spectrum is not None
        if not (self.spectrum.complete or self.spectrum.decided(threshold)):
            return {"site": self.name, "shape": self.full_shape, "threshold": threshold, "rank": None}
        ranks = tuple(part.rank_at(threshold) for part in self.spectrum.parts)
        rank = self.spectrum.rank_at(threshold)
        return {"site": self.name, "shape": self.full_shape, "threshold": threshold, "rank": ranks or rank}


@dataclass(frozen=True)
class Region:
    """A module that owns linear work, traced by fx in train and in eval mode (one graph where both are the same)."""

    path: str
    train: fx.Graph
    evaluate: fx.Graph
    guards: tuple[Guard, ...] = ()  # attributes that the graphs were specialised to

    def graphs(self) -> dict[str, fx.Graph]:
        """The graphs by mode, "both" where they are one."""
        return {"both": self.train} if self.train is self.evaluate else {"train": self.train, "eval": self.evaluate}

    def copy(self) -> "Region":
        """The same region with graphs of its own."""
        train = copy.deepcopy(self.train)
        return replace(self, train=train, evaluate=train if self.evaluate is self.train else copy.deepcopy(self.evaluate))


@dataclass(frozen=True)
class Whole:
    """What the export of the whole model shows: its graph, each site's calls, and the dataflow between them."""

    graph: fx.Graph
    calls: Mapping[str, int]  # a site that the inputs never reach has none
    siblings: tuple[tuple[str, ...], ...]  # sites that read the same input
    flops: Mapping[str, int]
    flow: "nx.DiGraph[str]"
    others: Mapping[str, str] = field(default_factory=dict)  # what else reads a site's weight
    depths: Mapping[str, int] = field(default_factory=dict)  # linear operations on the longest way to a site's first

    def groups(self, names: Collection[str]) -> tuple[tuple[str, ...], ...]:
        """The siblings among these sites, two or more in each group and no site in two."""
        found: dict[tuple[str, ...], None] = {}
        for group in self.siblings:
            taken = {name for one in found for name in one}
            members = tuple(name for name in group if name in names and name not in taken)
            found |= {members: None} if len(members) > 1 else {}
        return tuple(found)


@dataclass(frozen=True)
class Folded:
    """What folding did to one site: ‖Δ‖/‖W‖, the share ‖round(W+Δ)−W−Δ‖/‖Δ‖ of the delta that rounding lost, onto what base."""

    relative_delta: float
    surviving_delta: float
    base: str = "stored"  # or "de-quantised …": the merged weight then is a plain one


@dataclass(frozen=True)
class ModelGraph:
    """The traced model: the live module, its regions and sites, its plan. What every pass takes and returns."""

    module: nn.Module
    sites: Mapping[str, Site]
    regions: Mapping[str, Region]
    skipped: Mapping[str, str] = field(default_factory=dict)  # further parameters of two or more dimensions: why not
    plan: Plan | None = None
    example_inputs: Inputs | None = None
    whole: Whole | None = None
    folded: Mapping[str, Folded] = field(default_factory=dict)
    waiting: Mapping[int, Callable[[], torch.Tensor]] = field(default_factory=dict)  # folded weights to be, by parameters' ids

    def site(self, name: str) -> Site:
        """The site of this weight, by any of its names."""
        found = next((site for site in self.sites.values() if name in site.names), None)
        if found is None:
            raise TraceError(f"The model has no linear site {name!r}. {near(name, self.sites)}")
        return found

    def weight(self, site: Site) -> torch.Tensor:
        """The site's stored weight as (out, in) or (parts, out, in), de-quantised where it is quantised."""
        path, _, param = site.name.rpartition(".")
        stored = self.module.get_submodule(path)._parameters[param]
        assert stored is not None
        tensor: torch.Tensor = site.layout.matrix(dense(stored.detach()))
        return tensor

    def nodes(self, site: Site) -> Iterator[fx.Node]:
        """Every linear node that reads the site's weight, in every graph of its regions."""
        for use in site.uses:
            for mode, graph in self.regions[use.region].graphs().items():
                if use.mode in ("both", mode):
                    yield from (node for node in graph.nodes if node.name == use.node)

    def with_spectra(self, spectra: Mapping[str, Spectrum], threshold: float) -> "ModelGraph":
        """The graph with facts: on the sites, and mirrored into `node.meta` of copied region graphs."""
        sites = {name: replace(site, spectrum=spectra.get(name, site.spectrum)) for name, site in self.sites.items()}
        graph = replace(self, sites=sites, regions={path: region.copy() for path, region in self.regions.items()})
        for site in sites.values():
            if site.spectrum is not None:
                for node in graph.nodes(site):
                    node.meta[META] = site.facts(threshold)
        return graph


def take_place(old: fx.Node, new: fx.Node) -> None:
    """Let a node have the name and facts of one that nothing uses any more, which goes."""
    name, meta = old.name, old.meta
    old.graph.erase_node(old)
    new.name, new.meta = name, {**new.meta, **meta}


def fact(node: fx.Node) -> Mapping[str, Any] | None:
    """The facts that Analyze left on a linear node: site, shape, threshold and rank; None where there are none."""
    found = node.meta.get(META)
    return found if isinstance(found, dict) else None


def output_sizes(node: fx.Node) -> tuple[int, ...]:
    """The shape of what a captured node gives, () where it is no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def output_size(node: fx.Node) -> int:
    """How many numbers a captured node gives."""
    return math.prod(output_sizes(node)) if output_sizes(node) else 0


def starred(name: str) -> str:
    """A parameter's name with its numbers starred: what equal ones of all layers share."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def layer_of(name: str) -> int | None:
    """The first number in a parameter's name."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(found[1]) if found else None


def within(name: str, modules: Collection[str]) -> bool:
    """Whether a tensor or module of this name is one of these modules, or lies in one."""
    return any(not module or name == module or name.startswith(f"{module}.") for module in modules)


def owners(module: nn.Module, names: tuple[str, ...]) -> list[tuple[nn.Module, str, str]]:
    """The modules that hold a parameter under these names: (module, attribute, its path), each module once."""
    found: dict[tuple[int, str], tuple[nn.Module, str, str]] = {}
    for name in names:
        path, _, param = name.rpartition(".")
        owner = module.get_submodule(path)
        found.setdefault((id(owner), param), (owner, param, path))
    return list(found.values())
