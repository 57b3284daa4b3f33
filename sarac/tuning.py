"""Measure what a device does: the rates by which schedules are chosen there, and how well they predict one."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from sarac.ir import ready
from sarac.ir.cache import store
from sarac.ir.cost import NAMES, Call, Rates, device_name, keep_rates
from sarac.ir.errors import InputError
from sarac.ir.schedules import SCHEDULES
from sarac.tables import as_text

DTYPES = ("float32", "bfloat16")
SIZES = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
# Of a GPU and of a CPU: tokens and width of the products, numbers of a pass over memory, least seconds for each measurement.
_SIZES = {"cuda": (8192, 2048, 2**26, 0.0), "cpu": (512, 1024, 2**23, 0.05)}
_CALLS_IN_GRAPH = 10
# Tokens, out, in and k of the calls that predictions are held against: a square, a tall and a wide weight.
_CALLS = {
    "cuda": [
        (8192, 2048, 2048, 32), (8192, 2048, 2048, 614), (8192, 5632, 2048, 614), (8192, 2048, 5632, 614), (1024, 2048, 2048, 614)
    ],
    "cpu": [(512, 576, 576, 32), (512, 576, 576, 170), (512, 1536, 576, 170), (512, 576, 1536, 170), (64, 576, 576, 170)],
}  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """One schedule of one call: milliseconds of its forward and backward, as predicted and as measured."""

    call: Call
    schedule: str
    dtype: str
    predicted: float
    measured: float


@dataclass(frozen=True)
class Tuned:
    """The rates of a device by dtype, what they predict beside what was measured, and the file that keeps them ("" for none)."""

    device: str
    rates: dict[str, Rates]
    compared: tuple[Compared, ...] = ()
    path: str = ""

    def to_json(self) -> str:
        """All figures as JSON text."""
        rates = {dtype: asdict(one) for dtype, one in self.rates.items()}
        return json.dumps(
            {"device": self.device, "path": self.path, "rates": rates, "compared": [asdict(c) for c in self.compared]}
        )

    def tables(self) -> list[Table]:
        """The rates, and predicted beside measured, as rich tables."""
        shown = Table(title=f"{self.device}: what it does", title_justify="left")
        for heading in ("dtype", "launch µs", "GB/s", "10⁹ operations/s by", *map(str, SIZES)):
            shown.add_column(heading, justify="right")
        for dtype, one in self.rates.items():
            for curve, name in ((one.rows, "tokens"), (one.products, "k")):
                head = (dtype, f"{one.launch * 1e6:.1f}", f"{one.bandwidth / 1e9:.0f}") if name == "tokens" else ("", "", "")
                shown.add_row(*head, name, *(_short(dict(curve).get(size)) for size in SIZES))
        return [shown, *([self._comparison()] if self.compared else [])]

    def _comparison(self) -> Table:
        table = Table(title="Forward and backward of one call, ms: predicted / measured", title_justify="left")
        for heading in ("dtype", "tokens", "(out, in)", "k", *NAMES):
            table.add_column(heading, justify="right")
        for call, dtype in dict.fromkeys((one.call, one.dtype) for one in self.compared):
            found = {one.schedule: one for one in self.compared if (one.call, one.dtype) == (call, dtype)}
            best = min(found.values(), key=lambda one: one.measured)
            chosen = min(found.values(), key=lambda one: one.predicted)
            cells = [
                f"{one.predicted:.3g} / {one.measured:.3g}{' *' if one is chosen else ''}{' +' if one is best else ''}"
                for one in (found[name] for name in NAMES)
            ]
            table.add_row(dtype, str(call.tokens), f"{call.out} x {call.inner}", str(call.rank), *cells)
        table.caption, table.caption_justify = "* the fastest as predicted; + as measured", "left"
        return table

    def __str__(self) -> str:
        return "\n".join(as_text(table) for table in self.tables())


def tune(
    device: str | torch.device | None = None,
    *,
    dtypes: Sequence[str] = DTYPES,
    check: bool = True,
    keep: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Tuned:
    """Measure the rates of a device, the GPU where there is one, and keep them for later choices in sarac's cache folder.

    `check` measures whole calls by every schedule as well, beside what the rates predict. `progress(what)` is called before each.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type not in _SIZES or (where.type == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"There is no device {where} here to measure: it is cpu, or cuda where torch sees a GPU.")
    wrong = next((name for name in dtypes if name not in ("float32", "bfloat16", "float64")), None)
    if wrong is not None:
        raise InputError(f"dtypes={wrong!r} has no schedules: they are for float32, bfloat16 and float64.")
    tell = progress or (lambda what: None)
    rates = {dtype: _rates(where, getattr(torch, dtype), tell) for dtype in dtypes}
    compared: list[Compared] = []
    for dtype, found in rates.items() if check else ():
        for sizes in _CALLS[where.type]:
            call = Call(*sizes, size=getattr(torch, dtype).itemsize)
            for name in NAMES:
                tell(f"{dtype} {call.out} x {call.inner}, {name}")
                predicted = 1e3 * (call.floor(found) + call.seconds(name, found))
                compared.append(Compared(call, name, dtype, predicted, 1e3 * _measured(call, name, where, getattr(torch, dtype))))
    kept = store() if keep else None
    path = keep_rates(Path(kept.folder), device_name(where), rates) if kept else ""
    ready.forget()  # calls that were looked at chose by other rates
    return Tuned(device_name(where), rates, tuple(compared), str(path))


def _rates(device: torch.device, dtype: torch.dtype, tell: Callable[[str], None]) -> Rates:
    tokens, width, numbers, _ = _SIZES[device.type]
    tell(f"{str(dtype).removeprefix('torch.')} kernels")
    small, large = torch.ones(8, device=device, dtype=dtype), torch.ones(numbers, device=device, dtype=dtype)
    launch = _seconds(lambda: [torch.add(small, 1.0, out=small) for _ in range(50)], device) / 50
    copied = torch.empty_like(large)
    bandwidth = 2 * large.nbytes / _seconds(lambda: copied.copy_(large), device)
    x = torch.randn(tokens, width, device=device).to(dtype)
    square = torch.randn(width, width, device=device).to(dtype)
    products, rows = [], []
    for size in SIZES:
        tell(f"{str(dtype).removeprefix('torch.')} products of {size}")
        if size <= width:
            thin = square[:size].contiguous()
            products.append((size, _rate(x, thin, launch, device)))
        if size <= tokens:
            rows.append((size, _rate(x[:size], square, launch, device)))
    return Rates(launch, bandwidth, tuple(rows), tuple(products))


def _rate(x: Tensor, weight: Tensor, launch: float, device: torch.device) -> float:
    """Operations/s of x Wᵀ."""
    spent = _seconds(lambda: x @ weight.mT, device) - launch
    return 2.0 * len(x) * len(weight) * x.shape[1] / max(spent, 1e-9)


def _measured(call: Call, schedule: str, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of a forward and backward by a schedule; which numbers the factors are does not matter to it."""

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).div_(shape[-1] ** 0.5).to(dtype)

    x, dy = made(call.tokens, call.inner).requires_grad_(), made(call.tokens, call.out)
    weight, u, v = made(call.out, call.inner), made(call.out, call.rank), made(call.rank, call.inner)
    scale, shift = torch.ones(call.rank, device=device), torch.zeros(call.rank, device=device).requires_grad_()

    def step() -> None:
        y: Any = SCHEDULES[schedule].apply("linear", x, weight, None, u, v, scale, shift, None)  # type: ignore[no-untyped-call]
        torch.autograd.grad(y[0], (x, shift), dy)

    return _seconds(step, device)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The least seconds of a call, of at least twelve: what else a shared machine does is no rate of its own."""
    if device.type == "cuda":
        return _replayed(run)
    spent: list[float] = []
    while len(spent) < 12 or sum(spent) < _SIZES[device.type][3]:
        started = time.perf_counter()
        run()
        spent.append(time.perf_counter() - started)
    return min(spent)


def _replayed(run: Callable[[], Any]) -> float:
    """The least seconds of a call among replays of a CUDA graph: what the device does, not how fast the host asks for it."""
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS_IN_GRAPH):
            run()
    spent: list[float] = []
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    for _ in range(12):
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        spent.append(before.elapsed_time(after))
    return min(spent) / 1e3 / _CALLS_IN_GRAPH


def _short(rate: float | None) -> str:
    return "" if rate is None else f"{rate / 1e9:,.0f}"
