"""ONNX files read and changed without their weights: metadata, and how many nodes of which kind."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import onnx

from sarac.ir.errors import ExportError

# The numbers of onnx.ModelProto's fields, as onnx.proto fixes them.
_GRAPH, _OPSETS, _METADATA, _FUNCTIONS = 7, 8, 14, 25
_KNOWN, _NEEDED = {*range(1, 9), _METADATA, 20, _FUNCTIONS, 26}, {_GRAPH, _OPSETS}
_NODE, _OUTPUT, _VALUE = 1, 12, 13  # of onnx.GraphProto
_Field = tuple[int, int, int, int]  # its number, where it starts, where its content starts and ends, in bytes
_BLOCK = 2**24  # bytes copied at a time


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


def output_types(path: Path) -> dict[str, tuple[int, ...]]:
    """The element types of every named node's outputs, by ONNX's numbers and 0 where unknown; nested graphs are left out."""
    nodes: list[onnx.NodeProto] = []
    types: dict[str, int] = {}
    with _opened(path) as (file, fields):
        for _, _, *content in (field for field in fields if field[0] == _GRAPH):
            for kind, _, *inner in _fields(file, *content):
                if kind == _NODE:
                    nodes.append(onnx.NodeProto.FromString(_read(file, *inner)))
                elif kind in (_OUTPUT, _VALUE):
                    value = onnx.ValueInfoProto.FromString(_read(file, *inner))
                    types[value.name] = value.type.tensor_type.elem_type
    return {node.name: tuple(types.get(name, 0) for name in node.output) for node in nodes if node.name}


def matmul_count(path: Path) -> int:
    """How many matrix products an ONNX file has: MatMul and Gemm nodes."""
    counts = node_counts(path)
    return counts["MatMul"] + counts["Gemm"]


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
