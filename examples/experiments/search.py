"""The search for learning rates: which rate was best, whether it lies at the edge of what was tried, what to try next."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from experiments.methods import METHODS, RATES, SEARCHED, searched_by
from experiments.spec import SEARCH_SEED, Spec

Line = Mapping[str, Any]
FURTHER = 2  # rates by which a search may go on where its best lies at the edge


class Search:
    """What the lines of a search say, by method and plan."""

    def __init__(self, lines: Iterable[Line]) -> None:
        self.found: dict[tuple[str, str], dict[float, float]] = {}
        self._specs: dict[tuple[str, str], Spec] = {}
        for line in lines:
            spec = Spec.of(line)
            if spec.seed == SEARCH_SEED and "error" not in line:
                pair = (spec.method, spec.plan)
                nll = line["valid_nll"]
                self.found.setdefault(pair, {})[spec.lr] = nll if nll == nll else float("inf")
                self._specs[pair] = spec

    def made(self, pair: tuple[str, str]) -> tuple[str, str]:
        """The pair itself where its search was made, else the one that stands in for it."""
        return next(iter(self.standing(pair)), pair)

    def standing(self, pair: tuple[str, str]) -> list[tuple[str, str]]:
        """The searches that were made of those that may give a rate for this pair, the nearest first."""
        name, plan = pair
        return [(name, one) for one in METHODS[name].searched(plan) if (name, one) in self.found]

    def best(self, pair: tuple[str, str]) -> float | None:
        """The rate with the lowest nll on the rows that are held out of training; None where nothing was searched."""
        tried = self.found.get(self.made(pair))
        return min(tried, key=lambda rate: tried[rate]) if tried else None

    def at_edge(self, pair: tuple[str, str]) -> bool:
        """Whether the best rate is the lowest or the highest that was tried."""
        tried = self.found[self.made(pair)]
        return self.best(pair) in (min(tried), max(tried))

    def further(self) -> list[Spec]:
        """One more rate, on the log grid, for each search whose best lies at its edge; at most `FURTHER` in all."""
        more = []
        for pair, tried in self.found.items():
            best = self.best(pair)
            if best is None or not self.at_edge(pair) or len(tried) >= SEARCHED + FURTHER:
                continue
            index = RATES.index(best) + (1 if best == max(tried) else -1)
            if 0 <= index < len(RATES):
                more.append(replace(self._specs[pair], lr=RATES[index], extras=()))
        return more

    def resolved(self, specs: Sequence[Spec]) -> tuple[list[Spec], list[Spec]]:
        """The specs with their rates, and those whose search is missing."""
        done, waiting = [], []
        for spec in specs:
            pair = searched_by(spec)
            rate = self.best(pair) if pair else spec.lr
            (waiting if rate is None else done).append(spec if rate is None else replace(spec, lr=rate))
        return done, waiting
