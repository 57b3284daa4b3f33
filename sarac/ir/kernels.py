"""Triton kernels for what an adapted call does between its products; imported only where Triton is (sarac.ir.fused).

Projections lie as (k, tokens). A program of the routed ones takes a block of tokens: the scores need all directions before the
first gate is known, so h is read twice, the second time from the cache. Gates and their mixture of shifts stay in registers;
products with the few sets are those of float32 in three TF32 steps.
"""

from typing import Any

import triton
import triton.language as tl

SOFT, HARD, TOPK = 0, 1, 2


@triton.jit
def _gates(scores, sets: tl.constexpr, padded: tl.constexpr, kind: tl.constexpr, count: tl.constexpr):
    """The softmax of scores (padded, tokens) and the gates: itself, 1 at the first largest score, or its `count` largest."""
    lanes = tl.arange(0, padded)[:, None]
    scores = tl.where(lanes < sets, scores, float("-inf"))
    soft = tl.exp(scores - tl.max(scores, 0)[None, :])
    soft = soft / tl.sum(soft, 0)[None, :]
    if kind == 0:
        return soft, soft
    taken = tl.zeros_like(soft)
    left = scores
    for _ in tl.static_range(count):
        best = tl.max(left, 0)[None, :]
        first = tl.min(tl.where(left == best, lanes, padded), 0)[None, :]
        taken = tl.where(lanes == first, 1.0, taken)
        left = tl.where(lanes == first, float("-inf"), left)
    return soft, (taken if kind == 1 else taken * soft)


@triton.jit
def forward(
    h, router, shift, mixed, scores, tokens, rank, pitch,
    sets: tl.constexpr, padded: tl.constexpr, kind: tl.constexpr, count: tl.constexpr, width: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """mixed = h ⊙ (mᵀ g) and the scores R h, from h (rank, tokens), R and m (sets, rank)."""
    token = tl.program_id(0) * width + tl.arange(0, width)
    inside, lanes = (token < tokens)[None, :], tl.arange(0, padded)[:, None]
    found = tl.zeros((padded, width), tl.float32)
    for start in range(0, rank, rows):
        row = start + tl.arange(0, rows)
        few = (lanes < sets) & (row < rank)[None, :]
        x = tl.load(h + row.to(tl.int64)[:, None] * pitch + token[None, :], (row < rank)[:, None] & inside, 0.0).to(tl.float32)
        r = tl.load(router + lanes * rank + row[None, :], few, 0.0)
        found = tl.dot(r, x, found, input_precision="tf32x3")
    tl.store(scores + lanes.to(tl.int64) * tokens + token[None, :], found, inside & (lanes < sets))
    _, gates = _gates(found, sets, padded, kind, count)
    for start in range(0, rank, rows):
        row = start + tl.arange(0, rows)
        few = (lanes < sets) & (row < rank)[None, :]
        block = (row < rank)[:, None] & inside
        x = tl.load(h + row.to(tl.int64)[:, None] * pitch + token[None, :], block, 0.0).to(tl.float32)
        m = tl.load(shift + lanes * rank + row[None, :], few, 0.0)
        values = tl.dot(tl.trans(m), gates, input_precision="tf32x3")
        tl.store(mixed + row.to(tl.int64)[:, None] * tokens + token[None, :], (x * values).to(mixed.dtype.element_ty), block)


@triton.jit
def backward(
    dmixed, h, scores, router, shift, dh, shares, tokens, rank, pitch,
    sets: tl.constexpr, padded: tl.constexpr, kind: tl.constexpr, count: tl.constexpr, width: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """dh, and of every block of tokens its share of the gradients of m and R, (blocks, 2, sets, rank)."""
    token = tl.program_id(0) * width + tl.arange(0, width)
    inside, lanes = (token < tokens)[None, :], tl.arange(0, padded)[:, None]
    known = tl.load(scores + lanes.to(tl.int64) * tokens + token[None, :], inside & (lanes < sets), 0.0)
    soft, gates = _gates(known, sets, padded, kind, count)
    dgates = tl.zeros((padded, width), tl.float32)
    for start in range(0, rank, rows):
        row = start + tl.arange(0, rows)
        few = (lanes < sets) & (row < rank)[None, :]
        block = (row < rank)[:, None] & inside
        x = tl.load(h + row.to(tl.int64)[:, None] * pitch + token[None, :], block, 0.0).to(tl.float32)
        x *= tl.load(dmixed + row.to(tl.int64)[:, None] * tokens + token[None, :], block, 0.0).to(tl.float32)
        m = tl.load(shift + lanes * rank + row[None, :], few, 0.0)
        dgates = tl.dot(m, x, dgates, input_precision="tf32x3")
    if kind == 2:
        dgates = tl.where(gates != 0.0, dgates, 0.0)
    dscores = soft * (dgates - tl.sum(soft * dgates, 0)[None, :])
    dscores = tl.where(inside, dscores, 0.0)
    share = shares + tl.program_id(0).to(tl.int64) * 2 * sets * rank
    for start in range(0, rank, rows):
        row = start + tl.arange(0, rows)
        few = (lanes < sets) & (row < rank)[None, :]
        block = (row < rank)[:, None] & inside
        place = row.to(tl.int64)[:, None] * tokens + token[None, :]
        x = tl.load(h + row.to(tl.int64)[:, None] * pitch + token[None, :], block, 0.0).to(tl.float32)
        dx = tl.load(dmixed + place, block, 0.0).to(tl.float32)
        m = tl.load(shift + lanes * rank + row[None, :], few, 0.0)
        r = tl.load(router + lanes * rank + row[None, :], few, 0.0)
        values = tl.dot(tl.trans(m), gates, input_precision="tf32x3")
        through = tl.dot(tl.trans(r), dscores, input_precision="tf32x3")
        tl.store(dh + place, (dx * values + through).to(dh.dtype.element_ty), block)
        out = share + lanes * rank + row[None, :]
        tl.store(out, tl.dot(gates, tl.trans(x * dx), input_precision="tf32x3"), few)
        tl.store(out + sets * rank, tl.dot(dscores, tl.trans(x), input_precision="tf32x3"), few)


@triton.jit
def turned(
    u, values, out, height, rank, pitch, scaled: tl.constexpr, side: tl.constexpr
):  # fmt: skip
    """diag(values) Uᵀ (rank, height) from U (height, rank), a square at a time: what is read and what is written lie together."""
    row = (tl.program_id(0) * side + tl.arange(0, side)).to(tl.int64)
    column = (tl.program_id(1) * side + tl.arange(0, side)).to(tl.int64)
    block = tl.load(u + row[:, None] * pitch + column[None, :], (row < height)[:, None] & (column < rank)[None, :], 0.0)
    if scaled:
        block = block.to(tl.float32) * tl.load(values + column, column < rank, 0.0).to(tl.float32)[None, :]
    place = out + column[:, None] * height + row[None, :]
    tl.store(place, tl.trans(block).to(out.dtype.element_ty), (column < rank)[:, None] & (row < height)[None, :])


@triton.jit
def _long(x, v, row, token, tokens, inner, x0, x1, v0, v1, rows: tl.constexpr, width: tl.constexpr):
    """V x in one row of a block of tokens, from x (tokens, inner) and V (rank, inner)."""
    total = tl.zeros((rows,), tl.float32)
    for start in range(0, inner, width):
        column = start + tl.arange(0, width)
        block = (token < tokens)[:, None] & (column < inner)[None, :]
        seen = tl.load(x + token[:, None] * x0 + column[None, :] * x1, block, 0.0).to(tl.float32)
        factor = tl.load(v + row * v0 + column * v1, column < inner, 0.0).to(tl.float32)
        total += tl.sum(seen * factor[None, :], 1)
    return total


@triton.jit
def _short(g, h, tokens, start, length: tl.constexpr, width: tl.constexpr):
    """Σ g ⊙ h from a token on."""
    total = tl.zeros((width,), tl.float32)
    for further in range(0, length, width):
        token = start + further + tl.arange(0, width)
        one = tl.load(g + token, token < tokens, 0.0).to(tl.float32)
        total += one * tl.load(h + token, token < tokens, 0.0).to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def sums(
    g, h, shift, x, v, scale, out, tokens, gpitch, hpitch, x0, x1, v0, v1, inner, near,
    divide: tl.constexpr, turn: tl.constexpr, length: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Σ g ⊙ h of one row over a piece of `length` tokens, (pieces, rank) in float32, over 1 + δ where that is not near zero.

    Where it is, g is s ⊙ V x: the rare long way, in one program for the row.
    """
    row, start = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64) * length
    place = out + tl.program_id(1) * tl.num_programs(0) + row
    if divide:
        c = 1.0 + tl.load(shift + row)
        if tl.abs(c) >= near:
            tl.store(place, _short(g + row * gpitch, h + row * hpitch, tokens, start, length, width) / c)
        elif turn:
            found = tl.zeros((64,), tl.float32)
            for further in range(0, length, 64):
                token = start + further + tl.arange(0, 64)
                part = _long(x, v, row, token, tokens, inner, x0, x1, v0, v1, 64, 64)
                found += part * tl.load(h + row * hpitch + token, token < tokens, 0.0).to(tl.float32)
            tl.store(place, tl.sum(found, 0) * tl.load(scale + row))
        else:
            tl.store(place, _short(g + row * gpitch, h + row * hpitch, tokens, start, length, width))
    else:
        tl.store(place, _short(g + row * gpitch, h + row * hpitch, tokens, start, length, width))


@triton.jit
def mend(
    h, x, v, scale, shift, tokens, inner, rank, pitch, x0, x1, v0, v1, near,
    length: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Rows of h (rank, tokens) where 1 + δ is near zero become s ⊙ V x, of a block of tokens; most often there are none."""
    found = tl.zeros((length,), tl.int32)
    for start in range(0, rank, length):
        row = start + tl.arange(0, length)
        found += (tl.abs(1.0 + tl.load(shift + row, row < rank, 0.0)) < near).to(tl.int32)
    if tl.sum(found, 0) > 0:
        first = tl.program_id(0).to(tl.int64) * rows
        token = first + tl.arange(0, rows)
        for row in range(rank):
            if tl.abs(1.0 + tl.load(shift + row)) < near:
                total = _long(x, v, row, token, tokens, inner, x0, x1, v0, v1, rows, width)
                place = h + (first - first + row) * pitch + token  # in 64 bits
                tl.store(place, (total * tl.load(scale + row)).to(h.dtype.element_ty), token < tokens)


def kind_of(router: str) -> tuple[int, int]:
    """A router as the kernels take it, with how many sets it picks; (-1, 0) for one that they do not have."""
    name, _, count = router.partition(":")
    found: Any = {"soft": (SOFT, 0), "hard": (HARD, 1)}.get(name)
    return found or ((TOPK, int(count)) if name == "topk" else (-1, 0))
