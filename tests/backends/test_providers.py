"""ONNX Runtime's providers: held to one, never another in silence."""

import ctypes
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
