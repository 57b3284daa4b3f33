"""Which operations of a graph are linear in which parameter, and through what a parameter comes there.

A *weight* is an expression over parameters alone that a linear operation multiplies with activations. Where that expression
is a parameter, or its transpose, the operation can be rewritten; where it is sliced, concatenated, scaled or normalised first,
the parameter becomes its effective value instead.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx
from torch.nn import functional

from sarac.ir.layout import Layout, kernel
from sarac.ir.terms import EMBEDDING, LINEAR, How

_CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
# Linear operations by name: where the input and the weight stand, by position and keyword.
_PLACES: dict[str, tuple[tuple[int, str], tuple[int, str]]] = {
    **dict.fromkeys(("linear", *_CONVOLUTIONS, *(f"conv_transpose{n}d" for n in (1, 2, 3))), ((0, "input"), (1, "weight"))),
    **dict.fromkeys(("embedding", "embedding_bag"), ((0, "input"), (1, "weight"))),
    "bilinear": ((0, "input1"), (2, "weight")),
    "addmm": ((1, "mat1"), (2, "mat2")),
    "baddbmm": ((1, "batch1"), (2, "batch2")),
}
_PAIRS = {  # products of two, of which either may be the weight
    **dict.fromkeys(("matmul", "linalg_matmul", "__matmul__"), ((0, "input"), (1, "other"))),
    "mm": ((0, "input"), (1, "mat2")),
    "bmm": ((0, "input"), (1, "mat2")),
}
# Linear in each of their operands, of which any may be a weight, but without an input-side path.
_MULTILINEAR = frozenset(
    "mv addmv addmm addbmm baddbmm dot vdot vecdot linalg_vecdot inner tensordot chain_matmul linalg_multi_dot multi_dot einsum "
    "_grouped_mm grouped_mm lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell "
    "_native_multi_head_attention _transformer_encoder_layer_fwd".split()
)
_LOOKUPS = {"getitem", "__getitem__", "index_select", "index", "select", "take_along_dim", "gather"}
_TURNS = {"t", "transpose", "swapaxes", "swapdims", "permute", "contiguous"}
# Operations whose result holds the values of their first argument, however the others came about.
_PASSES_ON = frozenset(
    "t T mT transpose swapaxes swapdims permute contiguous clone detach alias to _to_copy type type_as float half bfloat16 "
    "double cpu cuda expand expand_as repeat tile repeat_interleave view view_as reshape reshape_as flatten unflatten unsqueeze "
    "squeeze getitem __getitem__ select index_select index narrow slice chunk split tensor_split unbind numpy_T".split()
)
_FACTS = frozenset("shape dtype device ndim size dim ndimension numel is_floating_point layout requires_grad __len__".split())


# Every node that depends on parameters and constants alone, and the parameters that it depends on.
MadeOf = dict[fx.Node, frozenset[str]]


@dataclass(frozen=True)
class _Turned:
    """A node that is a parameter with its dimensions in another order: by which nodes, and which order."""

    param: str
    shape: tuple[int, ...]
    chain: tuple[fx.Node, ...]
    order: tuple[int, ...]


@dataclass(frozen=True)
class Match:
    """`node` is linear in the parameter: its input `x`, how the parameter lies, and how the input goes through it."""

    node: fx.Node
    param: str
    x: Any
    chain: tuple[fx.Node, ...]  # the read of the parameter, then the transposes up to the node
    layout: Layout
    how: How


@dataclass(frozen=True)
class Call:
    """`node` is linear in a value made of these parameters, and goes on from the input `x`."""

    node: fx.Node
    x: Any
    params: frozenset[str]


@dataclass(frozen=True)
class Readers:
    """What reads each parameter of a graph: linear operations, linear operations on something made of it, and the rest."""

    calls: list[Call] = field(default_factory=list)  # all linear operations, in the order of the graph
    matches: list[Match] = field(default_factory=list)
    indirect: dict[str, tuple[str, str]] = field(default_factory=dict)  # the operation, and why it cannot be rewritten
    others: dict[str, str] = field(default_factory=dict)  # the first operation that is not linear in it
    lookups: set[str] = field(default_factory=set)  # those of which an index that is computed picks parts


def readers(graph: fx.Graph, shapes: Mapping[str, tuple[int, ...]], lifted: Mapping[str, str] | None = None) -> Readers:
    """Sort all that the parameters of these names and shapes come to in a graph.

    `lifted` names the parameter that an input of an exported graph stands for.
    """
    found = Readers()
    made_of: MadeOf = {}
    turned: dict[fx.Node, _Turned] = {}
    for node in graph.nodes:
        if node.op == "get_attr" or (lifted is not None and node.name in lifted):
            name = str(node.target) if lifted is None else lifted.get(node.name, "")
            made_of[node] = frozenset([name]) if name in shapes else frozenset()
            if name in shapes:
                turned[node] = _Turned(name, shapes[name], (node,), tuple(range(len(shapes[name]))))
        elif node.op in ("call_function", "call_method"):
            _sort(node, made_of, turned, found)
        else:
            _note_others(node.all_input_nodes, made_of, found, _name(node))
    return found


def _sort(node: fx.Node, made_of: MadeOf, turned: dict[fx.Node, _Turned], found: Readers) -> None:
    name, sources = operation(node), node.all_input_nodes
    first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    use = linear_use(node, made_of)
    if use is not None:
        _note_use(node, use, made_of, turned, found)
        _note_others([source for source in sources if source is not use[1]], made_of, found, name)
    elif name in _FACTS:
        made_of[node] = frozenset()
    elif name in _MULTILINEAR and not all(source in made_of for source in sources):
        params = frozenset(param for source in sources for param in made_of.get(source, ()))
        if params:
            found.calls.append(Call(node, next(source for source in sources if source not in made_of), params))
        for param in params:
            found.indirect.setdefault(param, (name, f"{name} has no input-side path for it"))
    elif name in _PASSES_ON and first is not None:
        if first in made_of:
            made_of[node] = made_of[first]
            if name in _LOOKUPS and not all(source in made_of for source in sources):
                found.lookups.update(made_of[first])
            order = _turn(node, turned[first].order) if first in turned else None
            if order is not None:
                turned[node] = replace(turned[first], chain=(*turned[first].chain, node), order=order)
        _note_others([source for source in sources if source is not first], made_of, found, name)
    elif sources and all(source in made_of for source in sources):
        made_of[node] = frozenset().union(*(made_of[source] for source in sources))
    else:
        _note_others(sources, made_of, found, name)


def linear_use(node: fx.Node, made_of: MadeOf) -> tuple[Any, fx.Node, bool] | None:
    """The input, the weight and whether it stands on the left, where `node` is linear in something made of parameters."""
    name = operation(node)
    if name in _PLACES:
        places = _PLACES[name]
        if name.startswith("embedding") and node.target is not getattr(functional, name):
            places = ((1, "indices"), (0, "weight"))  # torch's own order
        x, weight = (_argument(node, *place) for place in places)
        return (x, weight, False) if isinstance(weight, fx.Node) and made_of.get(weight) else None
    left: Any
    right: Any
    if name in _PAIRS:
        left, right = (_argument(node, *place) for place in _PAIRS[name])
    elif name == "einsum" and len(_operands(node)) == 2:
        left, right = _operands(node)
    else:
        return None
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        return None
    if made_of.get(right) and left not in made_of:
        return left, right, False
    return (right, left, True) if made_of.get(left) and right not in made_of else None


def linear_call(match: Match) -> tuple[str, Any] | None:
    """The operation (as sarac.ir.terms.base names it) and bias of what is x Wᵀ + b by any name; None of others."""
    name = operation(match.node)
    if match.how != LINEAR or match.layout.stack or name not in ("linear", "addmm", *_PAIRS):
        return None
    bias = {"linear": (2, "bias"), "addmm": (0, "input")}.get(name)
    return name if name in ("linear", "addmm", "mm") else "matmul", _argument(match.node, *bias) if bias else None


def operation(node: fx.Node) -> str:
    """The name of what a node computes: the same for a function, a method, and an operator of an exported graph."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    if node.target is getattr:
        return str(node.args[1])
    return str(getattr(node.target, "_opname", "") or getattr(node.target, "__name__", ""))


def _note_use(
    node: fx.Node, use: tuple[Any, fx.Node, bool], made_of: MadeOf, turned: Mapping[fx.Node, _Turned], found: Readers
) -> None:
    x, weight, left = use
    if operation(node) == "embedding" and _argument(node, 3, "max_norm") is not None:
        _note_others([weight], made_of, found, "an embedding with max_norm, which writes into it,")
        return
    found.calls.append(Call(node, x, made_of[weight]))
    known = turned.get(weight)
    lies = _lies(node, left, known) if known is not None and isinstance(x, fx.Node) and not made_of.get(x) else None
    if known is not None and lies is not None:
        found.matches.append(Match(node, known.param, x, known.chain, *lies))
        return
    name = operation(node)
    why = f"{name} has no input-side path for it" if known else f"{name} takes a value computed from it"
    for param in made_of[weight]:
        found.indirect.setdefault(param, (name, why))


def _lies(node: fx.Node, left: bool, weight: _Turned) -> tuple[Layout, How] | None:
    """How the parameter of a linear operation lies and how the input goes through it; None where it cannot be rewritten."""
    name, order = operation(node), weight.order
    if name in _CONVOLUTIONS and order == tuple(range(len(order))):
        how = _convolution(node, weight.shape[2:])
        return None if how is None else (kernel(len(order)), how)
    if name == "einsum":
        return _einsum(node, left, order)
    if name == "embedding" and node.target is functional.embedding:
        return Layout((order[1],), (order[0],)), EMBEDDING
    if name not in ("linear", "addmm", "baddbmm", *_PAIRS) or len(order) not in (2, 3):
        return None
    if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
        return None
    rows, columns = (order[-2], order[-1]) if name == "linear" or left else (order[-1], order[-2])
    return Layout((rows,), (columns,), order[:-2]), ("left",) if left else LINEAR


def _convolution(node: fx.Node, sizes: tuple[int, ...]) -> How | None:
    options = [_argument(node, 3 + i, name) for i, name in enumerate(("stride", "padding", "dilation", "groups"))]
    options = [default if given is None else given for given, default in zip(options, (1, 0, 1, 1), strict=True)]
    if any(isinstance(part, fx.Node) for option in options for part in (option if isinstance(option, tuple) else (option,))):
        return None
    return ("conv", tuple(sizes), *options)


def _einsum(node: fx.Node, left: bool, order: tuple[int, ...]) -> tuple[Layout, How] | None:
    """The layout of an einsum's weight by its letters: shared with x and the result the stack, with x alone in, the rest out."""
    equation = re.fullmatch(r"([a-z.]+),([a-z.]+)->([a-z.]+)", str(node.args[0]).replace(" ", ""))
    if equation is None:
        return None
    x, weight, result = (equation[2], equation[1], equation[3]) if left else equation.groups()
    if (
        "." in weight
        or len(order) != len(weight)
        or any(len(set(part)) < len(part.replace("...", ".")) for part in (x, weight, result))
    ):
        return None
    dims = dict(zip(weight, order, strict=True))
    stack = tuple(dims[letter] for letter in weight if letter in x and letter in result)
    inner = tuple(dims[letter] for letter in weight if letter in x and letter not in result)
    out = tuple(dims[letter] for letter in weight if letter not in x and letter in result)
    summed = len(stack) + len(inner) + len(out) < len(weight)
    if summed or not inner or not out or ("." in x) != ("." in result) or (stack and "." in x):
        return None
    return Layout(out, inner, stack), ("einsum", x, weight, result)


def _turn(node: fx.Node, order: tuple[int, ...]) -> tuple[int, ...] | None:
    """The order of a tensor's dimensions after a node that permutes them; None where it does something else."""
    name, last = operation(node), (*order[:-2], *reversed(order[-2:]))
    if name in ("t", "mT") or (name == "T" and len(order) == 2):
        return last
    if name not in _TURNS or node.kwargs:
        return None
    dims = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], tuple | list) else node.args[1:]
    places = [dim % len(order) for dim in dims if isinstance(dim, int)]
    if name == "contiguous":
        return order
    if name == "permute":
        return tuple(order[place] for place in places) if len(places) == len(order) else None
    if len(places) != 2:
        return None
    swapped = list(order)
    swapped[places[0]], swapped[places[1]] = order[places[1]], order[places[0]]
    return tuple(swapped)


def _operands(node: fx.Node) -> tuple[Any, ...]:
    given = node.args[1:]
    return tuple(given[0]) if len(given) == 1 and isinstance(given[0], tuple | list) else tuple(given)


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _note_others(sources: Iterable[fx.Node], made_of: MadeOf, found: Readers, name: str) -> None:
    for source in sources:
        for param in made_of.get(source, ()):
            found.others.setdefault(param, name)


def _name(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
