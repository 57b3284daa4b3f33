"""Precision: which modules must compute in float32 for the others to compute in float16 or bfloat16, found by trying.

The model is run in the coarse dtype with every module's output put right after the call, by what the fine model gave there:
what is wrong with an output then is that module's own doing, and one run tells for all of them.
"""

import contextlib
import fnmatch
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sarac.backends.mixed import typed
from sarac.ir import check
from sarac.ir.errors import ExportError, InputError, SaracError, near
from sarac.ir.graph import ModelGraph, within
from sarac.ir.inputs import Inputs
from sarac.ir.layers import evaluating

_ROOM = 0.5  # of the gate: what is found must pass with another order of summation too
_MOST = 0.5  # of the weights: where more must stay in float32, another dtype is what is wanted
_COARSE = (torch.float16, torch.bfloat16)


def kept_float32(
    model: nn.Module,
    emitted: Callable[[], ModelGraph],
    dtype: torch.dtype | None,
    globs: Sequence[str],
    inputs: Sequence[Inputs],
) -> tuple[str, ...]:
    """The modules that stay in float32 where what is emitted of `model` goes to `dtype`: those of `globs`, and what has to.

    Every module is named whose output overflows or is beyond the gate of `dtype` for want of precision, the innermost that
    has inputs and outputs which the dtype holds. ExportError where that is most of the model, or does not help.
    """
    chosen = _named(model, globs)
    if dtype not in _COARSE:
        if chosen:
            raise ExportError(f"keep_float32={list(globs)!r} has no meaning without dtype fp16 or bf16: leave it out.")
        return ()
    assert dtype is not None
    if check.coarsest(model) == dtype:  # the model itself computes so, and is what the file is held against
        return chosen
    with torch.no_grad(), evaluating(model):
        trial = _Trial(model, emitted(), dtype, inputs)
        return chosen if trial.passes(chosen, check.gate(dtype)) else _found(trial, chosen)


def _found(trial: "_Trial", chosen: tuple[str, ...]) -> tuple[str, ...]:
    why, blame = trial.said, _Blame(trial, chosen)
    for inputs in trial.inputs:
        blame.run(inputs)
    kept = _outermost(trial.model, (*chosen, *blame.overflown))
    wanted = _ROOM * check.gate(trial.dtype)
    if not trial.passes(kept, wanted):
        worst = sorted(blame.errors, key=lambda name: -blame.errors[name])
        worst = [name for name in worst if name and not within(name, kept) and _share(trial.model, (name,)) <= _MOST]
        some = kept
        more = _fewest(worst, lambda more: trial.passes(_outermost(trial.model, (*some, *more)), wanted))
        kept = _outermost(trial.model, (*some, *more))
    share = _share(trial.model, kept) - _share(trial.model, chosen)
    passes = trial.passes(kept, check.gate(trial.dtype))
    if share > _MOST or not passes:
        raise ExportError(f"{why} {_remedy(trial, kept, share, passes)}")
    return kept


def _remedy(trial: "_Trial", kept: tuple[str, ...], share: float, passes: bool) -> str:
    other = "bf16 or fp32" if trial.dtype == torch.float16 else "fp32"
    if "" in kept:
        return f"What it gives, or computes between its modules, is where: export it in {other}."
    if not passes:
        return f"No modules that stay in float32 mend that: export it in {other}."
    shown = ", ".join(kept[:3]) + ("" if len(kept) < 4 else ", …")
    return (
        f"{shown} would have to stay in float32, {share:.0%} of its weights: export it in {other}, or name them in keep_float32 "
        "(--keep-float32)."
    )


def _fewest(worst: Sequence[str], passes: Callable[[Sequence[str]], bool]) -> Sequence[str]:
    """The first of `worst` with which it passes: as few as a doubling and a bisection find; all where none do."""
    low, high = 0, 1
    while high < len(worst) and not passes(worst[:high]):
        low, high = high, 2 * high
    high = min(high, len(worst))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(worst[:middle]) else (middle, high)
    return worst[:high]


class _Trial:
    """What is emitted of a model in a coarse dtype, held against the model."""

    def __init__(self, model: nn.Module, emitted: ModelGraph, dtype: torch.dtype, inputs: Sequence[Inputs]) -> None:
        self.model, self.emitted, self.dtype, self.inputs, self.said = model, emitted, dtype, inputs, ""
        self._expected = [one.call(model) for one in inputs]

    def passes(self, kept: tuple[str, ...], limit: float) -> bool:
        """Whether it gives what the model gives, with these modules in float32; `said` then says how not."""
        name, word = type(self.model).__name__, str(self.dtype).removeprefix("torch.")
        try:
            with self.coarse(kept):
                given = [_coarse(one, self.dtype).call(self.emitted.module) for one in self.inputs]
        except InputError as error:  # it takes them as they are: a module asks for a dtype by name
            why = str(error.__cause__ or error).splitlines()[0]
            raise ExportError(
                f"{name} does not run in {word}: {why} Something in it asks for float32 by name (.float(), a tensor's dtype): "
                "let that take the dtype of what it meets, or export in fp32."
            ) from error
        except SaracError as error:
            self.said = f"{str(error).partition(':')[0]}."  # what is wrong; what to do is said here
            return False
        rows = [check.difference(ours, theirs) for ours, theirs in zip(given, self._expected, strict=True)]
        worst = max(rows, key=lambda row: (not row.finite, row.error))
        far = f"differs by {worst.error:.3g} of its outputs' spread, and {limit:.0e} is allowed"
        self.said = f"In {word} {name} {far if worst.finite else 'overflows'}."
        return worst.finite and worst.error <= limit

    @contextlib.contextmanager
    def coarse(self, kept: tuple[str, ...]) -> Iterator[None]:
        """The emitted module in the coarse dtype, with these modules in float32."""
        module = self.emitted.module
        with evaluating(module), typed(module, self.dtype, kept=kept, waiting=self.emitted.waiting):
            yield

    def too_large(self, kept: tuple[str, ...]) -> Iterator[str]:
        """The modules with weights that the dtype does not hold."""
        for name, parameter in self.emitted.module.named_parameters():
            if parameter.is_floating_point() and not within(name, kept):
                make = self.emitted.waiting.get(id(parameter))
                if float((make() if make else parameter).abs().max()) > torch.finfo(self.dtype).max:
                    yield name.rpartition(".")[0]


@dataclass
class _Call:
    """What one call of a module gave in the fine dtype, and which of its inputs were finite."""

    outputs: list[Any]
    finite: list[bool]


@dataclass
class _Blame:
    """Which modules overflow in a coarse dtype, and the error that each adds on its own."""

    trial: _Trial
    kept: tuple[str, ...]
    overflown: set[str] = field(default_factory=set)
    errors: dict[str, float] = field(default_factory=dict)

    def run(self, inputs: Inputs) -> None:
        """Look at the modules on these inputs."""
        calls: dict[str, list[_Call]] = {}
        open_calls: list[str] = []

        def record(name: str, given: Any, outputs: Any) -> None:
            calls.setdefault(name, []).append(_Call(pytree.tree_leaves(outputs), [_finite(v) for v in pytree.tree_leaves(given)]))

        model, emitted = self.trial.model, self.trial.emitted.module
        with _hooked(model, open_calls.append, record):
            inputs.call(model)
        del open_calls[:]
        self.overflown |= {_called(name, calls) for name in self.trial.too_large(self.kept)}

        def put_right(name: str, given: Any, outputs: Any) -> Any:
            open_calls.pop()
            if any(one != name and within(name, (one,)) for one in self.kept) or not calls.get(name):
                return None
            return self._judged(name, open_calls[-1] if open_calls else "", calls[name].pop(0), given, outputs)

        wide = [*self.kept, *self.overflown]
        with self.trial.coarse(_outermost(emitted, wide)), _hooked(emitted, open_calls.append, put_right):
            _coarse(inputs, self.trial.dtype).call(emitted)

    def _judged(self, name: str, caller: str, call: _Call, given: Any, outputs: Any) -> Any:
        """The outputs of a call put right, and whoever did them wrong written down."""
        found, spec = pytree.tree_flatten(outputs)
        for one, fine in zip(pytree.tree_leaves(given), call.finite, strict=False):
            if fine and not _finite(one):
                self.overflown.add(caller)
        for i, (one, right) in enumerate(zip(found, call.outputs, strict=False)):
            if isinstance(one, Tensor) and one.is_floating_point() and isinstance(right, Tensor) and one.shape == right.shape:
                seen, found[i] = check.difference(one, right), right.to(one.dtype)
                if not seen.finite:
                    self.overflown.add(name if check.difference(found[i], right).finite else caller)
                else:
                    self.errors[name] = max(self.errors.get(name, 0.0), seen.error)
        return pytree.tree_unflatten(found, spec)


@contextlib.contextmanager
def _hooked(model: nn.Module, before: Callable[[str], None], after: Callable[[str, Any, Any], Any]) -> Iterator[None]:
    """The model with hooks that know the module's name."""
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            into = module.register_forward_pre_hook(lambda *_, name=name: before(name))
            out = module.register_forward_hook(
                lambda _, args, kwargs, outputs, name=name: after(name, (args, kwargs), outputs),
                with_kwargs=True,
            )
            stack.callback(into.remove)
            stack.callback(out.remove)
        yield


def _called(name: str, calls: Mapping[str, Any]) -> str:
    """The module of this name, or the one around it that is called: weights are also read from outside."""
    while name and name not in calls:
        name = name.rpartition(".")[0]
    return name


def _named(model: nn.Module, globs: Sequence[str]) -> tuple[str, ...]:
    """The modules whose name, or that of a weight of theirs, one of the globs matches."""
    globs = [globs] if isinstance(globs, str) else globs
    owners = {name: name for name, _ in model.named_modules() if name}
    owners |= {name: name.rpartition(".")[0] for name, _ in model.named_parameters()}
    for glob in globs:
        if not fnmatch.filter(owners, glob):
            raise ExportError(f"keep_float32={glob!r} matches no module and no weight. {near(glob, owners)}")
    return _outermost(model, [owner for name, owner in owners.items() if any(fnmatch.fnmatchcase(name, glob) for glob in globs)])


def _outermost(model: nn.Module, names: Collection[str]) -> tuple[str, ...]:
    """The modules of these names in the model's order, without those that lie in another of them."""
    return tuple(n for n, _ in model.named_modules() if n in names and not any(one != n and within(n, (one,)) for one in names))


def _share(model: nn.Module, kept: Sequence[str]) -> float:
    """The share of the model's weights that lie in these modules."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return sum(size for name, size in sizes.items() if within(name, kept)) / max(sum(sizes.values()), 1)


def _coarse(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return inputs.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def _finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or not value.is_floating_point() or bool(value.isfinite().all())
