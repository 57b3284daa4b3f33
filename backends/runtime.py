"""ONNX files in ONNX Runtime: held to one provider, fed from torch inputs, their outputs paired with torch's."""

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from sarac.backends.providers import PROVIDERS, reason, started
from sarac.ir.check import leaves
from sarac.ir.errors import ExportError, InputError, near
from sarac.ir.inputs import Inputs

_CACHES = ("past_key_values", "past_buckets_states", "cache_params", "mems")  # what use_cache adds to the outputs


class Session:
    """An ONNX file opened on one provider, "cpu" or "cuda"; ExportError if it cannot be opened there and nowhere else.

    On CUDA, the arithmetic on shapes still runs on the CPU: ONNX Runtime places it there on purpose, which is why
    `session.disable_cpu_ep_fallback` (it refuses every graph with such a node) is no option for a dynamic graph.
    """

    def __init__(self, path: Path, provider: str = "cpu") -> None:
        self.path, self.provider = Path(path), provider
        if provider not in PROVIDERS:
            raise ExportError(f"There is no provider {provider!r}: give one of {', '.join(PROVIDERS)}.")
        if not self.path.is_file():
            raise ExportError(f"There is no ONNX file at {path}: check the path.")
        self._session, why = started(str(path), PROVIDERS[provider])
        if self._session is None:
            raise ExportError(
                f"{path} cannot run on {provider}: {why} `sarac doctor` lists what runs here and what is missing; export a "
                "damaged file again, or one in a dtype without kernels there (bfloat16 on a CPU) in another."
            )
        self.shapes: dict[str, tuple[int | str, ...]] = {
            port.name: tuple(f"{port.name}.{axis}" if size is None else size for axis, size in enumerate(port.shape))
            for port in self._session.get_inputs()
        }
        self.dtypes = {port.name: _dtype(port.type) for port in self._session.get_inputs()}
        self.outputs = tuple(port.name for port in self._session.get_outputs())

    def run(self, inputs: Inputs) -> dict[str, Tensor]:
        """The outputs by name, in the graph's order, on the CPU; InputError where the inputs do not fit the graph."""
        values = {name: _to_runtime(tensor.detach().cpu().contiguous()) for name, tensor in self.feed(inputs).items()}
        try:
            found = self._session.run_with_ort_values(list(self.outputs), values)
        except Exception as error:
            raise InputError(
                f"{self.path.name} does not run on these inputs ({inputs.describe()}): {reason(error)} It takes "
                f"{self.describe()}: give inputs of such shapes, or export again with the ones that you need."
            ) from error
        return {name: _to_torch(value) for name, value in zip(self.outputs, found, strict=True)}

    def feed(self, inputs: Inputs) -> dict[str, Tensor]:
        """The tensors of `inputs` by the names of the graph's inputs: keywords by name, arguments by position.

        Values that are no tensors are constants in the graph. A tensor that the graph has no input for is left out
        with a warning; one that is missing, or has another dtype, is an InputError.
        """
        named = dict(self._named(inputs))
        missing = [name for name in self.shapes if name not in named]
        strangers = [name for name in named if name not in self.shapes]
        if missing:
            raise InputError(
                f"{self.path.name} needs the input {missing[0]!r}, and got {', '.join(named) or 'none'}. "
                f"{near(missing[0], strangers) if strangers else 'Its inputs are ' + self.describe() + '.'}"
            )
        if strangers:
            warnings.warn(f"{self.path.name} was captured without {', '.join(strangers)}: left out here.", stacklevel=3)
        for name, shape in self.shapes.items():
            if named[name].dtype != self.dtypes[name] or named[name].dim() != len(shape):
                raise InputError(
                    f"{self.path.name} takes {self.describe()}, and {name!r} is {named[name].dtype} of shape "
                    f"{tuple(named[name].shape)}: convert it, for example with .to({self.dtypes[name]})."
                )
        return {name: named[name] for name in self.shapes}

    def describe(self) -> str:
        """The graph's inputs with their dtypes and shapes in one line; a size in letters is free."""
        return ", ".join(
            f"{name}: {str(self.dtypes[name]).removeprefix('torch.')}[{', '.join(map(str, shape))}]"
            for name, shape in self.shapes.items()
        )

    def _named(self, inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
        by_name = {}
        for name, value in inputs.kwargs.items():
            for path, tensor in leaves(value):
                key = name if isinstance(value, Tensor) else f"{name}.{_dotted(path)}"
                # The writer puts "input." before a name that an output has too, and torch joins nested ones by "_".
                known = [n for n in (key, f"input.{key}", key.replace(".", "_")) if n in self.shapes]
                by_name[known[0] if known else key] = tensor
        free = (name for name in self.shapes if name not in by_name)
        for index, (_, tensor) in enumerate(leaves(inputs.args)):
            yield next(free, f"argument {index}"), tensor
        yield from by_name.items()


def named_leaves(outputs: Any) -> dict[str, Tensor]:
    """Every tensor of a model's nested outputs by its dotted path, such as "logits" or "hidden_states.0"."""
    return {_dotted(path): tensor for path, tensor in leaves(outputs)}


def paired(outputs: Mapping[str, Tensor], reference: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `Session.run` gave beside the same outputs of torch, in one order and form, ready for `check.difference`.

    Paired by name, or by order where the graph's names are others. A cache that torch returns and the graph does not
    is left out; any other difference in number is an ExportError.
    """
    theirs = named_leaves(reference)
    name_of = {name: name if name in theirs else name.removeprefix("output.") for name in outputs}
    wanted = {name: t for name, t in theirs.items() if name in name_of.values() or not name.startswith(_CACHES)}
    if len(wanted) != len(outputs):
        raise ExportError(
            f"The ONNX model gives {len(outputs)} outputs ({', '.join(outputs)}) and torch {len(wanted)} "
            f"({', '.join(wanted)}): call the model as it was captured, or export it again as you call it."
        )
    if set(name_of.values()) == set(wanted):
        return dict(outputs), {name: wanted[name_of[name]] for name in outputs}
    return dict(outputs), dict(zip(outputs, wanted.values(), strict=True))


def _to_runtime(tensor: Tensor) -> Any:
    if tensor.dtype == torch.bfloat16:  # numpy has none
        bits = tensor.view(torch.int16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, onnx.TensorProto.BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


def _to_torch(value: Any) -> Tensor:
    tensor: Tensor = from_dlpack(value)
    return tensor.bool() if value.data_type() == "tensor(bool)" else tensor  # DLPack has bools as bytes


def _dtype(kind: str) -> torch.dtype:
    name = re.sub(r"tensor\((.*)\)", r"\1", kind)
    found = getattr(torch, name, None)  # float and double are aliases in torch too
    if not isinstance(found, torch.dtype):
        raise ExportError(f"The ONNX model has an input of type {kind}, which no torch tensor has: convert the model.")
    return found


def _dotted(path: str) -> str:
    return ".".join(re.findall(r"\w+", path))
