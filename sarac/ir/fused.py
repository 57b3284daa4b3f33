"""One kernel for a chain of steps where Triton runs; None elsewhere, where torch's own operations serve.

In a compiled graph the kernels are the compiler's to launch, which costs no Python. Torch's way to mend, which asks for values,
is an operator there that the compiler leaves as it is.
"""

import functools

import torch
from torch import Tensor

from sarac.ir.launch import Launch, kernels, launched, operator, runs, traced

_TOKENS, _RANKS = 64, 64  # tokens and directions of a block of the routed kernels: the best of 13 on an H200 at k = 566, 759
_LENGTH, _WIDTH = 8192, 1024  # tokens of a piece of a sum, and numbers that a program takes at once
_SIDE = 64  # of a square that is turned
_HIGH, _WIDE, _DEEP, _GROUP = 128, 128, 32, 8  # of a product's block, and so many blocks of rows share what they read
_THIN = 128  # directions of a product, above which reading U by columns of two bytes costs more than to turn it first
NEAR = 0.25  # below it |1 + δ| divides nothing; no argument: a compiler takes a float for an input that may change
_SETS = 16  # above it torch's own products are the better way

Some = Tensor | None
Mixed = tuple[Tensor, Tensor]  # h ⊙ (mᵀ g), scores
Back = tuple[Tensor, Tensor, Tensor]  # the gradients of h, δ and R


def mixed(h: Tensor, router: Tensor, shift: Tensor, scale: Some, kind: str) -> Mixed | None:
    """h ⊙ (mᵀ g) in h's dtype and the scores (sets, tokens), from h (k, tokens), R (sets, k) and m = δ (sets, k), or δ ⊙ s."""
    if not _fits(h, router, shift, scale):
        return None
    if torch.compiler.is_compiling():
        found: Mixed = _mixed_in_graph(h, router, shift, scale, kind)
        return found
    return _mixed(h, router, shift, scale, kind, launched)


def back(dmixed: Tensor, h: Tensor, scores: Tensor, shift: Tensor, scale: Some, router: Tensor, kind: str) -> Back | None:
    """The gradients of h (k, tokens), δ and R (sets, k), from that of h ⊙ (mᵀ g)."""
    compiling = torch.compiler.is_compiling()
    if dmixed.dtype != h.dtype or (torch.is_grad_enabled() and not compiling) or not _fits(h, router, shift, scale):
        return None
    if compiling:
        dh, few = _back_in_graph(dmixed, h, scores, shift, scale, router, kind)
    else:
        dh, few = _back(dmixed, h, scores, shift, scale, router, kind, launched)
    return dh, few[0], few[1]


def sums(g: Tensor, h: Tensor, shift: Some = None, scale: Some = None) -> Some:
    """Σ g ⊙ h over the tokens of both (k, tokens), in float32, times s where s (k,) is given.

    Over 1 + δ where δ (k,) is given and |1 + δ| is not below NEAR.
    """
    if not (g.dtype == h.dtype == torch.bfloat16 and g.stride(1) == h.stride(1) == 1 and runs(h)):
        return None
    if torch.compiler.is_compiling():
        found: Tensor = _sums_in_graph(g, h, shift, scale)
        return found
    return _sums(g, h, shift, scale, launched)


def added(c: Tensor, a: Tensor, b: Tensor, one: Tensor, other: Tensor) -> Some:
    """C + A diag(one ⊙ other) B, laid out as C, from C (m, n), A (m, k), B (k, n) and values (k,): no copy of C comes first."""
    if len(b) > _THIN or c.dtype != torch.bfloat16 or not a.dtype == b.dtype == c.dtype or not runs(c):
        return None
    if torch.compiler.is_compiling():
        found: Tensor = _added_in_graph(c, a, b, one, other)
        return found
    return _added(c, a, b, one, other, launched)


def turned(u: Tensor, one: Some = None, other: Some = None) -> Some:
    """diag(one ⊙ other) Uᵀ (k, out) in U's dtype, or by one alone or none, from U (out, k); each row lies together."""
    if not (u.dtype in (torch.float32, torch.bfloat16) and u.stride(1) == 1 and runs(u)):
        return None
    if torch.compiler.is_compiling():
        found: Tensor = _turned_in_graph(u, one, other)
        return found
    return _turned(u, one, other, launched)


def finish(du: Tensor, dv: Tensor, g: Tensor, h: Tensor, shift: Tensor, scale: Tensor) -> Some:
    """dδ = s ⊙ Σ g ⊙ h over the tokens of both (k, tokens), in float32; dU (out, k) and dV (k, in) times δ s, in place."""
    there = du.dtype == dv.dtype == g.dtype == h.dtype and h.dtype in (torch.float32, torch.bfloat16) and runs(h)
    if not (there and du.is_contiguous() and dv.is_contiguous() and g.stride(1) == h.stride(1) == 1):
        return None
    if torch.compiler.is_compiling():
        found: Tensor = _finish_in_graph(du, dv, g, h, shift, scale)
        return found
    return _finish(du, dv, g, h, shift, scale, launched)


def mend(h: Tensor, x: Tensor, v: Tensor, scale: Tensor, shift: Tensor) -> None:
    """Put s ⊙ V x into those rows of h (k, tokens) where |1 + δ| < NEAR, from x (tokens, in) and V (k, in), and into no other."""
    served = runs(h) and h.dtype == x.dtype == v.dtype and h.dtype in (torch.float32, torch.bfloat16) and h.stride(1) == 1
    if torch.compiler.is_compiling():
        (_mend_in_graph if served else _asking_in_graph)(h, x, v, scale, shift)
    elif served:
        _mend(h, x, v, scale, shift, launched)
    else:
        _asking(h, x, v, scale, shift)


def _sums(g: Tensor, h: Tensor, shift: Some, scale: Some, launch: Launch) -> Tensor:
    rank, tokens = h.shape
    pieces = -(-tokens // _LENGTH)
    out = torch.empty((pieces, rank), device=h.device, dtype=torch.float32)
    tensors = (g, h, _together(shift, out), _together(scale, out), out)
    constants = (shift is not None, scale is not None, _LENGTH, _WIDTH)
    launch("sums", (rank, pieces, 1), tensors, (tokens, g.stride(0), h.stride(0), NEAR), constants)
    return out.view(rank) if pieces == 1 else out.sum(0)


def _together(values: Some, other: Tensor) -> Tensor:
    """Values as kernels read them, in one row; where there are none, some tensor in their place."""
    return other if values is None else values.contiguous()


def _added(c: Tensor, a: Tensor, b: Tensor, one: Tensor, other: Tensor, launch: Launch) -> Tensor:
    (height, width), inner, out = c.shape, len(b), torch.empty_like(c)
    numbers = (height, width, inner, *c.stride(), *a.stride(), *b.stride(), *out.stride())
    grid = (-(-height // _HIGH) * -(-width // _WIDE), 1, 1)
    launch("added", grid, (c, a, b, one.contiguous(), other.contiguous(), out), numbers, (_HIGH, _WIDE, _DEEP, _GROUP))
    return out


def _turned(u: Tensor, one: Some, other: Some, launch: Launch) -> Tensor:
    height, rank = u.shape
    out = torch.empty((rank, height), device=u.device, dtype=u.dtype)
    grid = (-(-height // _SIDE), -(-rank // _SIDE), 1)
    tensors = (u, _together(one, out), _together(other, out), out)
    launch("turned", grid, tensors, (height, rank, u.stride(0)), ((one is not None) + (other is not None), _SIDE))
    return out


def _mixed(h: Tensor, router: Tensor, shift: Tensor, scale: Some, kind: str, launch: Launch) -> Mixed:
    (rank, tokens), sets = h.shape, len(router)
    done = torch.empty((rank, tokens), device=h.device, dtype=h.dtype)
    scores = torch.empty((sets, tokens), device=h.device, dtype=torch.float32)
    tensors = (h, router.contiguous(), shift.contiguous(), _together(scale, scores), done, scores)
    constants = (scale is not None, *_how(sets, kind))
    launch("forward", (-(-tokens // _TOKENS), 1, 1), tensors, (tokens, rank, h.stride(0)), constants)
    return done, scores


def _back(
    dmixed: Tensor, h: Tensor, scores: Tensor, shift: Tensor, scale: Some, router: Tensor, kind: str, launch: Launch
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of h, and of δ and R together, (2, sets, k): an operator's results share no memory, and copies cost."""
    (rank, tokens), sets, blocks = h.shape, len(router), -(-h.shape[1] // _TOKENS)
    dh = torch.empty((rank, tokens), device=h.device, dtype=h.dtype)
    shares = torch.empty((blocks, 2, sets, rank), device=h.device, dtype=torch.float32)
    routes = (scores, router.contiguous(), shift.contiguous(), _together(scale, scores))
    constants = (scale is not None, *_how(sets, kind))
    launch("backward", (blocks, 1, 1), (dmixed.contiguous(), h, *routes, dh, shares), (tokens, rank, h.stride(0)), constants)
    return dh, shares.sum(0)


def _finish(du: Tensor, dv: Tensor, g: Tensor, h: Tensor, shift: Tensor, scale: Tensor, launch: Launch) -> Tensor:
    (rank, tokens), up, down = h.shape, du.numel(), dv.numel()
    dshift = torch.empty(rank, device=h.device, dtype=torch.float32)
    tensors = (du, dv, g, h, shift.contiguous(), scale.contiguous(), dshift)
    numbers = (up, down, tokens, rank, dv.shape[1], g.stride(0), h.stride(0))
    launch("finish", (rank + -(-up // _WIDTH) + -(-down // _WIDTH), 1, 1), tensors, numbers, (_WIDTH,))
    return dshift


def _mend(h: Tensor, x: Tensor, v: Tensor, scale: Tensor, shift: Tensor, launch: Launch) -> None:
    rank, tokens = h.shape
    numbers = (tokens, x.shape[1], rank, h.stride(0), *x.stride(), *v.stride(), NEAR)
    tensors = (h, x, v, scale.contiguous(), shift.contiguous())
    launch("mend", (-(-tokens // _SIDE), 1, 1), tensors, numbers, (_WIDTH, 32, _SIDE, _SIDE))


def _asking(h: Tensor, x: Tensor, v: Tensor, scale: Tensor, shift: Tensor) -> None:
    found = ((1 + shift).abs() < NEAR).nonzero().squeeze(1)  # which the host waits for
    if len(found):
        h[found] = (scale[found].unsqueeze(1) * (v[found] @ x.mT)).to(h.dtype)


@functools.cache
def _how(sets: int, kind: str) -> tuple[int, ...]:
    """The constants of a routed kernel."""
    code, count = kernels().kind_of(kind)
    return sets, _SETS, code, count, _TOKENS, _RANKS


def _traced_mixed(h: Tensor, router: Tensor, shift: Tensor, scale: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    return _mixed(h, router, shift, scale, kind, traced)


def _traced_back(
    dmixed: Tensor, h: Tensor, scores: Tensor, shift: Tensor, scale: Tensor | None, router: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    return _back(dmixed, h, scores, shift, scale, router, kind, traced)


def _traced_sums(g: Tensor, h: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    return _sums(g, h, shift, scale, traced)


def _traced_turned(u: Tensor, one: Tensor | None, other: Tensor | None) -> Tensor:
    return _turned(u, one, other, traced)


def _traced_added(c: Tensor, a: Tensor, b: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return _added(c, a, b, one, other, traced)


def _traced_finish(du: Tensor, dv: Tensor, g: Tensor, h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return _finish(du, dv, g, h, shift, scale, traced)


def _traced_mend(h: Tensor, x: Tensor, v: Tensor, scale: Tensor, shift: Tensor) -> None:
    _mend(h, x, v, scale, shift, traced)


_asking_in_graph = torch.library.custom_op("sarac::mend_asking", _asking, mutates_args=("h",))


@_asking_in_graph.register_fake
def _(h: Tensor, x: Tensor, v: Tensor, scale: Tensor, shift: Tensor) -> None:
    return None


def _fits(h: Tensor, router: Tensor, shift: Tensor, scale: Some) -> bool:
    narrow = h.dtype in (torch.float32, torch.bfloat16) and h.stride(1) == 1
    wide = router.dtype == shift.dtype == torch.float32 and (scale is None or scale.dtype == torch.float32)
    return narrow and wide and len(router) <= _SETS and runs(h)


_mixed_in_graph = operator("sarac::mixed", _traced_mixed)
_back_in_graph = operator("sarac::routed_back", _traced_back)
_sums_in_graph = operator("sarac::sums", _traced_sums)
_turned_in_graph = operator("sarac::turned", _traced_turned)
_added_in_graph = operator("sarac::added", _traced_added)
_finish_in_graph = operator("sarac::finish", _traced_finish, "du", "dv")
_mend_in_graph = operator("sarac::mend", _traced_mend, "h")
