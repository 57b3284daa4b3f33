"""The effective weight: what an adapted module's weight attribute gives, and the slot that says what adapts it."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sarac.ir.adapters import Adapter
from sarac.ir.errors import NotFoldable, WeightError
from sarac.ir.layout import MATRIX, TRANSPOSED, Layout, dense

PRODUCTS = "_sara_products"  # the attribute in which a module keeps its effective weights while its forward runs
# The path of an attribute from its module, and the value that a forward was specialised to.
Guard = tuple[tuple[str, ...], Any]


@dataclass(frozen=True)
class Slot:
    """One adapted parameter of one module: which weight it is, how it lies, and its adapter."""

    site: str
    param: str
    adapter: Adapter
    layout: Layout = MATRIX

    @property
    def transposed(self) -> bool:
        """Whether it is one matrix, stored as (in, out)."""
        return self.layout == TRANSPOSED

    def attribute(self, role: str) -> str:
        """The module attribute of the adapter's tensor with this role: `sara_u`, or `NAME_sara_u` beside `NAME`."""
        return f"sara_{role}" if self.param == "weight" else f"{self.param}_sara_{role}"

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """The adapter's tensors by role."""
        found = {role: module._parameters.get(self.attribute(role)) for role in self.adapter.shapes(1, 1)}
        missing = [role for role, tensor in found.items() if tensor is None]
        if missing:
            raise WeightError(f"{self.site} has lost its adapter's {', '.join(missing)}: transform the model again.")
        return {role: tensor for role, tensor in found.items() if tensor is not None}


@dataclass
class State:
    """What an adapted module knows of itself: its slots, what its forward was specialised to, whether it is on."""

    slots: dict[str, Slot]
    guards: tuple[Guard, ...] = ()
    enabled: bool = True


def base_attribute(param: str) -> str:
    """The attribute under which an adapted module gives the untouched base of a parameter."""
    return f"{param}_base"


def effective(module: nn.Module, param: str) -> Tensor:
    """W + U diag(λ) V in the base's dtype and layout, differentiable; NotFoldable where the adapter is routed."""
    slot = module.__dict__["_sara"].slots[param]
    base = module._parameters[param]
    assert base is not None
    try:
        # autocast would take the product in half precision and round the base with it
        with torch.autocast(base.device.type, enabled=False) if torch.is_autocast_enabled(base.device.type) else nullcontext():
            delta = slot.adapter.delta(slot.tensors(module))
    except NotFoldable as error:
        raise NotFoldable(
            f"{slot.site}: {error} Call the layer itself instead of reading its weight; to merge it, export the routed "
            'subgraph (merge=False), or fold with routing="mean" over calibration inputs.'
        ) from None
    total: Tensor = dense(base).to(delta.dtype) + slot.layout.stored(delta, base.shape).to(base.device)
    return total.to(base.dtype)


class EffectiveWeight(Tensor):
    """What reading an adapted weight gives: dtype, device and shape at no cost, the product at the first computation."""

    _module: nn.Module
    _param: str

    @staticmethod
    def __new__(cls, module: nn.Module, param: str, trains: bool) -> "EffectiveWeight":
        """The handle on `module`'s parameter; `trains` says whether gradients flow to it."""
        base = module._parameters[param]
        assert base is not None
        handle: EffectiveWeight = Tensor._make_wrapper_subclass(
            cls, base.shape, strides=base.stride(), dtype=base.dtype, device=base.device, requires_grad=trains
        )
        handle._module, handle._param = module, param
        return handle

    def product(self) -> Tensor:
        """The effective weight as a plain tensor; it is computed once in a forward, however often that reads it."""
        kept = self._module.__dict__.get(PRODUCTS, {})
        key = (self._param, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        value = kept[key] = kept.get(key) if key in kept else effective(self._module, self._param)
        return value if self.requires_grad else value.detach()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let facts through, refuse writes and storage, compute everything else with the product."""
        name, kwargs = _name_of(func), kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if name in _FREE:
                return func(*args, **kwargs)
        if name in ("is_leaf", "retains_grad"):  # it is computed: an optimiser must not take it for a parameter
            return False
        target = args[0] if args else next(iter(kwargs.values()), None)
        written = (target, kwargs.get("out")) if name in _REFUSED or _writes(name) else kwargs.get("out")
        for leaf in pytree.tree_leaves(written):
            if isinstance(leaf, EffectiveWeight):
                raise WeightError(_refusal(leaf, name))
        if isinstance(target, EffectiveWeight):
            if name in ("detach", "data"):  # still read-only: a write into a copy would be lost in silence
                return EffectiveWeight(target._module, target._param, False)
            if name == "__deepcopy__":
                return target.product().detach().clone()
        args, kwargs = pytree.tree_map_only(EffectiveWeight, EffectiveWeight.product, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares its own default with other names
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse: below autograd the adapter's gradient would be lost."""
        target = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, EffectiveWeight))
        raise WeightError(_refusal(target, str(func)))


_FREE = frozenset(
    "dtype device shape ndim layout requires_grad grad grad_fn is_cuda is_cpu is_meta is_quantized is_sparse "
    "is_nested is_mps is_xpu itemsize nbytes names size dim ndimension numel nelement stride is_contiguous element_size "
    "is_floating_point is_complex is_signed get_device __hash__ __len__ output_nr is_inference".split()
)
_REFUSED = frozenset(
    "data_ptr storage untyped_storage _typed_storage storage_offset __reduce_ex__ register_hook retain_grad backward "
    "requires_grad_ __dlpack__ __setitem__ __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __ipow__ __imod__ "
    "__iand__ __ior__ __ixor__ __ilshift__ __irshift__ is_shared __array_interface__".split()
)


def _name_of(func: Any) -> str:
    # An attribute arrives as the __get__ or __set__ of its descriptor.
    name = str(getattr(func, "__name__", func))
    if name in ("__get__", "__set__") and hasattr(func, "__self__"):
        return str(func.__self__.__name__) + ("" if name == "__get__" else " =")
    return name


def _writes(name: str) -> bool:
    return name.endswith(" =") or (name.endswith("_") and not name.endswith("__"))


def _refusal(weight: EffectiveWeight, name: str) -> str:
    slot = weight._module.__dict__["_sara"].slots[weight._param]
    return (
        f"{slot.site} is adapted: reading it gives W + U·diag(λ)·V, which has no storage of its own, so {name} cannot "
        f"work on it. Use `.{base_attribute(slot.param)}` for the base, `.detach().clone()` for a copy of the effective "
        "weight, or sarac.fold for a plain model."
    )
