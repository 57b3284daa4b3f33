"""The rank at a small share with a proof, from matrix products alone, which a GPU's matrix units do far faster than eigenvalues.

The sum N of all values comes from the polar factor: Q, a polynomial of W run in TF32 (the coefficients of Amsel et al. 2025,
"Polar Express"; the last step in float64), has ‖Q‖ <= 1, so that N >= <Q, W>; and N <= (tr(P⁻¹ Wᵀ W) + tr P) / 2 for every
positive P, here the symmetric part of Qᵀ W. The leading values come from a filtered subspace V: Ritz values θ lie below the
eigenvalues of G = Wᵀ W; and where the rest of G lies below c, which a Cholesky factorisation of c - G proves, the eigenvalues
from τ > c on lie below those of Θ + Rᵀ R / (τ - c), R = G V - V Θ (Haynsworth's inertia). All bounds are taken in float64, with
its rounding added; how rough the way to them was does not matter. What they leave undecided is measured by a full decomposition.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from sarac.ir.gram import UNIT, gram, placed, scale_of, stored_dtype, zero_floor
from sarac.ir.spectrum import Spectrum

Found = TypeVar("Found")
SHARE, SIDE = 0.06, 2048  # up to which share, and from which smaller side on, this is the faster way
_STEPS = (  # a x + b x³ + c x⁵, made for values in [1e-3, 1]
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
)
_SPARE = 1.02  # room for rounding in all steps but the last: beyond their interval the polynomials explode
_ROUGH = 4  # steps in bfloat16
_DEGREE, _ROUNDS = 16, 6  # of the filter: products a round, and rounds at most
_ACCURATE = 3e-6  # a leading vector's angle that is good enough for float32
_ROUNDING = 1e-9  # relative, of sums and triangular solves in float64 here


def worthwhile(weight: Tensor, share: float) -> bool:
    """Whether the certified way is faster than a full decomposition: on GPUs, for small shares of large matrices."""
    return weight.ndim == 2 and weight.device.type == "cuda" and share <= SHARE and min(weight.shape) >= SIDE


def certified(weight: Tensor, share: float) -> Spectrum | None:
    """The leading values of `weight` (out, in) with their vectors, and bounds on the sum of the rest that fix k at `share`.

    None where the bounds leave k undecided, or the matrix is not as well-behaved as they need it.
    """
    (weight,) = placed([weight])
    scale = scale_of(weight)
    g = gram(weight, scale)
    trace = float(g.diagonal().sum())
    off = UNIT * max(weight.shape) * trace  # |G - Wᵀ W| in the 2-norm
    root = _cholesky(_plus(g, 2.0 * off)) if 0.0 < trace < math.inf else None
    if root is None:
        return None
    with _matrix_units():
        top = _Leading(g, off)
        largest = top.largest
        polar = _polar(root.T, largest)
        about = float((polar.double() * root.T).sum())  # the sum of all values, to a thousandth
        if not 0.0 < about < math.inf:
            return None
        floor = 1.01 * zero_floor(weight, largest)  # a little more than what counts as zero
        total = _beside(lambda: _bounds(polar, root.T, largest), g)
        counts: list[Callable[[], float]] = [partial(float, len(g)), partial(_count_below, g, floor, off)]
        if share * len(g) * floor > 0.5 * about / len(g):  # it could well move k which values these are
            counts[1] = _beside(counts[1], g)
        leading, bounds = top.reach(share * about * 1.003), total()
    if bounds is None or leading is None:
        return None
    # The root's values are sqrt(σ² + d) with 0 <= d <= 4·off, and its sum has those in it that count as zero.
    low, high, most = bounds[0] - len(g) * 2.0 * off / floor, bounds[1], math.hypot(floor, 2.0 * math.sqrt(off))
    values, errors, vectors = leading
    for count in counts:
        sums, spare = float(values.sum()), float(errors.sum())
        rest = ((low - count() * most - sums - spare) / scale, (high - sums + spare) / scale)
        smallest = zero_floor(weight, float(values[0])) / scale
        found = Spectrum(values.cpu() / scale, smallest, (), errors.cpu() / scale, rest, len(g), "certified")
        if found.decided(share):
            return replace(found, basis=vectors.T.to(stored_dtype(weight)).contiguous())
    return None


def _polar(root: Tensor, largest: float) -> Tensor:
    """About the orthogonal factor of a square matrix whose largest singular value is about `largest`, in float32."""
    x = (root / (1.01 * largest)).float()
    for i, (a, b, c) in enumerate(_STEPS):
        spare = _SPARE if i + 1 < len(_STEPS) else 1.0
        rough = x.bfloat16() if i < _ROUGH and x.is_cuda else x
        square = rough.T @ rough
        inner = torch.addmm(square, square, square, beta=b / spare**3, alpha=c / spare**5)
        x = torch.addmm(rough, rough, inner, beta=a / spare).float()
    return x


def _bounds(polar: Tensor, root: Tensor, largest: float) -> tuple[float, float] | None:
    """Bounds on the sum of the root's singular values from about its orthogonal factor."""
    wide = polar.double()
    square, h = wide.T @ wide, wide.T @ root
    fourth = square.float() @ square.float()
    bound = float((fourth @ fourth).norm()) ** 0.25  # >= ‖X‖², by at most the eighth root of n
    if not bound <= 3.8:  # y (3 - y)² / 4 <= 1 for y in [0, 4]: then ‖X (3 - Xᵀ X) / 2‖ <= 1
        return None
    low = 1.5 * float(h.diagonal().sum()) - 0.5 * float((square * h).sum())
    h = 1.5 * h - 0.5 * (square @ h)
    h = (h + h.T) / 2.0
    for shift in (3e-4, 1.2e-3, 5e-3):
        p = _plus(h, shift * largest)
        lower = _cholesky(p)
        if lower is not None:
            thin = torch.linalg.solve_triangular(lower, root.T, upper=False)
            high = 0.5 * (float(thin.square().sum()) + float(p.diagonal().sum()))
            return low * (1.0 - _ROUNDING), high * (1.0 + _ROUNDING)
    return None


def _beside(work: Callable[[], Found], near: Tensor) -> Callable[[], Found]:
    """The way to what `work` gives: on a GPU it runs meanwhile, on a stream and in a thread of its own."""
    if not near.is_cuda:
        return work
    stream = torch.cuda.Stream(near.device)  # type: ignore[no-untyped-call]  # torch's
    stream.wait_stream(torch.cuda.current_stream(near.device))

    def there() -> Found:
        with torch.cuda.device(near.device), torch.cuda.stream(stream):
            found = work()
            stream.synchronize()
            return found

    pool = ThreadPoolExecutor(1)
    result = pool.submit(there).result
    pool.shutdown(wait=False)
    return result


class _Leading:
    """The leading eigenvalues of G (n, n) from a subspace that is filtered until they are certain."""

    def __init__(self, g: Tensor, off: float) -> None:
        self.g, self.off = g, off
        self.generator = torch.Generator(g.device).manual_seed(0)
        self.v = g @ self._drawn(32)
        self._ritz()
        self._filter()  # the sum's polynomials need the largest value to a hundredth

    @property
    def largest(self) -> float:
        """The largest singular value, or little more."""
        residual = self.gv[:, 0] - self.v[:, 0] * self.theta[0]
        return math.sqrt(float(self.theta[0] + residual.norm()))

    def reach(self, goal: float) -> tuple[Tensor, Tensor, Tensor] | None:
        """The leading singular values whose sum reaches `goal`, bounds on their errors, and their vectors (n, k)."""
        size = math.ceil(2.6 * goal / self.largest) + 16
        for _ in range(_ROUNDS):
            if size > len(self.g) // 4:
                return None
            if size > self.v.shape[1]:
                self.v = torch.cat([self.v, self.g @ self._drawn(size - self.v.shape[1])], 1)
                self._ritz()
            self._filter()
            k = int((self.theta.clamp_min(0.0).sqrt().cumsum(0) < goal).sum()) + 1
            if k > 0.6 * size:
                size = 2 * size
            elif (found := self._certain(k)) is not None:
                return found
        return None

    def _certain(self, k: int) -> tuple[Tensor, Tensor, Tensor] | None:
        theta, residual = self.theta, self.gv - self.v * self.theta
        tau = float(theta[k - 1])
        c = float(theta[-1]) + 0.3 * (tau - float(theta[-1]))
        gap = tau - c - 2.0 * self.off
        if not gap > 0.0 or not float(residual[:, :k].norm()) <= _ACCURATE * gap:
            return None
        half = self.v * (theta / 2.0) + residual
        beyond = _plus(half @ self.v.T + self.v @ half.T - self.g, c)  # c - (1 - V Vᵀ) G (1 - V Vᵀ)
        if _cholesky(beyond) is None:
            return None
        highest = torch.linalg.eigvalsh(theta.diag() + residual.T @ residual / gap).flip(0)[:k]
        values = theta[:k].sqrt()
        low, high = (theta[:k] - 2.0 * self.off).clamp_min(0.0).sqrt(), (highest + 2.0 * self.off).sqrt()
        return values, torch.maximum(values - low, high - values), self.v[:, :k]

    def _filter(self) -> None:
        """Apply the Chebyshev polynomial that stays within 1 on [0, the block's last value] and grows fast beyond it."""
        bound = max(float(self.theta[-1]), 1e-6 * float(self.theta[0]))
        growth = math.acosh(max(1.0 + 1e-6, 2.0 * float(self.theta[0]) / bound - 1.0))
        before, now = self.v, self.gv * (2.0 / bound) - self.v
        for _ in range(max(1, min(_DEGREE, int(23.0 / growth))) - 1):  # beyond 1e10 the block would lose its last columns
            before, now = now, (self.g @ now) * (4.0 / bound) - 2.0 * now - before
        self.v = now
        self._ritz()

    def _ritz(self) -> None:
        q = self.v / self.v.norm(dim=0)
        for _ in range(2):
            lower = _cholesky(q.T @ q)
            q = torch.linalg.qr(q).Q if lower is None else torch.linalg.solve_triangular(lower, q.T, upper=False).T
        product = self.g @ q
        theta, w = torch.linalg.eigh(q.T @ product)
        self.theta, self.v, self.gv = theta.flip(0), q @ w.flip(1), product @ w.flip(1)

    def _drawn(self, columns: int) -> Tensor:
        return torch.randn(len(self.g), columns, generator=self.generator, dtype=torch.float64, device=self.g.device)


def _count_below(g: Tensor, floor: float, off: float) -> float:
    """An upper bound on how many singular values lie up to `floor`: the sum of 2 f² / (λ + f²)."""
    square = floor**2 + 4.0 * off
    lower = _cholesky(_plus(g, square))
    if lower is None:
        return float(len(g))
    inverse = torch.linalg.solve_triangular(lower, torch.eye(len(g), dtype=g.dtype, device=g.device), upper=False)
    return min(float(len(g)), 2.0 * square * float(inverse.square().sum()) * 1.001)


def _plus(matrix: Tensor, number: float) -> Tensor:
    """The matrix plus a multiple of the identity."""
    moved = matrix.clone()
    moved.diagonal().add_(number)
    return moved


def _cholesky(matrix: Tensor) -> Tensor | None:
    """The lower Cholesky factor; None where the matrix is not positive, which is what a success disproves."""
    lower, failed = torch.linalg.cholesky_ex(matrix)
    return None if int(failed) else lower


@contextmanager
def _matrix_units() -> Iterator[None]:
    """Let float32 products run in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
