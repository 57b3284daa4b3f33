"""What gradients that are written by hand have in common, whichever order of products they belong to (sarac.ir.schedules).

Projections lie as (k, tokens), each direction a row: products of a rank that is no multiple of eight then have rows of whole 16
bytes all the same, without which a GPU takes three times as long, and sums over tokens read what lies together.
"""

from typing import Any

import torch
from torch import Tensor

from sarac.ir import fused
from sarac.ir.siblings import Siblings

_PIECE = 4096  # tokens

Made = tuple[Tensor, Tensor]  # y, h
Some = Tensor | None
Long = tuple[Tensor, Tensor, Tensor]  # x (tokens, in), V (k, in) and s (k,)


def rows(x: Tensor) -> Tensor:
    """All but the last dimension as one."""
    return x.reshape(-1, x.shape[-1])


def projected(x: Tensor, v: Tensor, siblings: Siblings | None = None) -> Tensor:
    """V x of every row, (k, tokens), with those of siblings where there are such."""
    return lain(v) @ rows(x).mT if siblings is None else siblings.project(x, v)


def expanded(y: Tensor, h: Tensor, u: Tensor) -> Tensor:
    """y + hᵀ u in place of y (…, n), from h (k, tokens) and u (k, n); beside y where that is to be differentiated again."""
    flat = rows(y)
    if torch.compiler.is_compiling():
        # A sum can join what reads it; one of float32 is not made an `addmm`, which would copy y first.
        flat = (flat.float() + (h.mT @ u).float()).to(flat.dtype) if flat.dtype == torch.bfloat16 else flat + h.mT @ u
    else:
        flat = torch.addmm(flat, h.mT, u) if differentiable() else flat.addmm_(h.mT, u)
    return flat.view(y.shape)


def lain(matrix: Tensor) -> Tensor:
    """A matrix (k, …), copied where a GPU's products would be slow with it: its rows are no whole 16 bytes apart.

    A copy of columns a whole number of bytes apart would not do: it is k that products look at, wherever it lies together.
    """
    if matrix.is_cuda and max(matrix.stride()) * matrix.element_size() % 16:
        found = fused.turned(matrix.mT) if _turned(matrix) and not differentiable() else None
        return matrix.contiguous() if found is None else found
    return matrix


def times(matrix: Tensor, values: Tensor, other: Some = None) -> Tensor:
    """diag(values), or diag(values ⊙ other), times a matrix (k, …) in the matrix's dtype, rounded once; its rows lie together."""
    if not differentiable() and _turned(matrix):
        found = fused.turned(matrix.mT, values, other)
        if found is not None:
            return found
    return rounded(matrix, (values if other is None else values * other).unsqueeze(-1))


def rounded(matrix: Tensor, values: Tensor) -> Tensor:
    """matrix ⊙ values in the matrix's dtype, rounded once; its rows lie together."""
    if differentiable() or torch.compiler.is_compiling():
        return (matrix * values).to(matrix.dtype).contiguous()
    return torch.mul(matrix, values, out=matrix.new_empty(matrix.shape))  # nothing wider is written in between


def _turned(matrix: Tensor) -> bool:
    """Whether columns lie together: what a compiler may leave so, as it takes no copy for its order, and what is slow to copy."""
    return matrix.stride(0) == 1 and matrix.stride(1) != 1


def sums(g: Tensor, h: Tensor, shift: Some = None, long: Long | None = None, scale: Some = None) -> Tensor:
    """Σ g ⊙ h over the tokens of (k, tokens), in float32 at least, divided by 1 + δ where δ is given and that is not near zero.

    Where it is near zero, `long` gives what is put into g, s ⊙ V x of x (tokens, in), V and s. Times s where `scale` gives it.
    Products that are rounded to bfloat16 first would lose half of the digits.
    """
    if not differentiable() or torch.compiler.is_compiling():
        if long is not None and shift is not None:
            fused.mend(g, *long, shift)
        found = fused.sums(g, h, shift, scale)
        if found is not None:
            return found
    if g.dtype == torch.bfloat16 and not (differentiable() or torch.compiler.is_compiling()):
        # Piece by piece, so that nothing of all tokens is there in float32.
        pieces = zip(torch.split(g, _PIECE, 1), torch.split(h, _PIECE, 1), strict=True)
        total = torch.stack([torch.mul(one, other.float()).sum(1) for one, other in pieces]).sum(0)
    else:
        total = (g.float() * h.float() if g.dtype == torch.bfloat16 else g * h).sum(1)
    return over(total, shift) if scale is None else over(total, shift) * scale


def finished(du: Some, dv: Some, g: Tensor, h: Tensor, shift: Tensor, scale: Tensor) -> tuple[Some, Some, Tensor]:
    """The gradients of U (out, k), V (k, in) and δ, from dYᵀ hᵀ, g x, g = Uᵀ dY and h = V x.

    δ s is multiplied into the first two here, so that nothing of all tokens is. Σ g ⊙ h is also Σ V ⊙ g x, but not of a rounded
    g x: where x has a mean that V does not see, a fifth of dδ would be lost.
    """
    if du is not None and dv is not None and (not differentiable() or torch.compiler.is_compiling()):
        found = fused.finish(du, dv, g, h, shift, scale)
        if found is not None:
            return du, dv, found
    values = shift if du is None and dv is None else shift * scale
    du, dv = None if du is None else rounded(du, values), None if dv is None else times(dv, values)
    return du, dv, sums(g, h, scale=scale)


def over(total: Tensor, shift: Some) -> Tensor:
    """Divided by 1 + δ where that is not near zero."""
    if shift is None:
        return total
    c = 1 + shift
    return total / torch.where(near(c), torch.ones_like(c), c)


def near(c: Tensor) -> Tensor:
    """Whether |1 + δ| is below `fused.NEAR`, a quarter; in whole numbers, as a compiler takes a float for an input."""
    return c.abs() * 4 < 1


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
    """The gradients in the order of a call's arguments, dX in the shape of x."""
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
