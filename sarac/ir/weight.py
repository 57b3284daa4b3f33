"""The effective weight: what an adapted module's weight attribute gives, and the slot that says what adapts it."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sarac.ir.adapters import Adapter
from sarac.ir.calls import LEVEL, PINNED, PLAIN, TWO_SIDED, asked_of, even, forget, singular
from sarac.ir.errors import NotFoldable, WeightError
from sarac.ir.layout import MATRIX, TRANSPOSED, Layout, dense
from sarac.ir.sharded import is_sharded

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

    def serves(self, layout: Layout) -> bool:
        """Whether the factors serve a weight that lies like this: as their own, or turned over where none is borrowed."""
        return layout == self.layout or (layout == self.layout.flipped and not self.adapter.borrowed)

    @property
    def schedule(self) -> str:
        """The module attribute that names the schedule of its calls while it trains (sarac.ir.schedules)."""
        return self.attribute("schedule")

    @property
    def siblings(self) -> str:
        """The module attribute that holds who projects an input together with it (sarac.ir.siblings), or None."""
        return self.attribute("siblings")

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


def fixed(slot: Slot, module: nn.Module) -> str:
    """Why the calls of a slot run by the formula's own terms and no other schedule; "" where several serve."""
    adapter, weight = slot.adapter, module._parameters[slot.param]
    if shaped := no_matrix(len(adapter.parts), slot.layout):
        return shaped
    if adapter.borrowed:
        return "its router is that of another weight"
    if {"u", "v"} & set(adapter.trainable):
        return "its factors train"
    if type(weight) not in (nn.Parameter, Tensor):
        return f"it is stored as a {type(weight).__name__}"
    tensors = slot.tensors(module)
    if weight is None or weight.is_meta:
        return "it has no values yet"
    if not singular(slot.layout.matrix(weight), *(tensors[role] for role in ("u", "v", "scale"))):
        return "its factors are no singular vectors of it, or not to the last digits"
    return ""


def no_matrix(parts: int, layout: Layout) -> str:
    """Why a weight that lies like this has no other schedules; "" for one matrix."""
    return "it is a stack of matrices" if parts else "" if layout in (MATRIX, TRANSPOSED) else "it is no plain matrix"


def settle(module: nn.Module) -> None:
    """Note which schedules serve an adapted module's slots: compiled code cannot look at values when it runs."""
    forget()
    for slot in module.__dict__["_sara"].slots.values():
        weight = module._parameters[slot.param]
        if weight is None or is_sharded(weight):
            continue
        asked = asked_of(module.__dict__[slot.schedule])
        if asked not in (PLAIN, TWO_SIDED):
            level = not slot.adapter.foldable and even(slot.tensors(module)["scale"])
            module.__dict__[slot.schedule] = asked + (PINNED if fixed(slot, module) else LEVEL if level else "")


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
    """What reading an adapted weight gives: dtype, device and shape at no cost, the product at the first computation.

    A linear operation with it, or with its transpose, takes the adapter's own path: so a routed one works there too.
    """

    _module: nn.Module
    _param: str
    _turned: bool
    _held: nn.Parameter

    @staticmethod
    def __new__(cls, module: nn.Module, param: str, trains: bool, turned: bool = False) -> "EffectiveWeight":
        """The handle on `module`'s parameter, or on its transpose; `trains` says whether gradients flow to it."""
        held: Any = module._parameters[param]
        base = held.mT if turned else held
        handle: EffectiveWeight = Tensor._make_wrapper_subclass(
            cls, base.shape, strides=base.stride(), dtype=base.dtype, device=base.device, requires_grad=trains
        )
        handle._module, handle._param, handle._turned, handle._held = module, param, turned, held
        torch._C._set_throw_on_mutable_data_ptr(handle)  # to_dlpack asks no one and would hand out the address 0
        return handle

    def product(self) -> Tensor:
        """The effective weight as a plain tensor; it is computed once in a forward, however often that reads it."""
        held = self._module._parameters
        if self._param not in held:  # torch.nn.utils.weight_norm takes it out before it computes: put it back
            rest = dict(held)
            held.clear()
            held.update({self._param: self._held, **rest})
            raise WeightError(_refusal(self, "taking it out of its module"))
        kept = self._module.__dict__.get(PRODUCTS, {})
        key = (self._param, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        value = kept[key] = kept.get(key) if key in kept else effective(self._module, self._param)
        value = value.mT if self._turned else value
        return value if self.requires_grad else value.detach()

    def through(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """What a linear operation with this weight gives by the adapter's own path; None where it is no such operation."""
        slot = self._module.__dict__["_sara"].slots[self._param]
        name = _name_of(func)
        names = ("input", "weight", "bias") if name == "linear" else ("input", "weight")
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        x, bias = call.get("input"), call.get("bias")
        plain = isinstance(x, Tensor) and not isinstance(x, EffectiveWeight) and not isinstance(bias, EffectiveWeight)
        if name not in ("linear", "matmul", "__matmul__") or call.get("weight") is not self or not plain or len(call) > 3:
            return None
        lies = MATRIX if (name == "linear") != self._turned else TRANSPOSED
        tensors = slot.tensors(self._module)
        detached = not self.requires_grad and any(tensor.requires_grad for tensor in tensors.values())
        if self.ndim != 2 or not slot.serves(lies) or detached:
            return None
        assert isinstance(x, Tensor)
        base: Any = self._module._parameters[self._param]
        base = base.mT if self._turned else base
        if lies != slot.layout:
            tensors |= {"u": tensors["v"].mT, "v": tensors["u"].mT}
        op = "linear" if name == "linear" else "matmul"
        found: Tensor = slot.adapter.linear(x, base, bias, tensors, getattr(self._module, slot.schedule), op)
        return found

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
                return EffectiveWeight(target._module, target._param, False, target._turned)
            if target.ndim == 2 and (name in ("t", "T", "mT") or (name == "transpose" and _swaps(args[1:]))):
                return EffectiveWeight(target._module, target._param, target.requires_grad, not target._turned)
            if name == "__deepcopy__":
                return target.product().detach().clone()
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        found = weight.through(func, args, kwargs) if isinstance(weight, EffectiveWeight) else None
        if found is not None:
            return found
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


def _swaps(dims: tuple[Any, ...]) -> bool:
    return len(dims) == 2 and {dim % 2 for dim in dims if isinstance(dim, int)} == {0, 1}


def _writes(name: str) -> bool:
    return name.endswith(" =") or (name.endswith("_") and not name.endswith("__"))


def _refusal(weight: EffectiveWeight, name: str) -> str:
    slot = weight._module.__dict__["_sara"].slots[weight._param]
    return (
        f"{slot.site} is adapted: reading it gives W + U·diag(λ)·V, which has no storage of its own, so {name} cannot "
        f"work on it. Use `.{base_attribute(slot.param)}` for the base, `.detach().clone()` for a copy of the effective "
        "weight, or sarac.fold for a plain model."
    )
