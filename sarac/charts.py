"""The figures of adapted sites as pictures: by layer, or over the steps of a training run; a line a kind, with its range."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sarac.plots import COLOURS, GREY, save, short

_PANELS = {
    "delta": "‖Δ‖ / ‖W‖",
    "grad": "norm of the gradient",
    "largest": "largest |δ|",
    "entropy": "entropy of the gates over log(sets)",
    "lost": "share of the delta that a merge loses",
}
_SPANS = 100.0  # from this ratio on an axis is logarithmic

Point = tuple[int, dict[str, Any]]  # where it stands, and a site's row of figures


def plot(path: str | Path | None, title: str, axis: str, points: Sequence[Point]) -> Any:
    """The picture as a matplotlib Figure, drawn to a file too where one is named; CheckpointError where that cannot be."""
    from matplotlib import rc_context  # half a second to import, and only a plot needs it
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = [name for name in _PANELS if any(row[name] is not None for _, row in points)]
    kinds = list(dict.fromkeys(row["kind"] for _, row in points))
    named = len(kinds) <= len(COLOURS)
    with rc_context({"axes.titlesize": 11, "axes.titlelocation": "left", "axes.grid": True, "grid.alpha": 0.25}):
        figure = Figure(figsize=(4.6 * max(1, len(names)), 4.6), layout="constrained")
        for index, name in enumerate(names):
            axes = figure.add_subplot(1, len(names), index + 1)
            for number, kind in enumerate(kinds):
                _draw(axes, [(at, row[name]) for at, row in points if row["kind"] == kind], COLOURS[number] if named else GREY)
            _scale(axes, [row[name] for _, row in points if row[name]])
            axes.spines[["top", "right"]].set_visible(False)
            axes.set(xlabel=axis, title=_PANELS[name])
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.suptitle(title, x=0.01, ha="left")
        if named and names:
            handles = [figure.axes[0].plot([], [], color=COLOURS[number], lw=3)[0] for number, _ in enumerate(kinds)]
            figure.legend(handles, [short(kind) for kind in kinds], loc="outside lower left", ncols=6, frameon=False, fontsize=9)
        if path is not None:
            save(figure, path)
        return figure


def _draw(axes: Any, points: Sequence[tuple[int, float | None]], colour: str) -> None:
    """The mean of the points at each place, and their range where there are several."""
    found: dict[int, list[float]] = defaultdict(list)
    for at, value in points:
        if value is not None:
            found[at].append(value)
    places = sorted(found)
    axes.plot(places, [sum(found[at]) / len(found[at]) for at in places], color=colour, lw=1.5, marker="o", ms=3)
    if any(len(values) > 1 for values in found.values()):
        low, high = [min(found[at]) for at in places], [max(found[at]) for at in places]
        axes.fill_between(places, low, high, color=colour, alpha=0.15, lw=0)


def _scale(axes: Any, values: Sequence[float]) -> None:
    if values and math.log10(max(values)) - math.log10(min(values)) > math.log10(_SPANS):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0.0)
