"""One adapted linear call: the schedule that serves it, or plain autograd on the formula where none does.

Gradients by hand are for plain tensors of one dtype whose base is frozen. Everything else (no gradient asked for, an export, a
function transform, tensor subclasses, float16, where V x is taken in float32) computes the formula term by term.
"""

import functools
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sarac.ir import ready
from sarac.ir.byhand import lying
from sarac.ir.cost import LARGEST, schedule_at, steps
from sarac.ir.ready import PLAIN_TYPES, Steps, recalled, remember
from sarac.ir.routes import ROUTED
from sarac.ir.schedules import SCHEDULES
from sarac.ir.siblings import Siblings
from sarac.ir.terms import add, base, gates_of, leaf, mix, observed, project, running_dtype, scaled, score, without_autocast

AUTO, PLAIN, TWO_SIDED = "auto", "plain", "two-sided"
# Behind the choice for a site, what compiled code cannot look for: factors are no singular vectors; values are near each other.
PINNED, LEVEL = ", two-sided", ", even"
CHOICES = (AUTO, *SCHEDULES, PLAIN)
EVEN = 4.0  # the largest over the smallest value, above which a routed call's scores would lose digits on the left


@leaf
def shifted(
    x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor, v: Tensor, scale: Tensor, shift: Tensor, schedule: str = AUTO,
    op: str = "linear", siblings: Siblings | None = None,
) -> Tensor:  # fmt: skip
    """W x + b + U ((δ ⊙ s) ⊙ V x), shape (…, out), from x (…, in), W as `base` takes it, U (out, k), V (k, in), s and δ (k,)."""
    if not torch.compiler.is_compiling() and _as_ever(x):
        name = recalled(x, (shift, weight, bias, u, v, scale), (schedule, op))
        if name is not None:
            found: Tensor = _APPLY[name](op, x, weight, bias, u, v, scale, shift, siblings)[0]
            return found
    trained = u.requires_grad or v.requires_grad
    dtype = running_dtype(x)
    if schedule == PLAIN or not (shift.requires_grad or trained) or not by_hand(dtype, x, weight, bias, u, v, scale, shift):
        plain: Tensor = add(base(op, x, weight, bias), scaled(project(x, v), shift * scale), u)
        return plain
    choices = _TWO_SIDED if trained else _choices(schedule, dtype, x, op, (weight, u, v, scale), False, bias is not None)
    if not torch.compiler.is_compiling() and _as_ever(x):
        remember(x, (shift, weight, bias, u, v, scale), (schedule, op), choices)
    name = schedule_at(x.numel() // x.shape[-1], choices)
    return _called(SCHEDULES[name], dtype, op, (x, weight, bias, u, v), scale, shift, siblings)


@leaf
def routed(
    x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor, v: Tensor, scale: Tensor, shift: Tensor, router: Tensor,
    inward: Tensor | None, kind: str, schedule: str = AUTO, op: str = "linear", siblings: Siblings | None = None,
) -> Tensor:  # fmt: skip
    """W x + b + U ((g (δ ⊙ s)) ⊙ V x) with gates g of R V x, or of R R_in V x: as `shifted`, with δ (sets, k)."""
    if inward is None and not torch.compiler.is_compiling() and not observed() and _as_ever(x):
        name = recalled(x, (router, weight, bias, u, v, scale), (schedule, op, kind))
        if name is not None:
            found: Tensor = _APPLY_ROUTED[name](op, x, weight, bias, u, v, scale, shift, siblings, router, kind)[0]
            return found
    tensors = (u, v, scale, shift, router, *(() if inward is None else (inward,)))
    served = (shift.requires_grad or router.requires_grad) and not (u.requires_grad or v.requires_grad)
    dtype = running_dtype(x)
    if schedule == PLAIN or not served or observed() or not by_hand(dtype, x, weight, bias, *tensors):
        h = project(x, v)
        scores = score(h if inward is None else score(h, inward), router)
        plain: Tensor = add(base(op, x, weight, bias), mix(h, gates_of(scores, kind), shift, scale), u)
        return plain
    choices = _choices(schedule, dtype, x, op, (weight, u, v, scale), True, bias is not None)
    if inward is None and not torch.compiler.is_compiling() and _as_ever(x) and shift.dtype == router.dtype:
        remember(x, (router, weight, bias, u, v, scale), (schedule, op, kind), choices)
    name = schedule_at(x.numel() // x.shape[-1], choices)
    router = router if inward is None else router @ inward  # which few numbers see of all that passes between the products
    return _called(ROUTED[name], dtype, op, (x, weight, bias, u, v), scale, shift, siblings, router, kind)


def _choices(
    schedule: str, dtype: torch.dtype, x: Tensor, op: str, given: tuple[Tensor, ...], routes: bool, biased: bool
) -> Steps:  # fmt: skip
    """The schedules of such calls by tokens, as `schedule_at` takes them; `given`: W, U, V and s."""
    compiling, (_, u, v, _) = torch.compiler.is_compiling(), given
    asked = asked_of(schedule)
    if asked == TWO_SIDED or (compiling and schedule == asked + PINNED):
        return _TWO_SIDED
    verdict = Verdict(singular=True, even=schedule == asked + LEVEL) if compiling else looked_at(op, *given)
    if not verdict.singular:
        return _TWO_SIDED
    right_only = biased or (routes and not verdict.even)
    if asked == AUTO:
        return steps(len(u), v.shape[1], u.shape[1], dtype, x.device, routes, right_only, compiling)
    served = asked in (ROUTED if routes else SCHEDULES) and not (right_only and asked == "left")
    return ((LARGEST, asked if served else TWO_SIDED),)


def asked_of(schedule: str) -> str:
    """The choice for a site, without what was found there."""
    return schedule.partition(",")[0]


def _as_ever(x: Tensor) -> bool:
    """Whether nothing but autograd looks at a call: no autocast, export, trace or function transform."""
    return torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type) and not _transformed()


def _called(
    function: Any, dtype: torch.dtype, op: str, given: tuple[Any, ...], scale: Tensor, shift: Tensor, siblings: Any, *rest: Any
) -> Tensor:  # fmt: skip
    """The function's y; under autocast of x, W, b, U and V in the dtype that it runs in."""
    found: Tensor
    if not torch.is_autocast_enabled(given[0].device.type):
        siblings = None if torch.compiler.is_compiling() else siblings
        found = function.apply(op, *given, scale, shift, siblings, *rest)[0]
        return found
    with torch.autocast(given[0].device.type, enabled=False):  # each call has an x of its own then
        found = function.apply(op, *(one if one is None else one.to(dtype) for one in given), scale, shift, None, *rest)[0]
    return found


def by_hand(dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None, *tensors: Tensor) -> bool:
    """Whether gradients written by hand serve this call, which runs in this dtype; `tensors` starts with U, V and s."""
    u, v, scale = tensors[:3]
    if not torch.is_grad_enabled() or weight.requires_grad or scale.requires_grad or dtype not in _DTYPES:
        return False
    for one in (x, weight, *tensors) if bias is None else (x, weight, bias, *tensors):
        if type(one) not in PLAIN_TYPES:
            return False
    if _transformed() or x.is_meta or x.ndim < 2 or x.is_nested or x.layout != torch.strided or x.numel() == 0:
        return False
    if torch.is_autocast_enabled(x.device.type):
        return x.dtype != torch.float64
    return weight.dtype == u.dtype == v.dtype == dtype and (bias is None or bias.dtype == dtype)


def _transformed() -> bool:
    """Whether something looks at every operation: an export, a trace, a function transform."""
    if torch.compiler.is_compiling():
        return torch.compiler._is_exporting_flag  # in torch 2.11 a compiler takes is_exporting() for true
    stack: Any = torch._C._functorch.peek_interpreter_stack()
    return stack is not None or torch._C._get_tracing_state() is not None or forward_ad._current_level >= 0


class Verdict(NamedTuple):
    """Whether factors are singular vectors of their weight, and whether the values are near each other.

    A routed call on the left divides W x, rounded at the largest value's size, by each of them before its router reads it.
    """

    singular: bool
    even: bool


def looked_at(op: str, weight: Tensor, u: Tensor, v: Tensor, scale: Tensor) -> Verdict:
    """What these are now; looked at again only where one of them was written to."""
    owner = weight if weight._base is None else weight._base
    held = _verdicts.get(id(owner))
    if held is None or held[0]() is not owner:
        held = _verdicts[id(owner)] = (weakref.ref(owner, functools.partial(_drop, id(owner))), {})
    versions = [0 if one.is_inference() else one._version for one in (weight, u, v, scale)]
    key = (weight.storage_offset(), weight.dtype, weight.data_ptr(), u.data_ptr(), *versions)  # a module moves by `.data`
    found = held[1].get(key)
    if found is None:
        if len(held[1]) > _MOST:
            held[1].clear()
        found = held[1][key] = Verdict(singular(lying(op, weight), u, v, scale), even(scale))
    return found


def even(scale: Tensor) -> bool:
    """Whether singular values (k,) are near each other."""
    return not scale.numel() or scale.is_meta or bool(scale.max() <= EVEN * scale.min())


def forget() -> None:
    """Look at every weight and call again: writes by `.data` leave no trace, and tensors with weak references are not swapped."""
    _verdicts.clear()
    ready.forget()


def _drop(owner: int, _: Any) -> None:
    _verdicts.pop(owner, None)


@torch.no_grad()
def singular(weight: Tensor, u: Tensor, v: Tensor, scale: Tensor) -> bool:
    """Whether U s = W Vᵀ and s V = Uᵀ W with orthonormal U and V, up to rounding: what all schedules but two-sided rest on.

    Not where s was floored, where the base was changed, or where factors came from elsewhere.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    limit = torch.finfo(weight.dtype).eps * (64 if weight.dtype == dtype else 1)
    z = torch.randn(len(v), generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu").to(v.device, dtype)
    u, v, scale, weight = u.to(dtype), v.to(dtype), scale.to(dtype), weight.to(dtype)
    with without_autocast(weight):  # whose products are rounded
        right, left, scaled_z = v.mT @ z, u @ z, scale * z
        pairs = ((weight @ right, u @ scaled_z), (weight.mT @ left, v.mT @ scaled_z), (v @ right, z), (u.mT @ left, z))
        return bool(torch.stack([(one - other).norm() <= limit * other.norm() for one, other in pairs]).all())


_TWO_SIDED: Steps = ((LARGEST, TWO_SIDED),)
# Function.apply without its look at function transforms, of which there are none (`_as_ever`).
_APPLY, _APPLY_ROUTED = (
    {name: torch._C._FunctionBase.__dict__["apply"].__get__(None, one) for name, one in known.items()}
    for known in (SCHEDULES, ROUTED)
)
_DTYPES = {torch.float32, torch.bfloat16, torch.float64}
_MOST = 64  # verdicts on the views of one tensor
_verdicts: dict[int, tuple[Any, dict[tuple[Any, ...], Verdict]]] = {}  # by the id of the tensor that holds the weight
