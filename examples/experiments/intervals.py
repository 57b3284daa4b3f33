"""Means over seeds with 95 % intervals of Student's t, and the same of differences that are paired by seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mean:
    """A mean, half of its 95 % interval (nan for one value alone) and how many values it is of; `p` that it is 0."""

    value: float
    half: float
    count: int
    p: float = math.nan

    def text(self, digits: int = 3, signed: bool = False) -> str:
        """As tables show it."""
        shown = f"{self.value:{'+' if signed else ''}.{digits}f}"
        return shown if math.isnan(self.half) else f"{shown} ± {self.half:.{digits}f}"


def mean(values: Sequence[float]) -> Mean:
    """The mean of values, one a seed."""
    from scipy import stats  # the machine that makes the runs need not have it

    count = len(values)
    centre = sum(values) / count
    if count < 2:
        return Mean(centre, math.nan, count)
    error = math.sqrt(sum((value - centre) ** 2 for value in values) / (count - 1) / count)
    half = float(stats.t.ppf(0.975, count - 1)) * error
    p = 2 * float(stats.t.sf(abs(centre) / error, count - 1)) if error > 0 else float(centre == 0)
    return Mean(centre, half, count, p)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Mean | None:
    """The mean of our value less theirs over the seeds that both have; None where there is none."""
    seeds = sorted(ours.keys() & theirs.keys())
    return mean([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None
