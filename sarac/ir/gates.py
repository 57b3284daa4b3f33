"""What routers decide, watched over calls: the gates of every routed site, and how many rows every adapted module was given.

Figures of gates, each token's normalised to a sum of 1: their entropy over log(sets), 1 where all are equal; the share of each
set; and their variance over the tokens as a share of the largest that these shares allow, Σ_i E[g_i²] - E[g_i]² over
1 - Σ_i E[g_i]² (which one-hot gates reach, by the law of total variance), 0 where every token has the same gates.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sarac.ir.layers import adapted
from sarac.ir.terms import observing
from sarac.ir.weight import Slot

_ROUNDING = 1e-12  # a set that takes all leaves nothing to vary


@dataclass(frozen=True)
class Gates:
    """The figures of a routed site over the tokens seen; of a stack the mean over its matrices."""

    entropy: float  # mean over the tokens, over log(sets): 0 one set each, 1 all alike
    use: tuple[float, ...]  # the share of each set, 1 in all
    spread: float  # the share of the possible variance over the tokens
    tokens: int


class _Tally:
    """Sums over the gates of one site, left on their device."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[Tensor] = []

    def add(self, gates: Tensor) -> None:
        """Take gates (parts, tokens, sets)."""
        shares = gates / gates.sum(-1, keepdim=True)
        entropy = torch.special.entr(shares).sum((-2, -1))
        new = [gates.sum(-2), gates.mT @ gates, shares.sum(-2), shares.square().sum((-2, -1)), entropy]
        self.sums = [old + one for old, one in zip(self.sums, new, strict=True)] if self.sums else new
        self.count += gates.shape[-2]

    def mean(self, index: int) -> Tensor:
        """The mean over the tokens of one of the sums."""
        return self.sums[index].cpu() / self.count

    def gates(self) -> Gates:
        """The figures."""
        use, square, entropy = self.mean(2), self.mean(3), self.mean(4)
        room = 1.0 - use.square().sum(-1)
        spread = torch.where(room > _ROUNDING, (square - use.square().sum(-1)) / room.clamp_min(_ROUNDING), 0.0)
        share = float(entropy.mean()) / math.log(use.shape[-1])
        return Gates(share, tuple(use.mean(0).tolist()), float(spread.mean().clamp_min(0.0)), self.count)


class Watch:
    """The gates of every routed call, and the rows of every adapted module's last forward, seen while `watching`."""

    def __init__(self, model: nn.Module) -> None:
        self.tokens: dict[str, int] = {}
        self._sites: dict[int, str] = {}
        self._tallies: dict[str, _Tally] = {}
        self._rows: dict[int, tuple[tuple[str, int], ...]] = {}
        for module, slot in slots(model):
            self._sites[id(slot.tensors(module)["shift"])] = slot.site
        for _, module, state in adapted(model):
            self._rows[id(module)] = tuple((slot.site, sizes_of(slot, module)[1]) for slot in state.slots.values())

    def gates(self, site: str) -> Gates | None:
        """What the gates of a site were; None where none were seen."""
        return self._tallies[site].gates() if site in self._tallies else None

    def means(self) -> dict[str, Tensor]:
        """The mean gates (sets,), or (parts, sets) of a stack, of every site that was seen."""
        found = {site: tally.mean(0) for site, tally in self._tallies.items()}
        return {site: (mean[0] if len(mean) == 1 else mean).float() for site, mean in found.items()}

    def product(self, site: str) -> Tensor | None:
        """E[g gᵀ] (parts or 1, sets, sets) of a site; None where no gates were seen."""
        return self._tallies[site].mean(1) if site in self._tallies else None

    def note(self, shift: Tensor, gates: Tensor) -> None:
        """Take the gates of a call; those of another model, a copy, are left out."""
        site = self._sites.get(id(shift))
        if site is not None and not _again():
            rows = gates.detach().double()
            # (…, sets), or (…, parts, tokens, sets) of a stack, whose gates are kept apart
            rows = rows.movedim(-3, 0).flatten(1, -2) if shift.ndim == 3 else rows.flatten(0, -2)[None]
            self._tallies.setdefault(site, _Tally()).add(rows)

    def count(self, module: nn.Module, args: Any, output: Any) -> None:
        """Take the number of rows that a module's forward gave."""
        first = next((leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)), None)
        if first is not None and not _again():
            self.tokens |= {site: first.numel() // out for site, out in self._rows[id(module)]}


@contextmanager
def watching(model: nn.Module) -> Iterator[Watch]:
    """Watch the adapted calls of a model for a while; routed ones compute their formula as it stands meanwhile."""
    watch = Watch(model)
    hooks = [module.register_forward_hook(watch.count) for _, module, _ in adapted(model)]
    try:
        with observing(watch.note):
            yield watch
    finally:
        for hook in hooks:
            hook.remove()


def slots(model: nn.Module) -> Iterator[tuple[nn.Module, Slot]]:
    """Every adapted weight of a model with a module that has it, each once."""
    seen: set[str] = set()
    for _, module, state in adapted(model):
        for slot in state.slots.values():
            if slot.site not in seen:
                seen.add(slot.site)
                yield module, slot


def sizes_of(slot: Slot, module: nn.Module) -> tuple[int, int, int]:
    """(parts, out, in) of an adapted weight; parts is 0 where it is no stack."""
    return slot.layout.sizes(tuple(stored(slot, module).shape))


def stored(slot: Slot, module: nn.Module) -> Tensor:
    """The base weight of an adapted module as it is stored."""
    found = module._parameters[slot.param]
    assert found is not None
    return found


def _again() -> bool:
    """Whether this call is computed a second time, in the backward of a checkpoint, or is captured and has no values."""
    return torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1
