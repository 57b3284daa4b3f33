"""The report of an analysis: one page that needs no network, with all it shows inside it."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from sarac.figures import curve, grid, points_each, ranks_on, remarks, spectrum_of
from sarac.ir.errors import CheckpointError
from sarac.ir.graph import Site
from sarac.ir.methods import build, trainable_count
from sarac.ir.record import __version__

_PLACE = "{{data}}"


def write(folder: Path, document: Mapping[str, Any], sites: Sequence[Site], plan: str | None, command: str) -> Path:
    """Write folder/index.html, whole or not at all, and return its path; CheckpointError where that cannot be."""
    text = page(document, sites, plan, command)
    made = folder / "index.html"
    aside = folder / f".index.html.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_text(text, encoding="utf-8")
            aside.replace(made)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"The report cannot be written to {made}: {error.strerror}. Name a folder that can be made and written in."
        ) from error
    return made


def page(document: Mapping[str, Any], sites: Sequence[Site], plan: str | None, command: str) -> str:
    """The page's HTML for an analysis's JSON document, its sites and a plan's JSON text."""
    steps = grid(sites, document["threshold"])
    points = points_each(sites)
    rows = [{**row, **_on_grid(site, steps), **_drawn(site, points)} for row, site in zip(document["sites"], sites, strict=True)]
    for row, site in zip(rows, sites, strict=True):  # the ranks on the grid may have needed a true SVD
        row |= {"how": spectrum_of(site).how, "note": spectrum_of(site).note}
    data = {
        **{name: document[name] for name in ("title", "threshold", "parameters", "skipped")},
        "remarks": remarks(rows),
        "steps": steps,
        "at": {str(site.spectrum.full_rank): curve(site, points)[0] for site in sites if site.spectrum},
        "sites": rows,
        "plan": plan,
        "command": command,
        "date": datetime.now().astimezone().isoformat(" ", "minutes"),
        "versions": {"sarac": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    # No "<" at all, so that no name can end the script element or open a comment in it.
    inside = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return files("sarac").joinpath("page.html").read_text(encoding="utf-8").replace(_PLACE, inside)


def _on_grid(site: Site, steps: Sequence[float]) -> dict[str, Any]:
    """The largest rank at every step; the smallest and the mean as well of a stack, and what trains where that is not k."""
    found = ranks_on(site, steps)
    most = [max(ranks) for ranks in found]
    trains = [trainable_count(build("sara", ranks if site.parts else ranks[0], {}), site.shape) for ranks in found]
    more = {"least": [min(ranks) for ranks in found], "mean": [round(sum(ranks) / len(ranks), 2) for ranks in found]}
    return {"ks": most, **(more if site.parts else {}), **({"trains": trains} if trains != most else {})}


def _drawn(site: Site, points: int) -> dict[str, Any]:
    _, shares, values = curve(site, points)
    return {"shares": [round(share, 5) for share in shares], "values": [float(f"{value:.4g}") for value in values]}
