"""Fold adapters into plain weights: the original classes, names and flags come back, untouched tensors stay shared."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from sarac.ir import check
from sarac.ir.adapters import MoSara
from sarac.ir.clone import clone
from sarac.ir.errors import NotFoldable, RewriteError, near
from sarac.ir.graph import Folded, ModelGraph, within
from sarac.ir.layers import adapted, uninstall
from sarac.ir.layout import dense, quantised
from sarac.ir.record import detach, record_of
from sarac.ir.weight import Slot


@dataclass(frozen=True)
class Fold:
    """Write every adapter into its weight: computed in `precision` from the stored base, rounded once, to `dtype` or the base's;
    in the modules of the names `wide`, to float32 at least. CheckFailed where that dtype does not hold a weight's values.

    `partial` folds what folds and leaves routed modules as they are. `gates` are fixed gates of shape (sets,) by site
    name, which fold routed sites approximately. Without either a routed site raises NotFoldable. `pending` writes nothing yet:
    the module keeps the base's weights, and the graph what makes each folded one when it is asked for.
    """

    precision: torch.dtype = torch.float32
    dtype: torch.dtype | None = None
    wide: tuple[str, ...] = ()
    gates: Mapping[str, Tensor] | None = None
    partial: bool = False
    inplace: bool = False
    pending: bool = False
    exact: ClassVar[bool] = False

    def __call__(self, graph: ModelGraph) -> ModelGraph:
        """The graph with a plain module, and what folding did to each site."""
        states = list(adapted(graph.module))
        if not states:
            raise RewriteError(
                f"{type(graph.module).__name__} carries no adapters: there is nothing to fold. Transform it first."
            )
        if not all(state.enabled for _, _, state in states):
            raise RewriteError(
                "The adapters are switched off here (sarac.disabled), so there is nothing to fold: leave that block."
            )
        if not self.partial:
            _require_foldable([slot for _, _, state in states for slot in state.slots.values()], self.gates or {})
        record = record_of(graph.module)
        module = clone(graph.module, frozen=False, inplace=self.inplace)
        folded: dict[str, Folded] = {}
        merged: dict[str, nn.Parameter] = {}
        waiting: dict[int, Callable[[], Tensor]] = {}
        for _, owner, state in list(adapted(module)):
            slots = list(state.slots.values())
            if self.partial and not all(slot.adapter.foldable for slot in slots):
                continue
            for slot in slots:
                if slot.site not in merged:
                    base = owner._parameters[slot.param]
                    assert base is not None
                    make = functools.partial(self._merge, base, slot, slot.tensors(owner), folded)
                    if self.pending and not quantised(base):
                        waiting[id(base)] = make
                    merged[slot.site] = base if id(base) in waiting else make()
            uninstall(owner)
            for slot in slots:
                owner._parameters[slot.param] = merged[slot.site]
        if any(True for _ in adapted(module)):
            return replace(graph, module=module, folded=folded, waiting=waiting)
        detach(module)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(record.trained_before.get(name, True) if record else True)
        return replace(graph, module=module, plan=None, regions={}, folded=folded, waiting=waiting)

    def _merge(self, base: nn.Parameter, slot: Slot, held: Mapping[str, Tensor], folded: dict[str, Folded]) -> nn.Parameter:
        """The weight with its adapter's tensors folded in; what that did to the site goes into `folded` once."""
        wide = torch.promote_types(base.dtype, self.precision)
        tensors = {role: tensor.detach().to(wide) for role, tensor in held.items()}
        gates = (self.gates or {}).get(slot.site)
        if gates is not None and isinstance(slot.adapter, MoSara):
            delta = slot.adapter.mean_delta(tensors, gates.to(wide))
        else:
            delta = slot.adapter.delta(tensors)
        delta, plain = slot.layout.stored(delta, base.shape), dense(base.detach())
        target = torch.promote_types(base.dtype, torch.float32) if within(slot.site, self.wide) else self.dtype or base.dtype
        rounded = check.narrowed(slot.site, plain.to(wide) + delta, target).contiguous()
        if slot.site not in folded:
            lost = rounded.double() - plain.double() - delta.double()
            onto = f"de-quantised {type(base).__name__}" if quantised(base) else "stored"
            share = check.relative_norm(lost, delta) if float(delta.norm()) else 0.0
            folded[slot.site] = Folded(check.relative_norm(delta, plain), share, onto)
        merged = nn.Parameter(rounded)
        merged.__dict__.update(base.__dict__)
        return merged


def _require_foldable(slots: list[Slot], gates: Mapping[str, Tensor]) -> None:
    wrong = next((name for name in gates if name not in {slot.site for slot in slots}), None)
    if wrong is not None:
        raise RewriteError(f"There are gates for {wrong!r}, which is no adapted site. {near(wrong, [s.site for s in slots])}")
    routed = sorted({slot.site for slot in slots if not slot.adapter.foldable and slot.site not in gates})
    if routed:
        shown = ", ".join(routed[:3]) + (f" and {len(routed) - 3} more" if len(routed) > 3 else "")
        raise NotFoldable(
            f"A routed adapter has no single weight to fold into; routed here: {shown}. Either export without merging "
            '(merge=False, or `sarac export` without --merge), which writes the routed subgraph; or fold with routing="mean" and '
            "calibration inputs (`--routing mean --calibration FILE`), which fixes the gates at their mean and reports the error."
        )
