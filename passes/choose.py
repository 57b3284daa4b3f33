"""Decide: which sites are adapted, by which method, at which rank. The result is the graph's plan."""

import fnmatch
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from sarac.ir.adapters import Adapter
from sarac.ir.cache import store
from sarac.ir.errors import PlanError, SaracWarning, near
from sarac.ir.gram import Wanted
from sarac.ir.graph import ModelGraph, Site
from sarac.ir.measure import measure, weights
from sarac.ir.methods import at_rank, build, describe, trainable_count
from sarac.ir.plan import Plan
from sarac.ir.rule import Rule
from sarac.ir.spectrum import Spectrum

Where = str | Sequence[str] | Callable[[Site], bool] | None


@dataclass(frozen=True)
class Choose:
    """Give every chosen site an adapter.

    `plan`: a rule's text (`threshold:0.6,min=4`), a Plan, or the path of a plan's JSON. `method`: sara or mosara.
    `where`: globs over weight names, or a predicate on Site; None takes all linear sites but the output head and embeddings.
    `also_train`: globs of further parameters that train whole. `overrides`: rules of their own (or "none") by globs over
    weight names, of which the last that matches holds.
    """

    plan: str | Path | Plan = "threshold:0.6"
    method: str = "sara"
    where: Where = None
    also_train: str | Sequence[str] | None = None
    overrides: Mapping[str, str] | None = None
    exact: ClassVar[bool] = True

    def __call__(self, graph: ModelGraph) -> ModelGraph:
        """The graph with its plan; what does not fit is a PlanError that says what and where."""
        given = given_plan(self.plan)
        if given is not None:
            if self.where is not None:
                raise PlanError("A finished plan names its sites itself: leave `where` out, or edit the plan.")
            if self.method != "sara":
                raise PlanError(f"A finished plan names its methods itself: leave method={self.method!r} out, or edit the plan.")
            if self.overrides:
                raise PlanError("A finished plan names its ranks itself: leave `overrides` out, or edit the plan.")
            given.require_fits({site.name: site.full_shape for site in graph.sites.values()})
            sites = {name: _of_stack(graph.sites[name], adapter) for name, adapter in given.sites.items()}
            chosen = replace(given, sites=sites, also_train=(*given.also_train, *self._further(graph)))
        else:
            chosen = self._by_rule(graph)
        shapes = {name: graph.sites[name].full_shape for name in chosen.sites}
        siblings = graph.whole.groups(chosen.sites) if graph.whole else chosen.siblings
        chosen = replace(chosen, shapes=shapes, siblings=siblings)
        self._require_separate(graph, chosen)
        for name, adapter in chosen.sites.items():
            _require_possible(graph, name, adapter)
        return replace(graph, plan=chosen)

    def require_sound(self) -> Rule:
        """The rule; what is wrong with it or its options is told here, before any spectrum is computed."""
        rule = Rule.parse(self.text)
        build(self.method, 1, rule.options)
        for one in rule.overrides:
            if one.rule is not None:
                build(one.method or self.method, 1, one.rule.options)
        return rule

    @property
    def text(self) -> str:
        """The rule with its overrides, as a plan keeps it."""
        return "; ".join([str(self.plan), *(f"{glob}={rule}" for glob, rule in (self.overrides or {}).items())])

    def measured(self, graph: ModelGraph) -> dict[str, Site]:
        """The sites whose spectra a rule needs: those that `where` takes and no override leaves out."""
        sites, rule = chosen_sites(graph, self.where), self.require_sound()
        for one in rule.overrides:
            if not any(fnmatch.filter(site.names, one.glob) for site in sites.values()):
                known = [name for site in graph.sites.values() for name in site.names]
                outside = matching([one.glob], known, "overrides")[0]
                raise PlanError(
                    f"The glob {one.glob!r} in `overrides` matches none of the weights that are taken, only such as {outside}: "
                    "take them into `where`."
                )
        governed = {name: rule.governing(site.names) for name, site in sites.items()}
        kept = {name: sites[name] for name, i in governed.items() if i is None or rule.overrides[i].rule is not None}
        if not kept:
            raise PlanError(f"The overrides leave none of the {len(sites)} weights: let one have a rule other than none.")
        return kept

    def wanted(self, site: Site) -> Wanted | None:
        """What the rule will ask of a site, so that one decomposition gives it all; None where it depends on other sites."""
        rule = self.require_sound()
        adapter, index = self._start(rule, site), rule.governing(site.names)
        one = rule if index is None else rule.overrides[index].rule
        if one is None or not one.alone or vars(adapter).get("basis") == "random":
            return None
        return Wanted(one.rank_of, one.value if one.kind == "threshold" and one.bare else None)

    def _by_rule(self, graph: ModelGraph) -> Plan:
        rule, sites = self.require_sound(), self.measured(graph)
        adapters = self._possible(sites, {name: self._start(rule, site) for name, site in sites.items()})
        measured = measure(weights(graph, [name for name in adapters if sites[name].spectrum is None]), cache=store())
        spectra = self._usable({name: sites[name].spectrum or measured[name] for name in adapters})
        adapters = _grouped(graph, {name: adapters[name] for name in spectra})

        def cost(key: tuple[str, int], rank: int) -> int:
            return trainable_count(at_rank(adapters[key[0]], rank), sites[key[0]].shape)

        total = sum(parameter.numel() for parameter in graph.module.parameters())
        parts: dict[int | None, dict[tuple[str, int], Spectrum]] = defaultdict(dict)
        for name, found in spectra.items():
            parts[rule.governing(sites[name].names)] |= {(name, i): one for i, one in enumerate(found.matrices)}
        ranks: dict[tuple[str, int], int] = {}
        further, notes = self._further(graph), []
        spent = sum(graph.module.get_parameter(name).numel() for name in further)
        for index in [*sorted(i for i in parts if i is not None), *([None] if None in parts or rule.kind == "budget" else [])]:
            one = rule if index is None else rule.overrides[index].rule
            assert one is not None
            decided = one.decide(parts[index], cost, total, spent if index is None else 0)
            spent += sum(cost(key, rank) for key, rank in decided.ranks.items())
            ranks |= decided.ranks
            if decided.note:
                notes.append(decided.note if index is None else f"{rule.overrides[index].glob}: {decided.note}")
        chosen = {}
        for name, found in spectra.items():
            each = [ranks[name, i] for i in range(len(found.matrices))]
            chosen[name] = at_rank(adapters[name], each if sites[name].parts else each[0])
        return Plan(chosen, self.text, further, note="; ".join(notes))

    def _start(self, rule: Rule, site: Site) -> Adapter:
        """The adapter of a site before its rank is known."""
        index = rule.governing(site.names)
        override = rule.overrides[index] if index is not None else None
        options = override.rule.options if override and override.rule else rule.options
        return build((override.method if override else "") or self.method, 1, options)

    def _possible(self, sites: dict[str, Site], adapters: dict[str, Adapter]) -> dict[str, Adapter]:
        """Leave out what the default takes and a routed method cannot have, with a warning; what was named stays."""
        left = {name: why for name, site in sites.items() if (why := _obstacle(site, adapters[name]))}
        if self.where is not None or not left or len(left) == len(sites):
            return adapters
        name = next(iter(left))
        warnings.warn(f"{_refused(name, left[name])} Left out: {len(left)} such weights.", SaracWarning, stacklevel=2)
        return {name: adapter for name, adapter in adapters.items() if name not in left}

    def _usable(self, spectra: Mapping[str, Spectrum]) -> dict[str, Spectrum]:
        """Leave out weights of zeros, which have no direction to train; PlanError if they were named or are all."""
        usable = {name: found for name, found in spectra.items() if not found.is_zero}
        zeros = [name for name in spectra if name not in usable]
        if zeros and (self.where is not None or not usable):
            raise PlanError(_zeros(zeros[0]))
        if zeros:
            warnings.warn(f"{_zeros(zeros[0])} Left out: {len(zeros)} such weights.", SaracWarning, stacklevel=2)
        return usable

    def _further(self, graph: ModelGraph) -> tuple[str, ...]:
        if self.also_train is None:
            return ()
        globs = [self.also_train] if isinstance(self.also_train, str) else list(self.also_train)
        first = {id(parameter): name for name, parameter in graph.module.named_parameters()}
        aliases = {name: first[id(p)] for name, p in graph.module.named_parameters(remove_duplicate=False)}
        return tuple(dict.fromkeys(aliases[name] for name in matching(globs, aliases, "also_train")))

    def _require_separate(self, graph: ModelGraph, chosen: Plan) -> None:
        """What trains whole must exist and not be adapted as well."""
        known = dict(graph.module.named_parameters())
        taken = {alias for name in chosen.sites for alias in graph.sites[name].names}
        for name in chosen.also_train:
            if name not in known:
                raise PlanError(
                    f"The plan trains the parameter {name!r} whole, which the model does not have. {near(name, known)}"
                )
            if name in taken:
                raise PlanError(f"{name} would be both adapted and trained whole: take it out of `also_train` or of `where`.")


def chosen_sites(graph: ModelGraph, where: Where) -> dict[str, Site]:
    """The sites that `where` takes; PlanError if there are none, with the near names of a glob that matches nothing."""
    if not graph.sites:
        first = next((f" {name}: {why}." for name, why in graph.skipped.items()), "")
        raise PlanError(
            f"{type(graph.module).__name__} has no linear weight that sarac can adapt.{first} sarac.analyze(model) says for each "
            "parameter why not."
        )
    if where is None:
        found = {name: site for name, site in graph.sites.items() if site.default}
    elif callable(where):
        found = {name: site for name, site in graph.sites.items() if where(site)}
    else:
        globs = [where] if isinstance(where, str) else list(where)
        aliases = {alias: site for site in graph.sites.values() for alias in site.names}
        found = {aliases[alias].name: aliases[alias] for alias in matching(globs, aliases, "where")}
    if not found and where is None:
        name, site = next(iter(graph.sites.items()))
        raise PlanError(
            f"None of the {len(graph.sites)} linear sites is adapted by default; {name}, for example, is {site.reason}. Name "
            'those that you want in `where`, such as where="*".'
        )
    if not found:
        raise PlanError(f"`where` takes none of the {len(graph.sites)} linear sites, for example {next(iter(graph.sites))}.")
    return found


def matching(globs: Sequence[str], names: Iterable[str], option: str) -> list[str]:
    """The names that any glob matches, in their order; a glob that matches nothing is an error."""
    known = list(names)
    for glob in globs:
        if not fnmatch.filter(known, glob):
            raise PlanError(f"The glob {glob!r} in `{option}` matches no weight. {near(glob, known)}")
    return [name for name in known if any(fnmatch.fnmatchcase(name, glob) for glob in globs)]


def given_plan(plan: str | Path | Plan) -> Plan | None:
    """The finished plan that was given or named by its path; None where it is a rule."""
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, Path) or str(plan).endswith(".json"):
        return Plan.load(plan)
    return None


def _of_stack(site: Site, adapter: Adapter) -> Adapter:
    """The adapter for every matrix of a stack, where a plan gives one rank for all."""
    if not site.parts or adapter.parts:
        return adapter
    return at_rank(adapter, [adapter.rank] * site.parts)


def _grouped(graph: ModelGraph, adapters: dict[str, Adapter]) -> dict[str, Adapter]:
    """The adapters with the first of every sibling group named to those that share its router."""
    sharing = [name for name, one in adapters.items() if vars(one).get("router_scope") == "group" and not one.foldable]
    if sharing and graph.whole is None:
        raise PlanError(
            "router_scope=group needs to know which weights read one input: give example_inputs (--input), from which the "
            "dataflow is captured, or leave it out."
        )
    groups = graph.whole.groups([name for name in sharing if not graph.sites[name].parts]) if graph.whole else ()
    if sharing and not groups:
        raise PlanError("router_scope=group finds no two of these weights that read one input: leave it out.")
    linked = dict(adapters)
    for group in groups:
        owners: dict[object, str] = {}
        for name in group:
            site = graph.sites[name]
            owner = owners.setdefault((adapters[name], site.layout, site.shape[1]), name)
            if owner != name:
                options = {key: value for key, value in describe(adapters[name]).items() if key not in ("method", "rank")}
                linked[name] = build(adapters[name].method, 1, {**options, "router_of": owner})
    return linked


def _require_possible(graph: ModelGraph, name: str, adapter: Adapter) -> None:
    site = graph.sites[name]
    why = _obstacle(site, adapter)
    if why:
        raise PlanError(_refused(name, why))
    if vars(adapter).get("basis") != "random" and not bool(graph.weight(site).any()):
        raise PlanError(_zeros(name))


def _obstacle(site: Site, adapter: Adapter) -> str:
    """Why a site cannot carry a routed adapter: something reads its weight, which then has no single value."""
    if adapter.foldable or (site.form == "call" and not site.others):
        return ""
    return site.reason if site.form != "call" else f"{site.others[0]} reads the weight as well"


def _refused(name: str, why: str) -> str:
    return (
        f'{name} cannot carry a routed adapter, which needs the layer\'s input: {why}. Use method="sara" '
        "for it, or leave it out of `where`."
    )


def _zeros(name: str) -> str:
    return f"The weight {name} is all zeros: it has no singular directions to train. Leave it out of `where` or of the plan."
