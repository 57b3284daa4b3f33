"""A copy of a module tree that shares every base tensor with its source and nothing else.

Tried otherwise and seen to break: shared BatchNorm buffers moved the source's outputs; a copied instance `forward`
that closes over the source ran the source; non-leaf tensor attributes cannot be deep-copied at all.
"""

import copy
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sarac.ir.errors import RewriteError
from sarac.ir.sharded import is_sharded


def clone(module: nn.Module, *, frozen: bool, own: frozenset[str] = frozenset(), inplace: bool = False) -> nn.Module:
    """A new tree over the same base storages; parameters named in `own` get their own storage and train.

    `frozen` turns gradients off everywhere else; otherwise flags stay, and what trains gets its own storage too.
    With `inplace` the module itself is returned, with its flags set.
    """
    _require_whole_tensors(module)
    names: dict[int, set[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    if inplace:
        for parameter in module.parameters():
            if frozen:
                parameter.requires_grad_(bool(names[id(parameter)] & own))
        return module
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        owned = bool(names[id(parameter)] & own)
        trains = owned if frozen else parameter.requires_grad
        memo[id(parameter)] = _parameter(parameter, trains, parameter.detach().clone() if trains else parameter.detach())
    parts = {id(part) for part in (*module.modules(), *module.parameters())}
    for owner in module.modules():
        _require_plain(owner)
        _require_copyable_forward(owner)
        _require_copyable_functions(owner, parts)
        memo.update({id(tensor): tensor.detach().clone() for tensor in _loose_tensors(owner)})
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise RewriteError(
            f"{type(module).__name__} cannot be copied ({type(error).__name__}: {error}). Give inplace=True to change "
            "the model itself, or take the attribute that cannot be copied off it first."
        ) from error


def _require_whole_tensors(module: nn.Module) -> None:
    """A shard is no weight: adapters on it would be neither sharded nor kept alike, and a fold would lose its group."""
    for name, parameter in module.named_parameters():
        if is_sharded(parameter):
            raise RewriteError(
                f"{name} of this {type(module).__name__} is sharded: transform a model before fully_shard. To fold or export a "
                "sharded one, write it with sarac.save or sarac.save_adapter in every process and load the file in one."
            )


def _parameter(source: nn.Parameter, trains: bool, data: Tensor) -> nn.Parameter:
    new = nn.Parameter(data, requires_grad=trains)
    new.__dict__.update(source.__dict__)
    return new


def _loose_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Tensors with a history kept as plain attributes, alone or in containers."""
    for name, value in vars(module).items():
        if name not in ("_parameters", "_buffers", "_modules"):
            yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and not leaf.is_leaf)


def _require_plain(module: nn.Module) -> None:
    """A compiled or scripted module runs code that was made of the source."""
    compiled = type(module).__name__ == "OptimizedModule"  # its class would import all of dynamo
    if compiled or isinstance(module, torch.jit.ScriptModule):
        how = "compiled with torch.compile" if compiled else "scripted with torch.jit"
        raise RewriteError(
            f"A {type(module).__name__} in the model was {how}, which fixed what it computes: transform the plain model first, "
            "and compile the result."
        )


def _require_copyable_forward(module: nn.Module) -> None:
    """A bound method or a partial is rebound by deepcopy; a closure would go on calling the source."""
    forward = module.__dict__.get("forward")
    while isinstance(forward, functools.partial):
        forward = forward.func
    if isinstance(forward, types.FunctionType) and _holds_model(forward):
        raise RewriteError(
            f"The forward of a {type(module).__name__} was replaced on the instance by {forward.__qualname__}, which closes "
            "over the model: a copy would run the source. Make it a method of a subclass, or give inplace=True."
        )


def _require_copyable_functions(module: nn.Module, parts: set[int]) -> None:
    """A function among the attributes that closes over a part of the model would go on calling the source's."""
    for name, value in vars(module).items():
        shadows = hasattr(type(module), name)  # as accelerate's warnings about `to`; a forward is looked at on its own
        if isinstance(value, types.FunctionType) and not shadows:
            held = pytree.tree_leaves([cell.cell_contents for cell in value.__closure__ or () if _filled(cell)])
            if any(id(part) in parts for part in held):
                raise RewriteError(
                    f"The attribute {name} of a {type(module).__name__} is a function that closes over a part of the model: a "
                    "copy would run the source's. Make it a method, or give inplace=True."
                )


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  an empty one raises
    except ValueError:
        return False
    return True


def _holds_model(value: Any) -> bool:
    """Whether a function closes over a module or a tensor, or has one among its defaults, however deep in containers."""
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return any(_holds_model(item) for item in (*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()))
    parts = pytree.tree_leaves(value)
    if len(parts) == 1 and parts[0] is value:
        return isinstance(getattr(value, "__self__", value), nn.Module | Tensor)
    return any(_holds_model(part) for part in parts)
