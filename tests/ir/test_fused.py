"""Triton's kernels against torch's own operations: on a GPU, or where TRITON_INTERPRET=1 lets them run on the CPU."""

import importlib.util
import os

import pytest
import torch
from torch import Tensor
from zoo import close

from sarac.ir import check, fused, routes
from sarac.ir.schedules import sums

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = importlib.util.find_spec("triton") is not None and (DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
needs_triton = pytest.mark.skipif(not RUNS, reason="no GPU, and Triton does not interpret here (TRITON_INTERPRET=1)")
SIZES = [(70, 150, 5), (33, 20, 3), (64, 128, 4), (5, 7, 2), (1, 1, 1), (1030, 614, 16)]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize("kind", ["soft", "hard", "topk:1", "topk:2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "rank", "sets"), SIZES)
def test_routing_is_torchs(
    tokens: int, rank: int, sets: int, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "topk:2" and sets < 2:
        pytest.skip("there is but one set")
    h, dmixed = random(tokens, rank + 3, dtype=dtype)[:, 1 : rank + 1], random(tokens, rank, dtype=dtype).flip(0)
    router, shift = random(sets, rank) / rank**0.5, random(sets, rank).flip(1)
    found = fused.mixed(h, router, None, shift, kind)
    assert found is not None
    back = fused.back(dmixed, h, found[1], shift, router, None, kind)
    assert back is not None
    monkeypatch.setattr(fused, "_module", lambda: None)
    expected = routes._mixed(h, router, None, shift, kind)
    assert fused.mixed(h, router, None, shift, kind) is None
    done = routes._back(dmixed, h, expected[1], shift, router, None, kind)
    close(found[1], expected[1])
    for one, other in zip((found[0], *back[:2]), (expected[0], done.h, done.shift), strict=True):
        assert one.dtype == other.dtype
        error = float((one.double() - other.double()).norm()) / max(float(other.double().norm()), 1e-3)
        assert error < (1e-5 if one.dtype == torch.float32 else check.gate(dtype) / 5), error
    assert float((back[2] - done.router).norm()) <= 1e-5 * max(float(done.router.norm()), 1.0)


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize(("tokens", "rank"), [(1, 1), (513, 130), (2048, 614)])
def test_sums_are_in_float32(tokens: int, rank: int) -> None:
    g, h = random(tokens, rank, dtype=torch.bfloat16), random(tokens, rank + 2, dtype=torch.bfloat16)[:, 1 : rank + 1]
    found = fused.sums(g, h)
    assert found is not None
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), (g.double() * h.double()).sum(0), rtol=1e-5, atol=1e-3)


@torch.no_grad()
def test_sums_without_triton_are_in_float32_too() -> None:
    g, h = random(3000, 20, dtype=torch.bfloat16).cpu(), random(3000, 20, dtype=torch.bfloat16).flip(0).cpu()
    exact = (g.double() * h.double()).sum(0)
    torch.testing.assert_close(sums(g, h).double(), exact, rtol=1e-5, atol=1e-3)
    assert float(((g * h).sum(0, dtype=torch.float32).double() - exact).abs().max()) > 1e-2  # what rounding first would lose


def test_what_kernels_do_not_have_is_left_to_torch() -> None:
    h, shift = random(4, 6), random(3, 6)
    assert fused.mixed(h, random(3, 2), random(2, 6), shift, "soft") is None  # a bottleneck
    assert fused.mixed(h, random(20, 6), None, random(20, 6), "soft") is None  # more sets than a row of registers
    assert fused.mixed(h.double(), random(3, 6).double(), None, shift.double(), "soft") is None
    assert fused.sums(h, h) is None  # float32 needs no other sum
    with torch.enable_grad():  # a gradient that is to be differentiated again
        assert fused.back(h, h, random(4, 3), shift, random(3, 6), None, "soft") is None
