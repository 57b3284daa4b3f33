"""What was measured before, kept in the user's cache folder: one file an entry, named by a hash of the weight and the rule.

An entry is written aside and renamed, so that two processes and a kill in the middle leave whole ones only; what cannot be
read, or is not what its name says, is removed and measured anew. The least recently used go first.
"""

import hashlib
import json
import os
import re
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sarac.ir.errors import InputError, SaracWarning
from sarac.ir.gram import ENGINE
from sarac.ir.spectrum import Spectrum, stacked

FORMAT = 1
_LIMIT = 10 * 10**9
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_ASIDE = ".sarac-"
_FORGOTTEN = 3600.0  # seconds after which a file that was written aside has lost its writer
_PIECE = 2**24  # bytes that are hashed at a time
_KEPT = [field.name for field in fields(Spectrum) if field.compare and field.name != "parts"]
_on: ContextVar[bool] = ContextVar("_on", default=True)
_told: set[Path] = set()


def folder() -> Path | None:
    """The cache folder: $SARAC_CACHE, or the user's usual one; None where SARAC_CACHE=off."""
    given, home = os.environ.get("SARAC_CACHE", ""), Path("~").expanduser()
    if given:
        return None if given == "off" else Path(given).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "sarac" / "Cache"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "sarac"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "sarac"


def limit() -> int:
    """How many bytes the cache may take: $SARAC_CACHE_LIMIT, in bytes or as 5GB, else 10 GB."""
    given = os.environ.get("SARAC_CACHE_LIMIT", "")
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", given.strip().upper())
    if given and not found:
        raise InputError(f"SARAC_CACHE_LIMIT is {given!r}, which is no size: give bytes, or for example 5GB.")
    return int(float(found[1]) * _UNITS[found[2]]) if found else _LIMIT


def store() -> "Store | None":
    """The cache that holds here; None where it is off."""
    where = folder() if _on.get() else None
    return None if where is None else Store(where, limit())


@contextmanager
def switched(on: bool) -> Iterator[None]:
    """The cache on as the environment says, or off, for a while."""
    token = _on.set(on and _on.get())
    try:
        yield
    finally:
        _on.reset(token)


def digest(weight: Tensor) -> str | None:
    """SHA-256 of a weight's bytes as (out, in) or (parts, out, in); None for one that has none of its own (meta, sharded)."""
    if type(weight.detach()) is not Tensor or weight.is_meta:
        return None
    found, plain = hashlib.sha256(), weight.detach()
    rows = max(1, _PIECE * len(plain) // max(1, plain.numel() * plain.itemsize))
    for start in range(0, len(plain), rows):
        found.update(plain[start : start + rows].cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def key(content: str, dtype: torch.dtype, shape: tuple[int, ...], rule: str) -> str:
    """What an entry is of, as JSON: the weight's hash, dtype and shape, the engine and the rule."""
    return json.dumps([FORMAT, ENGINE, content, str(dtype).removeprefix("torch."), list(shape), rule])


@dataclass
class Store:
    """The entries in one folder, which take at most `limit` bytes. Nothing that goes wrong in it is an error."""

    folder: Path
    limit: int = _LIMIT
    _spare: int = field(default=-1, init=False)  # bytes that may be written before the folder is looked through again

    def get(self, key: str) -> tuple[dict[str, Tensor], Any] | None:
        """The tensors and facts kept under this key; None where there are none that can be trusted."""
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {}).get("sarac_cache", "null"))
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  not a dict
            if about["key"] == key and about["sum"] == _sum(tensors, about["facts"]):
                with suppress(OSError):
                    os.utime(path)
                return tensors, about["facts"]
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError):
            pass
        self.drop(key)
        return None

    def put(self, key: str, tensors: Mapping[str, Tensor], facts: Any) -> None:
        """Keep these under this key; a folder that takes nothing is a warning, once."""
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        size = sum(tensor.numel() * tensor.itemsize for tensor in whole.values())
        if size > self.limit:
            return
        about = json.dumps({"key": key, "facts": facts, "sum": _sum(whole, facts)})
        aside = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(size)
            handle, name = tempfile.mkstemp(dir=self.folder, prefix=_ASIDE)
            os.close(handle)
            aside = Path(name)
            save_file(whole, aside, metadata={"sarac_cache": about})
            aside.replace(self._path(key))
        except (OSError, SafetensorError, RuntimeError) as error:
            self._tell(
                f"The cache {self.folder} takes nothing more ({getattr(error, 'strerror', None) or error}): what is measured is "
                "not kept. Make room there, or set SARAC_CACHE to another folder, or to off."
            )
        finally:
            if aside is not None:
                with suppress(OSError):
                    aside.unlink(missing_ok=True)

    def drop(self, key: str) -> None:
        """Remove an entry."""
        with suppress(OSError):
            self._path(key).unlink(missing_ok=True)

    def entries(self) -> list[tuple[float, int, Path]]:
        """Every entry: when it was last used, its bytes, its file; the oldest first. What else lies there is not ours."""
        return sorted(self._files(lambda name: bool(_ENTRY.fullmatch(name))))

    def clear(self) -> tuple[int, int]:
        """Remove every entry, and what was left aside: how many entries and how many bytes."""
        gone = self.entries()
        for _, _, path in [*gone, *self._files(lambda name: name.startswith(_ASIDE))]:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        return len(gone), sum(size for _, size, _ in gone)

    def _tell(self, sentence: str) -> None:
        if self.folder not in _told:
            _told.add(self.folder)
            warnings.warn(sentence, SaracWarning, stacklevel=4)

    def _path(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def _files(self, ours: Any) -> Iterator[tuple[float, int, Path]]:
        with suppress(OSError), os.scandir(self.folder) as found:
            for file in found:
                with suppress(OSError):  # another process may remove it meanwhile
                    if ours(file.name):
                        about = file.stat()
                        yield about.st_mtime, about.st_size, Path(file.path)

    def _make_room(self, size: int) -> None:
        """Remove the entries used longest ago where the folder would grow over the limit.

        Other processes write there too: it is looked through again after every sixteenth of the limit.
        """
        self._spare -= size
        if self._spare >= 0:
            return
        for used, _, path in self._files(lambda name: name.startswith(_ASIDE)):
            if time.time() - used > _FORGOTTEN:
                path.unlink(missing_ok=True)
        kept = self.entries()
        total = sum(one for _, one, _ in kept) + size
        for _, one, path in kept:
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= one
        self._spare = min(self.limit - total, self.limit // 16)


def pack(spectrum: Spectrum) -> tuple[dict[str, Tensor], Any]:
    """A spectrum as tensors and JSON facts, each matrix of a stack on its own."""
    tensors: dict[str, Tensor] = {}
    facts: list[dict[str, Any]] = []
    for i, one in enumerate(spectrum.matrices):
        values = {name: getattr(one, name) for name in _KEPT}
        tensors |= {f"{i}.{name}": value for name, value in values.items() if isinstance(value, Tensor)}
        facts.append({name: value for name, value in values.items() if not isinstance(value, Tensor)})
    return tensors, facts


def unpack(tensors: Mapping[str, Tensor], facts: Any, shape: tuple[int, ...]) -> Spectrum | None:
    """The spectrum of a weight of this shape; None where these are no such."""
    found: list[Spectrum] = []
    try:
        for i, one in enumerate(facts):
            given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in one.items()}
            given |= {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.partition(".")[0] == str(i)}
            found.append(Spectrum(**given))
    except (TypeError, AttributeError):
        return None
    if len(found) != (shape[0] if len(shape) == 3 else 1) or not all(_sound(one, min(shape[-2:])) for one in found):
        return None
    return found[0] if len(shape) == 2 else stacked(tuple(found))


def _sound(spectrum: Spectrum, size: int) -> bool:
    values = spectrum.values
    descending = values.ndim == 1 and len(values) > 0 and bool((values[1:] <= values[:-1]).all())
    return descending and values.dtype == torch.float64 and spectrum.full_rank == size and bool(values.isfinite().all())


def _sum(tensors: Mapping[str, Tensor], facts: Any) -> int:
    """A checksum of names, shapes and values."""
    total = zlib.crc32(json.dumps(facts).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), total)
        total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, total)
    return total
