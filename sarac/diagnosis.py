"""How an adapted model is doing on a batch: its sites' figures, what is wrong, what to change, as a value that shows itself."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from sarac import charts
from sarac.findings import Finding, Setting, findings, size_text
from sarac.ir.clone import clone
from sarac.ir.errors import InputError, RewriteError
from sarac.ir.gates import slots, watching
from sarac.ir.health import Health, misfits, norms
from sarac.ir.inputs import Inputs
from sarac.survey import base_bytes, keeping, losses, measured, most_tokens, require_adapters, require_room, room, unwrapped
from sarac.tables import as_text

Row = dict[str, Any]
_UNKNOWN = "–"


@dataclass(frozen=True)
class Diagnosis:
    """The figures of all sites, and what was found."""

    title: str
    sites: tuple[Health, ...]
    findings: tuple[Finding, ...]
    tokens: int  # rows of the widest adapted call
    loss: float | None = None
    step: int | None = None
    notes: tuple[str, ...] = ()  # what could not be looked at

    def rows(self) -> list[Row]:
        """All figures of every site as JSON values, in the model's order; None where there is none, and for NaN and Inf."""
        return [_row(one) for one in self.sites]

    def document(self) -> Row:
        """The diagnosis as JSON values."""
        head = {"title": self.title, "step": self.step, "loss": _plain(self.loss), "tokens": self.tokens}
        said = [{**asdict(one), "value": _plain(one.value)} for one in self.findings]
        return {**head, "totals": self.totals, "findings": said, "notes": list(self.notes), "sites": self.rows()}

    def to_json(self) -> str:
        """All figures and findings as JSON text."""
        return json.dumps(self.document(), indent=1)

    @property
    def totals(self) -> dict[str, int]:
        """Bytes of what trains, of frozen factors, of kept activations and of the adapted weights, over all sites."""
        return {name: sum(getattr(one, name) for one in self.sites) for name in ("adapters", "factors", "kept", "base")}

    def table(self, by_site: bool = False) -> Table:
        """A rich table by kind of weight, or with `by_site` a row a weight: means, of |δ| and lost delta the largest."""
        said = f" at step {self.step}" if self.step is not None else ""
        heading = f"{self.title}{said}: {len(self.sites)} adapted weights" + (f", {self.tokens:,} tokens" if self.tokens else "")
        heading += f", loss {self.loss:.4g}" if self.loss is not None else ""
        table = Table(title=Text(heading), box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        table.title_justify = table.caption_justify = "left"
        table.add_column("weight", overflow="fold")
        columns = [one for one in _COLUMNS if not one[2] or any(site.gates for site in self.sites)]
        for name, _, _ in columns:
            table.add_column(name, justify="right", no_wrap=True)
        groups: dict[tuple[str, tuple[int, ...]], list[Health]] = {}
        for one in self.sites:
            groups.setdefault((one.site if by_site else one.kind, one.shape), []).append(one)
        for (name, _), ones in groups.items():
            table.add_row(Text(name), *(show(ones) for _, show, _ in columns))
        sizes = {name: size_text(size) for name, size in self.totals.items()}
        total = "adapters {adapters}, factors {factors}, kept activations {kept}, on weights of {base}".format(**sizes)
        lines = [*(one.text for one in self.findings or _SOUND), *self.notes]
        table.caption = Text("\n".join([total, *(f"· {text}" for text in lines)]))
        return table

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the figures by layer, a line a kind: to an image file (PNG, SVG, PDF by its ending), as a matplotlib Figure."""
        points = [
            (index if one.layer is None else one.layer, row)
            for index, (one, row) in enumerate(zip(self.sites, self.rows(), strict=True))
        ]
        return charts.plot(path, f"{self.title}: {len(self.sites)} adapted weights", "layer", points)

    def __str__(self) -> str:
        """The table as text, with the findings below."""
        return as_text(self.table())


def diagnose(
    model: nn.Module, batch: Any, *, loss: Callable[[Any], Tensor] | None = None, memory: float | None = None
) -> Diagnosis:
    """Run an adapted model forward and backward on a batch, on a copy, and tell how its adapters are doing.

    `batch`: as the model takes it, a tensor, a tuple, or a dict of keyword arguments, with labels where the model makes its own
    loss; else `loss` gives a scalar from the outputs. `memory`: the bytes that factors and kept activations may take; default:
    as many as the model itself, and a GiB at least. The mode, training or not, is the model's own. Gradients are those of the
    batch, not clipped.
    """
    model = unwrapped(model)
    require_adapters(model)
    require_room(memory)
    inputs = Inputs.of(batch).to(next(model.parameters()).device)
    with _apart(model) as own, watching(own) as watch:
        value, grads = _backward(own, inputs, loss)
        sites = measured(own, watch, lambda tensor: grads.get(id(tensor)), norms(own))
        gates, fits = watch.means(), misfits(own)
    kept, schedules = keeping(model, sites)
    lost = losses(model, gates)
    sites = tuple(
        replace(one, kept=kept[one.site], misfit=fits[one.site], lost=lost.get(one.site) if one.finite else None) for one in sites
    )
    size = base_bytes(model)
    setting = Setting(room(size) if memory is None else memory, size, schedules=schedules)
    return Diagnosis(type(model).__name__, sites, findings(sites, setting), most_tokens(sites), value)


@contextmanager
def _apart(model: nn.Module) -> Iterator[nn.Module]:
    """A copy whose buffers and trained values are its own, or the model itself with its buffers put back; random numbers too."""
    cuda = sorted({one.device.index for one in model.parameters() if one.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda):
        try:
            own = clone(model, frozen=False)
        except RewriteError:
            own = model
        before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()] if own is model else []
        try:
            yield own
        finally:
            with torch.no_grad():
                for buffer, values in before:
                    buffer.copy_(values)


def _backward(
    model: nn.Module, inputs: Inputs, loss: Callable[[Any], Tensor] | None
) -> tuple[float, dict[int, Tensor | None]]:  # fmt: skip
    """The loss, and the gradients of all adapters' tensors by id; no `.grad` is written."""
    held = {id(tensor): tensor for module, slot in slots(model) for tensor in slot.tensors(module).values()}
    wanted = [tensor for tensor in held.values() if tensor.requires_grad]
    with torch.enable_grad():
        value = _scalar(inputs.call(model), loss, model)
        try:
            grads = torch.autograd.grad(value, wanted, allow_unused=True)
        except RuntimeError as error:
            if "heckpoint" not in str(error):
                raise
            raise InputError(
                f"Reentrant gradient checkpointing in this {type(model).__name__} gives no gradients of single parameters: "
                'enable it with use_reentrant=False (gradient_checkpointing_kwargs={"use_reentrant": False}).'
            ) from error
    found: dict[int, Tensor | None] = {id(one): grad for one, grad in zip(wanted, grads, strict=True)}
    return float(value.detach()), found


def _scalar(outputs: Any, loss: Callable[[Any], Tensor] | None, model: nn.Module) -> Tensor:
    value: Any
    if loss is not None:
        value = loss(outputs)
    elif isinstance(outputs, Mapping):
        value = outputs.get("loss")
    else:
        value = getattr(outputs, "loss", outputs)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise InputError(
            f"{type(model).__name__} gives {what} and no scalar loss that depends on what trains: put labels into the batch, or "
            "give loss=, a function of the outputs."
        )
    return value.reshape(())


def _row(one: Health) -> Row:
    values = {name: value for name, value in asdict(one).items() if name != "gates"}
    gates = {name: getattr(one.gates, name, None) for name in ("entropy", "use", "spread")}
    found = {"site": one.site, "kind": one.kind, "layer": one.layer, "share": one.share, **values, **gates}
    return {name: _plain(value) for name, value in found.items()}


def _plain(value: Any) -> Any:
    """The value, a tuple as a list, None for a number that JSON does not know."""
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mean(name: str) -> Callable[[Sequence[Health]], str]:
    return lambda ones: _said([getattr(one, name) for one in ones], lambda found: sum(found) / len(found))


def _most(name: str) -> Callable[[Sequence[Health]], str]:
    return lambda ones: _said([getattr(one, name) for one in ones], max)


def _said(values: Sequence[float | None], together: Callable[[list[float]], float]) -> str:
    found = [value for value in values if value is not None]
    return f"{together(found):.2g}" if found else _UNKNOWN


def _bytes(name: str) -> Callable[[Sequence[Health]], str]:
    return lambda ones: size_text(sum(getattr(one, name) for one in ones))


def _entropy(ones: Sequence[Health]) -> str:
    return _said([one.gates.entropy if one.gates else None for one in ones], lambda found: sum(found) / len(found))


def _use(ones: Sequence[Health]) -> str:
    found = [share for one in ones if one.gates for share in one.gates.use]
    return f"{min(found):.2f}–{max(found):.2f}" if found else _UNKNOWN


# A heading, what it shows of a group of sites, and whether it is of routers alone.
_COLUMNS: tuple[tuple[str, Callable[[Sequence[Health]], str], bool], ...] = (
    ("sites", lambda ones: str(len(ones)), False),
    ("k/n", lambda ones: f"{sum(one.share for one in ones) / len(ones):.2f}", False),
    ("‖Δ‖/‖W‖", _mean("delta"), False),
    ("rms δ", _mean("moved"), False),
    ("max |δ|", _most("largest"), False),
    ("grad", _mean("grad"), False),
    ("lost", _most("lost"), False),
    ("entropy", _entropy, True),
    ("use", _use, True),
    ("trains", _bytes("adapters"), False),
    ("factors", _bytes("factors"), False),
    ("kept", _bytes("kept"), False),
)
_SOUND = (Finding("none", (), 0.0, "Nothing was found that should be changed."),)
