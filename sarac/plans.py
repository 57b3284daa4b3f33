"""The commands of plans: make one, show it, hold two side by side."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from sarac import arguments as take
from sarac import planning
from sarac.checkpoint import written
from sarac.ir.adapters import Adapter
from sarac.ir.cache import switched
from sarac.ir.graph import starred
from sarac.ir.methods import build, describe
from sarac.ir.plan import Plan
from sarac.terminal import meter, show
from sarac.trace import trace


class Plans(TyperGroup):
    """A group whose first word is a model, unless it is the name of a command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command for a model before the words that name none."""
        return super().parse_args(ctx, args if args and args[0] in self.commands else [_MAKE, *args])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command; that for a model goes by no name of its own."""
        name, command, rest = super().resolve_command(ctx, args)
        return "" if name == _MAKE else name, command, rest


_MAKE = "make"
app = typer.Typer(
    cls=Plans,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Decide a rank for every weight, in a file to read and edit.",
)


@app.command(_MAKE, epilog="Example: sarac plan ./llama --rule budget:0.1% --out plan.json")
def make(
    model: take.Source,
    rule: take.Rule = None,
    method: take.NewMethod = None,
    where: take.Where = None,
    overrides: take.Overrides = None,
    low: take.Least = None,
    high: take.Most = None,
    multiple: take.Multiple = None,
    also_train: take.AlsoTrain = None,
    out: take.PlanFile = None,
    sites: take.PlanSites = False,
    specs: take.Specs = None,
    schema: take.Schema = False,
    args: take.Args = None,
    factory: take.Factory = None,
    trust_pickle: take.Trust = False,
    no_cache: take.NoCache = False,
    as_json: take.Json = False,
) -> None:
    """Decide a rank for every weight of a model, to read, edit and give to transform; for a model.pt, show what it has.

    `sarac plan diff A B` shows where two plans differ.
    """
    take.require_place(out)
    spec = take.spec_of(specs)
    opened = take.opened(model, args, factory, trust_pickle)
    shape = {"min": low, "max": high, "multiple": multiple}
    given = [f",{name}={value}" for name, value in shape.items() if value is not None]
    text = "".join([rule or planning.DEFAULT, *given]) if rule or given else None
    choice = {"method": method, "where": where, "overrides": take.overrides_of(overrides), "also_train": also_train}
    choose = planning.choice_of(opened, plan=text, **{name: value or None for name, value in choice.items()})
    graph = trace(opened, spec.sample()) if spec else planning.with_dataflow(opened)
    with meter("Measuring", len(choose.measured(graph)) if choose else 0) as step, switched(not no_cache):
        found = planning.plan_of(graph, choose, step)
    if out is not None:
        written(out, found.save)
    wrote = [f"{out}: written. sarac transform {model} --plan {out} carries it out."] if out else []
    show(as_json, found.to_json(), table(found, sites), *([found.note] if found.note else []), *wrote)


@app.command(epilog="Example: sarac plan diff a.json b.json")
def diff(a: take.PlanA, b: take.PlanB, as_json: take.Json = False) -> None:
    """Show where two plans differ. The exit status is 0 where they decide the same, else 1."""
    one, other = Plan.load(a), Plan.load(b)
    sites, wholes = one.diff(other), (list(one.also_train), list(other.also_train))
    same = not sites and set(wholes[0]) == set(wholes[1])
    counts = [_total(each) for each in (one, other)]
    document = {
        "same": same,
        "sites": {name: {"a": x and describe(x), "b": y and describe(y)} for name, (x, y) in sites.items()},
        **{key: dict(zip("ab", pair, strict=True)) for key, pair in (("also_train", wholes), ("trainable", counts))},
        "rule": {"a": one.rule, "b": other.rule},
    }
    verdict = f"{a} and {b} decide the same for {len(one.sites)} weights."
    parts = [verdict] if same else [_side_by_side(one, other, a, b)]
    show(as_json, json.dumps(document, indent=1), *parts)
    raise typer.Exit(0 if same else 1)


def table(found: Plan, by_site: bool = False) -> Table:
    """A rich table of a plan by kind of weight, or with `by_site` a row for each."""
    shown = Table(title=f"{found.rule or 'a plan by hand'}: {len(found.sites)} weights", title_justify="left")
    shown.add_column("weight", no_wrap=True)
    for heading in ("sites", "(out, in)", "k", "trainable"):
        shown.add_column(heading, justify="right")
    shown.add_column("method")
    shown.add_column("reads the same as")
    counts, rows = found.trainable, defaultdict[tuple[str, str, str, str], list[str]](list)
    for name, adapter in found.sites.items():
        shape = " x ".join(str(size) for size in found.shapes.get(name, ()))
        rows[name if by_site else starred(name), shape, _method(name, adapter), _siblings(found, name)].append(name)
    for (kind, shape, method, siblings), names in rows.items():
        ranks = [rank for name in names for rank in found.sites[name].parts or (found.sites[name].rank,)]
        trains = f"{sum(counts[name] for name in names):,}" if set(names) <= set(counts) else ""
        shown.add_row(kind, str(len(names)), shape, _span(ranks), trains, method, siblings)
    shown.add_section()
    total = _total(found)
    shown.add_row("all", str(len(found.sites)), "", "", "" if total is None else f"{total:,}", "", "")
    for name in found.also_train:
        shown.add_row(name, "", "", "", "", "whole", "")
    return shown


def _side_by_side(one: Plan, other: Plan, a: Path, b: Path) -> Table:
    shown = Table(title=f"{a} and {b}: {len(one.diff(other))} weights differ", title_justify="left")
    shown.add_column("weight", no_wrap=True)
    shown.add_column(str(a))
    shown.add_column(str(b))
    for name, pair in one.diff(other).items():
        shown.add_row(name, *("none" if x is None else f"{_span(x.parts or (x.rank,))}, {_method(name, x)}" for x in pair))
    for name in sorted(set(one.also_train) ^ set(other.also_train)):
        shown.add_row(name, *("whole" if name in each.also_train else "none" for each in (one, other)))
    shown.add_section()
    shown.add_row("weights", str(len(one.sites)), str(len(other.sites)))
    shown.add_row("trainable", *("?" if (n := _total(each)) is None else f"{n:,}" for each in (one, other)))
    shown.add_row("rule", one.rule, other.rule)
    return shown


def _total(found: Plan) -> int | None:
    """The trainable numbers of a plan's adapters; None where an old file does not say of which shapes they are."""
    counts = found.trainable
    return sum(counts.values()) if len(counts) == len(found.sites) else None


def _method(name: str, adapter: Adapter) -> str:
    """The method with those options that are not the usual ones."""
    hidden = {
        **describe(build(adapter.method, adapter.rank, {})),
        "rank": describe(adapter)["rank"],
        "router_of": adapter.router_of,
    }
    words = [f"{option}={value}" for option, value in describe(adapter).items() if hidden.get(option) != value]
    shared = [f"router of {_short(name, adapter.router_of)}"] if adapter.router_of else []
    return " ".join([adapter.method, *words, *shared])


def _siblings(found: Plan, name: str) -> str:
    group = next((group for group in found.siblings if name in group), ())
    return ", ".join(_short(name, other) for other in group if other != name)


def _short(name: str, other: str) -> str:
    """The other's name from where the two part."""
    here, there = (each.removesuffix(".weight").split(".") for each in (name, other))
    same = next((i for i, pair in enumerate(zip(here, there, strict=False)) if pair[0] != pair[1]), 0)
    return ".".join(there[same:])


def _span(ranks: Any) -> str:
    return f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)}–{max(ranks)}"
