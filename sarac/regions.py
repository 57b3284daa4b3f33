"""One module's own forward as an fx graph: children stay calls, and what the trace would freeze is found out."""

import contextlib
import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx import _symbolic_trace as symbolic

from sarac.ir.layers import simple
from sarac.watch import Watch, watching

_INTERNAL = frozenset(vars(nn.Module()))


class _RegionTracer(fx.Tracer):
    """Traces one module's own forward: every child stays a call, parameters and buffers are read where they are used."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not module_qualified_name.startswith("parametrizations.")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Go through the parts of a parameter that was split: how many they are does not depend on the input."""
        if all(node.op == "get_attr" for node in _roots(obj.node)):
            proxy: Any = obj
            with contextlib.suppress(Exception):  # what it can be evaluated to is no sequence
                return iter([proxy[i] for i in range(self._shape_of(obj.node).__len__())])
        return super().iter(obj)

    def _shape_of(self, node: Any) -> Any:
        """What a node over parameters alone gives, on the meta device."""
        if node.op == "get_attr":
            path, _, name = node.target.rpartition(".")
            owner = self.root.get_submodule(path)
            tensor: Any = (owner._parameters | owner._buffers)[name]  # getattr would give a proxy
            return torch.empty_like(tensor, device="meta")
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._shape_of)
        return (getattr(torch.Tensor, node.target) if node.op == "call_method" else node.target)(*args, **kwargs)


def _roots(node: fx.Node) -> Iterator[fx.Node]:
    if not node.all_input_nodes:
        yield node
    for source in node.all_input_nodes:
        yield from _roots(source)


@dataclass
class ForwardTrace:
    """One trace of one module in one mode, what it read off the module on the way, and what it would freeze."""

    graph: fx.Graph
    reads: dict[tuple[str, ...], Any]
    frozen: str = ""

    @classmethod
    def of(cls, module: nn.Module, training: bool) -> "ForwardTrace":
        """Trace `module`'s forward in that mode, on a shadow of it that shares its tensors."""
        notes = _Notes()
        shadow = notes.shadow(module, ())
        shadow.__dict__["training"] = training
        shadow.__dict__.pop("forward", None)  # of the instance; the class's own is traced
        notes.on = True
        own = not type(module).__module__.startswith("torch.nn.modules")  # torch's own layers are known
        with watching() if own else nullcontext(Watch()) as watch, notes.intercepting():
            found = cls(_RegionTracer().trace(shadow), notes.reads, watch.frozen)
        odd = [path for path, value in notes.reads.items() if not simple(value)]
        inputs = [node for node in found.graph.nodes if node.op == "placeholder"]
        if found.frozen:
            return found
        if any(name.startswith("_tensor_constant") for name in notes.writes):
            found.frozen = "it makes tensors of its own"
        elif notes.writes:
            found.frozen = f"it assigns {notes.writes[0]} while it runs"
        elif odd:
            found.frozen = f"it reads the attribute {'.'.join(odd[0])} of type {type(notes.reads[odd[0]]).__name__}"
        elif any(node.args or str(node.target).startswith("*") for node in inputs):
            found.frozen = "it takes optional arguments"
        elif any(node.op == "get_attr" and not _reachable(module, str(node.target)) for node in found.graph.nodes):
            found.frozen = "it makes tensors of its own"
        return found


@dataclass
class _Notes:
    """Every plain attribute that a forward reads or assigns, on its module and on the modules below, by path."""

    reads: dict[tuple[str, ...], Any] = field(default_factory=dict)
    writes: list[str] = field(default_factory=list)
    on: bool = False
    plain: bool = False  # whether a module looks for attributes by a way of its own
    intercepts: dict[str, Any] = field(default_factory=dict)
    _made: dict[int, nn.Module] = field(default_factory=dict)

    def shadow(self, module: nn.Module, path: tuple[str, ...]) -> nn.Module:
        """A copy that shares tensors, takes notes, and whose containers can be appended to without harm."""
        kind = type(module)
        self.plain |= kind.__getattr__ is not nn.Module.__getattr__
        if id(module) in self._made or type(kind) is not type:  # the latter: a compiled script
            return self._made.get(id(module), module)
        shadow = type(module).__new__(type(module))  # not copy.copy, which a parametrized module refuses
        self._made[id(module)] = shadow
        own = vars(module).items()
        shadow.__dict__ = {name: copy.copy(value) if isinstance(value, list | dict | set) else value for name, value in own}
        shadow.__dict__["_modules"] = {
            name: child if child is None else self.shadow(child, (*path, name)) for name, child in module._modules.items()
        }
        shadow.__class__ = self._recorder(type(module), path)
        return shadow

    @contextlib.contextmanager
    def intercepting(self) -> Iterator[None]:
        """Let the shadows take the calls and reads that fx takes by patching nn.Module.

        A patch walks over all subclasses there are, thousands once transformers is loaded; and it comes behind a child's own
        `__call__`, which then would run in the graph and in the child again.
        """
        new = getattr(symbolic, "_new_patcher", None)
        if new is None:
            yield
            return

        @contextlib.contextmanager
        def patching() -> Iterator[Any]:
            with new() as patcher:
                patch = patcher.patch_method

                def take(kind: type, name: str, function: Any, deduplicate: bool = True) -> None:
                    if kind is nn.Module and (name == "__call__" or (name == "__getattr__" and not self.plain)):
                        self.intercepts[name] = function
                    else:
                        patch(kind, name, function, deduplicate)

                patcher.patch_method = take
                yield patcher

        symbolic._new_patcher = patching
        try:
            yield
        finally:
            symbolic._new_patcher = new
            self.intercepts.clear()

    def _recorder(self, base: Any, path: tuple[str, ...]) -> type:
        notes = self

        class Recorder(base):  # type: ignore[misc]
            def __getattribute__(self, name: str) -> Any:
                value = super().__getattribute__(name)
                mode = name == "training" and path  # a child's mode is not this region's
                if notes.on and (mode or name not in _INTERNAL) and not name.startswith("__"):
                    value_or_function = getattr(value, "__func__", value)
                    own = name in object.__getattribute__(self, "__dict__")
                    if (own or simple(value_or_function)) and not callable(getattr(nn.Module, name, None)):
                        notes.reads[*path, name] = value_or_function
                return value

            def __getattr__(self, name: str) -> Any:
                take = notes.intercepts.get("__getattr__")
                return take(self, name) if take else super().__getattr__(name)

            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                take = notes.intercepts.get("__call__")
                return take(self, *args, **kwargs) if take else super().__call__(*args, **kwargs)

            def __setattr__(self, name: str, value: Any) -> None:
                if notes.on:
                    notes.writes.append(name)
                super().__setattr__(name, value)

        return Recorder


def _reachable(module: nn.Module, target: str) -> bool:
    path, _, name = target.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        return False
    return name in owner._parameters or name in owner._buffers
