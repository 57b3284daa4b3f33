"""Triton's kernels against torch's own operations: on a GPU, or where TRITON_INTERPRET=1 lets them run on the CPU."""

import importlib.util
import os
import types

import pytest
import torch
from torch import Tensor
from zoo import close, differ, same

from sarac.ir import byhand, check, fused, launch, routes
from sarac.ir.byhand import sums
from sarac.ir.fused import NEAR

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = importlib.util.find_spec("triton") is not None and (DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
needs_triton = pytest.mark.skipif(not RUNS, reason="no GPU, and Triton does not interpret here (TRITON_INTERPRET=1)")
SIZES = [(70, 150, 5), (33, 20, 3), (64, 128, 4), (5, 7, 2), (1, 1, 1), (1030, 614, 16)]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_THERE", False)


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize("kind", ["soft", "hard", "topk:1", "topk:2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("tokens", "rank", "sets"), SIZES)
def test_routing_is_torchs(
    tokens: int, rank: int, sets: int, scaled: bool, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "topk:2" and sets < 2:
        pytest.skip("there is but one set")
    h, dmixed = random(rank, tokens + 3, dtype=dtype)[:, 1 : tokens + 1], random(rank, tokens, dtype=dtype).flip(0)
    router, shift = random(sets, rank) / rank**0.5, random(sets, rank).flip(1)
    scale = random(rank).abs() if scaled else None
    found = fused.mixed(h, router, shift, scale, kind)
    assert found is not None
    back = fused.back(dmixed, h, found[1], shift, scale, router, kind)
    assert back is not None
    without_triton(monkeypatch)
    expected = routes._mixed(h, router, shift, scale, kind)
    assert fused.mixed(h, router, shift, scale, kind) is None
    done = routes._back(dmixed, h, expected[1], shift, scale, router, kind)
    close(found[1], expected[1])
    limit = 1e-5 if dtype == torch.float32 else 2**-14  # of 16 bits beside a bfloat16 h; the interpreter cuts all of them
    for one, other in zip((found[0], *back[:2]), (expected[0], done.h, done.shift), strict=True):
        assert one.dtype == other.dtype
        error = float((one.double() - other.double()).norm()) / max(float(other.double().norm()), 1e-3)
        assert error < (limit if one.dtype == torch.float32 else check.gate(dtype) / 5), error
    assert float((back[2] - done.router).norm()) <= limit * max(float(done.router.norm()), 1.0)


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize(("tokens", "rank"), [(1, 1), (513, 130), (2048, 614), (9000, 3)])
def test_sums_are_in_float32(tokens: int, rank: int) -> None:
    g, h = random(rank, tokens, dtype=torch.bfloat16), random(rank, tokens + 2, dtype=torch.bfloat16)[:, 1 : tokens + 1]
    found = fused.sums(g, h)
    assert found is not None
    assert found.dtype == torch.float32
    exact = (g.double() * h.double()).sum(1)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-3)
    shift = torch.linspace(-2, 2, rank, device=DEVICE)
    divided = fused.sums(g, h, shift)
    assert divided is not None
    c = 1 + shift.double()
    expected = exact / torch.where(c.abs() < NEAR, 1.0, c)
    torch.testing.assert_close(divided.double(), expected, rtol=1e-5, atol=4e-3)
    scale = random(rank, 3)[:, 1]
    both, scaled = fused.sums(g, h, shift, scale), fused.sums(g, h, None, scale)
    assert both is not None
    assert scaled is not None
    torch.testing.assert_close(both.double() / scale.double(), expected, rtol=1e-5, atol=4e-3)
    torch.testing.assert_close(scaled.double() / scale.double(), exact, rtol=1e-5, atol=1e-3)
    differ(both, scaled)


@torch.no_grad()
def test_sums_without_triton_are_in_float32_too() -> None:
    g, h = random(20, 9000, dtype=torch.bfloat16).cpu(), random(20, 9000, dtype=torch.bfloat16).flip(1).cpu()
    exact = (g.double() * h.double()).sum(1)
    torch.testing.assert_close(sums(g, h).double(), exact, rtol=1e-5, atol=1e-3)
    assert float(((g * h).sum(1, dtype=torch.float32).double() - exact).abs().max()) > 1e-2  # what rounding first would lose


@torch.no_grad()
@pytest.mark.parametrize("triton", [pytest.param(True, marks=needs_triton), False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_near_zero_are_mended_and_no_other(dtype: torch.dtype, triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not triton:
        without_triton(monkeypatch)
    h, x, u = random(7, 130, dtype=dtype), random(130, 90, dtype=dtype), random(90, 7, dtype=dtype)
    scale, before = random(7).abs(), h.clone()
    fused.mend(h, x, u.mT, scale, torch.tensor([0.0, -1.5, -0.7, 1.0, -3.0, 0.2, -1.26], device=DEVICE))
    same(h, before)
    fused.mend(h, x, u.mT, scale, torch.tensor([0.0, -1.0, -0.8, 1.0, -1.2, 0.2, -1.3], device=DEVICE))
    for row in range(7):
        if row in (1, 2, 4):
            exact = scale[row].double() * (x.double() @ u[:, row].double())
            assert float((h[row].double() - exact).norm() / exact.norm()) < check.gate(dtype) / 5
            differ(h[row], before[row])
        else:
            same(h[row], before[row])


def test_near_is_near_everywhere() -> None:
    c = torch.tensor([NEAR, -NEAR, 0.999 * NEAR, -0.999 * NEAR, 0.0, 1.0])
    assert byhand.near(c).tolist() == (c.abs() < NEAR).tolist() == [False, False, True, True, True, False]


def test_what_kernels_do_not_have_is_left_to_torch() -> None:
    h, shift = random(6, 4), random(3, 6)
    assert fused.mixed(h, random(20, 6), random(20, 6), None, "soft") is None  # more sets than a row of registers
    assert fused.mixed(h.double(), random(3, 6).double(), shift.double(), None, "soft") is None
    assert fused.mixed(h, random(3, 6), shift, random(6).double(), "soft") is None
    assert fused.sums(h, h) is None  # float32 needs no other sum
    with torch.enable_grad():  # a gradient that is to be differentiated again
        assert fused.back(h, h, random(3, 4), shift, None, random(3, 6), "soft") is None


@torch.no_grad()
@pytest.mark.parametrize("triton", [pytest.param(True, marks=needs_triton), False])
def test_sums_take_the_long_way_where_nothing_divides(triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not triton:
        without_triton(monkeypatch)
    rank, tokens = 40, 300  # more directions than are looked at together
    g, h = (random(rank, tokens, dtype=torch.bfloat16).roll(one, 1) for one in (0, 1))
    x, u, scale = random(tokens, 70, dtype=torch.bfloat16), random(70, rank, dtype=torch.bfloat16), random(rank).abs()
    shift = torch.linspace(-3, 1, rank, device=DEVICE)
    plain, near = sums(g.clone(), h, shift), (1 + shift).abs() < NEAR
    assert 3 < int(near.sum()) < 10
    found = sums(g.clone(), h, shift, (x, u.mT, scale))
    exact = (g.double() * h.double()).sum(1) / (1 + shift.double())
    long = (scale.double()[:, None] * (u.double().mT @ x.double().mT) * h.double()).sum(1)
    sizes = (scale.double()[:, None] * (u.double().mT @ x.double().mT)).norm(dim=1) * h.double().norm(dim=1)
    expected = torch.where(near, long, exact)
    assert bool(((found.double() - expected).abs() <= torch.where(near, 2**-8 * sizes, 1e-4 * exact.abs() + 1e-2)).all())
    same(found[~near], plain[~near])
    differ(found[near], plain[near])


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize(("height", "width", "rank"), [(1, 1, 1), (70, 33, 5), (128, 256, 64), (300, 150, 128), (1100, 40, 33)])
def test_a_weight_is_made_in_one_pass(height: int, width: int, rank: int) -> None:
    narrow = torch.bfloat16
    w, u, v = random(height, width, dtype=narrow), random(height, rank, dtype=narrow), random(rank, width, dtype=narrow)
    shift, scale = random(rank, 3)[:, 1] / rank**0.5, random(rank).abs()
    expected = w.double() + (u.double() * (shift * scale).double()) @ v.double()
    for stored in (w, w.mT.contiguous().mT):
        found = fused.added(stored, u, v, shift, scale)
        assert found is not None
        assert (found.shape, found.stride()) == (stored.shape, stored.stride())
        assert float((found.double() - expected).norm() / expected.norm()) < check.gate(narrow) / 5
        differ(found, stored)
    same(w, random(height, width, dtype=narrow))
    wide = random(height, fused._THIN + 1, dtype=narrow)
    assert fused.added(w, wide, wide.mT, wide[0].float(), wide[0].float()) is None


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("height", "rank"), [(1, 1), (70, 33), (64, 128), (300, 65)])
def test_a_matrix_is_turned(height: int, rank: int, dtype: torch.dtype) -> None:
    u, values = random(height, rank + 2, dtype=dtype)[:, :rank], random(rank)
    plain, scaled, twice = fused.turned(u), fused.turned(u, values), fused.turned(u, values, values)
    assert plain is not None
    assert scaled is not None
    assert twice is not None
    assert [plain.is_contiguous(), scaled.is_contiguous()] == [True, True]
    assert torch.equal(plain, u.mT)
    expected = u.mT.double() * values.double().unsqueeze(-1)
    for found, exact in ((scaled, expected), (twice, expected * values.double().unsqueeze(-1))):
        assert float((found.double() - exact).norm() / exact.norm()) <= torch.finfo(dtype).eps  # the interpreter cuts
    differ(scaled, plain)


@needs_triton
@torch.no_grad()
def test_shifts_may_lie_apart() -> None:
    u, wide = random(70, 33), random(33, 3)
    apart, together = wide[:, 1], wide[:, 1].contiguous()
    found = fused.turned(u, apart)
    assert found is not None
    same(found, fused.turned(u, together))
    differ(found, fused.turned(u, wide[:, 0].contiguous()))
    g, h = random(33, 513, dtype=torch.bfloat16), random(33, 513, dtype=torch.bfloat16).flip(0)
    same(fused.sums(g, h, apart), fused.sums(g, h, together))
    differ(fused.sums(g, h, apart), fused.sums(g, h, wide[:, 0].contiguous()))


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("out", "inner", "rank", "tokens"), [(1, 1, 1, 1), (70, 33, 5, 1030), (1030, 2050, 32, 70), (64, 9, 130, 5)]
)
def test_factors_gradients_are_finished_in_place(out: int, inner: int, rank: int, tokens: int, dtype: torch.dtype) -> None:
    du, dv, g = random(out, rank, dtype=dtype), random(rank, inner, dtype=dtype), random(rank, tokens, dtype=dtype)
    h, shift, scale = random(rank, tokens + 3, dtype=dtype)[:, 1:-2], random(rank, 3)[:, 1], random(rank).abs()
    values, dshift = (shift * scale).double(), scale.double() * (g.double() * h.double()).sum(1)
    one, other = du.clone(), dv.clone()
    found = fused.finish(one, other, g, h, shift, scale)
    assert found is not None
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), dshift, rtol=1e-5, atol=1e-5 * tokens**0.5)
    for given, made, exact in ((du, one, du.double() * values), (dv, other, dv.double() * values[:, None])):
        assert float((made.double() - exact).norm()) <= torch.finfo(dtype).eps * float(exact.norm())  # the interpreter cuts
        differ(made, given)
    assert fused.finish(one.mT.contiguous().mT, other, g, h, shift, scale) is None or rank == 1 or out == 1
    assert fused.finish(*(each.double() for each in (one, other, g, h)), shift, scale) is None


@pytest.mark.skipif(importlib.util.find_spec("triton") is None or RUNS, reason="no Triton that compiles, or a GPU that shows it")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_kernels_compile_where_no_gpu_is(dtype: str) -> None:
    """Triton's interpreter takes what its compiler does not: PTX needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sarac.ir import kernels

    values = {"shift", "scale", "router", "scores", "shares", "dshift", "one", "other"}
    tensors = {"u", "v", "x", "h", "g", "a", "b", "c", "du", "dv", "dh", "mixed", "dmixed", "out"}
    routed = {"sets": 5, "padded": 16, "width": fused._TOKENS, "rows": fused._RANKS}
    square = {"m": fused._HIGH, "n": fused._WIDE, "k": fused._DEEP, "group": fused._GROUP}
    given: dict[str, list[dict[str, int]]] = {
        "forward": [{**routed, "scaled": one, "kind": kind, "count": kind} for one in (0, 1) for kind in range(3)],
        "backward": [{**routed, "scaled": one, "kind": kind, "count": kind} for one in (0, 1) for kind in range(3)],
        "sums": [{"divide": one, "scaled": 1 - one, "length": 8192, "width": 1024} for one in (0, 1)],
        "turned": [{"scaled": one, "side": 64} for one in range(3)],
        "finish": [{"width": 1024}],
        "mend": [{"length": 1024, "rows": 32, "width": 64, "depth": 64}],
        "added": [square],
    }
    kinds = dict.fromkeys(values, "*fp32") | dict.fromkeys(tensors, f"*{dtype}") | {"near": "fp32"}
    for name, choices in given.items():
        kernel = getattr(kernels, name)
        for constants in choices:
            signature = {one: "constexpr" if one in constants else kinds.get(one, "i32") for one in kernel.arg_names}
            source = ASTSource(kernel, signature, {(kernel.arg_names.index(one),): value for one, value in constants.items()})
            assert name in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


def test_launchers_are_forgotten_where_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of ever new lengths would else leave no room for what is launched most."""
    made = types.SimpleNamespace(kernel={1: lambda *_: {1: "launcher"}})
    monkeypatch.setattr(launch, "kernels", lambda: made)
    monkeypatch.setattr(launch, "_compiled", kept := {})
    monkeypatch.setattr(launch, "_MOST", 2)
    sizes = []
    for number in range(5):
        launch.launched("kernel", 1, (torch.ones(2),), (number,), ())
        sizes.append(len(kept))
    assert sizes == [1, 2, 1, 2, 1]
    assert [key[3] for key in kept] == [(4,)]
