"""What a graph gives beside what torch gives: nested outputs by dotted names, in one order and form."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sarac.ir.check import leaves
from sarac.ir.errors import ExportError

_CACHES = ("past_key_values", "past_buckets_states", "cache_params", "mems")  # what use_cache adds to the outputs


def named_leaves(outputs: Any) -> dict[str, Tensor]:
    """Every tensor of a model's nested outputs by its dotted path, such as "logits" or "hidden_states.0"."""
    return {dotted(path): tensor for path, tensor in leaves(outputs)}


def paired(outputs: Mapping[str, Tensor], reference: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `Runtime.run` gave beside the same outputs of torch, in one order and form, ready for `check.difference`.

    Paired by name, or by order where the graph's names are others. A cache that torch returns and the graph does not
    is left out; any other difference in number is an ExportError.
    """
    theirs = named_leaves(reference)
    name_of = {name: name if name in theirs else name.removeprefix("output.") for name in outputs}
    wanted = {name: t for name, t in theirs.items() if name in name_of.values() or not name.startswith(_CACHES)}
    if len(wanted) != len(outputs):
        raise ExportError(
            f"The ONNX model gives {len(outputs)} outputs ({', '.join(outputs)}) and torch {len(wanted)} "
            f"({', '.join(wanted)}): call the model as it was captured, or export it again as you call it."
        )
    if set(name_of.values()) == set(wanted):
        return dict(outputs), {name: wanted[name_of[name]] for name in outputs}
    return dict(outputs), dict(zip(outputs, wanted.values(), strict=True))


def dotted(path: str) -> str:
    """A path of pytree's as a dotted name."""
    return ".".join(re.findall(r"\w+", path))
