"""Singular values and vectors of a weight, and the rank at which their sum reaches a share: the heart of SARA."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sarac.ir.errors import PlanError, SpectrumError

# A share of the sum is compared with this many units of float64 rounding to spare for each value summed: without it an
# identity matrix of n values would miss its exact share k / n by the rounding of the sum.
_SLACK = 8.0 * torch.finfo(torch.float64).eps
_SMALL = 2048


@dataclass(frozen=True)
class Spectrum:
    """All singular values of one weight, descending, in float64, and the size below which they count as zero.

    Of a stack of matrices `parts` has each one's own and `values`, shape (parts, n), all of them; ranks are the largest ones.
    """

    values: Tensor
    floor: float
    parts: tuple["Spectrum", ...] = ()

    @property
    def full_rank(self) -> int:
        """How many values there are: min(out, in)."""
        return self.values.shape[-1]

    @property
    def matrices(self) -> tuple["Spectrum", ...]:
        """The spectrum of every matrix: itself, or the parts of a stack."""
        return self.parts or (self,)

    @cached_property
    def numerical_rank(self) -> int:
        """How many values count as non-zero."""
        if self.parts:
            return max(part.numerical_rank for part in self.parts)
        return int((self.values > self.floor).sum())

    def rank_at(self, threshold: float) -> int:
        """The smallest k with s1 + … + sk >= threshold · (s1 + … + sn); threshold in (0, 1], k in 1..n."""
        if self.parts:
            return max(part.rank_at(threshold) for part in self.parts)
        return self._rank_at(threshold, self._sums)

    def rank_at_energy(self, threshold: float) -> int:
        """The smallest k with s1² + … + sk² >= threshold · (s1² + … + sn²); threshold in (0, 1], k in 1..n."""
        if self.parts:
            return max(part.rank_at_energy(threshold) for part in self.parts)
        return self._rank_at(threshold, self._squares)

    def shares(self) -> Tensor:
        """The share of the sum that the first k values reach, for k = 1..n, shape (n,); ones for a zero weight."""
        return self._sums / self._sums[-1] if self._sums[-1] > 0 else torch.ones_like(self._sums)

    @cached_property
    def _nonzero(self) -> Tensor:
        return torch.where(self.values > self.floor, self.values, 0.0)

    @cached_property
    def _sums(self) -> Tensor:
        return self._nonzero.cumsum(0)

    @cached_property
    def _squares(self) -> Tensor:
        return self._nonzero.square().cumsum(0)

    def _rank_at(self, threshold: float, sums: Tensor) -> int:
        require_share(threshold)
        if threshold == 1.0:  # asks for every value that is not zero, also for one smaller than the slack
            return max(1, self.numerical_rank)
        goal = float(sums[-1]) * (threshold - _SLACK * self.full_rank)
        return min(int((sums < goal).sum()) + 1, max(1, self.numerical_rank))


def require_share(threshold: float) -> None:
    """Raise PlanError unless the threshold lies in (0, 1]."""
    if not (math.isfinite(threshold) and 0.0 < threshold <= 1.0):
        raise PlanError(f"A threshold is a share in (0, 1]; {threshold!r} is not. Give for example threshold:0.6.")


def spectrum(weight: Tensor, name: str = "the weight") -> Spectrum:
    """The singular values of `weight`, (out, in) or a stack (parts, out, in), by a float64 SVD; `name` is for errors.

    Values up to max(out, in) · eps · s1 count as zero, the rule of numpy.linalg.matrix_rank, with eps of the stored dtype or of
    float32, whichever is smaller: at bfloat16's eps of 2^-7 every value of a matrix wider than 128 would count as zero.
    """
    if weight.ndim == 3:
        parts = tuple(spectrum(matrix, f"{name}[{i}]") for i, matrix in enumerate(weight))
        return Spectrum(torch.stack([part.values for part in parts]), max(part.floor for part in parts), parts)
    _require_usable(weight, name)
    with _one_thread(weight):
        values = torch.linalg.svdvals(weight.detach().double()).cpu()
    return Spectrum(values, _floor(weight, values))


def factors(weight: Tensor, rank: int, name: str = "the weight") -> tuple[Tensor, Tensor, Tensor, float]:
    """The leading U (out, rank), s (rank,), V (rank, in) with W ≈ U diag(s) V in float64, and the zero floor.

    The signs are fixed by making each row of V positive at its largest entry, so that two runs agree.
    """
    _require_usable(weight, name)
    with _one_thread(weight):
        u, s, v = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    floor = _floor(weight, s)
    u, s, v = u[:, :rank], s[:rank], v[:rank]
    signs = torch.gather(v, 1, v.abs().argmax(1, keepdim=True)).sign()
    return u * signs.T, s, v * signs, floor


def product_factors(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), s (k,), V (k, in) with U diag(s) V = B A, from B (out, r) and A (r, in); zero directions are left out.

    Two thin QRs and the SVD of an r x r matrix, in float64: the large product is never formed.
    """
    left, right = torch.linalg.qr(b.double()), torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(left.R @ right.R.T)
    rank = max(1, int((s > s.numel() * torch.finfo(torch.float64).eps * s[0]).sum()))
    return left.Q @ u[:, :rank], s[:rank], v[:rank] @ right.Q.T


@contextmanager
def _one_thread(weight: Tensor) -> Iterator[None]:
    """Decompose a small matrix on one CPU thread: where cores are shared a second one makes it five times slower."""
    before = torch.get_num_threads()
    alone = weight.device.type == "cpu" and min(weight.shape) <= _SMALL
    try:
        torch.set_num_threads(1 if alone else before)
        yield
    finally:
        torch.set_num_threads(before)


def _floor(weight: Tensor, values: Tensor) -> float:
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return max(weight.shape) * torch.finfo(dtype).eps * float(values[0])


def _require_usable(weight: Tensor, name: str) -> None:
    if weight.is_meta:
        raise SpectrumError(
            f"{name} lies on the meta device and has no values: load the model's weights first, and without offloading them."
        )
    if weight.ndim != 2 or weight.numel() == 0:
        raise SpectrumError(f"{name} has shape {tuple(weight.shape)}; a spectrum needs two dimensions and some values.")
    wide = weight.detach().float() if weight.dtype.itemsize == 1 else weight
    if not bool(torch.isfinite(wide).all()):
        kind = "NaN" if bool(torch.isnan(wide).any()) else "Inf"
        raise SpectrumError(f"{name} contains {kind}: it has no singular values. Mend the checkpoint, or leave it out.")
