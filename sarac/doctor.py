"""What this machine can run: versions, ONNX Runtime's providers that really load, CUDA in torch, and what is missing."""

import json
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata

import torch
from rich.table import Table

from sarac.backends.providers import providers
from sarac.ir.record import __version__

_RUNTIMES = ("onnxruntime-gpu", "onnxruntime")  # one program under two names: installed over each other, both break
_PACKAGES = ("torch", "transformers", "onnx", "onnxscript")
_CUDA = "CUDAExecutionProvider"


@dataclass(frozen=True)
class Diagnosis:
    """The versions, providers ("ok" or the reason why not), CUDA devices of torch, and every fault with its remedy."""

    versions: dict[str, str | None]
    providers: dict[str, str]
    cuda: list[str]
    faults: list[tuple[str, str]]

    def to_json(self) -> str:
        """The diagnosis as JSON text."""
        faults = [{"fault": fault, "remedy": remedy} for fault, remedy in self.faults]
        return json.dumps({**asdict(self), "faults": faults}, indent=1)

    @property
    def verdict(self) -> str:
        """What to say where there is no fault."""
        return "Nothing is missing." if self.cuda else "Nothing is missing on this machine without a GPU."

    def table(self) -> Table:
        """The diagnosis as a rich table."""
        table = Table(title="What sarac finds here", title_justify="left", show_header=False)
        for name, version in self.versions.items():
            table.add_row(name, version or "not installed")
        table.add_section()
        for name, state in self.providers.items():
            table.add_row(name, state)
        table.add_row("CUDA in torch", ", ".join(self.cuda) or "no device")
        return table


def diagnose() -> Diagnosis:
    """Look at this machine; nothing is changed, and no fault raises."""
    versions = {"sarac": __version__, "python": platform.python_version()}
    found = {name: _version(name) for name in (*_PACKAGES, *_RUNTIMES)}
    cuda = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    running = providers()
    runtimes = {name: found[name] for name in _RUNTIMES if found[name]}
    named = {**versions, **{name: found[name] for name in _PACKAGES}, **(runtimes or {"onnxruntime": None})}
    return Diagnosis(named, running, cuda, list(_faults(runtimes, running, cuda)))


def _faults(runtimes: dict[str, str | None], running: dict[str, str], cuda: list[str]) -> list[tuple[str, str]]:
    """Every fault with the one command that mends it."""
    faults = []
    gpu = bool(cuda) or shutil.which("nvidia-smi") is not None
    if len(runtimes) > 1:
        remedy = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
        faults.append(("onnxruntime and onnxruntime-gpu are both installed, over each other", remedy))
    if running.get("CPUExecutionProvider") != "ok":
        faults.append(("ONNX Runtime does not run on the CPU", "pip install --force-reinstall onnxruntime"))
    if gpu and not cuda:
        faults.append(("there is a GPU that torch does not see", "pip install --force-reinstall torch"))
    if gpu and _CUDA not in running:
        remedy = "pip uninstall -y onnxruntime && pip install --force-reinstall onnxruntime-gpu"
        faults.append(("this ONNX Runtime is built without CUDA", remedy))
    elif gpu and running[_CUDA] != "ok":
        faults.append((f"ONNX Runtime cannot use the GPU: {running[_CUDA]}", "pip install 'onnxruntime-gpu[cuda,cudnn]'"))
    return faults


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
