"""One adapted linear call: the schedule that serves it, or plain autograd on the formula where none does.

Gradients by hand are for plain tensors of one dtype whose base is frozen. Everything else (no gradient asked for, an export, a
function transform, tensor subclasses, float16, where V x is taken in float32) computes the formula term by term.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.weak import WeakIdKeyDictionary

from sarac.ir.cost import Call, device_name, rates_or_counts, schedule_at
from sarac.ir.routes import ROUTED
from sarac.ir.schedules import SCHEDULES, lying
from sarac.ir.terms import add, base, gates_of, leaf, mix, observed, project, running_dtype, scaled, score, without_autocast

AUTO, PLAIN, TWO_SIDED = "auto", "plain", "two-sided"
PINNED = "auto, two-sided"  # what auto comes to where the factors are no singular vectors
CHOICES = (AUTO, *SCHEDULES, PLAIN)


@leaf
def shifted(
    x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor, v: Tensor, scale: Tensor, shift: Tensor, schedule: str = AUTO,
    op: str = "linear",
) -> Tensor:  # fmt: skip
    """W x + b + U ((δ ⊙ s) ⊙ V x), shape (…, out), from x (…, in), W as `base` takes it, U (out, k), V (k, in), s and δ (k,)."""
    trains = shift.requires_grad or u.requires_grad or v.requires_grad
    if schedule == PLAIN or not trains or not by_hand(x, weight, bias, u, v, scale, shift):
        plain: Tensor = add(base(op, x, weight, bias), scaled(project(x, v), shift * scale), u)
        return plain
    trained = u.requires_grad or v.requires_grad
    name = TWO_SIDED if trained else _chosen(schedule, x, op, weight, u, v, scale, routes=False)
    return _called(SCHEDULES[name], op, (x, weight, bias, u, v), scale, shift)


@leaf
def routed(
    x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor, v: Tensor, scale: Tensor, shift: Tensor, router: Tensor,
    inward: Tensor | None, kind: str, schedule: str = AUTO, op: str = "linear",
) -> Tensor:  # fmt: skip
    """W x + b + U ((g (δ ⊙ s)) ⊙ V x) with gates g of R V x, or of R R_in V x: as `shifted`, with δ (sets, k)."""
    tensors = (u, v, scale, shift, router, *(() if inward is None else (inward,)))
    served = (shift.requires_grad or router.requires_grad) and not (u.requires_grad or v.requires_grad)
    if schedule == PLAIN or not served or observed() or not by_hand(x, weight, bias, *tensors):
        h = project(x, v)
        scores = score(h if inward is None else score(h, inward), router)
        plain: Tensor = add(base(op, x, weight, bias), mix(h, gates_of(scores, kind), shift, scale), u)
        return plain
    name = _chosen(schedule, x, op, weight, u, v, scale, routes=True)
    return _called(ROUTED[name], op, (x, weight, bias, u, v), scale, shift, router, inward, kind)


def _chosen(
    schedule: str, x: Tensor, op: str, weight: Tensor, u: Tensor, v: Tensor, scale: Tensor, *, routes: bool
) -> str:  # fmt: skip
    if schedule == PINNED and torch.compiler.is_compiling():
        return TWO_SIDED
    if schedule in (AUTO, PINNED):
        tokens, key = x.numel() // x.shape[-1], (str(running_dtype(x)), str(x.device), routes)
        schedule = schedule_at(tokens, steps(u.shape[0], v.shape[1], v.shape[0], *key))
    if schedule == TWO_SIDED or (routes and schedule not in ROUTED):
        return TWO_SIDED
    return schedule if torch.compiler.is_compiling() or still_singular(op, weight, u, v, scale) else TWO_SIDED


def _called(function: Any, op: str, cast: tuple[Any, ...], *rest: Any) -> Tensor:
    """The function's y, of tensors in the dtype that their product runs in."""
    dtype = running_dtype(cast[0])
    with without_autocast(cast[0]):
        made = function.apply(op, *(one if one is None else one.to(dtype) for one in cast), *rest)
    found: Tensor = made[0]
    return found


def by_hand(x: Tensor, weight: Tensor, bias: Tensor | None, *tensors: Tensor) -> bool:
    """Whether gradients written by hand serve this call; `tensors` starts with U and V."""
    every = (x, weight, *tensors) if bias is None else (x, weight, bias, *tensors)
    if not torch.is_grad_enabled() or weight.requires_grad or any(type(one) not in (Tensor, nn.Parameter) for one in every):
        return False
    if _transformed() or x.device.type == "meta" or x.ndim < 2 or x.is_nested or x.layout != torch.strided or x.numel() == 0:
        return False
    dtype, cast = running_dtype(x), torch.is_autocast_enabled(x.device.type)
    if dtype not in (torch.float32, torch.bfloat16, torch.float64) or (cast and x.dtype == torch.float64):
        return False
    narrow = every[: len(every) - len(tensors) + 2]  # x, W, b, U and V
    return cast or all(one.dtype == dtype for one in narrow)


def _transformed() -> bool:
    """Whether something looks at every operation: an export, a trace, a function transform."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    stack: Any = torch._C._functorch.peek_interpreter_stack()
    return stack is not None or torch._C._get_tracing_state() is not None or forward_ad._current_level >= 0


def still_singular(op: str, weight: Tensor, u: Tensor, v: Tensor, scale: Tensor) -> bool:
    """Whether these still are singular vectors of the weight; looked at again only where one of them was written to."""
    owner = weight if weight._base is None else weight._base
    key = (weight.storage_offset(), weight.shape, *(0 if one.is_inference() else one._version for one in (weight, u, v, scale)))
    verdicts = _verdicts.setdefault(owner, {})
    if key not in verdicts:
        if len(verdicts) > _MOST:
            verdicts.clear()
        verdicts[key] = singular(lying(op, weight), u, v, scale)
    found: bool = verdicts[key]
    return found


def forget(weight: Tensor) -> None:
    """Look again at a weight that was exchanged: a write by `.data` leaves no trace."""
    _verdicts.pop(weight, None)


@torch.no_grad()
def singular(weight: Tensor, u: Tensor, v: Tensor, scale: Tensor) -> bool:
    """Whether U s = W Vᵀ and s V = Uᵀ W with orthonormal U and V, up to rounding: what all schedules but two-sided rest on.

    Not where s was floored, where the base was changed, or where factors came from elsewhere.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    limit = torch.finfo(weight.dtype).eps * (64 if weight.dtype == dtype else 1)
    z = torch.randn(len(v), generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu").to(v.device, dtype)
    u, v, scale, weight = u.to(dtype), v.to(dtype), scale.to(dtype), weight.to(dtype)
    right, left, scaled_z = v.mT @ z, u @ z, scale * z
    pairs = ((weight @ right, u @ scaled_z), (weight.mT @ left, v.mT @ scaled_z), (v @ right, z), (u.mT @ left, z))
    return bool(torch.stack([(one - other).norm() <= limit * other.norm() for one, other in pairs]).all())


def steps(out: int, inner: int, rank: int, dtype: str, device: str, routed: bool) -> tuple[tuple[int, str], ...]:
    """The schedules by tokens for a weight on a device."""
    key = (out, inner, rank, dtype, device, routed)
    found = _steps.get(key)
    if found is None:
        name, size = dtype.removeprefix("torch."), getattr(torch, dtype.removeprefix("torch.")).itemsize
        found = _steps[key] = Call(1, out, inner, rank, size, routed).steps(rates_or_counts(device_name(device), name))
    return found


# What torch.compiler.assume_constant_result does, without the import of the compiler (a second): dynamo calls it while it traces.
steps._dynamo_marked_constant = True  # type: ignore[attr-defined]
_steps: dict[tuple[Any, ...], tuple[tuple[int, str], ...]] = {}
_verdicts: Any = WeakIdKeyDictionary()  # by the tensor that holds the weight
_MOST = 64  # verdicts on one such tensor
