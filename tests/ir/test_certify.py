"""The certified rank: what it says is what a float64 SVD says, its bounds hold, and what it cannot prove it leaves."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from sarac.ir import certify
from sarac.ir.certify import certified, worthwhile
from sarac.ir.gram import factors, gram, scale_of, spectrum


def orthogonal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns))[0]


def decaying(rows: int, columns: int, power: float) -> Tensor:
    n = min(rows, columns)
    values = torch.arange(1, n + 1) ** -power
    return (orthogonal(rows, n) * values) @ orthogonal(columns, n).T


def weights() -> dict[str, Tensor]:
    return {
        "random": torch.randn(256, 256),
        "tall": torch.randn(500, 200),
        "wide": torch.randn(150, 400).bfloat16(),
        "slow": decaying(256, 256, 0.2),
        "fast": decaying(256, 300, 1.0),
        "low rank": torch.randn(200, 8) @ torch.randn(8, 200),
        "outlier": torch.randn(200, 200) + 30.0,
        "tiny": torch.randn(160, 160) * 1e-30,
    }


@pytest.mark.parametrize("name", weights())
@pytest.mark.parametrize("share", [0.01, 0.05])
def test_what_is_certified_is_the_svds(name: str, share: float) -> None:
    weight = weights()[name]
    found, true = certified(weight, share), np.linalg.svd(weight.double().numpy(), compute_uv=False)
    assert found is not None
    k = len(found.values)
    assert found.rank_at(share) == spectrum(weight).rank_at(share) == k
    assert (found.how, found.full_rank) == ("certified", min(weight.shape))
    assert bool((np.abs(found.values.numpy() - true[:k]) <= found.errors.numpy()).all())
    counted = true[true > found.floor]
    assert found.rest[0] <= counted[k:].sum() <= found.rest[1]
    assert found.rest[1] - found.rest[0] < 0.2 * found.rest[1]
    by_vectors = factors(weight, k, basis=found.basis)
    assert float((by_vectors[1] - torch.from_numpy(true[:k].copy())).abs().max()) < 1e-6 * true[0]


def test_what_only_leading_values_cannot_say_is_measured_whole() -> None:
    weight = torch.randn(128, 128)
    found = certified(weight, 0.05)
    found = replace(found, refine=spectrum(weight).refine)
    assert found.rank_at(0.6) == spectrum(weight).rank_at(0.6) > len(found.values)
    assert found.how == "svd"
    assert found.numerical_rank == 128


@pytest.mark.parametrize("weight", [orthogonal(120, 120), torch.zeros(64, 64), torch.eye(100)])
def test_what_cannot_be_proved_is_left(weight: Tensor) -> None:
    assert certified(weight, 0.05) is None


def test_a_sum_is_not_bounded_from_a_wrong_start() -> None:
    root = decaying(128, 128, 0.3).double()
    low, high = certify._nuclear(root, 1.0)
    true = float(torch.linalg.svdvals(root).sum())
    assert low <= true <= high
    assert high - low < 1e-3 * true
    assert certify._nuclear(root, 0.2) is None  # the polynomials explode, and are seen to


def test_leading_values_are_not_certain_while_one_is_missing() -> None:
    weight = decaying(128, 128, 0.3)
    g = gram(weight, scale_of(weight))
    _, vectors = torch.linalg.eigh(g)
    top = certify._Leading(g, 1e-13)
    top.v = vectors.flip(1)[:, :20].contiguous()
    top._ritz()
    assert top._certain(5) is not None
    top.v = vectors.flip(1)[:, [0, 1, 3, *range(4, 20)]].contiguous()  # without the third
    top._ritz()
    assert top._certain(5) is None


def test_it_is_for_gpus_and_small_shares() -> None:
    assert not worthwhile(torch.randn(2048, 2048), 0.05)
