"""Torch's memory under ONNX Runtime: no copies, streams in order, buffers that stay where they are."""

import threading
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor
from zoo import same

from sarac.backends.binding import Lane, Port, bind, ports, taken
from sarac.ir.errors import ExportError

HEAD = '<ir_version: 10, opset_import: ["": 20]>'
FIXED = "fixed (float[2, 3] x, int64[2] i, float[0, 3] none) => (float[2, 3] y, bool[2] z, float[0, 3] w)"
FIXED += " { y = Neg(x) k = Cast<to=9>(i) z = Not(k) w = Neg(none) }"
CPU = torch.device("cpu")


@pytest.fixture
def session(tmp_path: Path) -> onnxruntime.InferenceSession:
    onnx.save(onnx.parser.parse_model(f"{HEAD} {FIXED}"), tmp_path / "g.onnx")
    return onnxruntime.InferenceSession(tmp_path / "g.onnx", providers=["CPUExecutionProvider"])


def values(sign: float = 1.0) -> dict[str, Tensor]:
    return {"x": sign * torch.arange(6.0).reshape(2, 3), "i": torch.tensor([0, int(sign > 0)]), "none": torch.empty(0, 3)}


def test_ports_say_what_goes_in_and_out(session) -> None:
    inputs, outputs = ports(session, torch.device("cuda", 1))
    assert inputs["i"] == Port("i", torch.int64, (2,), onnx.TensorProto.INT64, CPU), "this session reads it on the CPU"
    assert outputs["z"].dtype == torch.bool
    assert str(inputs["x"]) == "x: float32[2, 3]"

    class Memory:
        name = "Cuda"

    port = Port.of(session.get_inputs()[0], Memory, torch.device("cuda", 1))
    assert port.device == torch.device("cuda", 1)


def test_a_type_that_torch_has_not_gets_a_sentence(tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(f"{HEAD} t (string[2] x) => (string[2] y) {{ y = Identity(x) }}"), tmp_path / "t.onnx")
    found = onnxruntime.InferenceSession(tmp_path / "t.onnx", providers=["CPUExecutionProvider"])
    with pytest.raises(ExportError, match=r"'x' is of type tensor\(string\), which no torch tensor has"):
        ports(found, CPU)


def test_memory_is_bound_where_it_lies(session) -> None:
    inputs, outputs = ports(session, CPU)
    given, bound = values(), {}
    for name, tensor in given.items():
        memory = bind(lambda *place: bound.update({place[0]: place[1:]}), inputs[name], tensor)
        assert bound[name][:4] == ("cpu", 0, inputs[name].kind, list(tensor.shape))
        assert bound[name][4] == memory.data_ptr() != 0
        assert (memory.data_ptr() == tensor.data_ptr()) == (tensor.numel() > 0)
    binding, out = session.io_binding(), torch.zeros(2, 3)
    held = [bind(binding.bind_input, inputs[name], tensor) for name, tensor in given.items()]
    held.append(bind(binding.bind_output, outputs["y"], out))
    for name in ("z", "w"):
        binding.bind_output(name, "cpu", 0)
    session.run_with_iobinding(binding)
    found = binding.get_outputs()
    flags = taken(outputs["z"], found[1])
    assert flags.data_ptr() == found[1].data_ptr()
    same([out, flags], [-given["x"], torch.tensor([True, False])])
    given["x"].add_(1)
    session.run_with_iobinding(binding)
    same(out, -given["x"])


class Stream:
    """A stream that writes down whom it waits for."""

    def __init__(self, name: str, events: list[str]) -> None:
        self.name, self.events, self.cuda_stream = name, events, 4711

    def wait_stream(self, other: "Stream") -> None:
        self.events.append(f"{self.name} waits for {other.name}")


def test_a_run_comes_between_what_torch_queued_before_and_after(monkeypatch) -> None:
    events: list[str] = []
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("ours", events))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("torch", events))
    lane = Lane(device)
    assert lane.options == {"user_compute_stream": "4711"}
    with lane.ordered():
        events.append("run")
    with pytest.raises(KeyError), lane.ordered():
        raise KeyError
    before, after = "ours waits for torch", "torch waits for ours"
    assert events == [before, "run", after, before, after]
    inside = threading.Event()

    def other() -> None:
        with lane.ordered():
            inside.set()

    with lane.ordered():
        thread = threading.Thread(target=other)
        thread.start()
        assert not inside.wait(0.2), "one run at a time"
    thread.join()
    assert inside.is_set()


def test_a_cpu_has_no_lane() -> None:
    lane = Lane(CPU)
    assert lane.options == {}
    with lane.ordered(), lane.ordered():  # two at once: sessions on the CPU take any number of runs
        pass
