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
from torch.nn.functional import linear


def leaf(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """Let `function` be one node of the graph where a proxy goes in, and itself where tensors do."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        proxy = next((arg for arg in args if isinstance(arg, fx.Proxy)), None)
        return function(*args) if proxy is None else proxy.tracer.create_proxy("call_function", call, args, {})

    return call


@leaf
def project(x: Tensor, v: Tensor) -> Tensor:
    """V x, shape (…, k), from x (…, in) and V (k, in); in float32 where it would run in float16."""
    if _running_dtype(x) == torch.float16:
        with _without_autocast(x):
            return linear(x.float(), v.float())
    return linear(x, v)


@leaf
def add(y: Tensor, h: Tensor, u: Tensor) -> Tensor:
    """y + U h in y's dtype, from y (…, out), h (…, k) and U (out, k)."""
    if y.dtype == torch.float16:
        with _without_autocast(y):
            return y + linear(h.float(), u.float()).to(y.dtype)
    return y + linear(h.to(u.dtype), u).to(y.dtype)


@leaf
def score(h: Tensor, router: Tensor) -> Tensor:
    """R h in the router's dtype, shape (…, sets), from h (…, k) and R (sets, k)."""
    with _without_autocast(h):
        return linear(h.to(router.dtype), router)


@leaf
def mix(h: Tensor, gates: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """h ⊙ Σ_i g_i δ_i ⊙ s, shape (…, k), from h (…, k), gates (…, sets), δ (sets, k) and s (k,)."""
    for observer in _observers:
        observer(shift, gates)
    with _without_autocast(h):
        return h * ((gates.to(shift.dtype) @ shift) * scale)


@contextmanager
def observing(observer: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Call `observer(shift, gates)` at every routed call for a while; the shift parameter tells which site it is."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


_observers: list[Callable[[Tensor, Tensor], None]] = []


def _running_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    # Entered only where it matters: an exporter would turn it into an operator of its own.
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
