"""Adapters that stay swappable: in the graph every trained tensor of an adapter is an input, at its start by default.

The default, an initializer of the input's own name, makes a file that nobody gives an adapter compute the base.
"""

import contextlib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir
import torch
from onnx_ir import tensor_adapters
from torch import Tensor, nn

from sarac.ir.layers import adapted
from sarac.ir.terms import narrow

KEY = "sarac.swappable"  # the metadata entry that says which inputs they are, and whether each row takes its own
ROWS = "rows"  # the size that is free in them: one for all rows of a batch, or one each


@dataclass(frozen=True)
class Swap:
    """What stays open: by the module's names, the input `SITE.sara_ROLE` that a tensor becomes and its value at the start.

    `rowwise`: each has a leading axis of 1, or of one for each row of a batch. `ones`: the scales, which are 1 once s is in V.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    starts: Mapping[str, Tensor] = field(default_factory=dict)
    rowwise: bool = False
    ones: Collection[str] = ()

    @property
    def scaled(self) -> bool:
        """Whether s stands in V: not where a router reads V x."""
        return bool(self.ones)

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
        for name in [name for name in program.graph.initializers if name in self.ones]:
            for node, index in list(program.graph.initializers[name].uses()):
                other = node.inputs[1 - index]
                if node.op_type == "Mul" and other is not None:
                    onnx_ir.convenience.replace_all_uses_with(node.outputs[0], other)
                    program.graph.remove(node, safe=True)

    def close(self, program: onnx_ir.Model, dtype: torch.dtype | None) -> None:
        """Give the inputs their own names and their defaults, in the end, when no pass could take those for constants."""
        for value in [value for value in program.graph.inputs if value.name in self.names]:
            given = str(value.name)
            value.name = self.names[given]
            start = self.starts[given].to("cpu", dtype or self.starts[given].dtype).contiguous()
            default = tensor_adapters.TorchTensor(start, name=value.name)
            if value.dtype not in (None, default.dtype):  # of a module that stays in float32: adapters are of one dtype
                _cast_behind(program.graph, value, default.dtype)
            value.const_value = default
            program.graph.register_initializer(value)


def swap_of(model: nn.Module, rowwise: bool) -> Swap:
    """What of an adapted model's adapters trains, by all its names in the module, and where it starts: shifts at zero."""
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    names: dict[str, str] = {}
    starts: dict[str, Tensor] = {}
    ones: list[str] = []
    for _, module, state in adapted(model):
        for slot in state.slots.values():
            tensors = slot.tensors(module)
            ones += aliases[id(tensors["scale"])]
            for role in slot.adapter.trainable:
                start = torch.zeros_like(tensors[role]) if role == "shift" else tensors[role].detach().clone()
                for name in aliases[id(tensors[role])]:
                    names[name], starts[name] = f"{slot.site}.sara_{role}", start[None] if rowwise else start
    return Swap(names, starts, rowwise, () if any(name.endswith(".sara_router") for name in names.values()) else frozenset(ones))


@contextlib.contextmanager
def opened(model: nn.Module, swap: Swap) -> Iterator[None]:
    """The model as a swappable export computes it: what stays open with a leading axis where rows have their own, and s in V.

    The product h = 2^-p S V x, with 2^p >= sqrt(out), is no larger than the base's own largest output, as |s_i v_i x| is at most
    the norm of W x: so it stays in half precision, and 2^p U takes it back.
    """
    before: list[tuple[dict[str, Any], str, Any]] = []
    made: dict[int, Tensor] = {}
    try:
        for path, module in model.named_modules() if swap else ():
            changes = _scaled(module) if swap.scaled else {}
            for key, value in module._parameters.items():
                if value is not None and swap.rowwise and f"{path}.{key}".strip(".") in swap.names:
                    changes[key] = value.detach()[None]
            for key, value in changes.items():
                before.append((module._parameters, key, own := module._parameters[key]))
                made.setdefault(id(own), nn.Parameter(value, requires_grad=False))
                module._parameters[key] = made[id(own)]
        with narrow() if swap.scaled else contextlib.nullcontext():
            yield
    finally:
        for table, key, value in before:
            table[key] = value


def _scaled(module: nn.Module) -> dict[str, Tensor]:
    """An adapted module's factors as 2^-p S V and 2^p U, and s as ones, by their names there."""
    found = {}
    for slot in module.__dict__["_sara"].slots.values() if "_sara" in module.__dict__ else ():
        u, v, s = (slot.tensors(module)[role].detach() for role in ("u", "v", "scale"))
        power = 2.0 ** math.ceil(math.log2(u.shape[-2]) / 2)
        found[slot.attribute("u")] = (u.float() * power).to(u.dtype)
        found[slot.attribute("v")] = (v.float() * (s.float() / power).unsqueeze(-1)).to(v.dtype)
        found[slot.attribute("scale")] = torch.ones_like(s)
    return found


def _cast_behind(graph: onnx_ir.Graph, value: onnx_ir.Value, dtype: onnx_ir.DataType) -> None:
    """Make an input one of another dtype, which its readers get in their own."""
    assert value.dtype is not None
    cast = onnx_ir.node("Cast", [value], {"to": value.dtype.value})
    cast.outputs[0].shape, cast.outputs[0].dtype = value.shape, value.dtype
    for user, index in list(value.uses()):
        if user is not cast:
            user.replace_input_with(index, cast.outputs[0])
    value.dtype = dtype
    graph.insert_before(graph[0], cast)


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
