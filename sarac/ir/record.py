"""What a rewritten model remembers of its surgery, and the guard that keeps its saved folder from lying.

`adapted.save_pretrained` writes the base and the adapters; `from_pretrained` would load the base and drop the adapters
with a warning, so the folder's config is marked: loading it any other way than with sarac.load raises a sentence.
"""

import json
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from sarac.ir.layers import adapted
from sarac.ir.plan import Plan

FOLDER_FILE = "sarac.json"
try:
    __version__ = version("sarac")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "unknown"
_SENTENCE = (
    "this folder holds a model with sarac adapters, whose base weights alone would load here: open it with "
    "sarac.load(FOLDER), or save sarac.fold(model) for a plain one"
)


@dataclass(frozen=True)
class Record:
    """The plan that was carried out, which parameters trained before it, and what the model can be rebuilt from."""

    plan: Plan
    trained_before: Mapping[str, bool] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    inputs: str = ""


def record_of(model: nn.Module) -> Record | None:
    """The record of an adapted model, None for a plain one."""
    found = model.__dict__.get("_sarac_record")
    return found if isinstance(found, Record) else None


def attach(model: nn.Module, record: Record) -> None:
    """Remember `record` on the model and guard its `save_pretrained`."""
    model.__dict__["_sarac_record"] = record
    for _, module in model.named_modules():
        if callable(getattr(type(module), "save_pretrained", None)) and any(True for _ in adapted(module)):
            # A bound method, which deepcopy binds to the copy again.
            module.__dict__["save_pretrained"] = types.MethodType(_save_pretrained, module)


def detach(model: nn.Module) -> None:
    """Forget the record and give every module its own `save_pretrained` back."""
    model.__dict__.pop("_sarac_record", None)
    for _, module in model.named_modules():
        found = module.__dict__.get("save_pretrained")
        if isinstance(found, types.MethodType) and found.__func__ is _save_pretrained:
            del module.__dict__["save_pretrained"]


def _save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """The class's own save_pretrained, then the mark and the plan."""
    type(self).save_pretrained(self, save_directory, *args, **kwargs)
    config = Path(save_directory) / "config.json"
    if not config.exists():  # another process than the main one of a distributed run
        return
    entries = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**entries, "transformers_weights": _SENTENCE}, indent=2) + "\n", encoding="utf-8")
    slots = [slot for _, _, state in adapted(self) for slot in state.slots.values()]
    record = record_of(self)
    plan = record.plan if record else Plan({slot.site: slot.adapter for slot in slots})
    plan.save(Path(save_directory) / FOLDER_FILE)
