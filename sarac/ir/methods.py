"""The table of methods, and adapters built from and written as the plain values of plans and files."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from typing import Any

from sarac.ir.adapters import Adapter, MoSara, Sara
from sarac.ir.errors import PlanError, near
from sarac.ir.start import require

METHODS: dict[str, type[Sara | MoSara]] = {"sara": Sara, "mosara": MoSara}
_RANKS = ("rank", "parts", "router_rank")


def options(method: str) -> dict[str, Field[Any]]:
    """The options of a method by the names that plans and files use; the ranks are no option."""
    if method not in METHODS:
        raise PlanError(f"The method {method!r} is unknown. {near(method, METHODS)}")
    return {item.metadata.get("option", item.name): item for item in fields(METHODS[method]) if item.name not in _RANKS}


def build(method: str, rank: int | Sequence[int], chosen: Mapping[str, Any]) -> Adapter:
    """The adapter of a method at a rank, or at the ranks of a stack, with options by the names that plans use."""
    known = options(method)
    wrong = next((name for name in chosen if name not in known), None)
    if wrong is not None:
        shaping = ["min", "max", "multiple"]  # options of every rule
        raise PlanError(f"The method {method} has no option {wrong!r}. {near(wrong, [*shaping, *known], len(known) + 3)}")
    kinds = {known[name].name: _read(name, known[name], value) for name, value in chosen.items()}
    parts = () if isinstance(rank, int) else tuple(rank)
    return METHODS[method](rank=max(parts) if parts else rank, parts=parts, **kinds)  # type: ignore[arg-type]  # one or the other


def describe(adapter: Adapter) -> dict[str, Any]:
    """The adapter as plain JSON values: method, rank (a list for a stack) and every option."""
    values = {
        name: value
        for name, item in options(adapter.method).items()
        if (value := getattr(adapter, item.name)) != item.default or not item.metadata.get("sparse")
    }
    return {"method": adapter.method, "rank": list(adapter.parts) or adapter.rank, **values}


def at_rank(adapter: Adapter, rank: int | Sequence[int]) -> Adapter:
    """The same adapter at another rank, or at the ranks of a stack."""
    chosen = {name: value for name, value in describe(adapter).items() if name not in ("method", "rank")}
    return build(adapter.method, rank, chosen)


def trainable_count(adapter: Adapter, shape: tuple[int, int]) -> int:
    """How many numbers train on a weight of shape (out, in), or on a stack of such."""
    if adapter.parts:
        return sum(trainable_count(at_rank(adapter, rank), shape) for rank in adapter.parts)
    shapes = adapter.shapes(*shape)
    return sum(math.prod(shapes[role]) for role in adapter.trainable)


def _read(name: str, item: Field[Any], value: Any) -> Any:
    whole = type(value) is int or (isinstance(value, str) and value.isdigit())
    if isinstance(item.default, int):
        require(whole, f"{name}={value}", "it takes a whole number")
        return int(value)
    require(isinstance(value, str), f"{name}={value}", "it takes a word")
    return value
