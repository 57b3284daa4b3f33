"""What is wrong with an adapted model, told from its sites' figures: a sentence each that says where, how much, what to change.

The faults are those that the source of SARA names: a wrong k or threshold, a bad start or scale, the memory of the parallel
structures, a router that learns nothing; and what loses a trained delta without a word: rates too small, and rounding. A
site gets one finding of a group at most, the first: the later ones would follow from it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sarac.faults import COARSE, RANK, ROUTER, SCALE, SLOW, STANDING, Rule, named
from sarac.ir.health import Health
from sarac.ir.record import TOO_LOW

MOVED = 0.1  # a shift that shows in outputs
STUCK = 1e-3  # of the largest shift in the model
EXPLODING, VANISHING = 1e3, 1e-6  # norm of all gradients (usual: 0.1 to 10); one site's over the largest
PATIENCE = 10  # optimiser steps after which shifts have moved, warm-up or not
_SHOWN, _ROUNDED = 3, 1.001


@dataclass(frozen=True)
class Finding:
    """One fault: its name, the kinds of weights that have it, the worst value, and the sentence."""

    name: str
    sites: tuple[str, ...]
    value: float
    text: str


@dataclass(frozen=True)
class Setting:
    """What is known besides the sites' figures: room for the adapters' memory in bytes, and how training goes."""

    room: float = math.inf
    base: int = 0  # bytes of the model without adapters
    steps: int | None = None  # that the optimiser took; None where nobody counted
    rate: float | None = None  # the optimiser's highest
    norm: float | None = None  # of all gradients before they were clipped
    schedules: Mapping[str, str] = field(default_factory=dict)  # by site


def findings(sites: Sequence[Health], setting: Setting) -> tuple[Finding, ...]:
    """All findings, in the order: broken values, what trains, rank, scale, gradients, routers, memory."""
    broken, sound = [one for one in sites if not one.finite], [one for one in sites if one.finite]
    found = _broken(broken)
    found += [*_of(sound, STANDING), *_of(sound, [COARSE])]
    found += _of(sound, RANK)
    still = _unmoved(sound, setting)
    slow = [] if still else [one for one in sound if SLOW.value(one) is not None]
    scale = _of([one for one in sound if one not in slow], SCALE, lower=_lower(sound, setting))
    found += still or [*_of(slow, [SLOW]), *scale]
    swamped = any(one.name == "swamped" for one in scale)
    faint = _gradients(sound, setting, arriving=not swamped) if not broken else []
    found += faint if still or slow or swamped else [*_stuck(sound), *faint]
    found += _of(sound, ROUTER)
    full = {kind for one in found if one.name == "full rank" for kind in one.sites}
    return (*found, *_memory(sites, setting, full))


def _of(sites: Sequence[Health], rules: Sequence[Rule], **words: str) -> list[Finding]:
    """The findings of a group of rules, each site in the first that fits it."""
    hits: dict[str, list[tuple[Health, float]]] = {rule.name: [] for rule in rules}
    for one in sites:
        for rule in rules:
            value = rule.value(one)
            if value is not None:
                hits[rule.name].append((one, value))
                break
    return [
        _finding(rule.name, [one for one, _ in hit], rule.worst([value for _, value in hit]), rule.text, rule.roles, **words)
        for rule in rules
        if (hit := hits[rule.name])
    ]


def _finding(
    name: str, sites: Sequence[Health], value: float, text: str, roles: Callable[[Health], Sequence[str]] = lambda one: (),
    **said: str,
) -> Finding:  # fmt: skip
    kinds = tuple(dict.fromkeys(one.kind for one in sites))
    shown = ", ".join(kinds[:_SHOWN]) + (f" and {len(kinds) - _SHOWN} more" if len(kinds) > _SHOWN else "")
    where = f"{shown} ({len(sites)} site{'s' if len(sites) > 1 else ''})"
    meant = [(role, dtype) for one in sites for role, dtype in zip(one.trains, one.dtypes, strict=True) if role in roles(one)]
    words = {"where": where, "dtype": sites[0].dtype, "roles": named([role for role, _ in meant]), **said}
    wanted = min(one.lr for one in sites)
    stored = ", ".join(dict.fromkeys(dtype for _, dtype in meant))
    return Finding(name, kinds, value, text.format(value=value, wanted=wanted, stored=stored, **words))


def _broken(sites: Sequence[Health]) -> list[Finding]:
    """Where NaN and Inf are: the sites whose own tensors hold them; all gradients are broken by any of these."""
    own = [one for one in sites if one.broken]
    if not own:
        text = "{where}: the gradient holds NaN or Inf, and no tensor of an adapted weight does: the loss or an activation "
        text += "overflows, or a weight that is not adapted is broken. Leave the step out, look at the inputs, and train at a "
        text += "lower rate, in bfloat16 or float32 rather than float16."
        return [_finding("not finite", sites, float(len(sites)), text)] if sites else []
    roles = [role for one in own for role in one.broken]
    text = f"{{where}}: {named(roles)} holds NaN or Inf."
    if any(role in one.trains for one in own for role in one.broken):
        text += " Go back to the last good checkpoint and train at a lower rate, in bfloat16 or float32 rather than float16."
    if any(role not in one.trains for one in own for role in one.broken):
        text += " What does not train was loaded or computed so: load the weights and transform the model anew."
    if len(sites) > len(own):
        text += f" The gradients of {len(sites) - len(own)} more follow from it."
    return [_finding("not finite", own, float(len(own)), text)]


def _lower(sites: Sequence[Health], setting: Setting) -> str:
    """What to change about shifts that went too far; no rate is advised that may be the one at which they did."""
    wanted, rate = min((one.lr for one in sites), default=0.0), setting.rate
    other = "train for fewer steps, or give what trains weight decay"
    if rate is None:
        return f"If the learning rate was above the recommended {wanted:g}, lower it; else {other}"
    if rate > wanted * _ROUNDED:
        return f"Lower the learning rate of {rate:g}, which is {rate / wanted:.3g} times the recommended {wanted:g}"
    return f"The learning rate of {rate:g} is not above the recommended {wanted:g}: {other}"


def _unmoved(sites: Sequence[Health], setting: Setting) -> list[Finding]:
    """Whether no shift that trains moved by a tenth of what one step at the recommended rate moves it."""
    sites = [one for one in sites if "shift" not in one.standing]
    trained = setting.steps >= PATIENCE if setting.steps is not None else any(one.largest > 0.0 for one in sites)
    if not trained or not sites or any(one.largest * TOO_LOW >= one.lr for one in sites):
        return []
    wanted, farthest = min(one.lr for one in sites), max(one.largest for one in sites)
    text = f"{{where}}: no |δ| is beyond {{value:.1e}}, less than a tenth of one step at the recommended rate {wanted:g}"
    if setting.rate is not None and setting.rate * TOO_LOW <= wanted:
        text += f", and the optimiser's is {setting.rate:g}. Give it sarac.recommended_lr(model)."
    else:
        text += ". Give the optimiser sarac.recommended_lr(model), and all parameters that require gradients."
    return [_finding("unmoved", sites, farthest, text)]


def _faint(one: Health, sites: Sequence[Health]) -> bool:
    """Whether hardly a gradient reaches a site, where others have theirs or all were asked for it."""
    if one.frozen == one.trains:  # nobody asked for one
        return False
    top = max((other.grad or 0.0 for other in sites), default=0.0)
    return any(other.grad is not None for other in sites) and (one.grad or 0.0) <= VANISHING * top


def _stuck(sites: Sequence[Health]) -> list[Finding]:
    top = max((one.largest for one in sites), default=0.0)
    sites = [one for one in sites if "shift" not in one.standing]
    found = [one for one in sites if top >= MOVED and one.largest <= STUCK * top and not _faint(one, sites)]
    text = f"{{where}}: no |δ| is beyond {{value:.1e}} while other weights' reach {top:.3g}, though gradients arrive. Give the "
    text += "optimiser all parameters that require gradients, at one rate."
    return [_finding("stuck", found, max(one.largest for one in found), text)] if found else []


def _gradients(sites: Sequence[Health], setting: Setting, *, arriving: bool) -> list[Finding]:
    """Gradients that explode all together, and those that do not arrive, unless a swamped weight lets none through."""
    norm = math.hypot(*(one.grad or 0.0 for one in sites)) if setting.norm is None else setting.norm
    found = []
    if not norm <= EXPLODING and sites:
        top = max(one.grad or 0.0 for one in sites)
        text = "{where}: the gradients' norm over all sites is {value:.3g}, most of it here. Lower the learning rate, clip "
        text += "gradients (max_grad_norm), and see that the loss is a mean and not a sum."
        found.append(_finding("exploding", [one for one in sites if (one.grad or 0.0) >= top / 2.0], norm, text))
    faint = [one for one in sites if arriving and _faint(one, sites)]
    if faint:
        text = "{where}: hardly a gradient arrives (norm {value:.1e}). Look whether the inputs reach these weights, and whether "
        text += "the loss depends on them; else leave them out with `where`."
        found.append(_finding("vanishing", faint, max(one.grad or 0.0 for one in faint), text))
    return found


def _memory(sites: Sequence[Health], setting: Setting, full: set[str]) -> list[Finding]:
    """Whether frozen factors and kept activations together take more than there is room for."""
    by_kind: dict[str, int] = {}
    for one in sites:
        by_kind[one.kind] = by_kind.get(one.kind, 0) + one.factors + one.kept
    order = sorted(by_kind, key=lambda kind: -by_kind[kind])
    factors, kept = sum(one.factors for one in sites), sum(one.kept for one in sites)
    if factors + kept <= setting.room or (order and order[0] in full):
        return []
    text = f"{{where}}: factors take {size_text(factors)} and activations kept for the backward {size_text(kept)}, together more "
    text += f"than {size_text(setting.room)}" + (" (the model's own weights)" if setting.room == setting.base else "")
    if any(setting.schedules.get(one.site) == "materialised" for one in sites):
        text += ', some by materialised calls: set sarac.schedule(model, "right"), or'
    else:
        text += ":"
    text += " lower the threshold" if factors > kept else " take gradient checkpointing or fewer tokens at a time"
    return [_finding("memory", [one for one in sites if one.kind in order[:_SHOWN]], float(factors + kept), text + ".")]


def size_text(count: float) -> str:
    """A number of bytes with a unit."""
    power = min(3, max(0, int(math.log10(count)) // 3)) if count >= 1 else 0
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB')[power]}"
