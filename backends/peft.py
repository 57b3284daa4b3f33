"""PEFT's LoRA folders: any SARA adapter written as one that stock PEFT loads, and a LoRA read into SARA factors.

SARA is a LoRA with B = U diag(λ) and A = V. Ranks that differ by site are padded with zeros to the largest, with
lora_alpha == r and no patterns: that is right under the scale rules of PEFT, vLLM, llama.cpp and TGI alike.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sarac.backends import lora
from sarac.backends.lora import Pair
from sarac.ir import check
from sarac.ir.adapters import Adapter, MoSara, Sara
from sarac.ir.errors import CheckpointError, NotFoldable, RewriteError, SaracWarning
from sarac.ir.gram import product_factors
from sarac.ir.layers import adapted
from sarac.ir.layout import TRANSPOSED, Layout, kernel
from sarac.ir.pipeline import adopt
from sarac.ir.plan import Plan
from sarac.ir.record import record_of, require_whole
from sarac.ir.weight import Slot

Model = TypeVar("Model", bound=nn.Module)
LAYOUTS = ("padded", "pattern")


@dataclass(frozen=True)
class _Kind:
    """Modules that PEFT adapts, and whether the matrix B A lies transposed in their weight."""

    modules: tuple[type[nn.Module], ...]
    transposed: bool = False

    def layout(self, dims: int) -> Layout:
        """How B A lies in a weight of so many dimensions."""
        return TRANSPOSED if self.transposed else kernel(dims)


# PEFT swaps the child, and these read its weight themselves: in eval mode they would compute the base, in silence.
_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def _conv1d() -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D

    found: type[nn.Module] = Conv1D
    return found


@dataclass(frozen=True)
class Written:
    """What was written: the rank r, and by site ‖Δ - Δ_r‖ / ‖Δ‖, what `max_rank` cut off the change (0 where nothing)."""

    rank: int
    errors: Mapping[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """The site that lost the largest share of its change, and that share."""
        name = max(self.errors, key=lambda site: self.errors[site])
        return name, self.errors[name]


def save(model: nn.Module, folder: str | Path, *, layout: str = "padded", max_rank: int | None = None) -> Written:
    """Write the live adapters of `model` as a PEFT LoRA folder; a routed adapter is a NotFoldable.

    `layout`: padded (one rank for all, read rightly everywhere) or pattern (each site's own rank, smaller, for PEFT itself).
    `max_rank` cuts larger adapters to their best approximation. What PEFT would compute otherwise is a RewriteError.
    """
    if layout not in LAYOUTS:
        raise RewriteError(f"layout={layout!r} is unknown: it is {' or '.join(LAYOUTS)}.")
    if max_rank is not None and max_rank < 1:
        raise RewriteError(f"max_rank={max_rank} leaves nothing of an adapter: it is at least 1.")
    pairs: dict[str, Pair] = {}
    errors: dict[str, float] = {}
    for path, slot, pair in _loras(model):
        pairs[path], errors[slot.site] = _truncated(*pair, max_rank)
    ranks = {path: a.shape[0] for path, (_, a) in pairs.items()}
    rank = max(ranks.values())
    own = {f"^{re.escape(path)}$": r for path, r in ranks.items() if r != rank} if layout == "pattern" else {}
    config = {
        "peft_type": "LORA",
        "task_type": _task(model),
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": own,
        "alpha_pattern": own,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": all(isinstance(model.get_submodule(path), _conv1d()) for path in pairs),
        "target_modules": _targets(model, pairs),
        "inference_mode": True,
    }
    _warn_of_ties(model, pairs)
    padded = {path: (_padded(b, 1, rank), _padded(a, 0, rank)) for path, (b, a) in pairs.items()}
    layers = {path: model.get_submodule(path) for path in pairs}
    lora.write(Path(folder), config, padded if layout == "padded" else pairs, layers)
    return Written(rank, errors)


def _warn_of_ties(model: nn.Module, pairs: Mapping[str, Pair]) -> None:
    owners: dict[int, str] = {}
    for path in pairs:
        first = owners.setdefault(id(model.get_submodule(path)._parameters["weight"]), path)
        if first != path:
            warnings.warn(
                f"{first} and {path} share one weight: stock PEFT computes right with this folder, but its merge_and_unload adds "
                "the change twice. Merge with sarac.fold.",
                SaracWarning,
                stacklevel=3,
            )
            return


def load(model: Model, folder: str | Path) -> Model:
    """A copy of `model` with a PEFT LoRA as SARA factors (QR and a small SVD: nothing is lost but zero directions)."""
    sites: dict[str, Adapter] = {}
    given: dict[str, dict[str, Tensor]] = {}
    for site, (b, a) in _sited(model, lora.read(Path(folder)), str(folder)).items():
        u, s, v = product_factors(b, a)
        sites[site] = Sara(s.numel(), train="factors", basis="random")
        shift = s.to(a.dtype)
        given[site] = {"u": u, "v": v, "scale": torch.ones_like(shift), "shift": shift}
    return adopt(model, Plan(sites, f"peft:{Path(folder).name}"), given)  # type: ignore[return-value]  # the same class


def lost(model: nn.Module, folder: str | Path) -> dict[str, float]:
    """By site how far a folder's LoRA is from the live adapters of `model`: ‖Δ - Δ_folder‖ / ‖Δ‖ (as it is for Δ = 0)."""
    found = lora.read(Path(folder))
    losses = {}
    for path, slot, (b, a) in _loras(model):
        losses[slot.site] = _apart((b.cpu(), a.cpu()), found.get(path, (b.new_zeros(b.shape[0], 1), a.new_zeros(1, a.shape[1]))))
    return losses


def base_of(folder: str | Path) -> str | None:
    """The name or path of the base model that a PEFT folder was made for; None where it names none."""
    return lora.config_of(Path(folder)).get("base_model_name_or_path")


def _loras(model: nn.Module) -> Iterator[tuple[str, Slot, Pair]]:
    """The path, slot, and B and A of every adapted module."""
    require_whole(model, "save")
    record = record_of(model)
    if record is None:
        raise RewriteError(f"{type(model).__name__} carries no adapters: there is no LoRA to write. Transform it first.")
    if record.plan.also_train:
        raise RewriteError(
            f"{record.plan.also_train[0]} was trained whole, which a LoRA folder does not hold. Write the adapter with "
            "sarac.save_adapter, or the merged model with sarac.fold."
        )
    places: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(path)
    slots = [(path, module, slot) for path, module, state in adapted(model) for slot in state.slots.values()]
    kinds = [_kind(model, places[module], module, slot) for _, module, slot in slots]  # all, before the first is worked on
    for (path, module, slot), kind in zip(slots, kinds, strict=True):
        yield path, slot, _pair(module, slot, kind)


def _kind(model: nn.Module, places: list[str], module: nn.Module, slot: Slot) -> _Kind:
    """The kind of an adapted module; what PEFT would not compute as the model does is refused."""
    if not slot.adapter.foldable:
        raise NotFoldable(
            f"{slot.site} is routed: its change depends on the input, and a LoRA's does not. Export the routed subgraph, or "
            'fold with routing="mean".'
        )
    known = _Kind((nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)), _Kind((_conv1d(), nn.Embedding), transposed=True)
    kind = next((kind for kind in known if isinstance(module, kind.modules)), None)
    parent = model.get_submodule(places[0].rpartition(".")[0])
    reason = ""
    if slot.param != "weight" or kind is None:
        reason = "is not the weight of a linear layer, a convolution or an embedding, which are what PEFT adapts"
    elif _odd(module):
        reason = f"convolves with {_odd(module)}, which PEFT's LoRA of it leaves out"
    elif isinstance(parent, _READERS):
        reason = f"is read by the {type(parent).__name__} around it, past the LoRA that PEFT would put there"
    elif places == [""]:
        reason = "belongs to a model that is that layer itself, and PEFT adapts layers inside of a model"
    elif len(places) > 1:
        reason = f"belongs to a module that stands at {' and '.join(places)}, of which PEFT would adapt the first alone"
    if kind is None or reason:
        raise RewriteError(
            f"{slot.site} in a {type(module).__name__} {reason}. Transform the model with a `where` that leaves it out, write "
            "the adapter with sarac.save_adapter, or the merged model with sarac.fold."
        )
    return kind


def _odd(module: nn.Module) -> str:
    """What of a convolution the LoRA that PEFT puts beside it does not have."""
    plain = {"groups": (1,), "padding_mode": ("zeros",), "dilation": ((1,), (1, 1), (1, 1, 1))}
    values = {name: getattr(module, name, plain[name][0]) for name in plain}
    return ", ".join(f"{name}={value}" for name, value in values.items() if value not in plain[name])


def _pair(module: nn.Module, slot: Slot, kind: _Kind) -> Pair:
    tensors = {role: tensor.detach() for role, tensor in slot.tensors(module).items()}
    shift = tensors["shift"].mean(0) if isinstance(slot.adapter, MoSara) else tensors["shift"]
    wide = torch.promote_types(tensors["u"].dtype, torch.float32)
    b, a = tensors["u"].to(wide) * (shift * tensors["scale"]).to(wide), tensors["v"].to(wide)
    if not bool(torch.isfinite(b).all() and torch.isfinite(a).all()):
        raise RewriteError(f"The adapter of {slot.site} contains NaN or Inf: go back to values before that step of training.")
    return (b, a) if slot.layout == kind.layout(getattr(module, slot.param).ndim) else (a.T, b.T)


def _truncated(b: Tensor, a: Tensor, most: int | None) -> tuple[Pair, float]:
    """B and A of at most that rank, nearest in the Frobenius norm, and the share of the norm that is lost."""
    if most is None or a.shape[0] <= most:
        return (b, a), 0.0
    u, s, v = product_factors(b, a)
    error = float(s[most:].norm() / s.norm()) if float(s.norm()) else 0.0
    return ((u[:, :most] * s[:most]).to(b.dtype), v[:most].to(a.dtype)), error


def _padded(matrix: Tensor, dim: int, rank: int) -> Tensor:
    missing = [*matrix.shape]
    missing[dim] = rank - matrix.shape[dim]
    return torch.cat([matrix, matrix.new_zeros(missing)], dim)


def _trimmed(b: Tensor, a: Tensor) -> Pair:
    """B and A without the zeros that fill them up."""
    used = b.any(0) | a.any(1)
    return b[:, used], a[used]


def _norm(pair: Pair) -> float:
    """‖B A‖ in the Frobenius norm, from matrices of the rank's size: the product itself would take minutes for a large model."""
    b, a = (matrix.double() for matrix in pair)
    return float(((b.T @ b) * (a @ a.T)).sum().clamp_min(0.0).sqrt())


def _apart(one: Pair, two: Pair) -> float:
    """How far B A of the second lies from that of the first, as a share of its norm (as it is where that is 0)."""
    (b, a), (other_b, other_a) = (_trimmed(*one), _trimmed(*two))
    if torch.equal(b, other_b) and torch.equal(a, other_a):
        return 0.0
    whole, apart = _norm((b, a)), _norm((torch.cat([b, -other_b.to(b)], 1), torch.cat([a, other_a.to(a)])))
    return apart / whole if whole else apart


def _targets(model: nn.Module, pairs: Mapping[str, Pair]) -> list[str] | str:
    """The adapted modules by name: PEFT takes a name for the end of one too, so where that hits others it is a pattern."""
    others = (path for path, _ in model.named_modules() if path not in pairs)
    if any(path.endswith(f".{name}") for path in others for name in pairs):
        return "|".join(re.escape(path) for path in sorted(pairs))
    return sorted(pairs)


def _task(model: nn.Module) -> str | None:
    from transformers.models.auto import modeling_auto  # a second, which no import of sarac is to take

    # PEFT has a model of its own for these that adds no trained module: a classifier's would have to be in the folder.
    tasks: dict[str, Mapping[str, Any]] = {
        "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "FEATURE_EXTRACTION": modeling_auto.MODEL_MAPPING_NAMES,
    }
    name = type(model).__name__
    for task, known in tasks.items():
        if any(name in ([classes] if isinstance(classes, str) else classes) for classes in known.values()):
            return task
    return None


def _sited(model: nn.Module, pairs: Mapping[str, Pair], where: str) -> dict[str, Pair]:
    """B and A by site. A weight of several names has one adapter, so all its modules must have the same LoRA."""
    names: dict[int, list[str]] = {}
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in named.items():
        names.setdefault(id(parameter), []).append(name)
    found: dict[str, Pair] = {}
    layers = dict(model.named_modules(remove_duplicate=False))
    odd = next((path for path in pairs if path in layers and _odd(layers[path])), None)
    if odd is not None:
        what = _odd(layers[odd])
        raise CheckpointError(f"{where} adapts {odd}, which convolves with {what}, and its LoRA does not: merge it in PEFT.")
    # A lookup takes rows where a linear layer multiplies with them: a site lies as for the latter.
    pairs = {path: (a.T, b.T) if isinstance(layers.get(path), nn.Embedding) else (b, a) for path, (b, a) in pairs.items()}
    for path, (b, a) in pairs.items():
        shared = names[id(named[f"{path}.weight"])] if f"{path}.weight" in named else [f"{path}.weight"]
        others = [pairs.get(name.removesuffix(".weight")) for name in shared]
        if not all(other is not None and _apart((b, a), other) <= check.gate(torch.float32) for other in others):
            also = ", ".join(name for name in shared if name != f"{path}.weight")
            raise CheckpointError(
                f"{where} adapts {path} alone, whose weight is also {also}: SARA adapts the weight itself, for all that use it. "
                "Merge it in PEFT, or untie the weights before loading."
            )
        found[shared[0]] = (b, a)
    return found
