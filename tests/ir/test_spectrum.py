"""Singular values and the threshold rank, against numpy and against what can be worked out by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from zoo import close

from sarac.ir import check
from sarac.ir.errors import PlanError, SpectrumError
from sarac.ir.gram import factors, product_factors, spectrum

SIZES = st.integers(1, 9)
SHARES = st.floats(0.0, 1.0, exclude_min=True)
SEEDS = st.integers(0, 2**31)
WIDE = st.sampled_from([torch.float64, torch.float32])


def random_weight(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float64, rank: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    inner = min(rows, columns) if rank is None else rank
    left = torch.randn(rows, inner, generator=generator, dtype=torch.float64)
    return (left @ torch.randn(inner, columns, generator=generator, dtype=torch.float64)).to(dtype)


def counted(weight: Tensor, threshold: float, power: int = 1) -> int:
    """DESIGN's rule, one value at a time."""
    values = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    floor = max(weight.shape) * torch.finfo(weight.dtype).eps * values[0]
    values = [float(v) ** power for v in values if v > floor]
    if threshold == 1.0:
        return max(1, len(values))
    goal, reached = math.fsum(values) * (threshold - 8 * min(weight.shape) * np.finfo(np.float64).eps), 0.0
    for k, value in enumerate(values, 1):
        reached += value
        if reached >= goal:
            return k
    return max(1, len(values))


@given(rows=SIZES, columns=SIZES, seed=SEEDS, share=SHARES, dtype=WIDE)
def test_rank_is_the_count_of_numpy(rows: int, columns: int, seed: int, share: float, dtype: torch.dtype) -> None:
    weight = random_weight(rows, columns, seed, dtype)
    assert spectrum(weight).rank_at(share) == counted(weight, share)
    assert spectrum(weight).rank_at_energy(share) == counted(weight, share, power=2)


@given(rows=SIZES, columns=SIZES, seed=SEEDS, shares=st.lists(SHARES, min_size=2, max_size=6), dtype=WIDE)
def test_rank_grows_with_the_threshold(rows: int, columns: int, seed: int, shares: list[float], dtype: torch.dtype) -> None:
    found = spectrum(random_weight(rows, columns, seed, dtype))
    for rank in (found.rank_at, found.rank_at_energy):
        ranks = [rank(share) for share in [*sorted(shares), 1.0]]
        assert ranks == sorted(ranks)
        assert 1 <= ranks[0] <= ranks[-1] == found.numerical_rank <= found.full_rank == min(rows, columns)


def test_rank_does_grow() -> None:
    found = spectrum(torch.eye(10))
    assert found.rank_at(0.1) < found.rank_at(0.5) < found.rank_at(1.0)


@given(rows=SIZES, columns=SIZES, seed=SEEDS, share=SHARES, dtype=WIDE, scale=st.integers(-20, 20))
def test_rank_is_that_of_the_transpose_and_of_any_multiple(
    rows: int, columns: int, seed: int, share: float, dtype: torch.dtype, scale: int
) -> None:
    weight = random_weight(rows, columns, seed, dtype)
    rank = spectrum(weight).rank_at(share)
    assert spectrum(weight.T).rank_at(share) == rank
    assert spectrum(weight * 2.0**scale).rank_at(share) == rank
    assert spectrum(-weight).rank_at(share) == rank


@given(rows=SIZES, columns=SIZES, seed=SEEDS, data=st.data(), dtype=WIDE)
def test_the_whole_share_is_the_numerical_rank(
    rows: int, columns: int, seed: int, data: st.DataObject, dtype: torch.dtype
) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    weight = random_weight(rows, columns, seed, dtype, rank)
    assert spectrum(weight).rank_at(1.0) == np.linalg.matrix_rank(weight.numpy()) == rank


@given(size=st.integers(1, 40), data=st.data(), dtype=WIDE, scale=st.sampled_from([1.0, 0.1, 0.3, 7.7]))
@example(size=10, data=None, dtype=torch.float64, scale=0.1)  # 0.1 summed up ten times is less than 1
def test_identity_gets_its_exact_share(size: int, data: Any, dtype: torch.dtype, scale: float) -> None:
    k = data.draw(st.integers(1, size)) if data else 8
    found = spectrum(torch.eye(size, dtype=dtype) * scale)
    assert found.rank_at(k / size) == k
    assert found.rank_at_energy(k / size) == k
    assert k == size or found.rank_at(k / size + 1e-9) == k + 1
    assert k == 1 or found.rank_at(k / size - 1e-9) == k


def test_sum_of_values_and_sum_of_squares_are_two_rules() -> None:
    found = spectrum(torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0])))
    assert (found.rank_at(0.75), found.rank_at_energy(0.75)) == (2, 2)
    assert (found.rank_at(0.7), found.rank_at_energy(0.7)) == (2, 1)
    assert found.shares().tolist() == [0.5, 0.75, 0.875, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_weight_cast_to_half_precision_keeps_its_rank(dtype: torch.dtype) -> None:
    # max(m, n) · eps(bfloat16) is 1 at 128: with it as the zero floor not even the largest value of this weight counts.
    weight = random_weight(256, 256, 0, torch.float32)
    wide, narrow = spectrum(weight), spectrum(weight.to(dtype))
    assert abs(narrow.rank_at(0.6) - wide.rank_at(0.6)) <= 1
    assert narrow.numerical_rank > 200


def test_a_value_below_the_zero_floor_does_not_count() -> None:
    eps = torch.finfo(torch.float32).eps
    below, above = (torch.diag(torch.tensor([1.0, 1.0, factor * 3 * eps])) for factor in (0.5, 2.0))
    assert spectrum(below).rank_at(1.0) == spectrum(below).numerical_rank == 2
    assert spectrum(above).rank_at(1.0) == spectrum(above).numerical_rank == 3


@pytest.mark.parametrize("weight", [torch.zeros(3, 4), torch.zeros(1, 1)])
def test_zero_weight_has_rank_one_at_any_share(weight: Tensor) -> None:
    found = spectrum(weight)
    assert found.numerical_rank == 0
    assert [found.rank_at(share) for share in (0.1, 0.6, 1.0)] == [1, 1, 1]
    assert found.shares().tolist() == [1.0] * found.full_rank


def test_a_weight_of_one_number() -> None:
    found = spectrum(torch.tensor([[-3.0]]))
    assert (found.values.tolist(), found.numerical_rank, found.rank_at(0.01), found.rank_at(1.0)) == ([3.0], 1, 1, 1)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.0000001, math.nan, math.inf])
def test_threshold_outside_its_range_is_refused(share: float) -> None:
    for rank in (spectrum(torch.eye(3)).rank_at, spectrum(torch.eye(3)).rank_at_energy):
        with pytest.raises(PlanError, match=r"\(0, 1\]") as refused:
            rank(share)
        assert repr(share) in str(refused.value)
        assert "threshold:0.6" in str(refused.value)


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (torch.tensor([[1.0, math.nan]]), "NaN"),
        (torch.tensor([[1.0, -math.inf]]), "Inf"),
        (torch.tensor([[math.inf, math.nan]]), "NaN"),
        (torch.zeros(2, 2, device="meta"), "meta"),
        (torch.zeros(2, 2, 2, 2), r"\(2, 2, 2, 2\)"),
        (torch.zeros(0, 2), r"\(0, 2\)"),
    ],
)
def test_weight_without_values_is_named(weight: Tensor, said: str) -> None:
    with pytest.raises(SpectrumError, match=said) as refused:
        spectrum(weight, "layers.0.q.weight")
    assert str(refused.value).startswith("layers.0.q.weight ")
    with pytest.raises(SpectrumError, match=said):
        factors(weight, 1, "layers.0.q.weight")


def test_eight_bit_weight_has_a_spectrum() -> None:
    weight = random_weight(8, 8, 0, torch.float32).to(torch.float8_e4m3fn)
    assert spectrum(weight).rank_at(0.6) == counted(weight.float(), 0.6)


@given(rows=SIZES, columns=SIZES, seed=SEEDS, data=st.data())
def test_factors_are_the_leading_part_of_the_weight(rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    weight = random_weight(rows, columns, seed)
    k = data.draw(st.integers(1, min(rows, columns)))
    u, s, v, floor = factors(weight, k)
    assert (u.shape, s.shape, v.shape) == ((rows, k), (k,), (k, columns))
    values = np.linalg.svd(weight.numpy(), compute_uv=False)
    close(s, torch.from_numpy(values[:k].copy()), torch.float64)
    close(torch.tensor(floor), torch.tensor(spectrum(weight).floor), torch.float64)
    close(u.T @ u, torch.eye(k), torch.float64)
    # What is left over is the best possible for the rank: its norm is that of the values left out.
    rest = torch.tensor([(weight - (u * s) @ v).norm(), values[0]])
    close(rest, torch.tensor([np.linalg.norm(values[k:]), values[0]]), torch.float32)


def test_signs_of_factors_do_not_depend_on_the_run() -> None:
    weight = random_weight(6, 4, 1)
    u, _, v, _ = factors(weight, 4)
    assert all(row[row.abs().argmax()] > 0 for row in v)
    mirrored, _, again, _ = factors(-weight, 4)
    close(again, v, torch.float64)
    close(mirrored, -u, torch.float64)


@pytest.mark.parametrize(("out", "inner", "rank"), [(5, 7, 2), (7, 5, 5), (3, 4, 6)])
def test_product_factors_are_the_products_own(out: int, inner: int, rank: int) -> None:
    b, a = torch.randn(out, rank, dtype=torch.float64), torch.randn(rank, inner, dtype=torch.float64)
    u, s, v = product_factors(b, a)
    check.require_close((u * s) @ v, b @ a, torch.float64, "the factors and the product")
    assert check.difference((u * s) @ v, 2 * b @ a).error > check.gate(torch.float64)
    assert s.numel() == min(out, inner, rank)
    padded = product_factors(torch.cat([b, torch.zeros(out, 3)], 1), torch.cat([a, torch.zeros(3, inner)]))
    assert padded[1].numel() == s.numel()
