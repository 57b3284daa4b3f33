"""Plans of a model: made by a rule, taken from an adapted model, held against the base that they were made for."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any

from torch import nn

from sarac.checkpoint import base_hashes
from sarac.ir.errors import PlanError, SaracWarning
from sarac.ir.graph import ModelGraph
from sarac.ir.pipeline import run
from sarac.ir.plan import Plan
from sarac.ir.record import record_of
from sarac.passes.analyze import Analyze
from sarac.passes.choose import Choose, Where
from sarac.text import input_spec
from sarac.trace import trace

DEFAULT = "threshold:0.6"
_DIGITS = 16  # of a weight's hash that stand in a plan


def plan(
    model: nn.Module,
    rule: str | None = None,
    *,
    method: str | None = None,
    where: Where = None,
    overrides: Mapping[str, str] | None = None,
    also_train: str | Sequence[str] | None = None,
    example_inputs: Any = None,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """The plan by which `transform` would adapt `model`, which is not changed; an adapted model gives the one that it has.

    Without a rule it is threshold:0.6, without a method sara. With example inputs the plan says which weights read one input.
    """
    choose = choice_of(model, plan=rule, method=method, where=where, overrides=overrides, also_train=also_train)
    return plan_of(trace(model, example_inputs), choose, progress)


def choice_of(model: nn.Module, **asked: Any) -> Choose | None:
    """How the weights of `model` are chosen, None where it is adapted already, of which nothing else may be asked then."""
    given = {name: value for name, value in asked.items() if value is not None}
    if record_of(model) is None:
        return Choose(**{"plan": DEFAULT, **given})
    if given:
        name = next(iter(given)).replace("plan", "rule")
        raise PlanError(
            f"This {type(model).__name__} is adapted, and its plan is made: leave `{name}` out to see that plan, or fold the "
            "model first."
        )
    return None


def plan_of(graph: ModelGraph, choose: Choose | None, progress: Callable[[str], None] | None = None) -> Plan:
    """The plan of a traced model: as chosen, or where nothing is to be chosen the one that it has."""
    record = record_of(graph.module)
    if choose is not None:
        found = run(graph, Analyze(names=frozenset(choose.measured(graph)), progress=progress), choose, check=False).plan
        assert found is not None
    else:
        assert record is not None
        found = replace(record.plan, shapes={name: graph.site(name).full_shape for name in record.plan.sites})
        found = replace(found, siblings=graph.whole.groups(found.sites) if graph.whole else found.siblings)
    weights = {name: graph.weight(graph.site(name)) for name in found.sites}
    return replace(found, base=base_hashes(weights, ["float32"])["float32"], hashes=_hashes(graph, weights))


def with_dataflow(model: nn.Module) -> ModelGraph:
    """The model traced on inputs that it knows of itself, such as token ids; without its dataflow where it knows none."""
    spec = input_spec(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nobody asked for these inputs, so nobody is told what they do not reach
            return trace(model, spec and spec.sample())
    except Exception:  # noqa: BLE001  a model may refuse inputs with any kind
        return trace(model)


def warn_of_other_base(found: Plan, graph: ModelGraph) -> None:
    """Warn where a plan was made for other weights than the model's: its ranks apply, and were decided by other spectra."""
    known = [name for name in found.sites if name in graph.sites and not graph.weight(graph.sites[name]).is_meta]
    told = [name for name in known if name in found.hashes]
    hashes = _hashes(graph, told)
    others = [name for name in told if hashes[name] != found.hashes[name]]
    if found.base and not told and len(known) == len(found.sites):  # as the file of an adapted model has it
        weights = {name: graph.weight(graph.sites[name]) for name in known}
        others = known if base_hashes(weights, ["float32"])["float32"] != found.base else []
    if others:
        warnings.warn(
            f"The plan was made for another base: {others[0]} has other values here ({len(others)} of {len(known)} weights). Its "
            "ranks are used as they are; sarac.plan makes one for this model.",
            SaracWarning,
            stacklevel=3,
        )


def schema() -> str:
    """The JSON Schema of a plan's file."""
    return (files("sarac") / "plan.schema.json").read_text(encoding="utf-8")


def _hashes(graph: ModelGraph, names: Iterable[str]) -> dict[str, str]:
    return {name: base_hashes({name: graph.weight(graph.site(name))}, ["float32"])["float32"][:_DIGITS] for name in names}
