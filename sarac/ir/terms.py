"""The terms that adapters are written in: each one node of a graph where a proxy goes in, plain torch where tensors do.

They keep two promises that a bare `linear` would break: adding an adapter at zero is bit-exact in float16 (there V x is
taken in float32, since inf · 0 would make NaN of a good model), and routers never overflow under autocast.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import conv1d, conv2d, conv3d, embedding, linear


def leaf(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """Let `function` be one node of the graph where a proxy goes in, and itself where tensors do."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        for arg in args:
            if isinstance(arg, fx.Proxy):
                return arg.tracer.create_proxy("call_function", call, args, {})
        return function(*args)

    return call


# How a linear operation takes its input to its output: a tuple of plain values, so that it can stand in a graph.
#   ()                                                           y = x W^T, also over a stack of matrices
#   ("left",)                                                    y = W x
#   ("embedding",)                                               y = W^T, its rows looked up by x
#   ("conv", kernel, stride, padding, dilation, groups)          y = conv(x, W)
#   ("einsum", x, w, y)                                          y = einsum("x,w->y", x, W)
How = tuple[Any, ...]
LINEAR: How = ()
EMBEDDING: How = ("embedding",)


def base(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b by the operation that the model has there, to the last bit: linear of W (out, in), another of it as (in, out)."""
    match op:
        case "linear":
            return linear(x, weight, bias)
        case "addmm":
            assert bias is not None
            return torch.addmm(bias, x, weight)
        case "mm":
            return torch.mm(x, weight)
    return x @ weight


@leaf
def project(x: Tensor, v: Tensor, how: How = LINEAR) -> Tensor:
    """V x, shape (…, k), from x (…, in) and V (k, in) or (parts, k, in); in float32 where it would run in float16."""
    floats = x if x.is_floating_point() else v
    if running_dtype(floats) == torch.float16 and not _narrow:
        with without_autocast(floats):
            return _projected(x.float() if floats is x else x, v.float(), how)
    if x.is_floating_point() and x.dtype != v.dtype and not torch.is_autocast_enabled(x.device.type):
        x = x.to(v.dtype)  # factors that train may be wider than their base
    return _projected(x, v, how)


@leaf
def add(y: Tensor, h: Tensor, u: Tensor, how: How = LINEAR) -> Tensor:
    """y + U h in y's dtype, from y (…, out), h (…, k) and U (out, k) or (parts, out, k)."""
    if y.dtype == torch.float16 and not _narrow:
        with without_autocast(y):
            return y + _expanded(h.float(), u.float(), y, how).to(y.dtype)
    return y + _expanded(h.to(u.dtype), u, y, how).to(y.dtype)


@leaf
def scaled(h: Tensor, values: Tensor) -> Tensor:
    """h ⊙ λ, shape (…, k), from h (…, k) and λ (k,), or (rows, k) where each row of a batch has its own."""
    return h * _spread(values, h.ndim - values.ndim if values.ndim > 1 else 0)


@leaf
def score(h: Tensor, router: Tensor, stack: bool = False) -> Tensor:
    """R h in the router's dtype, shape (…, sets), from h (…, k) and R (sets, k), (rows, sets, k) or, of a stack, (parts, …)."""
    with without_autocast(h):
        h = h.to(router.dtype)
        return _projected(h, router, LINEAR) if stack or router.ndim == 2 else _by_row(h, router.mT)


@leaf
def gates_of(scores: Tensor, kind: str) -> Tensor:
    """The gates (…, sets) of scores: their softmax, its N largest (topk:N), or 1 at the largest with its gradient (hard)."""
    soft = torch.softmax(scores, -1)
    if kind == "hard":
        largest = torch.zeros_like(soft).scatter(-1, torch.argmax(scores, -1, keepdim=True), 1.0)
        return largest + (soft - soft.detach())
    if kind.startswith("topk:"):
        kept = torch.topk(soft, int(kind.removeprefix("topk:")), -1)
        return torch.zeros_like(soft).scatter(-1, kept[1], kept[0])
    return soft


@leaf
def mix(h: Tensor, gates: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """h ⊙ Σ_i g_i δ_i ⊙ s, shape (…, k), from h (…, k), gates (…, sets), δ (sets, k) and s (k,), or a stack of both.

    A δ of shape (rows, sets, k) with an s of shape (k,) has one for each row of a batch.
    """
    for observer in _observers:
        observer(shift, gates)
    with without_autocast(h):
        gates, rows = gates.to(shift.dtype), shift.ndim == 3 and scale.ndim == 1
        mixed = _by_row(gates, shift) if rows else gates @ shift
        return h * (mixed * (scale if scale.ndim == 1 else scale.unsqueeze(-2)))


def observed() -> bool:
    """Whether somebody watches the gates."""
    return bool(_observers)


@contextmanager
def observing(observer: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Call `observer(shift, gates)` at every routed call for a while; the shift parameter tells which site it is."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


@contextmanager
def narrow() -> Iterator[None]:
    """Stay in half precision for a while: for factors scaled so that V x cannot overflow where the base's output does not."""
    _narrow.append(True)
    try:
        yield
    finally:
        _narrow.pop()


_narrow: list[bool] = []
_observers: list[Callable[[Tensor, Tensor], None]] = []


def _projected(x: Tensor, v: Tensor, how: How) -> Tensor:
    match how:
        case ("left",):
            return (v @ x).mT if x.ndim > 1 else v @ x
        case ("embedding",):
            return embedding(x, v.mT)
        case ("conv", kernel, stride, padding, dilation, groups):
            filters = v.reshape(v.shape[0], -1, *kernel)
            filters = filters.repeat(groups, *(1 for _ in filters.shape[1:])) if groups > 1 else filters
            h = _CONVOLUTIONS[len(kernel)](x, filters, None, stride, padding, dilation, groups)
            h = h.movedim(-1 - len(kernel), -1)
            return h.reshape(*h.shape[:-1], groups, -1) if groups > 1 else h
        case ("einsum", left, right, result):
            stack, inner, _, rest = _roles(left, right, result)
            sizes = _sizes(left, x)
            factor = v.reshape(*(sizes[letter] for letter in stack), -1, *(sizes[letter] for letter in inner))
            h = torch.einsum(f"{left},{stack}{_RANK}{inner}->{stack}{rest}{_RANK}", x, factor)
            return h.flatten(0, len(stack) - 1).flatten(1, -2) if stack else h
    return linear(x, v) if v.ndim == 2 else x @ v.mT


def _expanded(h: Tensor, u: Tensor, y: Tensor, how: How) -> Tensor:
    match how:
        case ("left",):
            return u @ (h.mT if y.ndim > 1 else h)
        case ("conv", kernel, _, _, _, groups):
            if groups > 1:
                grouped = u.reshape(groups, -1, u.shape[-1])
                return torch.einsum("...gk,gok->...go", h, grouped).flatten(-2).movedim(-1, -1 - len(kernel))
            return linear(h, u).movedim(-1, -1 - len(kernel))
        case ("einsum", left, right, result):
            stack, _, out, rest = _roles(left, right, result)
            sizes = _sizes(result, y)
            factor = u.reshape(*(sizes[letter] for letter in stack + out), -1)
            if stack:
                h = h.reshape(*(sizes[letter] for letter in stack + rest), -1)
            return torch.einsum(f"{stack}{rest}{_RANK},{stack}{out}{_RANK}->{result}", h, factor)
    return linear(h, u) if u.ndim == 2 else h @ u.mT


def _by_row(x: Tensor, matrices: Tensor) -> Tensor:
    """x (rows, …, in) by a matrix (in, out) for each of its rows."""
    if x.ndim == 2:
        return (x.unsqueeze(-2) @ matrices).squeeze(-2)
    return x @ _spread(matrices, x.ndim - matrices.ndim)


def _spread(rows: Tensor, axes: int) -> Tensor:
    """The same with so many axes of size 1 behind its first: unlike a reshape, it leaves the number of rows open to a capture."""
    for _ in range(axes):
        rows = rows.unsqueeze(1)
    return rows


def _roles(left: str, right: str, result: str) -> tuple[str, str, str, str]:
    """The letters of an einsum by what they are: those of the stack, of in, of out, and the rest of x."""
    stack = "".join(letter for letter in right if letter in left and letter in result)
    inner = "".join(letter for letter in right if letter in left and letter not in result)
    out = "".join(letter for letter in right if letter not in left)
    rest = "".join(letter for letter in left if letter not in right and (letter in result or letter == "."))
    return stack, inner, out, rest


def _sizes(letters: str, tensor: Tensor) -> dict[str, int]:
    """The size of each letter of an einsum's operand; those behind an ellipsis count from the end."""
    before, _, after = letters.partition("...")
    sizes = {letter: tensor.shape[i] for i, letter in enumerate(before)}
    return sizes | {letter: tensor.shape[i - len(after)] for i, letter in enumerate(after)}


_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: conv1d, 2: conv2d, 3: conv3d}
_RANK = "Z"  # a letter that the matcher accepts in no equation


def running_dtype(x: Tensor) -> torch.dtype:
    """In which dtype a product with x runs, under autocast or not."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """No autocast on x's device for a while."""
    # Entered only where it matters: an exporter would turn it into an operator of its own.
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
