"""What masks come to, found by working them out: attention that looks back only is told so, and guards that never act go."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir

SIZES = (2, 7, 4)  # that every free size is given in turn, each input's axis a little more than the one before
LEAST = -1e4  # what a mask adds at least where it hides: half precision ends at -65504
_BIAS, _PAST = 5, 6  # the inputs of com.microsoft's MultiHeadAttention that add to its scores, and that hold earlier keys


def unmasked(program: onnx_ir.Model, *, seeing: bool = False) -> None:
    """Attention without its mask, where that hides nothing, or what comes later alone: `unidirectional` says so.

    Kernels for that form skip what is hidden, and need no scores in memory: at (8, 1024) half the time. The mask is proven
    by what it is made of (sizes of the inputs and constants, no values) and by what it comes to at several sizes. `seeing`:
    whoever gives the masks lets every row see something, so that rows that see nothing need no guard.
    """
    found = Worked(program)
    for node in list(program.graph):
        if node.op_type == "MultiHeadAttention" and _plain(node):
            if found.always(node.inputs[_BIAS], lambda mask: not mask.any()):
                node.replace_input_with(_BIAS, None)
            elif found.always(node.inputs[_BIAS], _looks_back):
                node.attributes["unidirectional"] = onnx_ir.AttrInt64("unidirectional", 1)
                node.replace_input_with(_BIAS, None)
        elif (rows := _guarded(node)) and (seeing or found.always(node.inputs[0], lambda value: not value.any())):
            onnx_ir.convenience.replace_all_uses_with(node.outputs[0], rows, replace_graph_outputs=True)


@dataclass
class Worked:
    """Values of a graph that depend on the sizes of its inputs alone, at some sizes."""

    program: onnx_ir.Model
    _known: dict[onnx_ir.Value, list[Any]] = field(default_factory=dict)

    def always(self, value: onnx_ir.Value | None, holds: Callable[[Any], bool]) -> bool:
        """Whether a value needs nothing but sizes, and this holds of it at all that were tried."""
        if value is None:
            return False
        if value not in self._known:
            self._known[value] = []
            with contextlib.suppress(Exception):  # whatever cannot be worked out is not known
                self._known[value] = list(self._tried(value))
        return bool(self._known[value]) and all(map(holds, self._known[value]))

    def _tried(self, value: onnx_ir.Value) -> Iterator[Any]:
        if (constant := onnx_ir.convenience.get_const_tensor(value)) is not None:
            yield constant.numpy()
            return
        nodes, leaves = _cone(value)
        free = dict.fromkeys(str(s) for v in self.program.graph.inputs for s in v.shape or () if not _number(s))
        limits = [limit for constant in leaves.values() for limit in _limits(constant)]
        if free and any(limit >= min(SIZES[1:]) for limit in limits):
            raise ValueError("a window: what lies within it looks like a mask that hides what comes later alone")
        for size in SIZES if free else SIZES[:1]:
            yield self._run(value, nodes, leaves, {name: size + index for index, name in enumerate(free)})

    def _run(
        self, value: onnx_ir.Value, nodes: list[onnx_ir.Node], leaves: dict[onnx_ir.Value, Any], sizes: dict[str, int]
    ) -> Any:
        """The value at these sizes, by ONNX Runtime on the CPU."""
        import onnxruntime

        protos = []
        for node in nodes:
            if _sized(node):
                assert node.inputs[0] is not None
                shape = [int(str(s)) if _number(s) else sizes[str(s)] for s in node.inputs[0].shape or ()]
                cut = slice(node.attributes.get_int("start", 0), node.attributes.get_int("end", len(shape)))
                protos.append(onnx.helper.make_node("Constant", [], [str(node.outputs[0].name)], value_ints=shape[cut]))
            else:
                protos.append(onnx_ir.to_proto(node))
        graph = onnx.helper.make_graph(protos, "mask", [], [onnx.ValueInfoProto(name=value.name)])
        graph.initializer.extend(onnx.numpy_helper.from_array(constant, leaf.name) for leaf, constant in leaves.items())
        opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in self.program.opset_imports.items()]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return session.run(None, {})[0]


def _cone(value: onnx_ir.Value) -> tuple[list[onnx_ir.Node], dict[onnx_ir.Value, Any]]:
    """The nodes that make a value, in order, and the constants that they read; ValueError if they read anything else."""
    nodes: dict[onnx_ir.Node, None] = {}
    leaves: dict[onnx_ir.Value, Any] = {}
    waiting = [value]
    while waiting:
        one = waiting.pop()
        node = one.producer()
        if (constant := onnx_ir.convenience.get_const_tensor(one)) is not None:
            leaves[one] = constant.numpy()
        elif node is None:
            raise ValueError(f"{one.name} is known at run time only")
        elif node not in nodes:
            nodes[node] = None
            waiting += [] if _sized(node) else [v for v in node.inputs if v is not None]
    last = value.producer()
    graph = last.graph if last is not None else None
    return [node for node in graph or () if node in nodes], leaves


def _plain(node: onnx_ir.Node) -> bool:
    """Whether attention has a mask to add, no other, and no earlier keys."""
    given = [value is not None for value in node.inputs]
    return len(given) > _BIAS and given[_BIAS] and not given[4] and not any(given[_PAST:])


def _guarded(node: onnx_ir.Node) -> onnx_ir.Value | None:
    """The attention's output in which a Where replaces rows that see nothing; None where it does something else."""
    zeros = onnx_ir.convenience.get_const_tensor(node.inputs[1]) if node.op_type == "Where" and node.inputs[1] else None
    if zeros is None or zeros.numpy().any():
        return None
    source = node.inputs[2]
    while source is not None and (maker := source.producer()) is not None and maker.op_type in ("Reshape", "Transpose"):
        source = maker.inputs[0]
    maker = source.producer() if source is not None else None
    return node.inputs[2] if maker is not None and maker.op_type == "MultiHeadAttention" else None


def _looks_back(mask: Any) -> bool:
    """Whether a mask adds nothing on and below the diagonal, and hides all above it."""
    seen = np.tri(*mask.shape[-2:]) > 0
    return mask.shape[-1] == mask.shape[-2] and bool((mask == 0)[..., seen].all() and (mask <= LEAST)[..., ~seen].all())


def _sized(node: onnx_ir.Node) -> bool:
    """Whether a node gives the sizes of an input."""
    source = node.inputs[0] if node.op_type == "Shape" else None
    return source is not None and source.is_graph_input() and source.shape is not None


def _limits(constant: Any) -> Iterator[int]:
    """The numbers of a constant that could be a length, so that a mask may change there."""
    for number in np.abs(constant.astype(np.float64)).ravel():
        if np.isfinite(number) and number < min(2**31, -LEAST):
            yield int(number)


def _number(size: Any) -> bool:
    return str(size).isdigit()
