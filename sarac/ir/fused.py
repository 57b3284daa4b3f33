"""One kernel for a chain of elementwise steps where Triton runs; None elsewhere, where torch's own operations serve."""

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

_ROWS, _WIDTH, _LENGTH = 32, 128, 512  # tokens and columns of a block, tokens of a piece of a sum
_SETS = 16  # above it torch's own products are the better way

Mixed = tuple[Tensor, Tensor]  # h ⊙ (g m), scores
Back = tuple[Tensor, Tensor, Tensor]  # the gradients of h, m and R


def mixed(h: Tensor, router: Tensor, inward: Tensor | None, shift: Tensor, kind: str) -> Mixed | None:
    """h ⊙ (g m) in h's dtype and the scores (tokens, sets), from h (tokens, k), R and m (sets, k)."""
    kernels = _kernels(h) if inward is None and _fits(h, router, shift) else None
    if kernels is None:
        return None
    (tokens, rank), sets = h.shape, len(router)
    done, scores = h.new_empty(h.shape), torch.empty(tokens, sets, device=h.device, dtype=torch.float32)
    code, count = kernels.kind_of(kind)
    how = {"sets": sets, "padded": _padded(sets), "kind": code, "count": count, "rows": _ROWS, "width": _WIDTH}
    kernels.forward[(-(-tokens // _ROWS),)](
        h, router.contiguous(), shift.contiguous(), done, scores, tokens, rank, h.stride(0), **how
    )
    return done, scores


def back(
    dmixed: Tensor, h: Tensor, scores: Tensor, shift: Tensor, router: Tensor, inward: Tensor | None, kind: str
) -> Back | None:
    """The gradients of h (tokens, k), m and R (sets, k), from that of h ⊙ (g m)."""
    fits = inward is None and dmixed.dtype == h.dtype and not torch.is_grad_enabled() and _fits(h, router, shift)
    kernels = _kernels(h) if fits else None
    if kernels is None:
        return None
    (tokens, rank), sets, blocks = h.shape, len(router), -(-len(h) // _ROWS)
    dh, shares = h.new_empty(h.shape), torch.empty(2, blocks, sets, rank, device=h.device, dtype=torch.float32)
    code, count = kernels.kind_of(kind)
    how = {"sets": sets, "padded": _padded(sets), "kind": code, "count": count, "rows": _ROWS, "width": _WIDTH}
    given = (dmixed.contiguous(), h, scores, router.contiguous(), shift.contiguous())
    kernels.backward[(blocks,)](*given, dh, shares[0], shares[1], tokens, rank, h.stride(0), **how)
    dshift, drouter = shares.sum(1)
    return dh, dshift, drouter


def sums(g: Tensor, h: Tensor) -> Tensor | None:
    """Σ g ⊙ h over the rows (tokens, k) of both, in float32."""
    fits = g.dtype == h.dtype == torch.bfloat16 and not torch.is_grad_enabled() and g.is_contiguous() and h.stride(1) == 1
    kernels = _kernels(h) if fits else None
    if kernels is None:
        return None
    tokens, rank = h.shape
    pieces = -(-tokens // _LENGTH)
    out = torch.empty(pieces, rank, device=h.device, dtype=torch.float32)
    kernels.sums[(pieces, -(-rank // _WIDTH))](g, h, out, tokens, rank, h.stride(0), length=_LENGTH, rows=_ROWS, width=_WIDTH)
    return out.sum(0)


def _fits(h: Tensor, router: Tensor, shift: Tensor) -> bool:
    narrow = h.dtype in (torch.float32, torch.bfloat16) and h.stride(1) == 1
    return narrow and router.dtype == shift.dtype == torch.float32 and len(router) <= _SETS


def _kernels(h: Tensor) -> Any:
    """The kernels where they run on h's device; a compiler makes its own of torch's operations."""
    if torch.compiler.is_compiling() or not (h.is_cuda or _interpreted()):
        return None
    return _module()


@functools.cache
def _module() -> Any:
    if importlib.util.find_spec("triton") is None:
        return None
    from sarac.ir import kernels

    return kernels


@functools.cache
def _interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU, as tests ask for."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _padded(sets: int) -> int:
    return max(2, 1 << (sets - 1).bit_length())
