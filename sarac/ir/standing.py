"""Models computed with other weights than they hold, each made for the one call that reads it: no second copy of a model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Made = Mapping[int, Callable[[], Tensor]]  # by the id of the parameter that stands for it
# What asks a tensor for facts alone, by the function's name or that of the attribute's descriptor.
_FACTS = frozenset(
    "size dim ndimension numel nelement stride is_contiguous element_size is_floating_point is_complex get_device shape dtype "
    "device ndim layout requires_grad grad grad_fn is_cuda is_cpu is_meta is_leaf itemsize nbytes __hash__ __len__".split()
)


class Standing(TorchFunctionMode):
    """Within it every computation with these parameters reads what is made for them, which is gone after it."""

    def __init__(self, made: Made) -> None:
        super().__init__()
        self._made = made

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function of what is made; facts are asked of the parameter itself."""
        if not _asks(func):
            args, kwargs = pytree.tree_map_only(Tensor, self._of, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _of(self, tensor: Tensor) -> Tensor:
        make = self._made.get(id(tensor))
        return tensor if make is None else make()


class Widened(TorchFunctionMode):
    """Within it every computation is in a wider dtype; tensors stay in theirs, and are cast for each call that reads them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function of wider tensors; what is written in place is written in its own dtype."""
        kwargs = kwargs or {}
        if _asks(func):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        target = args[0] if name.endswith("_") and not name.endswith("__") and args else kwargs.get("out")
        wanted = target.dtype if isinstance(target, Tensor) and target.is_floating_point() else self._dtype

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(wanted) if tensor.is_floating_point() and tensor.dtype != wanted else tensor

        args, kwargs = pytree.tree_map_only(Tensor, cast, (args, kwargs))
        return func(*args, **kwargs)


@contextmanager
def widened(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within, what `model` computes is computed in a wider dtype; transformers' fused experts, which know few, are left out."""
    named = "_experts_implementation"
    configs = {id(c): c for m in model.modules() if getattr(c := getattr(m, "config", None), named, None) is not None}
    before = [(config, getattr(config, named)) for config in configs.values()]
    try:
        for config, _ in before:
            setattr(config, named, "eager")
        with Widened(dtype):
            yield
    finally:
        for config, chosen in before:
            setattr(config, named, chosen)


def _asks(func: Any) -> bool:
    """Whether a function asks a tensor for facts, not for values."""
    name = str(getattr(func, "__name__", ""))
    if name in ("__get__", "__set__"):
        name = str(getattr(getattr(func, "__self__", None), "__name__", ""))
    return name in _FACTS
