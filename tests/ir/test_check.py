"""The one place that knows tolerances: what counts as equal, close, different and finite."""

import math
from collections import namedtuple
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sarac.ir import check
from sarac.ir.errors import CheckFailed

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
Pair = namedtuple("Pair", "left right")


def test_gates_of_the_facts() -> None:
    gates = {dtype: check.gate(dtype) for dtype in DTYPES}
    assert gates == {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
    assert check.gate(torch.int64) == check.gate(torch.float32)
    assert check.MERGED_OVER_UNMERGED == 1.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_close_is_relative_to_the_spread(dtype: torch.dtype, scale: float) -> None:
    expected = torch.randn(200, dtype=torch.float64) * scale + 100 * scale
    noise = torch.randn(200, dtype=torch.float64)
    noise *= expected.std(correction=0) / noise.square().mean().sqrt()
    check.require_close(expected + 0.9 * check.gate(dtype) * noise, expected, dtype, "x and y")
    with pytest.raises(CheckFailed, match=r"x and y differ at output: relative error .* allows"):
        check.require_close(expected + 1.1 * check.gate(dtype) * noise, expected, dtype, "x and y")


def test_a_model_that_magnifies_its_rounding_is_held_to_that() -> None:
    expected, asked = torch.randn(1000, dtype=torch.float64), []
    noise = torch.randn(1000, dtype=torch.float64)
    noise *= expected.std(correction=0) / noise.square().mean().sqrt()

    def close(gates: float, rounding: float) -> None:
        def own() -> float:
            asked.append(rounding)
            return rounding * check.gate(torch.float32)

        check.require_close(expected + gates * check.gate(torch.float32) * noise, expected, torch.float32, "x and y", own)

    close(0.9, 0.0)
    assert asked == []  # a wider computation is made where the gate alone does not do
    close(2.9, 1.0)
    close(9.9, 100.0)
    for gates, rounding in ((1.1, 0.3), (3.1, 1.0), (10.1, 100.0)):
        with pytest.raises(CheckFailed, match="x and y differ"):
            close(gates, rounding)
    assert len(asked) == 5


@given(st.floats(-1e30, 1e30), st.integers(0, 9))
def test_one_changed_number_is_not_identical(value: float, place: int) -> None:
    one = torch.full((10,), value, dtype=torch.float64)
    two = one.clone()
    check.require_identical(two, one, "x and y")
    two[place] = torch.nextafter(two[place], torch.tensor(math.inf, dtype=torch.float64))
    with pytest.raises(CheckFailed, match="x and y must be bit-exact and differ at output"):
        check.require_identical(two, one, "x and y")
    assert not check.difference(two, one).identical


NESTED = [
    lambda t: {"a": [t, None], "b": (1, "x")},
    lambda t: (torch.ones(2), t),
    lambda t: transformers.modeling_outputs.BaseModelOutput(last_hidden_state=torch.ones(2), hidden_states=(torch.ones(3), t)),
    lambda t: Pair(torch.zeros(1), {"deep": [[t]]}),
]


@pytest.mark.parametrize("nest", NESTED)
def test_difference_is_found_wherever_it_hides(nest: Any) -> None:
    one, two = nest(torch.ones(3)), nest(torch.tensor([1.0, 1.0, 1.5]))
    check.require_identical(nest(torch.ones(3)), one, "x")
    found = check.difference(two, one)
    assert (found.max_error, found.finite, found.identical) == (0.5, True, False)
    assert found.where != "output"
    with pytest.raises(CheckFailed):
        check.require_identical(two, one, "x")
    check.require_different(two, one, "x", "Train it.")


def test_the_worst_of_several_is_told() -> None:
    found = check.difference([torch.ones(2) * 1.1, torch.ones(2) * 3, torch.ones(2) * 1.2], [torch.ones(2)] * 3)
    assert (found.where, found.max_error, found.error) == ("[1]", 2.0, 2.0)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (torch.ones(2), torch.ones(3)),
        (torch.ones(2, 1), torch.ones(1, 2)),
        ([torch.ones(2)], [torch.ones(2), torch.ones(2)]),
        (torch.ones(()), torch.ones(1)),
        ([], [torch.ones(1)]),
    ],
)
def test_another_form_is_told(actual: Any, expected: Any) -> None:
    with pytest.raises(CheckFailed, match="another form"):
        check.difference(actual, expected)


@pytest.mark.parametrize("nothing", [None, [], {}, 3.0, nn.Linear])
def test_outputs_without_a_tensor_prove_nothing(nothing: Any) -> None:
    """A comparison of nothing must never pass for a success."""
    with pytest.raises(CheckFailed):
        check.require_identical(nothing, nothing, "x")
    with pytest.raises(CheckFailed):
        check.require_close(nothing, nothing, torch.float32, "x")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
def test_bit_exact_includes_the_dtype(dtype: torch.dtype) -> None:
    with pytest.raises(CheckFailed):
        check.require_identical(torch.ones(3, dtype=dtype), torch.ones(3), "x")


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_equal_only_in_the_same_places(odd: float) -> None:
    plain, with_odd = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, odd, 3.0])
    check.require_identical(with_odd, with_odd.clone(), "x")
    for one, two in ((plain, with_odd), (with_odd, plain), (with_odd, with_odd.flip(0).roll(1))):
        with pytest.raises(CheckFailed):
            check.require_identical(one, two, "x")
        with pytest.raises(CheckFailed, match="with NaN or Inf"):
            check.require_close(one, two, torch.bfloat16, "x")
    with pytest.raises(CheckFailed, match="x has NaN or Inf at output: check the weights"):
        check.require_finite(with_odd, "x")
    check.require_finite([plain, torch.tensor([1])], "x")


def test_signs_of_infinity_matter() -> None:
    with pytest.raises(CheckFailed):
        check.require_identical(torch.tensor([math.inf]), torch.tensor([-math.inf]), "x")


def test_a_constant_output_has_a_scale() -> None:
    ones = torch.ones(4, dtype=torch.float64)
    assert check.difference(ones * 5.5, ones * 5).error == 0.1
    assert check.difference(ones * 0, ones * 0).error == 0.0
    assert check.difference(ones, ones * 0).error == 1.0
    assert check.difference(torch.ones(0), torch.ones(0)).identical


def test_no_op_never_passes_for_a_success() -> None:
    with pytest.raises(CheckFailed, match=r"merged and base are identical to the last bit\. Train it first\."):
        check.require_different(torch.ones(2), torch.ones(2), "merged and base", "Train it first.")
    assert check.require_different(torch.ones(2), torch.zeros(2), "merged and base", "").max_error == 1.0


def test_coarsest_dtype_of_models_and_outputs() -> None:
    assert check.coarsest(nn.Linear(2, 2).half(), torch.ones(1)) == torch.float16
    assert check.coarsest([torch.ones(1).half(), {"x": torch.ones(1).bfloat16()}]) == torch.bfloat16
    assert check.coarsest(torch.ones(1).double()) == torch.float64
    assert check.coarsest(torch.ones(1, dtype=torch.long)) == check.coarsest() == torch.float32


@pytest.mark.parametrize(("part", "whole", "expected"), [(3.0, 6.0, 0.5), (0.0, 0.0, 0.0), (1.0, 0.0, math.inf), (0.0, 1.0, 0.0)])
def test_relative_norm(part: float, whole: float, expected: float) -> None:
    assert check.relative_norm(torch.full((4,), part), torch.full((4,), whole)) == expected
