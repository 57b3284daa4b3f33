"""CUDA graphs of a session's runs: one for each set of shapes that comes back, where launching is what takes the time."""

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from sarac.backends.binding import Lane, Port, bind
from sarac.backends.tenants import Adapters, Chosen

OFTEN = 3  # runs of the same shapes before they are captured
KEPT = 16  # graphs of a session, which ONNX Runtime keeps as long as it lives
LARGE = 2**26  # bytes of inputs and outputs from which on copying them takes longer than launching does
NONE = "-1"  # the number of a run that neither captures a graph nor replays one
_GRAPH = "gpu_graph_id"

Tensors = Mapping[str, Tensor]


def settings(graph: str = "", *, wait: bool = True) -> Any:
    """The options of a run, as the CUDA graph of this number; `wait`: whether the host waits until it is over."""
    options = onnxruntime.RunOptions()
    options.log_severity_level = 4  # fatal alone, as what goes wrong is raised
    if graph:
        options.add_run_config_entry(_GRAPH, graph)
    if not wait:
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


class Uncapturable(Exception):
    """What an operator raised that a capture forbids, as its cause."""


class Graphs:
    """The graphs of a session that may capture them; `often` runs of the same shapes, and those to come are replayed."""

    def __init__(
        self,
        session: Any,
        lane: Lane,
        inputs: Mapping[str, Port],
        outputs: Mapping[str, Port],
        adapters: Adapters,
        often: int = OFTEN,
    ) -> None:
        self._session, self._lane, self._inputs, self._outputs = session, lane, inputs, outputs
        self._adapters, self.often = adapters, often
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._made: dict[tuple[Any, ...], Replay] = {}

    def run(self, values: Tensors, out: Tensors, adapter: Chosen, plain: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The outputs by the graph of these shapes, or as `plain` gives them where there is none (yet).

        Uncapturable where a capture fails, after which the session cannot be trusted.
        """
        key = tuple(tuple(value.shape) for value in values.values())
        if key in self._made:
            return self._made[key](values, out, adapter)
        found = plain()
        self._seen[key] += len(self._seen) < 2**16 or key in self._seen
        size = sum(tensor.nbytes for tensor in (*values.values(), *found.values()))
        if self._seen[key] >= self.often and len(self._made) < KEPT and (size <= LARGE or self.often == 1):
            self.capture(values, found)
        return found

    def capture(self, values: Tensors, outputs: Tensors) -> None:
        """Capture a run on inputs and outputs like these; Uncapturable where that fails."""
        key = tuple(tuple(value.shape) for value in values.values())
        options = settings(str(len(self._made) + 1), wait=self._lane.on_host)
        places = (self._session, options, self._lane, self._inputs, self._outputs, self._adapters)
        try:
            self._made[key] = Replay(*places, values, outputs)
        except Exception as error:  # an operator may do anything that a capture forbids
            raise Uncapturable from error


class Replay:
    """A session's run on buffers that stay where they are, as a CUDA graph asks: inputs are copied in, outputs out."""

    def __init__(
        self,
        session: Any,
        options: Any,
        lane: Lane,
        inputs: Mapping[str, Port],
        outputs: Mapping[str, Port],
        adapters: Adapters,
        values: Tensors,
        found: Tensors,
    ) -> None:
        self._session, self._options, self._lane, self._adapters = session, options, lane, adapters
        self._binding, self._guard = session.io_binding(), threading.Lock()
        self._inputs = {name: values[name].clone() for name in inputs}
        self._outputs = {name: torch.zeros_like(found[name]) for name in outputs}
        self._held = [bind(self._binding.bind_input, inputs[name], tensor) for name, tensor in self._inputs.items()]
        self._held += [bind(self._binding.bind_output, outputs[name], tensor) for name, tensor in self._outputs.items()]
        rows = next((value.shape[0] for value in values.values() if value.dim()), 1)
        self._attached = adapters.attached(session, self._binding, rows)
        self._run()  # the first run is the one that is captured

    def __call__(self, values: Tensors, out: Tensors, adapter: Chosen = None) -> dict[str, Tensor]:
        """The outputs for inputs of the graph's shapes and an adapter, in memory of their own or that of `out`."""
        with self._guard:
            self._adapters.fill(self._attached, adapter)
            for name, buffer in self._inputs.items():
                if values[name].shape != buffer.shape:  # copying would spread a smaller one over the buffer
                    raise ValueError(f"{name} is of shape {tuple(values[name].shape)}, not {tuple(buffer.shape)}")
                buffer.copy_(values[name])
            self._run()
            return {name: out[name].copy_(t) if name in out else t.clone() for name, t in self._outputs.items()}

    def _run(self) -> None:
        with self._lane.ordered():
            self._session.run_with_iobinding(self._binding, self._options)
