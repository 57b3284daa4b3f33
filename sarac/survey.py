"""The figures of all sites of an adapted model together: those of sarac.ir.health, what calls keep, what a merge would lose."""

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor, nn

from sarac.ir.errors import CheckFailed, InputError, RewriteError
from sarac.ir.gates import Watch, slots
from sarac.ir.graph import ModelGraph
from sarac.ir.health import Health, equal_gates, health
from sarac.ir.layers import adapted, by_call
from sarac.passes.fold import Fold
from sarac.scheduling import schedule

Gradient = Callable[[Tensor], Tensor | None]
ROOM = 2**30  # bytes that every machine has which trains: less is no fault, however small the model
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in what torch.compile, DDP and DataParallel make of it."""
    while True:
        inner = getattr(model, "_orig_mod", model.module if isinstance(model, _WRAPPERS) else model)
        if inner is model:
            return model
        model = inner


def require_adapters(model: nn.Module) -> None:
    """Raise RewriteError where there is nothing to diagnose: no adapters, or switched-off ones."""
    states = [state for _, _, state in adapted(model)]
    if not states:
        raise RewriteError(f"{type(model).__name__} carries no adapters: transform it first (sarac.transform).")
    if not all(state.enabled for state in states):
        raise RewriteError("The adapters are switched off here (sarac.disabled), so there is nothing to see: leave that block.")


def measured(model: nn.Module, watch: Watch, gradient: Gradient, sizes: Mapping[str, float]) -> tuple[Health, ...]:
    """The figures of every site but what it keeps and what merging would lose; `sizes` are ‖W‖ by site."""
    return tuple(health(module, slot, sizes[slot.site], watch, gradient) for module, slot in slots(model))


def trained(
    model: nn.Module, groups: Sequence[Mapping[str, Any]], rates: Mapping[int, float]
) -> dict[str, dict[str, tuple[Any, ...]]]:  # fmt: skip
    """By site, of what trains: what the optimisers' groups lack, and the rates, which are given by tensor.

    Optimisers that have nothing of any adapter tell nothing: they are another part's, or hold flat pieces of what trains.
    """
    held = {id(one) for group in groups for one in group["params"]}
    roles = {slot.site: {role: slot.tensors(module)[role] for role in slot.adapter.trainable} for module, slot in slots(model)}
    if held.isdisjoint(id(one) for own in roles.values() for one in own.values()):
        return {}
    return {
        site: {
            "lacking": tuple(role for role, one in own.items() if one.requires_grad and id(one) not in held),
            "rates": tuple(rates.get(id(one)) for one in own.values()),
        }
        for site, own in roles.items()
    }


def most_tokens(sites: Sequence[Health]) -> int:
    """The rows of the widest call."""
    return max((one.tokens for one in sites), default=0)


def keeping(model: nn.Module, sites: Sequence[Health]) -> tuple[dict[str, int], dict[str, str]]:
    """The bytes that each site keeps for the backward, and its schedule; a weight read by others keeps its effective value.

    A site whose own module was not called while others were is taken to have the widest call's rows: another module reads it.
    """
    most, owners = most_tokens(sites), {slot.site: (module, slot) for module, slot in slots(model)}
    rows = {one.site: one.tokens or (most if one.grad else 0) for one in sites}
    tables = {count: {one.site: one for one in schedule(model, tokens=count).sites} for count in set(rows.values()) if count}
    kept, names = {}, {}
    for one in sites:
        found = tables[rows[one.site]][one.site] if rows[one.site] else None
        kept[one.site] = 0 if found is None else found.kept if by_call(*owners[one.site]) else one.base
        names[one.site] = found.schedule if found else ""
    return kept, names


def losses(model: nn.Module, gates: Mapping[str, Tensor]) -> dict[str, float]:
    """The share of each site's delta that folding would lose to rounding; of routed ones with these mean gates.

    Folding itself computes it, one weight at a time. A site whose merged weight its dtype does not hold has no figure.
    """
    try:
        graph = Fold(gates={**equal_gates(model), **gates}, pending=True)(ModelGraph(model, {}, {}))
    except (CheckFailed, RewriteError):  # a quantised base that does not hold it; a model that cannot be copied
        return {}
    for make in graph.waiting.values():
        try:
            make()
        except CheckFailed:
            continue
    return {site: one.surviving_delta for site, one in graph.folded.items()}


def require_room(memory: Any) -> None:
    """Raise InputError where `memory` is neither a number of bytes nor left out."""
    if memory is None:
        return
    if isinstance(memory, bool) or not isinstance(memory, Real) or not float(memory) >= 0.0:
        raise InputError(
            f"memory={memory!r} is no number of bytes: give 0 or more, or leave it out for as many as the model has."
        )


def room(size: int) -> int:
    """The bytes that factors and kept activations may take beside a model of this size."""
    return max(size, ROOM)


def base_bytes(model: nn.Module) -> int:
    """The bytes of a model's parameters without its adapters' tensors."""
    own = {id(t) for _, module, state in adapted(model) for slot in state.slots.values() for t in slot.tensors(module).values()}
    return sum(one.numel() * one.element_size() for one in model.parameters() if id(one) not in own)
