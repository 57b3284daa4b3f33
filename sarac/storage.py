"""Saving and loading: whole adapted models (`model.pt`), adapters alone (safetensors), folders of save_pretrained."""

import json
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sarac import shelf
from sarac.checkpoint import (
    Adapters,
    Saved,
    SavedAdapter,
    adapted_weights,
    base_hashes,
    base_state,
    fill,
    loose_buffers,
    read_adapter,
    read_model,
    read_pickle,
    tensors_of,
    whole,
    write_adapter,
    write_model,
    writes,
)
from sarac.ir.errors import CheckpointError, RewriteError, SaracWarning
from sarac.ir.graph import ModelGraph
from sarac.ir.guarded import in_shape
from sarac.ir.inputs import Inputs, InputSpec
from sarac.ir.layers import adapted
from sarac.ir.pipeline import register_front_end, run
from sarac.ir.plan import Plan
from sarac.ir.record import (
    FOLDER_FILE,
    FOLDER_MARK,
    Record,
    inputs_of,
    keep_inputs,
    keep_originals,
    record_of,
    require_whole,
    shelf_of,
    weight_files,
)
from sarac.passes.choose import Choose
from sarac.passes.rewrite import Rewrite
from sarac.recipe import open_model, rebuild, recipe_of
from sarac.trace import trace

Model = TypeVar("Model", bound=nn.Module)


def save(model: nn.Module, path: str | Path, *, example_inputs: Any = None) -> None:
    """Write `model`, adapted or plain, with its plan, its recipe and the spec of its inputs; load gives it back bit-exact.

    Adapters that wait by name (`sarac.use`) are written too. Call it in every process of a sharded model: all gather, the
    first one writes.
    """
    require_whole(model, "save")
    record = record_of(model) or Record(Plan({}))
    inputs = inputs_of(model)
    if isinstance(example_inputs, InputSpec):
        inputs = example_inputs.to_json()
    elif example_inputs is not None:
        inputs = InputSpec.of(Inputs.of(example_inputs)).to_json()
    weights = adapted_weights(model)
    plan = replace(record.plan, base=base_hashes(weights)["float32"] if weights else "")
    flags = record.trained_before or {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    tensors = (base_state(model), loose_buffers(model), tensors_of(model))
    saved = Saved(recipe_of(model), plan, inputs, flags, *tensors, shelf.packed(model), record.originals)
    if writes(model):
        write_model(path, saved)


def load(path: str | Path, model: nn.Module | str | None = None, *, trust_pickle: bool = False) -> nn.Module:
    """The model of a model.pt, or of a folder that an adapted model's save_pretrained wrote, in eval mode.

    `model`: the module whose weights the file holds, where it was built in memory (it is filled, not copied); or the
    name of the factory, `package.module:function`, where opening the file would run one. `trust_pickle` opens a pickled module.
    """
    if Path(path).is_dir():
        return _load_folder(Path(path), model)
    pickled = read_pickle(path) if trust_pickle else None
    if pickled is not None:
        return pickled.eval()
    saved = read_model(path)
    plain = rebuild(saved.recipe, model)
    fill(plain, saved.base, str(path), saved.buffers)
    keep_inputs(plain, saved.inputs)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(saved.flags.get(name, parameter.requires_grad))
    if not saved.plan.sites:
        return plain.eval()
    result = _with_adapters(plain, saved.plan, saved.adapters).eval()
    shelf.unpack(result, saved.shelf, str(path))
    keep_originals(result, saved.originals)
    return result


def stored(source: str) -> bool:
    """Whether this names a file of torch's, or a folder that an adapted model's save_pretrained wrote."""
    path = Path(source)
    return path.is_file() or path.suffix in (".pt", ".pth") or (path / FOLDER_FILE).is_file()


def opened(source: str) -> nn.Module:
    """The model that a name stands for: what `load` reads, a transformers folder or hub name, a timm name or a factory."""
    return load(source) if stored(source) else open_model(source)


def save_adapter(model: nn.Module, path: str | Path, *, factors: bool = False, name: str | None = None) -> None:
    """Write the live adapter, or the one of that name, alone: what trains, and the hashes of the base it belongs to.

    With `factors` U and V are stored as well, so that the adapter also fits its base cast to another precision.
    Call it in every process of a sharded model: all gather, the first one writes.
    """
    require_whole(model, "save")
    record = record_of(model)
    if record is None:
        raise RewriteError(f"{type(model).__name__} carries no adapters: there is none to save. Transform it first.")
    hashes = base_hashes(adapted_weights(model))
    adapters: Adapters = {}
    tensors, further = shelf.values(model, name)
    for site, roles in tensors.items():
        trains = record.plan.sites[site].trainable
        adapters[site] = {role: t for role, t in roles.items() if factors or role in trains or role not in ("u", "v")}
    kept = model.state_dict()  # running statistics move with the adapter, and are of its outputs
    further |= {name: whole(buffer) for name, buffer in model.named_buffers() if name in kept}
    if writes(model):
        write_adapter(path, SavedAdapter(replace(record.plan, base=hashes["float32"]), hashes, adapters, further))


def load_adapter(model: Model, path: str | Path, *, force: bool = False, name: str | None = None) -> Model:
    """A copy of `model` with the adapters of a file; the model must be the base that they were trained on.

    A base that was only cast to another precision needs stored factors. `force` goes ahead on any other base of the same shapes.
    A model with adapters of the same plan takes them in place and is returned: as those of `name`, beside the others, which
    sarac.use brings back; without a name in place of the live ones.
    """
    saved = read_adapter(path)
    if any(True for _ in adapted(model)):
        shelf.require_same_plan(model, saved.plan, str(path))
        _require_base(str(path), saved, adapted_weights(model), force)
        trained = {name: saved.also_trained[name] for name in saved.plan.also_train if name in saved.also_trained}
        _fill_further(model, {n: t for n, t in saved.also_trained.items() if n not in trained}, str(path))
        shelf.put(model, name, saved.adapters, trained, str(path))
        return model
    graph = trace(model)
    saved.plan.require_fits({site.name: site.full_shape for site in graph.sites.values()})
    weights = {name: graph.weight(graph.sites[name]) for name in saved.plan.sites}
    _require_base(str(path), saved, weights, force)
    result = _with_adapters(model, saved.plan, saved.adapters, graph=graph)
    _fill_further(result, saved.also_trained, str(path))
    if name is not None:
        shelf_of(result).active = name
    return result


def _fill_further(model: nn.Module, found: Mapping[str, Tensor], path: str) -> None:
    """Give `model` the parameters that trained whole, and the buffers, of an adapter file."""
    there = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in found.items():
        if name not in there or there[name].shape != tensor.shape:
            shape = tuple(there[name].shape) if name in there else "none"
            raise CheckpointError(f"{path} does not fit: it has {name} as {tuple(tensor.shape)}, and here is {shape}.")
    for name, tensor in found.items():
        there[name].data.copy_(tensor)


def _require_base(path: str, saved: SavedAdapter, weights: Mapping[str, Tensor], force: bool) -> None:
    """Refuse another base, and a cast one where factors would have to be recomputed from it."""
    found = base_hashes(weights)
    if found["float32"] == saved.hashes["float32"]:
        return
    complete = all({"u", "v"} <= set(saved.adapters.get(site, {})) for site in weights)
    dtypes = {str(weight.dtype).removeprefix("torch.") for weight in weights.values()}
    cast = next((name for name in dtypes if name != "float32" and found.get(name) == saved.hashes.get(name)), None)
    if cast is not None and complete:
        return
    if force:
        warnings.warn(f"{path} is loaded by force onto another base than it was trained on.", SaracWarning, stacklevel=3)
        return
    if cast is not None:
        raise CheckpointError(
            f"{path} was trained on this base before it was cast to {cast}: factors recomputed from the rounded weights would "
            "be wrong by percents. Save it with factors=True, or load it onto the uncast base and cast the folded model."
        )
    raise CheckpointError(
        f"{path} was trained on another base: the adapted weights' hash is {saved.hashes['float32'][:12]}… there and "
        f"{found['float32'][:12]}… here. Load it onto its own base, or give force=True (--force) to go ahead."
    )


def _with_adapters(
    model: Model,
    plan: Plan,
    adapters: Mapping[str, Mapping[str, Tensor]],
    graph: ModelGraph | None = None,
) -> Model:
    """A copy of `model` with these adapters; their tensors keep the dtypes of the file, factors take the weight's."""
    graph = graph or trace(model)
    graph = run(graph, Choose(plan), check=False)
    given: Adapters = defaultdict(dict)
    for site, adapter in plan.sites.items():
        # In the order of every other way to them: an optimiser's saved state knows parameters by their order alone.
        for role in (role for role in adapter.shapes(*graph.site(site).shape) if role in adapters.get(site, {})):
            tensor = adapters[site][role]
            given[site][role] = tensor.to(graph.site(site).dtype) if role in ("u", "v") else tensor
    return run(graph, Rewrite(given=given), check=False).module  # type: ignore[return-value]  # the same class as `model`


def _load_folder(folder: Path, model: nn.Module | str | None) -> nn.Module:
    """The adapted model in a folder of save_pretrained; a plain one that was saved over it, or beside it, opens as it is."""
    entries = _json(folder / "config.json")
    if entries.pop(FOLDER_MARK, None) is None:
        return open_model(str(folder))
    plan = Plan.load(folder / FOLDER_FILE)
    name = (entries.get("architectures") or [""])[0]
    recipe = {"kind": "transformers", "class": name, "config": entries, "source": str(folder)}
    plain = rebuild({**recipe, "generation": _json(folder / "generation_config.json")}, model)
    state: dict[str, Tensor] = {}
    try:
        for shard in weight_files(folder):
            state |= load_file(shard)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{shard} cannot be read: {error}. It may be truncated; write it again.") from error
    return _fill_folder(plain, plan, state, folder)


def _json(file: Path) -> dict[str, Any]:
    """The object in a JSON file, an empty one where there is no file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON: {error}. Write the folder again.") from error
    return found if isinstance(found, dict) else {}


def _fill_folder(plain: nn.Module, plan: Plan, state: dict[str, Tensor], folder: Path) -> nn.Module:
    result = _blank(plain, plan)
    expected = result.state_dict()
    twins = {tensor.data_ptr(): name for name, tensor in expected.items() if name in state}
    for name, tensor in expected.items():
        if name not in state and tensor.data_ptr() in twins:  # save_pretrained drops the second name of a tied weight
            state[name] = state[twins[tensor.data_ptr()]]
    keep_originals(result, {})  # the folder does not have them
    fill(result, {name: in_shape(tensor, expected[name].shape) for name, tensor in state.items()}, str(folder))
    return result.eval()


def _blank(plain: nn.Module, plan: Plan) -> nn.Module:
    """The adapted form of `plain` with tensors of the right shapes: the file's will take their place."""
    graph = trace(plain)
    plan.require_fits({site.name: site.full_shape for site in graph.sites.values()})
    graph, given = replace(graph, plan=plan), {}  # not Choose, which would judge weights that are still to be read
    for name, adapter in plan.sites.items():
        site = graph.sites[name]
        shapes = adapter.shapes(*site.shape)
        given[name] = {role: torch.zeros(shape) for role, shape in shapes.items()}
    return run(graph, Rewrite(given=given), check=False).module


register_front_end(_with_adapters)
