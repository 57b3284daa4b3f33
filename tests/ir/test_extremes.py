"""Weights at the ends of float64 and of what counts as zero: right ranks, and a word on what is left out."""

import numpy as np
import pytest
import torch
from torch import nn

import sarac
from sarac.ir.gram import factors, spectrum


@pytest.mark.parametrize("size", [1e307, 1e200, 1.0, 1e-200, 1e-310])
def test_the_size_of_a_weight_does_not_change_its_ranks(size: float) -> None:
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(0)).double()
    for share in (0.05, 0.3, 0.6, 0.9, 0.99):
        assert spectrum(weight * size).rank_at(share) == spectrum(weight).rank_at(share)
        assert spectrum(weight * size).rank_at_energy(share) == spectrum(weight).rank_at_energy(share)
    assert spectrum(weight * size).rank_at(0.6) != spectrum(weight * size).rank_at(0.9)


def test_a_denormal_model_is_analyzed_and_transformed() -> None:
    model = nn.Sequential(nn.Linear(8, 8).double(), nn.Linear(8, 4).double())
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(8, 8).double() * 1e-310)
    assert sarac.analyze(model).rows()[0]["ranks"]["0.6"] >= 1
    u, s, v, _ = factors(model[0].weight.detach(), 8)
    assert bool(s[0] > 0)
    assert torch.allclose((u * s) @ v / s[0], model[0].weight.detach() / s[0], atol=1e-4)


def spiked(size: float, n: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(n, generator=generator), torch.randn(n, generator=generator)
    return torch.randn(n, n, generator=generator) / n**0.5 + size * torch.outer(u / u.norm(), v / v.norm())


def test_values_that_count_as_zero_are_told_of_where_they_are_much_of_the_sum() -> None:
    plain, much = spectrum(spiked(1.0)), spectrum(spiked(30_000.0))
    values = np.linalg.svd(spiked(30_000.0).double().numpy(), compute_uv=False)
    below = values[values <= much.floor].sum() / values.sum()
    assert below > 1e-3
    assert f"values that count as zero are {below:.2g} of its sum" in much.note
    assert plain.note == ""
    assert spectrum(torch.zeros(3, 4)).note == "it is zero"
    analysis = sarac.analyze(nn.Sequential(nn.Linear(256, 256)).requires_grad_(False))
    assert "count as zero" not in analysis.to_json()
