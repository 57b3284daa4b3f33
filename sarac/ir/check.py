"""The one place that knows tolerances: how different two outputs are, and how different they may be."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sarac.ir.errors import CheckFailed

# rms of the difference over the standard deviation of what is expected, by the least precise dtype on the way. Measured
# against float64 references, whole models lie at 1e-6 (fp32), 2.5e-3 (fp16), 1.8e-2 (bf16): the gates leave room for
# a different order of summation and for nothing more.
_GATES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# Two roundings of one computation differ by 1.4 times what each is from the truth, and other orders of summation by some more.
# SmolLM2 with random adapters, its last layer's values in float32: 1.6e-5 from float64 unmerged, 1.2e-5 merged, 2.2e-5 apart.
OVER_ROUNDING, MOST_GATES = 3.0, 10.0

# A merged model may be this much further from the unmerged one than its own dtype's rounding explains.
MERGED_OVER_UNMERGED = 1.5


@dataclass(frozen=True)
class Difference:
    """How far `actual` lies from `expected`: rms error over the standard deviation, and the largest absolute one."""

    error: float
    max_error: float
    finite: bool  # whether NaN and Inf, if any, stand in the same places
    where: str
    identical: bool  # whether every value and every dtype is the same


def gate(dtype: torch.dtype) -> float:
    """The largest relative error (rms over standard deviation, no unit) that passes at `dtype`."""
    return _GATES.get(dtype, _GATES[torch.float32])


def coarsest(*values: Any) -> torch.dtype:
    """The least precise floating dtype among tensors, modules and nested outputs; float32 if there is none."""
    dtypes = {leaf.dtype for value in values for leaf in _floats(value)}
    return max(dtypes, key=gate, default=torch.float32)


def leaves(outputs: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of nested outputs with its path, in a fixed order."""
    for path, value in pytree.tree_flatten_with_path(outputs)[0]:
        if isinstance(value, Tensor):
            yield pytree.keystr(path) or "output", value
        elif is_dataclass(value) and not isinstance(value, type):  # one that torch's pytree does not know
            for name, part in vars(value).items():
                yield from ((f"{pytree.keystr(path)}.{name}{inner.removeprefix('output')}", leaf) for inner, leaf in leaves(part))


def difference(actual: Any, expected: Any) -> Difference:
    """The worst difference over all tensors of two outputs of the same structure."""
    ours, theirs = list(leaves(actual)), list(leaves(expected))
    if [tensor.shape for _, tensor in ours] != [tensor.shape for _, tensor in theirs]:
        raise CheckFailed(
            f"The outputs have another form: {[tuple(t.shape) for _, t in ours]} instead of "
            f"{[tuple(t.shape) for _, t in theirs]}."
        )
    if not ours:
        raise CheckFailed(f"There is no tensor in the outputs ({type(actual).__name__}): a comparison of nothing proves nothing.")
    rows = [_tensor_difference(one.detach(), two.detach(), path) for (path, one), (_, two) in zip(ours, theirs, strict=True)]
    return max(rows, key=lambda row: (not row.finite, row.error, not row.identical))


def require_close(
    actual: Any, expected: Any, dtype: torch.dtype, what: str, rounding: Callable[[], float] | None = None
) -> Difference:
    """Raise CheckFailed unless the outputs agree within the gate of `dtype`; `what` names the two for the message.

    Beyond the gate, `rounding` tells how far what is expected lies from a wider computation of the same: a model that magnifies
    its own rounding is held to a small multiple of that.
    """
    found = difference(actual, expected)
    limit = gate(dtype)
    if found.finite and found.error > limit and rounding is not None:
        limit = max(limit, min(OVER_ROUNDING * rounding(), MOST_GATES * limit))
    if not found.finite or not found.error <= limit:
        raise CheckFailed(
            f"{what} differ at {found.where}: relative error {found.error:.3g} (rms over standard deviation), largest "
            f"absolute {found.max_error:.3g}{'' if found.finite else ', with NaN or Inf'}; "
            f"{str(dtype).removeprefix('torch.')} allows {limit:.0e}."
        )
    return found


def require_identical(actual: Any, expected: Any, what: str) -> None:
    """Raise CheckFailed unless the outputs agree in every bit (NaN in the same places counts as equal)."""
    found = difference(actual, expected)
    if not found.identical:
        raise CheckFailed(f"{what} must be bit-exact and differ at {found.where}: largest absolute error {found.max_error:.3g}.")


def require_different(actual: Any, expected: Any, what: str, remedy: str) -> Difference:
    """Raise CheckFailed if the outputs are the same: a no-op must never pass for a success."""
    found = difference(actual, expected)
    if found.identical:
        raise CheckFailed(f"{what} are identical to the last bit. {remedy}")
    return found


def require_nearer(actual: Any, expected: Any, other: Any, what: str, theirs: str, others: str, remedy: str) -> None:
    """Raise CheckFailed unless `actual` is nearer to `expected` than to `other`: also where rounding makes all three differ."""
    right, wrong = difference(actual, expected).error, difference(actual, other).error
    if wrong <= right:
        raise CheckFailed(f"{what} are as near to {others} (relative error {wrong:.3g}) as to {theirs} ({right:.3g}). {remedy}")


def require_finite(outputs: Any, what: str) -> None:
    """Raise CheckFailed at the first NaN or Inf."""
    for path, tensor in leaves(outputs):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckFailed(f"{what} has NaN or Inf at {path}: check the weights and the dtype it runs in.")


def narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in another dtype; CheckFailed where that does not hold its values."""
    found = tensor.detach().to(dtype)
    if not bool(found.isfinite().all()) and bool(tensor.isfinite().all()):
        raise CheckFailed(
            f"{name} has values up to {float(tensor.detach().abs().max()):.3g}, and {str(dtype).removeprefix('torch.')} ends at "
            f"{torch.finfo(dtype).max:.3g}: keep it in float32 (keep_float32, --keep-float32), or take bf16 or fp32 for all."
        )
    return torch.nn.Parameter(found, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else found


def relative_norm(part: Tensor, whole: Tensor) -> float:
    """‖part‖ / ‖whole‖ in the Frobenius norm; 0 where both vanish, infinite where only `whole` does."""
    top, bottom = float(part.double().norm()), float(whole.double().norm())
    return 0.0 if top == 0.0 else top / bottom if bottom > 0.0 else math.inf


def _tensor_difference(one: Tensor, two: Tensor, path: str) -> Difference:
    a, b = one.double().cpu(), two.double().cpu()
    odd = ~(torch.isfinite(a) & torch.isfinite(b))
    same_odd = bool(((a == b) | (torch.isnan(a) & torch.isnan(b)))[odd].all())  # masks of -inf are legitimate outputs
    gap, reference = (a - b)[~odd], b[~odd]
    if gap.numel() == 0:
        return Difference(0.0 if same_odd else math.inf, 0.0, same_odd, path, same_odd and one.dtype == two.dtype)
    spread = float(reference.std(correction=0))
    scale = spread or float(reference.abs().max()) or 1.0
    rms = float(gap.square().mean().sqrt())
    identical = same_odd and one.dtype == two.dtype and torch.equal(a[~odd], b[~odd])
    return Difference(rms / scale if same_odd else math.inf, float(gap.abs().max()), same_odd, path, identical)


def _floats(value: Any) -> Iterator[Tensor]:
    tensors = value.parameters() if isinstance(value, torch.nn.Module) else (leaf for _, leaf in leaves(value))
    return (tensor for tensor in tensors if tensor.is_floating_point())


def require_merge_keeps(merged: Any, unmerged: Any, reference: Any, dtype: torch.dtype) -> None:
    """Raise CheckFailed if the merged model is much further from a wider `reference` than the unmerged one is.

    Below a tenth of the gate both are rounding noise, whose ratio says nothing; in float32, below half of it: thirty layers
    magnify one rounding of each weight (SmolLM2: 3.6e-6 merged, 2.2e-6 not), and there is no wider dtype to merge at.
    """
    ours, theirs = difference(merged, reference).error, difference(unmerged, reference).error
    noise = gate(dtype) / (2 if dtype in (torch.float32, torch.float64) else 10)
    if ours > max(MERGED_OVER_UNMERGED * theirs, noise):
        raise CheckFailed(
            f"The merged model's error is {ours:.3g} and the unmerged one's {theirs:.3g}, against a wider reference: more than "
            f"{MERGED_OVER_UNMERGED} times as much. Rounding has lost too much of the adapters: merge at a wider dtype."
        )
