"""Weights of modules that fx cannot trace although it is known what they do with them: why the weight form, and how they lie."""

import functools
from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree as pytree

from sarac.ir.layout import MATRIX, Layout, kernel, matrices
from sarac.source import multiplied

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


def read_from_outside(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """The weights of its children that `module` takes and computes with itself: child and parameter."""
    return (("out_proj", "weight"),) if isinstance(module, nn.MultiheadAttention) else ()


def untraced_weights(module: nn.Module, names: Iterable[str], reason: str) -> Known:
    """Which of these parameters a module that cannot be traced multiplies with: by its source, and the layer it derives from."""
    convolves, found = isinstance(module, _ConvNd), multiplied(module)
    known: Known = {}
    for name in names:
        normalised = name.startswith("parametrizations.weight.") and isinstance(
            module.get_submodule("parametrizations.weight.0"), _SpectralNorm
        )
        layer = isinstance(module, nn.Linear | _ConvNd) and (normalised or name == "weight")
        if layer or name.partition(".")[0] in found:
            dims = module.get_parameter(name).ndim
            known[name] = (reason, kernel(dims) if convolves or dims > 3 else matrices(dims))
    return known


def parameters_kept(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that a module keeps in plain attributes as well, alone, in containers or bound to a function."""
    if isinstance(module, nn.RNNBase):  # whose list an adapted one makes anew at every call
        return
    for name, value in vars(module).items():
        if name not in ("_parameters", "_buffers", "_modules") and not isinstance(value, bool | int | float | str | type(None)):
            bound = (value.args, value.keywords) if isinstance(value, functools.partial) else value
            yield from ((name, leaf) for leaf in pytree.tree_leaves(bound) if isinstance(leaf, nn.Parameter))


def holds_only(module: nn.Module) -> bool:
    """Whether a module has no forward of its own, as a ParameterList: another module reads what it holds."""
    own = getattr(type(module), "forward", None) is not nn.Module.forward or "forward" in module.__dict__  # a compiled one's
    return not own and not isinstance(module, nn.ModuleList | nn.ModuleDict)


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
