"""Weights as symbols: a graph is optimised without their values, which are worked out one by one when it is written.

Optimisers turn, cast and join weights. Here a weight that such nodes make is an expression over the module's own tensors, so
that a graph of three layers can be repeated with the weights of thirty, weights are read and written one at a time, and a
later fold finds the place of every tensor in the file.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir
from onnx.reference import ReferenceEvaluator
from onnx_ir import tensor_adapters
from torch import Tensor

Values = Callable[[str], Tensor]  # a tensor of the module by its name there
SLACK = 8192  # elements by which a worked-out weight may outgrow what it is made of: tables of positions, not copies
_RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout")


@dataclass(frozen=True)
class Own:
    """A tensor of the module, by its name there."""

    name: str


@dataclass(frozen=True)
class Fixed:
    """A constant of the graph."""

    value: Any

    def __eq__(self, other: object) -> bool:
        """Whether the other is the same constant: dtype, shape and bits."""
        return isinstance(other, Fixed) and _bits(self.value) == _bits(other.value)

    def __hash__(self) -> int:
        """Of the bits."""
        return hash(_bits(self.value))


@dataclass(frozen=True)
class Made:
    """One output of an operator over weights and constants."""

    operator: str
    attributes: tuple[bytes, ...]
    arguments: "tuple[Weight | None, ...]"
    outputs: int
    index: int
    opset: int


Weight = Own | Fixed | Made


def names(weight: Weight | None) -> Iterator[str]:
    """The module's tensors that a weight is made of, in order."""
    if isinstance(weight, Own):
        yield weight.name
    elif isinstance(weight, Made):
        for argument in weight.arguments:
            yield from names(argument)


def renamed(weight: Weight, name: Callable[[str], str]) -> Weight:
    """The same weight of other tensors."""
    if isinstance(weight, Own):
        return Own(name(weight.name))
    if isinstance(weight, Made):
        arguments = tuple(argument and renamed(argument, name) for argument in weight.arguments)
        return Made(weight.operator, weight.attributes, arguments, weight.outputs, weight.index, weight.opset)
    return weight


def worked_out(weight: Weight, values: Values) -> Any:
    """The weight as a numpy array."""
    if isinstance(weight, Own):
        return tensor_adapters.TorchTensor(values(weight.name).detach().cpu().contiguous()).numpy()
    if isinstance(weight, Fixed):
        return weight.value
    given = {f"x{i}": worked_out(a, values) for i, a in enumerate(weight.arguments) if a is not None}
    inputs = [f"x{i}" if a is not None else "" for i, a in enumerate(weight.arguments)]
    node = onnx.helper.make_node(weight.operator, inputs, [f"y{i}" for i in range(weight.outputs)])
    node.attribute.extend(onnx.AttributeProto.FromString(attribute) for attribute in weight.attributes)
    evaluator = ReferenceEvaluator(node, opsets={"": weight.opset})
    return list(evaluator.run(None, given))[weight.index]


def lift(program: onnx_ir.Model, lifted: Mapping[str, Any]) -> dict[str, Weight]:
    """Make the initializers of these names inputs of the graph, without values; gives them by name."""
    graph, found = program.graph, {}
    for name in [name for name in graph.initializers if name in lifted]:
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
        found[name] = Own(name)
    return dict(found)


def cut(program: onnx_ir.Model, weights: dict[str, Weight]) -> None:
    """Cut off every node over weights and constants alone: what it makes becomes an input, and a weight in `weights`."""
    graph, opset = program.graph, program.opset_imports.get("", 20)
    made: dict[onnx_ir.Value | None, Weight]
    made = {value: weights[name] for value in graph.inputs if (name := str(value.name)) in weights}
    there = {made[value]: value for value in graph.inputs if value in made}
    gone: set[onnx_ir.Node] = set()
    for node in graph:
        arguments = [None if v is None else made.get(v) or _fixed(v) for v in node.inputs]
        if _plain(node) and any(value in made for value in node.inputs) and not _open(node, arguments) and not _doubles(node):
            attributes = tuple(onnx_ir.to_proto(a).SerializeToString() for a in node.attributes.values())
            for i, output in enumerate(node.outputs):
                made[output] = Made(node.op_type, attributes, tuple(arguments), len(node.outputs), i, opset)
            gone.add(node)
    for node in gone:
        for output in node.outputs:
            if output.is_graph_output() or any(user not in gone for user, _ in output.uses()):
                value = there.get(made[output])
                if value is None:
                    value = onnx_ir.Value(name=_called(made[output], weights), shape=output.shape, type=output.type)
                    there[made[output]] = value
                    weights[str(value.name)] = made[output]
                    graph.inputs.append(value)
                onnx_ir.convenience.replace_all_uses_with(output, value, replace_graph_outputs=True)
    for node in reversed([node for node in graph if node in gone]):
        graph.remove(node, safe=True)


def settle(program: onnx_ir.Model, weights: Mapping[str, Weight], values: Values) -> dict[str, Weight]:
    """Make every weight an initializer again, worked out when it is written and not before; gives them by name.

    A weight that is only turned keeps torch's name, unless it also stands unturned.
    """
    graph = program.graph
    kept: list[tuple[onnx_ir.Value, Weight]] = []
    for value in [value for value in graph.inputs if value.name in weights]:
        graph.inputs.remove(value)
        if value.uses() or value.is_graph_output():
            kept.append((value, weights[str(value.name)]))
    read = {weight.name for _, weight in kept if isinstance(weight, Own)}
    for value, weight in kept:
        turned = weight.arguments[0] if isinstance(weight, Made) and weight.operator == "Transpose" else None
        if isinstance(turned, Own) and turned.name not in read:
            value.name = turned.name
        value.const_value = _lazy(value, weight, values)
        graph.register_initializer(value)
    return {str(value.name): weight for value, weight in kept}


def _lazy(value: onnx_ir.Value, weight: Weight, values: Values) -> onnx_ir.LazyTensor:
    def tensor() -> Any:
        if isinstance(weight, Own):
            return tensor_adapters.TorchTensor(values(weight.name).detach().cpu().contiguous(), name=value.name)
        return onnx_ir.tensor(np.ascontiguousarray(worked_out(weight, values)), name=value.name)

    assert value.dtype is not None
    assert value.shape is not None
    return onnx_ir.LazyTensor(tensor, dtype=value.dtype, shape=value.shape, name=value.name)


def _plain(node: onnx_ir.Node) -> bool:
    nested = (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS)
    return (
        node.domain in ("", "ai.onnx")
        and node.op_type not in _RANDOM
        and not any(attribute.type in nested for attribute in node.attributes.values())
    )


def _open(node: onnx_ir.Node, arguments: list[Weight | None]) -> bool:
    """Whether an argument is known at run time only, or an output is larger than what it is made of."""
    if any(argument is None and value is not None for argument, value in zip(arguments, node.inputs, strict=True)):
        return True
    room = SLACK + sum(_size(value) or 0 for value in node.inputs if value is not None)
    return any((size := _size(output)) is None or size > room for output in node.outputs)


def _doubles(node: onnx_ir.Node) -> bool:
    """Whether a turned weight would be stored beside the same weight unturned: a tied one."""
    source = node.inputs[0] if node.op_type == "Transpose" else None
    return source is not None and source.producer() is None and any(user.op_type != "Transpose" for user, _ in source.uses())


def _fixed(value: onnx_ir.Value) -> Fixed | None:
    return Fixed(value.const_value.numpy()) if value.const_value is not None else None


def _size(value: onnx_ir.Value) -> int | None:
    sizes = [size for size in value.shape or () if isinstance(size, int)]
    return math.prod(sizes) if value.shape is not None and len(sizes) == len(value.shape) else None


def _called(weight: Weight, taken: Mapping[str, Weight]) -> str:
    name = f"{next(names(weight))}.{getattr(weight, 'operator', '')}"
    return name if name not in taken else f"{name}.{len(taken)}"


def _bits(value: Any) -> tuple[str, tuple[int, ...], bytes]:
    return str(value.dtype), tuple(value.shape), value.tobytes()
