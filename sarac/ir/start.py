"""What adapters start from: factors of the weight, zeros for what trains, and the same for every matrix of a stack."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sarac.ir.errors import PlanError

Tensors = Mapping[str, Any]
Factors = Callable[[Tensor, int, str], tuple[Tensor, Tensor, Tensor, float]]  # as sarac.ir.gram.factors


def svd_tensors(u: Tensor, s: Tensor, v: Tensor, floor: float, weight: Tensor) -> dict[str, Tensor]:
    """U, V and the scale s of leading singular directions of `weight`, in its dtype."""
    return {
        "u": u.to(weight).contiguous(),
        "v": v.to(weight).contiguous(),
        # floored, so that a direction without any weight can still be moved a little and never divides by zero
        "scale": s.clamp_min(floor).to(small(weight)),
    }


def small(weight: Tensor, *shape: int) -> Tensor:
    """Zeros of this shape for what trains, on the device of `weight`."""
    # Few numbers, and all the learning is in them: float32 even where the weight has half of it.
    return torch.zeros(shape, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)


def product(tensors: Tensors, values: Tensor) -> Tensor:
    """U diag(values) V in float32 or wider."""
    wide = torch.promote_types(tensors["u"].dtype, torch.float32)
    made: Tensor = (tensors["u"].to(wide) * values.to(wide).unsqueeze(-2)) @ tensors["v"].to(wide)
    return made


def each(shapes: dict[str, tuple[int, ...]], parts: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes, with `parts` in front for a stack."""
    return {role: (len(parts), *shape) for role, shape in shapes.items()} if parts else shapes


def stacked(adapter: Any, weight: Tensor, generator: torch.Generator, name: str, factors: Factors) -> dict[str, Tensor]:
    """Every matrix's own tensors, padded with zeros to one rank: a zero scale keeps the padding at zero for good."""
    made = [
        replace(adapter, rank=rank, parts=()).init(weight[i], generator, f"{name}[{i}]", factors)
        for i, rank in enumerate(adapter.parts)
    ]
    shapes = adapter.shapes(*weight.shape[-2:])
    padded = {role: made[0][role].new_zeros(shapes[role]) for role in made[0]}
    for i, tensors in enumerate(made):
        for role, tensor in tensors.items():
            padded[role][i][tuple(slice(size) for size in tensor.shape)] = tensor
    return padded


def require_ranks(rank: int, parts: tuple[int, ...]) -> None:
    """Raise PlanError unless these are ranks."""
    require(rank >= 1, f"rank={rank}", "a rank is at least 1")
    fits = not parts or (min(parts) >= 1 and max(parts) == rank)
    require(fits, f"parts={parts}", f"each is at least 1 and the largest is the rank, {rank}")


def require(holds: bool, given: str, rule: str) -> None:
    """Raise PlanError unless an option's value is possible."""
    if not holds:
        raise PlanError(f"The option {given} is not possible: {rule}.")
