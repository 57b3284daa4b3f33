"""What a model remembers of its surgery and its inputs, and the guards that keep it from failing in silence.

`adapted.save_pretrained` writes the base and the adapters; `from_pretrained` would load the base and drop the adapters
with a warning, so the folder is guarded twice. Its config is marked: `from_pretrained` raises a sentence. And where
another config is given, the weights' file itself does not fit: the adapted base weights lie flat in it, (out · in,) instead of
(out, in). Who loads into the adapted model (transformers' Trainer, load_state_dict, sarac.load) gets them back in shape.
"""

import inspect
import json
import math
import re
import types
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sarac.ir.adapters import Adapter
from sarac.ir.errors import RewriteError, SaracWarning
from sarac.ir.layers import adapted
from sarac.ir.plan import Plan

FOLDER_FILE = "sarac.json"
FOLDER_MARK = "transformers_weights"  # the config's entry that from_pretrained takes for the name of the weights' file
# A rate this many times below the recommended one hardly moves a relative shift in a usual run.
TOO_LOW = 10.0
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
    """The plan that was carried out, which parameters trained before it, and what those that train whole were then."""

    plan: Plan
    trained_before: Mapping[str, bool] = field(default_factory=dict)
    originals: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)


@dataclass(eq=False)
class Frozen:
    """What does not train of one or more adapters (U, s, V), by site and role; None while the live parameters hold it."""

    tensors: dict[str, dict[str, Tensor]] | None = None


@dataclass
class Shelved:
    """An adapter that is not live: what trains of it by site and role, parameters trained whole, and the rest of it."""

    trained: dict[str, dict[str, Tensor]]
    further: dict[str, Tensor]
    frozen: Frozen


@dataclass
class Shelf:
    """The adapters of a model by name: which one its parameters hold, and the others."""

    active: str = "default"
    live: Frozen = field(default_factory=Frozen)
    others: dict[str, Shelved] = field(default_factory=dict)


def shelf_of(model: nn.Module) -> Shelf:
    """The shelf of an adapted model, made where it has none; copies of the model have it too, state dicts do not."""
    shelf: Shelf = model.__dict__.setdefault("_sarac_shelf", Shelf())
    return shelf


def record_of(model: nn.Module) -> Record | None:
    """The record of an adapted model, None for a plain one."""
    found = model.__dict__.get("_sarac_record")
    return found if isinstance(found, Record) else None


def keep_originals(model: nn.Module, originals: Mapping[str, torch.Tensor]) -> None:
    """Let an adapted model take these for the base values of what trains whole; none where they are not known."""
    model.__dict__["_sarac_record"] = replace(model.__dict__["_sarac_record"], originals=originals)


def inputs_of(model: nn.Module) -> str:
    """The JSON of the input spec that a model keeps, adapted or plain; "" where it has none."""
    return str(model.__dict__.get("_sarac_inputs", ""))


def keep_inputs(model: nn.Module, spec: str) -> None:
    """Let a model keep the JSON of its input spec: copies, transformed and folded ones have it too."""
    model.__dict__["_sarac_inputs"] = spec


def require_whole(model: nn.Module, what: str) -> None:
    """Raise RewriteError where a part or a wrapper of an adapted model is given: only the model itself knows its plan."""
    if record_of(model) is not None or not any(True for _ in adapted(model)):
        return
    inner = next((path for path, module in model.named_modules() if record_of(module) is not None), "")
    place = f"the adapted model in it, `.{inner}`" if inner else "the whole model that sarac.transform gave"
    raise RewriteError(
        f"This {type(model).__name__} carries adapters, but is not the model that was transformed: {what} {place}."
    )


def attach(model: nn.Module, record: Record) -> None:
    """Remember `record` on the model, guard its `save_pretrained` and watch the rates of the optimisers to come."""
    _watch_learning_rates()
    model.__dict__["_sarac_record"] = record
    for _, module in model.named_modules():
        if callable(getattr(type(module), "save_pretrained", None)) and any(True for _ in adapted(module)):
            # A bound method, which deepcopy binds to the copy again.
            module.__dict__["save_pretrained"] = types.MethodType(_save_pretrained, module)


def detach(model: nn.Module) -> None:
    """Forget the record and the shelf, and give every module its own `save_pretrained` back."""
    model.__dict__.pop("_sarac_record", None)
    model.__dict__.pop("_sarac_shelf", None)
    for _, module in model.named_modules():
        found = module.__dict__.get("save_pretrained")
        if isinstance(found, types.MethodType) and found.__func__ is _save_pretrained:
            del module.__dict__["save_pretrained"]


def weight_files(folder: Path) -> list[Path]:
    """The files in which save_pretrained leaves a model's weights: one, or numbered shards."""
    return sorted(path for path in folder.glob("model*.safetensors") if re.fullmatch(r"model(-\d+-of-\d+)?", path.stem))


def _save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """The class's own save_pretrained, then the marks and the plan; an upload comes after them."""
    bound = inspect.signature(type(self).save_pretrained).bind(self, save_directory, *args, **kwargs)
    given, folder = bound.arguments, Path(save_directory)
    if given.get("variant") is not None:
        raise RewriteError("A folder holds one adapted model, so its weights have no variant: save into another folder.")
    upload = bool(given.pop("push_to_hub", False))
    # The names of the model itself: in those of an older format the marks and sarac.load would not find the weights.
    if "save_original_format" in inspect.signature(type(self).save_pretrained).parameters:
        given["save_original_format"] = False
    writes = getattr(self, "should_save_on_this_rank", bool)(given.get("is_main_process", True))
    if writes:  # what is left of another save would be taken for weights of this one
        for file in (*weight_files(folder), folder / "model.safetensors.index.json"):
            file.unlink(missing_ok=True)
    twice = _second_names(self)
    if twice:  # transformers knows which weights of its own are tied, and refuses others that share memory
        state = given.get("state_dict") or self.state_dict()
        given["state_dict"] = {name: tensor for name, tensor in state.items() if name not in twice}
    type(self).save_pretrained(*bound.args, **bound.kwargs)
    if writes:
        _mark(self, folder)
    if writes and upload:
        asked = {name: given[name] for name in ("token", "max_shard_size") if name in given}
        self.push_to_hub(**{"repo_id": folder.name, **given.get("kwargs", {}), **asked})


def _second_names(model: nn.Module) -> set[str]:
    """The further names of adapters' tensors that several modules share, as those of tied weights."""
    seen: dict[int, str] = {}
    names = {
        f"{path}.{slot.attribute(role)}": tensor
        for path, module, state in adapted(model)
        for slot in state.slots.values()
        for role, tensor in slot.tensors(module).items()
    }
    return {name for name, tensor in names.items() if seen.setdefault(id(tensor), name) != name}


def _mark(model: nn.Module, folder: Path) -> None:
    """Mark the folder of an adapted model, or of a part of one, which names its weights from itself on."""
    config, record, names = folder / "config.json", record_of(model), dict[str, str]()
    entries = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**entries, FOLDER_MARK: _SENTENCE}, indent=2) + "\n", encoding="utf-8")
    slots = [(f"{path}.{slot.param}" if path else slot.param, slot) for path, _, s in adapted(model) for slot in s.slots.values()]
    for file in weight_files(folder):
        _flatten(file, {name for name, _ in slots})
    for name, slot in slots:
        names.setdefault(slot.site, name)
    plan = record.plan if record else Plan({names[slot.site]: _renamed(slot.adapter, names) for _, slot in slots})
    plan.save(folder / FOLDER_FILE)
    shelf = model.__dict__.get("_sarac_shelf", Shelf())
    if shelf.others:
        warnings.warn(
            f"The folder holds the live adapter {shelf.active!r} alone, not {', '.join(shelf.others)}: sarac.save writes "
            "all, and sarac.save_adapter(model, path, name=…) any one.",
            SaracWarning,
            stacklevel=3,
        )


def _renamed(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    """The adapter, whose router's owner goes by its name in a part of the model."""
    return replace(adapter, router_of=names[adapter.router_of]) if adapter.router_of else adapter  # type: ignore[type-var]


def _flatten(file: Path, names: set[str]) -> None:
    """Let these tensors of a safetensors file lie flat: its header is rewritten in place, the data stays where it is."""
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        for name in names.intersection(header):
            header[name]["shape"] = [math.prod(header[name]["shape"])]
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, f"the header of {file} grew"
        stream.seek(8)
        stream.write(text.ljust(size))  # the format fills it up with spaces as well


_watching: list[Any] = []
_seen: "weakref.WeakSet[torch.optim.Optimizer]" = weakref.WeakSet()


def _watch_learning_rates() -> None:
    """Warn once an optimiser about a rate far below the recommended one: the shifts would not move and nobody would tell."""
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_check_rates))


def _check_rates(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if optimizer in _seen:
        return
    _seen.add(optimizer)
    for group in optimizer.param_groups:
        wanted = min((p._sara_lr for p in group["params"] if hasattr(p, "_sara_lr")), default=0.0)
        peak = peak_rate(group)
        if 0.0 < wanted >= peak * TOO_LOW:
            warnings.warn(
                f"The learning rate {peak:g} is {wanted / peak if peak else float('inf'):.0f} times below the recommended "
                f"{wanted:g}: relative shifts hardly move at it. Give the optimiser sarac.recommended_lr(model).",
                SaracWarning,
                stacklevel=3,
            )


def peak_rate(group: Mapping[str, Any]) -> float:
    """The highest rate of an optimiser's group: a warm-up begins near zero, a one-cycle schedule at a fraction of its peak."""
    return max(float(group.get(entry, 0.0)) for entry in ("lr", "initial_lr", "max_lr"))
