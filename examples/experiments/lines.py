"""The lines of a file of results, asked by the specs that they were made by, and the tables that are made of them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from experiments.intervals import Mean, mean, paired
from experiments.methods import METHODS, searched_by
from experiments.search import Search
from experiments.spec import SEARCH_SEED, Spec

Line = Mapping[str, Any]
Value = Callable[[Line], Any]


@dataclass(frozen=True)
class Entry:
    """One row of a table: what it is called, and the spec whose seeds it is the mean of."""

    label: str
    spec: Spec


class Lines:
    """All lines; of a run that was made twice the last counts."""

    def __init__(self, lines: Iterable[Line]) -> None:
        self.all = list(lines)
        self.search = Search(self.all)
        self._known: dict[tuple[Any, ...], dict[int, Line]] = {}
        for line in self.all:
            spec = Spec.of(line)
            if "error" not in line and spec.seed != SEARCH_SEED:
                self._known.setdefault((*spec.cell, spec.lr), {})[spec.seed] = line

    @property
    def errors(self) -> list[Line]:
        """The runs that failed, and have not been made since."""
        done = {line["id"] for line in self.all if "error" not in line}
        return [line for line in {line["id"]: line for line in self.all if "error" in line}.values() if line["id"] not in done]

    def of(self, spec: Spec) -> dict[int, Line]:
        """The lines of a spec's cell by seed, at the rate that its search gives it, or that the search gave which stood in."""
        return self._found(spec)[1]

    def _found(self, spec: Spec) -> tuple[float | None, dict[int, Line], str]:
        """The rate of the first search with lines at it, these lines, and the plan of that search."""
        pair = searched_by(spec)
        if pair is None:
            return spec.lr, self._known.get((*spec.cell, spec.lr), {}), spec.plan
        rates = [(self.search.best(one), one[1]) for one in self.search.standing(pair)]
        found = [(rate, self._known.get((*spec.cell, rate), {}), plan) for rate, plan in rates]
        return next((one for one in found if one[1]), found[0] if found else (None, {}, spec.plan))

    def values(self, spec: Spec, value: Value | str = "nll") -> dict[int, float]:
        """One figure of every seed; seeds that do not have it are left out."""
        get: Value = (lambda line: line.get(value)) if isinstance(value, str) else value
        found = {seed: get(line) for seed, line in self.of(spec).items()}
        return {seed: float(one) for seed, one in found.items() if one is not None}

    def mean(self, spec: Spec, value: Value | str = "nll") -> Mean | None:
        """Its mean over the seeds."""
        found = list(self.values(spec, value).values())
        return mean(found) if found else None

    def timing(self, spec: Spec) -> Line | None:
        """The line of steps that a method took alone on the machine."""
        return self.of(replace(spec, kind="timing", steps=20, seed=0)).get(0)

    def rate(self, spec: Spec) -> str:
        """The rate as tables show it: a star where it is at the edge of what was searched, and what was searched in its place.

        Where a search of its own found another since, at which no run was made yet, that stands behind it.
        """
        pair, (used, _, plan) = searched_by(spec), self._found(spec)
        if not used or pair is None:
            return f"{used:g}" if used else ""
        own = self.search.best(pair)
        notes = [] if plan == spec.plan else [plan]
        notes += [f"its own: {own:g}"] if own != used else []
        return f"{used:g}{'*' if self.search.at_edge((pair[0], plan)) else ''}" + (f" ({'; '.join(notes)})" if notes else "")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


def comparison(lines: Lines, entries: Sequence[Entry], reference: Entry | None = None) -> str:
    """Entries side by side: what trains, the rate, the nll with its interval, the difference from the reference, what it cost."""
    heads = ["", "trains", "rate", "nll", *(["less that of " + reference.label] if reference else []), "unrelated nll",
             "s a run", "ms a step alone", "peak GiB beyond the model", "seeds"]  # fmt: skip
    base = lines.values(reference.spec) if reference else {}
    rows = []
    for entry in entries:
        found = lines.of(entry.spec)
        if not found:
            continue
        first, nll, other = next(iter(found.values())), lines.mean(entry.spec), lines.mean(entry.spec, "unrelated_nll")
        gap = paired(lines.values(entry.spec), base) if reference and entry != reference else None
        alone = lines.timing(entry.spec)
        peak = lines.mean(entry.spec, lambda line: line.get("peak_gib") if line.get("why_plain") == "" else None)
        seconds = lines.mean(entry.spec, "train_s")
        rows.append([
            entry.label, f"{first['trained']:,}", lines.rate(entry.spec), nll.text() if nll else "",
            *([difference(gap)] if reference else []), other.text() if other else "",
            f"{seconds.value:.1f}" if seconds else "", f"{alone['ms_step']:.1f}" if alone else "",
            "" if peak is None else f"{peak.value:.1f}", str(len(found)),
        ])  # fmt: skip
    return table(heads, rows) if rows else nothing(entries)


def difference(gap: Mean | None, digits: int = 3) -> str:
    """A paired difference with its p-value."""
    if gap is None:
        return ""
    return gap.text(digits, signed=True) + ("" if math.isnan(gap.p) else f" (p {gap.p:.2g})")


def nothing(entries: Sequence[Entry]) -> str:
    """What stands where no run has been made yet."""
    names = sorted({METHODS[entry.spec.method].label for entry in entries})
    return f"Not run yet: {', '.join(names)}."
