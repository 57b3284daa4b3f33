"""ONNX files: a torch module written as one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir
import torch
from torch import nn

from sarac.backends.exporting import captured, exporting, two_rows
from sarac.backends.lift import Weight, lift, settle
from sarac.backends.tidy import finished, fused, tidied
from sarac.ir.errors import ExportError
from sarac.ir.inputs import Inputs

LARGEST_FILE = 3 * 2**29  # bytes of weights in one file; a protobuf message ends at 2 GiB, and the graph needs room
SHAPES = "sarac.shapes"  # the metadata entry that says whether the shapes are dynamic, and if not why


@dataclass(frozen=True)
class Onnx:
    """The ONNX format: the operator set to write, whether sizes stay free where the model lets them, and for which provider
    of ONNX Runtime the graph is fused ("" for none)."""

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
        values = _tensors(model)
        program = captured(model, inputs, self.opset, dynamic)
        weights: dict[str, Weight] = lift(program, values)
        if self.fusions:
            fused(program, weights, self.fusions)
        tidied(program, weights)
        settle(program, weights, values.__getitem__)
        finished(program)
        return program


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a model by every name they have."""
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.dim() and p.is_floating_point()}
