"""Sites that read one input (q, k, v; gate, up) project it together: one product for all their V's instead of one each.

Where k is small such a product costs the reading of x, whatever k is. Who the siblings are is known from the dataflow of a model
that was captured on example inputs, so that every call of every run computes the same; a compiled graph projects apart.
"""

import copy
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn

WIDEST = 256  # above so many directions each the products are bound by operations, which are as many together


class Siblings:
    """The V's of one input's readers, by module and attribute, and what of their last joint product is still to be taken."""

    def __init__(self, members: list[tuple[nn.Module, str]]) -> None:
        self.members, self._last = members, _Last()

    def project(self, x: Tensor, v: Tensor) -> Tensor:
        """V x of every row, (k, rows), from x (…, in) and V (k, in)."""
        last = self._last
        seen, mine = _version(x), (id(v), _version(v))
        if last.x() is x and last.version == seen and mine in last.ready:
            return last.ready.pop(mine)
        if last.ready:  # somebody did not come: it goes another way
            left = {one for one, _ in last.ready}
            self.members = [(module, name) for module, name in self.members if id(module._parameters.get(name)) not in left]
            last.ready = {}
        flat, joint = x.reshape(-1, x.shape[-1]).mT, list[Tensor]()
        for module, name in self.members:
            one = module._parameters.get(name)
            if one is not None and _joins(one, v):
                joint.append(one)
        if len(joint) < 2 or not any(one is v for one in joint):
            return v @ flat
        parts = torch.split(torch.cat(joint) @ flat, [len(one) for one in joint])
        last.x, last.version = weakref.ref(x), seen
        last.ready = {(id(one), _version(one)): part for one, part in zip(joint, parts, strict=True)}
        return last.ready.pop(mine)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Siblings":
        new = memo[id(self)] = Siblings([])
        new.members = [(copy.deepcopy(module, memo), name) for module, name in self.members]
        return new


class _Last(threading.local):
    """The input that was projected last, and the projections that nobody has taken yet."""

    def __init__(self) -> None:
        self.x: Any = lambda: None
        self.version = 0
        self.ready: dict[tuple[int, int], Tensor] = {}


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # what inference mode made cannot be written to outside of it


def _joins(one: Tensor, other: Tensor) -> bool:
    if type(one) not in (Tensor, nn.Parameter) or len(one) > WIDEST:
        return False
    return (one.dtype, one.device, one.shape[1]) == (other.dtype, other.device, other.shape[1])
