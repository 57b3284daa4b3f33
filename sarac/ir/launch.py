"""How Triton's kernels (sarac.ir.kernels) are run, where Triton is: at once, or as operators of a compiled graph."""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

# A kernel's name, its grid, tensors, numbers, and constants that it is compiled for.
Launch = Callable[[str, tuple[int, int, int], tuple[Tensor, ...], tuple[Any, ...], tuple[Any, ...]], None]

_MOST = 4096  # kernels that are kept


def launched(
    name: str, grid: tuple[int, int, int], tensors: tuple[Tensor, ...], numbers: tuple[Any, ...], constants: tuple[Any, ...]
) -> None:
    """Run a kernel; again with numbers that it was compiled for, without Triton's own look at every argument (50 µs a call).

    It takes addresses then: of a tensor it would ask the driver about each.
    """
    device = tensors[0].device
    if device.type == "cuda" and device.index != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            launched(name, grid, tensors, numbers, constants)
        return
    places = [one.data_ptr() for one in tensors]
    kinds = [(one.dtype, place % 16) for one, place in zip(tensors, places, strict=True)]
    key = (name, device.index, grid, numbers, constants, *kinds)
    ready = _compiled.get(key)
    if ready is not None:
        ready(*places, *numbers, *constants, stream=torch._C._cuda_getCurrentRawStream(device.index))
        return
    made = getattr(kernels(), name)[grid](*tensors, *numbers, *constants)
    if made is not None:
        if len(_compiled) >= _MOST:
            _compiled.clear()  # tokens are in the key: what is launched now is likelier to come again
        _compiled[key] = made[grid]


_compiled: dict[Any, Any] = {}


def traced(
    name: str, grid: tuple[Any, ...], tensors: tuple[Tensor, ...], numbers: tuple[Any, ...], constants: tuple[Any, ...]
) -> None:
    """Write a kernel into the graph of a compiler, which launches it."""
    wrap_triton(getattr(kernels(), name))[grid](*tensors, *numbers, *constants)


def operator(name: str, function: Any, *written: str) -> Any:
    """A function as an operator of compiled graphs; torch looks for its kernels, which takes Triton."""
    return triton_op(name, function, mutates_args=written) if _THERE else function


def runs(tensor: Tensor) -> bool:
    """Whether the kernels run on a tensor's device, or are interpreted on the CPU, as tests ask for."""
    return _THERE and (tensor.is_cuda or _INTERPRETED)


@functools.cache
def kernels() -> Any:
    """The module of kernels, which imports Triton."""
    from sarac.ir import kernels as found

    return found


_THERE = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
