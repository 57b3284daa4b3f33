"""ONNX Runtime's providers: what of it loads on this machine, sessions held to one provider, and the reasons why not."""

import contextlib
import ctypes
import functools
import io
import re
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

_QUIET = 4  # fatal alone: what goes wrong is raised, and would else stand on stderr as well


def providers() -> dict[str, str]:
    """For every provider that this ONNX Runtime lists: "ok" where a session on it runs, else the reason why not."""
    tiny = '<ir_version: 10, opset_import: ["": 20]> tiny (float[1, 1] x) => (float[1, 1] y) { y = MatMul(x, x) }'
    model = onnx.parser.parse_model(tiny).SerializeToString()
    return {name: started(model, name)[1] or "ok" for name in onnxruntime.get_available_providers()}


def started(model: str | bytes, provider: str) -> tuple[Any, str]:
    """A session on this very provider and "", or None and the reason why there is none."""
    try:
        if missing := _unloadable(provider):
            return None, missing
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _QUIET
        options.intra_op_num_threads = torch.get_num_threads()  # the cores that torch was given, and no more
        session = onnxruntime.InferenceSession(model, options, providers=[provider], enable_fallback=0)
    except Exception as error:  # noqa: BLE001 - the caller says it, as a sentence or as a line of a report
        return None, reason(error)
    # Where a provider cannot start, ONNX Runtime takes the CPU instead and raises nothing.
    first = session.get_providers()[0]
    return (session, "") if first == provider else (None, f"ONNX Runtime fell back to {first}.")


def _unloadable(provider: str) -> str:
    """Why the provider's library cannot be loaded; "" if it can, or is built in."""
    if provider not in onnxruntime.get_available_providers():
        return f"this build of ONNX Runtime has no {provider}."
    folder, short = Path(onnxruntime.__file__).parent / "capi", provider.removesuffix("ExecutionProvider").lower()
    try:
        for library in folder.glob(f"*_providers_{short}.*"):
            _preload()
            for path in (*folder.glob("*_providers_shared.*"), library):
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return reason(error)
    return ""


@functools.cache
def _preload() -> None:
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it misses; loading the provider says the same
        onnxruntime.preload_dlls()


def reason(error: Exception) -> str:
    """The first line of what ONNX Runtime says, as a sentence."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error)).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".") + "."
