"""Torch tensors as ONNX Runtime's inputs and outputs: bound where they lie, and in order with torch's work on the GPU."""

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import onnx
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from sarac.ir.errors import ExportError, InputError, near

_HOST = torch.device("cpu")


@dataclass(frozen=True)
class Port:
    """One input or output of a graph: its sizes, in letters where they are free, and the device it lies on in a session."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    kind: int
    device: torch.device

    @classmethod
    def of(cls, found: Any, memory: Any, device: torch.device) -> "Port":
        """From what a session on `device` says of it; ExportError for a type that no torch tensor has."""
        name = re.sub(r"tensor\((.*)\)", r"\1", found.type)
        dtype = getattr(torch, name, None)  # float and double are aliases in torch too
        if not isinstance(dtype, torch.dtype):
            raise ExportError(f"{found.name!r} is of type {found.type}, which no torch tensor has: convert the model.")
        shape = tuple(f"{found.name}.{axis}" if size is None else size for axis, size in enumerate(found.shape))
        kind = onnx.TensorProto.DataType.Value(name.upper())
        return cls(found.name, dtype, shape, kind, device if memory.name == "Cuda" else _HOST)

    def zeros(self) -> Tensor:
        """A tensor for it; its sizes must be numbers."""
        return torch.zeros([int(size) for size in self.shape], dtype=self.dtype, device=self.device)

    def __str__(self) -> str:
        """Its name, dtype and sizes."""
        return f"{self.name}: {str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


def as_tensor(value: Any) -> Any:
    """An array as a tensor over its memory; anything else as it is."""
    return torch.as_tensor(value) if hasattr(value, "__array__") and not isinstance(value, Tensor) else value


def ports(session: Any, device: torch.device) -> tuple[dict[str, Port], dict[str, Port]]:
    """The inputs and the outputs of a session's graph by name."""
    inputs = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
    outputs = zip(session.get_outputs(), session.get_output_memory_infos(), strict=True)
    first, last = ([Port.of(found, memory, device) for found, memory in pairs] for pairs in (inputs, outputs))
    return {port.name: port for port in first}, {port.name: port for port in last}


def adjustable(session: Any, device: torch.device) -> dict[str, Port]:
    """The inputs of a session's graph that have a default, by name."""
    memory = SimpleNamespace(name="Cuda" if device.type == "cuda" else "Cpu")
    found = [Port.of(one, memory, device) for one in session.get_overridable_initializers()]
    return {port.name: port for port in found}


def bind(place: Callable[..., None], port: Port, tensor: Tensor) -> Tensor:
    """Bind an input or output to a contiguous tensor's own memory; gives what must live until the run is over."""
    memory = tensor if tensor.numel() else tensor.new_empty(1)  # ONNX Runtime refuses the null pointer of an empty tensor
    place(port.name, tensor.device.type, tensor.device.index or 0, port.kind, list(tensor.shape), memory.data_ptr())
    return memory


def taken(port: Port, value: Any) -> Tensor:
    """An output in ONNX Runtime's memory as a torch tensor over the same memory."""
    tensor: Tensor = from_dlpack(value.__dlpack__())
    return tensor.view(torch.bool) if port.dtype == torch.bool else tensor  # DLPack has bools as bytes


def require_fitting(graph: str, takes: str, port: Port, tensor: Tensor) -> None:
    """InputError for a tensor of another dtype, or with more or fewer sizes, than an input of the graph has."""
    if tensor.dtype == port.dtype and tensor.dim() == len(port.shape):
        return
    do = "give it in such a shape" if tensor.dim() != len(port.shape) else f"convert it, for example with .to({port.dtype})"
    raise InputError(f"{graph} takes {takes}, and {port.name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}: {do}.")


def require_buffers(
    graph: str,
    device: torch.device,
    out: Any,
    values: Mapping[str, Tensor],
    inputs: Mapping[str, Port],
    outputs: Mapping[str, Port],
) -> None:
    """InputError for a buffer in `out` that its output does not fit into, as far as a graph of that name tells."""
    if not isinstance(out, Mapping):
        raise InputError(f"`out` holds a tensor for each output by its name, as in out={{{next(iter(outputs))!r}: buffer}}.")
    sizes = {size: n for name, port in inputs.items() for size, n in zip(port.shape, values[name].shape, strict=True)}
    for name, buffer in out.items():
        if name not in outputs:
            raise InputError(f"{graph} has no output {name!r} to write into `out`. {near(name, outputs)}")
        port = outputs[name]
        wanted = [sizes.get(size, size) for size in port.shape]
        fits = buffer.dim() == len(wanted) and all(
            isinstance(size, str) or size == n for size, n in zip(wanted, buffer.shape, strict=True)
        )
        if not fits or buffer.dtype != port.dtype or buffer.device != device or not buffer.is_contiguous():
            raise InputError(
                f"out[{name!r}] is {buffer.dtype} of shape {tuple(buffer.shape)}, strides {buffer.stride()}, on "
                f"{buffer.device}; {graph} writes {port.dtype} of shape ({', '.join(map(str, wanted))}) on "
                f"{device}: give a contiguous tensor of that kind, or leave it out."
            )


class Lane:
    """The CUDA stream that a session runs on: work waits for work on the GPU, and the host for nothing; none on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()  # ONNX Runtime takes one run at a time on a stream that it was given

    @property
    def on_host(self) -> bool:
        """Whether there is none, and runs are on the CPU."""
        return self._stream is None

    @property
    def options(self) -> dict[str, str]:
        """The CUDA provider's options for this stream. Torch's default stream has no number that would do: it is 0."""
        return {} if self._stream is None else {"user_compute_stream": str(self._stream.cuda_stream)}

    @contextlib.contextmanager
    def ordered(self) -> Iterator[None]:
        """Within, the session's work comes after all that torch has queued, and before all that it queues afterwards."""
        if self._stream is None:
            yield
            return
        current = torch.cuda.current_stream(self._device)
        with self._lock:
            self._stream.wait_stream(current)
            try:
                yield
            finally:
                current.wait_stream(self._stream)
