"""ONNX files: a torch module written as one, what stands in it read back, and metadata added to it.

transformers models go through transformers' own exporter, everything else through torch's; both hand over their graph
as they captured it. It is tidied here, by passes that change nothing that it computes: the exporters' own optimiser
tries one of its rules on all pairs of nodes, which makes up half of the time for a model of thirty layers.
"""

import contextlib
import inspect
import io
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import onnx
import onnx_ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.exporters.exporter_dynamo import get_auto_dynamic_shapes
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

from sarac.backends.runtime import named_leaves
from sarac.ir.errors import ExportError, InputError
from sarac.ir.inputs import Inputs

LARGEST_FILE = 3 * 2**29  # bytes of weights in one file; a protobuf message ends at 2 GiB, and the graph needs room
SHAPES = "sarac.shapes"  # the metadata entry that says whether the shapes are dynamic, and if not why

# The numbers of onnx.ModelProto's fields, as onnx.proto fixes them.
_GRAPH, _OPSETS, _METADATA, _FUNCTIONS = 7, 8, 14, 25
_KNOWN, _NEEDED = {*range(1, 9), _METADATA, 20, _FUNCTIONS, 26}, {_GRAPH, _OPSETS}
_NODE = 1  # in onnx.GraphProto
_Field = tuple[int, int, int, int]  # its number, where it starts, where its content starts and ends, in bytes
_BLOCK = 2**24  # bytes copied at a time

_TRACEABLE = ("eager", "sdpa")  # the attention implementations that an exporter can follow


@dataclass(frozen=True)
class Onnx:
    """The ONNX format: the operator set to write, and whether sizes stay free where the model lets them."""

    opset: int = 20
    dynamic: bool = True

    def write(self, model: nn.Module, inputs: Inputs, path: Path, metadata: Mapping[str, str]) -> tuple[Path, ...]:
        """Write `model` in eval mode and without a cache, captured on `inputs`; returns the files written.

        The second file, `<name>.data`, holds the weights of a large model; the first names it, so the two can be moved
        but not renamed. InputError where the model rejects the inputs, ExportError for whatever else goes wrong.
        """
        with _quiet(), _exportable(model):
            wide = _two_rows(model, inputs)
            program, shapes = self._program(model, inputs, wide)
        weights = sum(value.const_value.nbytes for value in program.graph.initializers.values() if value.const_value)
        program.metadata_props.update({SHAPES: shapes, **metadata})
        data = path.with_name(f"{path.name}.data")
        try:
            onnx_ir.save(program, path, external_data=data.name if weights > LARGEST_FILE else None)
        except OSError as error:
            raise ExportError(
                f"{path} cannot be written: {error.strerror or error}. Give a folder that exists, is yours to write "
                f"in and has {weights / 1e9:.1f} GB free."
            ) from error
        return (path, data) if weights > LARGEST_FILE else (path,)

    def _program(self, model: nn.Module, inputs: Inputs, wide: Inputs) -> tuple[onnx_ir.Model, str]:
        """The tidied graph, and how free its shapes are: "dynamic" or "static" with the reason."""
        reason = ": as asked for"
        if self.dynamic:
            try:
                return _tidy(self._captured(model, wide, dynamic=True)), "dynamic"
            except ExportError as error:
                reason = f": {error}"
        return _tidy(self._captured(model, inputs, dynamic=False)), f"static{reason}"

    def _captured(self, model: nn.Module, inputs: Inputs, dynamic: bool) -> onnx_ir.Model:
        try:
            if isinstance(model, PreTrainedModel):
                config = OnnxConfig(dynamic=dynamic, opset_version=self.opset, optimize=False)
                program: onnx_ir.Model = OnnxExporter().export(model, _keywords(model, inputs), config).program
                return program
            bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments
            found = torch.onnx.export(
                model,
                # A dict in the last place would be taken for the keyword arguments.
                inputs.args if inputs.kwargs else (*inputs.args, {}),
                kwargs=dict(inputs.kwargs),
                dynamo=True,
                opset_version=self.opset,
                dynamic_shapes=get_auto_dynamic_shapes(dict(bound)) if dynamic else None,
                optimize=False,
                verbose=False,
            )
            return _named(found.model, inputs, model)
        except Exception as error:
            raise ExportError(
                f"{type(model).__name__} cannot be exported to ONNX: {_cause(error)} It was captured on "
                f"({inputs.describe()}): look there for Python that depends on tensor values, or for inputs beyond "
                "tensors, and export a module without them."
            ) from error


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of an ONNX file, whose weights are not read; ExportError if it is damaged or no ONNX file."""
    with _opened(path) as (file, fields):
        entries = [
            onnx.StringStringEntryProto.FromString(_read(file, *content)) for number, _, *content in fields if number == _METADATA
        ]
    return {entry.key: entry.value for entry in entries}


def write_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Add entries to an ONNX file's metadata, or replace them; the rest is copied byte by byte, and swapped in whole."""
    merged = {**read_metadata(path), **metadata}
    entries = [onnx.StringStringEntryProto(key=key, value=value) for key, value in merged.items()]
    aside = path.with_name(f"{path.name}.partial")
    try:
        with _opened(path) as (file, fields), aside.open("wb") as copy:
            for number, start, _, end in fields:
                for offset in range(start, end, _BLOCK) if number != _METADATA else ():
                    copy.write(_read(file, offset, min(offset + _BLOCK, end)))
            copy.write(onnx.ModelProto(metadata_props=entries).SerializeToString())
        aside.replace(path)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}. Check its folder and disk.") from error
    finally:
        aside.unlink(missing_ok=True)


def node_counts(path: Path) -> Counter[str]:
    """How many nodes of each operator an ONNX file has, those in functions and nested graphs counted in."""
    nodes: list[onnx.NodeProto] = []
    with _opened(path) as (file, fields):
        for number, _, *content in fields:
            if number == _GRAPH:
                found = [_read(file, *inner) for kind, _, *inner in _fields(file, *content) if kind == _NODE]
                nodes += map(onnx.NodeProto.FromString, found)
            elif number == _FUNCTIONS:
                nodes += onnx.FunctionProto.FromString(_read(file, *content)).node
    counts: Counter[str] = Counter()
    for node in nodes:  # the list grows while it is walked
        counts[node.op_type] += 1
        for attribute in node.attribute:
            nodes += [inner for graph in (attribute.g, *attribute.graphs) for inner in graph.node]
    return counts


def matmul_count(path: Path) -> int:
    """How many matrix products an ONNX file has: MatMul and Gemm nodes."""
    counts = node_counts(path)
    return counts["MatMul"] + counts["Gemm"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No prints, warnings and notices from the exporters; errors are raised and logged as ever."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _exportable(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without cache, gradients and untraceable attention, for a while."""
    modes = [(module, module.training) for module in model.modules()]
    configs = {id(c): c for m in model.modules() if getattr(c := getattr(m, "config", None), "use_cache", None)}
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None) or _TRACEABLE[0]
    own_forward = "forward" in vars(model)
    try:
        model.eval()
        for config in configs.values():
            config.use_cache = False
        if isinstance(model, PreTrainedModel) and attention not in _TRACEABLE:
            model.set_attn_implementation("sdpa")
        with torch.no_grad():
            yield
    finally:
        if isinstance(model, PreTrainedModel) and attention not in _TRACEABLE:
            model.set_attn_implementation(attention)
        for config in configs.values():
            config.use_cache = True
        for module, training in modes:
            module.training = training
        if not own_forward:  # transformers' exporter leaves its bound method there, which copies of the model would call
            vars(model).pop("forward", None)


def _two_rows(model: nn.Module, inputs: Inputs) -> Inputs:
    """The inputs with a second row where all have one and the model takes two: a batch of 1 is captured as a constant."""
    tensors = [t for t in (*inputs.args, *inputs.kwargs.values()) if isinstance(t, Tensor) and t.dim()]
    if tensors and all(tensor.shape[0] == 1 for tensor in tensors):
        wide = inputs.map(lambda t: t.repeat(2, *[1] * (t.dim() - 1)) if t.dim() else t)
        with contextlib.suppress(InputError):
            wide.call(model)
            return wide
    inputs.call(model)
    return inputs


def _keywords(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """All inputs by keyword, in the order they were given: what transformers' exporter takes (and changes)."""
    signature = inspect.signature(model.forward)
    named = dict(signature.bind(*inputs.args, **inputs.kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return named


def _named(program: onnx_ir.Model, inputs: Inputs, model: nn.Module) -> onnx_ir.Model:
    """The graph with its outputs called by their paths in what the model returns, as transformers' exporter does."""
    names = list(named_leaves(inputs.call(model)))
    passes.OutputFixPass()(program)  # an output that is an input, or another output, gets a value of its own
    taken = {value.name for value in program.graph.inputs}
    if len(names) == len(program.graph.outputs):
        for value, name in zip(program.graph.outputs, names, strict=True):
            value.name = f"output.{name}" if name in taken else name
    return program


def _tidy(program: onnx_ir.Model) -> onnx_ir.Model:
    """Constants folded, repetitions and leftovers removed; weights keep torch's names, also those stored transposed."""
    passes.InlinePass()(program)
    graph = program.graph
    turned = {
        node.outputs[0].name: node.inputs[0].name
        for node in graph
        if node.op_type == "Transpose" and node.inputs[0] is not None and node.inputs[0].is_initializer()
    }
    for _ in range(2):  # what the first round removes lets the second fold more
        # transformers keeps Resize too: onnx's reference implementation takes minutes for one.
        optimizer.fold_constants(
            program, onnx_shape_inference=True, should_fold=lambda node: False if node.op_type == "Resize" else None
        )
        passes.RemoveUnusedNodesPass()(program)
        passes.CommonSubexpressionEliminationPass()(program)
    for tidying in (
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
        passes.ClearMetadataAndDocStringPass(),  # stack traces with the paths of this machine
    ):
        tidying(program)
    for name, weight in turned.items():
        if name in graph.initializers and weight not in graph.initializers:
            graph.initializers[name].name = weight
    return program


def _cause(error: BaseException) -> str:
    """The first line of what an error came from: the exporters wrap it in reports of many pages."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}."


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, list[_Field]]]:
    """The file and its fields; ExportError if it is missing, damaged or no ONNX file."""
    try:
        with path.open("rb") as file:
            fields = list(_fields(file, 0, file.seek(0, os.SEEK_END)))
            if not _NEEDED <= {number for number, *_ in fields} <= _KNOWN:
                raise ValueError("its fields are not those of a model")
            yield file, fields
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror or error}. Check the path.") from error
    except ValueError as error:
        raise ExportError(f"{path} is truncated, or no ONNX file: {error}. Export it again.") from error


def _fields(file: BinaryIO, start: int, end: int) -> Iterator[_Field]:
    """The fields of the protobuf message between two offsets; weights are stepped over. ValueError if it is none."""
    while start < end:
        file.seek(start)
        number, kind = divmod(_varint(file), 8)
        if kind not in (0, 2):  # a number, or bytes after their length: a model has no other kinds
            raise ValueError(f"there is no field at byte {start}")
        length = _varint(file)
        first = file.tell()
        last = first + length if kind == 2 else first
        if last > end:
            raise ValueError(f"a field goes on to byte {last} of {end}")
        yield number, start, first, last
        start = last


def _varint(file: BinaryIO) -> int:
    value = shift = 0
    while byte := file.read(1):
        value |= (byte[0] & 127) << shift
        shift += 7
        if byte[0] < 128 and shift <= 70:
            return value
    raise ValueError("it ends within a number")


def _read(file: BinaryIO, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)
