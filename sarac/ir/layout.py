"""How a stored tensor of any shape is a matrix (out, in), or a stack of matrices (parts, out, in): the one place that knows.

A linear layer's weight lies as (out, in), GPT-2's as (in, out), a convolution's kernel is (out, in·kh·kw), the experts of a
mixture are a stack (experts, out, in), and the packed projection of attention is a stack of three.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sarac.ir.sharded import is_sharded


@dataclass(frozen=True)
class Layout:
    """Which dimensions of a stored tensor count the matrices of a stack, which are rows (out) and which columns (in).

    With `split` the first dimension is first divided into that many equal parts, which then is dimension 0.
    """

    out: tuple[int, ...] = (0,)
    inner: tuple[int, ...] = (1,)
    stack: tuple[int, ...] = ()
    split: int = 1

    @property
    def flipped(self) -> "Layout":
        """The layout of the transposed matrix."""
        return Layout(self.inner, self.out, self.stack, self.split)

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(parts, out, in) of a tensor stored with this shape; parts is 0 where there is one matrix and no stack."""
        shape = self._divided(shape)
        out, inner, parts = (math.prod(shape[dim] for dim in dims) for dims in (self.out, self.inner, self.stack))
        return (parts if self.stack else 0), out, inner

    def matrix(self, stored: Any) -> Any:
        """A stored tensor as (out, in) or (parts, out, in); a view where the dimensions allow one."""
        shape = self._divided(tuple(stored.shape))
        parts, out, inner = self.sizes(tuple(stored.shape))
        turned = stored.reshape(shape) if self.split > 1 else stored
        order = (*self.stack, *self.out, *self.inner)
        if order != tuple(range(len(order))):
            turned = turned.permute(order)
        wanted = (parts, out, inner) if self.stack else (out, inner)
        return turned if tuple(turned.shape) == wanted else turned.reshape(wanted)

    def stored(self, matrix: Any, shape: tuple[int, ...]) -> Any:
        """A matrix, or a stack of them, as it is stored in a tensor of this shape."""
        divided = self._divided(tuple(shape))
        order = (*self.stack, *self.out, *self.inner)
        turned = matrix.reshape([divided[dim] for dim in order])
        if order != tuple(range(len(order))):
            turned = turned.permute([order.index(dim) for dim in range(len(order))])
        return turned.reshape(shape) if self.split > 1 else turned

    def _divided(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.split, shape[0] // self.split, *shape[1:]) if self.split > 1 else tuple(shape)


MATRIX, TRANSPOSED = Layout(), Layout((1,), (0,))


def kernel(dims: int) -> Layout:
    """The layout of a convolution's kernel (out, in, …): (out, in·kh·kw)."""
    return Layout((0,), tuple(range(1, dims)))


def matrices(dims: int) -> Layout:
    """A stack of matrices (…, out, in) in the last two of `dims` dimensions; a plain matrix where there are two."""
    return Layout((dims - 2,), (dims - 1,), tuple(range(dims - 2)))


def quantised(stored: Tensor) -> bool:
    """Whether a weight is a tensor subclass that stands for de-quantised values, as torchao's are."""
    own = getattr(type(stored), "dequantize", Tensor.dequantize)  # every subclass has torch's own: a tracer's fake tensors too
    return own is not Tensor.dequantize and not is_sharded(stored)


def dense(stored: Any) -> Any:
    """The values of a stored weight as a plain tensor, de-quantised where it is quantised."""
    return stored.dequantize() if quantised(stored) else stored
