"""Decisions: a rule read from text, and the plan that says which adapter every weight gets. JSON in and out."""

import json
import math
import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from sarac.ir.adapters import Adapter
from sarac.ir.errors import PlanError, near
from sarac.ir.methods import METHODS, build, describe
from sarac.ir.spectrum import Spectrum, require_share

Key = TypeVar("Key", bound=Hashable)  # what a matrix is known by: its weight's name, and which of a stack it is
RULES = ("threshold", "energy", "rank", "budget")
FORMAT = 1


@dataclass(frozen=True)
class Rule:
    """How a rank follows from a spectrum: `threshold:t`, `energy:t`, `rank:k`, `budget:N` or `budget:P%`, with options.

    `low` and `high` bound every rank (`min=`, `max=` in the text); the other options go to the method.
    """

    kind: str
    value: float
    percent: bool = False
    low: int = 1
    high: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Rule":
        """From text such as `threshold:0.6,min=4,train=factors`."""
        head, *rest = [part.strip() for part in text.split(",")]
        match = re.fullmatch(r"(\w+):([\d.]+(?:e-?\d+)?)(%?)", head)
        if match is None or match[1] not in RULES or (match[3] and match[1] != "budget"):
            raise PlanError(
                f"The rule {head!r} is not understood: write threshold:0.6, energy:0.9, rank:16, budget:100000 or "
                "budget:0.5%, then options such as ,min=4,train=factors. A plan's JSON file is named by its path."
            )
        options = {}
        for part in rest:
            name, equals, value = part.partition("=")
            if not equals or not value:
                raise PlanError(f"The option {part!r} in the rule {text!r} is not understood: write name=value.")
            if name.strip() in options:
                raise PlanError(f"The option {name.strip()!r} stands twice in the rule {text!r}: leave one out.")
            options[name.strip()] = value.strip()
        low, high = (_whole(name, options.pop(name, None)) for name in ("min", "max"))
        rule = cls(match[1], _number(match[2]), bool(match[3]), 1 if low is None else low, high, options)
        rule._require_valid(text)
        return rule

    def ranks(self, spectra: Mapping[Key, Spectrum], cost: Callable[[Key, int], int], total: int) -> dict[Key, int]:
        """The rank of every matrix; `cost` gives the numbers that train at a rank, `total` is what a % is taken of."""
        if self.kind == "budget":
            return self._budget_ranks(spectra, cost, int(self.value / 100.0 * total) if self.percent else int(self.value))
        if self.kind == "rank" and spectra and all(self.value > s.full_rank for s in spectra.values()):
            most = max(s.full_rank for s in spectra.values())
            raise PlanError(f"rank:{int(self.value)} is above min(out, in) of every weight; the largest is {most}.")
        return {name: self._clamp(self._rank(s), s) for name, s in spectra.items()}

    def _rank(self, spectrum: Spectrum) -> int:
        if self.kind == "rank":
            return int(self.value)
        return spectrum.rank_at(self.value) if self.kind == "threshold" else spectrum.rank_at_energy(self.value)

    def _clamp(self, rank: int, spectrum: Spectrum) -> int:
        high = spectrum.full_rank if self.high is None else min(self.high, spectrum.full_rank)
        return min(max(rank, self.low), high)

    def _budget_ranks(self, spectra: Mapping[Key, Spectrum], cost: Callable[[Key, int], int], budget: int) -> dict[Key, int]:
        # Ranks only change at the shares that some first k values reach, so the largest of these shares that still
        # fits is the exact answer; the totals grow with it, so a bisection finds it.
        shares = sorted(set(torch.cat([s.shares() for s in spectra.values()]).clamp(1e-300, 1.0).tolist()))

        def at(share: float) -> dict[Key, int]:
            return {name: self._clamp(s.rank_at(share), s) for name, s in spectra.items()}

        def spent(ranks: Mapping[Key, int]) -> int:
            return sum(cost(name, rank) for name, rank in ranks.items())

        least = at(shares[0])
        if spent(least) > budget:
            raise PlanError(f"The budget of {budget} numbers fits nothing: the least that this plan trains is {spent(least)}.")
        first, last = 0, len(shares) - 1
        while first < last:
            middle = (first + last + 1) // 2
            first, last = (middle, last) if spent(at(shares[middle])) <= budget else (first, middle - 1)
        return at(shares[first])

    def _require_valid(self, text: str) -> None:
        if self.kind in ("threshold", "energy"):
            require_share(self.value)
        if self.kind == "rank" and not (self.value.is_integer() and self.value >= 1):
            raise PlanError(f"A rank is a whole number of at least 1; {text!r} gives {self.value}.")
        if self.kind == "budget" and not 0 < self.value < math.inf:
            raise PlanError(f"A budget is above 0 and finite; {text!r} gives {self.value}.")
        if self.low < 1 or (self.high is not None and self.high < self.low):
            raise PlanError(f"The bounds in {text!r} leave no rank: min is at least 1 and max at least min.")


@dataclass(frozen=True)
class Plan:
    """Which adapter every weight gets, which other parameters train whole, and what base it was made for."""

    sites: Mapping[str, Adapter]
    rule: str = ""
    also_train: tuple[str, ...] = ()
    base: str = ""

    def to_json(self) -> str:
        """The plan as JSON text that people can read and edit."""
        sites = {name: describe(adapter) for name, adapter in self.sites.items()}
        head = {"sarac_plan": FORMAT, "rule": self.rule, "base": self.base, "also_train": list(self.also_train)}
        return json.dumps({**head, "sites": sites}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan in JSON text; what is wrong with it is a PlanError that names the place."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"The plan is not JSON: {error}. Write one with sarac transform … --plan-out.") from error
        if not isinstance(data, dict) or data.get("sarac_plan") != FORMAT or not isinstance(data.get("sites"), dict):
            raise PlanError(f'The JSON is no plan of this version: it needs "sarac_plan": {FORMAT} and "sites".')
        sites = {name: _adapter(name, entry) for name, entry in data["sites"].items()}
        further = data.get("also_train", [])
        if not isinstance(further, list) or not all(isinstance(name, str) for name in further):
            raise PlanError(f'The plan\'s "also_train" is a list of parameter names, not {further!r}.')
        return cls(sites, str(data.get("rule", "")), tuple(further), str(data.get("base", "")))

    def save(self, path: str | Path) -> None:
        """Write the plan's JSON."""
        try:
            Path(path).write_text(self.to_json() + "\n", encoding="utf-8")
        except OSError as error:
            raise PlanError(f"The plan cannot be written to {path}: {error.strerror}.") from error

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan's JSON."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"The plan {path} cannot be read: {error.strerror}.") from error

    def diff(self, other: "Plan") -> dict[str, tuple[Adapter | None, Adapter | None]]:
        """The sites at which two plans differ, with both decisions."""
        names = [*self.sites, *(name for name in other.sites if name not in self.sites)]
        pairs = {name: (self.sites.get(name), other.sites.get(name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def require_fits(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise PlanError at the first site that is unknown or whose rank exceeds min(out, in).

        `shapes` are (out, in), or (parts, out, in) for a stack.
        """
        for name, adapter in self.sites.items():
            if name not in shapes:
                raise PlanError(
                    f"The plan names the weight {name!r}, which the model does not have as a linear site. {near(name, shapes)}"
                )
            stack, shape = shapes[name][:-2], shapes[name][-2:]
            if adapter.rank > min(shape):
                raise PlanError(
                    f"The plan gives {name} rank {adapter.rank}, above min(out, in) = {min(shape)} of its shape "
                    f"{shape}: lower it in the plan."
                )
            if adapter.parts and stack != (len(adapter.parts),):
                raise PlanError(
                    f"The plan gives {name} {len(adapter.parts)} ranks, and it is {stack[0] if stack else 'one'} "
                    f"{'matrices' if stack else 'matrix'} of shape {shape}: give one rank, or as many as there are."
                )


def _adapter(name: str, entry: Any) -> Adapter:
    if not isinstance(entry, dict) or entry.get("method") not in METHODS or not _ranks(entry.get("rank")):
        raise PlanError(
            f"The plan's entry for {name} needs a method ({', '.join(METHODS)}) and a whole rank, or a list of them: {entry!r}."
        )
    chosen = {key: value for key, value in entry.items() if key not in ("method", "rank")}
    try:
        return build(entry["method"], entry["rank"], chosen)
    except PlanError as error:
        raise PlanError(f"At {name}: {error}") from error


def _ranks(value: Any) -> bool:
    return type(value) is int or (isinstance(value, list) and bool(value) and all(type(rank) is int for rank in value))


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise PlanError(f"{text!r} is not a number.") from error
    return value


def _whole(name: str, text: str | None) -> int | None:
    if text is not None and not text.isdigit():
        raise PlanError(f"The option {name}={text} is not possible: it takes a whole number.")
    return None if text is None else int(text)
