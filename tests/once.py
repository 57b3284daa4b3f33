"""torch's tables of operators for an ONNX export, which it makes anew for each export: made once a worker.

They hang on the installed packages alone, and were more than half of what a small export took. What tests start as commands
of their own makes them as ever.
"""

import collections.abc
import functools
import typing
from typing import Any

import torch
from torch._export import utils
from torch.export import decomp_utils, exported_program
from torch.onnx._internal.exporter import _registration


def share_tables() -> None:
    _share_registry(_registration.ONNXRegistry)
    _share_composite(utils, decomp_utils, exported_program)
    # In an annotation that torch evaluates some 10,000 times an export: typing keeps what it made, collections.abc does not.
    if vars(torch._ops).get("Callable") is collections.abc.Callable:
        vars(torch._ops)["Callable"] = typing.Callable


def _share_registry(kind: Any) -> None:
    made = functools.cache(kind.from_torchlib)

    def from_torchlib(*args: Any, **kwargs: Any) -> Any:
        """A registry of its own for whoever asks, of the functions that all share."""
        found, kept = kind(), made(*args, **kwargs)
        found._opset_version = kept.opset_version
        found.functions = {target: list(functions) for target, functions in kept.functions.items()}
        return found

    kind.from_torchlib = staticmethod(from_torchlib)


def _share_composite(*users: Any) -> None:
    found = utils._collect_all_valid_cia_ops
    made = functools.cache(lambda *_: frozenset(found()))

    def collect() -> set[Any]:
        """The set as it was for these operators: another, where one has been registered since."""
        registered = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")
        return set(made(tuple(registered), tuple(torch.ops._dir)))

    for module in users:
        module._collect_all_valid_cia_ops = collect
