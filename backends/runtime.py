"""ONNX files in ONNX Runtime: held to one provider, fed from torch inputs, their outputs paired with torch's."""

import contextlib
import ctypes
import functools
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from sarac.ir.check import leaves
from sarac.ir.errors import ExportError, InputError, near
from sarac.ir.inputs import Inputs, InputSpec, TensorSpec

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

_QUIET = 4  # fatal alone: what goes wrong is raised, and would else stand on stderr as well
_CACHES = ("past_key_values", "past_buckets_states", "cache_params", "mems")  # what use_cache adds to the outputs

# By how much the sizes of an unseen shape differ from the captured ones: longer first, shorter where longer is refused.
_STEPS = (3, 5, -1, -2, 1, 2)


class Session:
    """An ONNX file opened on one provider, "cpu" or "cuda"; ExportError if it cannot be opened there and nowhere else.

    On CUDA, the arithmetic on shapes still runs on the CPU: ONNX Runtime places it there on purpose, which is why
    `session.disable_cpu_ep_fallback` (it refuses every graph with such a node) is no option for a dynamic graph.
    """

    def __init__(self, path: Path, provider: str = "cpu", floats: torch.dtype | None = None) -> None:
        """`floats`: the dtype of floating inputs that are converted to what the graph takes; None converts none."""
        self.path, self.provider, self.floats = Path(path), provider, floats
        if provider not in PROVIDERS:
            raise ExportError(f"There is no provider {provider!r}: give one of {', '.join(PROVIDERS)}.")
        if not self.path.is_file():
            raise ExportError(f"There is no ONNX file at {path}: check the path.")
        self._session, reason = _started(str(path), PROVIDERS[provider])
        if self._session is None:
            raise ExportError(
                f"{path} cannot run on {provider}: {reason} `sarac doctor` lists what runs here and what is missing; export a "
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
                f"{self.path.name} does not run on these inputs ({inputs.describe()}): {_reason(error)} It takes "
                f"{self.describe()}: give inputs of such shapes, or export again with the ones that you need."
            ) from error
        return {name: _to_torch(value) for name, value in zip(self.outputs, found, strict=True)}

    def feed(self, inputs: Inputs) -> dict[str, Tensor]:
        """The tensors of `inputs` by the names of the graph's inputs: keywords by name, arguments by position.

        Values that are no tensors are constants in the graph. A tensor that the graph has no input for is left out
        with a warning; one that is missing, or has another dtype, is an InputError.
        """
        named = {name: self._converted(name, tensor) for name, tensor in self._named(inputs)}
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

    def _converted(self, name: str, tensor: Tensor) -> Tensor:
        wanted = self.dtypes.get(name, tensor.dtype)
        return tensor.to(wanted) if tensor.dtype == self.floats and wanted.is_floating_point else tensor

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


def dynamic_axes(session: Session) -> dict[str, tuple[str, ...]]:
    """The symbols of every input's free dimensions; dimensions with one symbol change together."""
    return {name: tuple(size for size in shape if isinstance(size, str)) for name, shape in session.shapes.items()}


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


def unseen_inputs(
    spec: InputSpec, session: Session, captured: Inputs, count: int = 2, model: nn.Module | None = None
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


def providers() -> dict[str, str]:
    """For every provider that this ONNX Runtime lists: "ok" where a session on it runs, else the reason why not."""
    tiny = '<ir_version: 10, opset_import: ["": 20]> tiny (float[1, 1] x) => (float[1, 1] y) { y = MatMul(x, x) }'
    model = onnx.parser.parse_model(tiny).SerializeToString()
    return {name: _started(model, name)[1] or "ok" for name in onnxruntime.get_available_providers()}


def _started(model: str | bytes, provider: str) -> tuple[Any, str]:
    """A session on this very provider and "", or None and the reason why there is none."""
    try:
        if reason := _unloadable(provider):
            return None, reason
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _QUIET
        options.intra_op_num_threads = torch.get_num_threads()  # the cores that torch was given, and no more
        session = onnxruntime.InferenceSession(model, options, providers=[provider], enable_fallback=0)
    except Exception as error:  # noqa: BLE001 - the caller says it, as a sentence or as a line of a report
        return None, _reason(error)
    # Where a provider cannot start, ONNX Runtime takes the CPU instead and raises nothing.
    first = session.get_providers()[0]
    return (session, "") if first == provider else (None, f"ONNX Runtime fell back to {first}.")


def _unloadable(provider: str) -> str:
    """Why the provider's library cannot be loaded; "" if it can, or is built in."""
    if provider not in onnxruntime.get_available_providers():
        return f"this build of ONNX Runtime has no {provider}."
    folder, short = Path(onnxruntime.__file__).parent / "capi", provider.removesuffix("ExecutionProvider").lower()
    try:
        for library in folder.glob(f"*_providers_{short}.*"):
            _preload()
            for path in (*folder.glob("*_providers_shared.*"), library):
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return _reason(error)
    return ""


@functools.cache
def _preload() -> None:
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it misses; loading the provider says the same
        onnxruntime.preload_dlls()


@dataclass(frozen=True)
class _Port:
    """One captured tensor, and the sizes that the graph gives it: numbers, or the symbols of free ones."""

    spec: TensorSpec
    seen: Tensor
    sizes: tuple[int | str, ...]


def _ports(spec: InputSpec, session: Session, captured: Inputs) -> list[_Port]:
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


def _reason(error: Exception) -> str:
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error)).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".") + "."
