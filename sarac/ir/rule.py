"""Rules: how ranks follow from spectra, read from text such as `threshold:0.6,multiple=8; *.o_proj.weight=none`."""

import fnmatch
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache
from typing import Generic, TypeVar

from sarac.ir.errors import PlanError, near
from sarac.ir.methods import METHODS
from sarac.ir.spectrum import SLACK, Spectrum, require_share

Key = TypeVar("Key", bound=Hashable)  # what a matrix is known by: its weight's name, and which of a stack it is
RULES = ("threshold", "energy", "rank", "budget", "uniform")
NONE = "none"  # what an override says of a weight that gets no adapter
_LEAST = math.ulp(0.0)  # a threshold at which every rank is 1
_OWN = ("min", "max")  # options that an override does not take over from the rule


@dataclass(frozen=True)
class Decided(Generic[Key]):
    """The rank of every matrix, and in words what the rule came to where that is not plain from its text."""

    ranks: Mapping[Key, int]
    note: str = ""


@dataclass(frozen=True)
class Override:
    """The rule of the weights that a glob matches, None for those that get no adapter; `method` is "" for the plan's own."""

    glob: str
    rule: "Rule | None"
    method: str = ""


@dataclass(frozen=True)
class Rule:
    """How a rank follows from a spectrum: `threshold:t`, `energy:t`, `rank:k`, `budget:N`, `budget:P%`, `uniform:like=RULE`.

    `low`, `high` and `multiple` (`min=`, `max=`, `multiple=`) shape every rank; the other options go to the method. Behind
    semicolons stand overrides, GLOB=RULE, of which the last that matches a weight holds.
    """

    kind: str
    value: float = 0.0
    percent: bool = False
    low: int = 1
    high: int | None = None
    multiple: int = 1
    options: Mapping[str, str] = field(default_factory=dict)
    like: "Rule | None" = None
    overrides: tuple[Override, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Rule":
        """From text such as `threshold:0.6,min=4,train=factors; *.down_proj.weight=rank:8`."""
        first, *rest = text.split(";")
        head, *parts = [part.strip() for part in first.split(",")]
        rule = _shaped(_head(head), head, _options(parts, first), text)
        return replace(rule, overrides=tuple(_override(part.strip(), parts) for part in rest if part.strip()))

    @property
    def head(self) -> str:
        """The rule's text without its options."""
        return f"uniform:like={self.like.head}" if self.like else f"{self.kind}:{self.value:.15g}{'%' * self.percent}"

    def governing(self, names: Iterable[str]) -> int | None:
        """Which override holds for the weight of these names: the last that matches one of them; None for the rule itself."""
        found = [i for i, one in enumerate(self.overrides) if any(fnmatch.fnmatchcase(name, one.glob) for name in names)]
        return found[-1] if found else None

    def decide(
        self, spectra: Mapping[Key, Spectrum], cost: Callable[[Key, int], int], total: int, spent: int = 0
    ) -> Decided[Key]:
        """The rank of every matrix; `cost` gives the numbers that train at a rank.

        `total` is what a % is taken of, `spent` what a budget has left to others.
        """
        if self.kind == "budget":
            budget = int(Fraction(repr(self.value)) * total / 100) if self.percent else int(self.value)
            return self._budgeted(spectra, cache(cost), budget, spent)
        if self.like is not None:
            return self._uniform(self.like.decide(spectra, cost, total, spent), spectra, cache(cost))
        if self.kind == "rank" and spectra and all(self.value > s.full_rank for s in spectra.values()):
            most = max(s.full_rank for s in spectra.values())
            raise PlanError(f"rank:{int(self.value)} is above min(out, in) of every weight; the largest is {most}.")
        return Decided({key: self.rank_of(s) for key, s in spectra.items()})

    @property
    def alone(self) -> bool:
        """Whether a rank follows from its own spectrum, whatever the others are."""
        return self.kind in ("threshold", "energy", "rank")

    @property
    def bare(self) -> bool:
        """Whether a rank is what the spectrum gives, unshaped by other options."""
        return (self.low, self.high, self.multiple) == (1, None, 1)

    def rank_of(self, spectrum: Spectrum) -> int:
        """The rank of one matrix, where the rule decides each alone."""
        return self._clamp(self._rank(spectrum), spectrum)

    def _rank(self, spectrum: Spectrum) -> int:
        if self.kind == "rank":
            return int(self.value)
        return spectrum.rank_at(self.value) if self.kind == "threshold" else spectrum.rank_at_energy(self.value)

    def _clamp(self, rank: int, spectrum: Spectrum) -> int:
        rank = -(-max(rank, self.low) // self.multiple) * self.multiple
        high = spectrum.full_rank if self.high is None else self.high // self.multiple * self.multiple
        return min(rank, high, spectrum.full_rank)

    def _budgeted(
        self, spectra: Mapping[Key, Spectrum], cost: Callable[[Key, int], int], budget: int, spent: int
    ) -> Decided[Key]:
        def at(share: float, rank_at: Callable[[Spectrum, float], int]) -> dict[Key, int]:
            return {key: self._clamp(rank_at(s, share), s) for key, s in spectra.items()}

        def total(ranks: Mapping[Key, int]) -> int:
            return spent + sum(cost(key, rank) for key, rank in ranks.items())

        def found(rank_at: Callable[[Spectrum, float], int]) -> float:
            """The largest of all thresholds that fits: the totals grow with it, so bisecting the doubles finds it."""
            first, last = _LEAST, 1.0
            if total(at(last, rank_at)) <= budget:
                return last
            while first < (middle := (first + last) / 2) < last:
                first, last = (middle, last) if total(at(middle, rank_at)) <= budget else (first, middle)
            ranks = at(first, rank_at)  # a short number with the same ranks reads more easily, and is far from where they change
            short = (_floored(first, digits) for digits in range(1, 17))
            return next((t for t in short if t and at(t, rank_at) == ranks), first)

        least = total(at(_LEAST, _counted))
        if least > budget:
            fixed = f" Overrides and also_train alone take {spent}." if spent else ""
            raise PlanError(
                f"The budget of {budget} numbers fits nothing: the least that this plan trains is {least}.{fixed} Give that "
                "much, or take fewer weights."
            )
        share = found(_counted)
        ranks = at(share, Spectrum.rank_at)
        if ranks != at(share, _counted):  # within the errors of the values: once more by what is certain
            share = found(Spectrum.rank_at)
            ranks = at(share, Spectrum.rank_at)
        return Decided(ranks, f"threshold:{share!r}; {budget - total(ranks):,} of {budget:,} numbers left over")

    def _uniform(self, like: Decided[Key], spectra: Mapping[Key, Spectrum], cost: Callable[[Key, int], int]) -> Decided[Key]:
        assert self.like is not None
        goal = sum(cost(key, rank) for key, rank in like.ranks.items())

        def total(rank: int) -> int:
            return sum(cost(key, self._clamp(rank, s)) for key, s in spectra.items())

        most = max((s.full_rank for s in spectra.values()), default=1)
        rank = bisect_right(range(1, most + 1), goal, key=total)
        ranks = {key: self._clamp(rank, s) for key, s in spectra.items()}
        note = f"rank {max(ranks.values(), default=rank)} everywhere; {goal - total(rank):,} of the {goal:,} numbers of "
        return Decided(ranks, f"{note}{self.like.head} left over")


def _head(text: str) -> Rule:
    kind, _, like = text.partition(":like=")
    if kind == "uniform" and like:
        return Rule(kind, like=_head(like))
    match = re.fullmatch(r"(\w+):([\d.]+(?:e-?\d+)?)(%?)", text)
    if match is None or match[1] not in RULES[:-1] or (match[3] and match[1] != "budget"):
        raise PlanError(
            f"The rule {text!r} is not understood: write threshold:0.6, energy:0.9, rank:16, budget:100000, budget:0.5% or "
            "uniform:like=threshold:0.6, then options such as ,min=4,multiple=8,train=factors, then overrides such as "
            "; *.o_proj.weight=none. A plan's JSON file goes where plans go: sarac transform --plan."
        )
    rule = Rule(match[1], _number(match[2]), bool(match[3]))
    if rule.kind in ("threshold", "energy"):
        require_share(rule.value)
    if rule.kind == "rank" and not (rule.value.is_integer() and rule.value >= 1):
        raise PlanError(f"A rank is a whole number of at least 1; {text!r} gives {rule.value}.")
    if rule.kind == "budget" and not 0 < rule.value < math.inf:
        raise PlanError(f"A budget is above 0 and finite; {text!r} gives {rule.value}.")
    return rule


def _options(parts: list[str], text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in parts:
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise PlanError(f"The option {part!r} in the rule {text!r} is not understood: write name=value.")
        if name in options:
            raise PlanError(f"The option {name!r} stands twice in the rule {text!r}: leave one out.")
        options[name] = value
    return options


def _shaped(rule: Rule, head: str, options: dict[str, str], text: str) -> Rule:
    """The rule with its options, and what it is like with the same."""
    low, high, multiple = (_whole(name, options.pop(name, None)) for name in ("min", "max", "multiple"))
    low, multiple = 1 if low is None else low, 1 if multiple is None else multiple
    if multiple < 1:
        raise PlanError(f"The option multiple={multiple} is not possible: ranks are rounded up to a multiple of at least 1.")
    if low < 1 or (high is not None and high // multiple * multiple < max(1, low)):
        behind = f", rounded to multiples of {multiple}" if multiple > 1 else ""
        raise PlanError(f"The bounds in {text!r} leave no rank: min is at least 1 and max at least min{behind}.")
    like = rule.like and _shaped(rule.like, head, {**options, **_given(low, high, multiple)}, text)
    return replace(rule, low=low, high=high, multiple=multiple, options=options, like=like)


def _given(low: int, high: int | None, multiple: int) -> dict[str, str]:
    bounds = {"min": low, "max": high, "multiple": multiple}
    return {name: str(value) for name, value in bounds.items() if value is not None}


def _override(text: str, general: list[str]) -> Override:
    """GLOB=RULE; of the rule's own options it takes over all but the bounds, and those of the method where it keeps that."""
    glob, equals, rule = (piece.strip() for piece in text.partition("="))
    if not equals or not glob or not rule:
        raise PlanError(f"The override {text!r} is not understood: write GLOB=RULE, such as '*.o_proj.weight=rank:8' or =none.")
    if rule == NONE:
        return Override(glob, None)
    head, *parts = [part.strip() for part in rule.split(",")]
    own = _options(parts, rule)
    method = own.pop("method", "")
    if method and method not in METHODS:
        raise PlanError(f"The method {method!r} in the override {text!r} is unknown. {near(method, METHODS)}")
    taken = {name: value for name, value in _options(general, rule).items() if name not in _OWN}
    if method:
        taken = {name: value for name, value in taken.items() if name == "multiple"}
    return Override(glob, _shaped(_head(head), head, {**taken, **own}, text), method)


def _counted(spectrum: Spectrum, share: float) -> int:
    """The rank at a share by the values as they were measured, whatever their errors."""
    goal = share - SLACK * spectrum.full_rank
    found = int((spectrum.shares() < goal).sum()) + 1 if share < 1.0 else spectrum.numerical_rank
    return max(1, min(found, spectrum.numerical_rank))


def _floored(value: float, digits: int) -> float:
    return float(Fraction(math.floor(Fraction(value) * 10**digits), 10**digits))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise PlanError(f"{text!r} is not a number.") from error


def _whole(name: str, text: str | None) -> int | None:
    if text is not None and not re.fullmatch(r"[0-9]{1,18}", text):
        raise PlanError(f"The option {name}={text} is not possible: it takes a whole number.")
    return None if text is None else int(text)
