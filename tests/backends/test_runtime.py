"""ONNX Runtime: one provider and no other, inputs by name or position, outputs beside torch's."""

import copy
import gc
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor
from zoo import close, differ, same

from sarac.backends.binding import bind
from sarac.backends.graphs import OFTEN, Graphs, settings
from sarac.backends.pairing import paired
from sarac.backends.placement import Placement
from sarac.backends.providers import providers
from sarac.backends.runtime import Runtime
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


# Calling


def test_tensors_by_position_or_name_give_tensors_by_name(opened) -> None:
    runtime = opened(TWO)
    found = runtime(x, y=y)
    assert list(found) == ["difference", "x_twice"]
    same(found, {"difference": x - y, "x_twice": x + x})
    same(runtime(y=y, x=x), found)
    differ(runtime(y, x)["difference"], found["difference"])
    assert found["difference"].device == runtime.device == torch.device("cpu")


def test_contiguous_tensors_are_bound_and_others_copied(opened, monkeypatch) -> None:
    runtime, bound = opened(TWO), {}
    monkeypatch.setattr(
        "sarac.backends.runtime.bind", lambda place, port, t: bound.update({port.name: t}) or bind(place, port, t)
    )
    crosswise = y.t().contiguous().t()
    found = runtime(x, crosswise)
    same(found, {"difference": x - y, "x_twice": x + x})
    assert bound["x"].data_ptr() == x.data_ptr()
    assert bound["y"].data_ptr() != crosswise.data_ptr()


def test_outputs_go_into_the_callers_buffers(opened) -> None:
    runtime, buffer = opened(TWO), torch.zeros(2, 4)
    found = runtime(x, y, out={"difference": buffer})
    assert found["difference"] is buffer
    same(found, {"difference": x - y, "x_twice": x + x})
    runtime(y, x, out={"difference": buffer})
    same(buffer, y - x)
    differ(buffer, x - y)


@pytest.mark.parametrize(
    ("name", "buffer", "sentence"),
    [
        ("differences", torch.zeros(2, 4), r"no output 'differences' to write into `out`\. Near names: difference"),
        ("difference", torch.zeros(3, 4), r"of shape \(3, 4\), .* writes torch\.float32 of shape \(2, 4\) on cpu"),
        ("difference", torch.zeros(2, 4, 1), r"of shape \(2, 4, 1\)"),
        ("difference", torch.zeros(2, 4).double(), r"is torch\.float64"),
        ("difference", torch.zeros(4, 2).t(), r"strides \(1, 2\)"),
        ("difference", torch.zeros(2, 4, device="meta"), "on meta"),
    ],
)
def test_a_buffer_that_does_not_fit_gets_a_sentence(opened, name: str, buffer: Tensor, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        opened(TWO)(x, y, out={name: buffer})


def test_a_buffer_of_unknown_size_is_checked_when_it_is_written(opened) -> None:
    runtime = opened("found (bool[n] x) => (int64[one, m] y) { y = NonZero(x) }")
    flags, buffer = torch.tensor([True, False, True]), torch.zeros(1, 2, dtype=torch.int64)
    same(runtime(flags, out={"y": buffer})["y"], torch.tensor([[0, 2]]))
    with pytest.raises(InputError, match="does not run on these inputs"):
        runtime(flags, out={"y": torch.zeros(1, 3, dtype=torch.int64)})


def test_outputs_outlive_their_runtime_and_each_other(opened) -> None:
    runtime = opened(TWO)
    first = runtime(x, y)["difference"]
    second = runtime(y, x)["difference"]
    del runtime
    gc.collect()
    same([first, second], [x - y, y - x])
    differ(first, second)


def test_one_runtime_serves_threads(opened) -> None:
    runtime = opened(TWO)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: runtime(x + n, y)["difference"], range(32)))
    for n, tensor in enumerate(found):
        same(tensor, x + n - y)
    differ(found[0], found[1])


# Opening, and what is opened


def test_a_runtime_says_what_it_is_and_stays_where_it_is(opened) -> None:
    runtime = opened(TWO)
    assert repr(runtime) == (
        f"<Runtime {runtime.path} on cpu: x: float32[batch, 4], y: float32[batch, 4] -> difference, x_twice>"
    )
    for away in (pickle.dumps, copy.deepcopy):
        with pytest.raises(ExportError, match=r"pickled or copied: open sarac\.Runtime\('.*graph\.onnx', provider='cpu'\)"):
            away(runtime)


def test_threads_are_as_many_as_torch_has_or_as_asked(opened) -> None:
    runtime = opened(TWO)
    assert runtime._session.get_session_options().intra_op_num_threads == torch.get_num_threads()
    other = Runtime(runtime.path, threads=torch.get_num_threads() + 1)
    assert other._session.get_session_options().intra_op_num_threads == torch.get_num_threads() + 1
    same(runtime(x, y), other(x, y))


# CUDA graphs


@pytest.fixture
def on_a_gpu(opened):
    """A runtime that believes its session to be on a GPU; what it decides from there is the same."""

    def opener(graph: str, **changes: object) -> Runtime:
        runtime = opened(graph)
        device = torch.device("cuda", 0)
        runtime.device = device
        runtime._inputs, runtime._outputs = (
            {name: replace(port, device=device) for name, port in some.items()} for some in (runtime._inputs, runtime._outputs)
        )
        for name, value in changes.items():
            setattr(runtime, name, value)
        return runtime

    return opener


def test_a_cuda_graph_needs_a_device_that_does_it_all(opened, on_a_gpu) -> None:
    assert on_a_gpu(FIXED)._uncapturable() == ""
    assert opened(FIXED)._uncapturable().startswith("it runs on the CPU")
    assert on_a_gpu(TWO)._uncapturable() == ""
    assert "2 x LSTM" in on_a_gpu(FIXED, placement=Placement(0, Counter(LSTM=2)))._uncapturable()
    runtime = on_a_gpu(FIXED)
    runtime._inputs = opened(FIXED)._inputs
    assert runtime._uncapturable() == "x lies on the CPU."


def test_the_host_waits_for_the_gpu_only_where_it_has_work_to_do(opened, on_a_gpu) -> None:
    def waits(runtime: Runtime) -> bool:
        try:
            options = settings(wait=runtime._waits())
            return options.get_run_config_entry("disable_synchronize_execution_providers") != "1"
        except RuntimeError:
            return True

    assert not waits(on_a_gpu(TWO))
    assert waits(opened(TWO))
    assert waits(on_a_gpu(TWO, placement=Placement(1)))
    runtime = on_a_gpu(TWO)
    runtime._inputs = opened(TWO)._inputs
    assert waits(runtime)


def test_insisting_on_a_cuda_graph_without_cuda_gets_a_sentence(opened) -> None:
    path = opened(FIXED).path
    with pytest.raises(ExportError, match=r"cannot run as a CUDA graph: it runs on the CPU: open it with provider=\"cuda\""):
        Runtime(path, cuda_graph=True)
    assert Runtime(path, cuda_graph=None)._graphs is Runtime(path, cuda_graph=False)._graphs is None


def test_a_capture_replaces_the_run_and_where_it_fails_the_run_stays(opened, monkeypatch) -> None:
    monkeypatch.setattr(Runtime, "_uncapturable", lambda self: "")
    plain, value = opened(FIXED), torch.randn(2, 3)
    runtime = Runtime(plain.path, cuda_graph=True)
    assert " with CUDA graphs" in repr(runtime)
    same(runtime(value), {"y": -value})
    same(runtime.run(Inputs((value + 1,))), {"y": -value - 1})
    with pytest.raises(InputError, match="does not run on these inputs"):
        runtime(value[:1])
    monkeypatch.setattr("sarac.backends.graphs.Replay", broken)
    with pytest.raises(ExportError, match=r"as a CUDA graph: operation not permitted when stream is capturing\. Leave"):
        Runtime(plain.path, cuda_graph=True)
    session = plain._session
    assert plain._capturing(True, None) is None
    assert plain._session is not session, "a session that was to be captured, and failed at it, is not kept"
    same(plain(value), {"y": -value})


def broken(*_: object) -> None:
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


def graphs_of(runtime: Runtime, often: int = OFTEN) -> Graphs:
    places = (runtime._session, runtime._lane, runtime._inputs, runtime._outputs, runtime.adapters)
    runtime._graphs = Graphs(*places, often)
    return runtime._graphs


def test_shapes_that_come_back_are_captured(opened, monkeypatch) -> None:
    runtime = opened(TWO)
    graphs, plain = graphs_of(runtime), opened(TWO)
    for turn in range(OFTEN):
        for rows in (2, 3):
            given = torch.randn(2, rows, 4)
            same(runtime(*given), plain(*given))
            differ(runtime(*given)["difference"], plain(*given.flip(0))["difference"])
        assert len(graphs._made) == 2 * (2 * turn + 2 >= OFTEN)
    buffer, kept = torch.zeros(2, 4), runtime(x, y)
    found = runtime(y, x, out={"difference": buffer})
    assert found["difference"] is buffer
    same([buffer, kept["difference"]], [y - x, x - y])
    monkeypatch.setattr("sarac.backends.graphs.LARGE", x.nbytes)
    for _ in range(2 * OFTEN):
        runtime(x[:1], y[:1])
        runtime(torch.ones(5, 4), torch.ones(5, 4))
    assert len(graphs._made) == 2, "copying what is large takes longer than launching"


def test_as_many_graphs_as_there_may_be(opened, monkeypatch) -> None:
    monkeypatch.setattr("sarac.backends.graphs.KEPT", 2)
    runtime = opened(TWO)
    graphs = graphs_of(runtime, often=1)
    for rows in range(1, 5):
        same(runtime(torch.ones(rows, 4), torch.zeros(rows, 4))["x_twice"], torch.full((rows, 4), 2.0))
    assert len(graphs._made) == 2


def test_a_capture_that_fails_between_runs_leaves_the_run(opened, monkeypatch) -> None:
    monkeypatch.setattr("sarac.backends.graphs.Replay", broken)
    runtime = opened(TWO)
    graphs_of(runtime)
    for _ in range(OFTEN + 2):
        same(runtime(x, y)["difference"], x - y)
    assert runtime._graphs is None
    graphs_of(runtime, often=1)
    with pytest.raises(ExportError, match="as a CUDA graph: operation not permitted"):
        runtime(x, y)


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
