"""ONNX files: a torch module written as one."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import onnx_ir
import torch
from torch import nn

from sarac.backends import formula
from sarac.backends.decoding import Steps, stepping
from sarac.backends.exporting import Sizes, captured, exporting, named_sizes, two_rows
from sarac.backends.lift import Weight, lift, settle
from sarac.backends.mixed import typed
from sarac.backends.stack import Stack, shortened, stack_of
from sarac.backends.stamp import stamped
from sarac.backends.swap import Swap, opened
from sarac.backends.tidy import ROUNDS, finished, fused, tidied
from sarac.ir import check
from sarac.ir.errors import ExportError
from sarac.ir.graph import within
from sarac.ir.inputs import Inputs

LARGEST_FILE = 600_000_000  # bytes of weights in one file: twice that is needed to write and to open it
TOO_LARGE = 15 * 2**27  # a protobuf message ends at 2 GiB, and the graph needs room
LAYERS = "sarac.layers"  # the metadata entry that says whether equal layers were optimised once and repeated
SHAPES = "sarac.shapes"  # the metadata entry that says whether the shapes are dynamic, and if not why


@dataclass(frozen=True)
class Onnx:
    """The ONNX format: what is written, and for whom.

    `opset`: the operator set. `dynamic`: "auto" (sizes stay free where the model lets them), "static",
    or the free ones by name, as in "x[batch,8]". `dtype`: of the weights in the file; None for the model's own. `kept`: the
    modules that compute in float32 all the same. `optimize`: "none", "basic" (constants, repetitions) or "ort" (operators
    that ONNX Runtime alone knows, for `provider`). `external`: whether the weights lie in a file beside, "auto" for large ones.
    `swap`: the adapters' tensors that stay inputs. `steps`: write a step of generation with its caches, not a forward.
    """

    opset: int = 20
    dynamic: str = "auto"
    dtype: torch.dtype | None = None
    optimize: str = "basic"
    provider: str = "cpu"
    external: str = "auto"
    swap: Swap = field(default_factory=Swap)
    steps: Steps | None = None
    kept: tuple[str, ...] = ()

    def write(
        self,
        model: nn.Module,
        inputs: Inputs,
        path: Path,
        metadata: Mapping[str, str],
        data: str = "",
        waiting: Mapping[int, Callable[[], torch.Tensor]] = MappingProxyType({}),
    ) -> tuple[Path, ...]:
        """Write `model` in eval mode and without a cache, captured on `inputs`; returns the files written.

        The second file, `data` or else `<name>.data`, holds the weights of a large model; the first names it, so the two can
        be moved but not renamed. Weights are worked out and written one at a time; those in `waiting`, by the ids of the
        parameters that stand for them, are made then. InputError where the model rejects the inputs, ExportError for the rest.
        """
        with exporting(model), opened(model, self.swap), self._stepping(model):
            wide = inputs if self.steps is not None else two_rows(model, inputs)
            tensors = Values(_tensors(model), self.dtype, self.kept, waiting)
            half = inputs.map(self._typed), wide.map(self._typed)
            with typed(model, self.dtype, kept=self.kept, hollow=True):
                program, shapes = self._program(model, *half, tensors)
        size = sum(v.const_value.nbytes for v in program.graph.initializers.values() if v.const_value is not None)
        steps = self.steps.entry() if self.steps is not None else {}
        program.metadata_props.update({SHAPES: shapes, **metadata, **self.swap.entry(), **steps})
        beside = self.external == "always" or (self.external == "auto" and size > LARGEST_FILE)
        if size > TOO_LARGE and not beside:
            raise ExportError(
                f"{path.name} would hold {size / 1e9:.1f} GB of weights, and an ONNX file ends at 2 GB: let the weights lie "
                'beside it (external_data="auto", or `--external-data auto`).'
            )
        weights = path.with_name(data or f"{path.name}.data")
        try:
            onnx_ir.save(program, path, external_data=weights.name if beside else None)
        except OSError as error:
            raise ExportError(
                f"{path} cannot be written: {error.strerror or error}. Give a folder that exists, is yours and has "
                f"{size / 1e6:.0f} MB free."
            ) from error
        return (path, weights) if beside else (path,)

    def _typed(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor

    def _program(self, model: nn.Module, inputs: Inputs, wide: Inputs, tensors: "Values") -> tuple[onnx_ir.Model, str]:
        """The tidied graph, and how free its shapes are: "dynamic" or "static" with the reason."""
        if self.dynamic == "static":
            return self._tidied(model, inputs, None, tensors), "static: as asked for"
        if self.dynamic != "auto":
            return self._tidied(model, wide, named_sizes(self.dynamic, model, wide), tensors), f"dynamic: {self.dynamic}"
        try:
            return self._tidied(model, wide, {}, tensors), "dynamic"
        except ExportError as error:
            return self._tidied(model, inputs, None, tensors), f"static: {error}"

    def _tidied(self, model: nn.Module, inputs: Inputs, free: Sizes | None, tensors: "Values") -> onnx_ir.Model:
        """The graph with every weight in place: from three layers where the model is a stack of equal ones, else whole."""
        stack, layers = stack_of(model), "whole: there are no equal layers"
        if stack is not None and not self._alike(stack):
            layers = f"whole: only some of {stack.name} keep float32"
        elif stack is not None:
            try:
                with shortened(model, stack):
                    program, weights = self._optimised(model, inputs, free)
                    stamped(program, weights, stack)
                layers = f"repeated: {stack.length} of {stack.name}"
                return self._settled(program, weights, tensors, layers)
            except Exception as error:  # noqa: BLE001 - whatever stands against it, the whole model can still be captured
                layers = f"whole: {error}"
        return self._settled(*self._optimised(model, inputs, free), tensors, layers)

    def _alike(self, stack: Stack) -> bool:
        """Whether every group of layers keeps the same modules in float32: only then can one be repeated."""
        found: dict[int, set[str]] = {group: set() for group in range(-1, stack.groups)}
        for name in self.kept:
            group = stack.group(f"{name}.")
            found[group].add(stack.moved(f"{name}.", -group))
        return all(found[group] == found[0] for group in range(stack.groups))

    def _stepping(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.steps is None else stepping(model)

    def _optimised(self, model: nn.Module, inputs: Inputs, free: Sizes | None) -> tuple[onnx_ir.Model, dict[str, Weight]]:
        if self.steps is not None:
            inputs = self.steps.inputs(model)  # with caches for as many layers as there are now
        program = captured(model, inputs, self.opset, free)
        self.swap.open(program)
        weights = lift(program, _tensors(model))
        if self.optimize == "ort":
            fused(program, weights, self.provider, stepping=self.steps is not None)
        tidied(program, weights, rounds=0 if self.optimize == "none" else ROUNDS)
        return program, weights

    def _settled(self, program: onnx_ir.Model, weights: dict[str, Weight], tensors: "Values", layers: str) -> onnx_ir.Model:
        settled = settle(program, weights, tensors)
        finished(program)
        if not self.swap:
            program.metadata_props.update(formula.entry(settled, {name: tuple(t.shape) for name, t in tensors.stored.items()}))
        self.swap.close(program, self.dtype)
        program.metadata_props[LAYERS] = layers
        return program


@dataclass(frozen=True)
class Values:
    """The values of a module's tensors by name, in `dtype` (None: their own): stored ones, or made when they are asked for."""

    stored: Mapping[str, torch.Tensor]
    dtype: torch.dtype | None
    kept: tuple[str, ...]
    waiting: Mapping[int, Callable[[], torch.Tensor]]

    def __call__(self, name: str) -> torch.Tensor:
        """The tensor of this name; ExportError where the dtype does not hold its values."""
        tensor = self.stored[name]
        tensor = self.waiting[id(tensor)]() if id(tensor) in self.waiting else tensor
        wanted = torch.float32 if self.dtype is not None and within(name, self.kept) else self.dtype
        return tensor if wanted in (None, tensor.dtype) else check.narrowed(name, tensor, wanted)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a model, and the buffers that files hold, by every name they have."""
    found = {**dict(model.named_parameters(remove_duplicate=False)), **model.state_dict(keep_vars=True)}
    return {name: t for name, t in found.items() if isinstance(t, torch.Tensor) and t.dim() and t.is_floating_point()}
