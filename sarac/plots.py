"""The figures of an analysis as a picture of three panels: k by depth, the cumulative curves, and the budget."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sarac.figures import budget, curve, key, ranks_on
from sarac.ir.errors import CheckpointError
from sarac.ir.graph import Site

_NAMED = 12  # kinds that have a colour and a name of their own; of more the lines are grey, and their median is drawn
_THIN = 8  # weights of a kind whose curves are drawn one by one; of more the median and the range
_POINTS = 129
_STEPS = [0.02, *(step / 25 for step in range(1, 26))]
# Okabe and Ito's first
COLOURS = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #7f3c8d #666666 #8c564b #b5a300 #1b4965 #e03131".split()
GREY, _INK = "#9aa0a6", "#c92a2a"


def plot(path: str | Path | None, title: str, sites: Sequence[Site], threshold: float, parameters: int) -> Any:
    """The picture as a matplotlib Figure, drawn to a file too where one is named; CheckpointError where that cannot be."""
    from matplotlib import rc_context  # half a second to import, and only a plot needs it
    from matplotlib.figure import Figure

    lines: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        lines[f"{site.kind} {site.full_shape}"].append(site)
    named = len(lines) <= _NAMED
    colours = {kind: COLOURS[index % len(COLOURS)] if named else GREY for index, kind in enumerate(lines)}
    with rc_context({"axes.titlesize": 11, "axes.titlelocation": "left", "axes.grid": True, "grid.alpha": 0.25}):
        figure = Figure(figsize=(15.0, 5.4), layout="constrained")
        depth, curves, cost = figure.subplots(1, 3)
        for axes in (depth, curves, cost):
            axes.spines[["top", "right"]].set_visible(False)
        draw_depth(depth, lines, colours, threshold)
        draw_curves(curves, lines, colours, threshold)
        draw_budget(cost, sites, threshold, parameters)
        head = f"{title}: {len(sites)} linear weights of {len(lines)} kinds, threshold {key(threshold)}"
        figure.suptitle(head, x=0.01, ha="left")
        if named:
            handles = [curves.plot([], [], color=colours[kind], lw=3)[0] for kind in lines]
            labels = [f"{short(kind)}  {' x '.join(str(n) for n in members[0].full_shape)}" for kind, members in lines.items()]
            figure.legend(handles, labels, loc="outside lower left", ncols=4, frameon=False, fontsize=9)
        if path is not None:
            save(figure, path)
        return figure


def draw_depth(axes: Any, lines: Mapping[str, Sequence[Site]], colours: Mapping[str, str], threshold: float) -> None:
    """k / n by layer, a line a kind, with its range where a layer has several; dashed what stands outside all layers."""
    layered = any(site.depth is not None for members in lines.values() for site in members)
    pooled: dict[int, list[float]] = defaultdict(list)
    place = 0
    for kind, members in lines.items():
        found: dict[int | None, list[float]] = defaultdict(list)
        for site in members:
            ranks = ranks_on(site, [threshold])[0]
            found[site.depth if layered else place] += [rank / min(site.shape) for rank in ranks]
            place += 1
        outside, style = found.pop(None, []), {"color": colours[kind], "lw": 1.5 if len(lines) <= _NAMED else 0.5}
        for share in outside:
            axes.axhline(share, ls=(0, (6, 3)), **style)
        at = sorted(found, key=lambda layer: layer or 0)
        means = [sum(found[layer]) / len(found[layer]) for layer in at]
        axes.plot(at, means, marker="o", ms=4 if len(lines) <= _NAMED else 2, **style)
        axes.fill_between(at, [min(found[n]) for n in at], [max(found[n]) for n in at], color=style["color"], alpha=0.15, lw=0)
        for layer, shares in found.items():
            pooled[layer or 0] += shares
    if len(lines) > _NAMED and layered:
        at_all = sorted(pooled)
        axes.plot(at_all, [float(torch.tensor(pooled[n]).median()) for n in at_all], color="black", lw=2, label="median")
        axes.legend(frameon=False, fontsize=9)
    axes.set(ylim=(0, min(1.05, axes.get_ylim()[1] * 1.1)), ylabel=f"k / n at {key(threshold)}")
    axes.set(xlabel="layer" if layered else "weights in the model's order", title="Rank by depth")
    axes.xaxis.get_major_locator().set_params(integer=True)


def draw_curves(axes: Any, lines: Mapping[str, Sequence[Site]], colours: Mapping[str, str], threshold: float) -> None:
    """The share of the sum that the first k values reach: every weight of a small kind, of a large one median and range."""
    at = torch.linspace(0, 1, _POINTS, dtype=torch.float64)
    few = len(lines) <= _NAMED
    for kind, members in lines.items():
        drawn = torch.stack([_on(at, site) for site in members])
        if few and len(members) > _THIN:
            axes.fill_between(at, drawn.amin(0), drawn.amax(0), color=colours[kind], alpha=0.12, lw=0)
            drawn = drawn.median(0).values[None]
        width, strength = (1.6, 1.0) if few and len(drawn) == 1 else (0.8, 0.7 if few else 0.35)
        axes.plot(at, drawn.T, color=colours[kind], lw=width, alpha=strength)
    axes.plot([0, 1], [0, 1], color="black", lw=0.8, ls=":", alpha=0.6)
    axes.axhline(threshold, color=_INK, lw=1, ls="--")
    axes.annotate(
        f"threshold {key(threshold)}", (1, threshold), (0, -4), textcoords="offset points", color=_INK, ha="right", va="top"
    )
    axes.set(xlim=(0, 1), ylim=(0, 1.005), xlabel="k / n", ylabel="share of the sum of the singular values")
    many = any(len(members) > _THIN for members in lines.values())
    axes.set_title("Cumulative curves" + (" (median and range of a kind)" if few and many else ""))


def draw_budget(axes: Any, sites: Sequence[Site], threshold: float, parameters: int) -> None:
    """How many numbers train at every threshold, with the chosen one marked."""
    steps = sorted({*_STEPS, threshold})
    counts = budget(sites, steps)
    chosen = counts[steps.index(threshold)]
    axes.plot(steps, counts, color=COLOURS[0], lw=2)
    axes.plot([threshold, threshold, 0], [0, chosen, chosen], color=_INK, lw=1, ls="--")
    axes.plot([threshold], [chosen], "o", color=_INK, ms=7)
    left = threshold < 0.5
    words = f"{chosen:,} numbers\n{chosen / max(1, parameters):.3%} of {parameters:,}"
    axes.annotate(
        words,
        (threshold, chosen),
        (8 if left else -8, -2 if left else 4),
        textcoords="offset points",
        color=_INK,
        ha="left" if left else "right",
        va="top" if left else "bottom",
    )
    axes.set(xlim=(0, 1), ylim=(0, max(counts) * 1.05 or 1), xlabel="threshold", ylabel="numbers that train")
    axes.set_title("Budget of SARA's singular values")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _on(at: torch.Tensor, site: Site) -> torch.Tensor:
    """A site's curve on shares of n, from (0, 0)."""
    ks, shares, _ = curve(site, min(site.shape))
    x, y = torch.tensor([0, *ks], dtype=torch.float64) / min(site.shape), torch.tensor([0.0, *shares], dtype=torch.float64)
    right = torch.searchsorted(x, at).clamp(1, len(x) - 1)
    return y[right - 1] + (at - x[right - 1]) / (x[right] - x[right - 1]) * (y[right] - y[right - 1])


def save(figure: Any, path: str | Path) -> None:
    """Draw a Figure to an image file; CheckpointError where that cannot be."""
    try:
        if Path(path).is_dir():  # matplotlib would write beside it, under its name with an ending
            raise IsADirectoryError("it is a folder")
        figure.savefig(path, dpi=140)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The plot cannot be written to {path}: {error}. Name a .png in a folder that exists.") from error


def short(kind: str) -> str:
    """The last two words of a kind's name."""
    parts = [part for part in kind.partition(" ")[0].removesuffix(".weight").split(".") if part != "*"]
    return ".".join(parts[-2:])
