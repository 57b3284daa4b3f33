"""What an adapted class overrides besides its forward: nothing may exchange a base in silence, copies keep what they need."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sarac.ir.calls import forget
from sarac.ir.errors import WeightError
from sarac.ir.sharded import is_sharded
from sarac.ir.weight import EffectiveWeight, settle


def overrides(base: type, params: tuple[str, ...]) -> dict[str, Any]:
    """The methods of an adapted class over `base` that guard these parameters, by name."""
    return {
        "__setattr__": _setter(base, params),
        "__delattr__": _deleter(base, params),
        "register_parameter": _registrar(base, params),
        "__deepcopy__": _deepcopy,
        "__copy__": _copy,
        "__reduce_ex__": _reduce,
        "_load_from_state_dict": _loader(base, params),
        "_apply": _mover(base),
        "extra_repr": _repr(base),
    }


def _setter(base: Any, params: tuple[str, ...]) -> Callable[..., None]:
    def __setattr__(self: nn.Module, name: str, value: Any) -> None:  # noqa: N807
        if isinstance(value, Tensor) and self.__dict__.get("_is_replica"):
            self._parameters[name] = value  # type: ignore[assignment]  # DataParallel's copies are no leaves
            return
        if name in params:
            _require_assignable(self, name, value)
        base.__setattr__(self, name, value)

    return __setattr__


def _registrar(base: Any, params: tuple[str, ...]) -> Callable[..., None]:
    def register_parameter(self: nn.Module, name: str, param: Any) -> None:
        if name in params or isinstance(param, EffectiveWeight):  # which torch's pruning would make a parameter of its own
            _require_assignable(self, name if name in params else param._param, param)
        base.register_parameter(self, name, param)

    return register_parameter


def _require_assignable(module: nn.Module, name: str, value: Any) -> None:
    # FSDP2 swaps sharded for whole parameters and back through this door: one of the two is a DTensor.
    sharded = is_sharded(value) or is_sharded(module._parameters.get(name))
    if not (sharded or "_sara_loading" in module.__dict__):
        raise WeightError(
            f"{module.__dict__['_sara'].slots[name].site} is adapted and cannot be assigned: its factors belong to the present "
            "base. Fold the model first (sarac.fold), or change the source model and transform it again."
        )


def _deleter(base: Any, params: tuple[str, ...]) -> Callable[..., None]:
    def __delattr__(self: nn.Module, name: str) -> None:  # noqa: N807
        if name in params:
            site = self.__dict__["_sara"].slots[name].site
            raise WeightError(f"{site} is adapted and cannot be taken off its module: fold the model first (sarac.fold).")
        base.__delattr__(self, name)

    return __delattr__


def in_shape(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A weight that save_pretrained laid flat, as it was; any other tensor as it is."""
    return tensor.reshape(shape) if tensor.ndim == 1 and tensor.numel() == shape.numel() else tensor


def _loader(base: Any, params: tuple[str, ...]) -> Callable[..., None]:
    def _load_from_state_dict(self: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
        for param in params:
            own, given = self._parameters[param], state.get(prefix + param)
            if own is not None and isinstance(given, Tensor):
                state[prefix + param] = in_shape(given, own.shape)
        forget()
        self.__dict__["_sara_loading"] = True  # with assign=True the state dict's base takes the place of this one
        try:
            base._load_from_state_dict(self, state, prefix, *args)
        finally:
            del self.__dict__["_sara_loading"]
        settle(self)

    return _load_from_state_dict


def _mover(base: Any) -> Callable[..., Any]:
    def _apply(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forget()  # what moves by `.data`, or is swapped, is not what was looked at
        before = {name: one.dtype for name, one in self._parameters.items() if one is not None}
        found = base._apply(self, *args, **kwargs)
        now = {name: one for name, one in self._parameters.items() if one is not None}
        if any(one.dtype != before.get(name) for name, one in now.items()) and not any(one.is_meta for one in now.values()):
            settle(self)  # factors that are singular vectors to the digits of one dtype may not be to another's
        return found

    return _apply


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    new = self.__class__.__new__(self.__class__)
    memo[id(self)] = new
    new.__dict__.update(copy.deepcopy(self.__dict__, memo))
    for slot in new.__dict__["_sara"].slots.values():
        for tensor in slot.tensors(new).values():  # a copied Parameter forgets its attributes
            tensor.__dict__["_sara_lr"] = slot.adapter.lr
    return new


def _copy(self: nn.Module) -> nn.Module:
    new = self.__class__.__new__(self.__class__)
    new.__dict__.update(self.__dict__)
    return new


def _reduce(self: nn.Module, protocol: Any) -> Any:
    raise WeightError(
        f"An adapted {type(self).__name__} cannot be pickled: its forward was made for it. Write the model with "
        "sarac.save or the adapter with sarac.save_adapter, or save its state_dict()."
    )


def _repr(base: Any) -> Callable[[nn.Module], str]:
    def extra_repr(self: nn.Module) -> str:
        parts = [f"{s.param}: {s.adapter.method} rank {s.adapter.rank}" for s in self.__dict__["_sara"].slots.values()]
        return ", ".join(part for part in (base.extra_repr(self), *parts) if part)

    return extra_repr
