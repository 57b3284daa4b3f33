"""What is wrong with an adapted model, told from its sites' figures: a sentence each that says where, how much, what to change.

The faults are those that the source of SARA names: a wrong k or threshold, a bad start or scale, the memory of the parallel
structures, a router that learns nothing; and what loses a trained delta without a word: rates too small, and rounding. A
site gets one finding of a group at most, the first: the later ones would follow from it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sarac.ir.health import Health
from sarac.ir.record import TOO_LOW

NEARLY_FULL, SMALL = 0.95, 8  # k / n at which factors are as dear as the weight; below so many values that does not matter
COVERED = 0.1  # of Σ s²: shifts of less can hardly change the weight
MOVED, LARGE, STILL = 0.1, 0.3, 0.5  # a shift that shows in outputs, a large one, and how many of one site may stay behind
BEYOND = 0.01  # of the shifts: a few are of 1 and more after many good steps
STUCK = 1e-3  # of the largest shift in the model
LOST = 0.25  # of a delta, by rounding
EXPLODING, VANISHING = 1e3, 1e-6  # norm of all gradients (usual: 0.1 to 10); one site's over the largest
UNIFORM, IDLE = 0.999, 1e-3  # entropy of gates that are all alike; a router's gradient over its site's
COLLAPSED, BLIND, ALIKE = 0.99, 1e-5, 0.999  # the share of one set, the spread of gates, the cosine of sets
ENOUGH = 10  # tokens a set: of fewer a set may get none by chance
STEPS = 3.0  # of Adam at the recommended rate: sets that moved less start out alike, since each gets nearly the same gradient
PATIENCE = 10  # optimiser steps after which shifts have moved, warm-up or not
_SHOWN = 3


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


class Rule(NamedTuple):
    """A fault of single sites: its value where a site has it, which of the values is the worst, and what is said of it."""

    name: str
    value: Callable[[Health], float | None]
    worst: Callable[[Sequence[float]], float]
    text: str


def findings(sites: Sequence[Health], setting: Setting) -> tuple[Finding, ...]:
    """All findings, in the order: broken values, rank, scale, gradients, routers, memory."""
    broken, sound = [one for one in sites if not one.finite], [one for one in sites if one.finite]
    found = _of(broken, [_BROKEN])
    found += _of(sound, _RANK)
    found += (slow := _unmoved(sound, setting)) or _of(sound, _SCALE)
    faint = _gradients(sound, setting) if not broken else []
    found += faint if slow else [*_stuck(sound), *faint]
    found += _of(sound, _ROUTER)
    named = {kind for one in found if one.name == "full rank" for kind in one.sites}
    return (*found, *_memory(sites, setting, named))


def _of(sites: Sequence[Health], rules: Sequence[Rule]) -> list[Finding]:
    """The findings of a group of rules, each site in the first that fits it."""
    hits: dict[str, list[tuple[Health, float]]] = {rule.name: [] for rule in rules}
    for one in sites:
        for rule in rules:
            value = rule.value(one)
            if value is not None:
                hits[rule.name].append((one, value))
                break
    return [
        _finding(rule.name, [one for one, _ in hit], rule.worst([value for _, value in hit]), rule.text)
        for rule in rules
        if (hit := hits[rule.name])
    ]


def _finding(name: str, sites: Sequence[Health], value: float, text: str) -> Finding:
    kinds = tuple(dict.fromkeys(one.kind for one in sites))
    shown = ", ".join(kinds[:_SHOWN]) + (f" and {len(kinds) - _SHOWN} more" if len(kinds) > _SHOWN else "")
    where = f"{shown} ({len(sites)} site{'s' if len(sites) > 1 else ''})"
    return Finding(name, kinds, value, text.format(where=where, value=value, dtype=sites[0].dtype))


def _routed(test: Callable[[Health], float | None]) -> Callable[[Health], float | None]:
    """A rule for sites whose gates were seen often enough, and that have learnt something."""
    return lambda one: test(one) if one.gates and one.gates.tokens >= ENOUGH * len(_use(one)) and one.moved > 0.0 else None


def _use(one: Health) -> tuple[float, ...]:
    return one.gates.use if one.gates else ()


def _dead(one: Health) -> float:
    """How many sets have less than a tenth of an equal share."""
    return float(sum(share < 0.1 / len(_use(one)) for share in _use(one)))


def _settled(one: Health) -> bool:
    """Whether the sets had the time to part."""
    return one.moved >= STEPS * one.lr


def _idle(one: Health) -> float | None:
    grads = one.grad or 0.0, one.router_grad if one.router_grad is not None else math.inf
    entropy = one.gates.entropy if one.gates else 0.0
    idle = entropy >= UNIFORM and grads[0] > 0.0 and grads[1] <= IDLE * grads[0]
    return entropy if idle and _settled(one) else None


def _blind(one: Health) -> float | None:
    return one.gates.spread if one.gates and one.gates.spread < BLIND and _settled(one) else None


_BROKEN = Rule(
    "not finite", lambda one: 1.0, sum,
    "{where}: what trains, or its gradient, holds NaN or Inf. Go back to the last good checkpoint and train at a lower rate, in "
    "bfloat16 or float32 rather than float16.",
)  # fmt: skip
_RANK = (
    Rule(
        "floored", lambda one: float(one.floored) if one.floored else None, max,
        "{where}: up to {value:.0f} of the k directions have a singular value that counts as zero: a shift relative to it moves "
        "nothing. Lower the rank; threshold:1 stops at the numerical one.",
    ),
    Rule(
        "full rank", lambda one: one.share if one.share >= NEARLY_FULL and min(one.shape[-2:]) >= SMALL else None, max,
        "{where}: k is up to {value:.0%} of min(out, in), so that U and V take more room than the weight. Lower the threshold.",
    ),
    Rule(
        "low rank",
        lambda one: one.covered if one.covered is not None and one.covered < COVERED and "u" not in one.trains else None, min,
        "{where}: the k directions hold as little as {value:.1%} of Σ s², so that no shift can change the weight much. Raise the "
        "threshold or the rank, or train the factors (train=factors).",
    ),
    Rule(
        "still", lambda one: one.still if one.still > STILL and one.largest >= LARGE else None, max,
        "{where}: up to {value:.0%} of the shifts did not move while others of the same weight are far. Lower the threshold: "
        "those directions carry nothing here.",
    ),
)  # fmt: skip
_SCALE = (
    Rule(
        "far", lambda one: one.largest if one.beyond > BEYOND and one.covered is not None else None, max,
        "{where}: more than 1 % of |δ| are beyond 1, up to {value:.3g}. At δ = -1 a direction is gone, and turned over below: "
        "lower the learning rate (sarac.recommended_lr), or give the shifts weight decay.",
    ),
    Rule(
        "rounded", lambda one: one.lost if one.lost is not None and one.lost > LOST and one.dtype != "float64" else None, max,
        "{where}: merged into {dtype}, up to {value:.0%} of the delta is lost to rounding. Merge in float32 (model.float() "
        "before sarac.fold, or dtype='fp32' in sarac.export), or train on until the shifts are larger.",
    ),
)  # fmt: skip
_ROUTER = (
    Rule(
        "collapsed", _routed(lambda one: max(_use(one)) if max(_use(one)) > COLLAPSED else None), max,
        "{where}: the router gives one set up to {value:.1%} of all gates. Lower the learning rate, start the router anew, or do "
        "without it (sets=1).",
    ),
    Rule(
        "dead sets", _routed(lambda one: _dead(one) or None), max,
        "{where}: up to {value:.0f} sets get less than a tenth of an equal share. Take fewer sets (sets=…); of hard "
        "and topk routers also soft, in which all sets train.",
    ),
    Rule(
        "alike", _routed(lambda o: o.likeness if (o.likeness or 0.0) > ALIKE and _settled(o) else None), max,
        "{where}: the sets are the same, with a cosine of up to {value:.4f}, so the router cannot choose. Take sets=1, or "
        "router=hard or topk:1, which train them on different tokens.",
    ),
    Rule(
        "idle router", _routed(_idle), max,
        "{where}: all gates are equal (entropy {value:.4f} of log(sets)) and hardly a gradient reaches the router, which learns "
        "nothing. Start it at random values, without a bottleneck of zeros, or take router=uniform.",
    ),
    Rule(
        "blind router", _routed(_blind), max,
        "{where}: the gates are the same whatever the input (spread {value:.1e}). Give the router a higher rate or larger start "
        "values, or do without it (router=uniform folds into plain weights).",
    ),
)  # fmt: skip


def _unmoved(sites: Sequence[Health], setting: Setting) -> list[Finding]:
    """Whether no shift anywhere moved by a tenth of what one step at the recommended rate moves it."""
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
    top = max((other.grad or 0.0 for other in sites), default=0.0)
    return any(other.grad is not None for other in sites) and (one.grad or 0.0) <= VANISHING * top


def _stuck(sites: Sequence[Health]) -> list[Finding]:
    top = max((one.largest for one in sites), default=0.0)
    found = [one for one in sites if top >= MOVED and one.largest <= STUCK * top and not _faint(one, sites)]
    text = f"{{where}}: no |δ| is beyond {{value:.1e}} while other weights' reach {top:.3g}, though gradients arrive. Give the "
    text += "optimiser all parameters that require gradients, at one rate."
    return [_finding("stuck", found, max(one.largest for one in found), text)] if found else []


def _gradients(sites: Sequence[Health], setting: Setting) -> list[Finding]:
    """Gradients that explode all together, and those that do not arrive."""
    norm = math.hypot(*(one.grad or 0.0 for one in sites)) if setting.norm is None else setting.norm
    found = []
    if not norm <= EXPLODING and sites:
        top = max(one.grad or 0.0 for one in sites)
        text = "{where}: the gradients' norm over all sites is {value:.3g}, most of it here. Lower the learning rate, clip "
        text += "gradients (max_grad_norm), and see that the loss is a mean and not a sum."
        found.append(_finding("exploding", [one for one in sites if (one.grad or 0.0) >= top / 2.0], norm, text))
    faint = [one for one in sites if _faint(one, sites)]
    if faint:
        text = "{where}: hardly a gradient arrives (norm {value:.1e}). Look whether the inputs reach these weights, whether the "
        text += "loss depends on them, and whether their adapters require gradients; else leave them out with `where`."
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
