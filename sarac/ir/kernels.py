"""Triton kernels for what a routed call does between its products; imported only where Triton is (sarac.ir.fused).

A program takes a block of tokens. The scores need all of a row of h before the first gate is known, so h is read twice: the
second time from the cache. Gates, their mixture of shifts and the scaling of h stay in registers; of float32 only the scores
are written.
"""

from typing import Any

import triton
import triton.language as tl

SOFT, HARD, TOPK = 0, 1, 2


@triton.jit
def _gates(scores, sets: tl.constexpr, padded: tl.constexpr, kind: tl.constexpr, count: tl.constexpr):
    """The softmax of scores (rows, padded) and the gates: itself, 1 at the first largest score, or its `count` largest."""
    lanes = tl.arange(0, padded)[None, :]
    scores = tl.where(lanes < sets, scores, float("-inf"))
    top = tl.max(scores, 1)[:, None]
    soft = tl.exp(scores - top)
    soft = soft / tl.sum(soft, 1)[:, None]
    if kind == 0:
        return soft, soft
    taken = tl.zeros_like(soft)
    left = scores
    for _ in tl.static_range(count):
        best = tl.max(left, 1)[:, None]
        first = tl.min(tl.where(left == best, lanes, padded), 1)[:, None]
        taken = tl.where(lanes == first, 1.0, taken)
        left = tl.where(lanes == first, float("-inf"), left)
    return soft, (taken if kind == 1 else taken * soft)


@triton.jit
def _column(matrix, lane: tl.constexpr, padded: tl.constexpr):
    """Column `lane` of (rows, padded)."""
    return tl.sum(tl.where(tl.arange(0, padded)[None, :] == lane, matrix, 0.0), 1)


@triton.jit
def forward(
    h, router, shift, mixed, scores, tokens, rank, pitch,
    sets: tl.constexpr, padded: tl.constexpr, kind: tl.constexpr, count: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """mixed = h ⊙ (g m) and the scores R h, from h (tokens, rank), R and m (sets, rank)."""
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    inside = row < tokens
    lanes = tl.arange(0, padded)[None, :]
    found = tl.zeros((rows, padded), tl.float32)
    for start in range(0, rank, width):
        column = start + tl.arange(0, width)
        block = inside[:, None] & (column < rank)[None, :]
        x = tl.load(h + row.to(tl.int64)[:, None] * pitch + column[None, :], block, 0.0).to(tl.float32)
        for one in tl.static_range(sets):
            r = tl.load(router + one * rank + column, column < rank, 0.0)
            found += tl.where(lanes == one, tl.sum(x * r[None, :], 1)[:, None], 0.0)
    tl.store(scores + row.to(tl.int64)[:, None] * sets + lanes, found, inside[:, None] & (lanes < sets))
    _, gates = _gates(found, sets, padded, kind, count)
    for start in range(0, rank, width):
        column = start + tl.arange(0, width)
        block = inside[:, None] & (column < rank)[None, :]
        place = row.to(tl.int64)[:, None] * rank + column[None, :]
        x = tl.load(h + row.to(tl.int64)[:, None] * pitch + column[None, :], block, 0.0).to(tl.float32)
        values = tl.zeros((rows, width), tl.float32)
        for one in tl.static_range(sets):
            m = tl.load(shift + one * rank + column, column < rank, 0.0)
            values += _column(gates, one, padded)[:, None] * m[None, :]
        tl.store(mixed + place, (x * values).to(mixed.dtype.element_ty), block)


@triton.jit
def backward(
    dmixed, h, scores, router, shift, dh, dshift, drouter, tokens, rank, pitch,
    sets: tl.constexpr, padded: tl.constexpr, kind: tl.constexpr, count: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """dh, and of every block of tokens its share of the gradients of m and R, (blocks, sets, rank) each."""
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    inside, lanes = row < tokens, tl.arange(0, padded)[None, :]
    known = tl.load(scores + row.to(tl.int64)[:, None] * sets + lanes, inside[:, None] & (lanes < sets), 0.0)
    soft, gates = _gates(known, sets, padded, kind, count)
    dgates = tl.zeros((rows, padded), tl.float32)
    for start in range(0, rank, width):
        column = start + tl.arange(0, width)
        block = inside[:, None] & (column < rank)[None, :]
        place = row.to(tl.int64)[:, None] * rank + column[None, :]
        x = tl.load(h + row.to(tl.int64)[:, None] * pitch + column[None, :], block, 0.0).to(tl.float32)
        x *= tl.load(dmixed + place, block, 0.0).to(tl.float32)
        for one in tl.static_range(sets):
            m = tl.load(shift + one * rank + column, column < rank, 0.0)
            dgates += tl.where(lanes == one, tl.sum(x * m[None, :], 1)[:, None], 0.0)
    if kind == 2:
        dgates = tl.where(gates != 0.0, dgates, 0.0)
    dscores = soft * (dgates - tl.sum(soft * dgates, 1)[:, None])
    share = tl.program_id(0).to(tl.int64) * sets * rank
    for start in range(0, rank, width):
        column = start + tl.arange(0, width)
        block = inside[:, None] & (column < rank)[None, :]
        place = row.to(tl.int64)[:, None] * rank + column[None, :]
        x = tl.load(h + row.to(tl.int64)[:, None] * pitch + column[None, :], block, 0.0).to(tl.float32)
        dx = tl.load(dmixed + place, block, 0.0).to(tl.float32)
        through = tl.zeros((rows, width), tl.float32)
        values = tl.zeros((rows, width), tl.float32)
        for one in tl.static_range(sets):
            m = tl.load(shift + one * rank + column, column < rank, 0.0)
            r = tl.load(router + one * rank + column, column < rank, 0.0)
            g, ds = _column(gates, one, padded)[:, None], _column(dscores, one, padded)[:, None]
            values += g * m[None, :]
            through += ds * r[None, :]
            tl.store(dshift + share + one * rank + column, tl.sum(g * x * dx, 0), column < rank)
            tl.store(drouter + share + one * rank + column, tl.sum(ds * x, 0), column < rank)
        tl.store(dh + place, (dx * values + through).to(dh.dtype.element_ty), block)


@triton.jit
def sums(
    g, h, out, tokens, rank, pitch, length: tl.constexpr, rows: tl.constexpr, width: tl.constexpr
):  # fmt: skip
    """Σ g ⊙ h over pieces of `length` tokens, (pieces, rank), in float32."""
    column = tl.program_id(1) * width + tl.arange(0, width)
    total = tl.zeros((width,), tl.float32)
    for start in range(0, length, rows):
        row = tl.program_id(0).to(tl.int64) * length + start + tl.arange(0, rows)
        block = (row < tokens)[:, None] & (column < rank)[None, :]
        place = row[:, None] * rank + column[None, :]
        x = tl.load(h + row[:, None] * pitch + column[None, :], block, 0.0).to(tl.float32)
        total += tl.sum(x * tl.load(g + place, block, 0.0).to(tl.float32), 0)
    tl.store(out + tl.program_id(0) * rank + column, total, column < rank)


def kind_of(router: str) -> tuple[int, int]:
    """A router as the kernels take it, with how many sets it picks; (-1, 0) for one that they do not have."""
    name, _, count = router.partition(":")
    found: Any = {"soft": (SOFT, 0), "hard": (HARD, 1)}.get(name)
    return found or ((TOPK, int(count)) if name == "topk" else (-1, 0))
