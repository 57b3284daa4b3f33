"""What this machine can run: versions, ONNX Runtime's providers that really load, CUDA in torch, and what is missing."""

import json
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata

import torch
from rich.table import Table

from sarac.backends import providers
from sarac.ir.record import __version__

_GPU, _GENAI = "onnxruntime-gpu", "onnxruntime-genai"
_DRIVERS = {12: 525, 13: 580}  # the first drivers that run a CUDA
_PACKAGES = ("torch", "transformers", "onnx", "onnxscript")
_CUDA = "CUDAExecutionProvider"


@dataclass(frozen=True)
class Diagnosis:
    """Versions, providers ("ok" or why not), torch's GPUs, the CUDA of each part, and every fault with its remedy."""

    versions: dict[str, str | None]
    providers: dict[str, str]
    cuda: list[str]
    toolkits: Mapping[str, str | None]
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
        table.add_row("CUDA versions", ", ".join(f"{name} {version or 'none'}" for name, version in self.toolkits.items()))
        table.add_row("CUDA in torch", ", ".join(self.cuda) or "no device")
        return table


def diagnose() -> Diagnosis:
    """Look at this machine; nothing is changed, and no fault raises."""
    versions = {"sarac": __version__, "python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}
    # Every package that brings this folder: they are one program under several names, and the last one installed wins.
    packages = metadata.packages_distributions()
    runtimes, genai = (
        {name: _version(name) for name in sorted(set(packages.get(folder, ())))}
        for folder in ("onnxruntime", "onnxruntime_genai")
    )
    cuda = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    running, toolkits = providers.providers(), providers.cuda_versions()
    faults = [*_overlaid(runtimes, genai), *_faults(running, cuda, toolkits)]
    return Diagnosis({**versions, **(runtimes or {"onnxruntime": None}), **genai}, running, cuda, toolkits, faults)


def _overlaid(runtimes: Mapping[str, str | None], genai: Mapping[str, str | None]) -> Iterator[tuple[str, str]]:
    """A program installed more than once, into one folder, with the command that leaves one of them."""
    kept, why = _GPU if _GPU in runtimes else next(iter(runtimes), ""), ""
    removed, installed = " ".join(runtimes), kept
    fitting = f"{_GENAI}-cuda" if kept == _GPU else _GENAI
    if len(runtimes) > 1:
        if _version(_GENAI) and kept == _GPU:
            removed, installed = f"{removed} {_GENAI}", f"{kept} {fitting}"
            why = f", as {_GENAI} asks for plain onnxruntime"
        yield f"{_listed(runtimes)} are installed over each other{why}", f"pip uninstall -y {removed} && pip install {installed}"
    elif len(genai) > 1:
        yield f"{_listed(genai)} are installed over each other", f"pip uninstall -y {' '.join(genai)} && pip install {fitting}"


def _listed(versions: Mapping[str, str | None]) -> str:
    return " and ".join(f"{name} {version}" for name, version in versions.items())


def _faults(running: Mapping[str, str], cuda: list[str], toolkits: Mapping[str, str | None]) -> Iterator[tuple[str, str]]:
    """Every fault with the one command that mends it."""
    gpu = bool(cuda) or shutil.which("nvidia-smi") is not None
    if running.get("CPUExecutionProvider") != "ok":
        yield "ONNX Runtime does not run on the CPU", "pip install --force-reinstall onnxruntime"
    if not gpu:
        return
    ours, theirs, driver = (_major(toolkits.get(name)) for name in ("onnxruntime", "torch", "driver"))
    if newest := max(ours, theirs) if 0 < driver < max(ours, theirs) else 0:
        who = "ONNX Runtime" if ours == newest else "torch"
        text = f"the driver runs CUDA {toolkits['driver']} at most, and {who} is built for CUDA {newest}"
        yield text, f"sudo apt-get install nvidia-driver-{_DRIVERS.get(newest, max(_DRIVERS.values()))}"
    elif not cuda:
        yield "there is a GPU that torch does not see", "pip install --force-reinstall torch"
    if ours and theirs and ours != theirs:
        text = f"ONNX Runtime is built for CUDA {toolkits['onnxruntime']} and torch for CUDA {toolkits['torch']}"
        yield text, f"pip install --upgrade --force-reinstall {'torch' if theirs < ours else _GPU}"
    if _CUDA not in running:
        yield "this ONNX Runtime is built without CUDA", providers.remedy(built=False)
    elif running[_CUDA] != "ok" and not newest:
        yield f"ONNX Runtime cannot use the GPU: {running[_CUDA]}", providers.remedy(built=True)


def _major(version: str | None) -> int:
    return int(version.partition(".")[0]) if version else 0


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
