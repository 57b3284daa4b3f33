"""A routed linear call with gradients by hand: y = W x + b + U ((g m) ⊙ h) with h = V x, gates g (tokens, sets), m the shifts.

As in sarac.ir.schedules the sum can be taken on the output, with m = δ ⊙ s, or on the input (right): W (x + Vᵀ ((g δ) ⊙ h)) + b.
Kept are h and the scores, tokens x (k + sets) numbers; what stands between them and y is computed again.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from sarac.ir import fused
from sarac.ir.schedules import Made, Some, again, gradients, keep, plus, projected, rows, saved
from sarac.ir.siblings import Siblings
from sarac.ir.terms import base, gates_of

# The operation, x, W, b, U, V, s, δ (sets, k), who projects x with it, R (sets, k) or (sets, width), R_in (width, k), the kind
# of router.
Given = tuple[str, Tensor, Tensor, Some, Tensor, Tensor, Tensor, Tensor, Siblings | None, Tensor, Some, str]


class RoutedTwoSided(torch.autograd.Function):
    """(W x + b) + U ((g (δ ⊙ s)) ⊙ V x)."""

    @staticmethod
    def forward(ctx: Any, *given: *Given) -> Made:
        """As the class says; h = V x."""
        op, x, weight, bias, u, v, scale, shift, siblings, router, inward, ctx.kind = given
        h, y = projected(x, v, siblings), base(op, x, weight, bias)
        mixed, scores = _mixed(h, router, inward, shift * scale, ctx.kind)
        keep(ctx, op, x, weight, u, v, scale, shift, router, inward, h, scores)
        return torch.addmm(rows(y), mixed, u.mT).view(y.shape), h

    @staticmethod
    def backward(ctx: Any, dy: Some, dh: Some) -> Any:
        """dX = dY W + dh V, with dh what `_back` makes of dY U."""
        weight, u, v, scale, shift, router, inward, h, scores = saved(ctx)
        dx, done = None, _NOTHING
        if dy is not None:
            done = _back(rows(dy) @ u, h, scores, shift * scale, router, inward, ctx.kind)
            dx = torch.addmm(rows(dy) @ weight, done.h, v) if ctx.needs_input_grad[1] else None
        if dh is not None and again():
            dx = plus(dx, dh @ v)
        dshift = None if done.shift is None else done.shift * scale
        return *gradients(ctx, dy, dx, dshift), done.router, done.inward, None


class RoutedRight(torch.autograd.Function):
    """W (x + Vᵀ ((g δ) ⊙ V x)) + b."""

    @staticmethod
    def forward(ctx: Any, *given: *Given) -> Made:
        """As the class says; h = V x."""
        op, x, weight, bias, _, v, _, shift, siblings, router, inward, ctx.kind = given
        h = projected(x, v, siblings)
        mixed, scores = _mixed(h, router, inward, shift, ctx.kind)
        keep(ctx, op, x, weight, v, shift, router, inward, h, scores)
        moved = torch.addmm(rows(x), mixed, v)
        return base(op, moved.view(x.shape), weight, bias), h

    @staticmethod
    def backward(ctx: Any, dy: Some, dh: Some) -> Any:
        """dX' = dY W; dX = dX' + dh V, with dh what `_back` makes of V dX'."""
        weight, v, shift, router, inward, h, scores = saved(ctx)
        dx, done = None, _NOTHING
        if dy is not None:
            dx = rows(dy) @ weight
            done = _back(dx @ v.mT, h, scores, shift, router, inward, ctx.kind)
            dx = torch.addmm(dx, done.h, v) if ctx.needs_input_grad[1] else None
        if dh is not None and again():
            dx = plus(dx, dh @ v)
        return *gradients(ctx, dy, dx, done.shift), done.router, done.inward, None


ROUTED: dict[str, type[torch.autograd.Function]] = {"two-sided": RoutedTwoSided, "right": RoutedRight}


class _Done(NamedTuple):
    """Gradients of h in its dtype, of the shifts (sets, k) that the gates mix, of R and of R_in."""

    h: Any
    shift: Some
    router: Some
    inward: Some


_NOTHING = _Done(None, None, None, None)


def _scores(h: Tensor, router: Tensor, inward: Some) -> Tensor:
    """R h in the router's dtype."""
    seen = h.to(router.dtype)
    return linear(seen if inward is None else linear(seen, inward), router)


def _mixed(h: Tensor, router: Tensor, inward: Some, shift: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """h ⊙ (g m), and the scores that g is of."""
    found = fused.mixed(h, router, inward, shift, kind)
    if found is None:
        scores = _scores(h, router, inward)
        found = (h * (gates_of(scores, kind).to(shift.dtype) @ shift)).to(h.dtype), scores
    return found


def _back(dmixed: Tensor, h: Tensor, scores: Tensor, shift: Tensor, router: Tensor, inward: Some, kind: str) -> _Done:
    """The gradients behind (g m) ⊙ h: through h itself, through the shifts m, and through the gates g = softmax(R h)."""
    done = fused.back(dmixed, h, scores, shift, router, inward, kind)
    if done is not None:
        return _Done(*done, None)
    if torch.is_grad_enabled():
        scores = _scores(h, router, inward)  # of which h and the router are to be seen again
    gates, soft = gates_of(scores, kind).to(shift.dtype), torch.softmax(scores, -1)
    dvalues = dmixed * h.to(shift.dtype)
    dgates = (dvalues @ shift.mT).to(soft.dtype)
    dsoft = dgates * (gates != 0) if kind.startswith("topk:") else dgates
    dscores = soft * (dsoft - (soft * dsoft).sum(-1, keepdim=True))
    seen, dwidth = h.to(router.dtype), dscores @ router
    through = (dmixed * (gates @ shift)).to(h.dtype)
    if inward is None:
        return _Done(through + dwidth.to(h.dtype), gates.mT @ dvalues, dscores.mT @ seen, None)
    drouter = dscores.mT @ linear(seen, inward)
    return _Done(through + (dwidth @ inward).to(h.dtype), gates.mT @ dvalues, drouter, dwidth.mT @ seen)
