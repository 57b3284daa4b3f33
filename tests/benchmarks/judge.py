"""One model through transform -> random adapters -> forward -> fold -> forward, and what must hold on the way."""

import copy
import math
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zoo import shake

import sarac
from sarac.ir import check
from sarac.ir.inputs import Inputs
from sarac.ir.layers import adapted

RIGHT, REFUSED, WRONG, CRASHED, UNUSABLE = "right", "refused", "WRONG", "crashed", "cannot be built or run"
ONNX_ERROR = 1e-3  # the export checks itself: this is only what the column calls equal
WATCHED = 6  # sites whose effect is looked at


@dataclass
class Row:
    """What became of one case."""

    family: str
    name: str
    outcome: str = UNUSABLE
    reason: str = ""
    model: str = ""
    parameters: int = 0
    sites: int = 0
    seconds: float = 0.0
    onnx: str = ""
    left: int = 0  # parameters of two or more dimensions that are no site, not even by request
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Wrong(Exception):
    """Numbers that differ where they must not, or do not where they must."""


def judge(row: Row, model: nn.Module, example: Any, options: Mapping[str, Any] | None = None, onnx: bool = False) -> Row:
    """Fill `row` in for this model in its present mode, called with `example`; transformed with `options`."""
    inputs = Inputs.of(example)
    row.model, row.parameters = type(model).__name__, sum(p.numel() for p in model.parameters())
    step = "forward"
    try:
        base = outputs(model, inputs)
        if not check.difference(outputs(model, inputs), base).identical:
            row.reason = "two calls from one seed give different outputs"
            return row
        if _nan(base):
            row.reason = "the base model gives NaN"
            return row
        step = "transform"
        judged = Judged(row, model, inputs, base, dict(options or {}))
        judged.transform()
        for name, act in judged.steps(onnx):
            step = name
            act()
        row.outcome = RIGHT
    except Wrong as error:
        row.outcome, row.reason = WRONG, f"{step}: {error}"
    except sarac.SaracError as error:
        row.outcome = REFUSED if step == "transform" else UNUSABLE if step == "forward" else CRASHED
        row.reason = f"{step}: {type(error).__name__}: {error}"
        if "no linear weight" in row.reason:
            row.reason = "; ".join([row.reason.partition(" sarac.analyze")[0], *_skipped(model)])
    except Exception as error:  # noqa: BLE001  a row for everything
        row.outcome = UNUSABLE if step == "forward" else CRASHED
        row.reason = f"{step}: {said(error)}"
    return row


def _skipped(model: nn.Module) -> list[str]:
    return [f"{name}: {why}" for name, why in list(sarac.trace(model).skipped.items())[:2]]


def said(error: BaseException) -> str:
    """The error's first line and the places of the innermost frames."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "sarac" in f.filename or "/passes/" in f.filename]
    places = dict.fromkeys(f"{Path(f.filename).name}:{f.lineno}" for f in [*ours[-2:], *frames[-1:]])
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:240]} ({' < '.join(reversed(list(places)))})"


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The tensors that the model gives from a fixed seed, detached; its buffers are put back."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(7)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # A model may write into its inputs.
        found = model(*copy.deepcopy(inputs.args), **copy.deepcopy(dict(inputs.kwargs)))
        tensors = [tensor.detach().clone() for _, tensor in check.leaves(found)]
        for name, buffer in model.named_buffers():
            if name in before and buffer.shape == before[name].shape:
                buffer.copy_(before[name])
    return tensors


@dataclass
class Judged:
    row: Row
    model: nn.Module
    inputs: Inputs
    base: list[Tensor]
    options: dict[str, Any]

    def steps(self, onnx: bool) -> Iterator[tuple[str, Callable[[], None]]]:
        yield "adapted forward", self.unchanged
        yield "source", self.untouched
        yield "shaken forward", self.moved
        yield "fold", self.folded
        yield "effect", self.effects
        if onnx:
            yield "ONNX", self.exported

    def transform(self) -> None:
        self.before = {name: (p.data_ptr(), p.requires_grad, p.detach().clone()) for name, p in self.model.named_parameters()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.adapted = sarac.transform(self.model, **self.options)
        self.row.sites = sum(len(state.slots) for _, _, state in adapted(self.adapted))
        self.row.left = len(skipped := sarac.trace(self.model).skipped)
        self.row.notes += [f"left out: {name}: {why}" for name, why in list(skipped.items())[:3]]
        if type(self.adapted).__name__ != type(self.model).__name__:
            raise Wrong(f"the class became {type(self.adapted).__name__}")

    def unchanged(self) -> None:
        self._equal(outputs(self.adapted, self.inputs), self.base, "adapted", lambda model: model)

    def untouched(self) -> None:
        for name, parameter in self.model.named_parameters():
            pointer, trains, value = self.before[name]
            if parameter.data_ptr() != pointer or parameter.requires_grad != trains or not torch.equal(parameter, value):
                raise Wrong(f"the source's {name} was changed")
        if not check.difference(outputs(self.model, self.inputs), self.base).identical:
            raise Wrong("the source's outputs have changed")

    def moved(self) -> None:
        torch.manual_seed(11)
        shake(self.adapted)
        self.shaken = outputs(self.adapted, self.inputs)
        if _nan(self.shaken):
            raise Wrong("random adapters make NaN")
        gap = _gap(self.shaken, self.base)
        self.moves = gap > 10 * check.gate(torch.float32)
        if gap == 0.0 and self._matters():
            raise Wrong("random adapters change nothing, other base weights do")
        if not self.moves:
            self.row.notes.append(f"adapters move the outputs by {gap:.1g} only")

    def folded(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = sarac.fold(self.adapted)
        plain = outputs(merged, self.inputs)
        self._equal(plain, self.shaken, "folded", sarac.fold)
        if self.moves and not _gap(plain, self.base) > 10 * check.gate(torch.float32):
            raise Wrong("the folded model gives the base's outputs")
        if list(merged.state_dict()) != list(self.model.state_dict()):
            odd = set(merged.state_dict()) ^ set(self.model.state_dict())
            raise Wrong(f"folding changed the state dict's names: {sorted(odd)[:3]}")
        was = {path: type(module) for path, module in self.model.named_modules()}
        now = {path: type(module) for path, module in merged.named_modules()}
        if was != now:
            raise Wrong(f"folding changed classes: {[path for path in was if now.get(path) is not was[path]][:3]}")

    def _equal(self, found: list[Tensor], expected: list[Tensor], what: str, again: Callable[[nn.Module], nn.Module]) -> None:
        """Within the gate; where float32 is not, the same is measured in float64 before judging."""
        try:
            gap = check.difference(found, expected)
        except sarac.SaracError as error:
            raise Wrong(f"{what}: {error}") from None
        dtype = check.coarsest(found, expected)
        if gap.finite and gap.error <= check.gate(dtype):
            return
        wide = self._in_float64(again)
        if wide is None or not wide.finite or not wide.error <= check.gate(torch.float64):
            at = "it does not run in float64" if wide is None else f"float64: {wide.error:.2g}"
            raise Wrong(f"{what} outputs differ by {gap.error:.2g} at {gap.where} ({at})")
        self.row.notes.append(f"{what}: float32 {gap.error:.2g}, float64 {wide.error:.2g}")

    def _in_float64(self, again: Callable[[nn.Module], nn.Module]) -> check.Difference | None:
        try:
            model = copy.deepcopy(self.model).double()
            inputs = self.inputs.map(lambda value: value.double() if value.is_floating_point() else value)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                wide = sarac.transform(model, **self.options)
                if again is not sarac.fold:
                    return check.difference(outputs(wide, inputs), outputs(model, inputs))
                torch.manual_seed(11)
                shake(wide)
                return check.difference(outputs(again(wide), inputs), outputs(wide, inputs))
        except Exception:  # noqa: BLE001  many models hold float32 constants
            return None

    def effects(self) -> None:
        """Each of some sites alone: its adapter changes the outputs if and only if another base weight does."""
        slots = [
            (slot, module, slot.tensors(module)["shift"])
            for _, module, state in adapted(self.adapted)
            for slot in state.slots.values()
        ]
        kept = [shift.data.clone() for _, _, shift in slots]
        for _, _, shift in slots:
            shift.data.zero_()
        count = len(slots)
        chosen = sorted({round(i * (count - 1) / max(1, min(WATCHED, count) - 1)) for i in range(min(WATCHED, count))})
        still = outputs(self.adapted, self.inputs)
        for index in chosen:
            slot, _, shift = slots[index]
            for scale in (1, -1, 4, -4, 16):  # a router may choose the same experts after a small step
                shift.data.copy_(kept[index] * scale)
                if alone := _changed(outputs(self.adapted, self.inputs), still):
                    break
            shift.data.zero_()
            if not alone and self._matters([slot.site]):
                raise Wrong(f"{slot.site}: its adapter has no effect, its base weight has")
        for (_, _, shift), value in zip(slots, kept, strict=True):
            shift.data.copy_(value)

    def _matters(self, names: list[str] | None = None) -> bool:
        """Whether other values in these base weights (of all sites) change the outputs of the source."""
        names = names or [slot.site for _, _, state in adapted(self.adapted) for slot in state.slots.values()]
        for name in names:
            weight = self.model.get_parameter(name)
            torch.manual_seed(5)
            weight.data += 0.3 * torch.randn_like(weight) * self.before_of(name).std()
        try:
            return _changed(outputs(self.model, self.inputs), self.base)
        finally:
            for name in names:
                self.model.get_parameter(name).data.copy_(self.before_of(name))

    def before_of(self, name: str) -> Tensor:
        """The source's weight as it was, by any of its names."""
        return self.before[name][2]

    def exported(self) -> None:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            example = dict(self.inputs.kwargs) if self.inputs.kwargs else self.inputs.args
            try:
                report = sarac.export(self.adapted, Path(folder) / "model.onnx", example)
            except sarac.CheckFailed as error:
                self.row.onnx = f"refused: {error}"
            except Exception as error:  # noqa: BLE001  what cannot be exported is no fault of the numbers
                self.row.onnx = f"cannot: {said(error)}"
            else:
                self.row.onnx = "equal" if report.error <= ONNX_ERROR else f"WRONG: {report.error:.2g}"


def _nan(tensors: list[Tensor]) -> bool:
    """Whether there is a NaN, or nothing finite; -inf alone is what masks give."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return any(bool(tensor.isnan().any()) for tensor in floats) or (bool(floats) and not any(t.isfinite().any() for t in floats))


def _changed(one: list[Tensor], two: list[Tensor]) -> bool:
    try:
        return not check.difference(one, two).identical
    except sarac.SaracError:  # another form: a data-dependent size
        return True


def _gap(one: list[Tensor], two: list[Tensor]) -> float:
    """The error between two outputs; infinite where they have another form, or NaN in other places."""
    try:
        found = check.difference(one, two)
    except sarac.SaracError:
        return math.inf
    return 0.0 if found.identical else found.error if found.finite else math.inf
