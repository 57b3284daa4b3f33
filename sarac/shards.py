"""A folder of safetensors read tensor by tensor: what its files hold, checked before a byte of it is believed.

The headers are read here and the values by plain reads into memory of their own: mapped pages would stay with the process, and
a file that is cut off while it is mapped would end it.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sarac.ir.errors import CheckpointError

INDEX, SUFFIX = "model.safetensors.index.json", ".safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HEADER = 100 * 2**20  # the format's own limit for the header, in bytes
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
_AGAIN = "The file is damaged or cut off: fetch or write it again."


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: where its bytes lie, which were checked to be there."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    def read(self) -> Tensor:
        """The tensor, in memory of its own; a file that has become shorter is a CheckpointError."""
        if self.size == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        held = mmap(-1, self.size * self.dtype.itemsize)  # of the system's: what an allocator gets back it may keep
        view, done = memoryview(held), 0
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.start)
                while done < len(view) and (got := file.readinto(view[done:])):
                    done += got
        except OSError as error:
            raise CheckpointError(f"{self.file} cannot be read at {self.name}: {error.strerror or error}.") from error
        if done < len(view):
            raise CheckpointError(f"{self.file} ends within {self.name}, {len(view) - done:,} bytes too early. {_AGAIN}")
        return torch.frombuffer(held, dtype=torch.uint8).view(self.dtype).reshape(self.shape)


def found(path: Path) -> bool:
    """Whether this is a safetensors file, or a folder with such files or with an index of some."""
    if path.is_dir():
        return (path / INDEX).is_file() or any(path.glob(f"*{SUFFIX}"))
    return path.suffix == SUFFIX and path.is_file()


def require_weights(path: Path) -> None:
    """CheckpointError for a folder that holds neither safetensors nor anything else that opens as a model."""
    if not path.is_dir() or found(path) or (path / "config.json").is_file():
        return
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{path} holds {pickles[0]} and no safetensors: it is a pickle, which runs code when it is opened. Load it with the "
            "code that wrote it and save it as safetensors."
        )
    what = "is empty" if not any(path.iterdir()) else "holds no *.safetensors and no config.json"
    raise CheckpointError(f"{path} {what}: name a folder with a model's weights.")


def entries(path: Path) -> dict[str, Entry]:
    """Every tensor of a safetensors file, or of a folder's files, by name; an index says which files and what is in each."""
    if path.is_file():
        return header(path)
    if not (path / INDEX).is_file():
        single = path / "model.safetensors"
        return _all([single] if single.is_file() else sorted(path.glob(f"*{SUFFIX}")))
    places = _index(path / INDEX)
    held: dict[str, dict[str, Entry]] = {}
    for name, shard in places.items():
        if shard not in held:
            held[shard] = header(_shard(path, name, shard))
        if name not in held[shard]:
            raise CheckpointError(f"{path / INDEX} has {name} in {shard}, which lacks it: the two are not of one model.")
    return {name: held[shard][name] for name, shard in places.items()}


def header(path: Path) -> dict[str, Entry]:
    """The tensors of one file; a header that lies about them is a CheckpointError."""
    try:
        total = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", (file.read(8) + bytes(8))[:8])
            if length > min(_HEADER, total - 8):
                raise CheckpointError(f"{path} is no whole safetensors file: it has {total:,} bytes, and a header of {length:,}.")
            content = json.loads(file.read(length).decode())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no safetensors file: its header is no JSON ({error}). {_AGAIN}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no safetensors file: its header is a JSON {type(content).__name__}. {_AGAIN}")
    start = 8 + length
    stored = {name: about for name, about in content.items() if name != "__metadata__"}
    made = {name: _entry(path, name, about, start, total - start) for name, about in stored.items()}
    _require_apart(path, made.values())
    return made


def metadata(path: Path) -> Mapping[str, Any]:
    """What a file says of itself."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", (file.read(8) + bytes(8))[:8])
        content = json.loads(file.read(min(length, _HEADER)).decode())
    about = content.get("__metadata__", {}) if isinstance(content, dict) else {}
    return about if isinstance(about, dict) else {}


def _entry(path: Path, name: str, about: Any, start: int, room: int) -> Entry:
    """One line of a header, held against the file's size and itself."""
    try:
        text, shape, (begin, end) = about["dtype"], tuple(about["shape"]), about["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} does not say where {name} lies, of which dtype and shape. {_AGAIN}") from error
    if not isinstance(text, str) or text not in _DTYPES:
        raise CheckpointError(f"{path} holds {name} as {text!r}, a dtype that sarac does not know: convert the model to another.")
    dtype = _DTYPES[text]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise CheckpointError(f"{path} has {name} of shape {list(shape)} at {begin} to {end}, which is no place. {_AGAIN}")
    if end > room or begin > end:
        raise CheckpointError(f"{path} has {name} at bytes {begin:,} to {end:,} of {room:,}: outside the file. {_AGAIN}")
    wanted = math.prod(shape) * dtype.itemsize
    if wanted != end - begin:
        raise CheckpointError(
            f"{path} has {name} as {text} of shape {list(shape)}, {wanted:,} bytes, and gives it {end - begin:,}. {_AGAIN}"
        )
    return Entry(path, name, dtype, shape, start + begin)


def _require_apart(path: Path, made: Iterable[Entry]) -> None:
    end, before = 0, ""
    for entry in sorted(made, key=lambda entry: (entry.start, entry.size)):
        if entry.start < end:
            raise CheckpointError(f"{path} has {entry.name} and {before} in the same bytes. {_AGAIN}")
        end, before = entry.start + entry.size * entry.dtype.itemsize, entry.name


def _all(files: list[Path]) -> dict[str, Entry]:
    """The tensors of all files; one that is in two of them is a CheckpointError."""
    made: dict[str, Entry] = {}
    for file in files:
        for name, entry in header(file).items():
            if name in made:
                raise CheckpointError(
                    f"{made[name].file.name} and {file.name} of {file.parent} both hold {name}, and no {INDEX} says which "
                    "counts: name the one file, or remove what is not of the model."
                )
            made[name] = entry
    return made


def _index(path: Path) -> dict[str, str]:
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(shard, str) for shard in places.values()):
            raise ValueError("weight_map does not name files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no index of safetensors ({error}): fetch or write it again.") from error
    return dict(places)


def _shard(folder: Path, name: str, shard: str) -> Path:
    path = folder / shard
    if Path(shard).name != shard:
        raise CheckpointError(f"{folder / INDEX} has {name} in {shard!r}, outside the folder: it must name a file beside it.")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, which {INDEX} names for {name}: fetch the model's files again.")
    return path
