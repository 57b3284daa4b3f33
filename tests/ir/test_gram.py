"""Decompositions by the Gram matrix: their error bounds hold, the rank is a true SVD's, and where unsure one is taken."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from zoo import close

from sarac.ir import gram
from sarac.ir.errors import SpectrumError
from sarac.ir.gram import factors, spectra, spectrum
from sarac.ir.spectrum import Spectrum, refining

SIDES, SEEDS = st.integers(1, 24), st.integers(0, 2**31)
SHARES = (0.01, 0.3, 0.6, 0.9, 0.999, 0.999999, 1.0)


def planted(values: Tensor, rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight (rows, columns) with these singular values, up to its dtype's rounding."""
    generator = torch.Generator().manual_seed(seed)
    count = len(values)
    u, _ = torch.linalg.qr(torch.randn(rows, count, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, count, generator=generator, dtype=torch.float64))
    return ((u * values.double()) @ v.T).to(dtype)


def true_values(weight: Tensor) -> Tensor:
    return torch.from_numpy(np.linalg.svd(weight.double().numpy(), compute_uv=False))


def by_svd(weight: Tensor) -> Spectrum:
    """What a float64 SVD makes of a float32 weight."""
    values = true_values(weight)
    return Spectrum(values, max(weight.shape) * torch.finfo(torch.float32).eps * float(values[0]))


@given(rows=SIDES, columns=SIDES, seed=SEEDS, spread=st.integers(0, 12), exponent=st.sampled_from([-120, -30, 0, 30, 120]))
def test_values_lie_within_their_bounds_and_ranks_are_the_svds(
    rows: int, columns: int, seed: int, spread: int, exponent: int
) -> None:
    values = 10.0 ** -torch.linspace(0, spread, min(rows, columns), dtype=torch.float64)
    weight = planted(values, rows, columns, seed) * 2.0**exponent
    if not weight.any() or not weight.isfinite().all():
        return
    found, true = spectrum(weight), by_svd(weight)
    allowed = 1e-13 * true.values[0] + (0.0 if found.errors is None else found.errors)
    assert bool(((found.values - true.values).abs() <= allowed).all())
    for share in SHARES:
        assert found.rank_at(share) == true.rank_at(share)
        assert found.rank_at_energy(share) == true.rank_at_energy(share)


def test_the_bounds_are_of_use() -> None:
    found = spectrum(torch.randn(60, 40))
    assert found.how == "gram"
    assert 0.0 < float(found.errors.max()) < 1e-11 * float(found.values[0])
    wide = spectrum(planted(10.0 ** -torch.linspace(0, 5, 40), 60, 40))
    assert float(wide.errors[-1]) > 1e3 * float(wide.errors[0])  # small values are known less well


def test_a_badly_scaled_weight_keeps_the_svds_rank() -> None:
    weight = torch.randn(30, 30) * 10.0 ** torch.linspace(-9, 9, 30)[:, None]
    assert [spectrum(weight).rank_at(share) for share in SHARES] == [by_svd(weight).rank_at(share) for share in SHARES]


def test_values_that_a_gram_matrix_squares_away_are_measured_by_an_svd() -> None:
    values = torch.tensor([1.0, 1e-9, 1e-10], dtype=torch.float64)
    found = spectrum(planted(values, 8, 8, dtype=torch.float64))
    assert found.how == "svd"
    assert "lie within the Gram matrix's error of what counts as zero" in found.note
    assert found.numerical_rank == 3
    coarse = spectrum(planted(torch.tensor([1.0, 0.5, 0.25]), 8, 3))
    assert (coarse.how, coarse.note) == ("gram", "")


def test_a_rank_within_the_error_is_decided_by_an_svd_and_says_so() -> None:
    weight = torch.eye(64, 50)  # every k / 50 is reached exactly, up to rounding
    found = spectrum(weight)
    assert (found.how, found.rank_at(0.55), found.how) == ("gram", 28, "gram")
    assert found.decided(0.55)
    assert not found.decided(0.5)
    assert found.rank_at(0.5) == by_svd(weight).rank_at(0.5)
    assert found.how == "svd"
    assert found.note == "k at 0.5 lies within the error of the values"


def test_a_spectrum_that_was_sent_away_measures_again_only_with_its_weight() -> None:
    weight = torch.eye(64, 50)
    sent = pickle.loads(pickle.dumps(spectrum(weight)))
    assert sent.rank_at(0.55) == 28
    with pytest.raises(SpectrumError, match="analyze it anew"):
        sent.rank_at(0.5)
    back = refining(sent, spectrum(weight).refine, lambda i: None)
    assert back.rank_at(0.5) == by_svd(weight).rank_at(0.5)


def test_a_stack_is_decomposed_as_its_matrices_are() -> None:
    stack = torch.randn(5, 80, 40)
    stack[3] = torch.eye(80, 40)
    found = spectrum(stack, "experts")
    assert [part.rank_at(0.6) for part in found.parts] == [spectrum(matrix).rank_at(0.6) for matrix in stack]
    assert len({part.rank_at(0.6) for part in found.parts}) > 1
    found.parts[3].rank_at(0.5)
    assert (found.how, found.note[:9]) == ("gram, svd", "matrix 3:")
    with pytest.raises(SpectrumError, match=r"experts\[2\] contains NaN"):
        spectrum(stack.index_fill(0, torch.tensor(2), torch.nan), "experts")


def test_batches_do_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [torch.randn(9, 6) for _ in range(7)]
    whole = spectra(weights, ["w"] * 7)
    monkeypatch.setattr(gram, "_BATCH", 80)
    monkeypatch.setattr(gram, "_BLOCK", 12)
    for one, other, weight in zip(whole, spectra(weights, ["w"] * 7), weights, strict=True):
        close(one.values, other.values, torch.float64)
        close(one.values, true_values(weight), torch.float64)
    assert not torch.equal(whole[0].values, whole[1].values)


def test_eigenvalues_that_do_not_converge_leave_it_to_the_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> None:
        raise np.linalg.LinAlgError

    monkeypatch.setattr(np.linalg, "eigvalsh", fails)
    weight = torch.randn(6, 4)
    found = spectrum(weight)
    assert (found.how, found.note) == ("svd", "the eigenvalues of its Gram matrix did not converge")
    close(found.values, true_values(weight), torch.float64)


@pytest.mark.parametrize("shape", [(20, 9), (9, 20), (9, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_vectors_kept_with_a_spectrum_are_those_of_the_factors(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    kept = spectrum(weight, keep=lambda found: found.rank_at(0.6))
    k = kept.rank_at(0.6)
    assert kept.basis.shape == (k, 9)
    assert kept.basis.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    alone, given_basis = factors(weight, k), factors(weight, k, basis=kept.basis)
    for one, other in zip(alone, given_basis, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    u, s, v, _ = given_basis
    close(s, true_values(weight)[:k], torch.float32)
    close((u * s) @ v, (weight.double() @ v.T) @ v, torch.float32)
    assert spectrum(weight).basis is None


@pytest.mark.parametrize("shape", [(20, 9), (9, 20)])
def test_directions_without_a_value_are_completed_orthogonally(shape: tuple[int, int]) -> None:
    u, s, v, floor = factors(planted(torch.tensor([3.0, 2.0]), *shape), 6)
    assert int((s > floor).sum()) == 2
    close(u.T @ u, torch.eye(6), torch.float32)
    close(v @ v.T, torch.eye(6), torch.float32)
    zero = factors(torch.zeros(shape), 3)
    close(zero[0].T @ zero[0], torch.eye(3), torch.float64)


def test_signs_hold_where_the_largest_entries_are_equal() -> None:
    rows = torch.tensor([[1.0, -1.0], [1.0, 1.0]]) * torch.tensor([[2.0], [1.0]])
    for noise in (1e-15, -1e-15):
        _, _, v, _ = factors(rows.double() + torch.tensor([[0.0, noise], [0.0, 0.0]], dtype=torch.float64), 2)
        assert v[0, 0] > 0 > v[0, 1]
        assert v[1].min() > 0


@pytest.mark.parametrize("factor", [1e-42, 1e36])
def test_sizes_at_the_ends_of_float32_lose_nothing(factor: float) -> None:
    weight = torch.diag(torch.tensor([9.0, 5.0, 1.0])) * factor
    found = spectrum(weight)
    assert found.rank_at(0.9) == 2
    assert found.rank_at(0.95) == 3
    assert float(found.values[0]) == pytest.approx(float(weight[0, 0]), rel=1e-12)


def test_a_float64_weight_is_left_as_it_is() -> None:
    weight = torch.randn(5, 4, dtype=torch.float64)
    before = weight.clone()
    spectrum(weight, keep=lambda _: 2)
    factors(weight, 2)
    assert torch.equal(weight, before)
