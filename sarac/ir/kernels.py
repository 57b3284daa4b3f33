"""Triton kernels for what an adapted call does between its products; imported only where Triton is (sarac.ir.fused).

Projections lie as (k, tokens). A program of the routed ones takes a block of tokens: the scores need all directions before the
first gate is known, so h is read twice, the second time from the cache. Gates and their mixture of shifts stay in registers.
Products with the few sets are those of float32 where h is; where it is bfloat16, of 8 bits, they are taken to 16, but the scores
to all 24.
"""

import os
from typing import Any

import triton
import triton.language as tl

SOFT, HARD, TOPK = 0, 1, 2
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
STAGES = tl.constexpr(3)  # of the routed kernels' loops: the next blocks are read while one is worked on


@triton.jit
def _wide(x):
    """x as a product takes it: the interpreter multiplies bfloat16's bits."""
    return x.to(tl.float32) if INTERPRETED else x


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
def _halves(x):
    """x in float32 as the sum of two bfloat16, to 16 bits."""
    high = x.to(tl.bfloat16)
    return _wide(high), _wide((x - high.to(tl.float32)).to(tl.bfloat16))


@triton.jit
def _product(a, b, total, narrow: tl.constexpr):
    """total + a b of float32: in three TF32 steps, or to 16 bits in three of bfloat16, which are twice as fast."""
    if narrow:
        a1, a2 = _halves(a)
        b1, b2 = _halves(b)
        return tl.dot(a1, b1, tl.dot(a1, b2, tl.dot(a2, b1, total)))
    return tl.dot(a, b, total, input_precision="tf32x3")


@triton.jit
def _shifts(shift, scale, row, rank, sets: tl.constexpr, padded: tl.constexpr, scaled: tl.constexpr):
    """m of these directions (padded, rows): the shifts of the sets, times the scale where that is asked for."""
    lanes = tl.arange(0, padded)[:, None]
    found = tl.load(shift + lanes * rank + row[None, :], (lanes < sets) & (row < rank)[None, :], 0.0)
    return found * tl.load(scale + row, row < rank, 0.0)[None, :] if scaled else found


@triton.jit
def forward(
    h, router, shift, scale, mixed, scores, tokens, rank, pitch, scaled: tl.constexpr,
    sets: tl.constexpr, padded: tl.constexpr, kind: tl.constexpr, count: tl.constexpr, width: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """mixed = h ⊙ (mᵀ g) and the scores R h, from h (rank, tokens), R and the shifts (sets, rank) that m is of (`_shifts`)."""
    narrow: tl.constexpr = h.dtype.element_ty == tl.bfloat16
    token = tl.program_id(0) * width + tl.arange(0, width)
    inside, lanes = (token < tokens)[None, :], tl.arange(0, padded)[:, None]
    found = tl.zeros((padded, width), tl.float32)
    for start in tl.range(0, rank, rows, num_stages=STAGES):
        row = start + tl.arange(0, rows)
        x = tl.load(h + row.to(tl.int64)[:, None] * pitch + token[None, :], (row < rank)[:, None] & inside, 0.0)
        r = tl.load(router + lanes * rank + row[None, :], (lanes < sets) & (row < rank)[None, :], 0.0)
        if narrow:  # all bits of R: scores decide which sets are picked
            r1, r2 = _halves(r)
            r3 = _wide((r - r1.to(tl.float32) - r2.to(tl.float32)).to(tl.bfloat16))
            found = tl.dot(r1, _wide(x), tl.dot(r2, _wide(x), tl.dot(r3, _wide(x), found)))
        else:
            found = _product(r, x, found, narrow)
    tl.store(scores + lanes.to(tl.int64) * tokens + token[None, :], found, inside & (lanes < sets))
    _, gates = _gates(found, sets, padded, kind, count)
    for start in tl.range(0, rank, rows, num_stages=STAGES):
        row = start + tl.arange(0, rows)
        block = (row < rank)[:, None] & inside
        x = tl.load(h + row.to(tl.int64)[:, None] * pitch + token[None, :], block, 0.0).to(tl.float32)
        m = tl.trans(_shifts(shift, scale, row, rank, sets, padded, scaled))
        x *= _product(m, gates, tl.zeros((rows, width), tl.float32), narrow)
        tl.store(mixed + row.to(tl.int64)[:, None] * tokens + token[None, :], x.to(mixed.dtype.element_ty), block)


@triton.jit
def backward(
    dmixed, h, scores, router, shift, scale, dh, shares, tokens, rank, pitch, scaled: tl.constexpr,
    sets: tl.constexpr, padded: tl.constexpr, kind: tl.constexpr, count: tl.constexpr, width: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """dh, and of every block of tokens its share of the gradients of the shifts and R, (blocks, 2, sets, rank)."""
    narrow: tl.constexpr = h.dtype.element_ty == tl.bfloat16
    token = tl.program_id(0) * width + tl.arange(0, width)
    inside, lanes = (token < tokens)[None, :], tl.arange(0, padded)[:, None]
    known = tl.load(scores + lanes.to(tl.int64) * tokens + token[None, :], inside & (lanes < sets), 0.0)
    soft, gates = _gates(known, sets, padded, kind, count)
    dgates = tl.zeros((padded, width), tl.float32)
    for start in tl.range(0, rank, rows, num_stages=STAGES):
        row = start + tl.arange(0, rows)
        block = (row < rank)[:, None] & inside
        x = tl.load(h + row.to(tl.int64)[:, None] * pitch + token[None, :], block, 0.0).to(tl.float32)
        x *= tl.load(dmixed + row.to(tl.int64)[:, None] * tokens + token[None, :], block, 0.0).to(tl.float32)
        dgates = _product(_shifts(shift, scale, row, rank, sets, padded, scaled), x, dgates, narrow)
    if kind == 2:
        dgates = tl.where(gates != 0.0, dgates, 0.0)
    dscores = soft * (dgates - tl.sum(soft * dgates, 0)[None, :])
    dscores = tl.where(inside, dscores, 0.0)
    share = shares + tl.program_id(0).to(tl.int64) * 2 * sets * rank
    for start in tl.range(0, rank, rows, num_stages=STAGES):
        row = start + tl.arange(0, rows)
        few = (lanes < sets) & (row < rank)[None, :]
        block = (row < rank)[:, None] & inside
        place = row.to(tl.int64)[:, None] * tokens + token[None, :]
        x = tl.load(h + row.to(tl.int64)[:, None] * pitch + token[None, :], block, 0.0).to(tl.float32)
        dx = tl.load(dmixed + place, block, 0.0).to(tl.float32)
        m = tl.trans(_shifts(shift, scale, row, rank, sets, padded, scaled))
        r = tl.trans(tl.load(router + lanes * rank + row[None, :], few, 0.0))
        none = tl.zeros((rows, width), tl.float32)
        out = dx * _product(m, gates, none, narrow) + _product(r, dscores, none, narrow)
        tl.store(dh + place, out.to(dh.dtype.element_ty), block)
        none = tl.zeros((padded, rows), tl.float32)
        dm = _product(gates, tl.trans(x * dx), none, narrow)
        if scaled:
            dm *= tl.load(scale + row, row < rank, 0.0)[None, :]
        tl.store(share + lanes * rank + row[None, :], dm, few)
        tl.store(share + (lanes + sets) * rank + row[None, :], _product(dscores, tl.trans(x), none, narrow), few)


@triton.jit
def turned(u, one, other, out, height, rank, pitch, scaled: tl.constexpr, side: tl.constexpr):
    """diag(values) Uᵀ (rank, height) from U (height, rank), a square at a time: what is read and what is written lie together.

    `scaled`: by no values, by `one`, or by two's product.
    """
    row = (tl.program_id(0) * side + tl.arange(0, side)).to(tl.int64)
    column = (tl.program_id(1) * side + tl.arange(0, side)).to(tl.int64)
    block = tl.load(u + row[:, None] * pitch + column[None, :], (row < height)[:, None] & (column < rank)[None, :], 0.0)
    if scaled > 0:
        values = tl.load(one + column, column < rank, 0.0).to(tl.float32)
        if scaled > 1:
            values *= tl.load(other + column, column < rank, 0.0).to(tl.float32)
        block = block.to(tl.float32) * values[None, :]
    place = out + column[:, None] * height + row[None, :]
    tl.store(place, tl.trans(block).to(out.dtype.element_ty), (column < rank)[:, None] & (row < height)[None, :])


@triton.jit
def added(
    c, a, b, one, other, out, height, width, inner, c0, c1, a0, a1, b0, b1, o0, o1,
    m: tl.constexpr, n: tl.constexpr, k: tl.constexpr, group: tl.constexpr,
):  # fmt: skip
    """C + A diag(one ⊙ other) B of C (height, width), A (height, inner), B (inner, width); A times values is rounded first."""
    down, across = tl.cdiv(height, m), tl.cdiv(width, n)
    first = tl.program_id(0) // (group * across) * group  # neighbours share rows of A and columns of B, which the cache has then
    rows = tl.minimum(down - first, group)
    place = tl.program_id(0) % (group * across)
    row = ((first + place % rows) * m + tl.arange(0, m)).to(tl.int64)[:, None]
    column = (place // rows * n + tl.arange(0, n)).to(tl.int64)[None, :]
    inside = (row < height) & (column < width)
    total = tl.load(c + row * c0 + column * c1, inside, 0.0).to(tl.float32)
    for start in range(0, inner, k):
        along = start + tl.arange(0, k)
        left = tl.load(a + row * a0 + along[None, :] * a1, (row < height) & (along < inner)[None, :], 0.0)
        right = tl.load(b + along[:, None] * b0 + column * b1, (along < inner)[:, None] & (column < width), 0.0)
        value = tl.load(one + along, along < inner, 0.0).to(tl.float32)
        value *= tl.load(other + along, along < inner, 0.0).to(tl.float32)
        left = (left.to(tl.float32) * value[None, :]).to(left.dtype)
        total = tl.dot(_wide(left), _wide(right), total, input_precision="ieee")
    tl.store(out + row * o0 + column * o1, total.to(out.dtype.element_ty), inside)


@triton.jit
def sums(
    g, h, shift, scale, out, tokens, gpitch, hpitch, near,
    divide: tl.constexpr, scaled: tl.constexpr, length: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Σ g ⊙ h of one row over a piece of `length` tokens, (pieces, rank) in float32, over 1 + δ where that is not near zero.

    Times the scale where that is asked for.
    """
    row, start = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64) * length
    total = tl.zeros((width,), tl.float32)
    for further in range(0, length, width):
        token = start + further + tl.arange(0, width)
        one = tl.load(g + row * gpitch + token, token < tokens, 0.0).to(tl.float32)
        total += one * tl.load(h + row * hpitch + token, token < tokens, 0.0).to(tl.float32)
    found = tl.sum(total, 0)
    if divide:
        c = 1.0 + tl.load(shift + row)
        found = tl.where(tl.abs(c) < near, found, found / c)
    if scaled:
        found *= tl.load(scale + row).to(tl.float32)
    tl.store(out + tl.program_id(1) * tl.num_programs(0) + row, found)


@triton.jit
def finish(
    du, dv, g, h, shift, scale, dshift, up, down, tokens, rank, inner, gpitch, hpitch, width: tl.constexpr
):  # fmt: skip
    """dδ = s Σ g ⊙ h over tokens, in float32; δ s times dU (up numbers, rows of rank) and dV (rank, inner) in place."""
    program = tl.program_id(0).to(tl.int64)
    if program < rank:
        total = tl.zeros((width,), tl.float32)
        for start in range(0, tokens, width):
            token = start + tl.arange(0, width)
            one = tl.load(g + program * gpitch + token, token < tokens, 0.0).to(tl.float32)
            total += one * tl.load(h + program * hpitch + token, token < tokens, 0.0).to(tl.float32)
        tl.store(dshift + program, tl.sum(total, 0) * tl.load(scale + program).to(tl.float32))
    elif program < rank + tl.cdiv(up, width):
        place = (program - rank) * width + tl.arange(0, width)
        value = tl.load(shift + place % rank).to(tl.float32) * tl.load(scale + place % rank).to(tl.float32)
        value *= tl.load(du + place, place < up, 0.0).to(tl.float32)
        tl.store(du + place, value.to(du.dtype.element_ty), place < up)
    else:
        place = (program - rank - tl.cdiv(up, width)) * width + tl.arange(0, width)
        row = tl.minimum(place // inner, rank - 1)
        value = tl.load(shift + row).to(tl.float32) * tl.load(scale + row).to(tl.float32)
        value *= tl.load(dv + place, place < down, 0.0).to(tl.float32)
        tl.store(dv + place, value.to(dv.dtype.element_ty), place < down)


@triton.jit
def mend(
    h, x, v, scale, shift, tokens, inner, rank, pitch, x0, x1, v0, v1, near,
    length: tl.constexpr, rows: tl.constexpr, width: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """Rows of h (rank, tokens) where 1 + δ is near zero become s ⊙ V x, of a block of tokens; most often there are none."""
    found = tl.zeros((length,), tl.int32)
    for start in range(0, rank, length):
        row = start + tl.arange(0, length)
        found += (tl.abs(1.0 + tl.load(shift + row, row < rank, 0.0)) < near).to(tl.int32)
    if tl.sum(found, 0) > 0:
        token = (tl.program_id(0) * width + tl.arange(0, width)).to(tl.int64)
        for start in range(0, rank, rows):
            row = (start + tl.arange(0, rows)).to(tl.int64)
            wanted = tl.abs(1.0 + tl.load(shift + row, row < rank, 0.0)) < near
            if tl.sum(wanted.to(tl.int32), 0) > 0:
                total = tl.zeros((rows, width), tl.float32)
                for begin in range(0, inner, depth):
                    along = (begin + tl.arange(0, depth)).to(tl.int64)
                    here = (along < inner)[None, :]
                    left = tl.load(v + row[:, None] * v0 + along[None, :] * v1, (row < rank)[:, None] & here, 0.0)
                    right = tl.load(x + token[:, None] * x0 + along[None, :] * x1, (token < tokens)[:, None] & here, 0.0)
                    total = tl.dot(_wide(left), tl.trans(_wide(right)), total, input_precision="ieee")
                total *= tl.load(scale + row, row < rank, 0.0).to(tl.float32)[:, None]
                place = h + row[:, None] * pitch + token[None, :]
                tl.store(place, total.to(h.dtype.element_ty), wanted[:, None] & (token < tokens)[None, :])


def kind_of(router: str) -> tuple[int, int]:
    """A router as the kernels take it, with how many sets it picks; (-1, 0) for one that they do not have."""
    name, _, count = router.partition(":")
    found: Any = {"soft": (SOFT, 0), "hard": (HARD, 1)}.get(name)
    return found or ((TOPK, int(count)) if name == "topk" else (-1, 0))
