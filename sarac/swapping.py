"""Swappable exports: which models can be, the adapter files for them, and the proof that every swap gives what it should."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sarac import surgery
from sarac.backends import adapter_file, tenants
from sarac.backends.pairing import paired
from sarac.backends.swap import Swap, swap_of
from sarac.checkpoint import adapted_weights, base_hashes, tensors_of, written
from sarac.ir import check
from sarac.ir.errors import CheckFailed, ExportError, InputError, NotFoldable
from sarac.ir.inputs import Inputs
from sarac.ir.layers import adapted, evaluating
from sarac.ir.record import record_of
from sarac.proof import Comparison, rounding_of

Run = Callable[[Inputs, tenants.Chosen], Mapping[str, Tensor]]  # an export's outputs for inputs and an adapter
_SPREAD = 0.03  # of the shifts that are drawn for a check: larger ones make a deep model magnify rounding
_WIDTHS = {"fp32": torch.float32, "fp16": torch.float16}


def swap_for(model: nn.Module, swappable: bool | str) -> Swap:
    """What stays open in an export of `model`; ExportError where its adapters cannot be exchanged by their shifts alone."""
    if swappable not in (False, True, "rowwise"):
        raise ExportError(
            f'swappable={swappable!r} is not known: it is True, one adapter at a time, or "rowwise", one for each row.'
        )
    if not swappable:
        return Swap()
    _require_shifts(model, "a swappable export")
    return swap_of(model, swappable == "rowwise")


def save_onnx_adapter(model: nn.Module, path: str | Path, *, dtype: str = "fp32", rowwise: bool = False) -> None:
    """Write what a model's adapters learnt as an .onnx_adapter file of ONNX Runtime's for swappable exports of its base.

    `dtype`, "fp32" or "fp16": that of the export, for programs that load it without sarac; sarac.Runtime converts. `rowwise`:
    with the leading axis that such a graph's inputs have. The model version in it is of the base: another's is refused.
    """
    if dtype not in _WIDTHS:
        raise ExportError(f"dtype={dtype!r} is not known: give one of {', '.join(_WIDTHS)}.")
    _require_shifts(model, "an adapter file of ONNX Runtime's")
    tensors = {
        name: value.to(_WIDTHS[dtype])[None] if rowwise else value.to(_WIDTHS[dtype]) for name, value in _live(model).items()
    }
    base = base_hashes(adapted_weights(model), ["float32"])["float32"]
    written(path, lambda aside: adapter_file.write_adapter(aside, tensors, base))


def compare_swaps(
    model: nn.Module, adapters: tenants.Adapters, run: Run, unseen: Sequence[Inputs], dtype: torch.dtype | None = None
) -> tuple[Comparison, ...]:
    """The model's own adapter, another and none, swapped in one after the other: each run held against torch, every one
    within its gate, and different from the one before. Row by row also a batch that mixes them. CheckFailed where not.
    """
    own = check.coarsest(model)
    wanted, rows = dtype or own, []
    trained = {name: value.clone() for name, value in _live(model).items()}
    names: dict[str | None, Mapping[str, Tensor]] = {"this": _drawn(trained, 1) if _untrained(trained) else trained}
    names |= {"another": _drawn(trained, 2), None: {name: torch.zeros_like(value) for name, value in trained.items()}}
    for name, values in names.items():
        if name is not None:
            adapters.add(name, values)
    with torch.no_grad(), evaluating(model):
        given = {name: _of_torch(model, values, unseen) for name, values in names.items()}
        for index, inputs in enumerate(unseen):
            outputs = {name: given[name][index] for name in names}
            noise = {name: functools.partial(_rounding, model, names[name], inputs) if wanted == own else None for name in names}
            found = {name: _compared(run, inputs, name, outputs[name], wanted, noise[name]) for name in names}
            for one, two in (("this", "another"), ("another", None), (None, "this")):
                check.require_different(found[one][0], found[two][0], f"The outputs with {_said(one)} and {_said(two)}", _SAME)
            rows += [_row(inputs, name, found[name][1], outputs[name], wanted, noise[name]) for name in names]
            if adapters.rowwise:
                rows.append(_mixed(run, inputs, {name: outputs[name][0] for name in names}, wanted))
    return tuple(rows)


_SAME = "The export has lost its adapters: export it again, and report it."


def _of_torch(model: nn.Module, values: Mapping[str, Tensor], unseen: Sequence[Inputs]) -> list[tuple[Any, Any]]:
    """What torch gives with these shifts: adapted, and folded where that can be."""
    with _with(model, values):
        outputs = [inputs.call(model) for inputs in unseen]
        try:
            folded = surgery.fold(model).eval()
        except NotFoldable:
            return [(output, None) for output in outputs]
        return [(output, inputs.call(folded)) for output, inputs in zip(outputs, unseen, strict=True)]


def _compared(
    run: Run, inputs: Inputs, name: str | None, outputs: tuple[Any, Any], dtype: torch.dtype, noise: Callable[[], float] | None
) -> tuple[dict[str, Tensor], check.Difference]:
    ours, theirs = paired(run(inputs, name), outputs[0])
    check.require_finite(ours, "The ONNX model's output")
    return ours, check.require_close(ours, theirs, dtype, f"The ONNX model and the torch model with {_said(name)}", noise)


def _rounding(model: nn.Module, values: Mapping[str, Tensor], inputs: Inputs) -> float:
    with _with(model, values):
        return rounding_of(model, inputs, inputs.call(model))


def _row(
    inputs: Inputs,
    name: str | None,
    found: check.Difference,
    outputs: tuple[Any, Any],
    dtype: torch.dtype,
    noise: Callable[[], float] | None,
) -> Comparison:
    merged = check.Difference(0.0, 0.0, True, "", True)
    if outputs[1] is not None:
        what = f"The folded and the adapted torch model with {_said(name)}"
        merged = check.require_close(outputs[1], outputs[0], dtype, what, noise)
    what = f"{inputs.describe()}, {_said(name)}"
    return Comparison(what, found.error, found.max_error, merged.error, merged.max_error)


def _mixed(run: Run, inputs: Inputs, outputs: Mapping[str | None, Any], dtype: torch.dtype) -> Comparison:
    """A batch of which every row has an adapter of its own, against the rows of batches that have one alone."""
    count = next(t.shape[0] for t in (*inputs.args, *inputs.kwargs.values()) if isinstance(t, Tensor) and t.dim())
    chosen = [tuple(outputs)[index % len(outputs)] for index in range(count)]
    whole = {name: paired(run(inputs, name), output)[1] for name, output in outputs.items()}
    odd = next((name for name, t in whole[None].items() if not t.dim() or t.shape[0] != count), None)
    if odd is not None:
        raise CheckFailed(
            f"The output {odd} has no row for each of the {count} rows of the inputs: export it with swappable=True."
        )
    wanted = {name: torch.stack([whole[tenant][name][row] for row, tenant in enumerate(chosen)]) for name in whole[None]}
    what = "A batch whose rows have adapters of their own, and these one by one (a model that reshapes its rows?)"
    try:
        ours = run(inputs, chosen)
    except InputError as error:
        raise CheckFailed(f"{what}: {error}") from error
    found = check.require_close(ours, wanted, dtype, what)
    if count > 1:
        check.require_different(ours, whole["this"], "A batch that mixes adapters and one of one adapter", _SAME)
    return Comparison(f"{inputs.describe()}, each row its own", found.error, found.max_error, 0.0, 0.0)


def _require_shifts(model: nn.Module, what: str) -> None:
    record = record_of(model)
    if record is None:
        raise ExportError(f"{type(model).__name__} carries no adapters: {what} needs them. Transform it first (sarac.transform).")
    trained = [site for site, adapter in record.plan.sites.items() if not adapter_file.ROLES.issuperset(adapter.trainable)]
    if trained or record.plan.also_train:
        reason = f"the factors of {trained[0]} train" if trained else f"{record.plan.also_train[0]} trains whole"
        raise ExportError(
            f'{what[0].upper()}{what[1:]} holds shifts and routers alone, and {reason}: use train="singular_values" and no '
            "also_train, or merge."
        )


def _live(model: nn.Module) -> dict[str, Tensor]:
    """What trains in the model's adapters, by the names of a graph's inputs."""
    return {
        f"{site}.sara_{role}": tensor.float() for site, roles in tensors_of(model).items() for role, tensor in roles.items()
        if role in adapter_file.ROLES
    }  # fmt: skip


def _untrained(values: Mapping[str, Tensor]) -> bool:
    return not any(bool(value.any()) for name, value in values.items() if name.endswith("shift"))


def _drawn(values: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator) * (_SPREAD if name.endswith("shift") else 1 / value.shape[-1] ** 0.5)
        for name, value in values.items()
    }


@contextlib.contextmanager
def _with(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with these shifts and routers for a while."""
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for _, module, state in adapted(model):
            for slot in state.slots.values():
                for role, tensor in slot.tensors(module).items():
                    value = values.get(f"{slot.site}.sara_{role}")
                    if value is not None:
                        before.append((tensor, tensor.data))
                        tensor.data = value.to(tensor.device, tensor.dtype)
        yield
    finally:
        for tensor, data in reversed(before):
            tensor.data = data


def _said(name: str | None) -> str:
    return {"this": "its adapter", "another": "another adapter", None: "none"}[name]
