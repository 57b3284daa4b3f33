"""The schedule that makes the weight itself: (W + U diag(δ s) V) x + b, δ's gradient by thin products on the smaller side alone.

On the right V dX = (1 + δ) ⊙ s ⊙ Uᵀ dY gives what the formula takes from dY, on the left Uᵀ y = (1 + δ) ⊙ s ⊙ V x what it takes
from x; there a bias is in the way, and V x is computed. Directions where |1 + δ| < NEAR divide nothing: they are computed from dY
and from x. A shift of 10 and more, in turn, is so large a part of dX that the others' gradients lose digits to its rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sarac.ir import fused
from sarac.ir.byhand import (
    Made,
    Some,
    again,
    differentiable,
    gradients,
    keep,
    lain,
    lying,
    near,
    over,
    plus,
    projected,
    rows,
    saved,
    sums,
    times,
)
from sarac.ir.sharded import fsdp_runs
from sarac.ir.terms import base


class Materialised(torch.autograd.Function):
    """(W + U diag(δ s) V) x + b, the weight made once for both ways."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Made:
        """As the class says; h = V x on the right and with a bias, else Uᵀ y, mended."""
        return _forward(ctx, given, kept=True)

    @staticmethod
    def backward(ctx: Any, dy: Some, dh: Some) -> Any:
        """dX = dY (W + U diag(δ s) V); dδ = Σ s Uᵀ dY ⊙ V x, from what the module says, or as it stands where there is no dX."""
        weight, made, u, v, scale, shift, h = saved(ctx)
        dx = dshift = None
        if dy is not None:
            if ctx.needs_input_grad[1]:
                made = ctx.made if made is None else made
                dx = rows(dy) @ (_made(weight, u, v, shift, scale) if made is None or differentiable() else made)
            if not _tall(weight) and not ctx.seen:
                dshift = sums(lain(u.mT) @ rows(dy).mT, h, shift)
            elif not _tall(weight) or dx is None or differentiable():
                dshift = sums(lain(u.mT) @ rows(dy).mT, h, scale=scale)
            else:
                dshift = sums(projected(dx, v), h, shift, (rows(dy), u.mT, scale))
        if dh is not None and again():
            if _tall(weight) or ctx.seen:
                dx = plus(dx, dh.mT @ v)
            else:  # h = (1 + δ) ⊙ s ⊙ V x, or s ⊙ V x where that is near zero
                c = 1 + shift
                dx = plus(dx, dh.mT @ times(v, torch.where(near(c), scale, c * scale)))
                dshift = plus(dshift, torch.where(near(c), 0.0, over((dh * h).sum(1), shift)))
        return gradients(ctx, dy, dx, dshift)


class Rebuilt(torch.autograd.Function):
    """The same with the weight made once for each way: nothing of its size is kept."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Made:
        """As of `Materialised`."""
        return _forward(ctx, given, kept=False)

    backward = Materialised.backward


def _forward(ctx: Any, given: tuple[Any, ...], kept: bool) -> Made:
    op, x, weight, bias, u, v, scale, shift, siblings = given
    made = _held_or_made(op, (weight, u, v, scale, shift))
    y = base(op, x, lying(op, made), bias)
    ctx.seen = bias is not None  # W x that is rounded at a bias's size tells nothing of small ones
    if _tall(made) or ctx.seen:
        h = projected(x, v, siblings)
    else:
        h = lain(u.mT) @ rows(y).mT
        fused.mend(h, rows(x), v, scale, shift)
    kept = kept and ctx.needs_input_grad[1]
    keep(ctx, op, x, weight, made if kept else None, u, v, scale, shift, h)
    # Not among what is saved: a checkpoint counts that, in the block and behind it.
    ctx.made = made if _held and not kept else None
    return y.detach(), h


def _tall(weight: Tensor) -> bool:
    return weight.shape[0] >= weight.shape[1]


@contextmanager
def accumulating() -> Iterator[None]:
    """Make the weight of a materialised call once for all forwards within, as of the steps between two of the optimiser's.

    Every such weight is held until the end of the block, a rebuilt one too. What is written to within is seen by its version (not
    by `.data`). Under autocast, in compiled code, where shifts are computed (uniform Mo-SARA), and in processes with FSDP2, which
    refills tensors without a trace, each call makes its own.
    """
    block: dict[tuple[Any, ...], tuple[tuple[Tensor, ...], tuple[int, ...], Tensor]] = {}
    _held.append(block)
    try:
        yield
    finally:
        _held[:] = [one for one in _held if one is not block]  # another thread's may be the last


# By how the weight is read and the ids of W, U, V, s and δ: these tensors, their versions, the weight.
_held: list[dict[tuple[Any, ...], tuple[tuple[Tensor, ...], tuple[int, ...], Tensor]]] = []


def _held_or_made(op: str, given: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """The weight of a materialised call, as (out, in), from W, U, V, s and δ: made now, or in this accumulation before."""
    weight, u, v, scale, shift = given
    blocks = () if torch.compiler.is_compiling() else _held[-1:]
    if not blocks or fsdp_runs() or not _parameters(weight, u, v, shift):
        return _made(lying(op, weight), u, v, shift, scale)  # what autocast casts is another one for each call
    key, versions = (op, *map(id, given)), tuple([one._version for one in given])
    found = blocks[0].get(key)
    if found is None or found[1] != versions:
        found = blocks[0][key] = (given, versions, _made(lying(op, weight), u, v, shift, scale))
    return found[2]


def _parameters(*tensors: Tensor) -> bool:
    return all(isinstance(one, nn.Parameter) for one in tensors)


def _made(weight: Tensor, u: Tensor, v: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """W + U diag(δ s) V; it lies by rows or by columns as the stored one does, lest another kernel reads it."""
    if not differentiable() or torch.compiler.is_compiling():
        found = fused.added(weight, u, v, shift, scale)
        if found is not None:
            return found
    scaled = times(u.mT, shift, scale)
    if weight.is_contiguous():
        return torch.addmm(weight, scaled.mT, v)
    return torch.addmm(weight.mT, v.mT, scaled).mT
