"""Passes, backends, and `run`, which holds every pass to law 1: a pass never changes what the model computes."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from sarac.ir import check
from sarac.ir.errors import CheckFailed, NotFoldable
from sarac.ir.graph import ModelGraph, Site, owners
from sarac.ir.inputs import Inputs
from sarac.ir.layers import evaluating


class Pass(Protocol):
    """A frozen dataclass whose fields are its options; called with a graph it returns another."""

    exact: ClassVar[bool]  # whether the outputs must agree in every bit, or within the gate of their dtype

    def __call__(self, graph: ModelGraph) -> ModelGraph:
        """The graph after the pass."""


class Backend(Protocol):
    """One format at the edge: write a model as it, run what was written."""

    def write(self, model: nn.Module, inputs: Inputs, path: Path, metadata: Mapping[str, str]) -> tuple[Path, ...]:
        """Write `model` to `path` and return every file written."""


def run(graph: ModelGraph, *passes: Pass, check: bool = True) -> ModelGraph:
    """Apply the passes in order; with `check`, outputs before and after each are compared.

    With example inputs on the graph the whole model is compared, without them the module that owns each site is, on
    random inputs of its shape. A difference is a CheckFailed that names the pass and the place.
    """
    for step in passes:
        before = dict(_probe(graph)) if check else {}
        result = step(graph)
        if (check and result.module is not graph.module) or _in_place(step):
            _compare(step, before, dict(_probe(result)) if check else {}, graph)
        graph = result
    return graph


def _in_place(step: Pass) -> bool:
    return bool(getattr(step, "inplace", False))


def _compare(step: Pass, before: Mapping[str, Any], after: Mapping[str, Any], graph: ModelGraph) -> None:
    name = type(step).__name__
    for place, expected in before.items():
        if place not in after:
            raise CheckFailed(f"After {name}, {place} does not run any more: the pass has broken it.")
        what = f"The outputs of {place} before and after {name}"
        if step.exact:
            check.require_identical(after[place], expected, what)
        else:
            check.require_close(after[place], expected, check.coarsest(expected), what)


def _probe(graph: ModelGraph) -> Iterator[tuple[str, Any]]:
    """Outputs by place, in eval mode and from a fixed seed."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluating(graph.module):
        if graph.example_inputs is not None:
            torch.manual_seed(0)
            yield type(graph.module).__name__, _detached(graph.example_inputs.call(graph.module))
            return
        for site in graph.sites.values():
            for module, _, path in owners(graph.module, site.names):
                outputs = _site_outputs(module, site)
                if outputs is not None:
                    yield path or type(module).__name__, outputs


def _site_outputs(module: nn.Module, site: Site) -> Any:
    """What the owner gives for random inputs of the site's shape; None where it wants something else."""
    weight = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, site.shape[1], generator=generator).to(weight)
    for probe in (x, x[0]):
        torch.manual_seed(0)
        try:
            return _detached(module(probe))
        except NotFoldable:
            raise
        except Exception:  # noqa: BLE001  not a module of one such input: the whole model's example inputs reach it
            continue
    return None


def _detached(outputs: Any) -> Any:
    return copy.deepcopy([tensor.detach() for _, tensor in check.leaves(outputs)])
