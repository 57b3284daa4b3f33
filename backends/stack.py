"""Repeated layers: the longest stack of layers that differ in their numbers alone, and the model with three of them."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

KEPT = 3  # the first, which may read other things than the rest; one to repeat; the last, which shows what follows on it
TABLE = 4096  # elements of a buffer of whole numbers that is compared by its content
_COUNTS = re.compile(r"layer|block|depth")  # what configurations call their number of layers


@dataclass(frozen=True)
class Stack:
    """A ModuleList or Sequential at `name` of `length` layers that repeat with a `period`: 1 where all are equal.

    Its groups of `period` layers are what is repeated, and what is counted below.
    """

    name: str
    length: int
    period: int = 1

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return self.length // self.period

    @property
    def tensors(self) -> re.Pattern[str]:
        """What the names of its layers' tensors look like: before the number, the number, and after it."""
        return re.compile(rf"^({re.escape(f'{self.name}.' if self.name else '')})(\d+)(\..*)$")

    def moved(self, name: str, by: int) -> str:
        """The name of the same tensor, `by` groups on; other names stay."""
        return self.tensors.sub(lambda found: f"{found[1]}{int(found[2]) + by * self.period}{found[3]}", name)

    def group(self, name: str) -> int:
        """The number of the group that a tensor belongs to, -1 for none."""
        found = self.tensors.match(name)
        return int(found[2]) // self.period if found else -1


def stack_of(model: nn.Module) -> Stack | None:
    """The stack that holds the most weights, of more than four groups that are alike; None where there is none."""
    found: list[tuple[int, Stack]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > KEPT + 1:
            period = _period(list(module))
            if period:
                found.append((sum(p.numel() for p in module.parameters()), Stack(name, len(module), period)))
    return max(found, key=lambda entry: entry[0])[1] if found else None


@contextlib.contextmanager
def shortened(model: nn.Module, stack: Stack) -> Iterator[None]:
    """The model with the first three groups of the stack alone, and configurations that say so."""
    layers: Any = model.get_submodule(stack.name)
    parts, parent = dict(layers._modules), model.get_submodule(stack.name.rpartition(".")[0])
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
    changes = [(vars(owner), key, value) for owner in (*configs, parent) for key, value in _shorter(vars(owner), stack)]
    before = [(owner, key, owner[key]) for owner, key, _ in changes]
    try:
        for owner, key, value in changes:
            owner[key] = value
        for key in list(parts)[KEPT * stack.period :]:
            del layers._modules[key]
        yield
    finally:
        layers._modules.clear()
        layers._modules.update(parts)
        for owner, key, value in before:
            owner[key] = value


def _shorter(values: dict[str, Any], stack: Stack) -> Iterator[tuple[str, Any]]:
    """The numbers and lists in a configuration that count the layers, for three groups of them."""
    for key, value in values.items():
        if value == stack.length and isinstance(value, int) and _COUNTS.search(key):
            yield key, KEPT * stack.period
        elif isinstance(value, list | tuple) and len(value) == stack.length:
            yield key, value[: KEPT * stack.period]


def _period(layers: list[nn.Module]) -> int:
    """The smallest number of layers after which they repeat, more than three times; 0 where they do not.

    They repeat where all facts do, but for those that are a layer's own number.
    """
    tables = [dict(_facts(layer)) for layer in layers]
    lengths = [p for p in range(1, len(layers) // (KEPT + 1) + 1) if len(layers) % p == 0]
    return next((period for period in lengths if _repeats(tables, period)), 0)


def _repeats(tables: list[dict[Any, Any]], period: int) -> bool:
    for one in range(period):
        column = tables[one::period]
        if any(table.keys() != column[0].keys() for table in column):
            return False
        for key, value in column[0].items():
            values = [table[key] for table in column]
            if values != [value] * len(values) and values != list(range(one, len(tables), period)):
                return False
    return True


def _facts(layer: nn.Module) -> Iterator[tuple[Any, Any]]:
    """What a layer is: classes, plain attributes, shapes and dtypes of its tensors, and small tables, which optimisers read."""
    for name, module in layer.named_modules():
        yield name, (type(module), module.training)
        for key, value in vars(module).items():
            if isinstance(value, bool | int | float | str | type(None) | tuple):
                yield (name, key), value
    for name, tensor in (*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False)):
        small = not tensor.is_floating_point() and tensor.numel() <= TABLE
        yield f"{name} ", (tuple(tensor.shape), tensor.dtype, type(tensor), tensor.tolist() if small else None)
