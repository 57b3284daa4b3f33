"""A LoRA folder as PEFT writes and reads it: its config, its tensors' names, its scale rules; B and A by module."""

import json
import pickle
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sarac.ir.errors import CheckpointError

Pair = tuple[Tensor, Tensor]  # B (out, r) and A (r, in)
CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_SIDE = r"lora_(?P<side>[AB])(\.[^.]+)?\.weight|lora_embedding_(?P<table>[AB])(\.[^.]+)?"
_KEY = re.compile(rf"(base_model\.model\.)?(?P<module>.+)\.({_SIDE})")
_DEFAULT_ALPHA = 8
# Options of a LoRA that change what it computes, with the values at which they do not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "use_qalora": (False,),
    **dict.fromkeys("modules_to_save target_parameters layer_replication trainable_token_indices".split(), ([], {})),
    **dict.fromkeys("alora_invocation_tokens use_bdlora arrow_config kasa_config monteclora_config".split(), ()),
}
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def write(folder: Path, config: Mapping[str, Any], pairs: Mapping[str, Pair], layers: Mapping[str, nn.Module]) -> None:
    """Write a folder that PEFT opens, aside first; B (out, r) and A (r, in) in the shapes and by the names of their layers."""
    tensors = {}
    for path, pair in pairs.items():
        table = isinstance(layers[path], nn.Embedding)
        window = tuple(getattr(layers[path], "kernel_size", ()))
        for side, matrix, sizes in zip("BA", pair, ((1,) * len(window), window), strict=True):
            name = f"{_PREFIX}{path}.lora_embedding_{side}" if table else f"{_PREFIX}{path}.lora_{side}.weight"
            copied = matrix.to("cpu", copy=True)  # modules that share a weight share its factors, and files no memory
            tensors[name] = copied.reshape(matrix.shape[0], -1, *sizes).contiguous()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as aside:
            save_file(tensors, Path(aside) / WEIGHTS, metadata={"format": "pt"})
            (Path(aside) / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for name in (WEIGHTS, CONFIG):
                (Path(aside) / name).replace(folder / name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}.") from error


def config_of(folder: Path) -> dict[str, Any]:
    """The config of a LoRA folder; one of another kind, or none, is a CheckpointError."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))  # PEFT's place for adapters with names
        more = f" Name an adapter's own folder: {', '.join(inner)}." if inner else ""
        raise CheckpointError(f"{folder} is no readable PEFT folder ({error}): it needs {CONFIG} and {WEIGHTS}.{more}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(f"{folder} holds a {kind} adapter; only a LORA amounts to SARA factors.")
    return config


def read(folder: Path) -> dict[str, Pair]:
    """B (out, r), with the scale in it, and A (r, in) of every module of a folder, a kernel's inner sizes in one."""
    config = config_of(folder)
    for option, plain in _PLAIN.items():
        if config.get(option) is not None and config[option] not in plain:
            raise CheckpointError(
                f"{folder} has {option}={config[option]!r}, which SARA factors do not express: merge it in PEFT."
            )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_MOVES_BASE):
        raise CheckpointError(
            f"{folder} has init_lora_weights={init!r}, with which PEFT changes the base weights too: save it with "
            "path_initial_model_for_weight_conversion, or merge it in PEFT."
        )
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _tensors(folder).items():
        match = _KEY.fullmatch(name)
        if match is None or tensor.ndim < 2:
            raise CheckpointError(f"{folder} holds {name}, which is no LoRA of a layer's weight: merge it in PEFT instead.")
        module = match["module"].removeprefix("_orig_mod.")  # saved from a compiled model
        side = match["side"] or match["table"]
        if side in tensors.setdefault(module, {}):
            raise CheckpointError(f"{folder} holds lora_{side} of {module} twice, for two adapters: save them one by one.")
        tensors[module][side] = tensor.flatten(1)
    pairs = {}
    for module, parts in tensors.items():
        if set(parts) != {"A", "B"} or parts["A"].shape[0] != parts["B"].shape[1]:
            raise CheckpointError(
                f"{folder} has no lora_A and lora_B of one rank for {module}: it is damaged, or of a convolution in groups."
            )
        a = parts["A"].to(torch.promote_types(parts["A"].dtype, torch.float32))
        pairs[module] = (parts["B"].to(a) * _scaling(config, module, a.shape[0]), a)
    return pairs


def _tensors(folder: Path) -> dict[str, Tensor]:
    try:
        if not (folder / WEIGHTS).exists() and (folder / PICKLED).exists():
            return dict(torch.load(folder / PICKLED, weights_only=True, map_location="cpu"))
        return load_file(folder / WEIGHTS)
    except (OSError, EOFError, TypeError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{folder} is no readable PEFT folder ({error}): it needs {CONFIG} and {WEIGHTS}.") from error


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r of one module (alpha / √r with rank-stabilised scaling), with PEFT's patterns."""
    patterns = config.get("alpha_pattern") or {}
    own = (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module))
    alpha = next(own, config.get("lora_alpha", _DEFAULT_ALPHA))
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
