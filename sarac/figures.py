"""The figures of an analysis: one row a weight, one a kind of layer, the curves; every view shows these and no others."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from sarac.ir.graph import Site, Whole
from sarac.ir.methods import build, trainable_count
from sarac.ir.spectrum import Spectrum

SHOWN = (0.3, 0.6, 0.9)
_FINE = (0.001, 0.002, 0.005, *(step / 100 for step in range(1, 101)))
_POINTS = 60_000  # of all curves of a page together: some 2 MB
_MANY = 2000  # weights; from here on a page has a coarser grid of thresholds

Row = dict[str, Any]


def spectrum_of(site: Site) -> Spectrum:
    """The spectrum of a measured site."""
    assert site.spectrum is not None
    return site.spectrum


def key(threshold: float) -> str:
    """A threshold as tables and JSON name it."""
    return repr(float(threshold)) if threshold != 1 else "1"


def row(site: Site, threshold: float, whole: Whole | None = None) -> Row:
    """All that is shown of one weight, as JSON values; of a stack `ranks` are the largest and `least_ranks` the smallest."""
    spectrum = spectrum_of(site)
    ranks = {key(share): [one.rank_at(share) for one in spectrum.matrices] for share in sorted({*SHOWN, threshold})}
    chosen, conditions = ranks[key(threshold)], [condition(one) for one in spectrum.matrices]
    return {
        "site": site.name,
        "kind": site.kind,
        "layer": site.depth,
        "shape": list(site.full_shape),
        "dtype": str(site.dtype).removeprefix("torch."),
        "form": site.form,
        "reason": site.reason,
        "uses": len(site.uses),
        "others": list(site.others),
        "rank": max(chosen),
        "ranks": {share: max(found) for share, found in ranks.items()},
        "least_ranks": {share: min(found) for share, found in ranks.items()},
        "full_rank": spectrum.full_rank,
        "numerical_rank": spectrum.numerical_rank,
        "share": sum(chosen) / len(chosen) / spectrum.full_rank,
        "decay": sum(decay(one) for one in spectrum.matrices) / len(spectrum.matrices),
        "condition": None if math.inf in conditions else max(conditions),
        "largest": float(spectrum.values.max()),
        "sum": float(spectrum.values.sum()),
        "trainable": trainable(site, threshold),
        "parameters": site.size,
        "how": spectrum.how,
        "note": spectrum.note,
        **_seen(site.name, whole),
    }


def kinds(rows: Iterable[Row], by_site: bool = False) -> list[Row]:
    """The rows taken together by kind and shape, in the model's order: sums, means of share and decay, the worst condition."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for one in rows:
        groups[one["site"] if by_site else one["kind"], *one["shape"]].append(one)
    return [{"weight": head[0], **_together(members)} for head, members in groups.items()]


def trainable(site: Site, threshold: float) -> int:
    """How many numbers SARA's singular values train on a weight at a threshold."""
    return sum(_numbers(one.rank_at(threshold), site.shape) for one in spectrum_of(site).matrices)


@cache
def _numbers(rank: int, shape: tuple[int, int]) -> int:
    return trainable_count(build("sara", rank, {}), shape)


def decay(spectrum: Spectrum) -> float:
    """By how many powers of ten the values fall from the first to the last that is not zero.

    Along the least-squares line through log10 s_i, so that one odd value at an end, which moves `condition`, hardly counts: of
    a geometric sequence it is log10 of the condition, of equal values 0.
    """
    logs = spectrum.values[spectrum.values > spectrum.floor].log10()
    if logs.numel() < 2:
        return 0.0
    steps = torch.linspace(-0.5, 0.5, logs.numel(), dtype=logs.dtype)
    return -float((steps * (logs - logs.mean())).sum() / steps.square().sum()) + 0.0


def condition(spectrum: Spectrum) -> float:
    """s1 / sn, the condition number in the 2-norm; infinite where a value counts as zero (Golub and Van Loan, 2.6.2)."""
    if spectrum.numerical_rank < spectrum.full_rank:
        return math.inf
    return float(spectrum.values[0] / spectrum.values[-1])


def span(group: Row, share: str) -> str:
    """The ranks of a group at a threshold as text, 7 or 3–9."""
    low, high = group["least_ranks"][share], group["ranks"][share]
    return f"{high}" if low == high else f"{low}–{high}"


def shape_text(shape: Sequence[int]) -> str:
    """A shape as text."""
    return " x ".join(str(size) for size in shape)


def condition_text(value: float | None) -> str:
    """A condition number as text, short."""
    return "∞" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def remarks(rows: Iterable[Row]) -> list[str]:
    """How values were computed, where it was not the usual way: a sentence a reason."""
    reasons = Counter((one["how"], one["note"]) for one in rows if one["note"])
    return [f"{count} of the weights by {how.upper()}: {note}" for (how, note), count in reasons.items()]


def grid(sites: Sequence[Site], threshold: float) -> list[float]:
    """The thresholds at which a page has every exact rank, with the chosen one among them."""
    return sorted({threshold, *SHOWN, *(_FINE if len(sites) < _MANY else _FINE[7::5]), 1.0})


def ranks_on(site: Site, thresholds: Sequence[float]) -> list[list[int]]:
    """The exact ranks of every matrix of a site at ascending thresholds, one list a threshold."""
    each = [_ranks_on(one, thresholds) for one in spectrum_of(site).matrices]
    return [list(ranks) for ranks in zip(*each, strict=True)]


def _ranks_on(spectrum: Spectrum, thresholds: Sequence[float]) -> list[int]:
    """`rank_at` of many thresholds: one search, and the rule itself where a share comes near its threshold."""
    shares, wanted = spectrum.shares(), torch.tensor(thresholds, dtype=torch.float64)
    total = float(spectrum.values.sum())
    unsure = 1e-9 + (4.0 * float(spectrum.errors.sum()) / total if spectrum.errors is not None and total > 0.0 else 0.0)
    last = len(shares) - 1
    found = torch.searchsorted(shares, wanted).clamp_max(last)
    near = (shares[found] - wanted).abs().minimum((shares[(found - 1).clamp_min(0)] - wanted).abs()) <= unsure
    ranks = (found + 1).tolist()
    for index in torch.nonzero(near | (wanted == 1.0)).flatten().tolist():
        ranks[index] = spectrum.rank_at(thresholds[index])
    return ranks


def budget(sites: Iterable[Site], thresholds: Sequence[float]) -> list[int]:
    """How many numbers SARA's singular values train in all at each threshold."""
    counts = [0] * len(thresholds)
    for site in sites:
        for index, ranks in enumerate(ranks_on(site, thresholds)):
            counts[index] += sum(_numbers(rank, site.shape) for rank in ranks)
    return counts


def curve(site: Site, points: int) -> tuple[list[int], list[float], list[float]]:
    """k, the share of the sum that the first k values reach, and the k-th value; at most so many points, means of a stack."""
    spectrum = spectrum_of(site)
    full = spectrum.full_rank
    at = torch.linspace(0, full - 1, min(points, full), dtype=torch.float64).round().long()
    shares = torch.stack([one.shares()[at] for one in spectrum.matrices]).mean(0)
    values = torch.stack([one.values[at] for one in spectrum.matrices]).mean(0)
    return (at + 1).tolist(), shares.tolist(), values.tolist()


def points_each(sites: Sequence[Site]) -> int:
    """How many points a curve of a page may have, so that the page stays small."""
    return max(9, min(129, _POINTS // max(1, len(sites))))


def _together(members: list[Row]) -> Row:
    first, shares = members[0], list(members[0]["ranks"])
    forms = sorted({one["form"] for one in members})
    return {
        "sites": len(members),
        "shape": first["shape"],
        "form": "/".join(forms),
        "uses": sum(one["uses"] for one in members),
        "ranks": {share: max(one["ranks"][share] for one in members) for share in shares},
        "least_ranks": {share: min(one["least_ranks"][share] for one in members) for share in shares},
        "full_rank": first["full_rank"],
        "share": sum(one["share"] for one in members) / len(members),
        "decay": sum(one["decay"] for one in members) / len(members),
        "condition": None if any(one["condition"] is None for one in members) else max(one["condition"] for one in members),
        "trainable": sum(one["trainable"] for one in members),
        "parameters": sum(one["parameters"] for one in members),
    }


def _seen(name: str, whole: Whole | None) -> Mapping[str, Any]:
    """What the whole model showed of a site; nothing without example inputs."""
    if whole is None:
        return {}
    siblings = next((list(group) for group in whole.siblings if name in group), [])
    calls, flops = whole.calls.get(name, 0), whole.flops.get(name, 0)
    return {"calls": calls, "flops": flops, "depth": whole.depths.get(name), "siblings": siblings}
