"""The faults of single sites as rules: a value where a site has it, and the sentence: where, how much, what to change."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from sarac.ir.health import Health

NEARLY_FULL, SMALL = 0.95, 8  # k / n at which factors are as dear as the weight; below so many values that does not matter
MISFIT, WHOLE = 0.1, 1.05  # of factors that another precision rounded a hundredth; all of Σ s², with bfloat16's rounding
COVERED = 0.1  # of Σ s²: shifts of less can hardly change the weight
LARGE, STILL = 0.3, 0.5  # a large shift, and how many of one site may stay behind it
LONG, YOUNG = 10.0, 3.0  # columns of factors; steps at the recommended rate, in which no good run makes them so
TURNED = 0.4  # of a site's directions, gone or turned round: good runs come to a third, a random walk to a half
SWAMPED = 4.0  # ‖Δ‖ over ‖W‖: 300 good steps at recommended rates came to 1.3, of random factors to 2.8; at 10 times them to 38
LOST = 0.25  # of a delta, by rounding
FAR_TOO_LOW = 100.0  # times below the recommended rate
UNIFORM, IDLE = 0.999, 1e-3  # entropy of gates that are all alike; a router's gradient over its site's
COLLAPSED, BLIND, ALIKE = 0.99, 1e-5, 0.999  # the share of one set, the spread of gates, the cosine of sets
DEAD, MANY = 1e-3, 0.5  # of an equal share: no token's; of the sets: good runs have a dead one here and there
ENOUGH = 10  # tokens a set: of fewer a set may get none by chance
STEPS = 10.0  # of Adam at the recommended rate: sets start out alike, and some random routers' get no token, which training mends
_NAMES = {"u": "U", "shift": "δ", "v": "V", "router": "the router", "router_in": "the router's bottleneck", "scale": "s"}
_NAMES["weight"] = "the base weight"
_HALVES = ("bfloat16", "float16")


class Rule(NamedTuple):
    """A fault of single sites: its value where a site has it, which of the values is the worst, and what is said of it."""

    name: str
    value: Callable[[Health], float | None]
    worst: Callable[[Sequence[float]], float]
    text: str
    roles: Callable[[Health], Sequence[str]] = lambda one: ()  # the tensors that it speaks of


def named(roles: Sequence[str]) -> str:
    """The roles of tensors as the method's papers call them, each once."""
    return ", ".join(dict.fromkeys(_NAMES[role] for role in roles))


def _routed(test: Callable[[Health], float | None]) -> Callable[[Health], float | None]:
    """A rule for sites whose gates were seen often enough, and whose sets had the time to part."""
    return lambda one: test(one) if one.gates and one.gates.tokens >= ENOUGH * len(_use(one)) and _settled(one) else None


def _use(one: Health) -> tuple[float, ...]:
    return one.gates.use if one.gates else ()


def _dead(one: Health) -> float | None:
    """How many sets have no tokens, where they are half or more; soft gates are never zero."""
    dead = sum(share < DEAD / len(_use(one)) for share in _use(one))
    return float(dead) if dead >= MANY * len(_use(one)) else None


def _settled(one: Health) -> bool:
    """Whether the sets had the time to part."""
    return one.moved >= STEPS * one.lr


def _idle(one: Health) -> float | None:
    grads = one.grad or 0.0, one.router_grad if one.router_grad is not None else math.inf
    entropy = one.gates.entropy if one.gates else 0.0
    idle = entropy >= UNIFORM and grads[0] > 0.0 and grads[1] <= IDLE * grads[0]
    return entropy if idle and not _fixed(one) else None


def _blind(one: Health) -> float | None:
    blind = one.gates is not None and one.gates.spread < BLIND and not _fixed(one)
    return one.gates.spread if one.gates and blind else None


def _halves(one: Health) -> list[str]:
    """The roles of what trains in half of float32."""
    return [role for role, dtype in zip(one.trains, one.dtypes, strict=True) if dtype in _HALVES and role not in one.standing]


def _lost_step(one: Health) -> float | None:
    """The step, as a share of a value, under which nothing of it is kept: half a unit in the last place of the largest digits."""
    dtypes = [dtype for role, dtype in zip(one.trains, one.dtypes, strict=True) if role in _halves(one)]
    return max((torch.finfo(getattr(torch, dtype)).eps / 4.0 for dtype in dtypes), default=None)


def _fixed(one: Health) -> bool:
    """Whether the router here cannot learn: what would follow from that is not told of it."""
    return not one.standing.isdisjoint(("router", "router_in"))


def _slow(one: Health) -> dict[str, float]:
    """The rates that are far too low, by role."""
    known = {role: rate for role, rate in zip(one.trains, one.rates, strict=False) if rate is not None}
    return {role: rate for role, rate in known.items() if rate * FAR_TOO_LOW < one.lr and role not in one.standing}


STANDING = (
    Rule(
        "frozen", lambda one: float(len(one.frozen)) or None, sum,
        "{where}: requires_grad is False for what the plan trains ({roles}), which therefore learns nothing. Set it to True "
        "(requires_grad_) before the optimiser is made.", lambda one: one.frozen,
    ),
    Rule(
        "left out", lambda one: float(len(one.lacking)) or None, sum,
        "{where}: the optimiser lacks what the plan trains here ({roles}), which therefore learns nothing. Give it all "
        "parameters that require gradients; of several optimisers give the Monitor all.", lambda one: one.lacking,
    ),
)  # fmt: skip
COARSE = Rule(
    "coarse", _lost_step, max,
    "{where}: what trains ({roles}) is {stored}, in which a step of under {value:.2%} of a value is rounded away. Cast it to "
    "float32, as sarac makes δ and routers: p.data = p.data.float() for each p that requires gradients, before the optimiser is "
    "made.", _halves,
)  # fmt: skip
RANK = (
    Rule(
        "floored", lambda one: float(one.floored) if one.floored else None, max,
        "{where}: up to {value:.0f} of the k directions have a singular value that counts as zero: a shift relative to it moves "
        "nothing. Lower the rank; threshold:1 stops at the numerical one.",
    ),
    Rule(
        "foreign", lambda one: one.misfit if (one.misfit or 0.0) > MISFIT else None, max,
        "{where}: U, s and V are not singular vectors and values of the weight (off by up to {value:.0%}), so that a shift does "
        "not scale what the weight does. Load or change weights before sarac.transform, not after it: transform the model anew.",
    ),
    Rule(
        "scale", lambda one: one.covered if (one.covered or 0.0) > WHOLE else None, max,
        "{where}: Σ s² of the k directions is up to {value:.3g} times all of the weight's, so s is not that of the weight. Leave "
        "s as sarac.transform made it, and load weights before it: transform the model anew.",
    ),
    Rule(
        "full rank", lambda one: one.share if one.share >= NEARLY_FULL and min(one.shape[-2:]) >= SMALL else None, max,
        "{where}: k is up to {value:.0%} of min(out, in), so that U and V take more room than the weight, and operations as "
        "well; more is forgotten. Where the task alone counts that buys quality; a lower threshold costs less.",
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
SCALE = (
    Rule(
        "start", lambda one: one.columns if (one.columns or 0.0) > LONG and one.moved < YOUNG * one.lr else None, max,
        "{where}: columns of U or rows of V are up to {value:.3g} long before δ has moved far, where sarac.transform makes them "
        "about 1, so that a step of δ changes the weight as many times too much. Transform the model anew and leave them so.",
    ),
    Rule(
        "swamped", lambda one: one.delta if one.delta > SWAMPED else None, max,
        "{where}: the change is up to {value:.3g} times as large as its weight, of which little is left. {lower}. Where it "
        "started so: δ starts at 0, and U, s and V are to stay as sarac.transform made them.",
    ),
    Rule(
        "far", lambda one: one.turned if one.turned > TURNED and one.covered is not None and one.rank >= SMALL else None, max,
        "{where}: up to {value:.0%} of the directions are turned round (δ of -1 and less), so that what the weight did there is "
        "lost. {lower}.",
    ),
    Rule(
        "rounded", lambda one: one.lost if one.lost is not None and one.lost > LOST and one.dtype != "float64" else None, max,
        "{where}: merged into {dtype}, up to {value:.0%} of the delta is lost to rounding. Merge in float32 (model.float() "
        "before sarac.fold, or dtype='fp32' in sarac.export), or train on until the shifts are larger.",
    ),
)  # fmt: skip
SLOW = Rule(
    "slow", lambda one: min(_slow(one).values(), default=None), min,
    "{where}: the optimiser's rate for what trains ({roles}) was {value:g} at most so far, under a hundredth of the recommended "
    "{wanted:g}, at which hardly anything is learnt however long the run. Give it sarac.recommended_lr(model).",
    lambda one: tuple(_slow(one)),
)  # fmt: skip
ROUTER = (
    Rule(
        "collapsed", _routed(lambda one: max(_use(one)) if max(_use(one)) > COLLAPSED else None), max,
        "{where}: the router gives one set up to {value:.1%} of all gates. Start the router anew at smaller values, give it a "
        "lower rate than δ, or do without it (sets=1).",
    ),
    Rule(
        "dead sets", _routed(_dead), max,
        "{where}: up to {value:.0f} sets, half of a weight's or more, get none of the tokens and learn nothing. Take fewer sets "
        "(sets=…), or see whether the batch is of one kind.",
    ),
    Rule(
        "alike", _routed(lambda o: o.likeness if (o.likeness or 0.0) > ALIKE else None), max,
        "{where}: the sets are still the same, with a cosine of up to {value:.4f}, so the router cannot choose. sets=1 does the "
        "same for less.",
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
