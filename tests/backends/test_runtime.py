"""ONNX Runtime: one provider and no other, inputs by name or position, shapes that the capture did not see."""

import ctypes
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from zoo import close, differ, same

from sarac.backends import runtime
from sarac.backends.runtime import Session, dynamic_axes, paired, providers, unseen_inputs
from sarac.ir.errors import ExportError, InputError
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

    def opener(graph: str) -> Session:
        onnx.save(onnx.parser.parse_model(f"{HEAD} {graph}"), tmp_path / "graph.onnx")
        return Session(tmp_path / "graph.onnx")

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


# Running


@pytest.mark.parametrize("inputs", [Inputs((x, y)), Inputs((), {"y": y, "x": x}), Inputs((y,), {"x": x}), Inputs((x,), {"y": y})])
def test_arguments_go_by_position_and_keywords_by_name(opened, inputs: Inputs) -> None:
    session = opened(TWO)
    found = session.run(inputs)
    assert list(found) == list(session.outputs) == ["difference", "x_twice"]
    same(found, {"difference": x - y, "x_twice": x + x})
    differ(session.run(Inputs((y, x)))["difference"], x - y)


@pytest.mark.parametrize("name", "float16 float32 float64 bfloat16 int64 int32 uint8 bool".split())
def test_every_dtype_comes_back(opened, name: str) -> None:
    kind = {"float32": "float", "float64": "double"}.get(name, name)
    session = opened(f"copy ({kind}[n, 2] x, {kind} z) => ({kind}[n, 2] y, {kind} w) {{ y = Identity(x)  w = Identity(z) }}")
    value = torch.tensor([[0.0, 1.0], [3.0, 0.0]]).to(getattr(torch, name))
    for tensor in (value, value.t(), value[:0]):
        found = session.run(Inputs((tensor, value[0, 1])))
        assert found["y"].dtype == tensor.dtype
        same(found, {"y": tensor, "w": value[0, 1]})


def test_an_input_that_requires_grad_is_taken(opened) -> None:
    same(opened(FIXED).run(Inputs((torch.ones(2, 3, requires_grad=True),)))["y"], -torch.ones(2, 3))


def test_nested_inputs_go_by_their_paths(opened) -> None:
    session = opened("nested (float[2] batch_a, float[2] batch_b) => (float[2] y) { y = Sub(batch_a, batch_b) }")
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 7.0])
    for inputs in (Inputs((), {"batch": {"b": b, "a": a}}), Inputs(({"a": a, "b": b},)), Inputs(([a, b],))):
        same(session.run(inputs)["y"], a - b)


def test_constants_are_left_out_silently_and_unknown_tensors_with_a_warning(opened, recwarn) -> None:
    session = opened(FIXED)
    value = torch.ones(2, 3)
    same(session.run(Inputs((), {"x": value, "use_cache": False, "labels": None}))["y"], -value)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="captured without labels"):
        same(session.run(Inputs((), {"x": value, "labels": value}))["y"], -value)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        (Inputs((x,)), r"needs the input 'y', and got x\. Its inputs are x: float32\[batch, 4\], y: float32\[batch, 4\]\."),
        (Inputs((), {"x": x, "yy": y}), r"needs the input 'y', and got x, yy\. Near names: yy\."),
        (Inputs(()), "needs the input 'x', and got none"),
        (Inputs((x, y.int())), r"'y' is torch\.int32 of shape \(2, 4\): convert it, for example with \.to\(torch\.float32\)"),
        (Inputs((x, y[0])), r"'y' is torch\.float32 of shape \(4,\)"),
        (Inputs((x[:, :3], y)), r"does not run on these inputs \(0: float32\[2, 3\], 1: float32\[2, 4\]\)"),
    ],
)
def test_inputs_that_do_not_fit_get_a_sentence(opened, capfd, inputs: Inputs, sentence: str) -> None:
    session = opened(TWO)
    with pytest.raises(InputError, match=sentence):
        session.run(inputs)
    session.run(Inputs((x, y)))
    assert capfd.readouterr() == ("", "")


# Opening


def test_a_file_that_is_not_there_or_broken_gets_a_sentence(tmp_path: Path, opened, capfd) -> None:
    opened(TWO)
    whole = (tmp_path / "graph.onnx").read_bytes()
    (tmp_path / "half.onnx").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.onnx").write_text("no model at all")
    with pytest.raises(ExportError, match="There is no ONNX file at"):
        Session(tmp_path / "none.onnx")
    for name in ("half", "text"):
        with pytest.raises(ExportError, match=rf"{name}\.onnx cannot run on cpu: .*export a damaged file again"):
            Session(tmp_path / f"{name}.onnx")
    assert capfd.readouterr() == ("", "")


def test_a_dtype_without_kernels_gets_a_sentence(opened) -> None:
    with pytest.raises(ExportError, match=r"cannot run on cpu: .*MatMul.*bfloat16 on a CPU"):
        opened("half (bfloat16[2, 2] x) => (bfloat16[2, 2] y) { y = MatMul(x, x) }")


def test_a_provider_is_taken_at_its_word(opened, tmp_path: Path, capfd) -> None:
    opened(TWO)
    with pytest.raises(ExportError, match="no provider 'gpu': give one of cpu, cuda"):
        Session(tmp_path / "graph.onnx", "gpu")
    if providers().get("CUDAExecutionProvider") == "ok":
        session = Session(tmp_path / "graph.onnx", "cuda")
        close(session.run(Inputs((x, y)))["difference"], x - y)
        return
    with pytest.raises(ExportError, match=r"cannot run on cuda: (lib\w+\.so|this build of ONNX Runtime has no CUDA)"):
        Session(tmp_path / "graph.onnx", "cuda")
    assert capfd.readouterr() == ("", "")


def test_a_silent_fallback_is_an_error(opened, tmp_path: Path, monkeypatch) -> None:
    opened(TWO)
    monkeypatch.setattr(runtime, "_unloadable", lambda provider: "")
    monkeypatch.setattr(runtime, "PROVIDERS", {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"})
    fallen = onnxruntime.InferenceSession(tmp_path / "graph.onnx", providers=["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: fallen)
    with pytest.raises(ExportError, match="fell back to CPUExecutionProvider"):
        Session(tmp_path / "graph.onnx", "cuda")
    Session(tmp_path / "graph.onnx", "cpu")


def test_providers_says_what_loads_and_why_the_rest_does_not(monkeypatch, capfd) -> None:
    found = providers()
    assert set(found) == set(onnxruntime.get_available_providers())
    assert found["CPUExecutionProvider"] == "ok"
    assert all(reason and "\n" not in reason for reason in found.values())

    def broken(*_: object, **__: object) -> None:
        raise OSError("libcudart.so.13: cannot open\nmore")

    monkeypatch.setattr(ctypes, "CDLL", broken)
    monkeypatch.setattr(onnxruntime, "InferenceSession", broken)
    assert set(providers().values()) == {"libcudart.so.13: cannot open."}
    assert capfd.readouterr() == ("", "")


# Unseen shapes


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
    for inputs in unseen_inputs(InputSpec.of(captured), Session(session.path), captured):
        assert [tensor.shape[1] for tensor in inputs.args] == [3, 6]
        assert inputs.args[0].shape[0] == inputs.args[1].shape[0] != 2


def test_what_is_no_tensor_keeps_its_place(opened) -> None:
    captured = Inputs((x, None, y), {"flag": True})
    spec = InputSpec((TensorSpec("", "float32", (2, 4)), TensorSpec("", "float32", (2, 4))))
    found = unseen_inputs(spec, opened(TWO), captured)
    assert [value is None for value in found[0].args] == [False, True, False]
    assert found[0].kwargs == {"flag": True}
    assert found[0].args[0].shape[0] != 2


# Outputs


class Cache:
    """Something that no output of a graph stands for."""


def test_outputs_are_paired_by_name_then_by_order() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    for reference in (
        {"a": a, "b": b},
        {"b": b, "a": a, "past_key_values": Cache(), "none": None},
        {"a": a, "b": b, "past_key_values": (x, y)},
    ):
        same(*paired({"b": b, "a": a}, reference))
    same(*paired({"linear": a, "relu": b}, (a, None, b)))
    same(*paired({"output.a": a, "b": b}, {"a": a, "b": b}))
    same(*paired({"0": a, "1.0": b}, [a, [b]]))
    same(*paired({"output": a}, a))
    differ(*paired({"b": a, "a": b}, {"a": a, "b": b}))


def test_outputs_that_have_no_counterpart_get_a_sentence() -> None:
    a = torch.zeros(1)
    with pytest.raises(ExportError, match=r"gives 1 outputs \(logits\) and torch 2 \(logits, hidden\)"):
        paired({"logits": a}, {"logits": a, "hidden": a})
    with pytest.raises(ExportError, match="gives 2 outputs"):
        paired({"logits": a, "loss": a}, {"logits": a})
