"""The files: `model.pt` (tensors and JSON, opened with weights_only) and adapter files (safetensors)."""

import hashlib
import json
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sarac.ir.adapters import PARAMETRISATION
from sarac.ir.errors import CheckpointError
from sarac.ir.layers import adapted
from sarac.ir.layout import dense
from sarac.ir.plan import Plan
from sarac.ir.sharded import is_sharded
from sarac.ir.weight import settle

FORMAT = 1
_UNKNOWN = (-1, -1)  # the shape of a weight that is not at hand
_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Adapters = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Saved:
    """What a model.pt holds: recipe, plan, input spec and flags as JSON, base tensors by name, adapters by site and role.

    `buffers` are those that no state dict has: rebuilt, they would lack what a cast of the model did to them. `shelf` has the
    adapters that are not live, `originals` the base values of what trains whole.
    """

    recipe: Mapping[str, Any]
    plan: Plan
    inputs: str
    flags: Mapping[str, bool]
    base: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    adapters: Adapters
    shelf: Mapping[str, Any] = field(default_factory=dict)
    originals: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class SavedAdapter:
    """What an adapter file holds; `hashes` are those of the base's adapted weights by precision."""

    plan: Plan
    hashes: Mapping[str, str]
    adapters: Adapters
    also_trained: Mapping[str, Tensor]


def write_model(path: str | Path, saved: Saved) -> None:
    """Write a model.pt, aside first."""
    content = {
        "sarac": FORMAT,
        "recipe": json.dumps(dict(saved.recipe)),
        "plan": saved.plan.to_json(),
        "parametrisation": PARAMETRISATION,
        "inputs": saved.inputs,
        "flags": json.dumps(dict(saved.flags)),
        "base": dict(saved.base),
        "buffers": dict(saved.buffers),
        "adapters": saved.adapters,
        "shelf": dict(saved.shelf),
        "originals": dict(saved.originals),
    }
    written(path, lambda aside: torch.save(content, aside))


def read_model(path: str | Path) -> Saved:
    """Read a model.pt without running any code of it; a foreign, truncated or pickled file is a CheckpointError."""
    content = _torch_load(Path(path))
    if not isinstance(content, dict) or "sarac" not in content:
        raise CheckpointError(f"{path} is a torch file, but no model.pt of sarac's. Write one with sarac.save(model, path).")
    _require_readable(path, content["sarac"], content.get("parametrisation"))
    try:
        saved = Saved(
            recipe=json.loads(content["recipe"]),
            plan=Plan.from_json(content["plan"]),
            inputs=content["inputs"],
            flags=json.loads(content["flags"]),
            base=content["base"],
            buffers=content["buffers"],
            adapters=content["adapters"],
            shelf=content.get("shelf", {}),
            originals=content.get("originals", {}),
        )
    except KeyError as error:
        raise CheckpointError(f"{path} is a model.pt without its entry {error}: it is damaged; write it again.") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is a model.pt whose JSON is damaged: {error}. Write it again.") from error
    _require_complete(path, saved.plan, saved.adapters, given=())
    return saved


def read_pickle(path: str | Path) -> nn.Module | None:
    """A module that torch.save(model) pickled, None for a model.pt. Opening it runs whatever code it names."""
    content = _torch_load(Path(path), trusted=True)
    if isinstance(content, dict) and "sarac" in content:
        return None
    if not isinstance(content, nn.Module):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a pickled module.")
    return content


def write_adapter(path: str | Path, saved: SavedAdapter) -> None:
    """Write an adapter file, aside first."""
    tensors = {f"{site}.sara_{role}": t.contiguous() for site, roles in saved.adapters.items() for role, t in roles.items()}
    tensors |= {f"also_train.{name}": tensor.contiguous() for name, tensor in saved.also_trained.items()}
    metadata = {
        "sarac_adapter": str(FORMAT),
        "parametrisation": PARAMETRISATION,
        "plan": saved.plan.to_json(),
        "base": json.dumps(dict(saved.hashes)),
        "torch": torch.__version__,
    }
    written(path, lambda aside: save_file(tensors, aside, metadata=metadata))


def read_adapter(path: str | Path) -> SavedAdapter:
    """Read an adapter file; one that is foreign or truncated is a CheckpointError."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # A copy of its own lies aligned in memory: from where it lies in the file, products round otherwise.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable adapter file: {error}. It may be truncated; write it again.") from error
    if "sarac_adapter" not in metadata:
        raise CheckpointError(f"{path} is a safetensors file, but no adapter of sarac's. Write one with sarac.save_adapter.")
    _require_readable(path, int(metadata["sarac_adapter"]), metadata.get("parametrisation"))
    adapters: Adapters = {}
    further = {}
    for name, tensor in tensors.items():
        site, _, role = name.rpartition(".sara_")
        if site:
            adapters.setdefault(site, {})[role] = tensor
        else:
            further[name.removeprefix("also_train.")] = tensor
    try:
        saved = SavedAdapter(Plan.from_json(metadata["plan"]), json.loads(metadata["base"]), adapters, further)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is an adapter whose metadata is damaged ({error}): write it again.") from error
    _require_complete(path, saved.plan, adapters, given=("u", "v"))
    return saved


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, which every process must take part in; any other as it is."""
    return tensor.full_tensor().cpu() if is_sharded(tensor) else tensor


def writes(model: nn.Module) -> bool:
    """Whether this process writes the files of `model`: where it is sharded all gather, and the first one writes."""
    return not any(is_sharded(parameter) for parameter in model.parameters()) or dist.get_rank() == 0


def tensors_of(model: nn.Module) -> Adapters:
    """The adapters' tensors of an adapted model, by site and role; what a site borrows is given by its owner alone."""
    found: Adapters = {}
    for _, module, state in adapted(model):
        for slot in state.slots.values():
            own = {role: tensor for role, tensor in slot.tensors(module).items() if role not in slot.adapter.borrowed}
            found[slot.site] = {role: whole(tensor.detach()) for role, tensor in own.items()}
    return found


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of an adapted model without its adapters: names and values of the base."""
    own = {id(t) for _, module, state in adapted(model) for slot in state.slots.values() for t in slot.tensors(module).values()}
    added = {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in own}
    return {name: whole(tensor) for name, tensor in model.state_dict().items() if name not in added}


def loose_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of a model that its state dict leaves out."""
    kept = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name not in kept}


def fill(model: nn.Module, state: Mapping[str, Tensor], where: str, loose: Mapping[str, Tensor] | None = None) -> None:
    """Give `model` these tensors by name, taking their dtypes, keeping ties; names or shapes that differ are an error.

    `loose` are buffers outside the state dict: the model need not have them.
    """
    present = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    expected = set(model.state_dict())
    odd = sorted(expected.symmetric_difference(state))
    if odd:
        side = "lacks" if odd[0] in expected else "has"
        raise CheckpointError(
            f"{where} does not fit {type(model).__name__}: it {side} {odd[0]} ({len(odd)} names differ). A model that was "
            "changed after it was built is built by you and given, load(path, model=module)."
        )
    for name, tensor in state.items():
        if present[name].shape != tensor.shape:
            raise CheckpointError(f"{where} does not fit: {name} is {tuple(tensor.shape)}, not {tuple(present[name].shape)}.")
    for name, tensor in state.items():
        present[name].data = tensor
    for name in set(loose or {}).intersection(present):
        present[name].data = (loose or {})[name]
    for _, module, _ in adapted(model):
        settle(module)


def base_hashes(weights: Mapping[str, Tensor], precisions: Sequence[str] = tuple(_PRECISIONS)) -> dict[str, str]:
    """SHA-256 over names, shapes and values of the weights, by precision: what factors computed from them depend on."""
    digests = {name: hashlib.sha256() for name in precisions}
    for weight_name in sorted(weights):
        weight = whole(weights[weight_name].detach()).cpu()
        for name in precisions:
            digests[name].update(f"{weight_name} {tuple(weight.shape)}".encode())
            digests[name].update(weight.to(_PRECISIONS[name]).contiguous().view(torch.uint8).numpy().data)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def adapted_weights(model: nn.Module) -> dict[str, Tensor]:
    """The base weights (out, in) of the adapted sites, by site name."""
    found = {}
    for _, module, state in adapted(model):
        for slot in state.slots.values():
            found[slot.site] = slot.layout.matrix(dense(module._parameters[slot.param]))
    return found


def written(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file beside `path`, then put it there in one step; nothing is left where it fails."""
    target = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written: {error.strerror}. Choose a folder that exists and is yours."
        ) from error
    os.close(handle)
    try:
        write(Path(name))
        Path(name).chmod(0o644)
        Path(name).replace(target)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own for a full disk
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{target} cannot be written: {getattr(error, 'strerror', None) or reason}.") from error
    finally:
        Path(name).unlink(missing_ok=True)


def _torch_load(path: Path, trusted: bool = False) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file: give the path of a model.pt.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol of what is no pickle
            return torch.load(path, weights_only=not trusted, map_location="cpu")
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "global" in str(error):
            raise CheckpointError(
                f"{path} is a pickled Python object, which runs code when it is opened. Save with sarac.save, or, if you trust "
                "the file, open it with load(path, trust_pickle=True) or --trust-pickle."
            ) from error
        raise CheckpointError(f"{path} is not a model.pt: {str(error).splitlines()[0]}") from error
    except Exception as error:  # random bytes are a program to the unpickler: it may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} cannot be read: {reason}. It is truncated or no torch file; write it again.") from error


def _require_complete(path: str | Path, plan: Plan, adapters: Adapters, given: tuple[str, ...]) -> None:
    """Refuse a file that lacks a tensor of its plan, or has it in another shape: it would start afresh in silence.

    The roles in `given` are computed from the weight where they do not train.
    """
    for site, adapter in plan.sites.items():
        found = {role: tuple(tensor.shape) for role, tensor in adapters.get(site, {}).items()}
        wanted = {role: shape for role, shape in adapter.shapes(*_UNKNOWN).items() if role not in adapter.borrowed}
        lost = [role for role in wanted if role not in found and (role in adapter.trainable or role not in given)]
        odd = [role for role in found if role not in wanted or (_UNKNOWN[0] not in wanted[role] and wanted[role] != found[role])]
        if lost or odd:
            what = f"lacks the {lost[0]}" if lost else f"has another {odd[0]} than its plan"
            raise CheckpointError(f"{path} {what} of {site}: it is damaged; write it again.")


def _require_readable(path: str | Path, version: int, parametrisation: str | None) -> None:
    if version != FORMAT or parametrisation != PARAMETRISATION:
        raise CheckpointError(
            f"{path} is of format {version} with {parametrisation} shifts; this sarac reads format {FORMAT} with "
            f"{PARAMETRISATION} ones. Use the version that wrote it."
        )
