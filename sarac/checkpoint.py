"""The files: `model.pt` (tensors and JSON, opened with weights_only) and adapter files (safetensors)."""

import hashlib
import json
import os
import pickle
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sarac.ir.adapters import PARAMETRISATION
from sarac.ir.errors import CheckpointError
from sarac.ir.layers import adapted
from sarac.ir.plan import Plan
from sarac.ir.weight import oriented

FORMAT = 1
_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Adapters = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Saved:
    """What a model.pt holds: recipe, plan, input spec and flags as JSON, base tensors by name, adapters by site and role."""

    recipe: Mapping[str, Any]
    plan: Plan
    inputs: str
    flags: Mapping[str, bool]
    base: Mapping[str, Tensor]
    adapters: Adapters


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
        "adapters": saved.adapters,
    }
    written(path, lambda aside: torch.save(content, aside))


def read_model(path: str | Path) -> Saved:
    """Read a model.pt without running any code of it; a foreign, truncated or pickled file is a CheckpointError."""
    content = _torch_load(Path(path))
    if not isinstance(content, dict) or "sarac" not in content:
        raise CheckpointError(f"{path} is a torch file, but no model.pt of sarac's. Write one with sarac.save(model, path).")
    _require_readable(path, content["sarac"], content.get("parametrisation"))
    try:
        return Saved(
            recipe=json.loads(content["recipe"]),
            plan=Plan.from_json(content["plan"]),
            inputs=content["inputs"],
            flags=json.loads(content["flags"]),
            base=content["base"],
            adapters=content["adapters"],
        )
    except KeyError as error:
        raise CheckpointError(f"{path} is a model.pt without its entry {error}: it is damaged; write it again.") from error


def read_pickle(path: str | Path) -> nn.Module:
    """A module that torch.save(model) pickled. Opening it runs whatever code it names: only for files you trust."""
    content = torch.load(path, weights_only=False)
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
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
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
    return SavedAdapter(Plan.from_json(metadata["plan"]), json.loads(metadata["base"]), adapters, further)


def tensors_of(model: nn.Module) -> Adapters:
    """The adapters' tensors of an adapted model, by site and role."""
    found: Adapters = {}
    for _, module, state in adapted(model):
        for slot in state.slots.values():
            found[slot.site] = {role: tensor.detach() for role, tensor in slot.tensors(module).items()}
    return found


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of an adapted model without its adapters: names and values of the base."""
    own = {
        f"{path}.{slot.attribute(role)}" if path else slot.attribute(role)
        for path, module, state in adapted(model)
        for slot in state.slots.values()
        for role in slot.tensors(module)
    }
    return {name: tensor for name, tensor in model.state_dict().items() if name not in own}


def fill(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Give `model` these tensors by name, taking their dtypes, keeping ties; names or shapes that differ are an error."""
    present = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    expected = set(model.state_dict())
    odd = sorted(expected.symmetric_difference(state))
    if odd:
        side = "lacks" if odd[0] in expected else "has"
        raise CheckpointError(f"{where} does not fit {type(model).__name__}: it {side} {odd[0]} ({len(odd)} names differ).")
    for name, tensor in state.items():
        if present[name].shape != tensor.shape:
            raise CheckpointError(f"{where} does not fit: {name} is {tuple(tensor.shape)}, not {tuple(present[name].shape)}.")
        present[name].data = tensor


def base_hashes(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 over names, shapes and values of the weights, by precision: what factors computed from them depend on."""
    digests = {name: hashlib.sha256() for name in _PRECISIONS}
    for weight_name in sorted(weights):
        weight = weights[weight_name].detach().cpu()
        for name, dtype in _PRECISIONS.items():
            digests[name].update(f"{weight_name} {tuple(weight.shape)}".encode())
            digests[name].update(weight.to(dtype).contiguous().view(torch.uint8).numpy().data)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def adapted_weights(model: nn.Module) -> dict[str, Tensor]:
    """The base weights (out, in) of the adapted sites, by site name."""
    found = {}
    for _, module, state in adapted(model):
        for slot in state.slots.values():
            found[slot.site] = oriented(module._parameters[slot.param], slot.transposed)
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
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}.") from error
    finally:
        Path(name).unlink(missing_ok=True)


def _torch_load(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file: give the path of a model.pt.")
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "global" in str(error):
            raise CheckpointError(
                f"{path} is a pickled Python object, which runs code when it is opened. Save with sarac.save, or, if you trust "
                "the file, open it with load(path, trust_pickle=True) or --trust-pickle."
            ) from error
        raise CheckpointError(f"{path} is not a model.pt: {str(error).splitlines()[0]}") from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} cannot be read: {reason}. It is truncated or no torch file; write it again.") from error


def _require_readable(path: str | Path, version: int, parametrisation: str | None) -> None:
    if version != FORMAT or parametrisation != PARAMETRISATION:
        raise CheckpointError(
            f"{path} is of format {version} with {parametrisation} shifts; this sarac reads format {FORMAT} with "
            f"{PARAMETRISATION} ones. Use the version that wrote it."
        )
