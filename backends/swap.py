"""Adapters that stay swappable: in the graph every trained tensor of an adapter is an input, at its start by default.

The default, an initializer of the input's own name, makes a file that nobody gives an adapter compute the base.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import onnx_ir
import torch
from onnx_ir import tensor_adapters
from torch import Tensor, nn

from sarac.ir.layers import adapted

KEY = "sarac.swappable"  # the metadata entry that says which inputs they are, and whether each row takes its own
ROWS = "rows"  # the size that is free in them: one for all rows of a batch, or one each


@dataclass(frozen=True)
class Swap:
    """What stays open: by the module's names, the input `SITE.sara_ROLE` that a tensor becomes and its value at the start.

    `rowwise`: each has a leading axis of 1, or of one for each row of a batch.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    starts: Mapping[str, Tensor] = field(default_factory=dict)
    rowwise: bool = False

    def __bool__(self) -> bool:
        """Whether anything stays open."""
        return bool(self.names)

    def entry(self) -> dict[str, str]:
        """The metadata that tell a runtime of it."""
        inputs = sorted(set(self.names.values()))
        return {KEY: json.dumps({"rowwise": self.rowwise, "inputs": inputs})} if inputs else {}

    def open(self, program: onnx_ir.Model) -> None:
        """Make the tensors of these names inputs without values, as the graph of a capture has them."""
        for name in [name for name in program.graph.initializers if name in self.names]:
            value = program.graph.initializers.pop(name)
            value.const_value = None
            program.graph.inputs.append(value)
        if self.rowwise:
            _freed(program.graph, self.names)

    def close(self, program: onnx_ir.Model, dtype: torch.dtype | None) -> None:
        """Give the inputs their own names and their defaults, in the end, when no pass could take those for constants."""
        for value in [value for value in program.graph.inputs if value.name in self.names]:
            given = str(value.name)
            value.name = self.names[given]
            start = self.starts[given].to("cpu", dtype or self.starts[given].dtype).contiguous()
            value.const_value = tensor_adapters.TorchTensor(start, name=value.name)
            program.graph.register_initializer(value)


def swap_of(model: nn.Module, rowwise: bool) -> Swap:
    """What of an adapted model's adapters trains, by all its names in the module, and where it starts: shifts at zero."""
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    names: dict[str, str] = {}
    starts: dict[str, Tensor] = {}
    for _, module, state in adapted(model):
        for slot in state.slots.values():
            tensors = slot.tensors(module)
            for role in slot.adapter.trainable:
                start = torch.zeros_like(tensors[role]) if role == "shift" else tensors[role].detach().clone()
                for name in aliases[id(tensors[role])]:
                    names[name], starts[name] = f"{slot.site}.sara_{role}", start[None] if rowwise else start
    return Swap(names, starts, rowwise)


@contextlib.contextmanager
def by_row(model: nn.Module, swap: Swap) -> Iterator[None]:
    """The model with the tensors that stay open as those of one row: with a leading axis, where rows have their own."""
    before: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]] = []
    made: dict[int, nn.Parameter] = {}
    try:
        for path, module in model.named_modules() if swap.rowwise else ():
            for key, value in list(module._parameters.items()):
                if value is not None and f"{path}.{key}".strip(".") in swap.names:
                    before.append((module._parameters, key, value))
                    made.setdefault(id(value), nn.Parameter(value.detach()[None], requires_grad=False))
                    module._parameters[key] = made[id(value)]
        yield
    finally:
        for table, key, value in before:
            table[key] = value


def _freed(graph: onnx_ir.Graph, names: Mapping[str, str]) -> None:
    """Free the leading size of the inputs, and what was captured of the shapes of all that is made of them and weights alone."""
    made = {value for value in graph.inputs if value.name in names}
    for value in made:
        value.shape = onnx_ir.Shape([ROWS, *(value.shape or ())[1:]])
    for node in graph:
        reads = [value for value in node.inputs if value is not None]
        fixed = all(value in made or value.const_value is not None or value.is_initializer() for value in reads)
        if fixed and any(value in made for value in reads):
            made.update(node.outputs)
            for output in node.outputs:
                output.shape = None
