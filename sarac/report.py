"""What people look at: the analysis, a value that shows itself as a table, JSON, a frame, a plot and a page."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.table import Table

from sarac import page, plots, tables
from sarac.figures import Row, kinds, remarks, row, spectrum_of, trainable
from sarac.ir.cost import device_name
from sarac.ir.errors import InputError, SpectrumError, TraceError, near
from sarac.ir.graph import ModelGraph, Site, Whole
from sarac.ir.methods import build
from sarac.ir.plan import Plan
from sarac.ir.spectrum import Spectrum
from sarac.scheduling import Schedules, of_sites
from sarac.tables import as_text


@dataclass(frozen=True)
class Analysis:
    """The measured weights of a model, in its order, with their spectra and ranks, and what was left out and why.

    `graph` has the traced model, with the ranks in `node.meta` too; None where only its files were read.
    """

    sites: tuple[Site, ...]
    threshold: float
    title: str  # what was measured: the model's class, or a folder
    parameters: int  # how many numbers the model has
    left_out: Mapping[str, str] = field(default_factory=dict)  # every further parameter of two or more dimensions: why
    whole: Whole | None = None
    graph: ModelGraph | None = None

    @classmethod
    def of(cls, graph: ModelGraph, threshold: float, names: frozenset[str]) -> "Analysis":
        """The analysis of these sites of a traced model, which have their spectra."""
        sites = tuple(site for name, site in graph.sites.items() if name in names)
        reasons = {name: site.reason or "`where` leaves it out" for name, site in graph.sites.items() if name not in names}
        parameters = sum(parameter.numel() for parameter in graph.module.parameters())
        left_out, title = {**reasons, **graph.skipped}, type(graph.module).__name__
        return cls(sites, threshold, title, parameters, left_out, graph.whole, graph)

    def spectrum(self, name: str) -> Spectrum:
        """The spectrum of this weight, by any of its names."""
        site = next((site for site in self.sites if name in site.names), None)
        if site is None and name in self.left_out:
            raise SpectrumError(f"{name} was not measured ({self.left_out[name]}): take it into `where`.")
        if site is None:
            raise TraceError(f"The analysis has no linear site {name!r}. {near(name, [site.name for site in self.sites])}")
        assert site.spectrum is not None
        return site.spectrum

    def ranks(self, threshold: float | None = None) -> dict[str, int]:
        """The rank of every measured weight at a threshold (default: the analysis's own); of a stack the largest."""
        share = self.threshold if threshold is None else threshold
        return {site.name: self.spectrum(site.name).rank_at(share) for site in self.sites}

    @property
    def trainable(self) -> int:
        """How many numbers SARA's singular values would train at the threshold."""
        return sum(trainable(site, self.threshold) for site in self.sites)

    def rows(self) -> list[Row]:
        """All figures of every weight as JSON values, in the model's order: what every view shows."""
        return [dict(one) for one in self._rows]

    @cached_property
    def _rows(self) -> list[Row]:
        return [row(site, self.threshold, self.whole) for site in self.sites]

    def to_json(self) -> str:
        """The analysis as JSON text: threshold, totals, an entry a site and one a kind, what was left out with the reason."""
        return json.dumps(self._document(), indent=1)

    def _document(self) -> dict[str, Any]:
        head = {"title": self.title, "threshold": self.threshold, "trainable": self.trainable, "parameters": self.parameters}
        groups = {"kinds": kinds(self._rows), "remarks": remarks(self._rows)}
        return {**head, "sites": self._rows, **groups, "skipped": dict(self.left_out)}

    def to_frame(self) -> Any:
        """A pandas.DataFrame with a row a weight, its ranks in columns of their own; InputError without pandas."""
        try:
            from pandas import DataFrame  # type: ignore[import-untyped]  # no dependency: where it is, a notebook has loaded it already
        except ImportError as error:
            raise InputError("A frame needs pandas, which is not installed: pip install pandas, or take rows().") from error
        flat = [{**one, **{f"k at {share}": rank for share, rank in one["ranks"].items()}} for one in self._rows]
        return DataFrame([{name: value for name, value in one.items() if name not in _NESTED} for one in flat])

    def table(self, by_site: bool = False, width: int = 130) -> Table:
        """A rich table by kind of layer, or with `by_site` one row a weight, made to be read at this width."""
        return tables.table(self.title, self.threshold, self._rows, by_site, width)

    def left_out_table(self, by_site: bool = False) -> Table:
        """A rich table of what is left out and why, by kind of weight, or with `by_site` one row a weight."""
        return tables.left_out_table(self.left_out, by_site)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw k by depth, the cumulative curves and the budget: to an image file (PNG, SVG, PDF by its ending), as a Figure."""
        return plots.plot(path, self.title, self.sites, self.threshold, self.parameters)

    @property
    def plan(self) -> Plan:
        """The plan of SARA's singular values at the threshold, for all measured weights but those of zeros."""
        sites = [site for site in self.sites if not spectrum_of(site).is_zero]
        ranks = {site.name: [one.rank_at(self.threshold) for one in spectrum_of(site).matrices] for site in sites}
        adapters = {site.name: build("sara", ranks[site.name] if site.parts else ranks[site.name][0], {}) for site in sites}
        siblings = self.whole.groups(adapters) if self.whole else ()
        return Plan(
            adapters, f"threshold:{self.threshold!r}", shapes={site.name: site.full_shape for site in sites}, siblings=siblings
        )

    def schedules(self, tokens: int = 8192, device: str = "") -> Schedules:
        """How calls of so many tokens run while SARA's singular values train at the threshold, as sarac.schedule shows it.

        `device`: the name that `sarac tune` keeps its rates under; default: the device that the model is on.
        """
        here = next(self.graph.module.parameters()).device if self.graph else "cpu"
        ranks = {site: self.spectrum(site.name).rank_at(self.threshold) for site in self.sites if not spectrum_of(site).is_zero}
        return of_sites(ranks, tokens, device or device_name(here))

    def report(self, folder: str | Path, *, plan: Plan | None = None, command: str = "") -> Path:
        """Write one page, folder/index.html, that needs no network: tables, curves, a threshold to move, the plan or another."""
        return page.write(Path(folder), self._document(), self.sites, (plan or self.plan).to_json(), command)

    def __str__(self) -> str:
        """The table as text."""
        parts = [self.table(), *([self.left_out_table()] if self.left_out else [])]
        return "\n".join(as_text(part) for part in parts)

    def _repr_html_(self) -> str:
        return tables.html(self.title, self.threshold, self._rows, len(self.left_out))


_NESTED = ("ranks", "least_ranks")
