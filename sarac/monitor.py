"""Watching a training run: the figures of sarac.diagnose every so many steps, in transformers' Trainer or in any loop."""

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sarac import charts
from sarac.diagnosis import Diagnosis
from sarac.findings import PATIENCE, Finding, Setting, findings
from sarac.ir.errors import CheckpointError, InputError, SaracWarning
from sarac.ir.gates import Watch, watching
from sarac.ir.health import misfits, norms
from sarac.ir.inputs import Inputs
from sarac.ir.layers import evaluating
from sarac.ir.processes import first
from sarac.ir.record import peak_rate
from sarac.survey import (
    base_bytes,
    keeping,
    losses,
    measured,
    most_tokens,
    require_adapters,
    require_room,
    room,
    trained,
    unwrapped,
)
from sarac.unclipped import Unclipped

if TYPE_CHECKING:
    from transformers import TrainerCallback
else:  # two seconds of imports that `import sarac` is not to wait for: the Trainer asks for the events, not for the class
    TrainerCallback = object

_UNSEEN = (
    "The gradients were clipped to {:g}, and what their norm was before is not known here, so that exploding ones go unseen: let "
    "the Trainer log as often as the Monitor records (logging_steps={})."
)
Group = Mapping[str, Any]  # of an optimiser's parameters, with their rate


class Rates:
    """The highest rate so far of each of an optimiser's groups, and since when: one that still rises is a warm-up's."""

    def __init__(self) -> None:
        self._first: int | None = None
        self._highest: dict[int, tuple[float, int]] = {}  # by a group's first parameter: its rate, and the step

    def follow(self, groups: Sequence[Group], step: int) -> None:
        """Take a step's rates; of a run that was seen late that of its schedule too, from which they may have fallen."""
        self._first = step if self._first is None else self._first
        for group in groups:
            key = id(next(iter(group["params"]), None))
            rate = peak_rate(group) if self._first > 1 else float(group["lr"])
            if key not in self._highest or rate > self._highest[key][0]:
                self._highest[key] = rate, step

    def highest(self, groups: Sequence[Group], step: int) -> dict[int, float]:
        """By parameter the highest rate of its group, where it has stood for long enough to be judged."""
        found = [(group, *self._highest.get(id(next(iter(group["params"]), None)), (0.0, step))) for group in groups]
        return {id(one): rate for group, rate, since in found if step - since >= PATIENCE for one in group["params"]}


class Monitor(TrainerCallback):
    """Records how adapters do while they train: `Trainer(…, callbacks=[sarac.Monitor()])`, or `step` in a loop of one's own.

    `every`: so many optimiser steps. `batch`: inputs on which routers are looked at, in eval mode; default: those of the step
    itself, whose routed calls then run as their formula stands, and none of a compiled model. `file`: JSON lines are appended, a
    line a record. `memory`: as of diagnose. A finding is warned of when it first comes up (SaracWarning).
    """

    def __init__(
        self, every: int = 50, batch: Any = None, file: str | Path | None = None, *, memory: float | None = None
    ) -> None:
        _require_steps(every)
        require_room(memory)
        self.every, self.batch, self.memory = int(every), None if batch is None else Inputs.of(batch), memory
        self.file = None if file is None else Path(file)
        self.history: list[Diagnosis] = []
        self.findings: dict[str, Finding] = {}  # by name, as they first came up
        self._open = ExitStack()
        self._watch: Watch | None = None
        self._means: Mapping[str, Tensor] = {}
        self._norms: dict[str, float] = {}
        self._misfits: dict[str, float | None] = {}
        self._kept: tuple[Any, tuple[dict[str, int], dict[str, str]]] = (None, ({}, {}))
        self._clipped: float | None = None
        self._rate: float | None = None  # the optimiser's, as it was last seen
        self._clip = 0.0  # to what the Trainer clips, 0 where it does not
        self._unclipped = Unclipped()
        self._rates = Rates()
        self._trained: Mapping[str, Mapping[str, Any]] = {}  # by site, what the optimiser said last

    def step(
        self, model: nn.Module, step: int, *, optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None
    ) -> Diagnosis | None:
        """Call this at every step after backward, before clipping, with how many steps were taken; what was recorded.

        `optimizer`: the one that trains the adapters, or all such: what none of them has is told, and far too low rates.
        Routers are seen from the second record on, or on `batch`.
        """
        model, groups = unwrapped(model), _groups(optimizer)
        self._rates.follow(groups, step)
        found = self._record(model, step, groups) if step % self.every == 0 else None
        if (step + 1) % self.every == 0:
            self._begin(model)
        return found

    def finish(self, model: nn.Module, step: int | None = None) -> Diagnosis:
        """Record once more, with what merging would lose to rounding, which takes as long as a fold."""
        model, last = unwrapped(model), self.history[-1].step if self.history else None
        return self._record(model, step if step is not None else last or 0, (), ends=True)

    def to_json(self) -> str:
        """All records as JSON text."""
        return json.dumps({"every": self.every, "records": [one.document() for one in self.history]})

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the figures over the steps, a line a kind: to an image file, as a matplotlib Figure."""
        if not self.history:
            raise InputError("Nothing was recorded yet: give the Monitor to a Trainer, or call its step in the loop.")
        points = [(one.step or 0, row) for one in self.history for row in one.rows()]
        return charts.plot(path, f"{self.history[-1].title}: {len(self.history)} records", "steps", points)

    def __str__(self) -> str:
        """The last record as a table."""
        return str(self.history[-1]) if self.history else "Nothing was recorded yet."

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Further events of the Trainer's, of which there may be more tomorrow."""
        if name.startswith("on_"):
            return _ignore
        raise AttributeError(f"A Monitor has no {name!r}.")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the forward of a step that is to be recorded."""
        if state.global_step % self.every == 0 and not getattr(args, "torch_compile", False):
            self._begin(model := unwrapped(kwargs["model"]))
            self._unclipped.begin(model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record, while the gradients are there: as the Trainer has clipped them."""
        groups = _groups(kwargs.get("optimizer"))
        self._rates.follow(groups, state.global_step)
        if state.global_step % self.every == 0:
            norm = self._unclipped.end(getattr(kwargs.get("optimizer"), "scaler", None))
            self._clip, self._clipped = float(args.max_grad_norm or 0.0), self._clipped if norm is None else norm
            self._record(unwrapped(kwargs["model"]), state.global_step, groups)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Keep the gradients' norm before clipping, of which the next record tells that could not take it itself."""
        if logs and "grad_norm" in logs:
            self._clipped = float(logs["grad_norm"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record what training came to."""
        self.finish(kwargs["model"], state.global_step)

    def _begin(self, model: nn.Module) -> None:
        self._open.close()
        if self.batch is None:
            self._watch = self._open.enter_context(watching(model))

    def _record(self, model: nn.Module, step: int, groups: Sequence[Group], *, ends: bool = False) -> Diagnosis:
        require_adapters(model)
        self._open.close()
        watch = (self._watch or Watch(model)) if self.batch is None else _seen(model, self.batch)
        self._watch = None
        self._means = watch.means() or self._means
        if not self._norms:
            self._norms, self._misfits = norms(model), misfits(model)
        sites = measured(model, watch, lambda tensor: tensor.grad, self._norms)
        key = tuple(one.tokens for one in sites)
        if any(key) and self._kept[0] != key:
            self._kept = key, keeping(model, sites)
        kept, schedules = self._kept[1]
        lost = losses(model, self._means) if ends else {}
        self._trained = self._trained if ends else trained(model, groups, self._rates.highest(groups, step))
        sites = tuple(
            replace(
                one,
                kept=kept.get(one.site, 0),
                misfit=self._misfits[one.site],
                lost=lost.get(one.site) if one.finite else None,
                **self._trained.get(one.site, {}),
            )
            for one in sites
        )
        notes = (_UNSEEN.format(self._clip, self.every),) if self._clip and self._clipped is None and not ends else ()
        size = base_bytes(model)
        limit = room(size) if self.memory is None else self.memory
        self._rate = _rate(groups) if groups else self._rate
        setting = Setting(limit, size, step, self._rate, self._clipped, schedules)
        found = Diagnosis(type(model).__name__, sites, findings(sites, setting), most_tokens(sites), step=step, notes=notes)
        self._keep(found)
        return found

    def _keep(self, found: Diagnosis) -> None:
        self.history.append(found)
        if self.file is not None and first():
            try:
                with self.file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(found.document()) + "\n")
            except OSError as error:
                raise CheckpointError(
                    f"{self.file} cannot be written: {error.strerror}. Name a file in a folder that exists."
                ) from error
        for one in found.findings:
            if one.name not in self.findings:
                self.findings[one.name] = one
                if first():
                    warnings.warn(f"At step {found.step}, {one.name}: {one.text}", SaracWarning, stacklevel=4)


def _require_steps(every: Any) -> None:
    """Raise InputError where no step, or a step between two, would be meant."""
    if isinstance(every, bool) or not isinstance(every, Integral) or int(every) < 1:
        raise InputError(f"every={every!r} is no number of steps: give a whole one, 1 or more.")


def _seen(model: nn.Module, inputs: Inputs) -> Watch:
    """What the routers decide on these inputs, in eval mode; no random number is taken."""
    device = next(model.parameters()).device
    cuda = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=cuda), evaluating(model), watching(model) as watch:
        inputs.to(device).call(model)
    return watch


def _groups(optimizer: Any) -> list[Group]:
    """The groups of parameters of an optimiser, of several, or of none."""
    several = optimizer if isinstance(optimizer, Iterable) else [optimizer]
    return [group for one in several for group in getattr(one, "param_groups", ())]


def _rate(groups: Sequence[Group]) -> float | None:
    """The highest rate at which adapters train; None where no optimiser is at hand that has them."""
    return max((peak_rate(group) for group in groups if any(hasattr(p, "_sara_lr") for p in group["params"])), default=None)


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Leave an event alone."""
