"""ONNX Runtime's providers: held to one, never another in silence."""

import ctypes
import os
from pathlib import Path

import onnx
import onnxruntime
import pytest

from sarac.backends import providers
from sarac.backends.runtime import Runtime
from sarac.ir.errors import ExportError

FIXED = '<ir_version: 10, opset_import: ["": 20]> fixed (float[2, 3] x) => (float[2, 3] y) { y = Neg(x) }'


def test_a_silent_fallback_is_an_error(tmp_path: Path, monkeypatch) -> None:
    onnx.save(onnx.parser.parse_model(FIXED), tmp_path / "graph.onnx")
    monkeypatch.setattr(providers, "unloadable", lambda provider: "")
    fallen = onnxruntime.InferenceSession(tmp_path / "graph.onnx", providers=["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: fallen)
    with pytest.raises(ExportError, match="fell back to CPUExecutionProvider"):
        Runtime(tmp_path / "graph.onnx", "cuda")
    Runtime(tmp_path / "graph.onnx", "cpu")


def test_providers_says_what_loads_and_why_the_rest_does_not(monkeypatch, capfd) -> None:
    found = providers.providers()
    assert set(found) == set(onnxruntime.get_available_providers())
    assert found["CPUExecutionProvider"] == "ok"
    assert all(reason and "\n" not in reason for reason in found.values())

    def broken(*_: object, **__: object) -> None:
        raise OSError("libcudart.so.13: cannot open\nmore")

    monkeypatch.setattr(ctypes, "CDLL", broken)
    monkeypatch.setattr(onnxruntime, "InferenceSession", broken)
    assert set(providers.providers().values()) == {"libcudart.so.13: cannot open."}
    assert capfd.readouterr() == ("", "")


def test_a_missing_library_is_named_with_the_command_that_brings_it(tmp_path: Path, monkeypatch) -> None:
    onnx.save(onnx.parser.parse_model(FIXED), tmp_path / "graph.onnx")
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(providers.Path, "glob", lambda self, pattern: [self / "lib.so"])

    def broken(*_: object, **__: object) -> None:
        raise OSError("libcudnn.so.9: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(ctypes, "CDLL", broken)
    with pytest.raises(ExportError, match=r"on cuda: libcudnn\.so\.9: .* `pip install 'onnxruntime-gpu\[cuda,cudnn\]'`"):
        Runtime(tmp_path / "graph.onnx", "cuda")
    available.remove("CUDAExecutionProvider")
    with pytest.raises(ExportError, match=r"ONNX Runtime has no CUDA.*`pip uninstall -y onnxruntime.* --force-reinstall"):
        Runtime(tmp_path / "graph.onnx", "cuda")


class Fake:
    """A session on CUDA, of which ONNX Runtime has something to say."""

    def __init__(self, *_: object, providers: list[tuple[str, dict[str, str]]], **__: object) -> None:
        self.given = providers
        os.write(2, b"[W] 12 Memcpy nodes are added to the graph main_graph for CUDAExecutionProvider.\n")

    def get_providers(self) -> list[str]:
        return [name for name, _ in self.given]


def test_what_is_logged_is_kept_from_the_terminal(monkeypatch, capfd) -> None:
    monkeypatch.setattr(providers, "unloadable", lambda provider: "")
    monkeypatch.setattr(onnxruntime, "InferenceSession", Fake)
    start = providers.started(b"", "CUDAExecutionProvider", {"device_id": "1"})
    assert start.log.startswith("[W] 12 Memcpy nodes")
    assert start.session.given == [("CUDAExecutionProvider", {"device_id": "1"})]
    assert capfd.readouterr() == ("", "")
    assert providers.started(b"", "CPUExecutionProvider").log == ""
    assert "12 Memcpy nodes" in capfd.readouterr().err, "the CPU's sessions are told to be quiet: nothing is caught"
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: 1 / 0)
    assert providers.started(b"", "CUDAExecutionProvider").reason == "division by zero."
    os.write(2, b"back")
    assert capfd.readouterr().err == "back"


def test_the_driver_says_which_cuda_it_runs(monkeypatch) -> None:
    class Driver:
        def cuDriverGetVersion(self, place: object) -> int:  # noqa: N802
            place._obj.value = 12080
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert providers.cuda_versions()["driver"] == "12.8"

    def none(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", none)
    assert providers.cuda_versions()["driver"] is None
