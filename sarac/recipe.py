"""What a model can be rebuilt from: a transformers class and config, a timm name, a factory; else the module itself.

A recipe is JSON. Only classes that transformers itself exports and timm's own factory are ever called for one; a
user's factory runs code of the user's, so it must be named again by whoever opens the file.
"""

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from sarac.ir.errors import CheckpointError
from sarac.ir.sharded import fsdp_class

ATTRIBUTE = "_sarac_recipe"


def recipe_of(model: nn.Module) -> dict[str, Any]:
    """The recipe of a model: the one it was opened by, its transformers class and config, or {"kind": "memory"}."""
    known = model.__dict__.get(ATTRIBUTE)
    if isinstance(known, dict):
        return dict(known)
    kind = _own_class(model)
    if isinstance(model, transformers.PreTrainedModel) and getattr(transformers, kind.__name__, None) is kind:
        generation = getattr(model, "generation_config", None)
        return {
            "kind": "transformers",
            "class": kind.__name__,
            "config": json.loads(model.config.to_json_string(use_diff=False)),
            "generation": None if generation is None else json.loads(generation.to_json_string(use_diff=False)),
            "attention": _attention(model.config),
            "source": str(getattr(model.config, "_name_or_path", "") or ""),
        }
    return {"kind": "memory", "class": f"{kind.__module__}.{kind.__qualname__}"}


def _own_class(model: nn.Module) -> type:
    """The class of a model, which fully_shard hides behind one of its own."""
    line = type(model).__mro__
    sharding = fsdp_class()
    return line[line.index(sharding) + 1] if sharding in line else line[0]


def rebuild(recipe: Mapping[str, Any], model: nn.Module | str | None = None) -> nn.Module:
    """The model of a recipe, its weights still random; `model` is a module, or the factory to call, named again."""
    if isinstance(model, nn.Module):
        return model
    kind = recipe.get("kind")
    if kind == "factory":
        target = str(recipe["target"])
        if model != target:
            raise CheckpointError(
                f"This model is built by the function {target}, which is code that opening a file must not run by itself. "
                f'Name it: load(path, model="{target}"), or --model {target} on the command line.'
            )
        return from_factory(target, dict(recipe.get("arguments", {})))
    if kind == "memory" and model is not None:
        return from_factory(model, {})
    if model is not None:
        raise CheckpointError(f"The file holds a recipe of kind {kind!r}, not the factory {model!r}: leave `model` out.")
    if kind == "transformers":
        return _from_transformers(recipe)
    if kind == "timm":
        _require_local(recipe)
        return from_timm(str(recipe["name"]), dict(recipe.get("arguments", {})))
    raise CheckpointError(
        f"The file holds the weights of a {recipe.get('class', 'module')} that was built in memory, and no recipe for it: "
        "build the module and give it, load(path, model=module)."
    )


def _require_local(recipe: Mapping[str, Any]) -> None:
    """A file's recipe must not make timm read or fetch other files."""
    name, odd = str(recipe["name"]), set(recipe.get("arguments", {})) & {"checkpoint_path", "pretrained_cfg", "cache_dir"}
    if ":" in name or odd:
        raise CheckpointError(
            f"The file's recipe would have timm fetch {name} with {sorted(odd)}: build it and give it as `model`."
        )


def open_model(text: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """A model by name: a transformers folder or hub name, `timm:NAME`, or `package.module:factory` with JSON arguments."""
    chosen = dict(arguments or {})
    if text.startswith("timm:"):
        return from_timm(text.removeprefix("timm:"), chosen)
    if ":" in text and not Path(text).exists():
        return from_factory(text, chosen)
    return _from_folder(text, chosen)


def from_factory(target: str, arguments: dict[str, Any]) -> nn.Module:
    """The module that `package.module:function` returns for these keyword arguments."""
    module, _, name = target.partition(":")
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise CheckpointError(f"The factory {target!r} cannot be imported: {error}. Write package.module:function.") from error
    return _remember(_call(factory, target, arguments), {"kind": "factory", "target": target, "arguments": arguments})


def from_timm(name: str, arguments: dict[str, Any]) -> nn.Module:
    """The timm model of this name."""
    try:
        timm = importlib.import_module("timm")
    except Exception as error:  # a missing torchvision shows as a RuntimeError
        raise CheckpointError(f"timm:{name} needs timm, which does not import: {error}. Install timm and torchvision.") from error
    built = _call(timm.create_model, f"timm:{name}", {"model_name": name, **arguments})
    return _remember(built, {"kind": "timm", "name": name, "arguments": {**arguments, "pretrained": False}})


def described(folder: Path) -> nn.Module:
    """The transformers model that a folder's config.json describes, on the meta device: all but its values."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        kind = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
        with torch.device("meta"):
            build: Callable[[Any], nn.Module] = transformers.AutoModel.from_config if kind is None else kind
            return build(config)
    except Exception as error:  # a model's own code may do anything on meta, and a config be of anybody's
        raise CheckpointError(f"{folder / 'config.json'} builds no model: {(str(error).splitlines() or [''])[0]}") from error


def _from_folder(text: str, arguments: dict[str, Any]) -> nn.Module:
    try:
        config = transformers.AutoConfig.from_pretrained(text)
        name = (getattr(config, "architectures", None) or [""])[0]
        kind = getattr(transformers, name, None) or transformers.AutoModel
        model: nn.Module = kind.from_pretrained(text, **arguments)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{text!r} opens neither as a transformers folder or hub name ({str(error).splitlines()[0]}), nor as timm:NAME, "
            "package.module:factory or a model.pt."
        ) from error
    return model


def _from_transformers(recipe: Mapping[str, Any]) -> nn.Module:
    kind = getattr(transformers, str(recipe["class"]), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) and kind.config_class):
        raise CheckpointError(
            f"This transformers ({transformers.__version__}) has no model class {recipe['class']!r}: upgrade it."
        )
    config = kind.config_class.from_dict(dict(recipe["config"]))
    if recipe.get("attention"):
        config._attn_implementation = recipe["attention"]
    model = kind(config)
    if recipe.get("generation"):
        model.generation_config = transformers.GenerationConfig.from_dict(recipe["generation"])
    model.config._name_or_path = recipe.get("source", "")
    return model


def _attention(config: Any) -> str | None:
    """The attention that the model computes with, which its config does not write down; None for one not found everywhere."""
    chosen = getattr(config, "_attn_implementation", None)
    return chosen if chosen in ("eager", "sdpa") else None


def _call(factory: Callable[..., Any], what: str, arguments: Mapping[str, Any]) -> nn.Module:
    try:
        model = factory(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{what} cannot be built with {json.dumps(dict(arguments))}: {error}.") from error
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"{what} gives a {type(model).__name__}, not a torch.nn.Module.")
    return model


def _remember(model: nn.Module, recipe: dict[str, Any]) -> nn.Module:
    model.__dict__[ATTRIBUTE] = recipe
    return model
