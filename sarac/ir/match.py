"""Which nodes of a graph are linear in which parameter: linear, matmul, mm, @ and addmm, plain or transposed."""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional

_MATMUL = {operator.matmul, torch.matmul, torch.mm}
_TRANSPOSES = {"t", "T", "mT", "transpose", "swapaxes", "swapdims", "permute"}


@dataclass(frozen=True)
class Match:
    """`node` computes x W (+ bias): its input `x` and whether the parameter is stored as (in, out)."""

    node: fx.Node
    param: str
    x: Any
    chain: tuple[fx.Node, ...]  # the read of the parameter, then the transposes up to the node
    transposed: bool
    left: bool = False  # W x instead of x W: linear, but without an input of shape (…, in)


def linear_nodes(graph: fx.Graph, params: Iterable[str]) -> tuple[list[Match], dict[str, str]]:
    """The linear nodes over these parameters, and for each parameter read otherwise the first such operation's name."""
    matches: list[Match] = []
    others: dict[str, str] = {}
    names = set(params)
    for read in graph.nodes:
        if read.op == "get_attr" and read.target in names:
            _follow((read,), str(read.target), False, matches, others)
    return matches, others


def _follow(chain: tuple[fx.Node, ...], param: str, flipped: bool, matches: list[Match], others: dict[str, str]) -> None:
    """Sort the users of a parameter, or of its transpose, into linear nodes and other readers."""
    for user in chain[-1].users:
        turns = _turns(user)
        if turns is not None:
            _follow((*chain, user), param, flipped != turns, matches, others)
            continue
        match = _match(user, chain, param, flipped)
        if match is None:
            others.setdefault(param, _name(user))
        else:
            matches.append(match)


def _match(node: fx.Node, chain: tuple[fx.Node, ...], param: str, flipped: bool) -> Match | None:
    args, weight = node.args, chain[-1]
    if node.op == "call_function" and node.target is functional.linear:
        x, w = _argument(node, 0, "input"), _argument(node, 1, "weight")
        return Match(node, param, x, chain, flipped) if w is weight and x is not weight else None
    if (node.op == "call_function" and node.target is torch.addmm) or (node.op == "call_method" and node.target == "addmm"):
        x, w = _argument(node, 1, "mat1"), _argument(node, 2, "mat2")
        scaled = node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1
        return None if w is not weight or x is weight or scaled else Match(node, param, x, chain, not flipped)
    matmul = node.op == "call_function" and node.target in _MATMUL
    if matmul or (node.op == "call_method" and node.target in ("matmul", "mm", "__matmul__")):
        if len(args) != 2 or args[0] is args[1]:
            return None
        left = args[0] is weight
        return Match(node, param, args[1] if left else args[0], chain, flipped if left else not flipped, left)
    return None


def _turns(node: fx.Node) -> bool | None:
    """Whether a node transposes a matrix (True), leaves it as it lies (False), or does something else (None)."""
    if node.op == "call_function" and node.target is getattr:
        return True if node.args[1] in ("T", "mT") else None
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name not in _TRANSPOSES or node.op not in ("call_method", "call_function") or node.kwargs:
        return None
    dims = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], tuple | list) else node.args[1:]
    order = [dim % 2 for dim in dims if isinstance(dim, int)]
    if name == "t" or order == [1, 0] or (order == [0, 1] and name != "permute"):
        return True
    return False if order in ([0, 1], [0, 0], [1, 1]) else None


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _name(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
