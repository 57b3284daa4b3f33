"""What each order of an adapted call (sarac.ir.schedules) costs on a device, by rates that were measured there.

A forward and backward of one call is a list of products and passes over memory; a product takes its operations over the rate
measured for its smallest dimension, or its bytes over the bandwidth where that is more, and every kernel its launch. `sarac
tune` measures the rates of the machine at hand. Without rates of a device operations alone decide.
"""

import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sarac.ir.cache import store
from sarac.ir.errors import SaracError

MEASURED = "tune.json"  # beside what the cache keeps: rates of this machine
LARGEST = 2**20  # tokens
NAMES = ("right", "left", "materialised", "rebuilt", "two-sided")  # of equally fast ones the first is taken

Curve = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Rates:
    """What a device does in one dtype: seconds a launch, bytes/s, and the operations/s of products.

    These are measured by how many rows (tokens) there are, and by the smaller of the two other dimensions.
    """

    launch: float
    bandwidth: float
    rows: Curve
    products: Curve

    def product(self, rows: int, inner: int, columns: int, size: int) -> float:
        """Seconds of a product (rows, inner) by (inner, columns) of elements of this size in bytes."""
        rate = min(_at(self.rows, rows), _at(self.products, min(inner, columns)))
        moved = (rows * inner + inner * columns + rows * columns) * size
        return self.launch + max(2.0 * rows * inner * columns / rate, moved / self.bandwidth)

    def passes(self, numbers: int, size: int, kernels: int = 1) -> float:
        """Seconds of kernels that together read and write so many numbers of this size in bytes."""
        return kernels * self.launch + numbers * size / self.bandwidth


def _at(curve: Curve, size: int) -> float:
    """The rate at a size, between those measured on a line of logarithms."""
    low = max((one for one in curve if one[0] <= size), default=curve[0])
    high = min((one for one in curve if one[0] >= size), default=curve[-1])
    share = 0.0 if high[0] <= low[0] else math.log(size / low[0]) / math.log(high[0] / low[0])
    rate: float = low[1] ** (1.0 - share) * high[1] ** share
    return rate


# Operations alone: a launch and a byte cost nothing.
_COUNTED = Rates(0.0, math.inf, ((1, 1e12),), ((1, 1e12),))


@dataclass(frozen=True)
class Call:
    """One adapted linear call: x (tokens, inner), W (out, inner), k directions, elements of `size` bytes."""

    tokens: int
    out: int
    inner: int
    rank: int
    size: int = 2
    routed: bool = False  # gates mix the shifts: there is no weight to make
    biased: bool = False  # what is rounded at a bias's size is no source of W x
    factors: bool = False  # U and V train
    sets: int = 0  # whose scores are kept
    compiled: bool = False  # the rest of a step takes a third less: what is made again counts for more

    @property
    def choices(self) -> tuple[str, ...]:
        """The schedules that can serve."""
        if self.factors:
            return ("two-sided",)
        names = tuple(name for name in NAMES if name not in ("materialised", "rebuilt")) if self.routed else NAMES
        return tuple(name for name in names if name != "left") if self.biased else names

    def kept(self, schedule: str) -> int:
        """Bytes kept from the forward to the backward."""
        held = self.out * self.inner if schedule == "materialised" else self.tokens * self.inner if self.factors else 0
        return (self.tokens * self.rank + held) * self.size + 4 * self.tokens * self.sets

    def seconds(self, schedule: str, rates: Rates) -> float:
        """Seconds of forward and backward, without those of `floor`."""
        t, m, n, k, size = self.tokens, self.out, self.inner, self.rank, self.size
        reduced = rates.passes(2 * t * k, size)
        if schedule == "two-sided":
            thin = 2 * rates.product(t, n, k, size) + 2 * rates.product(t, m, k, size)
            trained = 0.0
            if self.factors:
                made = rates.product(k, t, m, size) + rates.product(k, t, n, size)
                trained = made + rates.passes(2 * k * (m + n), size)  # shifts are multiplied into both
            return thin + trained + reduced + rates.passes(2 * k * (m + n) + t * (m + n), size, 2)
        if schedule in ("right", "left"):  # the sum in place one way, beside x or dY the other
            side = n if schedule == "right" else m
            return 4 * rates.product(t, side, k, size) + reduced + rates.passes(4 * k * side + 4 * t * side, size, 3)
        made = rates.product(m, k, n, size) + rates.passes(2 * k * m + 3 * m * n, size, 2)
        thin = rates.product(t, min(m, n), k, size)
        other = rates.product(t, n, k, size) if self.biased and m < n else thin
        return thin + other + (2 if schedule == "rebuilt" else 1) * made + reduced + rates.passes(0, size)

    def floor(self, rates: Rates) -> float:
        """Seconds of forward and backward of the frozen linear call."""
        return rates.product(self.tokens, self.inner, self.out, self.size) + rates.product(
            self.tokens, self.out, self.inner, self.size
        )

    @property
    def stored(self) -> int:
        """Bytes of U and V."""
        return self.rank * (self.out + self.inner) * self.size

    @property
    def fits(self) -> bool:
        """Whether a made weight, its projection and the factors are at most half an input, of a compiled call three quarters.

        An adapter that trains its factors keeps its input, which siblings share or others keep anyway: such a share of it is the
        measure. At k = 614 a Llama of width 2048 peaks at 9.14 GiB so, LoRA's at 9.34; compiled at 6.66 and 6.71.
        """
        room = self.tokens * self.inner * self.size * (3 if self.compiled else 2) // 4
        return self.kept("materialised") + self.stored <= room

    def best(self, rates: Rates, fits: bool | None = None) -> str:
        """The fastest schedule; a weight is kept only where it fits: by itself, or as is said."""
        keeps = self.fits if fits is None else fits
        fitting = [name for name in self.choices if name != "materialised" or keeps]
        return min(fitting, key=lambda name: self.seconds(name, rates))

    def steps(self, rates: Rates) -> tuple[tuple[int, str], ...]:
        """The best schedule by tokens, whatever this call has: (limit, name) for all numbers below the limit, in rising order."""
        found: list[tuple[int, str]] = []
        for limit in (2**power for power in range(1, LARGEST.bit_length())):
            least, middle = (replace(self, tokens=tokens) for tokens in (limit // 2, limit * 3 // 4))
            name = middle.best(rates, least.fits)
            found = [*(found[:-1] if found and found[-1][1] == name else found), (limit, name)]
        return tuple(found)


def schedule_at(tokens: int, steps: Sequence[tuple[int, str]]) -> str:
    """The choice among `Call.steps`, written so that a compiler guards on a range of tokens and not on their number."""
    for limit, name in steps:
        if tokens < limit:
            return name
    return steps[-1][1]


def device_name(device: torch.device | str) -> str:
    """The name that rates of a device are kept under: the GPU's own, or the kind of device."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def rates_of(device: str, dtype: str) -> Rates | None:
    """The rates of a device by its name and of a dtype by its torch name; None where nothing was measured there."""
    table = _tables().get(device, {}).get(dtype)
    return None if table is None else _rates(table)


def rates_or_counts(device: str, dtype: str) -> Rates:
    """The rates of a device, or such that operations alone decide."""
    return rates_of(device, dtype) or _COUNTED


def _rates(table: Mapping[str, Any]) -> Rates:
    rows, products = (tuple((int(n), float(rate)) for n, rate in table[name]) for name in ("rows", "products"))
    return Rates(float(table["launch"]), float(table["bandwidth"]), rows, products)


def steps(
    out: int, inner: int, rank: int, dtype: torch.dtype, device: torch.device, routed: bool, biased: bool, compiled: bool = False
) -> tuple[tuple[int, str], ...]:
    """The schedules by tokens for a weight on a device, from the rates that there are."""
    key = (out, inner, rank, dtype, device, routed, biased, compiled)
    found = _steps.get(key)
    if found is None:
        rates = rates_or_counts(device_name(device), str(dtype).removeprefix("torch."))
        found = _steps[key] = Call(1, out, inner, rank, dtype.itemsize, routed, biased, compiled=compiled).steps(rates)
    return found


# What torch.compiler.assume_constant_result does, without the import of the compiler (a second): dynamo calls it while it traces.
steps._dynamo_marked_constant = True  # type: ignore[attr-defined]
_steps: dict[tuple[Any, ...], tuple[tuple[int, str], ...]] = {}


def keep_rates(folder: Path, device: str, tables: Mapping[str, Rates]) -> Path:
    """Write the rates of a device by dtype beside those of others, for later processes too; the file."""
    path = folder / MEASURED
    known = _read(path)
    known[device] = {**known.get(device, {}), **{dtype: asdict(rates) for dtype, rates in tables.items()}}
    folder.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(known, indent=1), encoding="utf-8")
    aside.replace(path)
    forget_rates()
    return path


def forget_rates() -> None:
    """Read the rates anew when they are asked for next."""
    rates_of.cache_clear()
    _steps.clear()


def _tables() -> dict[str, Any]:
    kept = store()
    return _read(kept.folder / MEASURED) if kept else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise SaracError(f"The measured rates in {path} cannot be read ({error}): delete it, then run `sarac tune`.") from error
    return found
