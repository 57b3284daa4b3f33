"""Inputs that a capture did not see: other sizes wherever the graph leaves them free, and other values."""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sarac.backends.runtime import Runtime
from sarac.ir.errors import InputError
from sarac.ir.inputs import Inputs, InputSpec, TensorSpec

# By how much the sizes of an unseen shape differ from the captured ones: longer first, shorter where longer is refused.
_STEPS = (3, 5, -1, -2, 1, 2)


def dynamic_axes(session: Runtime) -> dict[str, tuple[str, ...]]:
    """The symbols of every input's free dimensions; dimensions with one symbol change together."""
    return {name: tuple(size for size in shape if isinstance(size, str)) for name, shape in session.shapes.items()}


def unseen_inputs(
    spec: InputSpec, session: Runtime, captured: Inputs, count: int = 2, model: nn.Module | None = None
) -> list[Inputs]:
    """`count` random inputs at shapes that the capture did not see, batch 1 and a longer sequence among the first.

    Sizes that share a symbol, or were equal at capture, change together. Shapes that the torch `model`, in eval mode,
    rejects are passed over. Where no new shape is left, the captured shape with other values fills up the count. Tensors
    within lists and dicts stay as they were captured.
    """
    ports = _ports(spec, session, captured)
    free = _free_sizes(ports)
    found: list[Inputs] = []
    for step in range(2 * len(_STEPS) if free else 0):
        if len(found) == count:
            break
        candidate = _sample(ports, captured, {symbol: _size(*seen, step) for symbol, seen in free.items()}, step)
        with contextlib.suppress(InputError):
            if model is not None:
                candidate.call(model)
            found.append(candidate)
    return found + [_sample(ports, captured, {}, step) for step in range(len(found), count)]


@dataclass(frozen=True)
class _Port:
    """One captured tensor, and the sizes that the graph gives it: numbers, or the symbols of free ones."""

    spec: TensorSpec
    seen: Tensor
    sizes: tuple[int | str, ...]


def _ports(spec: InputSpec, session: Runtime, captured: Inputs) -> list[_Port]:
    names = {id(tensor): name for name, tensor in session.feed(captured).items()}
    tensors = [value for value in (*captured.args, *captured.kwargs.values()) if isinstance(value, Tensor)]
    return [
        _Port(replace(row, name=names.get(id(seen), row.name)), seen, session.shapes.get(names.get(id(seen), ""), ()))
        for row, seen in zip(spec.tensors, tensors, strict=True)
    ]


def _free_sizes(ports: list[_Port]) -> dict[str, tuple[bool, int]]:
    """Every symbol that may change: whether it is a batch, and its size at capture."""
    sizes = [(size, axis, port.seen.shape[axis]) for port in ports for axis, size in enumerate(port.sizes)]
    free = {size: (axis == 0, seen) for size, axis, seen in reversed(sizes) if isinstance(size, str)}
    # A size such as "2*s53" binds the symbols in it: all of them stay as they were captured.
    formulas = {symbol for symbol in free if not re.fullmatch(r"[\w.]+", symbol)}
    bound = formulas | {word for formula in formulas for word in re.findall(r"\w+", formula)}
    return {symbol: seen for symbol, seen in free.items() if symbol not in bound}


def _size(batch: bool, seen: int, step: int) -> int:
    if batch:
        return 1 if step % 2 == 0 else seen + 2 + step // 2
    size = seen + _STEPS[step % len(_STEPS)]
    return size if size > 0 else seen + step


def _sample(ports: list[_Port], captured: Inputs, sizes: Mapping[str, int], step: int) -> Inputs:
    """The captured inputs with random values, at these sizes and else at the captured ones."""
    generator = torch.Generator().manual_seed(step)
    values = []
    for port in ports:
        pairs = zip(port.sizes or port.seen.shape, port.seen.shape, strict=True)
        shape = [size if isinstance(size, int) else sizes.get(size, seen) for size, seen in pairs]
        values.append(_values(port, shape, generator, padded=step % 2 == 1).to(port.seen.device))
    drawn = iter(values)
    return captured.map(lambda _: next(drawn))


def _values(port: _Port, shape: list[int], generator: torch.Generator, padded: bool) -> Tensor:
    if port.seen.is_floating_point() or port.spec.high is not None:
        return port.spec.sample(shape, generator)
    if "mask" in port.spec.name and port.seen.numel():
        mask = torch.full(shape, bool(port.seen.double().mean() >= 0.5), device="cpu").to(port.seen.dtype)
        if padded and len(shape) > 1 and port.seen.dtype != torch.bool:  # in masks of bools, True may be what is padded
            mask[-1, ..., shape[-1] - shape[-1] // 4 :] = 0
        return mask
    low, high = (int(port.seen.min()), int(port.seen.max())) if port.seen.numel() else (0, 0)
    return torch.randint(low, high + 1, shape, generator=generator, device="cpu").to(port.seen.dtype)
