"""Example inputs in every form, what a model that rejects them says, and the spec that a file keeps."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BatchEncoding
from zoo import bert, ids, mlp

from sarac.ir.errors import InputError
from sarac.ir.inputs import Inputs, InputSpec, TensorSpec
from sarac.trace import trace

X = torch.ones(2, 6)


@pytest.mark.parametrize(
    ("given_as", "args", "kwargs"),
    [
        (X, 1, []),
        ((X, X), 2, []),
        ([X], 1, []),
        ({"x": X}, 0, ["x"]),
        (BatchEncoding({"input_ids": X}), 0, ["input_ids"]),
        (Inputs((X,), {"y": X}), 1, ["y"]),
    ],
)
def test_inputs_are_taken_as_people_give_them(given_as: Any, args: int, kwargs: list[str]) -> None:
    inputs = Inputs.of(given_as)
    assert (len(inputs.args), list(inputs.kwargs)) == (args, kwargs)
    assert Inputs.of(inputs) is inputs


@pytest.mark.parametrize("odd", [3, "x", object(), {1, 2}, None])
def test_odd_inputs_are_refused(odd: Any) -> None:
    with pytest.raises(InputError, match=rf"type {type(odd).__name__} are not understood: give a tensor, a tuple"):
        Inputs.of(odd)


class Raises(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error, self.linear = error, nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


ERRORS = [
    RuntimeError,
    TypeError,
    ValueError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
    NotImplementedError,
    ZeroDivisionError,
]


@pytest.mark.parametrize("kind", ERRORS)
def test_model_that_rejects_its_inputs_is_told(kind: type[Exception]) -> None:
    with pytest.raises(
        InputError, match=rf"Raises rejects the example inputs \(0: float32\[2, 6\]\): {kind.__name__}: .*odd"
    ) as told:
        trace(Raises(kind("odd")), X)
    assert isinstance(told.value.__cause__, kind)
    assert "Give inputs that" in str(told.value)
    trace(Raises(kind("odd")))


@pytest.mark.parametrize(
    ("model", "given_as", "said"),
    [
        (mlp(6, 5), torch.ones(2, 7), r"Sequential rejects .*float32\[2, 7\].*shapes cannot be multiplied"),
        (mlp(6, 5), {"y": X}, r"y: float32\[2, 6\].*TypeError"),
        (mlp(6, 5), torch.ones(2, 6).double(), r"float64\[2, 6\]"),
        (mlp(6, 5), (), r"\(none\).*TypeError"),
        (mlp(6, 5), (X, X), r"0: float32.*, 1: float32"),
        (bert(), {"input_ids": ids() + 32}, r"input_ids: int64\[2, 5\].*IndexError"),
    ],
)
def test_real_models_reject_with_the_shapes(model: nn.Module, given_as: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        trace(model, given_as)


def test_inputs_that_fit_are_accepted() -> None:
    assert trace(mlp(6, 5), X).whole is not None
    assert Inputs.of(X).call(mlp(6, 5)).shape == (2, 5)


def test_map_reaches_every_tensor_and_nothing_else() -> None:
    inputs = Inputs((X, 3), {"y": X, "flag": True}).map(lambda tensor: tensor * 2)
    assert (inputs.args[0].sum(), inputs.args[1], inputs.kwargs["y"].sum(), inputs.kwargs["flag"]) == (24, 3, 24, True)
    assert X.sum() == 12
    assert Inputs.of(X).to(torch.device("meta")).args[0].is_meta


# Specs.


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("x:float32[2,16]", TensorSpec("x", "float32", (2, 16))),
        ("input_ids:int64[2,16]<49152", TensorSpec("input_ids", "int64", (2, 16), 49152)),
        (" mask:bool[ 2 , 3 ] ", TensorSpec("mask", "bool", (2, 3))),
        ("t:float16[]", TensorSpec("t", "float16", ())),
    ],
)
def test_spec_is_read(text: str, spec: TensorSpec) -> None:
    assert InputSpec.parse([text]).tensors == (spec,)


@pytest.mark.parametrize(
    "text",
    ["x", "x:float32", "x:float31[2]", "x:Tensor[2]", "x:float32[2,a]", "x:float32[-1]", ":float32[2]", "x:int64[2]<0", ""],
)
def test_faulty_spec_is_told(text: str) -> None:
    with pytest.raises(InputError, match=r"write name:dtype\[sizes\], for example x:float32\[2,16\]") as told:
        InputSpec.parse([text])
    assert repr(text) in str(told.value)


DTYPES = ["float32", "float64", "float16", "bfloat16", "int64", "int32", "bool"]
SPECS = st.builds(
    TensorSpec,
    st.sampled_from(["", "x", "input_ids"]),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.none() | st.integers(1, 99),
)


@given(st.lists(SPECS, max_size=3))
def test_spec_survives_json(tensors: list[TensorSpec]) -> None:
    spec = InputSpec(tuple(tensors))
    assert InputSpec.from_json(spec.to_json()) == spec


@given(st.lists(SPECS, max_size=3, unique_by=lambda s: s.name or object()), st.integers(0, 9))
def test_samples_are_as_the_spec_says(tensors: list[TensorSpec], seed: int) -> None:
    spec = InputSpec(tuple(tensors))
    inputs, again = spec.sample(seed=seed), spec.sample(seed=seed)
    args = iter(inputs.args)
    for item in tensors:
        value = inputs.kwargs[item.name] if item.name else next(args)
        assert (tuple(value.shape), value.dtype) == (item.shape, getattr(torch, item.dtype))
        assert item.high is None or value.is_floating_point() or not (value >= max(item.high, 2)).any()
    for one, two in zip([*inputs.args, *inputs.kwargs.values()], [*again.args, *again.kwargs.values()], strict=True):
        assert torch.equal(one, two)


def test_samples_depend_on_the_seed_and_take_other_shapes() -> None:
    spec = InputSpec.parse(["x:float32[2,16]", "ids:int64[2,9]<30"])
    one, two = spec.sample(seed=1), spec.sample({0: (3, 5)}, seed=2)
    assert not torch.equal(one.kwargs["ids"], two.kwargs["ids"])
    assert two.kwargs["x"].shape == (3, 5)
    assert two.kwargs["ids"].shape == (2, 9)
    assert one.kwargs["ids"].unique().numel() > 1


def test_spec_of_inputs_samples_what_the_model_takes() -> None:
    model = bert()
    inputs = Inputs.of({"input_ids": ids(), "attention_mask": torch.ones(2, 5, dtype=torch.long)})
    spec = InputSpec.of(inputs)
    assert [(s.name, s.dtype, s.shape) for s in spec.tensors] == [
        ("input_ids", "int64", (2, 5)),
        ("attention_mask", "int64", (2, 5)),
    ]
    sampled = spec.sample()
    assert (sampled.kwargs["attention_mask"] == 1).all()
    assert sampled.kwargs["input_ids"].max() <= inputs.kwargs["input_ids"].max()
    sampled.call(model)
    assert InputSpec.of(Inputs((X, 3), {"flag": True})).tensors == (TensorSpec("", "float32", (2, 6)),)
