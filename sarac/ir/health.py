"""What an adapter does at its site, in figures: how large its change is, what of it moved, and what it holds.

No weight is made for any of them. With values λ_i = δ_i ⊙ s, gates g whose mean product over the tokens is M = E[g gᵀ], and
G = (Uᵀ U) ⊙ (V Vᵀ), which is the identity for singular vectors,
    E ‖Δ‖² = Σ_ij M_ij λ_iᵀ G λ_j        (‖A‖² = tr(A Aᵀ) of A = U diag(λ) V)
and for one set of singular values that train ‖Δ‖ = ‖δ ⊙ s‖.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sarac.ir.adapters import MoSara, Sara
from sarac.ir.gates import Gates, Watch, sizes_of, slots, stored
from sarac.ir.gram import zero_floor
from sarac.ir.graph import layer_of, starred
from sarac.ir.layout import dense
from sarac.ir.sharded import is_sharded
from sarac.ir.start import Tensors
from sarac.ir.weight import Slot

_ROUTER = ("router", "router_in")
_STILL = 1e-3  # of the largest shift: what moved less did not move
_ABOVE = 1.0 + 1e-5  # s is stored in float32, its floor was computed in float64


@dataclass(frozen=True)
class Health:
    """The figures of one site. Norms are Frobenius's, bytes are as stored; None where there is no such figure."""

    site: str
    method: str
    trains: tuple[str, ...]
    dtypes: tuple[str, ...]  # of what trains, in its order
    frozen: tuple[str, ...]  # of what trains, what requires no gradient
    shape: tuple[int, ...]  # (out, in) or (parts, out, in)
    dtype: str
    rank: float  # of a stack the mean
    lr: float  # the rate that the adapter recommends
    broken: tuple[str, ...]  # the site's own tensors that hold NaN or Inf, the base as "weight"
    finite: bool  # whether they and the gradients are
    delta: float  # ‖Δ‖ / ‖W‖, of a routed site the root of its mean square over the tokens
    moved: float  # root mean square of δ, which started at 0
    largest: float  # of |δ|
    beyond: float  # the share of |δ| of 1 and more
    turned: float  # the share of δ of -1 and less, whose directions are gone or turned round
    still: float  # the share of directions that in no set that is used moved by 1/1000 of the largest
    covered: float | None  # Σ s² of the k directions over ‖W‖²; None where they are no singular ones
    columns: float | None  # the longest of U's columns and V's rows, which start at about 1; None where they do not train
    floored: int  # directions whose singular value counts as zero
    grad: float | None  # norm of the gradient of all that trains here
    router_grad: float | None
    gates: Gates | None
    likeness: float | None  # mean cosine of each two of the sets' δ_i
    adapters: int  # bytes that train
    factors: int  # bytes of the frozen rest: U, V and s
    base: int  # bytes of the weight
    tokens: int  # rows of the call that was seen last
    lacking: tuple[str, ...] = ()  # of what trains, what the optimiser has not, where that is known
    rates: tuple[float | None, ...] = ()  # of what trains, in its order: the highest so far, where it can be judged
    kept: int = 0  # bytes from the forward to the backward
    misfit: float | None = None  # ‖W Vᵀ z - U s z‖ / (‖W Vᵀ z‖ + ‖U s z‖), 0 of singular vectors; None where none are frozen
    lost: float | None = None  # the share ‖round(W + Δ) - W - Δ‖ / ‖Δ‖ of Δ that merging into the weight's dtype loses

    @property
    def standing(self) -> set[str]:
        """The roles of what should train and does not."""
        return {*self.frozen, *self.lacking}

    @property
    def kind(self) -> str:
        """The name with its numbers starred."""
        return starred(self.site)

    @property
    def layer(self) -> int | None:
        """The first number in the name."""
        return layer_of(self.site)

    @property
    def share(self) -> float:
        """k / n with n = min(out, in)."""
        return self.rank / min(self.shape[-2:])


def health(
    module: nn.Module, slot: Slot, norm: float, watch: Watch, gradient: Callable[[Tensor], Tensor | None]
) -> Health:  # fmt: skip
    """The figures of a site, from `norm` = ‖W‖, what was watched, and what gives a tensor's gradient."""
    adapter, held, weight = slot.adapter, slot.tensors(module), stored(slot, module)
    tensors = {role: whole(tensor.detach()) for role, tensor in held.items()}
    grads = {role: whole(found) for role, tensor in held.items() if (found := gradient(tensor)) is not None}
    own = {role: tensors[role] for role in adapter.trainable}
    frozen = [tensors[role] for role in tensors if role not in own and role not in adapter.borrowed]
    gates = watch.gates(slot.site)
    scale, singular = tensors["scale"], _singular(slot)
    parts, out, inner = sizes_of(slot, module)
    judged = [role for role in tensors if role not in adapter.borrowed]
    broken = *(role for role in judged if not tensors[role].isfinite().all()), *(() if math.isfinite(norm) else ("weight",))
    return Health(
        site=slot.site,
        method=adapter.method,
        trains=adapter.trainable,
        frozen=tuple(role for role in adapter.trainable if not held[role].requires_grad),
        dtypes=tuple(_name(held[role].dtype) for role in adapter.trainable),
        shape=(parts, out, inner) if parts else (out, inner),
        dtype=_name(weight.dtype),
        rank=sum(adapter.parts) / len(adapter.parts) if adapter.parts else adapter.rank,
        lr=adapter.lr,
        broken=broken,
        finite=not broken and all(bool(one.isfinite().all()) for one in grads.values()),
        delta=_over(change(slot, tensors, watch), norm),
        **_moved(slot, tensors, gates),
        covered=_over(float(scale.double().norm()), norm) ** 2 if singular else None,
        columns=_columns(own),
        floored=floored(scale, torch.empty((out, inner), dtype=weight.dtype, device="meta")) if singular else 0,
        grad=_norm(grads[role] for role in adapter.trainable if role in grads),
        router_grad=_norm(grads[role] for role in _ROUTER if role in grads),
        gates=gates,
        likeness=likeness(tensors["shift"]) if sets_of(slot) > 1 else None,
        adapters=_bytes(own.values()),
        factors=_bytes(frozen),
        base=weight.numel() * weight.element_size(),
        tokens=watch.tokens.get(slot.site, 0),
    )


def _moved(slot: Slot, tensors: Tensors, gates: Gates | None) -> dict[str, Any]:
    """How far δ is; all zero where the scale is, of which no shift counts."""
    found = moves(slot, tensors)
    largest = float(found.abs().max()) if len(found) else 0.0
    return {
        "moved": float(found.square().mean().sqrt()) if len(found) else 0.0,
        "largest": largest,
        "beyond": _share(found.abs() >= 1.0),
        "turned": _share(found <= -1.0),
        "still": _share(farthest(slot, tensors, gates) <= _STILL * largest) if largest else 0.0,
    }


def change(slot: Slot, tensors: Tensors, watch: Watch | None = None) -> float:
    """‖Δ‖, of a routed site the root of its mean square over the tokens; with equal gates where none were seen."""
    many = sets_of(slot) > 0
    shift, scale = tensors["shift"].double(), tensors["scale"].double().unsqueeze(-2)
    values = (shift if many else shift.unsqueeze(-2)) * scale
    values = values.mean(-2, keepdim=True) if slot.adapter.foldable else values
    seen, count = watch.product(slot.site) if watch else None, values.shape[-2]
    product = values.new_full((count, count), 1.0 / count**2) if seen is None else seen.to(values)
    turned = values
    if {"u", "v"} & set(slot.adapter.trainable):  # they need not be orthonormal any more
        u, v = tensors["u"].double(), tensors["v"].double()
        turned = values @ ((u.mT @ u) * (v @ v.mT))
    square = float((product * (turned @ values.mT)).sum())
    return 0.0 if square <= 0.0 else math.sqrt(square)


def moves(slot: Slot, tensors: Tensors) -> Tensor:
    """δ of every set and matrix as one vector in float64, without what pads a stack: its scale is zero for good."""
    shift, scale = tensors["shift"], tensors["scale"]
    real = (scale.unsqueeze(-2) if sets_of(slot) else scale) != 0
    found: Tensor = shift[real.expand_as(shift)].double()
    return found


def farthest(slot: Slot, tensors: Tensors, gates: Gates | None = None) -> Tensor:
    """The largest |δ| of every direction over the sets that get tokens, over all where nobody saw gates, as one vector.

    A set without tokens never moves, which says nothing of its directions.
    """
    size, scale = tensors["shift"].double().abs(), tensors["scale"]
    if sets_of(slot):
        used = [index for index, share in enumerate(gates.use) if share > 0.0] if gates else []
        size = (size[..., used, :] if used else size).amax(-2)
    found: Tensor = size[scale != 0]
    return found


def likeness(shift: Tensor) -> float | None:
    """The mean cosine of each two sets' δ_i, from δ (sets, k) or (parts, sets, k); None where fewer than two moved."""
    found = []
    for part in shift.double() if shift.ndim == 3 else shift.double()[None]:
        rows = part[part.norm(dim=-1) > 0]
        if len(rows) > 1:
            unit = rows / rows.norm(dim=-1, keepdim=True)
            found.append(float(((unit @ unit.mT).sum() - len(rows)) / (len(rows) * (len(rows) - 1))))
    return sum(found) / len(found) if found else None


def floored(scale: Tensor, weight: Tensor) -> int:
    """How many singular values s (k,) or (parts, k) of a weight of this shape and dtype count as zero, without padding."""
    found = 0
    for row in scale.double().reshape(-1, scale.shape[-1]):
        limit = zero_floor(weight, float(row.max())) * _ABOVE
        found += int(((row != 0) & (row <= limit)).sum())
    return found


def norms(model: nn.Module) -> dict[str, float]:
    """‖W‖ of every adapted weight, de-quantised where it is quantised."""

    def norm(weight: Tensor) -> float:
        return float(torch.linalg.vector_norm(whole(dense(weight)), dtype=torch.float64))

    return {slot.site: norm(stored(slot, module).detach()) for module, slot in slots(model)}


def misfits(model: nn.Module) -> dict[str, float | None]:
    """How far frozen factors are from singular vectors of their weight, by what both make of one random vector z."""
    return {slot.site: _misfit(slot, module) for module, slot in slots(model)}


def _columns(own: Tensors) -> float | None:
    found = [own[role].double().norm(dim=dim) for role, dim in (("u", -2), ("v", -1)) if role in own]
    return max(float(one.max()) for one in found) if found else None


def _misfit(slot: Slot, module: nn.Module) -> float | None:
    if not _singular(slot) or {"u", "v"} & set(slot.adapter.trainable):
        return None
    tensors, weight = slot.tensors(module), slot.layout.matrix(whole(dense(stored(slot, module).detach())))
    u, v, scale = (whole(tensors[role].detach()) for role in ("u", "v", "scale"))
    dtype = torch.promote_types(weight.dtype, torch.float32)
    z = torch.randn(scale.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(scale.device, dtype)
    z = z * (scale != 0) if bool(scale.any()) else z  # not of what pads a stack
    seen = (weight.to(dtype) @ (v.to(dtype).mT @ z.unsqueeze(-1))).double()
    told = (u.to(dtype) @ (scale.to(dtype) * z).unsqueeze(-1)).double()
    return _over(float((seen - told).norm()), float(seen.norm() + told.norm()))


def _singular(slot: Slot) -> bool:
    """Whether factors started as singular vectors."""
    return not (isinstance(slot.adapter, Sara) and slot.adapter.basis == "random")


def sets_of(slot: Slot) -> int:
    """How many vectors δ has at a site; 0 where it is one vector, not a stack of sets."""
    return slot.adapter.sets if isinstance(slot.adapter, MoSara) else 0


def equal_gates(model: nn.Module) -> dict[str, Tensor]:
    """Gates of 1 / sets for every routed site."""
    routed = [slot for _, slot in slots(model) if not slot.adapter.foldable]
    return {slot.site: torch.full((sets_of(slot),), 1.0 / sets_of(slot)) for slot in routed}


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, which every process must take part in; any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def _norm(grads: Iterable[Tensor]) -> float | None:
    found = [float(torch.linalg.vector_norm(grad, dtype=torch.float64)) for grad in grads]
    return math.hypot(*found) if found else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _share(marks: Tensor) -> float:
    return float(marks.double().mean()) if len(marks) else 0.0


def _over(top: float, bottom: float) -> float:
    return 0.0 if top == 0.0 else top / bottom if bottom > 0.0 else math.inf
