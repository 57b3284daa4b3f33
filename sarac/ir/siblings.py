"""Sites that read one input (q, k, v; gate, up) project it together: one product for all their V's instead of one each.

Where k is small such a product costs the reading of x, whatever k is. Who the siblings are is seen, not told: those whose calls
get the very same tensor, unwritten in between, one after another. A compiled graph has none of this: it has no calls to see.
"""

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

WIDEST = 256  # above so many directions each the products are bound by operations, which are as many together


class _Seen(threading.local):
    """The input that was projected last, who read it, and what is there for those who will."""

    x: Any = staticmethod(lambda: None)
    version = 0
    readers: tuple[Any, ...] = ()
    ready: dict[int, Tensor]

    def __init__(self) -> None:
        self.ready = {}


_seen = _Seen()
_groups: dict[int, tuple[Any, ...]] = {}  # by the id of the first member, weak references to all


def projected(x: Tensor, v: Tensor) -> Tensor:
    """V x of every row, (rows, k), from x (…, in) and V (k, in)."""
    flat = x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling() or len(v) > WIDEST or x.is_inference():
        return flat @ v.mT
    if _seen.x() is x and _seen.version == x._version:
        found: Tensor | None = _seen.ready.pop(id(v), None)
        if found is None:
            _seen.readers = (*_seen.readers, weakref.ref(v))
        return flat @ v.mT if found is None else found
    _learn(() if _seen.ready else _seen.readers, _seen.readers)
    _seen.x, _seen.version, _seen.readers, _seen.ready = weakref.ref(x), x._version, (weakref.ref(v),), {}
    members = [one() for one in _groups.get(id(v), ())]
    if not members or members[0] is not v or not all(_joins(one, v) for one in members):
        return flat @ v.mT
    _seen.readers = tuple(weakref.ref(one) for one in members)
    own, *others = torch.split(flat @ torch.cat(members).mT, [len(one) for one in members], 1)
    _seen.ready = {id(one): part for one, part in zip(members[1:], others, strict=True)}
    return own


def _learn(readers: tuple[Any, ...], before: tuple[Any, ...]) -> None:
    """Remember those that read one input; none where not all of those `before`, who were projected for, came for it."""
    first = before[0]() if before else None
    if first is None:
        return
    if len(readers) > 1 and len({id(one()) for one in readers}) == len(readers):
        if id(first) not in _groups:
            weakref.finalize(first, _groups.pop, id(first), None)
        _groups[id(first)] = readers
    else:
        _groups.pop(id(first), None)


def _joins(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and (one.dtype, one.device, one.shape[1]) == (other.dtype, other.device, other.shape[1])
