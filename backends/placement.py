"""Where ONNX Runtime runs a graph's nodes: the copies between host and device, and what computes on the CPU all the same."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from sarac.backends import onnx_file
from sarac.backends.providers import PROVIDERS, Start

_COPIES = re.compile(r"(\d+) Memcpy nodes are added to the graph")

# Arithmetic on sizes, which ONNX Runtime puts on the CPU on purpose: cheaper there than one kernel each on the GPU.
_ON_SIZES = set(
    "Shape Size Constant ConstantOfShape Identity Cast Gather Slice Concat Split Unsqueeze Squeeze Reshape Range Expand Tile "
    "Add Sub Mul Div Mod Neg Abs Min Max Floor Ceil ReduceProd ReduceSum ReduceMin ReduceMax "
    "Equal Less LessOrEqual Greater GreaterOrEqual Not And Or Where".split()
)
_WHOLE = {onnx.TensorProto.DataType.Value(name) for name in "INT64 INT32 BOOL UNDEFINED".split()}


@dataclass(frozen=True)
class Placement:
    """How many copies between host and device a session makes, and how many nodes of which operator compute on the CPU."""

    copies: int = 0
    on_cpu: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        """What keeps the device waiting, as half a sentence; "" if nothing does."""
        operators = ", ".join(f"{count} x {name}" for name, count in self.on_cpu.most_common())
        parts = [f"{self.on_cpu.total()} nodes compute on the CPU ({operators})"] if self.on_cpu else []
        parts += [f"{self.copies} copies go between host and device (Memcpy)"] if self.copies else []
        return " and ".join(parts)


def placement(start: Start, path: Path) -> Placement:
    """Where the nodes of a session went that was started from the file at `path`."""
    if start.session.get_providers()[0] == PROVIDERS["cpu"]:
        return Placement()
    groups = start.session.get_provider_graph_assignment_info()
    nodes = [node for group in groups if group.ep_name == PROVIDERS["cpu"] for node in group.get_nodes()]
    return Placement(copies(start.log), computing(nodes, onnx_file.output_types(path)))


def copies(log: str) -> int:
    """How many Memcpy nodes ONNX Runtime says that it put into a graph and the graphs nested in it."""
    return sum(int(count) for count in _COPIES.findall(log))


def computing(nodes: Iterable[Any], types: dict[str, tuple[int, ...]]) -> Counter[str]:
    """How many of the nodes, by operator, are no arithmetic on sizes, given their outputs' types as far as the file tells."""
    return Counter(
        node.op_type for node in nodes if node.op_type not in _ON_SIZES or not _WHOLE.issuperset(types.get(node.name, ()))
    )
