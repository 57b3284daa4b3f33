"""Decompositions: all singular values of a weight, and its leading factors, from the Gram matrix of its smaller side.

The eigenvalues of W Wᵀ or Wᵀ W in float64 cost an eighth of an SVD's time on a GPU, and about half on a CPU; but they are
squares, in which small values drown. What is lost is bounded (Spectrum.errors), and where it could matter a true SVD is taken.
Vectors come nearly free with the values on a GPU (126 ms against 117 at 4096 on an H100), and cost as much again on a CPU.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sarac.ir.errors import SpectrumError
from sarac.ir.sharded import is_sharded
from sarac.ir.spectrum import Spectrum, stacked

ENGINE = "gram 1"  # stands in cache keys: a change of what comes out gives it another number
Keep = Callable[[Spectrum], int] | None


@dataclass(frozen=True)
class Wanted:
    """What a rule is going to ask of a weight: so many leading vectors; and, with `share`, no rank but that at this share."""

    rank: Callable[[Spectrum], int]
    share: float | None = None


UNIT = torch.finfo(torch.float64).eps / 2.0  # the unit roundoff
_SMALL = 2048  # up to here torch takes one CPU thread: others that wait for work take the cores from numpy's, and from theirs
_BLOCK = 2**24  # numbers that are turned into float64 at a time
_BATCH = 2**22  # numbers in one batch of Gram matrices


def spectrum(weight: Tensor, name: str = "the weight", keep: Keep = None) -> Spectrum:
    """All singular values of `weight`, (out, in) or a stack (parts, out, in), as float64 gives them; `name` is for errors.

    `keep` says of a spectrum how many leading vectors to keep with it, for factors. Values up to max(out, in) · eps · s1 count
    as zero, the rule of numpy.linalg.matrix_rank, with eps of the stored dtype or of float32, whichever is smaller: at
    bfloat16's eps of 2^-7 every value of a matrix wider than 128 would count as zero.
    """
    if weight.ndim == 3 and len(weight):
        return stacked(tuple(spectra(list(weight), [f"{name}[{i}]" for i in range(len(weight))], keep)))
    return spectra([weight], [name], keep)[0]


def spectra(weights: Sequence[Tensor], names: Sequence[str], keep: Keep = None) -> list[Spectrum]:
    """The spectra of matrices of one shape, decomposed in batches."""
    for weight, name in zip(weights, names, strict=True):
        _require_usable(weight, name)
    step = max(1, _BATCH // min(weights[0].shape) ** 2) if weights else 1
    found: list[Spectrum] = []
    for start in range(0, len(weights), step):
        batch = placed(weights[start : start + step])
        with _one_thread(batch[0]):
            found += _decomposed(batch, keep)
    return found


def factors(
    weight: Tensor, rank: int, name: str = "the weight", basis: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, float]:
    """The leading U (out, rank), s (rank,), V (rank, in) with W ≈ U diag(s) V in float64, and the zero floor.

    `basis`: the leading vectors (k, n) of the smaller side, k >= rank, where they are known; the other side is W's product
    with them. The signs make each row of V positive at its largest entry, the first of equals, so that two runs agree.
    """
    _require_usable(weight, name)
    (near,) = placed([weight])
    known = basis if basis is not None and len(basis) >= rank else leading(near, rank)
    narrow = known[:rank].double()
    scale = scale_of(near)
    wide = torch.cat([block @ narrow.T for block in _blocks(near, scale)])
    s = wide.norm(dim=0)
    floor = zero_floor(near, float(s[0]))
    wide = _completed(wide / s.clamp_min(torch.finfo(s.dtype).tiny), s > floor)
    u, v = (wide, narrow) if near.shape[0] >= near.shape[1] else (narrow.T, wide.T)
    size = v.abs()
    first = (size >= size.amax(1, keepdim=True) * (1.0 - 1e-6)).to(torch.uint8).argmax(1, keepdim=True)
    signs = torch.gather(v, 1, first).sign()
    return (u * signs.T).to(weight.device), (s / scale).to(weight.device), (v * signs).to(weight.device), floor / scale


def vectors(weight: Tensor, rank: int, name: str = "the weight") -> Tensor:
    """What of `factors` takes a decomposition, to be kept and given to it as `basis`."""
    _require_usable(weight, name)
    return leading(placed([weight])[0], rank)


def leading(weight: Tensor, rank: int) -> Tensor:
    """The leading `rank` singular vectors of the smaller side, shape (rank, min(out, in)), in float32 or the weight's float64."""
    if weight.dtype == torch.float64:  # as fine as its values are, a Gram matrix is too coarse for its vectors
        found = by_svd(weight, "", lambda _: rank).basis
        assert found is not None
        return found
    _, vectors = _eigen(gram(weight, scale_of(weight)).unsqueeze(0), True)
    return _kept(vectors[0], rank, weight)


def product_factors(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), s (k,), V (k, in) with U diag(s) V = B A, from B (out, r) and A (r, in); zero directions are left out.

    Two thin QRs and the SVD of an r x r matrix, in float64: the large product is never formed.
    """
    left, right = torch.linalg.qr(b.double()), torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(left.R @ right.R.T)
    rank = max(1, int((s > s.numel() * torch.finfo(torch.float64).eps * s[0]).sum()))
    return left.Q @ u[:, :rank], s[:rank], v[:rank] @ right.Q.T


def gram(weight: Tensor, scale: float) -> Tensor:
    """Wᵀ W or W Wᵀ, whichever is smaller, of the scaled weight (out, in) in float64."""
    total = torch.zeros((), device=weight.device)
    for block in _blocks(weight, scale):
        if block.device.type == "cpu":  # numpy knows a product with itself, and computes one half of it
            rows = block.numpy()
            total = total + torch.from_numpy(rows.T @ rows)
        else:
            total = total + block.T @ block
    return total


def _decomposed(weights: list[Tensor], keep: Keep) -> list[Spectrum]:
    scales = [scale_of(weight) for weight in weights]
    grams = torch.stack([gram(weight, scale) for weight, scale in zip(weights, scales, strict=True)])
    traces = grams.diagonal(dim1=1, dim2=2).sum(1).tolist()
    try:
        eigen, vectors = _eigen(grams, keep is not None)
    except (torch.linalg.LinAlgError, np.linalg.LinAlgError):  # type: ignore[attr-defined]  # it is not in torch's stubs
        return [by_svd(weight, "the eigenvalues of its Gram matrix did not converge", keep) for weight in weights]
    found = [_judged(weight, *each) for weight, *each in zip(weights, scales, eigen.flip(1).cpu(), traces, strict=True)]
    for i, (weight, one) in enumerate(zip(weights, found, strict=True)):
        if one.way == "svd" or (keep is not None and weight.dtype == torch.float64):
            found[i] = by_svd(weight, one.reason, keep)
        elif keep is not None:
            one.__dict__["basis"] = _kept(vectors[i], keep(one), weight)
    return found


def _judged(weight: Tensor, scale: float, eigen: Tensor, trace: float) -> Spectrum:
    """The values and their error bounds, from the eigenvalues of the Gram matrix; `way` is "svd" where they do not do.

    |λ' - λ| is at most u·max(out, in)·‖W‖² (Frobenius, the sums of the Gram matrix) + 8·u·n·λ1 (the eigensolver).
    """
    eigen = eigen.clamp_min(0.0)
    off = UNIT * (max(weight.shape) * trace + 8.0 * len(eigen) * float(eigen[0]))
    values = eigen.sqrt()
    errors = torch.where(eigen > off, values - (eigen - off).clamp_min(0.0).sqrt(), (eigen + off).sqrt())
    floor = zero_floor(weight, float(values[0]))
    unsure = int(((values - floor).abs() <= errors).sum()) if floor > 0.0 else 0
    reason = f"{unsure} of its values lie within the Gram matrix's error of what counts as zero" if unsure else ""
    way = "svd" if unsure else "gram"
    return Spectrum(
        values / scale, floor / scale, errors=errors / scale, way=way, reason=reason, refine=lambda why: by_svd(weight, why)
    )


def by_svd(weight: Tensor, reason: str, keep: Keep = None) -> Spectrum:
    """The spectrum of a matrix by a true SVD, and why it was needed."""
    (weight,) = placed([weight])
    scale = scale_of(weight)
    with _one_thread(weight):
        if keep is None:
            values = torch.linalg.svdvals(weight.double() * scale).cpu()
            return Spectrum(values / scale, zero_floor(weight, float(values[0])) / scale, reason=reason)
        u, s, v = torch.linalg.svd(weight.double() * scale, full_matrices=False)
    found = Spectrum(s.cpu() / scale, zero_floor(weight, float(s[0])) / scale, reason=reason)
    side = v if weight.shape[0] >= weight.shape[1] else u.T
    found.__dict__["basis"] = side[: keep(found)].to(stored_dtype(weight)).contiguous()
    return found


def _eigen(grams: Tensor, vectors: bool) -> tuple[Tensor, Tensor]:
    """Eigenvalues (batch, n), ascending, and where asked eigenvectors (batch, n, n) of symmetric matrices."""
    if grams.device.type == "cpu":  # numpy's library takes half the time of torch's here
        if not vectors:
            return torch.from_numpy(np.linalg.eigvalsh(grams.numpy())), grams[:0]
        values, columns = np.linalg.eigh(grams.numpy())
        return torch.from_numpy(values), torch.from_numpy(columns)
    return tuple(torch.linalg.eigh(grams)) if vectors else (torch.linalg.eigvalsh(grams), grams[:0])


def _kept(columns: Tensor, rank: int, weight: Tensor) -> Tensor:
    """The last `rank` of these columns as rows, the last one first."""
    return columns[:, columns.shape[1] - rank :].flip(1).T.to(stored_dtype(weight)).contiguous()


def _completed(columns: Tensor, sound: Tensor) -> Tensor:
    """The columns (m, k), with others that are orthogonal to all in the place of those that are not sound."""
    if bool(sound.all()):
        return columns
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(columns.shape, generator=generator, dtype=columns.dtype, device="cpu").to(columns.device)
    order = torch.argsort(sound.to(torch.uint8), descending=True, stable=True)
    q, _ = torch.linalg.qr(torch.where(sound, columns, drawn)[:, order])
    return torch.where(sound, columns, q[:, torch.argsort(order)])


def _blocks(weight: Tensor, scale: float) -> Iterator[Tensor]:
    """The rows of the matrix, or of its transpose where that is taller, scaled and in float64, a block at a time."""
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    step = max(1, _BLOCK // tall.shape[1])
    for start in range(0, tall.shape[0], step):
        wide = tall[start : start + step].double()  # of a float64 weight the weight itself, which is not ours to change
        yield wide * scale if tall.dtype == torch.float64 else wide.mul_(scale)


def scale_of(weight: Tensor) -> float:
    """A power of two that brings the largest entry to about 1: squares then neither overflow nor vanish."""
    largest = _largest(weight)
    return math.ldexp(1.0, min(1000, -math.frexp(largest)[1])) if largest > 0.0 else 1.0  # denormal float64 would need more


def _largest(weight: Tensor) -> float:
    """The largest size of an entry; NaN or Inf where there is one."""
    wide = weight.detach().float() if weight.dtype.itemsize == 1 else weight.detach()
    low, high = torch.aminmax(wide)  # one look at all values, and no copy of them; NaN wins
    return float(torch.maximum(-low, high))


def placed(weights: Sequence[Tensor]) -> list[Tensor]:
    """The weights whole, and where float64 can be computed: on CPUs and NVIDIA's or AMD's GPUs."""
    whole = [weight.full_tensor() if is_sharded(weight) else weight.detach() for weight in weights]
    return [weight if weight.device.type in ("cpu", "cuda") else weight.cpu() for weight in whole]


def stored_dtype(weight: Tensor) -> torch.dtype:
    """In what a weight's vectors are kept: float64 for its own kind, else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def zero_floor(weight: Tensor, largest: float) -> float:
    """Up to which size a value counts as zero: max(out, in) · eps · s1."""
    return max(weight.shape) * torch.finfo(stored_dtype(weight)).eps * largest


@contextmanager
def _one_thread(weight: Tensor) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if weight.device.type == "cpu" and min(weight.shape) <= _SMALL else before)
        yield
    finally:
        torch.set_num_threads(before)


def _require_usable(weight: Tensor, name: str) -> None:
    if weight.is_meta:
        raise SpectrumError(
            f"{name} lies on the meta device and has no values: load the model's weights first, and without offloading them."
        )
    if weight.ndim != 2 or weight.numel() == 0:
        raise SpectrumError(f"{name} has shape {tuple(weight.shape)}; a spectrum needs two dimensions and some values.")
    if not math.isfinite(_largest(weight)):
        kind = "NaN" if bool(torch.isnan(weight.float()).any()) else "Inf"
        raise SpectrumError(f"{name} contains {kind}: it has no singular values. Mend the checkpoint, or leave it out.")
