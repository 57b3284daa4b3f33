"""Passes, backends, and `run`, which holds every pass to law 1: a pass never changes what the model computes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from sarac.ir.check import coarsest, difference, leaves, require_close, require_identical
from sarac.ir.clone import clone
from sarac.ir.errors import CheckFailed, NotFoldable, RewriteError
from sarac.ir.graph import ModelGraph, Site, owners
from sarac.ir.inputs import Inputs
from sarac.ir.layers import evaluating
from sarac.ir.plan import Plan


class Pass(Protocol):
    """A frozen dataclass whose fields are its options; called with a graph it returns another."""

    exact: ClassVar[bool]  # whether the outputs must agree in every bit, or within the gate of their dtype

    def __call__(self, graph: ModelGraph) -> ModelGraph:
        """The graph after the pass."""


class Backend(Protocol):
    """One format at the edge: write a model as it, run what was written."""

    def write(self, model: nn.Module, inputs: Inputs, path: Path, metadata: Mapping[str, str]) -> tuple[Path, ...]:
        """Write `model` to `path` and return every file written."""


Tensors = Mapping[str, Mapping[str, torch.Tensor]]
_front_end: list[Callable[[nn.Module, Plan, Tensors], nn.Module]] = []


def adopt(model: nn.Module, plan: Plan, tensors: Tensors) -> nn.Module:
    """A copy of `model` with the adapters of a plan, their tensors given by site and role.

    A backend that reads adapters ends here. The front end does the work; it lies above this and registers itself.
    """
    return _front_end[-1](model, plan, tensors)


def register_front_end(carry_out: Callable[[nn.Module, Plan, Tensors], nn.Module]) -> None:
    """Make `carry_out` what `adopt` calls."""
    _front_end.append(carry_out)


@dataclass(frozen=True)
class _Seen:
    """The outputs at one place, the coarsest dtype on the way there, and whether they can be held to the last bit."""

    outputs: Any
    dtype: torch.dtype
    exact: bool = True


def run(graph: ModelGraph, *passes: Pass, check: bool = True) -> ModelGraph:
    """Apply the passes in order; with `check`, outputs before and after each are compared.

    With example inputs on the graph the whole model is compared, without them the module that owns each site is, on
    random inputs of its shape. A difference is a CheckFailed that names the pass and the place.
    """
    before = _Probe.of(graph) if check else None
    for step in passes:
        graph = step(graph)
        if before is not None:
            after = _Probe.of(graph)
            _compare(step, before, after)
            before = after
    return graph


@dataclass(frozen=True)
class _Probe:
    """What a graph's module gives: as a whole on its example inputs, and at each module that owns a site."""

    whole: Mapping[str, _Seen]
    sites: Mapping[str, _Seen]

    @classmethod
    def of(cls, graph: ModelGraph) -> "_Probe":
        """Run on a copy in eval mode, from a fixed seed: a call may move buffers, and counts for hooks."""
        cuda = sorted({p.device.index for p in graph.module.parameters() if p.device.type == "cuda"})
        with torch.no_grad(), torch.random.fork_rng(devices=cuda):
            try:
                module = clone(graph.module, frozen=True)
            except RewriteError:  # it cannot be copied: in-place surgery
                module = graph.module
            with evaluating(module):
                sites = dict(_site_outputs(graph, module, cuda))
                whole = {}
                if graph.example_inputs is not None:
                    _seed(cuda)
                    outputs = _detached(graph.example_inputs.call(module))
                    whole[type(module).__name__] = _Seen(outputs, coarsest(outputs, module))
        return cls(whole, sites)


def _compare(step: Pass, before: _Probe, after: _Probe) -> None:
    for place, expected in before.whole.items():
        found = after.whole[place]
        what = f"The outputs of {place} before and after {type(step).__name__}"
        if step.exact and difference(found.outputs, expected.outputs).identical:
            return
        require_close(found.outputs, expected.outputs, expected.dtype, what)
        # Within the gate but not to the bit: a fused kernel may have given way to a plain one, where a weight is read by another
        # module than its own. Then every site must be exact on its own.
        if step.exact and not _sites_agree(step, before, after):
            require_identical(found.outputs, expected.outputs, what)
    if not before.whole:
        _sites_agree(step, before, after, raising=True)


def _sites_agree(step: Pass, before: _Probe, after: _Probe, raising: bool = False) -> bool:
    """Whether every probed site gives the same, to the bit where it can be held to that."""
    try:
        for place, expected in before.sites.items():
            if place not in after.sites:
                raise CheckFailed(f"After {type(step).__name__}, {place} does not run any more: the pass has broken it.")
            what = f"The outputs of {place} before and after {type(step).__name__}"
            if step.exact and expected.exact:
                require_identical(after.sites[place].outputs, expected.outputs, what)
            else:
                require_close(after.sites[place].outputs, expected.outputs, expected.dtype, what)
    except CheckFailed:
        if raising:
            raise
        return False
    return True


def _seed(cuda: Sequence[int]) -> None:
    """Seed the generators that are put back, and no other device's, as torch.manual_seed would."""
    for generator in (torch.default_generator, *(torch.cuda.default_generators[index] for index in cuda)):
        generator.manual_seed(0)


def _site_outputs(graph: ModelGraph, module: nn.Module, cuda: Sequence[int]) -> Iterator[tuple[str, _Seen]]:
    """What each owner gives for random inputs of its sites' shapes; those that want something else are left out."""
    for site in graph.sites.values():
        for owner, _, path in owners(module, site.names):
            for probe in _probes(owner, site):
                _seed(cuda)
                try:
                    outputs = _detached(owner(probe))
                except NotFoldable:
                    raise
                except Exception:  # noqa: BLE001  not a module of one such input: example inputs reach it
                    continue
                if outputs:
                    # A product of the same numbers may round otherwise where the effective weight lies elsewhere in memory.
                    yield path or type(owner).__name__, _Seen(outputs, coarsest(outputs, owner), site.form == "call")
                    break


def _probes(owner: nn.Module, site: Site) -> Iterator[torch.Tensor]:
    """Inputs that a module with a weight of this shape may take: rows of it, images for a kernel, indices of an embedding."""
    weight = next(owner.parameters())
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        yield torch.arange(min(owner.num_embeddings, 6), device=weight.device).reshape(1, -1)
        return
    generator = torch.Generator().manual_seed(0)
    shapes: tuple[tuple[int, ...], ...] = ((2, 3, site.shape[1]), (3, site.shape[1]))
    if isinstance(owner, _ConvNd):
        spans = zip(owner.kernel_size, owner.dilation, strict=True)
        shapes = ((2, owner.in_channels, *((size - 1) * step + 4 for size, step in spans)),)
    for shape in shapes:
        yield torch.randn(shape, generator=generator, device="cpu").to(weight.device, site.dtype)


def _detached(outputs: Any) -> list[torch.Tensor]:
    return [tensor.detach().clone() for _, tensor in leaves(outputs)]
