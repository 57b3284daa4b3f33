"""Adapted models of one base from one trace and one decomposition: what sarac.transform does, for a hundred plans of a model."""

import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import sarac
from sarac.ir.cache import store
from sarac.ir.graph import ModelGraph
from sarac.ir.layers import adapted
from sarac.ir.measure import leading
from sarac.ir.methods import at_rank
from sarac.ir.plan import Plan
from sarac.passes.analyze import Analyze
from sarac.passes.choose import Choose
from sarac.passes.rewrite import Rewrite

SHUFFLED = "|shuffled"


def dealt(ranks: Mapping[str, int], shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, int]:
    """The ranks dealt anew by chance, each to a weight of the same least and summed dimensions."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name in ranks:
        groups.setdefault((min(shapes[name]), sum(shapes[name])), []).append(name)
    draw, found = random.Random(f"ranks {seed}"), dict(ranks)
    for names in groups.values():
        hand = [ranks[name] for name in names]
        draw.shuffle(hand)
        found |= dict(zip(names, hand, strict=True))
    return found


class Bench:
    """A base model with all spectra, and all singular vectors once they are asked for."""

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        traced = sarac.trace(base)
        self.names = frozenset(name for name, site in traced.sites.items() if site.default)
        self.graph: ModelGraph = sarac.run(traced, Analyze(names=self.names), check=False)
        self._factors: dict[str, tuple[Tensor, Tensor, Tensor, float]] = {}

    def plan(self, rule: str, method: str = "sara") -> Plan:
        """The plan of a rule of sarac's."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = sarac.run(self.graph, Choose(rule, method), check=False).plan
        assert found is not None
        return found

    def shuffled(self, plan: Plan, seed: int) -> Plan:
        """The same ranks among weights of the same least and summed dimensions, so that no rank is too large for its new
        weight and the numbers that train stay the same to one.
        """
        ranks = {name: site.rank for name, site in plan.sites.items()}
        given = dealt(ranks, {name: self.graph.sites[name].shape for name in ranks}, seed)
        sites = {name: at_rank(site, given[name]) for name, site in plan.sites.items()}
        return replace(plan, sites=sites, rule=f"{plan.rule}{SHUFFLED}")

    def adapted(self, rule: str, options: str = "", method: str = "sara", seed: int = 0, shuffle_seed: int = 0) -> nn.Module:
        """The adapted model of a plan, over the base's tensors."""
        plain = rule.replace(SHUFFLED, "")
        plan = self.plan(f"{plain},{options}" if options else plain, method)
        if SHUFFLED in rule:
            plan = self.shuffled(plan, shuffle_seed)
        given = {name: self._tensors(name, adapter, seed) for name, adapter in plan.sites.items()}
        made = sarac.run(replace(self.graph, plan=plan), Rewrite(seed, given=given), check=False)
        return made.module

    def decompose(self) -> None:
        """Have all singular vectors at hand, so that no method that comes first pays for them."""
        for name in sorted(self.names):
            self._leading(self.base.get_parameter(name).detach(), 1, name)

    def _tensors(self, name: str, adapter: Any, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(random.Random(f"{seed} {name}").randrange(2**60))
        weight = self.base.get_parameter(name).detach()
        made: dict[str, Tensor] = adapter.init(weight, generator, name, self._leading)
        return {role: tensor.clone() for role, tensor in made.items()}

    def _leading(self, weight: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor, Tensor, float]:
        """The leading factors of a weight, cut from all of them: these are decomposed once."""
        if name not in self._factors:
            spectrum = self.graph.sites[name].spectrum
            u, s, v, floor = leading(weight, min(weight.shape), name, store(), spectrum)
            self._factors[name] = u.to(weight.dtype), s, v.to(weight.dtype), floor
        u, s, v, floor = self._factors[name]
        return u[:, :rank], s[:rank], v[:rank], floor


def slots(model: nn.Module) -> list[tuple[str, Any, dict[str, Any]]]:
    """Every site of an adapted model: its name, its adapter, its tensors by role."""
    return [
        (slot.site, slot.adapter, slot.tensors(module)) for _, module, state in adapted(model) for slot in state.slots.values()
    ]
