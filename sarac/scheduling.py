"""Which order of products every adapted call runs in while it trains: the choice, what it costs, and how to make another."""

import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.table import Table
from torch import nn

from sarac.ir.calls import AUTO, CHOICES, PLAIN, TWO_SIDED, asked_of, even
from sarac.ir.cost import Call, device_name, rates_of, rates_or_counts, schedule_at
from sarac.ir.errors import PlanError, RewriteError, near
from sarac.ir.graph import Site, starred
from sarac.ir.layers import adapted
from sarac.ir.weight import Slot, fixed, no_matrix, settle
from sarac.tables import as_text


@dataclass(frozen=True)
class Scheduled:
    """One site: what its calls run by, and the ms that each schedule adds to the forward and backward of a frozen one."""

    site: str
    shape: tuple[int, int]
    rank: int
    asked: str  # auto, or the schedule that was set
    schedule: str  # what it comes to
    why: str  # where it is not a matter of cost
    floor: float  # ms of the frozen linear call
    added: Mapping[str, float]  # ms on top of it, by schedule
    kept: int  # bytes from the forward to the backward


@dataclass(frozen=True)
class Schedules:
    """The schedules of all sites for calls of so many tokens, as the rates of a device predict them."""

    sites: tuple[Scheduled, ...]
    tokens: int
    device: str
    dtype: str
    measured: bool  # whether there are rates of that device; without, operations alone are counted

    @property
    def ratio(self) -> float | None:
        """The predicted time of all adapted calls over that of the frozen ones; None where one runs plain: not predicted."""
        return _ratio(self.sites)

    def to_json(self) -> str:
        """All figures as JSON text."""
        head = {"tokens": self.tokens, "device": self.device, "dtype": self.dtype, "measured": self.measured, "ratio": self.ratio}
        return json.dumps({**head, "sites": [asdict(one) for one in self.sites]})

    def table(self, by_site: bool = False) -> Table:
        """A rich table by kind of weight, or with `by_site` a row a weight."""
        heading = f"Calls of {self.tokens:,} tokens in {self.dtype} on {self.device}"
        table = Table(title=heading, title_justify="left", caption_justify="left")
        table.add_column("weight")
        for name in ("sites", "(out, in)", "k", "schedule", "× floor", "kept MB"):
            table.add_column(name, justify="right")
        groups: dict[tuple[str, str], list[Scheduled]] = {}
        for one in self.sites:
            groups.setdefault((one.site if by_site else starred(one.site), one.schedule), []).append(one)
        for (name, schedule), ones in groups.items():
            ranks = sorted({one.rank for one in ones})
            table.add_row(
                name, str(len(ones)), "x".join(map(str, ones[0].shape)), "–".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))),
                schedule, _shown(_ratio(ones)), f"{sum(one.kept for one in ones) / 1e6:,.1f}",
            )  # fmt: skip
        how = "predicted from rates measured there" if self.measured else "operations counted: `sarac tune` measures this device"
        reasons = dict.fromkeys(f"{starred(one.site)}: {one.why}" for one in self.sites if one.why)
        table.caption = "\n".join([f"× floor: of the frozen call, {how}; all together {_shown(self.ratio)}", *reasons])
        return table

    def __str__(self) -> str:
        return as_text(self.table())


def _ratio(sites: Sequence[Scheduled]) -> float | None:
    if any(one.schedule not in one.added for one in sites):
        return None
    return 1.0 + sum(one.added[one.schedule] for one in sites) / sum(one.floor for one in sites)


def _shown(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"


def schedule(
    model: nn.Module, choice: str | Mapping[str, str] | None = None, *, tokens: int = 8192, device: str | None = None,
    compiled: bool = False,
) -> Schedules:  # fmt: skip
    """Set how the calls of an adapted model run while it trains, and show what they run by at so many tokens.

    `choice`: auto, one of two-sided, right, left, materialised, rebuilt, or plain (autograd on the formula); or such by globs
    over weight names, of which the last that matches holds. None changes nothing. Results stay the same up to rounding. `device`:
    the name that rates are kept under, where it is not the model's. `compiled`: show what compiled code runs by.
    """
    slots = [(module, slot) for _, module, state in adapted(model) for slot in state.slots.values()]
    if not slots:
        raise RewriteError(f"{type(model).__name__} carries no adapters: transform it first (sarac.transform).")
    if choice is not None:
        _set(slots, {"*": choice} if isinstance(choice, str) else choice)
    weights = [(slot, module, module._parameters[slot.param]) for module, slot in slots]
    first = next(weight for _, _, weight in weights if weight is not None)
    name, dtype = device or device_name(first.device), str(first.dtype).removeprefix("torch.")
    sites = {slot.site: _scheduled(slot, module, tokens, name, compiled) for slot, module, _ in weights}
    return Schedules(tuple(sites.values()), tokens, name, dtype, rates_of(name, dtype) is not None)


def of_sites(sites: Mapping[Site, int], tokens: int, device: str) -> Schedules:
    """How calls of so many tokens would run by, were these sites to carry SARA's singular values at these ranks, no biases."""
    found, dtypes = [], set()
    for site, rank in sites.items():
        dtype = str(site.dtype).removeprefix("torch.")
        dtypes.add(dtype)
        call = Call(tokens, *site.shape, rank, site.dtype.itemsize)
        found.append(scheduled(site.name, call, dtype, device, why=no_matrix(site.parts, site.layout)))
    name = dtypes.pop() if len(dtypes) == 1 else "several dtypes"
    return Schedules(tuple(found), tokens, device, name, rates_of(device, name) is not None)


def _set(slots: list[tuple[nn.Module, Slot]], choices: Mapping[str, str]) -> None:
    known = sorted({slot.site for _, slot in slots})
    for glob, name in choices.items():
        if name not in CHOICES:
            raise PlanError(f"The schedule {name!r} for {glob!r} is unknown. {near(name, CHOICES)}")
        if not fnmatch.filter(known, glob):
            raise PlanError(f"The glob {glob!r} matches no adapted weight. {near(glob, known)}")
    for module, slot in slots:
        found = [(glob, name) for glob, name in choices.items() if fnmatch.fnmatchcase(slot.site, glob)]
        if not found:
            continue
        (glob, name), why = found[-1], fixed(slot, module)
        if why and name not in (AUTO, PLAIN, TWO_SIDED) and glob == slot.site:
            raise PlanError(f"{slot.site} cannot run {name}: {why}. Leave it auto.")
        setattr(module, slot.schedule, AUTO if why and name != PLAIN else name)
        settle(module)


def _scheduled(slot: Slot, module: nn.Module, tokens: int, device: str, compiled: bool) -> Scheduled:
    adapter, weight = slot.adapter, module._parameters[slot.param]
    assert weight is not None
    _, out, inner = slot.layout.sizes(tuple(weight.shape))
    why, asked = fixed(slot, module), asked_of(getattr(module, slot.schedule))
    tensors, routed, biased = slot.tensors(module), not adapter.foldable, module._parameters.get("bias") is not None
    factors, sets = bool({"u", "v"} & set(adapter.trainable)), len(tensors["shift"]) if routed else 0
    biased = biased or (routed and not even(tensors["scale"]))  # either way not on the left
    call = Call(tokens, out, inner, adapter.rank, weight.element_size(), routed, biased, factors, sets, compiled)
    return scheduled(slot.site, call, str(weight.dtype).removeprefix("torch."), device, asked, why)


def scheduled(site: str, call: Call, dtype: str, device: str, asked: str = AUTO, why: str = "") -> Scheduled:
    """What a call runs by on a device, and what it costs there."""
    rates = rates_or_counts(device, dtype)
    choices = (TWO_SIDED,) if why else call.choices
    chosen = schedule_at(call.tokens, call.steps(rates)) if asked == AUTO else asked
    chosen = chosen if chosen in (*choices, PLAIN) else TWO_SIDED
    added = {name: 1e3 * call.seconds(name, rates) for name in choices}
    kept = call.kept(TWO_SIDED if chosen == PLAIN else chosen)
    return Scheduled(site, (call.out, call.inner), call.rank, asked, chosen, why, 1e3 * call.floor(rates), added, kept)
