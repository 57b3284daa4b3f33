"""The report: one HTML page that needs no network and works from a file, with the figures of an analysis and its curves."""

import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from sarac.figures import curve, grid, points_each, ranks_on
from sarac.ir.errors import CheckpointError
from sarac.ir.graph import Site
from sarac.ir.record import __version__

_PLACE = "{{data}}"


def write(folder: Path, document: dict[str, Any], sites: Sequence[Site], plan: str | None, command: str) -> Path:
    """Write folder/index.html, aside first; CheckpointError where that cannot be."""
    template = (files("sarac") / "page.html").read_text(encoding="utf-8")
    text = template.replace(_PLACE, embedded(data(document, sites, plan, command)))
    path = folder / "index.html"
    aside = folder / f".index-{os.getpid()}.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise CheckpointError(f"The report cannot be written to {path}: {error.strerror}. Name another folder.") from error
    finally:
        if folder.is_dir():
            aside.unlink(missing_ok=True)
    return path


def data(document: dict[str, Any], sites: Sequence[Site], plan: str | None, command: str) -> dict[str, Any]:
    """All that the page shows: the document, every site's exact ranks at a grid of thresholds, and its curves."""
    thresholds, points = grid(sites, document["threshold"]), points_each(sites)
    about = {"sarac": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return {
        **document,
        "grid": thresholds,
        "steps": [_steps(site, thresholds) for site in sites],
        "curves": [_curve(site, points) for site in sites],
        "plan": plan,
        "command": command,
        "versions": about,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def embedded(content: Any) -> str:
    """JSON that may stand in a script element: no name in it can end that element or open a comment."""
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c").replace("\u2028", "\\u2028")


def _steps(site: Site, thresholds: Sequence[float]) -> list[Any]:
    """k at each threshold; of a stack [smallest, largest, sum]."""
    found = ranks_on(site, thresholds)
    return [[min(ranks), max(ranks), sum(ranks)] for ranks in found] if site.parts else [ranks[0] for ranks in found]


def _curve(site: Site, points: int) -> dict[str, list[Any]]:
    ks, shares, values = curve(site, points)
    return {"k": ks, "share": [float(f"{x:.5g}") for x in shares], "value": [float(f"{x:.4g}") for x in values]}
