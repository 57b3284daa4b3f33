"""The methods and their maths: what each adds to a linear call, what of it trains, and the weight change it amounts to.

`apply` is written once and runs on tensors and on fx proxies alike: on proxies it writes the subgraph.

What trains is the relative shift δ = λ / s. The pilot (tests/benchmarks/learning_rate.py: SmolLM2-135M de-quantised from 4
bits, 60 steps of 8 x 256 tokens of the Python language reference, AdamW, one seed; held-out perplexity, untouched 12.82):
    rate                        1e-3    3e-3    5e-3    1e-2    2e-2    3e-2    5e-2    1e-1    3e-1
    δ, threshold 0.6                            9.22    9.07    9.38    9.78   10.84   13.25
    λ, threshold 0.6                                   10.37    9.72            9.11    9.06   10.01
    Mo-SARA, 5 sets                                     8.74    9.07           11.41
    factors at 0.01, SVD        8.83    8.54            8.84    9.02
    factors at 0.01, random    10.42    8.78            8.69    8.96            9.34
At their own best rates δ and λ learn the same. δ is kept because its rate does not move with the scale of the weights (λ's best
is ten times δ's here).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from sarac.ir.errors import NotFoldable, PlanError
from sarac.ir.gram import factors
from sarac.ir.terms import LINEAR, How, add, mix, project, score

Tensors = Mapping[str, Any]
Factors = Callable[[Tensor, int, str], tuple[Tensor, Tensor, Tensor, float]]  # as sarac.ir.gram.factors
TRAINS = ("singular_values", "factors")
INITS = ("svd", "random")
ROUTERS = ("soft", "topk", "hard", "uniform")
PARAMETRISATION = "relative"  # files say that the shift is δ = λ / s, not λ
# The best rates of the pilot above.
LR_SHIFT, LR_FACTORS_SVD, LR_FACTORS_RANDOM = 1e-2, 3e-3, 1e-2


class Adapter(Protocol):
    """One method on one weight: a frozen dataclass that holds options and maths, never tensors."""

    method: ClassVar[str]

    @property
    def rank(self) -> int:
        """k, the number of singular directions."""

    @property
    def trainable(self) -> tuple[str, ...]:
        """The roles of the tensors that train."""

    @property
    def foldable(self) -> bool:
        """Whether the method amounts to one weight change, whatever the input."""

    @property
    def lr(self) -> float:
        """The learning rate to give Adam."""

    @property
    def parts(self) -> tuple[int, ...]:
        """The rank of every matrix of a stack, the largest being `rank`; () for one matrix."""

    def shapes(self, out: int, inner: int) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by role, for a weight of shape (out, inner), or a stack of such."""

    def init(self, weight: Tensor, generator: torch.Generator, name: str, factors: Factors = factors) -> dict[str, Tensor]:
        """The tensors by role at which the method changes nothing, for a weight (out, in) or (parts, out, in)."""

    def apply(self, x: Any, y: Any, tensors: Tensors, how: How = LINEAR) -> Any:
        """The adapted output, from the input x (…, in) and the base's output y (…, out) of that linear operation."""

    def delta(self, tensors: Tensors) -> Tensor:
        """The change of the weight (out, in), or of a stack, that `apply` amounts to; NotFoldable if there is none."""


@dataclass(frozen=True)
class Sara:
    """SARA: y = W x + U diag(λ) V x over the leading k singular directions of W (Gu et al. 2024, "SARA").

    `train="singular_values"` trains δ = λ / s alone; `"factors"` trains U, δ and V, which start at the SVD
    (`init=svd`) or at random (`init=random`, where s is 1 and so δ is λ itself).
    """

    rank: int
    train: str = "singular_values"
    basis: str = field(default="svd", metadata={"option": "init"})
    parts: tuple[int, ...] = ()
    method: ClassVar[str] = "sara"
    foldable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_ranks(self.rank, self.parts)
        require(self.train in TRAINS, f"train={self.train}", f"train is one of {', '.join(TRAINS)}")
        require(self.basis in INITS, f"init={self.basis}", f"init is one of {', '.join(INITS)}")
        fits = self.train == "factors" or self.basis == "svd"
        require(fits, f"init={self.basis}", "singular values belong to the SVD's factors: random ones need train=factors")

    @property
    def trainable(self) -> tuple[str, ...]:
        """δ alone, or δ with both factors."""
        return ("shift",) if self.train == "singular_values" else ("u", "shift", "v")

    @property
    def lr(self) -> float:
        """A learning rate for Adam that the pilot in this module's docstring found to work."""
        if self.train == "singular_values":
            return LR_SHIFT
        return LR_FACTORS_SVD if self.basis == "svd" else LR_FACTORS_RANDOM

    def shapes(self, out: int, inner: int) -> dict[str, tuple[int, ...]]:
        """U (out, k), V (k, in), the scale s (k,) and the shift δ (k,); each with `parts` in front for a stack."""
        k = self.rank
        return _each({"u": (out, k), "v": (k, inner), "scale": (k,), "shift": (k,)}, self.parts)

    def init(self, weight: Tensor, generator: torch.Generator, name: str, factors: Factors = factors) -> dict[str, Tensor]:
        """Factors of `weight` (out, in) in its dtype, and δ = 0."""
        if self.parts:
            return _stacked(self, weight, generator, name, factors)
        if self.basis == "svd":
            return {**_svd_tensors(*factors(weight, self.rank, name), weight), "shift": _small(weight, self.rank)}
        out, inner = weight.shape
        u = torch.randn(out, self.rank, generator=generator, device="cpu") / out**0.5  # columns of norm 1, as an SVD's have
        v = torch.randn(self.rank, inner, generator=generator, device="cpu") / inner**0.5
        return {
            "u": u.to(weight),
            "v": v.to(weight),
            "scale": _small(weight, self.rank) + 1.0,
            "shift": _small(weight, self.rank),
        }

    def apply(self, x: Any, y: Any, tensors: Tensors, how: How = LINEAR) -> Any:
        """y + U ((δ ⊙ s) ⊙ V x)."""
        values = tensors["shift"] * tensors["scale"]
        h = project(x, tensors["v"], how) * (values.unsqueeze(-2) if self.parts else values)
        return add(y, h, tensors["u"], how)

    def delta(self, tensors: Tensors) -> Tensor:
        """U diag(δ ⊙ s) V, shape (out, in)."""
        return _product(tensors, tensors["shift"] * tensors["scale"])


@dataclass(frozen=True)
class MoSara:
    """Mo-SARA: y = W x + U diag(Σ_i g_i(x) λ_i) V x with gates g = softmax(R V x) over `sets` vectors λ_i.

    `router`: soft (all sets), topk:N (the N largest gates, not renormalised, so that topk:1 still trains R and
    topk:sets is soft), hard (the largest counts as 1, straight-through gradient), uniform (1 / sets, no R: the control).
    `bottleneck`: R as a product through that width; 0 for none.
    """

    rank: int
    sets: int = 5
    router: str = "soft"
    bottleneck: int = 0
    parts: tuple[int, ...] = ()
    method: ClassVar[str] = "mosara"

    def __post_init__(self) -> None:
        _require_ranks(self.rank, self.parts)
        require(self.sets >= 1, f"sets={self.sets}", "there is at least 1 set")
        require(self.bottleneck >= 0, f"bottleneck={self.bottleneck}", "a width is at least 1, or 0 for none")
        kind, _, count = self.router.partition(":")
        known = kind in ROUTERS and (kind == "topk") == bool(count)
        require(known, f"router={self.router}", "router is soft, topk:N, hard or uniform")
        fits = kind != "topk" or (count.isdigit() and 1 <= int(count) <= self.sets)
        require(fits, f"router={self.router}", f"N is a number from 1 to sets ({self.sets})")

    @property
    def routed(self) -> bool:
        """Whether the gates depend on the input."""
        return self.sets > 1 and self.router != "uniform"

    @property
    def foldable(self) -> bool:
        """Only where the gates are constant: one set, or the uniform router."""
        return not self.routed

    @property
    def trainable(self) -> tuple[str, ...]:
        """Every δ_i, and the router where there is one."""
        return ("shift", *self._router_shapes())

    @property
    def lr(self) -> float:
        """A learning rate for Adam that the pilot in this module's docstring found to work."""
        return LR_SHIFT

    def shapes(self, out: int, inner: int) -> dict[str, tuple[int, ...]]:
        """U (out, k), V (k, in), s (k,), the shifts δ (sets, k), the router R (sets, k) or its two factors."""
        k = self.rank
        factors = {"u": (out, k), "v": (k, inner), "scale": (k,), "shift": (self.sets, k)}
        return _each({**factors, **self._router_shapes()}, self.parts)

    def init(self, weight: Tensor, generator: torch.Generator, name: str, factors: Factors = factors) -> dict[str, Tensor]:
        """SVD factors of `weight` (out, in), every δ_i = 0, R random: equal rows would never separate the sets."""
        if self.parts:
            return _stacked(self, weight, generator, name, factors)
        small = _small(weight, self.sets, self.rank)
        tensors = {**_svd_tensors(*factors(weight, self.rank, name), weight), "shift": small}
        for role, shape in self._router_shapes().items():
            tensors[role] = (torch.randn(shape, generator=generator, device="cpu") / shape[1] ** 0.5).to(small)
        return tensors

    def gates(self, h: Any, tensors: Tensors) -> Any:
        """The gates (…, sets) for projections h = V x of shape (…, k)."""
        if self.bottleneck:
            h = score(h, tensors["router_in"])
        scores = score(h, tensors["router"])
        soft = torch.softmax(scores, -1)
        kind, _, count = self.router.partition(":")
        if kind == "topk":
            kept = torch.topk(soft, int(count), -1)
            return torch.zeros_like(soft).scatter(-1, kept[1], kept[0])
        if kind == "hard":
            largest = torch.zeros_like(soft).scatter(-1, torch.argmax(scores, -1, keepdim=True), 1.0)
            return largest + (soft - soft.detach())
        return soft

    def apply(self, x: Any, y: Any, tensors: Tensors, how: How = LINEAR) -> Any:
        """y + U ((Σ_i g_i δ_i ⊙ s) ⊙ V x)."""
        h = project(x, tensors["v"], how)
        shift, scale = tensors["shift"], tensors["scale"]
        if self.routed:
            return add(y, mix(h, self.gates(h, tensors), shift, scale), tensors["u"], how)
        values = shift.mean(-2) * scale
        return add(y, h * (values.unsqueeze(-2) if self.parts else values), tensors["u"], how)

    def delta(self, tensors: Tensors) -> Tensor:
        """U diag(mean of δ_i ⊙ s) V where the gates are constant; NotFoldable where they depend on the input."""
        if self.routed:
            raise NotFoldable(f"A routed Mo-SARA adapter ({self.sets} sets, router {self.router}) has no single weight.")
        return _product(tensors, tensors["shift"].mean(-2) * tensors["scale"])

    def mean_delta(self, tensors: Tensors, gates: Tensor) -> Tensor:
        """U diag(Σ_i g_i λ_i) V for fixed gates of shape (sets,), or (parts, sets) of a stack."""
        shift = tensors["shift"]
        return _product(tensors, torch.einsum("...s,...sk->...k", gates.to(shift), shift) * tensors["scale"])

    def _router_shapes(self) -> dict[str, tuple[int, int]]:
        if not self.routed:
            return {}
        if not self.bottleneck:
            return {"router": (self.sets, self.rank)}
        return {"router": (self.sets, self.bottleneck), "router_in": (self.bottleneck, self.rank)}


def _svd_tensors(u: Tensor, s: Tensor, v: Tensor, floor: float, weight: Tensor) -> dict[str, Tensor]:
    return {
        "u": u.to(weight).contiguous(),
        "v": v.to(weight).contiguous(),
        # floored, so that a direction without any weight can still be moved a little and never divides by zero
        "scale": s.clamp_min(floor).to(_small(weight)),
    }


def _small(weight: Tensor, *shape: int) -> Tensor:
    # Few numbers, and all the learning is in them: float32 even where the weight has half of it.
    return torch.zeros(shape, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)


def _product(tensors: Tensors, values: Tensor) -> Tensor:
    wide = torch.promote_types(tensors["u"].dtype, torch.float32)
    product: Tensor = (tensors["u"].to(wide) * values.to(wide).unsqueeze(-2)) @ tensors["v"].to(wide)
    return product


def _each(shapes: dict[str, tuple[int, ...]], parts: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {role: (len(parts), *shape) for role, shape in shapes.items()} if parts else shapes


def _stacked(
    adapter: Sara | MoSara, weight: Tensor, generator: torch.Generator, name: str, factors: Factors
) -> dict[str, Tensor]:
    """Every matrix's own tensors, padded with zeros to one rank: a zero scale keeps the padding at zero for good."""
    made = [
        replace(adapter, rank=rank, parts=()).init(weight[i], generator, f"{name}[{i}]", factors)
        for i, rank in enumerate(adapter.parts)
    ]
    shapes = adapter.shapes(*weight.shape[-2:])
    stacked = {role: made[0][role].new_zeros(shapes[role]) for role in made[0]}
    for i, tensors in enumerate(made):
        for role, tensor in tensors.items():
            stacked[role][i][tuple(slice(size) for size in tensor.shape)] = tensor
    return stacked


def _require_ranks(rank: int, parts: tuple[int, ...]) -> None:
    require(rank >= 1, f"rank={rank}", "a rank is at least 1")
    fits = not parts or (min(parts) >= 1 and max(parts) == rank)
    require(fits, f"parts={parts}", f"each is at least 1 and the largest is the rank, {rank}")


def require(holds: bool, given: str, rule: str) -> None:
    """Raise PlanError unless an option's value is possible."""
    if not holds:
        raise PlanError(f"The option {given} is not possible: {rule}.")
