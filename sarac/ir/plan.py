"""Decisions: the plan that says which adapter every weight gets. JSON in and out."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sarac.ir.adapters import Adapter
from sarac.ir.errors import PlanError, near
from sarac.ir.methods import METHODS, build, describe, options, trainable_count

FORMAT = 2  # 1 had no shapes, hashes, siblings, note and totals, and is read as well
_KEYS = ("sarac_plan", "rule", "note", "base", "also_train", "siblings", "totals", "sites", "$schema")
_FACTS = ("shape", "trainable", "hash")  # what a site's entry says beside its decision


@dataclass(frozen=True)
class Plan:
    """Which adapter every weight gets, which other parameters train whole, and what base it was made for.

    `rule` and `note` say how it came about. What is known of the model does not tell two plans apart: the sites' `shapes`,
    the `siblings` that read one input, and the `hashes` of the weights.
    """

    sites: Mapping[str, Adapter]
    rule: str = ""
    also_train: tuple[str, ...] = ()
    base: str = ""
    note: str = ""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, compare=False)
    siblings: tuple[tuple[str, ...], ...] = field(default=(), compare=False)
    hashes: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Let what follows the router of another site know its rank."""
        sites = {name: self._linked(name, adapter) if adapter.router_of else adapter for name, adapter in self.sites.items()}
        object.__setattr__(self, "sites", sites)

    @property
    def trainable(self) -> dict[str, int]:
        """How many numbers train at every site whose shape is known; a router counts where it belongs."""
        shapes = {name: self.shapes[name] for name in self.sites if name in self.shapes}
        return {name: trainable_count(self.sites[name], (shape[-2], shape[-1])) for name, shape in shapes.items()}

    def to_json(self) -> str:
        """The plan as JSON text that people can read and edit, a line for each site; its schema is plan.schema.json."""
        counts: Mapping[str, int] = self.trainable
        totals = {"sites": len(self.sites), **({"trainable": sum(counts.values())} if len(counts) == len(self.sites) else {})}
        head = {"sarac_plan": FORMAT, "rule": self.rule, "note": self.note, "base": self.base, "totals": totals}
        head |= {"also_train": list(self.also_train)}
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        sites = []
        for name, adapter in self.sites.items():
            facts = {"shape": self.shapes.get(name), "trainable": counts.get(name), "hash": self.hashes.get(name)}
            entry = {**describe(adapter), **{key: value for key, value in facts.items() if value is not None}}
            sites.append(f"{json.dumps(name)}: {json.dumps(entry)}")
        groups = [json.dumps(group) for group in self.siblings]
        lines += [f'"siblings": [{_lines(groups)}]', f'"sites": {{{_lines(sites)}}}']
        return "{\n " + ",\n ".join(lines) + "\n}"

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan in JSON text; what is wrong with it is a PlanError that names the place."""
        try:
            data = json.loads(text, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:  # too deep, or a number of thousands of digits
            raise PlanError(f"The plan is not JSON: {error}. Write one with sarac plan MODEL --out plan.json.") from error
        known = isinstance(data, dict) and data.get("sarac_plan") in (1, FORMAT)
        if not known or not isinstance(data.get("sites"), dict):
            raise PlanError(f'The JSON is no plan of this version: it needs "sarac_plan": {FORMAT} (or 1) and "sites".')
        odd = next((key for key in data if key not in _KEYS), None)
        if odd is not None:
            raise PlanError(f"The plan has a key {odd!r} that means nothing. {near(odd, _KEYS)}")
        entries = data["sites"]
        sites = {name: _adapter(name, entry) for name, entry in entries.items()}
        further, siblings = data.get("also_train", []), data.get("siblings", [])
        if not _names(further):
            raise PlanError(f'The plan\'s "also_train" is a list of parameter names, not {further!r}.')
        if not isinstance(siblings, list) or not all(_names(group) for group in siblings):
            raise PlanError(f'The plan\'s "siblings" is a list of lists of names, not {siblings!r}.')
        shapes = {name: _shape(name, entry["shape"]) for name, entry in entries.items() if "shape" in entry}
        hashes = {name: str(entry["hash"]) for name, entry in entries.items() if "hash" in entry}
        rule, base, note = (str(data.get(key, "")) for key in ("rule", "base", "note"))
        return cls(sites, rule, tuple(further), base, note, shapes, tuple(tuple(group) for group in siblings), hashes)

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
        except UnicodeDecodeError as error:
            raise PlanError(f"The plan {path} is no text in UTF-8: write it again with sarac plan MODEL --out.") from error

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
            if self.shapes.get(name, shapes[name]) != shapes[name]:
                raise PlanError(
                    f"The plan was made for {name} of shape {self.shapes[name]}, and in the model it is {shapes[name]}: make a "
                    "plan of this model (sarac plan), or take the shape out of the entry."
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
            if adapter.borrowed and shapes[adapter.router_of][-1] != shape[-1]:
                raise PlanError(f"At {name}: router_of is {adapter.router_of!r}, which has another input: take it out.")

    def _linked(self, name: str, adapter: Adapter) -> Adapter:
        owner = self.sites.get(adapter.router_of)
        others = [other for other, one in self.sites.items() if other != name and one.method == "mosara" and not one.router_of]
        if owner is None or owner.router_of or owner.parts or owner.method != adapter.method:
            raise PlanError(
                f"At {name}: router_of is {adapter.router_of!r}, which has no router of its own in this plan. "
                f"{near(adapter.router_of, others)}"
            )
        ours, theirs = ({k: v for k, v in describe(one).items() if k not in ("rank", "router_of")} for one in (adapter, owner))
        odd = next((key for key in ours if ours[key] != theirs[key]), None)
        if odd is not None:
            raise PlanError(
                f"At {name}: {odd} is {ours[odd]!r}, and {theirs[odd]!r} at {adapter.router_of}, whose router it shares: make "
                "them the same, or take router_of out."
            )
        return replace(adapter, router_rank=owner.rank)  # type: ignore[type-var]  # every adapter is a dataclass


def _lines(items: list[str]) -> str:
    return "\n  " + ",\n  ".join(items) + "\n " if items else ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key stands twice: the first of the two would be lost in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise PlanError(f"In the plan {next(key for key in keys if keys.count(key) > 1)!r} stands twice: leave one out.")
    return found


def _adapter(name: str, entry: Any) -> Adapter:
    given = entry.get("method") if isinstance(entry, dict) else None
    if isinstance(given, str) and given not in METHODS:
        kinds = f"it is one of {', '.join(METHODS)}. {near(given, METHODS)}"
        raise PlanError(f"The plan's entry for {name} has the unknown method {given!r}: {kinds}")
    if not _method(entry) or not _ranks(entry.get("rank")):
        known = ["method", "rank", *_FACTS, *(options(entry["method"]) if _method(entry) else ())]
        odd = next((key for key in entry if key not in known), None) if isinstance(entry, dict) else None
        hint = f" The key {odd!r} means nothing there. {near(odd, known)}" if odd is not None else ""
        raise PlanError(
            f"The plan's entry for {name} needs a method ({', '.join(METHODS)}) and a whole rank, or a list of them: {entry!r}."
            f"{hint}"
        )
    chosen = {key: value for key, value in entry.items() if key not in ("method", "rank", *_FACTS)}
    try:
        return build(entry["method"], entry["rank"], chosen)
    except PlanError as error:
        raise PlanError(f"At {name}: {error}") from error


def _method(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("method"), str) and entry["method"] in METHODS


def _ranks(value: Any) -> bool:
    return type(value) is int or (isinstance(value, list) and bool(value) and all(type(rank) is int for rank in value))


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _shape(name: str, value: Any) -> tuple[int, ...]:
    if not _ranks(value) or not isinstance(value, list) or len(value) not in (2, 3):
        raise PlanError(f"The plan's shape of {name} is (out, in), or (parts, out, in), as a list of numbers: {value!r}.")
    return tuple(value)
