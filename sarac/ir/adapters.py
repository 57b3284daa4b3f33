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
is ten times δ's here). On the answers of GSM8K, with warm-up and a fall to 0, the best rates are δ's 3e-2 (0.022 nll below 1e-2),
1e-2 for factors from the SVD (0.038 below 3e-3) and 3e-2 for random ones (0.038 below 1e-2, and 1e-1 ruins them); on the pilot's
text those cost more or as much (0.075, 0.034), so that its rates stay (examples/experiments/RESULTS.md, 7).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from sarac.ir.calls import AUTO, routed, shifted
from sarac.ir.errors import NotFoldable
from sarac.ir.gram import factors
from sarac.ir.start import Factors, Tensors, each, product, require, require_ranks, small, stacked, svd_tensors
from sarac.ir.terms import LINEAR, How, add, base, gates_of, mix, project, scaled, score

TRAINS = ("singular_values", "factors")
INITS = ("svd", "random")
SCOPES = ("site", "group")
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

    @property
    def router_of(self) -> str:
        """The site whose tensors serve here too; "" for none."""

    @property
    def borrowed(self) -> Mapping[str, str]:
        """The roles whose tensors are those of `router_of`, with the roles that they have there; they train with that site."""

    def shapes(self, out: int, inner: int) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by role, for a weight of shape (out, inner), or a stack of such."""

    def init(self, weight: Tensor, generator: torch.Generator, name: str, factors: Factors = factors) -> dict[str, Tensor]:
        """The tensors by role at which the method changes nothing, for a weight (out, in) or a stack; none that is borrowed."""

    def apply(self, x: Any, y: Any, tensors: Tensors, how: How = LINEAR) -> Any:
        """The adapted output, from the input x (…, in) and the base's output y (…, out) of that linear operation."""

    def linear(
        self, x: Any, weight: Any, bias: Any, tensors: Tensors, schedule: Any = AUTO, op: str = "linear", siblings: Any = None
    ) -> Any:
        """As `apply` on `base(op, x, weight, bias)`, by a schedule of sarac.ir.schedules while it trains; of one matrix."""

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
    router_of: ClassVar[str] = ""
    borrowed: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        require_ranks(self.rank, self.parts)
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
        return each({"u": (out, k), "v": (k, inner), "scale": (k,), "shift": (k,)}, self.parts)

    def init(self, weight: Tensor, generator: torch.Generator, name: str, factors: Factors = factors) -> dict[str, Tensor]:
        """Factors of `weight` (out, in) in its dtype, and δ = 0."""
        if self.parts:
            return stacked(self, weight, generator, name, factors)
        if self.basis == "svd":
            return {**svd_tensors(*factors(weight, self.rank, name), weight), "shift": small(weight, self.rank)}
        out, inner = weight.shape
        u = torch.randn(out, self.rank, generator=generator, device="cpu") / out**0.5  # columns of norm 1, as an SVD's have
        v = torch.randn(self.rank, inner, generator=generator, device="cpu") / inner**0.5
        return {
            "u": u.to(weight),
            "v": v.to(weight),
            "scale": small(weight, self.rank) + 1.0,
            "shift": small(weight, self.rank),
        }

    def apply(self, x: Any, y: Any, tensors: Tensors, how: How = LINEAR) -> Any:
        """y + U ((δ ⊙ s) ⊙ V x)."""
        values = tensors["shift"] * tensors["scale"]
        h = project(x, tensors["v"], how)
        h = h * values.unsqueeze(-2) if self.parts else scaled(h, values)
        return add(y, h, tensors["u"], how)

    def linear(
        self, x: Any, weight: Any, bias: Any, tensors: Tensors, schedule: Any = AUTO, op: str = "linear", siblings: Any = None
    ) -> Any:
        """W x + b + U ((δ ⊙ s) ⊙ V x)."""
        return shifted(x, weight, bias, *(tensors[role] for role in ("u", "v", "scale", "shift")), schedule, op, siblings)

    def delta(self, tensors: Tensors) -> Tensor:
        """U diag(δ ⊙ s) V, shape (out, in)."""
        return product(tensors, tensors["shift"] * tensors["scale"])


@dataclass(frozen=True)
class MoSara:
    """Mo-SARA: y = W x + U diag(Σ_i g_i(x) λ_i) V x with gates g = softmax(R V x) over `sets` vectors λ_i.

    `router`: soft (all sets), topk:N (the N largest gates, not renormalised, so that topk:1 still trains R and
    topk:sets is soft), hard (the largest counts as 1, straight-through gradient), uniform (1 / sets, no R: the control).
    `bottleneck`: R as a product through that width; 0 for none. `router_scope`: site, or group: sites that read one input
    have one router, R V x of the first of them, which the others name as `router_of`, and whose rank is `router_rank`.
    """

    rank: int
    sets: int = 5
    router: str = "soft"
    bottleneck: int = 0
    router_scope: str = "site"
    router_of: str = field(default="", metadata={"sparse": True})  # written only where it is set
    router_rank: int = 0  # follows from the plan
    parts: tuple[int, ...] = ()
    method: ClassVar[str] = "mosara"

    def __post_init__(self) -> None:
        require_ranks(self.rank, self.parts)
        require(self.sets >= 1, f"sets={self.sets}", "there is at least 1 set")
        require(self.bottleneck >= 0, f"bottleneck={self.bottleneck}", "a width is at least 1, or 0 for none")
        kind, _, count = self.router.partition(":")
        known = kind in ROUTERS and (kind == "topk") == bool(count)
        require(known, f"router={self.router}", "router is soft, topk:N, hard or uniform")
        fits = kind != "topk" or (count.isdigit() and 1 <= int(count) <= self.sets)
        require(fits, f"router={self.router}", f"N is a number from 1 to sets ({self.sets})")
        require(self.router_scope in SCOPES, f"router_scope={self.router_scope}", f"it is one of {', '.join(SCOPES)}")
        shares = not self.router_of or (self.router_scope == "group" and not self.parts)
        require(shares, f"router_of={self.router_of}", "one matrix with router_scope=group has the router of another")

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
        """Every δ_i, and the router where there is one of its own."""
        return ("shift", *(role for role in self._router_shapes() if role not in self.borrowed))

    @property
    def borrowed(self) -> Mapping[str, str]:
        """The router of the site `router_of`, and its V, by which that router sees the input."""
        roles = {role: role for role in self._router_shapes()} if self.router_of else {}
        return {"gate_v": "v", **roles} if roles else {}

    @property
    def lr(self) -> float:
        """A learning rate for Adam that the pilot in this module's docstring found to work."""
        return LR_SHIFT

    def shapes(self, out: int, inner: int) -> dict[str, tuple[int, ...]]:
        """U (out, k), V (k, in), s (k,), the shifts δ (sets, k), the router R (sets, k) or its two factors."""
        k = self.rank
        factors = {"u": (out, k), "v": (k, inner), "scale": (k,), "shift": (self.sets, k)}
        factors |= {"gate_v": (self.router_rank, inner)} if self.borrowed else {}
        return each({**factors, **self._router_shapes()}, self.parts)

    def init(self, weight: Tensor, generator: torch.Generator, name: str, factors: Factors = factors) -> dict[str, Tensor]:
        """SVD factors of `weight` (out, in), every δ_i = 0, R random: equal rows would never separate the sets."""
        if self.parts:
            return stacked(self, weight, generator, name, factors)
        shift = small(weight, self.sets, self.rank)
        tensors = {**svd_tensors(*factors(weight, self.rank, name), weight), "shift": shift}
        for role, shape in self._router_shapes().items() if not self.router_of else ():
            tensors[role] = (torch.randn(shape, generator=generator, device="cpu") / shape[1] ** 0.5).to(shift)
        return tensors

    def gates(self, h: Any, tensors: Tensors) -> Any:
        """The gates (…, sets) for projections h = V x of shape (…, k)."""
        if self.bottleneck:
            h = score(h, tensors["router_in"], bool(self.parts))
        return gates_of(score(h, tensors["router"], bool(self.parts)), self.router)

    def apply(self, x: Any, y: Any, tensors: Tensors, how: How = LINEAR) -> Any:
        """y + U ((Σ_i g_i δ_i ⊙ s) ⊙ V x)."""
        h = project(x, tensors["v"], how)
        shift, scale = tensors["shift"], tensors["scale"]
        if self.routed:
            seen = project(x, tensors["gate_v"], how) if self.router_of else h
            return add(y, mix(h, self.gates(seen, tensors), shift, scale), tensors["u"], how)
        values = shift.mean(-2) * scale
        return add(y, h * values.unsqueeze(-2) if self.parts else scaled(h, values), tensors["u"], how)

    def linear(
        self, x: Any, weight: Any, bias: Any, tensors: Tensors, schedule: Any = AUTO, op: str = "linear", siblings: Any = None
    ) -> Any:
        """W x + b + U ((Σ_i g_i δ_i ⊙ s) ⊙ V x)."""
        own = (tensors["u"], tensors["v"], tensors["scale"])
        if not self.routed:
            return shifted(x, weight, bias, *own, tensors["shift"].mean(-2), schedule, op, siblings)
        if self.router_of:
            return self.apply(x, base(op, x, weight, bias), tensors)
        inward = tensors["router_in"] if self.bottleneck else None
        return routed(x, weight, bias, *own, tensors["shift"], tensors["router"], inward, self.router, schedule, op, siblings)

    def delta(self, tensors: Tensors) -> Tensor:
        """U diag(mean of δ_i ⊙ s) V where the gates are constant; NotFoldable where they depend on the input."""
        if self.routed:
            raise NotFoldable(f"A routed Mo-SARA adapter ({self.sets} sets, router {self.router}) has no single weight.")
        return product(tensors, tensors["shift"].mean(-2) * tensors["scale"])

    def mean_delta(self, tensors: Tensors, gates: Tensor) -> Tensor:
        """U diag(Σ_i g_i λ_i) V for fixed gates of shape (sets,), or (parts, sets) of a stack."""
        shift = tensors["shift"]
        return product(tensors, torch.einsum("...s,...sk->...k", gates.to(shift), shift) * tensors["scale"])

    def _router_shapes(self) -> dict[str, tuple[int, int]]:
        if not self.routed:
            return {}
        width = self.router_rank if self.router_of else self.rank
        if not self.bottleneck:
            return {"router": (self.sets, width)}
        return {"router": (self.sets, self.bottleneck), "router_in": (self.bottleneck, width)}
