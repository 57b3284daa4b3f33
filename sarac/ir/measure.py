"""The one place that measures many weights: read ahead, known ones from the cache, small ones of a shape together, and with
other processes where there are some.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sarac.ir.cache import Store, digest, key, pack, unpack
from sarac.ir.certify import certified, worthwhile
from sarac.ir.gram import Wanted, by_svd, factors, spectra, spectrum, vectors
from sarac.ir.graph import ModelGraph, Site
from sarac.ir.processes import Share
from sarac.ir.spectrum import Spectrum, refining

_THREADS = 2  # that read, hash and upload ahead of the decompositions
_AHEAD, _AHEAD_CUDA = 2**24, 2**30  # bytes of weights that lie ready: what a CPU measures shares its memory with them
_ALL = "all values"  # the rule of a whole spectrum in the cache
_SMALL, _TOGETHER = 512, 2**22  # the smaller side of what is measured together, and how many values of it at once
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Weight:
    """A weight to be measured, shape (out, in) or (parts, out, in); `load` gives its values when their turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    wanted: Wanted | None = None  # what is kept beside the values

    @property
    def cost(self) -> int:
        """What its decomposition costs, up to a factor."""
        return math.prod(self.shape) * min(self.shape[-2:])

    @property
    def bytes(self) -> int:
        """What its values take."""
        return math.prod(self.shape) * self.dtype.itemsize


def weights(graph: ModelGraph, names: Iterable[str], wanted: Callable[[Site], Wanted | None] | None = None) -> list[Weight]:
    """These sites of a traced model, to be measured."""
    sites = [graph.sites[name] for name in names]
    return [
        Weight(site.name, site.full_shape, site.dtype, partial(graph.weight, site), wanted and wanted(site)) for site in sites
    ]


@dataclass(frozen=True)
class _Ready:
    """A weight whose turn comes: its values and when they have arrived, or the spectrum that the cache had."""

    weight: Weight
    values: Tensor | None = None
    arrived: Any = None
    entry: Callable[[str], str] | None = None  # the cache's key by rule
    known: Spectrum | None = None
    home: torch.device | None = None  # where its values lay


@dataclass(frozen=True)
class _Place:
    """Where weights are measured: where they lie, or, with a device, there, to which a stream of its own takes them."""

    device: torch.device | None
    stream: Any = None

    @classmethod
    def of(cls, device: torch.device | None) -> "_Place":
        """By default the current CUDA device where there is one."""
        if device is None and torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
        fast = device is not None and device.type == "cuda"
        return cls(device, torch.cuda.Stream(device) if fast else None)  # type: ignore[no-untyped-call]  # torch's own

    @property
    def ahead(self) -> int:
        """How many bytes of weights may lie ready."""
        return _AHEAD_CUDA if self.stream is not None else _AHEAD

    def take(self, values: Tensor) -> tuple[Tensor, Any]:
        """The values there, from host memory, and the event after which they have arrived."""
        if self.device is None or values.is_meta or values.device.type != "cpu":
            return values, None
        if self.stream is None:
            return values.to(self.device), None
        with torch.cuda.stream(self.stream):
            return values.contiguous().pin_memory().to(self.device, non_blocking=True), self.stream.record_event()


def measure(
    weights: Sequence[Weight],
    *,
    cache: Store | None = None,
    progress: Progress | None = None,
    device: torch.device | None = None,
    distributed: bool = False,
) -> dict[str, Spectrum]:
    """The spectrum of every weight, by name; `progress` is called with a name before its turn.

    Without a `device` a weight is measured where it lies, or on the current CUDA device where it lies in host memory.
    `distributed`: every process of the initialised group calls this with the same weights, and each gets all spectra.
    """
    batches, place = _batches(weights), _Place.of(device)
    if distributed:
        share = Share([sum(weight.cost for weight in batch) for batch in batches], progress)
        mine: dict[str, Spectrum] = {}  # with the vectors that they keep
        work = _measured([batches[i] for i in share.mine], cache, share.step, place)
        found = share.collect((name, mine.setdefault(name, one)) for name, one in work)
        return {weight.name: _revisable(weight, {**found, **mine}[weight.name], cache, place) for weight in weights}
    found = dict(_measured(batches, cache, progress or (lambda name: None), place))
    return {weight.name: found[weight.name] for weight in weights}


def leading(
    weight: Tensor, rank: int, name: str, cache: Store | None = None, measured: Spectrum | None = None
) -> tuple[Tensor, Tensor, Tensor, float]:
    """U (out, rank), s (rank,), V (rank, in) and the zero floor, of a matrix whose one side's vectors the cache may have.

    Or its spectrum, `measured`, has kept them. They are the same to the last bit whether they were kept or computed.
    """
    entry = _entry(weight, f"vectors {rank}", cache)
    known = cache.get(entry) if cache is not None and entry else None
    basis = None if known is None else known[0].get("basis")
    values, arrived = _Place.of(None).take(weight.detach())
    if arrived is not None:
        arrived.synchronize()
    if basis is not None and tuple(basis.shape) == (rank, min(weight.shape)):
        return factors(values, rank, name, basis.to(values.device))
    basis = measured.basis if measured is not None else None
    basis = vectors(values, rank, name) if basis is None or len(basis) < rank else basis[:rank].to(values.device)
    if cache is not None and entry:
        cache.put(entry, {"basis": basis}, None)
    return factors(values, rank, name, basis)


def _entry(values: Tensor, rule: str, cache: Store | None) -> str:
    """The cache's key for these values, "" where there is no cache or they cannot be hashed."""
    content = None if cache is None else digest(values)
    return key(content, values.dtype, tuple(values.shape), rule) if content else ""


def _refined(weight: Weight, part: int | None, cache: Store | None, place: _Place) -> Callable[[str], Spectrum]:
    """The way back to a weight, or to one matrix of a stack: read again, and measured by a true SVD."""

    def refine(reason: str) -> Spectrum:
        values = weight.load() if part is None else weight.load()[part]
        entry = _entry(values, "all values, SVD", cache)
        kept = cache.get(entry) if cache is not None and entry else None
        known = unpack(*kept, tuple(values.shape)) if kept else None
        if known is None:
            known = by_svd(_arrived([_Ready(weight, *place.take(values))])[0], reason)
            if cache is not None and entry:
                cache.put(entry, *pack(known))
        return replace(known, reason=reason)

    return refine


def _revisable(weight: Weight, spectrum: Spectrum, cache: Store | None, place: _Place) -> Spectrum:
    """The spectrum with the way back to its weight, which it does not hold."""
    return refining(spectrum, _refined(weight, None, cache, place), lambda i: _refined(weight, i, cache, place))


def _batches(weights: Iterable[Weight]) -> list[list[Weight]]:
    """The weights in the order of their turns, small ones of one shape together; which they are depends on nothing else."""
    batches: list[list[Weight]] = []
    unfilled: dict[tuple[tuple[int, ...], torch.dtype], list[Weight]] = {}
    for weight in weights:
        alike, batch = (weight.shape, weight.dtype), unfilled.get((weight.shape, weight.dtype))
        if batch is None or (len(batch) + 1) * math.prod(weight.shape) > _TOGETHER:
            batch = []
            batches.append(batch)
            if len(weight.shape) == 2 and min(weight.shape) <= _SMALL and weight.wanted is None:
                unfilled[alike] = batch
        batch.append(weight)
    return batches


def _measured(
    batches: Sequence[list[Weight]], cache: Store | None, progress: Progress, place: _Place
) -> Iterator[tuple[str, Spectrum]]:
    """Every weight's spectrum, each in the cache before the next one's turn."""
    for batch in _ahead(batches, lambda batch: [_ready(weight, cache, place) for weight in batch], place.ahead):
        for one in batch:
            progress(one.weight.name)
        yield from ((one.weight.name, _revisable(one.weight, one.known, cache, place)) for one in batch if one.known is not None)
        left = [(one.weight, one.entry, one.home) for one in batch if one.known is None]
        values = _arrived(batch)
        batch.clear()  # of a large weight there is no room for two
        found = _together(values, [weight for weight, _, _ in left])
        values.clear()
        for (weight, entry, home), new in zip(left, found, strict=True):
            if cache is not None and entry:
                rule = _ALL if new.complete or not weight.wanted else _leading(weight.wanted.share)
                cache.put(entry(rule), *pack(new))
            for part in new.matrices:  # a model in host memory may be larger than the device that measures it
                if part.basis is not None:
                    part.__dict__["basis"] = part.basis.to(home)
            yield weight.name, _revisable(weight, new, cache, place)  # what it held of the values goes


def _together(values: list[Tensor], weights: Sequence[Weight]) -> list[Spectrum]:
    """The spectra of equal matrices, or of one stack, or of one weight of which something is wanted."""
    if values and (values[0].ndim == 3 or weights[0].wanted is not None):
        return [_alone(values[0], weights[0].name, weights[0].wanted)]
    return spectra(values, [weight.name for weight in weights]) if values else []


def _alone(values: Tensor, name: str, wanted: Wanted | None) -> Spectrum:
    if wanted is not None and wanted.share is not None and worthwhile(values, wanted.share):
        found = certified(values, wanted.share)
        if found is not None:
            return found
    return spectrum(values, name, wanted.rank if wanted else None)


def _ready(weight: Weight, cache: Store | None, place: _Place) -> _Ready:
    """Read a weight, hash it and look it up; take it to where it is measured."""
    values = weight.load()
    content = None if cache is None else digest(values)
    if cache is None or not content:
        return _Ready(weight, *place.take(values), home=values.device)
    for rule in (_ALL, *([_leading(weight.wanted.share)] if weight.wanted else [])):
        kept = cache.get(key(content, values.dtype, tuple(values.shape), rule))
        known = unpack(*kept, tuple(values.shape)) if kept else None
        if known is not None:
            return _Ready(weight, known=known)
    entry = partial(key, content, values.dtype, tuple(values.shape))
    return _Ready(weight, *place.take(values), entry, home=values.device)


def _leading(share: float | None) -> str:
    return f"leading values up to {share!r}"


def _arrived(batch: Iterable[_Ready]) -> list[Tensor]:
    """The values that are still to be measured; the present stream waits for them."""
    values = []
    for one in batch:
        if one.values is not None:
            values.append(one.values)
            if one.arrived is not None:
                stream = torch.cuda.current_stream(one.values.device)
                stream.wait_event(one.arrived)
                one.values.record_stream(stream)
    return values


def _ahead(batches: Iterable[list[Weight]], ready: Callable[[list[Weight]], list[_Ready]], room: int) -> Iterator[list[_Ready]]:
    """Every batch made ready, in order, by threads that go as far ahead as there is room for."""
    waiting: deque[tuple[int, Future[list[_Ready]]]] = deque()
    rest = deque((sum(weight.bytes for weight in batch), batch) for batch in batches)
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            while rest or waiting:
                while rest and (not waiting or sum(size for size, _ in waiting) + rest[0][0] <= room):
                    size, batch = rest.popleft()
                    waiting.append((size, pool.submit(ready, batch)))
                yield waiting.popleft()[1].result()
        finally:
            pool.shutdown(cancel_futures=True)
