"""What people look at: the analysis as a table, JSON and a plot."""

import io
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sarac.ir.errors import CheckpointError, SpectrumError, TraceError, near
from sarac.ir.graph import ModelGraph, Site, Whole, starred
from sarac.ir.methods import build, trainable_count
from sarac.ir.spectrum import Spectrum

_SHOWN = (0.3, 0.6, 0.9)


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
        return sum(_trainable(site, self.threshold) for site in self.sites)

    def to_json(self) -> str:
        """The analysis as JSON text: threshold, totals, one entry a site, and what was left out with the reason."""
        sites = [
            {**_row(site, self.spectrum(site.name)), "rank": rank, **self._seen(site.name)}
            for site, rank in zip(self.sites, self.ranks().values(), strict=True)
        ]
        head = {"threshold": self.threshold, "trainable": self.trainable, "parameters": self.parameters}
        return json.dumps({**head, "sites": sites, "skipped": dict(self.left_out)}, indent=1)

    def _seen(self, name: str) -> dict[str, Any]:
        """What the whole model showed of a site; nothing without example inputs."""
        whole = self.whole
        if whole is None:
            return {}
        siblings = next((list(group) for group in whole.siblings if name in group), [])
        calls, flops = whole.calls.get(name, 0), whole.flops.get(name, 0)
        return {"calls": calls, "flops": flops, "depth": whole.depths.get(name), "siblings": siblings}

    def left_out_table(self, by_site: bool = False) -> Table:
        """A rich table of what is left out and why, by kind of weight, or with `by_site` one row a weight."""
        table = Table(title="Parameters of two or more dimensions that are left out", title_justify="left")
        table.add_column("parameter", no_wrap=True)
        table.add_column("how many", justify="right")
        table.add_column("why")
        groups: dict[tuple[str, str], int] = defaultdict(int)
        for name, reason in self.left_out.items():
            groups[name if by_site else starred(name), reason] += 1
        for (kind, reason), count in groups.items():
            table.add_row(kind, str(count), reason)
        return table

    def table(self, by_site: bool = False) -> Table:
        """A rich table by kind of layer, or with `by_site` one row a weight."""
        share = f"k at {self.threshold:g}"
        table = Table(title=f"{self.title}: {len(self.sites)} linear sites", title_justify="left")
        for heading, right in [("weight", False), ("sites", True), ("(out, in)", True), ("form", False), (share, True)]:
            table.add_column(heading, justify="right" if right else "left", no_wrap=not right)
        for heading in ("k / n", "trainable", "parameters"):
            table.add_column(heading, justify="right")
        groups: dict[str, list[Site]] = defaultdict(list)
        for site in self.sites:
            groups[site.name if by_site else f"{site.kind} {site.full_shape}"].append(site)
        for members in groups.values():
            table.add_row(*self._cells(members, by_site))
        table.add_section()
        dense = sum(site.size for site in self.sites)
        table.add_row("all", str(len(self.sites)), "", "", "", "", f"{self.trainable:,}", f"{dense:,}")
        return table

    def _cells(self, members: list[Site], by_site: bool) -> list[str]:
        first, spectra = members[0], [self.spectrum(site.name) for site in members]
        ks = [one.rank_at(self.threshold) for spectrum in spectra for one in spectrum.matrices]
        full = min(first.shape)
        span = f"{min(ks)}" if min(ks) == max(ks) else f"{min(ks)}–{max(ks)}"
        return [
            first.name if by_site else first.kind,
            str(len(members)),
            " x ".join(str(size) for size in first.full_shape),
            first.form,
            span,
            f"{sum(ks) / len(ks) / full:.2f}",
            f"{sum(_trainable(site, self.threshold) for site in members):,}",
            f"{sum(site.size for site in members):,}",
        ]

    def plot(self, path: str | Path) -> None:
        """Draw k against depth, a line for each kind of layer, to an image file (PNG, SVG, PDF by the name's ending)."""
        from matplotlib.figure import Figure  # half a second to import, and only a plot needs it

        figure = Figure(figsize=(9.0, 5.0), layout="constrained")
        axes = figure.add_subplot()
        ranks = self.ranks()
        lines: dict[str, list[Site]] = defaultdict(list)
        for site in self.sites:
            lines[site.kind].append(site)
        for index, (kind, members) in enumerate(lines.items()):
            depths = [site.depth or 0 for site in members]
            shares = [ranks[site.name] / min(site.shape) for site in members]
            label = f"{_short(kind)}  n = {min(members[0].shape)}"
            axes.plot(depths, shares, marker="osD^v<>Px*"[index % 10], markersize=4, linewidth=1.2, label=label)
        axes.set_xlabel("layer")
        axes.set_ylabel(f"k / n at threshold {self.threshold:g}")
        axes.set_title(f"Threshold rank by depth: {self.title}", loc="left")
        axes.set_ylim(bottom=0.0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) <= 20:
            axes.legend(fontsize=8, frameon=False, ncols=2)
        try:
            if Path(path).is_dir():  # matplotlib would write beside it, under its name with an ending
                raise IsADirectoryError("it is a folder")
            figure.savefig(path, dpi=140)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"The plot cannot be written to {path}: {error}. Name a .png in a folder that exists."
            ) from error

    def __str__(self) -> str:
        """The table as text."""
        parts = [self.table(), *([self.left_out_table()] if self.left_out else [])]
        return "\n".join(as_text(part) for part in parts)


def as_text(table: Table, width: int = 130) -> str:
    """A rich table as plain text."""
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    text: Callable[[], str] = console.file.getvalue  # type: ignore[attr-defined]  # a StringIO
    return text().rstrip()


def _row(site: Site, spectrum: Spectrum) -> dict[str, Any]:
    ranks = {f"{share:g}": spectrum.rank_at(share) for share in _SHOWN}
    return {
        "site": site.name,
        "shape": list(site.full_shape),
        "dtype": str(site.dtype).removeprefix("torch."),
        "form": site.form,
        "reason": site.reason,
        "uses": len(site.uses),
        "others": list(site.others),
        "ranks": ranks,
        "full_rank": spectrum.full_rank,
        "numerical_rank": spectrum.numerical_rank,
        "largest": float(spectrum.values.max()),
        "sum": float(spectrum.values.sum()),
    }


def _trainable(site: Site, threshold: float) -> int:
    assert site.spectrum is not None
    ranks = [one.rank_at(threshold) for one in site.spectrum.matrices]
    return trainable_count(build("sara", ranks if site.parts else ranks[0], {}), site.shape)


def _short(kind: str) -> str:
    parts = [part for part in kind.removesuffix(".weight").split(".") if part != "*"]
    return ".".join(parts[-2:])
