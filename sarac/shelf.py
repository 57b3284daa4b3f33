"""Several adapters for one adapted model: one is live in its parameters, the others wait by name and are swapped in.

A swap writes into the parameters and replaces none of them: compiled graphs, DDP and optimisers stay valid (an optimiser
keeps its moments, whose adapter ever is live). What waits stays on the device on which it was live.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sarac.checkpoint import Adapters, tensors_of, whole
from sarac.ir.adapters import Adapter
from sarac.ir.errors import CheckpointError, RewriteError, near
from sarac.ir.layers import adapted
from sarac.ir.methods import describe
from sarac.ir.plan import Plan
from sarac.ir.record import Frozen, Record, Shelf, Shelved, record_of, require_whole, shelf_of
from sarac.ir.sharded import is_sharded
from sarac.ir.weight import settle


def adapters(model: nn.Module) -> tuple[str, ...]:
    """The names of an adapted model's adapters, the live one first; it is called "default" where no name was given."""
    _record(model)
    shelf = shelf_of(model)
    return (shelf.active, *shelf.others)


def use(model: nn.Module, name: str) -> None:
    """Make the adapter of this name the live one, in place; the one before waits with the values that it has now."""
    names, shelf = adapters(model), shelf_of(model)
    if name not in names:
        raise RewriteError(_unknown(model, name))
    if name != shelf.active:
        incoming = shelf.others.pop(name)
        shelf.others[shelf.active] = _taken(model, shelf)
        _make_live(model, shelf, name, incoming)


def put(model: nn.Module, name: str | None, found: Adapters, further: Mapping[str, Tensor], where: str) -> None:
    """Make these values live in place: under a new name beside the adapter before, or in place of the one of that name."""
    record, shelf, live = _record(model), shelf_of(model), tensors_of(model)
    trained, given = _part(found, record, trained=True), _part(found, record, trained=False)
    _require_fits(_part(live, record, trained=True), trained, where)
    _require_fits({site: {role: live[site][role] for role in roles} for site, roles in given.items()}, given, where)
    _require_fits({"also_train": _further(model, record)}, {"also_train": further}, where)
    frozen = shelf.live
    if not all(
        torch.equal(t.to(live[site][role]), live[site][role]) for site, roles in given.items() for role, t in roles.items()
    ):
        present = _part(live, record, trained=False)
        frozen = Frozen({site: {**roles, **given.get(site, {})} for site, roles in present.items()})
    incoming = Shelved(trained, dict(further), frozen)
    name = shelf.active if name is None else name
    if name != shelf.active:
        shelf.others.pop(name, None)
        shelf.others[shelf.active] = _taken(model, shelf)
    _make_live(model, shelf, name, incoming)


def values(model: nn.Module, name: str | None = None) -> tuple[Adapters, dict[str, Tensor]]:
    """All tensors of the adapter of this name (the live one for None), and its parameters trained whole."""
    record, shelf, live = _record(model), shelf_of(model), tensors_of(model)
    if name is None or name == shelf.active:
        return live, _further(model, record)
    if name not in shelf.others:
        raise RewriteError(_unknown(model, name))
    found = shelf.others[name]
    frozen = found.frozen.tensors or _part(live, record, trained=False)
    ordered = {site: {role: {**frozen[site], **found.trained[site]}[role] for role in roles} for site, roles in live.items()}
    return ordered, dict(found.further)


def require_same_plan(model: nn.Module, plan: Plan, where: str) -> None:
    """Raise CheckpointError at the first thing in which a file's plan is not the one that the model carries."""
    here = _record(model).plan
    remedy = "Only an adapter of the same plan fits in place: load this one onto the base model."
    for site, (theirs, ours) in plan.diff(here).items():
        raise CheckpointError(
            f"{where} does not fit: {site} has {_said(theirs, ours)} there and {_said(ours, theirs)} here. {remedy}"
        )
    odd = sorted(set(plan.also_train) ^ set(here.also_train))
    if odd:
        there = "there and not here" if odd[0] in plan.also_train else "here and not there"
        raise CheckpointError(f"{where} does not fit: {odd[0]} is trained whole {there}. {remedy}")


def packed(model: nn.Module) -> dict[str, Any]:
    """The shelf as plain values for a file; {} where there is but the one adapter without a name."""
    shelf = model.__dict__.get("_sarac_shelf", Shelf())
    if not shelf.others and shelf.active == Shelf.active:
        return {}
    sets = list({id(frozen): frozen for frozen in (shelf.live, *(item.frozen for item in shelf.others.values()))}.values())
    others = {
        name: {"trained": item.trained, "further": item.further, "frozen": sets.index(item.frozen)}
        for name, item in shelf.others.items()
    }
    return {"active": shelf.active, "frozen": [frozen.tensors for frozen in sets], "others": others}


def unpack(model: nn.Module, content: Mapping[str, Any], where: str) -> None:
    """Give `model` the shelf that a file holds; one that is not of the model's adapters is a CheckpointError."""
    if not content:
        return
    record, live = _record(model), tensors_of(model)
    try:
        sets = [Frozen(tensors) for tensors in content["frozen"]]
        others = {
            name: Shelved(item["trained"], item["further"], sets[item["frozen"]]) for name, item in content["others"].items()
        }
        for item in others.values():
            _require_fits(_part(live, record, trained=True), item.trained, where)
            _require_fits({"also_train": _further(model, record)}, {"also_train": item.further}, where)
        for frozen in sets[1:]:
            _require_fits(_part(live, record, trained=False), frozen.tensors or {}, where)
        model.__dict__["_sarac_shelf"] = Shelf(str(content["active"]), sets[0], others)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where} has a damaged shelf of adapters ({error!r}): write it again.") from error


def _unknown(model: nn.Module, name: str) -> str:
    kind, known = type(model).__name__, near(name, adapters(model))
    return f"This {kind} has no adapter {name!r}. {known} sarac.load_adapter(model, path, name={name!r}) brings one."


def _record(model: nn.Module) -> Record:
    require_whole(model, "take")
    record = record_of(model)
    if record is None:
        raise RewriteError(f"{type(model).__name__} carries no adapters: transform it first (sarac.transform).")
    return record


def _taken(model: nn.Module, shelf: Shelf) -> Shelved:
    """A copy of what the live parameters hold; what does not train is copied when another takes its place."""
    record = _record(model)
    trained = _part(tensors_of(model), record, trained=True)
    further = {name: tensor.clone() for name, tensor in _further(model, record).items()}
    return Shelved({site: {r: t.clone() for r, t in roles.items()} for site, roles in trained.items()}, further, shelf.live)


def _make_live(model: nn.Module, shelf: Shelf, name: str, incoming: Shelved) -> None:
    record, live = _record(model), tensors_of(model)
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise RewriteError("The adapters of a sharded model cannot be exchanged: load the adapter before the model is sharded.")
    with torch.no_grad():
        if incoming.frozen is not shelf.live:
            present = _part(live, record, trained=False)
            shelf.live.tensors = {site: {role: t.clone() for role, t in roles.items()} for site, roles in present.items()}
            _copy(live, incoming.frozen.tensors or {})
            shelf.live, incoming.frozen.tensors = incoming.frozen, None
            for _, module, _ in adapted(model):
                settle(module)
        _copy(live, incoming.trained)
        _copy({"": _further(model, record)}, {"": incoming.further})
    shelf.active = name


def _copy(live: Mapping[str, Mapping[str, Tensor]], found: Mapping[str, Mapping[str, Tensor]]) -> None:
    for site, roles in found.items():
        for role, tensor in roles.items():
            live[site][role].copy_(tensor)


def _part(tensors: Adapters, record: Record, *, trained: bool) -> Adapters:
    """The roles that train, or those that do not."""
    return {
        site: {role: tensor for role, tensor in roles.items() if (role in record.plan.sites[site].trainable) == trained}
        for site, roles in tensors.items()
    }


def _further(model: nn.Module, record: Record) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return {name: whole(parameters[name].detach()) for name in record.plan.also_train}


def _require_fits(ours: Mapping[str, Mapping[str, Tensor]], theirs: Mapping[str, Mapping[str, Tensor]], where: str) -> None:
    """Refuse tensors that a copy would stop at half-way: others than those here, or of other shapes."""
    here, there = (
        {(site, role): tuple(tensor.shape) for site, roles in each.items() for role, tensor in roles.items()}
        for each in (ours, theirs)
    )
    for site, role in {**here, **there}:
        shapes = [each.get((site, role), "missing") for each in (there, here)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(f"{where} does not fit: the {role} of {site} is {shapes[0]} there and {shapes[1]} here.")


def _said(one: Adapter | None, other: Adapter | None) -> str:
    """In what an adapter is not the other."""
    if one is None:
        return "no adapter"
    mine, theirs = describe(one), describe(other) if other else {}
    return ", ".join(f"{name}={value}" for name, value in mine.items() if theirs.get(name) != value) or one.method
