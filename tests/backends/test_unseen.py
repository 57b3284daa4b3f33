"""Shapes and values that a capture did not see."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from zoo import differ, same

from sarac.backends.runtime import Runtime
from sarac.backends.unseen import dynamic_axes, unseen_inputs
from sarac.ir.inputs import Inputs, InputSpec, TensorSpec

HEAD = '<ir_version: 10, opset_import: ["": 20]>'
TWO = "two (float[batch, 4] x, float[batch, 4] y) => (float[batch, 4] difference, float[batch, 4] x_twice)"
TWO += " { difference = Sub(x, y)  x_twice = Add(x, x) }"
TEXT = "text (int64[b0, length] input_ids, int64[b1, length] attention_mask, int64[b0, length] types) => (int64[m, n] sum)"
TEXT += " { both = Add(input_ids, types)  sum = Mul(both, attention_mask) }"
FIXED = "fixed (float[2, 3] x) => (float[2, 3] y) { y = Neg(x) }"

x, y = torch.arange(8.0).reshape(2, 4), torch.ones(2, 4)


@pytest.fixture
def opened(tmp_path: Path):
    """A session on a graph written in ONNX's own notation."""

    def opener(graph: str) -> Runtime:
        onnx.save(onnx.parser.parse_model(f"{HEAD} {graph}"), tmp_path / "graph.onnx")
        return Runtime(tmp_path / "graph.onnx")

    return opener


def text_inputs(rows: int = 2, columns: int = 8) -> Inputs:
    ids = torch.randint(2, 50, (rows, columns))
    return Inputs((), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "types": torch.zeros_like(ids)})


class Limited(nn.Module):
    """Sums like the graph of TEXT, of at most `longest` tokens."""

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.longest = longest

    def forward(self, input_ids: Tensor, attention_mask: Tensor, types: Tensor) -> Tensor:
        if input_ids.shape[1] > self.longest:
            raise ValueError("too long")
        return (input_ids + types) * attention_mask


def test_free_sizes_are_told_apart_from_fixed_ones(opened) -> None:
    assert dynamic_axes(opened(TEXT)) == {
        "input_ids": ("b0", "length"), "attention_mask": ("b1", "length"), "types": ("b0", "length"),
    }  # fmt: skip
    assert dynamic_axes(opened(TWO)) == {"x": ("batch",), "y": ("batch",)}
    assert dynamic_axes(opened(FIXED)) == {"x": ()}
    assert dynamic_axes(opened("nameless (float[?, 3] x) => (float[?, 3] y) { y = Neg(x) }")) == {"x": ("x.0",)}


def test_unseen_shapes_change_together_and_hold_batch_1_and_more_tokens(opened) -> None:
    captured = text_inputs()
    session = opened(TEXT)
    found = unseen_inputs(InputSpec.of(captured), session, captured, count=4, model=Limited(100))
    shapes = [{tuple(value.shape) for value in inputs.kwargs.values()} for inputs in found]
    assert all(len(shape) == 1 for shape in shapes), "b0 and b1 are one batch, under two names"
    rows, columns = zip(*(shape.pop() for shape in shapes), strict=True)
    assert 1 in rows
    assert 2 not in rows
    assert max(rows) > 2
    assert max(columns) > 8
    assert 8 not in columns
    for inputs in found:
        same(session.run(inputs)["sum"], inputs.call(Limited(100)))


def test_values_stay_in_range_and_masks_stay_masks(opened) -> None:
    captured = text_inputs()
    high = int(captured.kwargs["input_ids"].max()) + 1
    first, second = unseen_inputs(InputSpec.of(captured), opened(TEXT), captured)
    for inputs in (first, second):
        assert 0 <= int(inputs.kwargs["input_ids"].min()) <= int(inputs.kwargs["input_ids"].max()) < high
        assert not inputs.kwargs["types"].any(), "all zero when captured: the model may know no other type"
    assert first.kwargs["attention_mask"].all()
    padded = second.kwargs["attention_mask"]
    assert padded[:-1].all()
    assert padded[-1, 0]
    assert not padded[-1, -1]


def test_masks_of_bools_keep_their_meaning(opened) -> None:
    graph = "masked (float[b, n] x, bool[b, n] padding_mask) => (float[b, n] y) { z = Neg(x)  y = Where(padding_mask, z, x) }"
    for kept in (True, False):
        captured = Inputs((torch.randn(2, 8),), {"padding_mask": torch.full((2, 8), kept)})
        for inputs in unseen_inputs(InputSpec.of(captured), opened(graph), captured):
            assert bool((inputs.kwargs["padding_mask"] == kept).all())


def test_shapes_that_torch_rejects_are_passed_over(opened) -> None:
    captured = text_inputs()
    found = unseen_inputs(InputSpec.of(captured), opened(TEXT), captured, model=Limited(8))
    assert len(found) == 2
    assert all(inputs.kwargs["input_ids"].shape[1] < 8 for inputs in found)
    longer = unseen_inputs(InputSpec.of(captured), opened(TEXT), captured, model=Limited(100))
    assert all(inputs.kwargs["input_ids"].shape[1] > 8 for inputs in longer)


def test_fixed_shapes_get_other_values(opened) -> None:
    captured = Inputs((torch.randn(1, 3),))  # one row was given, and two were captured
    first, second = unseen_inputs(InputSpec.of(captured), opened(FIXED), captured)
    assert first.args[0].shape == second.args[0].shape == (2, 3)
    differ(first.args[0], second.args[0])


def test_sizes_in_a_formula_stay_as_captured(opened) -> None:
    graph = onnx.parser.parse_model(
        f"{HEAD} f (float[b, n] x, float[b, m] twice) => (float[b, k] y) {{ y = Concat<axis=1>(x, twice) }}"
    )
    graph.graph.input[1].type.tensor_type.shape.dim[1].dim_param = "2*n"
    session = opened(TWO)
    onnx.save(graph, session.path)
    captured = Inputs((torch.randn(2, 3), torch.randn(2, 6)))
    for inputs in unseen_inputs(InputSpec.of(captured), Runtime(session.path), captured):
        assert [tensor.shape[1] for tensor in inputs.args] == [3, 6]
        assert inputs.args[0].shape[0] == inputs.args[1].shape[0] != 2


def test_what_is_no_tensor_keeps_its_place(opened) -> None:
    captured = Inputs((x, None, y), {"flag": True})
    spec = InputSpec((TensorSpec("", "float32", (2, 4)), TensorSpec("", "float32", (2, 4))))
    found = unseen_inputs(spec, opened(TWO), captured)
    assert [value is None for value in found[0].args] == [False, True, False]
    assert found[0].kwargs == {"flag": True}
    assert found[0].args[0].shape[0] != 2
