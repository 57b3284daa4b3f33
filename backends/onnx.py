"""ONNX files: a torch module written as one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir
import torch
from torch import nn

from sarac.backends.exporting import captured, exporting, two_rows
from sarac.backends.lift import Weight, lift, settle
from sarac.backends.stack import shortened, stack_of
from sarac.backends.stamp import stamped
from sarac.backends.tidy import finished, fused, tidied
from sarac.ir.errors import ExportError
from sarac.ir.inputs import Inputs

LARGEST_FILE = 3 * 2**29  # bytes of weights in one file; a protobuf message ends at 2 GiB, and the graph needs room
LAYERS = "sarac.layers"  # the metadata entry that says whether equal layers were optimised once and repeated
SHAPES = "sarac.shapes"  # the metadata entry that says whether the shapes are dynamic, and if not why


@dataclass(frozen=True)
class Onnx:
    """The ONNX format: the operator set to write, whether sizes stay free where the model lets them, and for which provider
    of ONNX Runtime the graph is fused ("" for none).
    """

    opset: int = 20
    dynamic: bool = True
    fusions: str = ""

    def write(self, model: nn.Module, inputs: Inputs, path: Path, metadata: Mapping[str, str]) -> tuple[Path, ...]:
        """Write `model` in eval mode and without a cache, captured on `inputs`; returns the files written.

        The second file, `<name>.data`, holds the weights of a large model; the first names it, so the two can be moved
        but not renamed. InputError where the model rejects the inputs, ExportError for whatever else goes wrong.
        """
        with exporting(model):
            program, shapes = self._program(model, inputs, two_rows(model, inputs))
        weights = sum(v.const_value.nbytes for v in program.graph.initializers.values() if v.const_value is not None)
        program.metadata_props.update({SHAPES: shapes, **metadata})
        data = path.with_name(f"{path.name}.data")
        try:
            onnx_ir.save(program, path, external_data=data.name if weights > LARGEST_FILE else None)
        except OSError as error:
            raise ExportError(
                f"{path} cannot be written: {error.strerror or error}. Give a folder that exists, is yours and has "
                f"{weights / 1e6:.0f} MB free."
            ) from error
        return (path, data) if weights > LARGEST_FILE else (path,)

    def _program(self, model: nn.Module, inputs: Inputs, wide: Inputs) -> tuple[onnx_ir.Model, str]:
        """The tidied graph, and how free its shapes are: "dynamic" or "static" with the reason."""
        if not self.dynamic:
            return self._tidied(model, inputs, dynamic=False), "static: as asked for"
        try:
            return self._tidied(model, wide, dynamic=True), "dynamic"
        except ExportError as error:
            return self._tidied(model, inputs, dynamic=False), f"static: {error}"

    def _tidied(self, model: nn.Module, inputs: Inputs, dynamic: bool) -> onnx_ir.Model:
        """The graph with every weight in place: from three layers where the model is a stack of equal ones, else whole."""
        stack, values, layers = stack_of(model), _tensors(model), "whole: there are no equal layers"
        if stack is not None:
            try:
                with shortened(model, stack):
                    program, weights = self._optimised(model, inputs, dynamic)
                    stamped(program, weights, stack)
                program.metadata_props[LAYERS] = f"repeated: {stack.length} of {stack.name}"
                return _settled(program, weights, values)
            except Exception as error:  # noqa: BLE001 - whatever stands against it, the whole model can still be captured
                layers = f"whole: {error}"
        program, weights = self._optimised(model, inputs, dynamic)
        program.metadata_props[LAYERS] = layers
        return _settled(program, weights, values)

    def _optimised(self, model: nn.Module, inputs: Inputs, dynamic: bool) -> tuple[onnx_ir.Model, dict[str, Weight]]:
        program = captured(model, inputs, self.opset, dynamic)
        weights = lift(program, _tensors(model))
        if self.fusions:
            fused(program, weights, self.fusions)
        tidied(program, weights)
        return program, weights


def _settled(program: onnx_ir.Model, weights: dict[str, Weight], values: Mapping[str, torch.Tensor]) -> onnx_ir.Model:
    settle(program, weights, values.__getitem__)
    finished(program)
    return program


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a model by every name they have."""
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.dim() and p.is_floating_point()}
