"""ONNX files in ONNX Runtime: held to one provider, run on torch tensors without copies."""

import contextlib
import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from sarac.backends import onnx_file
from sarac.backends.binding import Lane, adjustable, as_tensor, bind, ports, require_buffers, require_fitting, taken
from sarac.backends.decoding import Steps
from sarac.backends.generation import Generator, chooser, require, token_ids
from sarac.backends.graphs import NONE, OFTEN, Graphs, Uncapturable, settings
from sarac.backends.pairing import dotted
from sarac.backends.placement import placement
from sarac.backends.providers import PROVIDERS, Start, reason, started
from sarac.backends.tenants import Adapters, Chosen
from sarac.ir.check import leaves
from sarac.ir.errors import ExportError, InputError, SaracWarning, near
from sarac.ir.inputs import Inputs

_EXACT = {"use_tf32": "0"}  # ONNX Runtime's default rounds float32 products to ten bits, 50 times what a check allows
_REMEDY = (
    "`sarac doctor` lists what runs here and what is missing; export a damaged file again, or one in a dtype without kernels "
    "there (bfloat16 on a CPU) in another."
)


class Runtime:
    """An ONNX file opened on one provider, "cpu" or "cuda"; ExportError if it cannot be opened there and nowhere else.

    `runtime(*tensors, **tensors)` runs it. `cuda_graph` None captures one for shapes that come back, where it can be and
    outputs are small; True insists, for every shape at once; False never does.
    `threads` on the CPU are as many as torch has. A node that computes on the CPU beside CUDA draws a SaracWarning.
    `adapters` holds those of a swappable export: `runtime.adapters.add("mine", "mine.onnx_adapter")`.
    """

    def __init__(
        self,
        path: str | Path,
        provider: str = "cpu",
        *,
        device_id: int = 0,
        cuda_graph: bool | None = None,
        threads: int | None = None,
        floats: torch.dtype | None = None,
    ) -> None:
        """`floats`: the dtype of floating inputs that are converted to what the graph takes; None converts none."""
        self.path, self.provider, self.floats = Path(path), provider, floats
        if provider not in PROVIDERS:
            raise ExportError(f"There is no provider {provider!r}: give one of {', '.join(PROVIDERS)}.")
        if not self.path.is_file():
            raise ExportError(f"There is no ONNX file at {path}: check the path.")
        self._threads, self._options = threads, {"device_id": str(device_id), **_EXACT} if provider == "cuda" else {}
        self.device = _device(device_id) if provider == "cuda" else torch.device("cpu")
        self._lane = Lane(self.device)
        start, able = self._opened(cuda_graph)
        if start.session is None:
            raise ExportError(f"{path} cannot run on {provider}: {start.reason} {start.remedy or _REMEDY}")
        self._session, self.placement = start.session, placement(start, self.path)
        self._inputs, self._outputs = ports(self._session, self.device)
        self.shapes, self.dtypes = ({n: getattr(p, what) for n, p in self._inputs.items()} for what in ("shape", "dtype"))
        self.outputs = tuple(self._outputs)
        self._metadata = onnx_file.read_metadata(self.path)
        self.adapters = Adapters(adjustable(self._session, self.device), self.path, self._metadata, self.device)
        self._settings = settings(NONE if able else "", wait=self._waits())
        self._graphs = self._capturing(able, cuda_graph)
        if str(self.placement):
            warnings.warn(
                f"{self.path.name} on {provider}: {self.placement}, and the device waits for each. Export it with `optimize` for "
                f"{provider}, or without operators that have no kernel there.",
                SaracWarning,
                stacklevel=2,
            )

    def __call__(
        self, *args: Any, out: Mapping[str, Tensor] | None = None, adapter: Chosen | EllipsisType = ..., **kwargs: Any
    ) -> dict[str, Tensor]:
        """The outputs by name on the runtime's device, for tensors by position or by the graph's names.

        Tensors that are contiguous and lie where the graph reads them are not copied. An output that `out` has a tensor
        for is written into it. `adapter`: one of `adapters` by name, one for each row of a batch, or None for the base;
        without it, what `use` chose. InputError where inputs, buffers or adapters do not fit the graph.
        """
        return self._launch(Inputs(args, kwargs), out, self.adapters.active if adapter is ... else adapter)

    def use(self, adapter: Chosen) -> None:
        """Choose the adapter of the runs to come, or one for each of their rows, or None for the base."""
        self.adapters.require(adapter, None)
        self.adapters.active = adapter

    def generate(
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        max_new_tokens: int = 20,
        *,
        attention_mask: Tensor | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        adapter: Chosen | EllipsisType = ...,
    ) -> Tensor:
        """The ids (rows, columns) with up to so many tokens behind them, the likeliest or drawn; padding is on the left.

        For a file that was exported with task="generate", else InputError. It ends where every row has ended, by the model's
        own end tokens or the given ones. One text at a time: calls wait for each other.
        """
        generator, given = self.generator, token_ids(input_ids)
        ids = given.to(self.device)
        seen = torch.ones_like(ids) if attention_mask is None else torch.as_tensor(attention_mask).to(ids)
        chosen = self.adapters.active if adapter is ... else adapter
        require(ids, seen, max_new_tokens, generator.words)
        self.adapters.require(chosen, len(ids))
        ends = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
        with self.adapters.lock:
            choose = chooser(do_sample, temperature, top_k, top_p, seed)
            return generator(ids, seen, max_new_tokens, ends, choose, chosen).to(given.device)

    @functools.cached_property
    def generator(self) -> Generator:
        """What `generate` runs; InputError for a file without a cache."""
        steps = Steps.read(self._metadata)
        if steps is None:
            raise InputError(f'{self.path.name} keeps no cache: export the model with task="generate" (`--task generate`).')
        return Generator(self._session, self._lane, self._inputs, self._outputs, self.adapters, steps)

    @property
    def generates(self) -> bool:
        """Whether the file was exported to generate."""
        return Steps.read(self._metadata) is not None

    def run(self, inputs: Inputs, adapter: Chosen = None) -> dict[str, Tensor]:
        """The outputs by name, in the graph's order, on the CPU; InputError where the inputs do not fit the graph."""
        return {name: tensor.cpu() for name, tensor in self._launch(inputs, {}, adapter).items()}

    def feed(self, inputs: Inputs) -> dict[str, Tensor]:
        """The tensors of `inputs` by the names of the graph's inputs: keywords by name, arguments by position.

        Values that are no tensors are constants in the graph. A tensor that the graph has no input for is left out with a
        warning; one that is missing, or has another dtype, is an InputError.
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
            warnings.warn(f"{self.path.name} was captured without {', '.join(strangers)}: left out here.", stacklevel=4)
        for name, port in self._inputs.items():
            require_fitting(self.path.name, self.describe(), port, named[name])
        return {name: named[name] for name in self.shapes}

    def describe(self) -> str:
        """The graph's inputs with their dtypes and shapes in one line; a size in letters is free."""
        return ", ".join(map(str, self._inputs.values()))

    def __repr__(self) -> str:
        graph = " with CUDA graphs" if self._graphs else ""
        return f"<Runtime {self.path} on {self.provider}{graph}: {self.describe()} -> {', '.join(self.outputs)}>"

    def __reduce__(self) -> str:
        raise ExportError(
            f"The Runtime of {self.path} holds an open session, which cannot be pickled or copied: open "
            f"sarac.Runtime({str(self.path)!r}, provider={self.provider!r}) where it is needed."
        )

    def _launch(self, inputs: Inputs, out: Mapping[str, Tensor] | None, adapter: Chosen) -> dict[str, Tensor]:
        inputs, out = inputs.changed(as_tensor), {} if out is None else out
        values = {name: tensor.detach().to(self._inputs[name].device).contiguous() for name, tensor in self.feed(inputs).items()}
        require_buffers(self.path.name, self.device, out, values, self._inputs, self._outputs)
        self.adapters.require(adapter, next((t.shape[0] for t in values.values() if t.dim()), None))
        try:
            with self.adapters.lock if self.adapters else contextlib.nullcontext():
                return self._graphed(values, out, adapter) if self._graphs else self._bound(values, out, adapter)
        except ExportError:
            raise
        except Exception as error:
            raise InputError(
                f"{self.path.name} does not run on these inputs ({inputs.describe()}): {reason(error)} It takes "
                f"{self.describe()}: give inputs of such shapes, or export again with the ones that you need."
            ) from error

    def _graphed(self, values: Mapping[str, Tensor], out: Mapping[str, Tensor], adapter: Chosen) -> dict[str, Tensor]:
        assert self._graphs is not None
        try:
            return self._graphs.run(values, out, adapter, lambda: self._bound(values, out, adapter))
        except Uncapturable as error:
            self._plainly(error, insisted=self._graphs.often == 1)
            return self._bound(values, out, adapter)

    def _bound(self, values: Mapping[str, Tensor], out: Mapping[str, Tensor], adapter: Chosen) -> dict[str, Tensor]:
        binding = self.adapters.bound(self._session, adapter)
        held = [bind(binding.bind_input, self._inputs[name], tensor) for name, tensor in values.items()]
        for name, port in self._outputs.items():
            if name in out:
                held.append(bind(binding.bind_output, port, out[name]))
            else:
                binding.bind_output(name, self.device.type, self.device.index or 0)
        with self._lane.ordered():
            self._session.run_with_iobinding(binding, self._settings)
        del held
        return {
            name: out[name] if name in out else taken(port, value)
            for (name, port), value in zip(self._outputs.items(), binding.get_outputs(), strict=True)
        }

    def _start(self, *, graph: bool = False) -> Start:
        options = {**self._options, **self._lane.options, **({"enable_cuda_graph": "1"} if graph else {})}
        return started(str(self.path), PROVIDERS[self.provider], options, self._threads)

    def _opened(self, wanted: bool | None) -> tuple[Start, bool]:
        """A session and whether it may capture CUDA graphs: as is wanted where ONNX Runtime lets it, else one that may not."""
        if self.device.type == "cuda" and wanted is not False:
            start = self._start(graph=True)
            if start.session is not None and not str(placement(start, self.path)):
                return start, True
        return self._start(), False

    def _capturing(self, able: bool, wanted: bool | None) -> Graphs | None:
        """What captures and replays runs, or None where none is wanted or, unless one is insisted on, possible."""
        why = self._uncapturable() if able or wanted else "none is wanted."
        if self.generates or (why and not wanted):  # what generates captures a graph for each of its caches
            return None
        try:
            if why:
                raise ExportError(why)
            both = (self._inputs, self._outputs)
            graphs = Graphs(self._session, self._lane, *both, self.adapters, 1 if wanted else OFTEN)
            if all(isinstance(size, int) for ports in both for port in ports.values() for size in port.shape):
                graphs.capture(*({name: port.zeros() for name, port in ports.items()} for ports in both))
        except (ExportError, Uncapturable) as error:
            self._plainly(error, insisted=wanted is True)
            return None
        return graphs

    def _plainly(self, error: Exception, *, insisted: bool) -> None:
        """Go on with a session that captures nothing, as one that failed at it cannot; ExportError where graphs are a must."""
        if insisted:
            why = reason(error.__cause__ if isinstance(error.__cause__, Exception) else error)
            raise ExportError(
                f"{self.path} cannot run as a CUDA graph: {why} Leave `cuda_graph` out, or export it so that it can."
            ) from error
        self._session = self._graphs = None  # two at once would hold the weights twice
        self._session = self._start().session
        self._settings = settings(wait=self._waits())

    def _waits(self) -> bool:
        """Whether the host waits for a run: it need not where all stays on the GPU, as torch's later work waits there."""
        lying = {port.device for port in (*self._inputs.values(), *self._outputs.values())}
        return self.device.type != "cuda" or not lying <= {self.device} or bool(str(self.placement))

    def _uncapturable(self) -> str:
        """Why the run cannot be a CUDA graph, as far as the opened session tells."""
        if self.device.type == "cpu":
            return 'it runs on the CPU: open it with provider="cuda" where torch sees a GPU.'
        hosted = [port.name for port in (*self._inputs.values(), *self._outputs.values()) if port.device != self.device]
        return f"{self.placement}." if str(self.placement) else f"{', '.join(hosted)} lies on the CPU." if hosted else ""

    def _converted(self, name: str, tensor: Tensor) -> Tensor:
        wanted = self.dtypes.get(name, tensor.dtype)
        return tensor.to(wanted) if tensor.dtype == self.floats and wanted.is_floating_point else tensor

    def _named(self, inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
        by_name = {}
        for name, value in inputs.kwargs.items():
            if isinstance(value, Tensor) and name in self._inputs:
                by_name[name] = value
                continue
            for path, tensor in leaves(value):
                key = name if isinstance(value, Tensor) else f"{name}.{dotted(path)}"
                # The writer puts "input." before a name that an output has too, and torch joins nested ones by "_".
                known = [n for n in (key, f"input.{key}", key.replace(".", "_")) if n in self.shapes]
                by_name[known[0] if known else key] = tensor
        free = (name for name in self.shapes if name not in by_name)
        for index, (_, tensor) in enumerate(leaves(inputs.args)):
            yield next(free, f"argument {index}"), tensor
        yield from by_name.items()


def _device(index: int) -> torch.device:
    """The GPU of that number, or the CPU where torch has no CUDA: ONNX Runtime then copies what goes in and out."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count and index >= count:
        raise ExportError(f"There is no GPU {index}: torch sees {count}. Give a device_id below that.")
    return torch.device("cuda", index) if count else torch.device("cpu")
