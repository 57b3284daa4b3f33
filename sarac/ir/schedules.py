"""The orders in which one adapted linear call can be computed while its shifts train: the same sums, at other costs.

y = W x + U diag(δ s) V x, with U s = W Vᵀ and s V = Uᵀ W of the singular vectors, is also
    two-sided       (W x + b) + U ((δ s) ⊙ V x)
    right           W (x + Vᵀ (δ ⊙ V x)) + b                     by V alone
    left            (I + U diag(δ) Uᵀ) W x + b                   by U alone
    materialised    (W + U diag(δ s) V) x + b                    one product more for the weight, two thin ones fewer for x
with gradients written by hand: of tokens x k numbers only h = V x (or s ⊙ V x) is kept, no frozen tensor gets a gradient, and
δ's is summed in float32. h is an output beside y, which lets a gradient be differentiated again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sarac.ir import fused
from sarac.ir.siblings import Siblings
from sarac.ir.terms import base

EXACT = 16  # how many of the directions nearest to 1 + δ = 0 a materialised call takes the long way, where it cannot divide
_LEAST = 1e-3  # what further ones are divided by at the least
_PIECE = 1024  # rows

# The operation, x, W, b, U, V, s, δ, and who projects x with it.
Given = tuple[str, Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Siblings | None]
Made = tuple[Tensor, Tensor]  # y, h
Some = Tensor | None


class TwoSided(torch.autograd.Function):
    """(W x + b) + U ((δ s) ⊙ V x), also where U and V train."""

    @staticmethod
    def forward(ctx: Any, *given: *Given) -> Made:
        """As the class says; h = V x."""
        op, x, weight, bias, u, v, scale, shift, siblings = given
        h, y = projected(x, v, siblings), base(op, x, weight, bias)
        factors = ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
        keep(ctx, op, x, x if factors else None, weight, u, v, scale, shift, h)
        return torch.addmm(rows(y), h, times(u.mT, shift * scale)).view(y.shape), h

    @staticmethod
    def backward(ctx: Any, dy: Some, dh: Some) -> Any:
        """dX = dY W + ((δ s) ⊙ dY U) V; dδ = s ⊙ Σ dY U ⊙ V x; with P = dYᵀ h: dU = P diag(δ s), dV = diag(δ s) (dY U)ᵀ x."""
        x, weight, u, v, scale, shift, h = saved(ctx, 1)
        values, dx, du, dv, dshift = shift * scale, None, None, None, None
        if dy is not None:
            g = rows(dy) @ u
            if ctx.needs_input_grad[1]:
                dx = torch.addmm(rows(dy) @ weight, g, times(v, values))
            if x is None:
                dshift = sums(g, h) * scale
            else:
                outer = rows(dy).mT @ h
                du, dv, dshift = times(outer.mT, values).mT, times(g.mT @ rows(x), values), sums(u, outer) * scale
        if dh is not None and again():
            dx = plus(dx, dh @ v)
            dv = None if x is None else plus(dv, dh.mT @ rows(x))
        return gradients(ctx, dy, dx, dshift, du, dv)


class Right(torch.autograd.Function):
    """W (x + Vᵀ (δ ⊙ V x)) + b."""

    @staticmethod
    def forward(ctx: Any, *given: *Given) -> Made:
        """As the class says; h = V x."""
        op, x, weight, bias, _, v, _, shift, siblings = given
        h = projected(x, v, siblings)
        keep(ctx, op, x, weight, v, shift, h)
        return base(op, torch.addmm(rows(x), h, times(v, shift)).view(x.shape), weight, bias), h

    @staticmethod
    def backward(ctx: Any, dy: Some, dh: Some) -> Any:
        """dX' = dY W; dX = dX' + (δ ⊙ V dX') V; dδ = Σ V dX' ⊙ V x."""
        weight, v, shift, h = saved(ctx)
        dx = dshift = None
        if dy is not None:
            dx = rows(dy) @ weight
            g = dx @ v.mT
            dx, dshift = torch.addmm(dx, g, times(v, shift)) if ctx.needs_input_grad[1] else None, sums(g, h)
        if dh is not None and again():
            dx = plus(dx, dh @ v)
        return gradients(ctx, dy, dx, dshift)


class Left(torch.autograd.Function):
    """(I + U diag(δ) Uᵀ) W x + b."""

    @staticmethod
    def forward(ctx: Any, *given: *Given) -> Made:
        """As the class says; h = Uᵀ W x: W x + b is one product, from whose projection that of b is taken off again."""
        op, x, weight, bias, u, _, _, shift, _ = given
        y = base(op, x, weight, bias)
        h = _unbiased(rows(y), bias, u)
        keep(ctx, op, x, weight, u, shift, h)
        return torch.addmm(rows(y), h, times(u.mT, shift)).view(y.shape), h

    @staticmethod
    def backward(ctx: Any, dy: Some, dh: Some) -> Any:
        """dX = (dY + (δ ⊙ dY U) Uᵀ) W; dδ = Σ dY U ⊙ Uᵀ W x."""
        weight, u, shift, h = saved(ctx)
        dx = dshift = None
        if dy is not None:
            g = rows(dy) @ u
            dx = torch.addmm(rows(dy), g, times(u.mT, shift)) @ weight if ctx.needs_input_grad[1] else None
            dshift = sums(g, h)
        if dh is not None and again():
            dx = plus(dx, (dh @ u.mT) @ weight)
        return gradients(ctx, dy, dx, dshift)


class Materialised(torch.autograd.Function):
    """(W + U diag(δ s) V) x + b, the weight made once for both ways; δ's gradient by thin products on the smaller side alone.

    On the right V dX = (1 + δ) ⊙ s ⊙ Uᵀ dY gives what TwoSided computes from dY, on the left Uᵀ (y - b) = (1 + δ) ⊙ s ⊙ V x; the
    directions where 1 + δ is nearest to zero (`EXACT` of them) are computed from dY and from x instead.
    """

    @staticmethod
    def forward(ctx: Any, *given: *Given) -> Made:
        """As the class says; h = V x on the right, s ⊙ V x on the left."""
        op, x, weight, bias, u, v, scale, shift, siblings = given
        plain = lying(op, weight)
        made = _kept(op, (weight, u, v, scale, shift))
        y = base(op, x, lying(op, made), bias)
        if _tall(plain):
            h = projected(x, v, siblings)
        else:
            near = _nearest(shift)
            h = _unbiased(rows(y), bias, _divided(u.mT, shift).mT)
            h = h.index_copy(1, near, rows(x) @ (plain.mT @ u.mT[near].mT))
        keep(ctx, op, x, weight, made, u, v, scale, shift, h)
        return y, h

    @staticmethod
    def backward(ctx: Any, dy: Some, dh: Some) -> Any:
        """dX = dY (W + U diag(δ s) V); dδ = Σ s Uᵀ dY ⊙ V x."""
        weight, made, u, v, scale, shift, h = saved(ctx)
        dx = dshift = None
        if dy is not None:
            if differentiable():
                made = _made(weight, u, v, scale, shift)
            dx = rows(dy) @ made if ctx.needs_input_grad[1] else None
            if not _tall(weight):
                g = rows(dy) @ u
            elif dx is None:
                g = rows(dy) @ times(u.mT, scale).mT
            else:
                near = _nearest(shift)
                g = (dx @ _divided(v, shift).mT).index_copy(1, near, rows(dy) @ (weight @ v[near].mT))
            dshift = sums(g, h)
        if dh is not None and again():
            dx = plus(dx, dh @ (v if _tall(weight) else times(v, scale)))
        return gradients(ctx, dy, dx, dshift)


SCHEDULES: dict[str, type[torch.autograd.Function]] = {
    "two-sided": TwoSided,
    "right": Right,
    "left": Left,
    "materialised": Materialised,
}


def rows(x: Tensor) -> Tensor:
    """All but the last dimension as one."""
    return x.reshape(-1, x.shape[-1])


def projected(x: Tensor, v: Tensor, siblings: Siblings | None) -> Tensor:
    """V x of every row, with those of siblings where there are such."""
    return rows(x) @ v.mT if siblings is None else siblings.project(x, v)


def times(matrix: Tensor, values: Tensor) -> Tensor:
    """diag(values) times a matrix (k, …) in the matrix's dtype, rounded once."""
    if differentiable() or torch.compiler.is_compiling():
        return (matrix * values.unsqueeze(-1)).to(matrix.dtype)
    return torch.mul(matrix, values.unsqueeze(-1), out=torch.empty_like(matrix))  # nothing wider is written in between


def sums(g: Tensor, h: Tensor) -> Tensor:
    """Σ g ⊙ h over the rows, in float32 at least; products that are rounded to bfloat16 first would lose half of the digits."""
    if g.dtype != torch.bfloat16:
        return (g * h).sum(0)
    if differentiable() or torch.compiler.is_compiling():
        return (g.float() * h.float()).sum(0)
    found = fused.sums(g, h)
    if found is None:  # piece by piece, so that nothing of all tokens is there in float32
        pieces = zip(torch.split(g, _PIECE), torch.split(h, _PIECE), strict=True)
        found = torch.stack([torch.mul(one, other.float()).sum(0) for one, other in pieces]).sum(0)
    return found


def keep(ctx: Any, op: str, x: Tensor, *tensors: Some) -> None:
    """Keep what the backward needs, in its order."""
    ctx.op, ctx.shape = op, x.shape
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def saved(ctx: Any, place: int = 0) -> list[Any]:
    """What was kept, the weight at this place as (out, in)."""
    found = list(ctx.saved_tensors)
    found[place] = lying(ctx.op, found[place])
    return found


def lying(op: str, weight: Tensor) -> Tensor:
    """The weight of an operation as (out, in)."""
    return weight if op == "linear" else weight.mT


def gradients(ctx: Any, dy: Some, dx: Some, dshift: Some, du: Some = None, dv: Some = None) -> tuple[Some, ...]:
    """The gradients in the order of `Given`, dX in the shape of x."""
    dx = dx.view(ctx.shape) if dx is not None and ctx.needs_input_grad[1] else None
    dbias = rows(dy).sum(0) if dy is not None and ctx.needs_input_grad[3] else None
    return None, dx, None, dbias, du, dv, None, dshift, None


def differentiable() -> bool:
    """Whether what a backward computes is to be differentiated again: it runs with create_graph."""
    return torch.is_grad_enabled()


def again() -> bool:
    """Whether a gradient at h is a second derivative: a compiler has none, and makes zeros of what has no gradient."""
    return not torch.compiler.is_compiling()


def plus(one: Some, other: Tensor) -> Tensor:
    """The sum, where there is a first."""
    return other if one is None else one + other


def _tall(weight: Tensor) -> bool:
    return weight.shape[0] >= weight.shape[1]


@contextmanager
def accumulating() -> Iterator[None]:
    """Make the weight of a materialised call once for all forwards within, as of the steps between two of the optimiser's.

    Every such weight is held until the end of the block. A shift that is written to within is seen by its version, and so is a
    base outside of autocast.
    """
    _held.append({})
    try:
        yield
    finally:
        _held.pop()


# By the id of a shift and how the weight is read (a shift may serve both ways, and several dtypes): shift, versions, weight.
_held: list[dict[tuple[Any, ...], tuple[Tensor, tuple[int, int], Tensor]]] = []


def _kept(op: str, given: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """The weight of a materialised call, as (out, in), from W, U, V, s and δ: made now, or in this accumulation before."""
    weight, shift = given[0], given[-1]
    if not _held or torch.compiler.is_compiling() or not shift.is_leaf or weight.is_inference():
        return _made(lying(op, weight), *given[1:])
    key, versions = (id(shift), op, weight.stride(), weight.dtype), (shift._version, weight._version)
    found = _held[-1].get(key)
    if found is None or found[1] != versions:
        found = _held[-1][key] = (shift, versions, _made(lying(op, weight), *given[1:]))
    return found[2]


def _made(weight: Tensor, u: Tensor, v: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    added = times(v, shift * scale)
    if weight.is_contiguous():
        return torch.addmm(weight, u, added)
    return torch.addmm(weight.mT, added.mT, u.mT).mT  # it lies as the stored one does, lest another kernel reads it


def _divided(matrix: Tensor, shift: Tensor) -> Tensor:
    c = 1 + shift
    return times(matrix, torch.where(c.abs() < _LEAST, torch.full_like(c, _LEAST).copysign(c), c).reciprocal())


def _nearest(shift: Tensor) -> Tensor:
    return torch.topk((1 + shift).abs(), min(EXACT, len(shift)), largest=False, sorted=False).indices


def _unbiased(y: Tensor, bias: Some, u: Tensor) -> Tensor:
    """Uᵀ (y - b) of every row."""
    return y @ u if bias is None else torch.addmm(-(bias @ u), y, u)
