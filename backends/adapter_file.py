"""Files of adapters for a running graph: ONNX Runtime's own, and sarac's, read without the model."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from onnxruntime import AdapterFormat, OrtValue
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from sarac.ir.errors import CheckpointError, ExportError
from sarac.ir.plan import Plan

SUFFIX = ".onnx_adapter"
ROLES = {"shift", "router", "router_in"}  # of the tensors that a swap exchanges


def version_of(base: str) -> int:
    """A base's hash as the model version of ONNX Runtime's adapter files, which is a positive int32."""
    return int(base[:7], 16) if base else 0


def write_adapter(path: Path, tensors: Mapping[str, Tensor], base: str) -> None:
    """Write ONNX Runtime's adapter file: tensors by the names of a graph's inputs, and the version of their base."""
    file = AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(version_of(base))
    values = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    file.set_parameters({name: _value(tensor) for name, tensor in values.items()})
    file.export_adapter(str(path))


def read_adapter(path: Path) -> tuple[dict[str, Tensor], str, int]:
    """The tensors of an adapter file, ONNX Runtime's or sarac's own, the hash of their base if it has one, and its version."""
    if not path.is_file():
        raise CheckpointError(f"There is no adapter file at {path}: check the path.")
    try:
        if path.suffix != SUFFIX:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                base = json.loads(metadata.get("base", "{}")).get("float32", "")
                _require_swappable(path, metadata)
                return {name: file.get_tensor(name) for name in file.keys()}, base, version_of(base)  # noqa: SIM118  no dict
        found = AdapterFormat.read_adapter(str(path))
        tensors = {name: from_dlpack(value._ortvalue).clone() for name, value in found.get_parameters().items()}
        return tensors, "", int(found.get_model_version())
    except (SafetensorError, OSError, RuntimeError, ValueError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise CheckpointError(f"{path} is no readable adapter file: {reason.rstrip('.')}. Write it again.") from error


def _require_swappable(path: Path, metadata: Mapping[str, str]) -> None:
    sites = Plan.from_json(metadata["plan"]).sites if "plan" in metadata else {}
    trained = [site for site, adapter in sites.items() if not ROLES.issuperset(adapter.trainable)]
    if trained:
        raise CheckpointError(
            f"{path} trained the factors of {trained[0]} too, which the graph has as constants: fold it, and export the merged "
            "model."
        )


def _value(tensor: Tensor) -> OrtValue:
    if tensor.dtype == torch.bfloat16:
        raise ExportError("ONNX Runtime's adapter files have no bfloat16 from Python: write it in fp32, which is converted.")
    return OrtValue.ortvalue_from_numpy(tensor.numpy())
