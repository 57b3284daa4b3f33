"""PEFT's LoRA folders: any SARA adapter written as one that stock PEFT loads, and a LoRA read into SARA factors.

SARA is a LoRA with B = U diag(λ) and A = V. Ranks that differ by site are padded with zeros to the largest, with
lora_alpha == r and no patterns: that is right under the scale rules of PEFT, vLLM, llama.cpp and TGI alike.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sarac.ir.adapters import Adapter, MoSara, Sara
from sarac.ir.errors import CheckpointError, NotFoldable, RewriteError
from sarac.ir.layers import adapted
from sarac.ir.pipeline import adopt
from sarac.ir.plan import Plan
from sarac.ir.record import record_of
from sarac.ir.spectrum import product_factors
from sarac.ir.weight import Slot

Model = TypeVar("Model", bound=nn.Module)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
# Options of a LoRA that change what it computes, with the values at which they do not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "lora_bias": (False, None),
}


def save(model: nn.Module, folder: str | Path) -> None:
    """Write the adapters of `model` as a PEFT LoRA folder; a routed adapter is a NotFoldable.

    A weight that is not the `weight` of an nn.Linear or Conv1D, or parameters trained whole, are a RewriteError.
    """
    tensors: dict[str, Tensor] = {}
    slots = [(path, module, slot) for path, module, state in adapted(model) for slot in state.slots.values()]
    if not slots:
        raise RewriteError(f"{type(model).__name__} carries no adapters: there is no LoRA to write. Transform it first.")
    record = record_of(model)
    if record is not None and record.plan.also_train:
        raise RewriteError(
            f"{record.plan.also_train[0]} was trained whole, which a LoRA folder does not hold. Write the adapter with "
            "sarac.save_adapter, or the merged model with sarac.fold."
        )
    rank = max(slot.adapter.rank for _, _, slot in slots)
    for path, module, slot in slots:
        b, a = _lora(path, module, slot)
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = _padded(a, 0, rank)
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = _padded(b, 1, rank)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": all(slot.transposed for _, _, slot in slots),
        "target_modules": sorted(path for path, _, _ in slots),
        "inference_mode": True,
    }
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
        (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}.") from error


def load(model: Model, folder: str | Path) -> Model:
    """A copy of `model` with a PEFT LoRA as SARA factors (QR and a small SVD: nothing is lost but zero directions)."""
    config, tensors = _read(Path(folder))
    sites: dict[str, Adapter] = {}
    given: dict[str, dict[str, Tensor]] = {}
    for module, sides in tensors.items():
        if set(sides) != {"A", "B"}:
            raise CheckpointError(f"{folder} has only one of lora_A and lora_B for {module}: it is damaged.")
        u, s, v = product_factors(sides["B"] * _scaling(config, module, sides["A"].shape[0]), sides["A"])
        sites[f"{module}.weight"] = Sara(s.numel(), train="factors", basis="random")
        small = s.to(torch.promote_types(sides["A"].dtype, torch.float32))
        given[f"{module}.weight"] = {"u": u, "v": v, "scale": torch.ones_like(small), "shift": small}
    return adopt(model, Plan(sites, f"peft:{Path(folder).name}"), given)  # type: ignore[return-value]  # the same class


def _lora(path: str, module: nn.Module, slot: Slot) -> tuple[Tensor, Tensor]:
    """B (out, k) and A (k, in) of one slot."""
    if not slot.adapter.foldable:
        raise NotFoldable(
            f"{slot.site} is routed: its change depends on the input, and a LoRA's does not. Export the routed subgraph, or "
            'fold with routing="mean".'
        )
    if slot.param != "weight" or not (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
        raise RewriteError(
            f"{slot.site} belongs to a {type(module).__name__}, and PEFT's LoRA adapts the weight of nn.Linear and Conv1D alone. "
            "Transform the model with a `where` that leaves it out, or save with sarac.save_adapter."
        )
    tensors = {role: tensor.detach() for role, tensor in slot.tensors(module).items()}
    shift = tensors["shift"].mean(0) if isinstance(slot.adapter, MoSara) else tensors["shift"]
    wide = torch.promote_types(tensors["u"].dtype, torch.float32)
    return tensors["u"].to(wide) * (shift * tensors["scale"]).to(wide), tensors["v"].to(wide)


def _padded(matrix: Tensor, dim: int, rank: int) -> Tensor:
    missing = [*matrix.shape]
    missing[dim] = rank - matrix.shape[dim]
    return torch.cat([matrix, matrix.new_zeros(missing)], dim).cpu().contiguous()


def _read(folder: Path) -> tuple[Mapping[str, Any], dict[str, dict[str, Tensor]]]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        found = load_file(folder / WEIGHTS)
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is no readable PEFT folder ({error}): it needs {CONFIG} and {WEIGHTS}.") from error
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder} holds a {config.get('peft_type')} adapter; only a LORA amounts to SARA factors.")
    for option, plain in _PLAIN.items():
        if config.get(option) not in plain and option in config:
            raise CheckpointError(
                f"{folder} has {option}={config[option]!r}, which SARA factors do not express: merge it in PEFT."
            )
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in found.items():
        match = _KEY.fullmatch(name)
        if match is None or tensor.ndim != 2:
            raise CheckpointError(f"{folder} holds {name}, which is no LoRA of a linear layer: merge it in PEFT instead.")
        tensors.setdefault(match["module"], {})[match["side"]] = tensor
    return config, tensors


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r of one module (alpha / √r with rank-stabilised scaling), with PEFT's patterns."""
    alpha = next(
        (value for key, value in (config.get("alpha_pattern") or {}).items() if _matches(key, module)), config["lora_alpha"]
    )
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _matches(pattern: str, module: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None
