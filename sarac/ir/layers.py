"""The modules that carry adapters at run time.

An adapted module keeps its place, its state-dict names and its class (it gets a subclass of it). The base parameter
stays in `_parameters`; reading the attribute gives the *effective* weight W + U diag(λ) V, so whoever computes with
`layer.weight` computes with what the model computes with (law 2). What must hold, each seen to break otherwise:

- the getter never raises AttributeError, or `nn.Module.__getattr__` would hand out the base in silence;
- a sharded parameter is given as it is: FSDP2 reads the attribute back and would adopt the product as the base;
- factors are frozen, contiguous Parameters, not buffers: DDP rebroadcasts buffers, FSDP2 does not shard them.
"""

import contextlib
import copy
import functools
import hashlib
import linecache
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributed.tensor import DTensor

from sarac.ir.errors import RewriteError, WeightError
from sarac.ir.weight import EffectiveWeight, Guard, Slot, State, base_attribute, effective

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, *_FUNCTIONS)


@dataclass(frozen=True)
class Forward:
    """A rewritten forward for each mode; the sources are the identity, so that equal layers share one class."""

    train: Callable[..., Any]
    evaluate: Callable[..., Any]
    source: str


def compile_forward(train: fx.Graph, evaluate: fx.Graph) -> Forward:
    """The two graphs as functions of (self, …)."""
    codes = [graph.python_code("self") for graph in ((train,) if train is evaluate else (train, evaluate))]
    identity = "\n".join(
        code.src + "".join(sorted(f"\n# {name} = {id(value)}" for name, value in code.globals.items())) for code in codes
    )
    functions = [_function(code.src, code.globals) for code in codes]
    return Forward(functions[0], functions[-1], identity)


def simple(value: Any) -> bool:
    """Whether a later comparison can tell that an attribute still is what the forward was specialised to."""
    if isinstance(value, tuple):
        return all(simple(item) for item in value)
    return isinstance(value, _SIMPLE)


def install(
    module: nn.Module,
    slots: Sequence[Slot],
    tensors: Mapping[str, Mapping[str, nn.Parameter]],
    forward: Forward | None,
    guards: tuple[Guard, ...] = (),
) -> None:
    """Turn `module` into its adapted self, in place; `tensors` by parameter name, then role.

    Without `forward` the class's own forward stays and reads the effective weight.
    """
    for slot in slots:
        for role, tensor in tensors[slot.param].items():
            name = slot.attribute(role)
            _require_free(module, slot.site, name)
            module.register_parameter(name, tensor)
        _require_free(module, slot.site, base_attribute(slot.param))
    module.__dict__["_sara"] = State({slot.param: slot for slot in slots}, guards)
    module.__class__ = _adapted_class(type(module), tuple(slot.param for slot in slots), forward)


def _require_free(module: nn.Module, site: str, name: str) -> None:
    if hasattr(module, name):
        raise RewriteError(f"{site}: its module already has an attribute {name!r}; rename it and try again.")


def uninstall(module: nn.Module) -> None:
    """Turn an adapted module back into its plain self, with its base weights."""
    for slot in module.__dict__["_sara"].slots.values():
        for role in slot.tensors(module):
            del module._parameters[slot.attribute(role)]
    del module.__dict__["_sara"]
    module.__class__ = type(module).__sara_base__  # type: ignore[attr-defined]


def adapted(root: nn.Module) -> Iterator[tuple[str, nn.Module, State]]:
    """Every adapted module under `root` with its path and state."""
    for path, module in root.named_modules():
        if "_sara" in module.__dict__:
            yield path, module, module.__dict__["_sara"]


def _holds(module: nn.Module, guard: Guard) -> bool:
    """Whether what the forward was specialised to still is so; a method counts as its function."""
    now: Any = module
    for name in guard[0]:
        now = getattr(now, name)
    now, then = getattr(now, "__func__", now), guard[1]
    return now is then or (type(now) is type(then) and simple(then) and now == then)


def _getter(param: str) -> Callable[[nn.Module], Any]:
    def get(self: nn.Module) -> Any:
        base = self._parameters.get(param)
        state = self.__dict__.get("_sara")
        if state is None or not state.enabled or base is None or isinstance(base, DTensor):
            return base
        if torch.compiler.is_compiling():  # a plain product can be captured; a handle cannot
            return _product(self, param)
        slot = state.slots[param]
        trains = any(tensor.requires_grad for tensor in slot.tensors(self).values())
        return EffectiveWeight(self, param, trains or base.requires_grad)

    return get


def _product(module: nn.Module, param: str) -> Any:
    try:
        return effective(module, param)
    except AttributeError as error:  # nn.Module.__getattr__ would answer it with the base, in silence
        raise WeightError(f"The effective weight {param} cannot be computed: {error}.") from error


def _base_getter(param: str) -> Callable[[nn.Module], Any]:
    return lambda self: self._parameters[param]


_classes: dict[tuple[type, tuple[str, ...], str], type] = {}


def _adapted_class(base: type, params: tuple[str, ...], forward: Forward | None) -> type:
    key = (base, params, forward.source if forward else "")
    if key not in _classes:
        body: dict[str, Any] = {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
        }
        body |= {
            "__sara_base__": base,
            "__setattr__": _setter(base, params),
            "__delattr__": _deleter(base, params),
            "register_parameter": _registrar(base, params),
            "__deepcopy__": _deepcopy,
            "__copy__": _copy,
            "_load_from_state_dict": _loader(base, params),
        }
        body |= {"__reduce_ex__": _reduce, "extra_repr": _repr(base)}
        for param in params:
            body[param] = property(_getter(param), doc="The effective weight W + U diag(λ) V.")
            body[base_attribute(param)] = property(_base_getter(param), doc="The untouched base weight.")
        if forward is not None:
            body["forward"] = _dispatch(base, forward)
        _classes[key] = type(base.__name__, (base,), body)
    return _classes[key]


def _dispatch(base: Any, forward: Forward) -> Callable[..., Any]:
    @functools.wraps(base.forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self._sara
        # A trace stands for tensors: None, a number or a tuple may take another branch.
        given = all(isinstance(value, Tensor) for value in (*args, *kwargs.values()))
        if state.enabled and given and all(_holds(self, guard) for guard in state.guards):
            return (forward.train if self.training else forward.evaluate)(self, *args, **kwargs)
        return base.forward(self, *args, **kwargs)  # reads the effective weight, or the base when disabled

    return call


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
    sharded = isinstance(value, DTensor) or isinstance(module._parameters.get(name), DTensor)
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
        self.__dict__["_sara_loading"] = True  # with assign=True the state dict's base takes the place of this one
        try:
            base._load_from_state_dict(self, state, prefix, *args)
        finally:
            del self.__dict__["_sara_loading"]

    return _load_from_state_dict


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


def _function(source: str, names: Mapping[str, Any]) -> Callable[..., Any]:
    # A file name of its own and a linecache entry make tracebacks show the generated lines.
    file = f"<sarac region {hashlib.sha256(source.encode()).hexdigest()[:12]}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    namespace = dict(names)
    exec(compile(source, file, "exec"), namespace)
    made: Callable[..., Any] = namespace["forward"]
    return made


@contextlib.contextmanager
def evaluating(root: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every module gets its own mode back."""
    modes = [(module, module.training) for module in root.modules()]
    root.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
