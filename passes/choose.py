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
from sarac.ir.graph import ModelGraph, Site
from sarac.ir.measure import measure, weights
from sarac.ir.methods import build, describe, trainable_count
from sarac.ir.plan import Plan, Rule
from sarac.ir.spectrum import Spectrum

Where = str | Sequence[str] | Callable[[Site], bool] | None


@dataclass(frozen=True)
class Choose:
    """Give every chosen site an adapter.

    `plan`: a rule's text (`threshold:0.6,min=4`), a Plan, or the path of a plan's JSON. `method`: sara or mosara.
    `where`: globs over weight names, or a predicate on Site; None takes all linear sites but the output head and embeddings.
    `also_train`: globs of further parameters that train whole.
    """

    plan: str | Path | Plan = "threshold:0.6"
    method: str = "sara"
    where: Where = None
    also_train: str | Sequence[str] | None = None
    exact: ClassVar[bool] = True

    def __call__(self, graph: ModelGraph) -> ModelGraph:
        """The graph with its plan; what does not fit is a PlanError that says what and where."""
        given = given_plan(self.plan)
        if given is not None:
            if self.where is not None:
                raise PlanError("A finished plan names its sites itself: leave `where` out, or edit the plan.")
            if self.method != "sara":
                raise PlanError(f"A finished plan names its methods itself: leave method={self.method!r} out, or edit the plan.")
            given.require_fits({site.name: site.full_shape for site in graph.sites.values()})
            sites = {name: _of_stack(graph.sites[name], adapter) for name, adapter in given.sites.items()}
            chosen = replace(given, sites=sites, also_train=(*given.also_train, *self._further(graph)))
        else:
            chosen = self._by_rule(graph, str(self.plan))
        self._require_separate(graph, chosen)
        for name, adapter in chosen.sites.items():
            _require_possible(graph, name, adapter)
        return replace(graph, plan=chosen)

    def require_sound(self) -> Rule:
        """The rule; what is wrong with it or its options is told here, before any spectrum is computed."""
        rule = Rule.parse(str(self.plan))
        build(self.method, 1, rule.options)
        return rule

    def _by_rule(self, graph: ModelGraph, text: str) -> Plan:
        rule = self.require_sound()
        sites = self._possible(chosen_sites(graph, self.where), build(self.method, 1, rule.options))
        measured = measure(weights(graph, [name for name, site in sites.items() if site.spectrum is None]), cache=store())
        spectra = self._usable({name: site.spectrum or measured[name] for name, site in sites.items()})

        def cost(key: tuple[str, int], rank: int) -> int:
            return trainable_count(build(self.method, rank, rule.options), sites[key[0]].shape)

        total = sum(parameter.numel() for parameter in graph.module.parameters())
        matrices = {(name, i): one for name, found in spectra.items() for i, one in enumerate(found.matrices)}
        ranks: dict[str, list[int]] = defaultdict(list)
        for (name, _), rank in rule.ranks(matrices, cost, total).items():
            ranks[name].append(rank)
        adapters = {
            name: build(self.method, found if sites[name].parts else found[0], rule.options) for name, found in ranks.items()
        }
        return Plan(adapters, text, self._further(graph))

    def _possible(self, sites: dict[str, Site], adapter: Adapter) -> dict[str, Site]:
        """Leave out what the default takes and a routed method cannot have, with a warning; what was named stays."""
        left = {name: why for name, site in sites.items() if (why := _obstacle(site, adapter))}
        if self.where is not None or not left or len(left) == len(sites):
            return sites
        name = next(iter(left))
        warnings.warn(f"{_refused(name, left[name])} Left out: {len(left)} such weights.", SaracWarning, stacklevel=2)
        return {name: site for name, site in sites.items() if name not in left}

    def _usable(self, spectra: Mapping[str, Spectrum]) -> dict[str, Spectrum]:
        """Leave out weights of zeros, which have no direction to train; PlanError if they were named or are all."""
        usable = {name: found for name, found in spectra.items() if found.numerical_rank > 0}
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
    options = {name: value for name, value in describe(adapter).items() if name not in ("method", "rank")}
    return build(adapter.method, [adapter.rank] * site.parts, options)


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
