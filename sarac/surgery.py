"""The pipelines that people call on a model: analyze, transform, fold; and what goes with an adapted model."""

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from sarac.folders import Folder
from sarac.ir import check
from sarac.ir.cache import switched
from sarac.ir.errors import InputError, RewriteError, SaracWarning
from sarac.ir.gates import slots, watching
from sarac.ir.graph import Folded, ModelGraph
from sarac.ir.inputs import Inputs, InputSpec
from sarac.ir.layers import adapted, evaluating
from sarac.ir.pipeline import run
from sarac.ir.plan import Plan
from sarac.ir.record import keep_inputs, record_of
from sarac.ir.sharded import is_sharded
from sarac.ir.spectrum import require_share
from sarac.passes.analyze import Analyze
from sarac.passes.choose import Choose, Where, chosen_sites, given_plan
from sarac.passes.fold import Fold
from sarac.passes.rewrite import Rewrite
from sarac.planning import warn_of_other_base
from sarac.report import Analysis
from sarac.storage import opened
from sarac.trace import trace

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class FoldReport:
    """What folding did: by site, and, where routed sites were folded by their mean gates, the model's relative error."""

    sites: Mapping[str, Folded] = field(default_factory=dict)
    approximation: float = 0.0

    @property
    def worst(self) -> tuple[str, float]:
        """The site whose delta lost the largest share to rounding, and that share."""
        name = max(self.sites, key=lambda site: self.sites[site].surviving_delta)
        return name, self.sites[name].surviving_delta


def analyze(
    model: nn.Module | str | Path | Folder,
    *,
    threshold: float = 0.6,
    where: Where = None,
    example_inputs: Any = None,
    progress: Any = None,
    cache: bool = True,
    distributed: bool = False,
) -> Analysis:
    """Measure every linear weight of `model` that `where` takes; the model is not changed.

    A folder of safetensors, or one such file, is read weight by weight; any other name is opened as the command line opens it.
    With example inputs the whole model's dataflow is captured as well. `progress(name)` is called before each weight.
    `cache=False` measures anew what was measured before. `distributed`: all processes of the initialised torch.distributed group
    call this, and share the work.
    """
    with switched(cache):
        if isinstance(model, str | Path):
            model = (Folder.at(model) if example_inputs is None else None) or opened(str(model))
        if isinstance(model, Folder):
            require_share(threshold)
            return model.analyze(threshold, where, progress, distributed)
        graph = trace(model, example_inputs)
        names = frozenset(chosen_sites(graph, where)) if graph.sites else frozenset[str]()
        measured = run(graph, Analyze(threshold, names, progress, distributed), check=False)
    return Analysis.of(measured, threshold, names)


def transform(
    model: Model,
    plan: str | Path | Plan = "threshold:0.6",
    *,
    method: str = "sara",
    where: Where = None,
    also_train: str | Sequence[str] | None = None,
    overrides: Mapping[str, str] | None = None,
    example_inputs: Any = None,
    inplace: bool = False,
    seed: int = 0,
    cache: bool = True,
) -> Model:
    """A model of the same class with adapters on the linear weights that `where` takes; only the adapters train.

    It computes the same as `model` to the last bit until it is trained, and shares all base tensors with it.
    `plan`: a rule (`threshold:0.6,min=4`), a Plan, or a plan's JSON path. `also_train`: globs of parameters to train whole.
    `cache=False` decomposes anew what was decomposed before.
    `overrides`: rules of their own by glob, or "none": {"*.down_proj.weight": "rank:8"}; the last glob that matches wins.
    """
    graph = trace(model, example_inputs)
    choose = Choose(plan, method, where, also_train, overrides)
    measure = []
    given = given_plan(plan)
    if given is not None:
        warn_of_other_base(given, graph)
    else:
        measure = [Analyze(names=frozenset(choose.measured(graph)), wanted=choose.wanted)]
    with switched(cache):
        graph = run(graph, *measure, choose, Rewrite(seed, inplace))
    if graph.example_inputs is not None:
        keep_inputs(graph.module, InputSpec.of(graph.example_inputs).to_json())
    return graph.module  # type: ignore[return-value]  # the same class as `model`, by construction


@overload
def fold(adapted: Model, *, routing: str | None = ..., calibration: Any = ..., report: Literal[False] = ...) -> Model: ...


@overload
def fold(
    adapted: Model, *, routing: str | None = ..., calibration: Any = ..., report: Literal[True]
) -> tuple[Model, FoldReport]: ...


def fold(
    adapted: Model, *, routing: str | None = None, calibration: Any = None, report: bool = False
) -> Model | tuple[Model, FoldReport]:
    """A plain model with the adapters folded into its weights: the original classes and names, untouched tensors shared.

    A routed Mo-SARA model has no single weight: `routing="mean"` fixes its gates at their mean over `calibration`
    (an iterable of example inputs) and measures the error. With `report=True` the FoldReport comes as well.
    """
    if routing not in (None, "mean"):
        raise RewriteError(f'routing={routing!r} is unknown: it is "mean", or left out.')
    if calibration is not None and routing is None:
        raise InputError('Calibration inputs go with routing="mean": give both, or neither.')
    batches = [Inputs.of(batch) for batch in calibration] if calibration is not None else []
    if routing is not None and not batches:
        raise InputError('routing="mean" needs calibration inputs: give calibration=[inputs, …], each as the model takes them.')
    graph = ModelGraph(adapted, trace(adapted).sites, {})
    if routing is None:
        graph = run(graph, Fold())
        outcome = FoldReport(graph.folded)
    else:
        gates = mean_gates(adapted, batches)
        graph = run(graph, Fold(gates=gates), check=False)
        outcome = FoldReport(graph.folded, _model_error(graph.module, adapted, batches))
        lost = f"relative output error {outcome.approximation:.3g} on the calibration inputs"
        if gates:
            _warn(f'fold(routing="mean") fixes gates that depend on the input: {lost}.')
    return (graph.module, outcome) if report else graph.module  # type: ignore[return-value]


def mean_gates(model: nn.Module, batches: Iterable[Inputs]) -> dict[str, Tensor]:
    """The mean gates (sets,) of every routed site over these inputs, in eval mode."""
    sites = [slot.site for _, slot in slots(model) if not slot.adapter.foldable]
    with torch.no_grad(), evaluating(model), watching(model) as watch:
        for batch in batches:
            batch.call(model)
    means = watch.means()
    missing = sorted(set(sites) - set(means))
    if missing:
        raise InputError(f"The calibration inputs never reach {missing[0]} ({len(missing)} sites): give inputs that do.")
    return means


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model for a while: adapters are switched off and what trains whole has its base values, then all is back.

    A folder of save_pretrained does not hold those base values: there a warning says what keeps its trained ones.
    """
    states = [state for _, _, state in adapted(model)]
    if not states:
        raise RewriteError(f"{type(model).__name__} carries no adapters to switch off: transform it first (sarac.transform).")
    before = [state.enabled for state in states]
    whole = _trained_whole(model) if any(before) else {}
    trained = {name: parameter.data for name, (parameter, _) in whole.items()}
    try:
        for state in states:
            state.enabled = False
        for parameter, original in whole.values():
            parameter.data = original.to(parameter.device, parameter.dtype)
        yield
    finally:
        for state, enabled in zip(states, before, strict=True):
            state.enabled = enabled
        for name, (parameter, _) in whole.items():
            parameter.data = trained[name]


def _trained_whole(model: nn.Module) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """The parameters that train whole with their base values, where these are known."""
    record = record_of(model)
    names = record.plan.also_train if record else ()
    originals = record.originals if record else {}
    lost = [name for name in names if name not in originals or is_sharded(model.get_parameter(name))]
    if lost:
        _warn(f"The base values of {lost[0]} ({len(lost)} parameters) are not at hand: they stay as they were trained.")
    return {name: (model.get_parameter(name), originals[name]) for name in names if name not in lost}


def recommended_lr(model: nn.Module) -> float:
    """The learning rate to give Adam for this adapted model's parameters; the lowest where methods are mixed."""
    rates = [slot.adapter.lr for _, _, state in adapted(model) for slot in state.slots.values()]
    if not rates:
        raise RewriteError(f"{type(model).__name__} carries no adapters: transform it first (sarac.transform).")
    return min(rates)


def _model_error(merged: nn.Module, model: nn.Module, batches: Sequence[Inputs]) -> float:
    with torch.no_grad(), evaluating(merged), evaluating(model):
        return max(check.difference(batch.call(merged), batch.call(model)).error for batch in batches)


def _warn(sentence: str) -> None:
    warnings.warn(sentence, SaracWarning, stacklevel=3)
