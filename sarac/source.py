"""What a module's source multiplies with, for modules whose forward no tracer can follow."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Mapping

from torch import nn

# Linear calls by name, and at which place their weight stands; of a product either side may be one.
_AT = {
    "linear": 1,
    "addmm": 2,
    "baddbmm": 2,
    "bilinear": 2,
    **{f"conv{turned}{n}d": 1 for turned in ("", "_transpose") for n in (1, 2, 3)},
}
_ANYWHERE = {"matmul", "mm", "bmm", "mv", "einsum", "tensordot", "inner", "_grouped_mm", "grouped_mm"}


def multiplied(module: nn.Module) -> set[str]:
    """The attributes of `module` that stand, sliced, transposed or cast, as the weight of a linear call in its methods."""
    found: set[str] = set()
    for kind in type(module).__mro__:
        if kind is nn.Module:
            break
        for function in vars(kind).values():
            if inspect.isfunction(function):
                found.update(_weights(function))
    return found


@functools.lru_cache(maxsize=4096)
def _weights(function: object) -> frozenset[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))  # type: ignore[arg-type]  # a function
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if attribute := _attribute(value, names):
                names[name] = attribute
    found = {_attribute(side, names) for node in ast.walk(tree) for side in _sides(node)}
    return frozenset(found - {""})


def _sides(node: ast.AST) -> list[ast.expr]:
    """The expressions that may be the weight of a linear call."""
    match node:
        case ast.BinOp(op=ast.MatMult(), left=left, right=right):
            return [left, right]
        case ast.Call(func=ast.Attribute() | ast.Name() as called, args=args, keywords=keywords):
            name = called.attr if isinstance(called, ast.Attribute) else called.id
            if name in _ANYWHERE:
                return [called, *args]
            if name in _AT:
                return [*args[_AT[name] : _AT[name] + 1], *(word.value for word in keywords if word.arg == "weight")]
    return []


def _attribute(value: ast.expr, names: Mapping[str, str]) -> str:
    """NAME where an expression is self.NAME, sliced, transposed or otherwise called upon; "" where it is not."""
    while True:
        match value:
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                return name
            case ast.Name(id=name):
                return names.get(name, "")
            case ast.Attribute(value=inner) | ast.Subscript(value=inner) | ast.Call(func=ast.Attribute(value=inner)):
                value = inner
            case _:
                return ""
