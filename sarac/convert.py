"""An adapter in another form: a model.pt, an adapter file, a PEFT folder. What is written is read again and compared."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from sarac import storage
from sarac.backends import adapter_file, lora, peft
from sarac.checkpoint import Adapters, read_adapter, read_model, tensors_of
from sarac.ir import check
from sarac.ir.errors import CheckFailed, CheckpointError, RewriteError
from sarac.ir.record import record_of
from sarac.shelf import adapters
from sarac.swapping import save_onnx_adapter

Form = Literal["model", "adapter", "peft", "onnx"]


@dataclass(frozen=True)
class Conversion:
    """What was written: its form, how many weights it adapts, a LoRA's rank, and what `max_rank` cut off each change.

    `names` are the model's adapters, the one that was written first; a model.pt has them all.
    """

    out: Path
    form: Form
    sites: int
    rank: int | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    def sentence(self) -> str:
        """The conversion in words."""
        said = {"model": "a model.pt", "adapter": "an adapter file", "peft": f"a LoRA of rank {self.rank}"}.get(
            self.form, "an ONNX Runtime adapter"
        )
        worst = max(self.errors, key=lambda site: self.errors[site], default="")
        cut = self.errors.get(worst, 0.0)
        lost = f"; --max-rank cut off at most {cut:.2%} of a change, at {worst}" if cut else ""
        others = ", ".join(self.names[1:]) if self.form != "model" else ""
        alone = f" of {self.names[0]!r} alone, not {others}," if others else ""
        return f"{self.out}: {said}{alone} with adapters on {self.sites} weights{lost}; read back and verified."


def form_of(path: Path) -> Form:
    """What an adapter's path is: a PEFT folder or an adapter file by what is there, else what holds a whole model."""
    if path.suffix == ".safetensors":
        return "adapter"
    whole = (path / "config.json").exists()  # a transformers folder may have adapters in folders of its own
    return "peft" if (path / lora.CONFIG).exists() or (not whole and any(path.glob(f"*/{lora.CONFIG}"))) else "model"


def form_to_be(path: Path) -> Form:
    """What to write at a path, by its name."""
    suffixes: dict[str, Form] = {".pt": "model", ".pth": "model", ".safetensors": "adapter", ".onnx_adapter": "onnx"}
    return suffixes.get(path.suffix, "peft")


def adapt(base: nn.Module, path: Path, force: bool) -> nn.Module:
    """The base with the adapters of a PEFT folder or an adapter file."""
    return peft.load(base, path) if form_of(path) == "peft" else storage.load_adapter(base, path, force=force)


def convert(model: nn.Module, target: Path, *, layout: str = "padded", max_rank: int | None = None) -> Conversion:
    """Write the adapters of `model` in the form that `target` names; what reads back otherwise is a CheckFailed.

    It is written aside: where anything fails, nothing is left at `target`.
    """
    if record_of(model) is None:
        raise RewriteError(f"{type(model).__name__} carries no adapters: there is none to convert. Transform it first.")
    form, sites = form_to_be(target), tensors_of(model)
    write: dict[Form, Callable[[Path], Conversion]] = {
        "model": lambda aside: _model(model, sites, aside),
        "adapter": lambda aside: _adapter(model, sites, aside),
        "peft": lambda aside: _peft(model, aside, layout, max_rank),
        "onnx": lambda aside: _onnx(model, sites, aside),
    }
    try:
        with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=f".{target.name}.") as aside:
            made = Path(aside) / target.name
            done = write[form](made)
            if target.is_dir():
                target.rmdir()
            made.replace(target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}.") from error
    return Conversion(target, form, len(sites), done.rank, done.errors, adapters(model))


def _model(model: nn.Module, sites: Adapters, path: Path) -> Conversion:
    storage.save(model, path)
    _require_same(sites, read_model(path).adapters)
    return Conversion(path, "model", len(sites))


def _onnx(model: nn.Module, sites: Adapters, path: Path) -> Conversion:
    save_onnx_adapter(model, path)
    found, _, _ = adapter_file.read_adapter(path)
    own = {name: {"": tensor} for name, tensor in found.items()}
    _require_same({name: {"": sites[name.rpartition(".sara_")[0]][name.rpartition(".sara_")[2]]} for name in own}, own)
    return Conversion(path, "onnx", len(sites))


def _adapter(model: nn.Module, sites: Adapters, path: Path) -> Conversion:
    storage.save_adapter(model, path)
    found = read_adapter(path).adapters
    _require_same({site: {role: tensors[role] for role in found[site]} for site, tensors in sites.items()}, found)
    return Conversion(path, "adapter", len(sites))


def _peft(model: nn.Module, path: Path, layout: str, max_rank: int | None) -> Conversion:
    report = peft.save(model, path, layout=layout, max_rank=max_rank)
    for site, lost in peft.lost(model, path).items():
        if not lost <= report.errors[site] + check.gate(torch.float32):
            raise CheckFailed(
                f"The LoRA of {site} reads back {lost:.3g} of its norm away from the adapter, and {report.errors[site]:.3g} was "
                "meant: nothing is left there. Report this with the model's kind."
            )
    return Conversion(path, "peft", len(report.errors), report.rank, report.errors)


def _require_same(ours: Adapters, found: Adapters) -> None:
    for site, tensors in ours.items():
        for role, tensor in tensors.items():
            check.require_identical(found.get(site, {}).get(role), tensor.cpu(), f"The {role} of {site} written and read back")
