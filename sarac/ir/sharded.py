"""Sharded tensors and modules, known without an import: these take seconds to load, and who has one has loaded them."""

import sys
from typing import TYPE_CHECKING, TypeGuard

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(value: object) -> "TypeGuard[DTensor]":
    """Whether this is a DTensor."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(value, kind)


def fsdp_class() -> type | None:
    """The class that FSDP2 puts above a module's own; None where nothing can have one."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


def fsdp_runs() -> bool:
    """Whether a tensor may be one that FSDP2 refills: it is loaded, and there is a process group."""
    return fsdp_class() is not None and torch.distributed.is_initialized()
