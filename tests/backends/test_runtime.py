"""ONNX Runtime: one provider and no other, inputs by name or position, outputs beside torch's."""

from pathlib import Path

import onnx
import pytest
import torch
from zoo import close, differ, same

from sarac.backends.providers import providers
from sarac.backends.runtime import Runtime, paired
from sarac.ir.errors import ExportError, InputError
from sarac.ir.inputs import Inputs

HEAD = '<ir_version: 10, opset_import: ["": 20]>'
TWO = "two (float[batch, 4] x, float[batch, 4] y) => (float[batch, 4] difference, float[batch, 4] x_twice)"
TWO += " { difference = Sub(x, y)  x_twice = Add(x, x) }"
FIXED = "fixed (float[2, 3] x) => (float[2, 3] y) { y = Neg(x) }"

x, y = torch.arange(8.0).reshape(2, 4), torch.ones(2, 4)


@pytest.fixture
def opened(tmp_path: Path):
    """A session on a graph written in ONNX's own notation."""

    def opener(graph: str) -> Runtime:
        onnx.save(onnx.parser.parse_model(f"{HEAD} {graph}"), tmp_path / "graph.onnx")
        return Runtime(tmp_path / "graph.onnx")

    return opener


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
        Runtime(tmp_path / "none.onnx")
    for name in ("half", "text"):
        with pytest.raises(ExportError, match=rf"{name}\.onnx cannot run on cpu: .*export a damaged file again"):
            Runtime(tmp_path / f"{name}.onnx")
    assert capfd.readouterr() == ("", "")


def test_a_dtype_without_kernels_gets_a_sentence(opened) -> None:
    with pytest.raises(ExportError, match=r"cannot run on cpu: .*MatMul.*bfloat16 on a CPU"):
        opened("half (bfloat16[2, 2] x) => (bfloat16[2, 2] y) { y = MatMul(x, x) }")


def test_a_provider_is_taken_at_its_word(opened, tmp_path: Path, capfd) -> None:
    opened(TWO)
    with pytest.raises(ExportError, match="no provider 'gpu': give one of cpu, cuda"):
        Runtime(tmp_path / "graph.onnx", "gpu")
    if providers().get("CUDAExecutionProvider") == "ok":
        session = Runtime(tmp_path / "graph.onnx", "cuda")
        close(session.run(Inputs((x, y)))["difference"], x - y)
        return
    with pytest.raises(ExportError, match=r"cannot run on cuda: (lib\w+\.so|this build of ONNX Runtime has no CUDA)"):
        Runtime(tmp_path / "graph.onnx", "cuda")
    assert capfd.readouterr() == ("", "")


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
