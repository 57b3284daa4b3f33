"""The orders in which one adapted linear call can be computed while its shifts train: the same sums, at other costs.

y = W x + U diag(δ s) V x, with U s = W Vᵀ and s V = Uᵀ W of the singular vectors, is also
    two-sided       (W x + b) + U ((δ s) ⊙ V x)
    right           W (x + Vᵀ (δ ⊙ V x)) + b                     by V alone
    left            (I + U diag(δ) Uᵀ) W x                       by U alone, where there is no bias
    materialised    (W + U diag(δ s) V) x + b                    one product more for the weight, two thin ones fewer for x
    rebuilt         the same, the weight made again for the backward and not kept
with gradients written by hand: of tokens x k numbers only h = V x (or Uᵀ W x) is kept, no frozen tensor gets a gradient, and
δ's is summed in float32. h is an output beside y, which lets a gradient be differentiated again; y is no view, lest nobody could
write to it.
"""

from typing import Any

import torch
from torch import Tensor

from sarac.ir.byhand import (
    Made,
    Some,
    again,
    expanded,
    finished,
    gradients,
    keep,
    lain,
    plus,
    projected,
    rows,
    saved,
    sums,
    times,
)
from sarac.ir.materialised import Materialised, Rebuilt
from sarac.ir.siblings import Siblings
from sarac.ir.terms import base

# The operation, x, W, b, U, V, s, δ, and who projects x with it.
Given = tuple[str, Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Siblings | None]


class TwoSided(torch.autograd.Function):
    """(W x + b) + U ((δ s) ⊙ V x), also where U and V train."""

    @staticmethod
    def forward(ctx: Any, *given: *Given) -> Made:
        """As the class says; h = V x."""
        op, x, weight, bias, u, v, scale, shift, siblings = given
        h = projected(x, v, siblings)
        keep(ctx, op, x, x if ctx.needs_input_grad[5] else None, weight, u, v, scale, shift, h)
        return expanded(base(op, x, weight, bias), h, times(u.mT, shift, scale)).detach(), h

    @staticmethod
    def backward(ctx: Any, dy: Some, dh: Some) -> Any:
        """dX = dY W + gᵀ (δ s ⊙ V) with g = Uᵀ dY; dδ = s ⊙ Σ g ⊙ V x; dU = (dYᵀ (V x)) ⊙ δ s, dV = δ s ⊙ (g x)."""
        x, weight, u, v, scale, shift, h = saved(ctx, 1)
        dx, du, dv, dshift = None, None, None, None
        if dy is not None:
            g = lain(u.mT) @ rows(dy).mT
            dx = expanded(rows(dy) @ weight, g, times(v, shift, scale)) if ctx.needs_input_grad[1] else None
            du = rows(dy).mT @ h.mT if ctx.needs_input_grad[4] else None
            dv = None if x is None else g @ rows(x)
            du, dv, dshift = finished(du, dv, g, h, shift, scale)
        if dh is not None and again():
            dx = plus(dx, dh.mT @ v)
            dv = None if x is None else plus(dv, dh @ rows(x))
        return gradients(ctx, dy, dx, dshift, du, dv)


class Right(torch.autograd.Function):
    """W (x + Vᵀ (δ ⊙ V x)) + b."""

    @staticmethod
    def forward(ctx: Any, *given: *Given) -> Made:
        """As the class says; h = V x."""
        op, x, weight, bias, _, v, _, shift, siblings = given
        h = projected(x, v, siblings)
        keep(ctx, op, x, weight, v, shift, h)
        return base(op, torch.addmm(rows(x), h.mT, times(v, shift)).view(x.shape), weight, bias).detach(), h

    @staticmethod
    def backward(ctx: Any, dy: Some, dh: Some) -> Any:
        """dX' = dY W; dX = dX' + (δ ⊙ V dX') V; dδ = Σ V dX' ⊙ V x."""
        weight, v, shift, h = saved(ctx)
        dx = dshift = None
        if dy is not None:
            dx = rows(dy) @ weight
            g = projected(dx, v)
            dx, dshift = expanded(dx, g, times(v, shift)) if ctx.needs_input_grad[1] else None, sums(g, h)
        if dh is not None and again():
            dx = plus(dx, dh.mT @ v)
        return gradients(ctx, dy, dx, dshift)


class Left(torch.autograd.Function):
    """(I + U diag(δ) Uᵀ) W x; not with a bias, at whose size W x would be rounded."""

    @staticmethod
    def forward(ctx: Any, *given: *Given) -> Made:
        """As the class says; h = Uᵀ W x."""
        op, x, weight, _, u, _, _, shift, _ = given
        y = base(op, x, weight, None)
        h = lain(u.mT) @ rows(y).mT
        keep(ctx, op, x, weight, u, shift, h)
        return expanded(y, h, times(u.mT, shift)).detach(), h

    @staticmethod
    def backward(ctx: Any, dy: Some, dh: Some) -> Any:
        """dX = (dY + (δ ⊙ dY U) Uᵀ) W; dδ = Σ dY U ⊙ Uᵀ W x."""
        weight, u, shift, h = saved(ctx)
        dx = dshift = None
        if dy is not None:
            g = lain(u.mT) @ rows(dy).mT
            dx = torch.addmm(rows(dy), g.mT, times(u.mT, shift)) @ weight if ctx.needs_input_grad[1] else None
            dshift = sums(g, h)
        if dh is not None and again():
            dx = plus(dx, (dh.mT @ u.mT) @ weight)
        return gradients(ctx, dy, dx, dshift)


SCHEDULES: dict[str, type[torch.autograd.Function]] = {
    "two-sided": TwoSided,
    "right": Right,
    "left": Left,
    "materialised": Materialised,
    "rebuilt": Rebuilt,
}
