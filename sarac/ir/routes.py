"""A routed linear call with gradients by hand: y = W x + b + U ((mᵀ g) ⊙ h) with h = V x, gates g (sets, tokens), m the shifts.

As in sarac.ir.schedules the sum can be taken on the output, with m = δ ⊙ s, on the input (right): W (x + Vᵀ ((δᵀ g) ⊙ h)) + b, or
with h = s⁻¹ Uᵀ W x on the output by U alone (left). Kept are h and the scores, tokens x (k + sets) numbers; what stands between
them and y is computed again.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sarac.ir import fused
from sarac.ir.byhand import Made, Some, again, expanded, gradients, keep, lain, plus, projected, rows, saved, times
from sarac.ir.siblings import Siblings
from sarac.ir.terms import base, gates_of

# The operation, x, W, b, U, V, s, δ (sets, k), who projects x with it, R (sets, k), the kind of router.
Given = tuple[str, Tensor, Tensor, Some, Tensor, Tensor, Tensor, Tensor, Siblings | None, Tensor, str]


class RoutedTwoSided(torch.autograd.Function):
    """(W x + b) + U (((δ ⊙ s)ᵀ g) ⊙ V x)."""

    @staticmethod
    def forward(ctx: Any, *given: *Given) -> Made:
        """As the class says; h = V x."""
        op, x, weight, bias, u, v, scale, shift, siblings, router, ctx.kind = given
        h = projected(x, v, siblings)
        mixed, scores = _mixed(h, router, shift, scale, ctx.kind)
        keep(ctx, op, x, weight, u, v, scale, shift, router, h, scores)
        return expanded(base(op, x, weight, bias), mixed, lain(u.mT)).detach(), h

    @staticmethod
    def backward(ctx: Any, dy: Some, dh: Some) -> Any:
        """dX = dY W + dh V, with dh what `_back` makes of dY U."""
        weight, u, v, scale, shift, router, h, scores = saved(ctx)
        dx, done = None, _NOTHING
        if dy is not None:
            done = _back(lain(u.mT) @ rows(dy).mT, h, scores, shift, scale, router, ctx.kind)
            dx = expanded(rows(dy) @ weight, done.h, v) if ctx.needs_input_grad[1] else None
        if dh is not None and again():
            dx = plus(dx, dh.mT @ v)
        return *gradients(ctx, dy, dx, done.shift), done.router, None


class RoutedRight(torch.autograd.Function):
    """W (x + Vᵀ ((δᵀ g) ⊙ V x)) + b."""

    @staticmethod
    def forward(ctx: Any, *given: *Given) -> Made:
        """As the class says; h = V x."""
        op, x, weight, bias, _, v, _, shift, siblings, router, ctx.kind = given
        h = projected(x, v, siblings)
        mixed, scores = _mixed(h, router, shift, None, ctx.kind)
        keep(ctx, op, x, weight, v, shift, router, h, scores)
        moved = torch.addmm(rows(x), mixed.mT, v)
        return base(op, moved.view(x.shape), weight, bias).detach(), h

    @staticmethod
    def backward(ctx: Any, dy: Some, dh: Some) -> Any:
        """dX' = dY W; dX = dX' + dh V, with dh what `_back` makes of V dX'."""
        weight, v, shift, router, h, scores = saved(ctx)
        dx, done = None, _NOTHING
        if dy is not None:
            dx = rows(dy) @ weight
            done = _back(projected(dx, v), h, scores, shift, None, router, ctx.kind)
            dx = expanded(dx, done.h, v) if ctx.needs_input_grad[1] else None
        if dh is not None and again():
            dx = plus(dx, dh.mT @ v)
        return *gradients(ctx, dy, dx, done.shift), done.router, None


class RoutedLeft(torch.autograd.Function):
    """W x + U (((δ ⊙ s)ᵀ g) ⊙ s⁻¹ Uᵀ W x); not with a bias, beside which a row of zeros would not tie the scores."""

    @staticmethod
    def forward(ctx: Any, *given: *Given) -> Made:
        """As the class says; h = s⁻¹ Uᵀ W x, which is V x."""
        op, x, weight, _, u, _, scale, shift, _, router, ctx.kind = given
        y = base(op, x, weight, None)
        h = times(u.mT, 1 / scale) @ rows(y).mT
        mixed, scores = _mixed(h, router, shift, scale, ctx.kind)
        keep(ctx, op, x, weight, u, scale, shift, router, h, scores)
        return expanded(y, mixed, lain(u.mT)).detach(), h

    @staticmethod
    def backward(ctx: Any, dy: Some, dh: Some) -> Any:
        """dX = (dY + (s⁻¹ dh)ᵀ Uᵀ) W, with dh what `_back` makes of dY U."""
        weight, u, scale, shift, router, h, scores = saved(ctx)
        dx, done = None, _NOTHING
        if dy is not None:
            done = _back(lain(u.mT) @ rows(dy).mT, h, scores, shift, scale, router, ctx.kind)
            moved = torch.addmm(rows(dy), done.h.mT, times(u.mT, 1 / scale))
            dx = moved @ weight if ctx.needs_input_grad[1] else None
        if dh is not None and again():
            dx = plus(dx, (dh.mT @ times(u.mT, 1 / scale)) @ weight)
        return *gradients(ctx, dy, dx, done.shift), done.router, None


ROUTED: dict[str, type[torch.autograd.Function]] = {"two-sided": RoutedTwoSided, "right": RoutedRight, "left": RoutedLeft}


class _Done(NamedTuple):
    """Gradients of h (k, tokens) in its dtype, of the shifts δ (sets, k), and of R."""

    h: Any
    shift: Some
    router: Some


_NOTHING = _Done(None, None, None)


def _mixed(h: Tensor, router: Tensor, shift: Tensor, scale: Some, kind: str) -> tuple[Tensor, Tensor]:
    """h ⊙ (mᵀ g), with m = δ or, where s is given, δ ⊙ s; and the scores R h (sets, tokens) that g is of."""
    found = fused.mixed(h, router, shift, scale, kind)
    if found is None:
        scores = router @ h.to(router.dtype)
        gates = gates_of(scores.mT, kind).mT.to(shift.dtype)
        found = (h * (_scaled(shift, scale).mT @ gates)).to(h.dtype), scores
    return found


def _back(dmixed: Tensor, h: Tensor, scores: Tensor, shift: Tensor, scale: Some, router: Tensor, kind: str) -> _Done:
    """The gradients behind (mᵀ g) ⊙ h: through h itself, through δ in the shifts m, and through the gates g = softmax(R h)."""
    done = fused.back(dmixed, h, scores, shift, scale, router, kind)
    if done is not None:
        return _Done(*done)
    seen, shift = h.to(router.dtype), _scaled(shift, scale)
    if torch.is_grad_enabled():
        scores = router @ seen  # of which h and the router are to be seen again
    gates, soft = gates_of(scores.mT, kind).mT.to(shift.dtype), torch.softmax(scores, 0)
    dvalues = dmixed * h.to(shift.dtype)
    dgates = (shift @ dvalues).to(soft.dtype)
    dsoft = dgates * (gates != 0) if kind.startswith("topk:") else dgates
    dscores = soft * (dsoft - (soft * dsoft).sum(0))
    through = (dmixed * (shift.mT @ gates)).to(h.dtype)
    return _Done(through + (router.mT @ dscores).to(h.dtype), _scaled(gates @ dvalues.mT, scale), dscores @ seen.mT)


def _scaled(shift: Tensor, scale: Some) -> Tensor:
    return shift if scale is None else shift * scale
