"""ONNX files: a torch module written as one, what stands in it read back, and metadata added to it.

transformers models go through transformers' own exporter, everything else through torch's; both hand over the graph as they
captured it. It is tidied here: the exporters' optimiser builds an index of all nodes for every node, for a rule on slices,
which takes longer than all the rest of an export. What its other rules gain, ONNX Runtime does itself when it loads.
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
import transformers
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from torch import Tensor, nn
from torch.onnx import _flags
from torch.utils import _pytree as pytree

from sarac.backends.runtime import named_leaves
from sarac.ir.errors import ExportError, InputError
from sarac.ir.inputs import Inputs

LARGEST_FILE = 3 * 2**29  # bytes of weights in one file; a protobuf message ends at 2 GiB, and the graph needs room
SHAPES = "sarac.shapes"  # the metadata entry that says whether the shapes are dynamic, and if not why

# The numbers of onnx.ModelProto's fields, as onnx.proto fixes them.
_GRAPH, _OPSETS, _METADATA, _FUNCTIONS = 7, 8, 14, 25
_KNOWN, _NEEDED, _NODE = {*range(1, 9), _METADATA, 20, _FUNCTIONS, 26}, {_GRAPH, _OPSETS}, 1  # the last in GraphProto
_Field = tuple[int, int, int, int]  # its number, where it starts, where its content starts and ends, in bytes
_BLOCK = 2**24  # bytes copied at a time
_ATTENTION = "_attn_implementation"  # of a transformers config
_TRACEABLE = ("eager", "sdpa")  # its values that an exporter can follow


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
        with _exporting(model):
            program, shapes = self._program(model, inputs, _two_rows(model, inputs))
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
            return self._captured(model, inputs, dynamic=False), "static: as asked for"
        try:
            return self._captured(model, wide, dynamic=True), "dynamic"
        except ExportError as error:
            return self._captured(model, inputs, dynamic=False), f"static: {error}"

    def _captured(self, model: nn.Module, inputs: Inputs, dynamic: bool) -> onnx_ir.Model:
        found: Any
        signature = inspect.signature(model.forward)
        # Capturing marks the sizes of the very tensors it is given, also for the attempts that follow.
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (inputs.args, dict(inputs.kwargs)))
        try:
            if isinstance(model, transformers.PreTrainedModel):
                # Two seconds to import: only who exports waits for it.
                from transformers.exporters.configs import OnnxConfig
                from transformers.exporters.exporter_onnx import OnnxExporter

                named = {**dict(zip(signature.parameters, args, strict=False)), **kwargs}
                config = OnnxConfig(dynamic=dynamic, opset_version=self.opset, optimize=False)
                found = OnnxExporter().export(model, named, config)  # type: ignore[no-untyped-call]
                return _tidy(found.program)
            found = torch.onnx.export(
                model,
                args if kwargs else (*args, {}),  # a dict in the last place would be taken for the keyword arguments
                kwargs=kwargs,
                dynamo=True,
                opset_version=self.opset,
                dynamic_shapes=pytree.tree_map(_free, dict(signature.bind(*args, **kwargs).arguments)) if dynamic else None,
                optimize=False,
            )
            return _tidy(_named(found.model, inputs, model))
        except Exception as error:
            raise ExportError(
                f"{type(model).__name__} cannot be exported to ONNX: {_cause(error)} It was captured on ({inputs.describe()}): "
                "look for Python that depends on tensor values, or for inputs beyond tensors, and export a module without."
            ) from error


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of an ONNX file, whose weights are not read; ExportError if it is damaged or no ONNX file."""
    with _opened(path) as (file, fields):
        found = [_read(file, *content) for number, _, *content in fields if number == _METADATA]
        return {entry.key: entry.value for entry in map(onnx.StringStringEntryProto.FromString, found)}


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
    finally:
        with contextlib.suppress(OSError):  # where all went well, it is in place and no longer here
            aside.unlink()


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
def _exporting(model: nn.Module) -> Iterator[None]:
    """Exporters without prints and notices; the model in eval mode, without cache, gradients, untraceable attention."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
    changes: list[tuple[Any, str, Any]] = [
        *((module, "training", False) for module in model.modules()),
        *((config, "use_cache", False) for config in configs if getattr(config, "use_cache", None)),
        *((c, _ATTENTION, "sdpa") for c in configs if (getattr(c, _ATTENTION, None) or "sdpa") not in _TRACEABLE),
        # Left on, sizes that the model fixes (a Linear's input) would stand in the graph as free ones.
        (_flags, "PREFER_DEFERRED_RUNTIME_ASSERTS_OVER_GUARDS", False),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    own_forward, logged = "forward" in vars(model), logging.root.manager.disable
    try:
        logging.disable(max(logged, logging.ERROR))
        for owner, name, value in changes:
            setattr(owner, name, value)
        void = io.StringIO()
        with contextlib.redirect_stdout(void), contextlib.redirect_stderr(void), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        logging.disable(logged)
        if not own_forward:  # transformers' exporter leaves the bound method there, and copies of the model would call it
            vars(model).pop("forward", None)


def _two_rows(model: nn.Module, inputs: Inputs) -> Inputs:
    """The inputs with a second row where all have one and the model takes two: a batch of 1 is captured as a constant."""
    rows = {t.shape[0] for t in (*inputs.args, *inputs.kwargs.values()) if isinstance(t, Tensor) and t.dim()}
    if rows == {1}:
        wide = inputs.map(lambda t: t.repeat(2, *[1] * (t.dim() - 1)) if t.dim() else t)
        with contextlib.suppress(InputError):
            wide.call(model)
            return wide
    inputs.call(model)
    return inputs


def _free(value: Any) -> dict[int, Any] | None:
    """The free sizes of an input: all but those of 1, which broadcast."""
    from transformers.exporters.exporter_dynamo import get_auto_dynamic_shapes as auto

    sizes = auto(value) if isinstance(value, Tensor) else None
    return sizes and {axis: size for axis, size in sizes.items() if value.shape[axis] != 1}


def _named(program: onnx_ir.Model, inputs: Inputs, model: nn.Module) -> onnx_ir.Model:
    """The graph with its outputs called by their paths in what the model returns, as transformers' exporter does."""
    names, taken = list(named_leaves(inputs.call(model))), [value.name for value in program.graph.inputs]
    passes.OutputFixPass()(program)  # an output that is an input, or another output, gets a value of its own
    outputs = [f"output.{name}" if name in taken else name for name in names]
    ends = (*program.graph.inputs, *program.graph.outputs)
    if len(ends) == len(taken) + len(outputs):
        for value, name in zip(ends, (*taken, *outputs), strict=True):
            value.name = name
    return program


def _tidy(program: onnx_ir.Model) -> onnx_ir.Model:
    """Constants folded, repetitions and leftovers removed; weights keep torch's names, also those stored transposed."""
    passes.InlinePass()(program)
    graph = program.graph
    transposes = ((node, node.inputs[0]) for node in graph if node.op_type == "Transpose")
    turned = {node: weight for node, weight in transposes if weight is not None and weight.is_initializer()}
    names = {str(node.outputs[0].name): str(weight.name) for node, weight in turned.items()}
    # A tied weight would be stored twice, and Resize takes minutes in onnx's own implementation.
    kept = {node for node in graph if node.op_type == "Resize" or (node in turned and len(turned[node].uses()) > 1)}
    for _ in range(2):  # what the first round removes lets the second fold more
        optimizer.fold_constants(program, onnx_shape_inference=True, should_fold=lambda node: False if node in kept else None)
        passes.RemoveUnusedNodesPass()(program)
        passes.CommonSubexpressionEliminationPass()(program)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(program)
    passes.OutputFixPass()(program)
    passes.NameFixPass()(program)
    passes.ClearMetadataAndDocStringPass()(program)  # stack traces with the paths of this machine
    for folded, name in names.items():
        if folded in graph.initializers and name not in graph.initializers:
            graph.initializers[folded].name = name
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:  # a size that the model fixes comes as a symbol named "8"
            value.shape = onnx_ir.Shape([int(str(size)) if str(size).isdigit() else size for size in value.shape])
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
        raise ExportError(f"{error.filename or path}: {error.strerror or error}. Give a file that you may read.") from error
    except Exception as error:  # protobuf's DecodeError has no parent of its own
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
