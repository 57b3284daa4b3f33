"""The modules that carry adapters at run time.

An adapted module keeps its place, its state-dict names and its class (it gets a subclass of it). The base parameter
stays in `_parameters`; reading the attribute gives the *effective* weight W + U diag(λ) V, so whoever computes with
`layer.weight` computes with what the model computes with (law 2). What must hold, each seen to break otherwise:

- the getter never raises AttributeError, or `nn.Module.__getattr__` would hand out the base in silence;
- a sharded parameter is given as it is: FSDP2 reads the attribute back and would adopt the product as the base;
- factors are frozen, contiguous Parameters, not buffers: DDP rebroadcasts buffers, FSDP2 does not shard them.
"""

import contextlib
import functools
import hashlib
import linecache
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sarac.ir.calls import AUTO
from sarac.ir.errors import RewriteError, WeightError
from sarac.ir.guarded import overrides
from sarac.ir.sharded import is_sharded
from sarac.ir.weight import PRODUCTS, EffectiveWeight, Guard, Slot, State, base_attribute, effective, settle

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
        for name in (slot.schedule, slot.siblings, base_attribute(slot.param)):
            _require_free(module, slot.site, name)
        module.__dict__[slot.schedule], module.__dict__[slot.siblings] = AUTO, None
    module.__dict__["_sara"] = State({slot.param: slot for slot in slots}, guards)
    settle(module)
    bound = _bound_forwards(module)
    module.__class__ = _adapted_class(type(module), tuple(slot.param for slot in slots), forward)
    _bind_forwards(module, bound)


def hooked(module: nn.Module) -> bool:
    """Whether a forward on the instance ends in the class's own, as that of accelerate's hooks does: it can be bound anew."""
    return bool(_bound_forwards(module))


def _bound_forwards(module: nn.Module) -> list[str]:
    """The instance's attributes that are the class's own forward; accelerate keeps it as `_old_forward` behind its hooks."""
    own = type(module).forward
    return [name for name in ("forward", "_old_forward") if getattr(module.__dict__.get(name), "__func__", None) is own]


def _bind_forwards(module: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        module.__dict__[name] = types.MethodType(type(module).forward, module)


def _require_free(module: nn.Module, site: str, name: str) -> None:
    if hasattr(module, name):
        raise RewriteError(f"{site}: its module already has an attribute {name!r}; rename it and try again.")


def uninstall(module: nn.Module) -> None:
    """Turn an adapted module back into its plain self, with its base weights."""
    for slot in module.__dict__["_sara"].slots.values():
        for role in slot.tensors(module):
            del module._parameters[slot.attribute(role)]
        for name in (slot.schedule, slot.siblings):
            module.__dict__.pop(name, None)
    del module.__dict__["_sara"]
    bound = _bound_forwards(module)
    module.__class__ = type(module).__sara_base__  # type: ignore[attr-defined]
    _bind_forwards(module, bound)


def adapted(root: nn.Module) -> Iterator[tuple[str, nn.Module, State]]:
    """Every adapted module under `root` with its path and state."""
    for path, module in root.named_modules():
        if "_sara" in module.__dict__:
            yield path, module, module.__dict__["_sara"]


def by_call(module: nn.Module, slot: Slot) -> bool:
    """Whether the module's own forward calls the adapter; else it reads the effective weight."""
    return slot.attribute("u") in getattr(type(module), "__sara_source__", "")


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
        if state is None or not state.enabled or base is None or is_sharded(base):
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


def _looker(base: Any, params: tuple[str, ...]) -> Callable[[nn.Module, str], Any]:
    """The class's own way to look for an attribute, which may find a base weight by another name."""

    def look(self: nn.Module, name: str) -> Any:
        found = base.__getattr__(self, name)
        return next((getattr(self, param) for param in params if found is self._parameters[param]), found)

    return look


_classes: dict[tuple[type, tuple[str, ...], str], type] = {}


def _adapted_class(base: Any, params: tuple[str, ...], forward: Forward | None) -> type:
    key = (base, params, forward.source if forward else "")
    if key not in _classes:
        body: dict[str, Any] = {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
        }
        body |= {"__sara_base__": base, "__sara_source__": key[2], **overrides(base, params)}
        for param in params:
            body[param] = property(_getter(param), doc="The effective weight W + U diag(λ) V.")
            body[base_attribute(param)] = property(_base_getter(param), doc="The untouched base weight.")
        body["forward"] = _dispatch(base, forward)
        if base.__getattr__ is not nn.Module.__getattr__:
            body["__getattr__"] = _looker(base, params)
        if issubclass(base, nn.RNNBase):  # it calls with a list of its weights that it keeps beside them
            body["_flat_weights"] = property(_flat_weights, lambda self, _: None)
            body["flatten_parameters"] = lambda self: None
        _classes[key] = type(base.__name__, (base,), body)
    return _classes[key]


def _flat_weights(self: Any) -> list[Any]:
    return [getattr(self, name) for name in self._flat_weights_names]


def _dispatch(base: Any, forward: Forward | None) -> Callable[..., Any]:
    @functools.wraps(base.forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self._sara
        # A trace stands for tensors: None, a number or a tuple may take another branch.
        given = forward is not None and all(isinstance(value, Tensor) for value in (*args, *kwargs.values()))
        if given and state.enabled and all(_holds(self, guard) for guard in state.guards):
            return (forward.train if self.training else forward.evaluate)(self, *args, **kwargs)  # type: ignore[union-attr]
        # It reads the effective weight, or the base when disabled.
        if torch.compiler.is_compiling() or PRODUCTS in self.__dict__:
            return base.forward(self, *args, **kwargs)
        self.__dict__[PRODUCTS] = {}
        try:
            return base.forward(self, *args, **kwargs)
        finally:
            self.__dict__.pop(PRODUCTS, None)

    return call


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
