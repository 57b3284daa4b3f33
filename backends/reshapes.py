"""Reshapes that undo each other: sizes as products of numbers and names, so that what comes back to its shape is seen to."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir

_SAME = ("RotaryEmbedding", "Cast", "Sigmoid")  # operators whose output has the shape of their first input
_SIZED = ("Concat", "Shape")


@dataclass(frozen=True)
class Size:
    """A number times named sizes: `2·batch·length`."""

    number: int
    names: tuple[str, ...] = ()

    def __mul__(self, other: "Size") -> "Size":
        """The product."""
        return Size(self.number * other.number, tuple(sorted(self.names + other.names)))

    def __floordiv__(self, other: "Size") -> "Size | None":
        """The quotient where it is exact, else None."""
        names = list(self.names)
        for name in other.names:
            if name not in names:
                return None
            names.remove(name)
        exact = other.number != 0 and self.number % other.number == 0
        return Size(self.number // other.number, tuple(names)) if exact else None


Shape = tuple[Size, ...]


def straightened(program: onnx_ir.Model) -> None:
    """Chains of Reshape as one, and none where the shape stays: heads are split off and joined around every operator."""
    for node in list(program.graph):
        if node.op_type != "Reshape":
            continue
        while (source := _skippable(node)) is not None:
            node.replace_input_with(0, source)
        source = node.inputs[0]
        if source is not None and _shape(node.outputs[0]) is not None and _shape(node.outputs[0]) == _shape(source):
            onnx_ir.convenience.replace_all_uses_with(node.outputs[0], source, replace_graph_outputs=True)


def _skippable(node: onnx_ir.Node) -> onnx_ir.Value | None:
    """What the Reshape before this one reads, where this one gives the same of it."""
    inner = node.inputs[0].producer() if node.inputs[0] is not None else None
    source = inner.inputs[0] if inner is not None and inner.op_type == "Reshape" else None
    target = _numbers(node.inputs[1])
    if source is None or target is None:
        return None
    copied = [axis for axis, size in enumerate(target) if size == 0]
    before, after = _shape(node.inputs[0]), _shape(source)
    if copied and (before is None or after is None or any(before[a : a + 1] != after[a : a + 1] for a in copied)):
        return None
    return source


def _shape(value: onnx_ir.Value | None) -> Shape | None:
    """The sizes of a value, recorded or followed from what it is made of; None where they are not known."""
    if value is None:
        return None
    if value.shape is not None and all(not isinstance(s, onnx_ir.SymbolicDim) or s.value is not None for s in value.shape):
        return tuple(_size(s) for s in value.shape)
    node = value.producer()
    if node is None or value is not node.outputs[0]:
        return None
    if node.op_type in _SAME:
        return _shape(node.inputs[0])
    if node.op_type == "MultiHeadAttention":
        query, values = _shape(node.inputs[0]), _shape(node.inputs[2])
        return (*query[:2], values[2]) if query and values and len(query) == len(values) == 3 else None
    return _reshaped(node) if node.op_type == "Reshape" else None


def _reshaped(node: onnx_ir.Node) -> Shape | None:
    source, target = _shape(node.inputs[0]), _numbers(node.inputs[1])
    if source is None or target is None or (0 in target and node.attributes.get_int("allowzero", 0) == 1):
        return None
    sizes = [source[axis] if size == 0 and axis < len(source) else size for axis, size in enumerate(target)]
    known = [size for size in sizes if isinstance(size, Size)]
    known += [Size(size) for size in sizes if isinstance(size, int) and size > 0]
    rest = _product(source) // _product(known)
    shape = [size if isinstance(size, Size) else rest if size < 0 else Size(size) for size in sizes]
    return tuple(size for size in shape if size is not None) if None not in shape else None


def _numbers(value: onnx_ir.Value | None) -> list[int | Size] | None:
    """The entries of a vector of sizes, numbers as such (0 and -1 as Reshape means them); None where one is not known."""
    if value is None:
        return None
    if (constant := onnx_ir.convenience.get_const_tensor(value)) is not None:
        return [int(number) for number in constant.numpy().ravel()]
    node = value.producer()
    if node is None or node.op_type not in _SIZED:
        return None
    if node.op_type == "Concat":
        parts = [_numbers(part) for part in node.inputs]
        return None if None in parts else list(itertools.chain(*(part for part in parts if part is not None)))
    shape = _shape(node.inputs[0])
    return (
        None if shape is None else list(shape[node.attributes.get_int("start", 0) : node.attributes.get_int("end", len(shape))])
    )


def _size(size: int | onnx_ir.SymbolicDim) -> Size:
    name = str(size)
    return Size(int(name)) if name.isdigit() else Size(1, (name,))


def _product(sizes: Sequence[Size]) -> Size:
    total = Size(1)
    for size in sizes:
        total = total * size
    return total
