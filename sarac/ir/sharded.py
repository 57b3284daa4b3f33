"""Sharded tensors and modules, known without an import: these take seconds to load, and who has one has loaded them."""

import sys
from typing import TYPE_CHECKING, TypeGuard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(value: object) -> "TypeGuard[DTensor]":
    """Whether this is a DTensor."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(value, kind)


def fsdp_class() -> type | None:
    """The class that FSDP2 puts above a module's own; None where nothing can have one."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
