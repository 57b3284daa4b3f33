"""Weights of modules that fx cannot trace although it is known what they do with them: why the weight form, and how they lie."""

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from sarac.ir.layout import MATRIX, Layout, kernel, matrices

Known = dict[str, tuple[str, Layout]]
_PACKED = Layout((1,), (2,), (0,), split=3)  # q, k and v, one below the other
# The names under which mixtures of experts keep how many they have.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "n_experts")


def known_weights(module: nn.Module) -> Known:
    """The parameters of `module` that are linear weights, by name."""
    hooked = _hooked(module)
    if hooked or isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return hooked
    if isinstance(module, nn.MultiheadAttention):
        why = "a packed weight that its module reads directly"
        split = {f"{one}_proj_weight": (why, MATRIX) for one in "qkv"}
        return split if module._parameters.get("in_proj_weight") is None else {"in_proj_weight": (why, _PACKED)}
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        names = [name for name in module._parameters if name.startswith("weight_")]
        return {name: (f"nn.{type(module).__name__} reads it directly", MATRIX) for name in names}
    return _experts(module)


def untraced_weights(module: nn.Module, reason: str) -> Known:
    """What a module that cannot be traced multiplies with, by the layer of torch that it derives from; `reason` is why."""
    if isinstance(module, nn.Linear | _ConvNd) and "weight" in module._parameters:
        dims = module.weight.ndim
        return {"weight": (reason, kernel(dims) if dims > 2 else MATRIX)}
    return {}


def _experts(module: nn.Module) -> Known:
    """The stacks of a mixture of experts: three dimensions, as many matrices as the module says it has experts."""
    counts = {value for name in _COUNTS if type(value := getattr(module, name, None)) is int}
    turned = bool(getattr(module, "is_transposed", False))
    layout = matrices(3).flipped if turned else matrices(3)
    why = f"{type(module).__name__} picks the experts' matrices from it"
    return {
        name: (why, layout)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3 and parameter.shape[0] in counts and min(parameter.shape) > 1
    }


def _hooked(module: nn.Module) -> Known:
    """The parameters from which a hook of torch's old style computes the weight before every forward."""
    found: Known = {}
    for hook in module._forward_pre_hooks.values():
        name = {WeightNorm: "v", SpectralNorm: "orig"}.get(type(hook), "orig" if isinstance(hook, BasePruningMethod) else "")
        if name:
            stem = str(getattr(hook, "name", getattr(hook, "_tensor_name", "")))
            parameter = module._parameters.get(f"{stem}_{name}")
            if parameter is not None and parameter.ndim >= 2:
                layout = kernel(parameter.ndim) if parameter.ndim > 2 else MATRIX
                found[f"{stem}_{name}"] = (f"{type(hook).__name__} computes {stem} from it", layout)
    return found
