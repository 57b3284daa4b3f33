"""ONNX Runtime's providers: what of it loads on this machine, sessions held to one provider, and the reasons why not."""

import contextlib
import ctypes
import functools
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

from sarac.ir.errors import ExportError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

_WARNING, _QUIET = 2, 4  # fatal alone: what goes wrong is raised, and would else stand on stderr as well


@dataclass(frozen=True)
class Start:
    """A session on one provider and what ONNX Runtime logged meanwhile; or None, the reason why, and what to do, if known."""

    session: Any
    reason: str = ""
    remedy: str = ""
    log: str = ""


def providers() -> dict[str, str]:
    """For every provider that this ONNX Runtime lists: "ok" where a session on it runs, else the reason why not."""
    tiny = '<ir_version: 10, opset_import: ["": 20]> tiny (float[1, 1] x) => (float[1, 1] y) { y = MatMul(x, x) }'
    model = onnx.parser.parse_model(tiny).SerializeToString()
    return {name: started(model, name).reason or "ok" for name in onnxruntime.get_available_providers()}


def cuda_versions() -> dict[str, str | None]:
    """The CUDA versions that meet on this machine: ONNX Runtime's and torch's, and the newest that the driver can run."""
    version = ctypes.c_int()
    with contextlib.suppress(OSError, AttributeError):  # no driver, or a library of that name which is none
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    driver = f"{version.value // 1000}.{version.value % 1000 // 10}" if version.value else None
    return {"onnxruntime": onnxruntime.cuda_version or None, "torch": torch.version.cuda, "driver": driver}


def remedy(built: bool) -> str:
    """The one command that brings the libraries of the CUDA provider, and the provider too where it is not built in."""
    install = "pip install 'onnxruntime-gpu[cuda,cudnn]'"
    other = f"pip uninstall -y {onnxruntime.package_name} && "
    return install if built else f"{other}{install.replace('install', 'install --force-reinstall', 1)}"


def require(provider: str) -> None:
    """ExportError for a provider by its short name that is none, or whose libraries are not here: before the work, not after."""
    if provider not in PROVIDERS:
        raise ExportError(f"There is no provider {provider!r}: give one of {', '.join(PROVIDERS)}.")
    if missing := unloadable(PROVIDERS[provider]):
        raise ExportError(f"ONNX Runtime cannot run on {provider} here: {missing} {_bring(PROVIDERS[provider])}")


def started(model: str | bytes, provider: str, options: Mapping[str, str] | None = None, threads: int | None = None) -> Start:
    """A session on this very provider with its options, on `threads` CPU threads (as many as torch has)."""
    if missing := unloadable(provider):
        return Start(None, missing, _bring(provider))
    settings, beside = onnxruntime.SessionOptions(), provider != PROVIDERS["cpu"]
    settings.log_severity_level = _WARNING if beside else _QUIET  # a warning alone tells how many copies were put in
    settings.intra_op_num_threads = threads or torch.get_num_threads()  # the cores that torch was given, and no more
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", str(int(beside)))
    try:
        with _logged() if beside else contextlib.nullcontext(io.BytesIO()) as log:
            chosen = [(provider, dict(options or {}))]
            session = onnxruntime.InferenceSession(model, settings, providers=chosen, enable_fallback=0)
            log.seek(0)
            said = log.read().decode(errors="replace")
    except Exception as error:  # noqa: BLE001 - the caller says it, as a sentence or as a line of a report
        return Start(None, reason(error))
    # Where a provider cannot start, ONNX Runtime takes the CPU instead and raises nothing.
    first = session.get_providers()[0]
    return Start(session, log=said) if first == provider else Start(None, f"ONNX Runtime fell back to {first}.")


def unloadable(provider: str) -> str:
    """Why the provider's library cannot be loaded, by the name of what is missing; "" if it can, or is built in."""
    if provider not in onnxruntime.get_available_providers():
        package, version = onnxruntime.package_name, onnxruntime.__version__
        return f"this build of ONNX Runtime has no {provider} ({package} {version})."
    folder, short = Path(onnxruntime.__file__).parent / "capi", provider.removesuffix("ExecutionProvider").lower()
    try:
        for library in folder.glob(f"*_providers_{short}.*"):
            _preload()
            for path in (*folder.glob("*_providers_shared.*"), library):
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except (OSError, RuntimeError) as error:
        return reason(error)
    return ""


def _bring(provider: str) -> str:
    command = remedy(provider in onnxruntime.get_available_providers())
    return f"What it needs comes with `{command}`; `sarac doctor` shows what else is missing."


def reason(error: Exception) -> str:
    """The first line of what ONNX Runtime says, as a sentence."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error)).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".") + "."


@functools.cache
def _preload() -> None:
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it misses; loading the provider says the same
        onnxruntime.preload_dlls()


@contextlib.contextmanager
def _logged() -> Iterator[Any]:
    """A file that takes what is written to the process's standard error: ONNX Runtime logs past Python, and nowhere else."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # a process may have none
        sys.stderr.flush()
    with tempfile.TemporaryFile() as file, contextlib.ExitStack() as after:
        with contextlib.suppress(OSError):
            kept = os.dup(2)
            after.callback(os.close, kept)
            after.callback(os.dup2, kept, 2)
            os.dup2(file.fileno(), 2)
        yield file
