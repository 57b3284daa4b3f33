"""Adapters in a running session: thousands of them in one tensor on the device, those of a run put where the graph reads them.

A run takes one adapter, by one copy into memory that stays bound; in a graph exported row by row, a batch takes one for each
of its rows, by one gather.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sarac.backends.adapter_file import ROLES, read_adapter, version_of
from sarac.backends.binding import Port, bind
from sarac.backends.swap import KEY
from sarac.ir.errors import CheckpointError, ExportError, InputError, near

Chosen = str | None | Sequence[str | None]
_ALIGNED = 8  # elements: 16 bytes in half precision, the widest load of a kernel
_LAYOUTS = 8  # how many batch sizes keep their memory


@dataclass(frozen=True)
class _Place:
    """Where one of the graph's inputs lies in an adapter: its first number there, and its shape for one row."""

    port: Port
    start: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class _Layout:
    """Memory for so many rows, bound once; where each of its numbers comes from, by row and by place in an adapter."""

    memory: Tensor
    row: Tensor
    column: Tensor
    binding: Any
    session: Any
    rows: int


class Adapters:
    """The adapters that a graph's session serves, by name; None is the base, and none at all is loaded at first."""

    def __init__(self, ports: Mapping[str, Port], path: Path, metadata: Mapping[str, str], device: torch.device) -> None:
        """`ports`: the inputs that adapters fill, with their leading free size where rows take their own."""
        self.path, self.device = path, device
        self.rowwise = bool(json.loads(metadata.get(KEY, "{}")).get("rowwise"))
        self._base, self._places, size = metadata.get("sarac.base", ""), {}, 0
        dtypes = {port.dtype for port in ports.values()}
        if len(dtypes) > 1:
            raise ExportError(f"{path.name} takes adapters in {len(dtypes)} dtypes: export it with a dtype for all of it.")
        for name, port in ports.items():
            place = _Place(port, size, tuple(int(n) for n in (port.shape[1:] if self.rowwise else port.shape)))
            self._places[name] = place
            size += -(-place.size // _ALIGNED) * _ALIGNED
        self._store = torch.zeros(1, size, dtype=dtypes.pop() if dtypes else torch.float32, device=device)
        self._rows: dict[str | None, int] = {None: 0}
        self._free: list[int] = []
        self._layouts: dict[int, _Layout] = {}
        self._live: tuple[Any, ...] = ()
        self.active: Chosen = None
        self.lock = threading.RLock()

    def __bool__(self) -> bool:
        """Whether the graph takes adapters."""
        return bool(self._places)

    def __len__(self) -> int:
        return len(self._rows) - 1

    def __contains__(self, name: object) -> bool:
        return name is not None and name in self._rows

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of an adapter: their shapes by the names of the graph's inputs."""
        return {name: place.shape for name, place in self._places.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """What is loaded, in the order of loading."""
        return tuple(name for name in self._rows if name is not None)

    @property
    def nbytes(self) -> int:
        """The bytes that the store takes on the device, room for more adapters counted in."""
        return self._store.nbytes

    def reserve(self, count: int) -> None:
        """Make room for so many adapters at once: a store that grows holds itself twice while it does."""
        with self.lock:
            self._grow(count + 1)

    def add(self, name: str, source: str | Path | Mapping[str, Tensor]) -> None:
        """Load an adapter under a name, in the place of one of that name: a file, or tensors by `SITE.sara_ROLE`.

        CheckpointError where it is of another base, or does not fit the graph.
        """
        self._require()
        given: Any = name
        if not given or not isinstance(given, str):
            raise InputError(f"An adapter's name is a text, and not {name!r}: None stands for the base.")
        where = str(source) if isinstance(source, str | Path) else f"The adapter {name!r}"
        if isinstance(source, Mapping):
            tensors = dict(source)
        else:
            tensors, base, version = read_adapter(Path(source))
            self._require_base(where, base, version)
        row = torch.zeros(self._store.shape[1], dtype=self._store.dtype)
        for key, tensor in self._fitting(where, tensors).items():
            place = self._places[key]
            row[place.start : place.start + place.size] = tensor.detach().reshape(-1).to("cpu", row.dtype)
        with self.lock:
            index = self._rows.get(name) or (self._free.pop() if self._free else len(self._rows))
            self._grow(index + 1)
            self._store[index] = row.to(self.device)
            self._rows[name], self._live = index, ()

    def remove(self, name: str) -> None:
        """Forget an adapter; InputError for one that is not there."""
        with self.lock:
            if name is None:
                raise InputError("The base cannot be removed: None stands for it.")
            self._row(name)
            self._free.append(self._rows.pop(name))
            self._live, self.active = (), None if self.active == name else self.active

    def require(self, chosen: Chosen, batch: int | None) -> None:
        """Raise InputError for names that are not there, or that are not one for each row of the batch."""
        if chosen is None:
            return
        self._require()
        names = self._named(chosen)
        for name in names:
            self._row(name)
        if not isinstance(chosen, str):
            if not self.rowwise:
                raise InputError(
                    f"{self.path.name} takes one adapter for a batch, and got {len(names)}: export it row by row "
                    '(swappable="rowwise") for one each.'
                )
            if batch is not None and len(names) != batch:
                raise InputError(
                    f"{self.path.name} got {len(names)} adapters for {batch} rows: give one for each, None for the base."
                )

    def bound(self, session: Any, chosen: Chosen, rows: int = 0) -> Any:
        """An I/O binding of the session with the chosen adapters in place; `rows` of memory, else as many as are chosen.

        The caller holds `lock` until the run is queued.
        """
        if not self:
            return session.io_binding()
        names = self._named(chosen)
        count = rows or (len(names) if self.rowwise else 1)
        layout = self._layouts.get(count)
        if layout is None or layout.session is not session:
            self._layouts.pop(count, None)
            while len(self._layouts) >= _LAYOUTS:
                self._layouts.pop(next(iter(self._layouts)))
            layout = self._layouts[count] = self._laid_out(count, session, session.io_binding())
            self._live = ()
        self._place(layout, names * (count // len(names)))
        return layout.binding

    def attached(self, session: Any, binding: Any, rows: int) -> Any:
        """Memory for the adapters of so many rows, bound into a binding that goes on living; `fill` fills it."""
        return self._laid_out(rows if self.rowwise else 1, session, binding) if self else None

    def fill(self, attached: Any, chosen: Chosen) -> None:
        """Put the chosen adapters where a binding reads them."""
        if attached is not None:
            names = self._named(chosen)
            self._place(attached, names * (attached.rows // len(names)))

    def _place(self, layout: _Layout, names: tuple[str | None, ...]) -> None:
        if self._live and self._live[0] is layout and self._live[1] == names:
            return
        indices = [self._row(name) for name in names]
        if len(indices) == 1:
            layout.memory.copy_(self._store[indices[0]])
        else:
            width = self._store.shape[1]
            rows = torch.tensor(indices).mul_(width).to(self.device, non_blocking=True)
            torch.take(self._store, rows[layout.row].add_(layout.column), out=layout.memory)
        self._live = (layout, names)

    def _laid_out(self, count: int, session: Any, binding: Any) -> _Layout:
        """Memory in which every input has its rows behind each other, as the graph reads them."""
        memory = torch.zeros(count * self._store.shape[1], dtype=self._store.dtype, device=self.device)
        row, column = (torch.zeros(memory.shape, dtype=torch.int32) for _ in range(2))
        for place in self._places.values():
            part = slice(place.start * count, (place.start * count + place.size * count))
            row[part] = torch.arange(count, dtype=torch.int32).repeat_interleave(place.size)
            column[part] = torch.arange(place.start, place.start + place.size, dtype=torch.int32).repeat(count)
            shape = (count, *place.shape) if self.rowwise else place.shape
            bind(binding.bind_input, place.port, memory[part].view(shape))
        return _Layout(memory, row.to(self.device), column.to(self.device), binding, session, count)

    def _grow(self, count: int) -> None:
        have, width = self._store.shape
        if count > have:
            grown = self._store.new_zeros(max(count, min(2 * have, have + 4096)), width)
            grown[:have] = self._store
            self._store = grown

    def _fitting(self, where: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that the graph takes; the rest of a file are factors, which the graph has itself."""
        lost = [name for name in self._places if name not in tensors]
        strangers = [name for name in tensors if name not in self._places and name.rpartition(".sara_")[2] in ROLES]
        strangers += [name for name in tensors if name.startswith("also_train.")]
        if lost or strangers:
            what = f"lacks {lost[0]}" if lost else f"has {strangers[0]}, which {self.path.name} does not take"
            raise CheckpointError(f"{where} {what}: it is of another plan. Export the model again with this adapter's plan.")
        for name, place in self._places.items():
            if tuple(tensors[name].shape) not in (place.shape, (1, *place.shape)):
                raise CheckpointError(
                    f"{where} has {name} of shape {tuple(tensors[name].shape)}, and {self.path.name} takes {place.shape}: it is "
                    "of another plan. Export the model again with this adapter's plan."
                )
            if not bool(tensors[name].to(self._store.dtype).isfinite().all()):
                raise CheckpointError(f"{where} has NaN or Inf at {name}, as {self._store.dtype} at least: train it again.")
        return {name: tensors[name] for name in self._places}

    def _require_base(self, where: str, base: str, version: int) -> None:
        if (base and base != self._base) or (not base and version != version_of(self._base)):
            raise CheckpointError(
                f"{where} was trained on another base than {self.path.name} has: load it there, or train it on this one."
            )

    def _require(self) -> None:
        if not self:
            raise InputError(f"{self.path.name} takes no adapters: export the model with swappable=True (`--swappable`).")

    def _named(self, chosen: Chosen) -> tuple[str | None, ...]:
        if chosen is None or isinstance(chosen, str):
            return (chosen,)
        if not isinstance(chosen, list | tuple):
            raise InputError(f"adapter={chosen!r} is no choice: give a name, a list of one for each row, or None for the base.")
        return tuple(chosen) or (None,)

    def _row(self, name: str | None) -> int:
        if name not in self._rows:
            raise InputError(f"There is no adapter {name!r} here. {near(str(name), self.names)}")
        return self._rows[name]
