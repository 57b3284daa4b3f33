"""The singular values of a weight as a value, and the rank at which their sum reaches a share: the heart of SARA.

Values may come with bounds on their error. A rank is then read off them only where every spectrum within the bounds has the
same one; elsewhere the weight is measured again by a true SVD, and `how` and `note` say so.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sarac.ir.errors import PlanError, SpectrumError

# A share of the sum is compared with this many units of float64 rounding to spare for each value summed: without it an
# identity matrix of n values would miss its exact share k / n by the rounding of the sum.
SLACK = 8.0 * torch.finfo(torch.float64).eps
_TOLD = 1e-3  # the share of the sum from which on values that count as zero are told of
_HUGE = 1e150  # beyond it, and below its inverse, sums and squares leave float64


@dataclass(frozen=True)
class Spectrum:
    """All singular values of one weight, descending, in float64, and the size below which they count as zero.

    Of a stack of matrices `parts` has each one's own and `values`, shape (parts, n), all of them; ranks are the largest ones.
    `errors` bounds |value - true value|; None for a true SVD, whose rounding the comparison's slack covers. Where only leading
    values are known, `rest` bounds the sum of all others that are not zero, and `size` says how many values there are.
    """

    values: Tensor
    floor: float
    parts: tuple["Spectrum", ...] = ()
    errors: Tensor | None = None
    rest: tuple[float, float] | None = None
    size: int = 0
    way: str = "svd"  # svd, gram or certified: how the values were found
    reason: str = ""  # why that was not the usual way
    basis: Tensor | None = field(default=None, compare=False, repr=False)  # (k, n): leading vectors of the smaller side
    refine: Callable[[str], "Spectrum"] | None = field(default=None, compare=False, repr=False)  # by a true SVD, and why

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the way back to the weight, and what is kept of its vectors: these do not travel."""
        return {**self.__dict__, "refine": None, "basis": None}

    @property
    def full_rank(self) -> int:
        """How many values there are: min(out, in)."""
        return self.size or self.values.shape[-1]

    @property
    def matrices(self) -> tuple["Spectrum", ...]:
        """The spectrum of every matrix: itself, or the parts of a stack."""
        return self.parts or (self,)

    @property
    def how(self) -> str:
        """How the values were found: gram, svd or certified; of a stack every way that was taken."""
        return ", ".join(dict.fromkeys(part._latest.way for part in self.matrices))

    @property
    def note(self) -> str:
        """Why a weight, or which of a stack, was not measured the usual way; "" where it was."""
        told = {i: said for i, part in enumerate(self.matrices) if (said := part._latest._said)}
        if not told or not self.parts:
            return told.get(0, "")
        first = next(iter(told))
        return f"matrix {first}: {told[first]}" + (f" ({len(told)} such)" if len(told) > 1 else "")

    @property
    def _said(self) -> str:
        below = self.values[self.values <= self.floor]
        share = float((below / self.values[0]).sum() / (self.values / self.values[0]).sum()) if self.values[0] > 0 else 1.0
        zero = "it is zero" if self.is_zero else f"values that count as zero are {share:.2g} of its sum" if share > _TOLD else ""
        return "; ".join(filter(None, (self.reason, zero)))

    @property
    def complete(self) -> bool:
        """Whether all values are known, and not the leading ones alone."""
        return all(part.rest is None for part in self.matrices)

    @property
    def is_zero(self) -> bool:
        """Whether every value is zero."""
        return not bool((self.values > 0).any())

    @cached_property
    def numerical_rank(self) -> int:
        """How many values count as non-zero."""
        if self.parts:
            return max(part.numerical_rank for part in self.parts)
        return self._whole.numerical_rank if self.rest else int((self.values > self.floor).sum())

    def rank_at(self, threshold: float) -> int:
        """The smallest k with s1 + … + sk >= threshold · (s1 + … + sn); threshold in (0, 1], k in 1..n."""
        if self.parts:
            return max(part.rank_at(threshold) for part in self.parts)
        found = self._rank_at(threshold, *self._sums, self.rest)
        return found or self._exact(f"k at {threshold:g} lies within the error of the values").rank_at(threshold)

    def rank_at_energy(self, threshold: float) -> int:
        """The smallest k with s1² + … + sk² >= threshold · (s1² + … + sn²); threshold in (0, 1], k in 1..n."""
        if self.parts:
            return max(part.rank_at_energy(threshold) for part in self.parts)
        if self.rest:
            return self._whole.rank_at_energy(threshold)
        found = self._rank_at(threshold, *self._squares, None)
        return found or self._exact(f"k at energy {threshold:g} lies within the error of the values").rank_at_energy(threshold)

    def decided(self, threshold: float) -> bool:
        """Whether the values and their errors leave one rank only at this threshold."""
        return all(part._rank_at(threshold, *part._sums, part.rest) > 0 for part in self.matrices)

    def shares(self) -> Tensor:
        """The share of the sum that the first k values reach, for k = 1..n, shape (n,); ones for a zero weight."""
        if self.rest:
            return self._whole.shares()
        sums, _ = self._sums
        return sums / sums[-1] if sums[-1] > 0 else torch.ones_like(sums)

    @property
    def _whole(self) -> "Spectrum":
        return self._exact("all values were asked for, and the leading ones were measured")

    def _exact(self, reason: str) -> "Spectrum":
        """The spectrum by a true SVD; SpectrumError where the weight is not at hand any more."""
        if self._latest is self and self.refine is None:
            raise SpectrumError(f"The weight is to be measured again, because {reason}; and it is not at hand: analyze it anew.")
        if self._latest is self and self.refine is not None:
            self.__dict__["_refined"] = self.refine(reason)
        return self._latest

    @property
    def _latest(self) -> "Spectrum":
        found = self.__dict__.get("_refined", self)
        return found if isinstance(found, Spectrum) else self

    @cached_property
    def _sums(self) -> tuple[Tensor, Tensor | None]:
        """The sums of the first k values, and bounds on their errors."""
        kept, unit = self.values > self.floor, self._unit
        errors = None if self.errors is None else torch.where(kept, self.errors * unit, 0.0).cumsum(0)
        return torch.where(kept, self.values * unit, 0.0).cumsum(0), errors

    @cached_property
    def _squares(self) -> tuple[Tensor, Tensor | None]:
        kept, values = self.values > self.floor, self.values * self._unit
        wide = None if self.errors is None else self.errors * self._unit * (2.0 * values + self.errors * self._unit)
        errors = None if wide is None else torch.where(kept, wide, 0.0).cumsum(0)
        return torch.where(kept, values.square(), 0.0).cumsum(0), errors

    @property
    def _unit(self) -> float:
        """What values are multiplied by before they are summed: shares do not change."""
        largest = 1.0 if self.rest else float(self.values[0])
        return 2.0**-600 if largest > _HUGE else 2.0**600 if 0.0 < largest < 1.0 / _HUGE else 1.0

    def _rank_at(self, threshold: float, sums: Tensor, errors: Tensor | None, rest: tuple[float, float] | None) -> int:
        """The rank, or 0 where the errors leave it undecided."""
        require_share(threshold)
        if threshold == 1.0:  # asks for every value that is not zero, also for one smaller than the slack
            return max(1, self.numerical_rank)
        low, high = rest or (0.0, 0.0)
        share = threshold - SLACK * self.full_rank
        goal = share * (float(sums[-1]) + (low + high) / 2.0)
        k = int((sums < goal).sum()) + 1
        if errors is None:
            return min(k, max(1, self.numerical_rank))
        spare = share * (float(errors[-1]) + (high - low) / 2.0)
        reached = k <= len(sums) and bool(sums[k - 1] - errors[k - 1] >= goal + spare)
        return k if reached and (k == 1 or bool(sums[k - 2] + errors[k - 2] < goal - spare)) else 0


def require_share(threshold: Any) -> None:
    """Raise PlanError unless the threshold is a number in (0, 1]."""
    if not (isinstance(threshold, int | float) and math.isfinite(threshold) and 0.0 < threshold <= 1.0):
        raise PlanError(f"A threshold is a share in (0, 1]; {threshold!r} is not. Give for example threshold:0.6.")


def stacked(parts: tuple[Spectrum, ...]) -> Spectrum:
    """The spectrum of a stack from those of its matrices."""
    return Spectrum(torch.stack([part.values for part in parts]), max(part.floor for part in parts), parts)


def refining(spectrum: Spectrum, refine: Callable[[str], Spectrum], part: Callable[[int], Callable[[str], Spectrum]]) -> Spectrum:
    """The same with a way back to the weight, or to each matrix of a stack, which a file or another process cannot hold."""
    if not spectrum.parts:
        return replace(spectrum, refine=refine)
    return replace(spectrum, parts=tuple(replace(one, refine=part(i)) for i, one in enumerate(spectrum.parts)))
