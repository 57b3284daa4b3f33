"""Mixed precision: a module in float16 or bfloat16 of which some parts stay in float32."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sarac.ir import check
from sarac.ir.graph import within

LARGE = 2**13  # numbers from which on a capture makes do without the values of a weight


@contextlib.contextmanager
def typed(
    model: nn.Module,
    dtype: torch.dtype | None,
    *,
    kept: Collection[str] = (),
    hollow: bool = False,
    waiting: Mapping[int, Callable[[], Tensor]] = MappingProxyType({}),
) -> Iterator[None]:
    """The model with floating weights in `dtype`; buffers that no file holds (tables of frequencies) keep theirs.

    The modules of the names `kept`, and all in them, have float32 weights and compute with them: what comes in is cast up, and
    what goes out down. `hollow`: large weights without their values, which take no memory until somebody writes there.
    `waiting`: what makes a weight, by the id of the parameter that stands for it.
    """
    before: list[tuple[dict[str, Any], str, Any]] = []
    made: dict[tuple[int, torch.dtype], Tensor] = {}
    with contextlib.ExitStack() as hooks:
        try:
            for table, key, name, value in _floating(model) if dtype is not None else ():
                assert dtype is not None
                wanted = torch.float32 if within(name, kept) else dtype
                if value.dtype != wanted or id(value) in waiting:
                    before.append((table, key, value))
                    if (id(value), wanted) not in made:
                        if hollow and value.numel() > LARGE:
                            made[id(value), wanted] = _hollow(value, wanted)
                        else:
                            own = waiting[id(value)]() if id(value) in waiting else value
                            made[id(value), wanted] = check.narrowed(name, own, wanted)
                    table[key] = made[id(value), wanted]
            for name, module in model.named_modules() if dtype is not None else ():
                if name in kept:
                    hooks.enter_context(_wide(module, dtype))
            yield
        finally:
            for table, key, value in reversed(before):
                table[key] = value


def _floating(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, str, Tensor]]:
    """The floating parameters and stored buffers of a model: where they are, under which key, and their names."""
    for path, module in model.named_modules():
        kept = {key: value for key, value in module._buffers.items() if key not in module._non_persistent_buffers_set}
        for table, entries in ((module._parameters, dict(module._parameters)), (module._buffers, kept)):
            for key, value in entries.items():
                if value is not None and value.is_floating_point():
                    yield table, key, f"{path}.{key}".strip("."), value


@contextlib.contextmanager
def _wide(module: nn.Module, dtype: Any) -> Iterator[None]:
    """The module between two casts."""

    def up(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return _cast((args, kwargs), dtype, torch.float32)

    def down(_: nn.Module, __: Any, outputs: Any) -> Any:
        return _cast(outputs, torch.float32, dtype)

    hooks = module.register_forward_pre_hook(up, with_kwargs=True), module.register_forward_hook(down)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _cast(values: Any, old: torch.dtype, new: torch.dtype) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(new) if tensor.dtype == old else tensor, values)


def _hollow(tensor: Tensor, dtype: Any) -> Tensor:
    empty = torch.empty_like(tensor, dtype=dtype, requires_grad=False)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
