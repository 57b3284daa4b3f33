"""Whether a trace of a forward holds for every call: what Python ran while it was traced, and what a trace would freeze.

A graph that takes a forward's place must be what that forward does in every later call. Branches on anything but the module's
own attributes (which are guarded), loops, `with` and `try`, questions about types, changing globals, random draws outside of
torch's operators and grad or autocast modes of its own are not in a graph: such a module keeps its forward.
"""

import builtins
import dis
import gc
import random
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

_JUMPS = {*dis.hasjrel, *dis.hasjabs}
# Instructions between the read of `self` and the jump that tests one of its attributes.
_OF_ATTRIBUTES = {"LOAD_ATTR", "LOAD_CONST", "COMPARE_OP", "IS_OP", "UNARY_NOT", "CACHE", "TO_BOOL", "EXTENDED_ARG"}
_QUESTIONS = {"isinstance", "issubclass", "type", "hasattr", "getattr", "callable", "globals", "locals", "vars", "id", "open"}
_PACKAGES = {"torch", "math", "operator", "functools", "typing", "einops", "transformers", "timm"}
_CONSTANTS = (bool, int, float, complex, str, bytes, tuple, type(None), torch.dtype, torch.device)


@dataclass
class Watch:
    """What was seen; `frozen` is the first reason why the trace does not hold for every call, "" where it does."""

    frozen: str = ""
    seen: dict[types.CodeType, None] = field(default_factory=dict)
    mode: Any = None

    def call(self, frame: types.FrameType, event: str, _: Any) -> None:
        """Look at one function that is being entered; for sys.setprofile."""
        top = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if event != "call" or self.frozen or top in ("torch", "sarac", "builtins") or top in sys.stdlib_module_names:
            return
        if _mode() != self.mode:
            self.frozen = "it sets a grad or autocast mode of its own"
        elif frame.f_code not in self.seen:
            self.seen[frame.f_code] = None
            self.frozen = _branches(frame.f_code) or _reads(frame)


@contextmanager
def watching() -> Iterator[Watch]:
    """Watch what Python runs for a while; random generators are put back, and a draw from one counts as frozen."""
    watch, before = Watch(mode=_mode()), _generators()
    profile, collecting = sys.getprofile(), gc.isenabled()
    gc.disable()  # what others have registered with it would run here, and is not the forward's
    sys.setprofile(watch.call)
    try:
        yield watch
    finally:
        sys.setprofile(profile)
        if collecting:
            gc.enable()
        if not _same(before, _generators()):
            watch.frozen = watch.frozen or "it draws random numbers"
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002  the legacy generator is the one that models draw from
            torch.random.set_rng_state(before[2])


def _mode() -> tuple[Any, ...]:
    kinds = ("cpu", "cuda")
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *(torch.is_autocast_enabled(kind) for kind in kinds))


def _generators() -> tuple[Any, Any, torch.Tensor]:
    return random.getstate(), np.random.get_state(), torch.random.get_rng_state()  # noqa: NPY002  as above


def _same(one: tuple[Any, Any, torch.Tensor], two: tuple[Any, Any, torch.Tensor]) -> bool:
    legacy = one[1][2:] == two[1][2:] and bool(np.array_equal(one[1][1], two[1][1]))
    return one[0] == two[0] and legacy and torch.equal(one[2], two[2])


def _branches(code: types.CodeType) -> str:
    """Why a function may take another way in another call: only tests of its first argument's attributes are none."""
    if getattr(code, "co_exceptiontable", b""):
        return f"{code.co_name} has a `with` or `try` block"
    steps = list(dis.get_instructions(code))
    for i, step in enumerate(steps):
        if step.opcode in _JUMPS and step.opname not in ("JUMP_FORWARD", "RESUME"):
            back = i - 1
            while back >= 0 and steps[back].opname in _OF_ATTRIBUTES:
                back -= 1
            own = steps[back].opname == "LOAD_FAST" and code.co_argcount and steps[back].argval == code.co_varnames[0]
            if not own or "BACKWARD" in step.opname or step.opname == "FOR_ITER":
                return f"{code.co_name} has a branch or a loop"
    return ""


def _reads(frame: types.FrameType) -> str:
    """What a function reads beside its arguments that may be another thing in another call."""
    code = frame.f_code
    for step in dis.get_instructions(code):
        name = step.argval
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            value = frame.f_globals.get(name, getattr(builtins, str(name), None))
            if name in _QUESTIONS or not _settled(value):
                return f"{code.co_name} reads {name}"
        elif step.opname in ("LOAD_DEREF", "LOAD_CLASSDEREF") and name in code.co_freevars:
            value = frame.f_locals.get(name)
            if not (_settled(value) or isinstance(value, _CONSTANTS)):
                return f"{code.co_name} closes over {name}"
    return ""


def _settled(value: Any) -> bool:
    """Whether a global is a thing of code and no state."""
    if isinstance(value, types.ModuleType):
        return value.__name__.partition(".")[0] in _PACKAGES
    return isinstance(value, type) or (callable(value) and not isinstance(value, torch.nn.Module))
