"""The plots of the studies; each is written beside RESULTS.md, and what stands there for it is given back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.intervals import Mean

SIZE, DPI = (7.0, 4.0), 80
DASHES = ("-", "--", ":")  # after ten colours


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # the machine that makes the runs need not have it

    figure = Figure(figsize=SIZE)
    return figure, figure.subplots()


def _written(figure: Any, path: Path) -> str:
    if figure.get_layout_engine() is None:
        figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return f"![{path.stem.replace('_', ' ')}]({path.parent.name}/{path.name})"


def _of(value: Any) -> tuple[float, float]:
    """A value and half of its interval."""
    return (value.value, 0.0 if value.half != value.half else value.half) if isinstance(value, Mean) else (float(value), 0.0)


def curves(lines: Mapping[str, Mapping[float, Any]], path: Path, across: str, up: str, log: bool = False) -> str:
    """A line a name, with intervals; "" where there is nothing."""
    shown = {name: points for name, points in lines.items() if points}
    if not shown:
        return ""
    figure, axes = _axes()
    _drawn(axes, shown, log)
    axes.set_xlabel(across)
    axes.set_ylabel(up + _cut(axes, [_of(one) for points in shown.values() for one in points.values()]))
    many = len(shown) > 6
    axes.legend(fontsize=6, **({"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if many else {}))
    return _written(figure, path)


def _drawn(axes: Any, lines: Mapping[str, Mapping[float, Any]], log: bool) -> None:
    """The lines of one pair of axes."""
    for number, (name, points) in enumerate(lines.items()):
        places = sorted(points)
        values = [_of(points[x]) for x in places]
        how = {"linestyle": DASHES[number // 10 % len(DASHES)], "marker": "o", "markersize": 3, "capsize": 2}
        axes.errorbar(places, [v for v, _ in values], [h for _, h in values], label=name, **how)
    if log:
        axes.set_xscale("log")


def panels(parts: Mapping[str, Mapping[str, Mapping[float, Any]]], path: Path, across: str, up: str, log: bool = False) -> str:
    """Small plots two abreast, each with its title: with a legend each and one scale, or, of the same names, with one legend."""
    from matplotlib.figure import Figure

    shown = {title: lines for title, lines in parts.items() if lines}
    if not shown:
        return ""
    alike = len({tuple(lines) for lines in shown.values()}) == 1
    rows = (len(shown) + 1) // 2
    figure = Figure(figsize=(9.0 if alike else 10.5, 2.6 * rows), layout="constrained")
    every = figure.subplots(rows, 2, sharex=True, sharey=not alike, squeeze=False).flatten()
    for axes, (title, lines) in zip(every, shown.items(), strict=False):
        _drawn(axes, lines, log)
        axes.set_title(title, fontsize=8)
        if not alike:
            axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    if alike:
        figure.legend(*every[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    else:
        values = [_of(one) for lines in shown.values() for points in lines.values() for one in points.values()]
        up += _cut(every[0], values)
    for axes in every[len(shown) :]:
        axes.set_visible(False)
    figure.supxlabel(across, fontsize=8)
    figure.supylabel(up, fontsize=8)
    return _written(figure, path)


def _cut(axes: Any, values: Sequence[tuple[float, float]]) -> str:
    """Leave out what reaches far above nearly all, as of runs that diverged, so the rest can be told apart; how many those are.

    Each value comes with half of its interval: one that is uncertain up to there is left out as well.
    """
    most = sorted(value for value, _ in values)[int(0.95 * (len(values) - 1))]
    rest = [(value - half, value + half) for value, half in values if value + half <= 2 * most]
    above = len(values) - len(rest)
    if above:
        low, high = min(one for one, _ in rest), max(one for _, one in rest)
        axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
    return f"\n({above} far above {'is' if above == 1 else 'are'} not shown)" if above else ""


def grouped(points: Mapping[str, Sequence[tuple[str, Any]]], path: Path, up: str, log: bool = False) -> str:
    """Points with intervals at named places, a colour a name; "" where there is nothing."""
    shown = {name: [(place, one) for place, one in found if one] for name, found in points.items()}
    places = list(dict.fromkeys(place for found in shown.values() for place, _ in found))
    if not places:
        return ""
    figure, axes = _axes()
    for number, (name, found) in enumerate(shown.items()):
        values = [_of(one) for _, one in found]
        at = [places.index(place) + 0.1 * (number - len(shown) / 2) for place, _ in found]
        axes.errorbar(at, [v for v, _ in values], [h for _, h in values], fmt="o", markersize=4, capsize=2, label=name)
    axes.set_xticks(range(len(places)), places, fontsize=7)
    axes.set_ylabel(up)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend(fontsize=7)
    return _written(figure, path)


def paths(points: Mapping[str, Sequence[tuple[float, float]]], path: Path, across: str, up: str) -> str:
    """Dots joined in their order, a colour a name; "" where there is nothing."""
    if not any(points.values()):
        return ""
    figure, axes = _axes()
    for name, found in points.items():
        axes.plot([x for x, _ in found], [y for _, y in found], marker="o", markersize=4, linewidth=1, label=name)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.legend(fontsize=7)
    return _written(figure, path)


def plain(lines: Mapping[str, Sequence[float]], path: Path, across: str, up: str) -> str:
    """Values one behind the other, a line a name; "" where there is nothing."""
    return curves({name: dict(enumerate(found)) for name, found in lines.items()}, path, across, up)
