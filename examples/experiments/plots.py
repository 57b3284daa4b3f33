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
    for number, (name, points) in enumerate(shown.items()):
        places = sorted(points)
        values = [_of(points[x]) for x in places]
        how = {"linestyle": DASHES[number // 10 % len(DASHES)], "marker": "o", "markersize": 3, "capsize": 2}
        axes.errorbar(places, [v for v, _ in values], [h for _, h in values], label=name, **how)
    if log:
        axes.set_xscale("log")
    axes.set_xlabel(across)
    axes.set_ylabel(up + _cut(axes, [_of(one)[0] for points in shown.values() for one in points.values()]))
    many = len(shown) > 6
    axes.legend(fontsize=6, **({"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if many else {}))
    return _written(figure, path)


def _cut(axes: Any, values: Sequence[float]) -> str:
    """Leave out what is far above nearly all, as of runs that diverged, so the rest can be told apart; how many those are."""
    most = sorted(values)[int(0.95 * (len(values) - 1))]
    above = sum(value > 2 * most for value in values)
    if above:
        axes.set_ylim(top=1.15 * most, bottom=min(values) - 0.05 * (most - min(values)))
    return f"\n({above} far above are not shown)" if above else ""


def grouped(points: Mapping[str, Sequence[tuple[str, Any]]], path: Path, up: str) -> str:
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
    axes.legend(fontsize=7)
    return _written(figure, path)


def scatter(points: Mapping[str, Sequence[tuple[float, float]]], path: Path, across: str, up: str) -> str:
    """Dots, a colour a name; "" where there is nothing."""
    if not any(points.values()):
        return ""
    figure, axes = _axes()
    for name, found in points.items():
        axes.scatter([x for x, _ in found], [y for _, y in found], s=16, label=name)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.legend(fontsize=7)
    return _written(figure, path)


def plain(lines: Mapping[str, Sequence[float]], path: Path, across: str, up: str) -> str:
    """Values one behind the other, a line a name; "" where there is nothing."""
    return curves({name: dict(enumerate(found)) for name, found in lines.items()}, path, across, up)
