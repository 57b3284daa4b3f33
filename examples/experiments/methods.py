"""Every method by its name: how it is made, at which rates it is searched, and which searched plan stands for which plans."""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

from experiments.spec import BEST, SEARCH_SEED, Spec

RATES = tuple(float(f"{digit}e{power}") for power in range(-6, 1) for digit in (1, 3))  # a log grid: 1, 3, 10, 30, …
SEARCHED = 4  # rates of it that each method is tried at
SEARCH_STEPS = 60


@dataclass(frozen=True)
class Method:
    """How to make one method.

    `family`: sarac, peft, full or untouched. `options` go behind a rule of sarac's. `first` is the lowest rate that is
    searched. `searches` maps each plan that is searched to globs of the plans that take its rate; the first that matches.
    `random`: whether its start depends on the seed.
    """

    label: str
    family: str
    first: float
    searches: Mapping[str, tuple[str, ...]]
    options: str = ""
    method: str = "sara"
    random: bool = False
    note: str = ""

    @property
    def rates(self) -> tuple[float, ...]:
        """The rates of its search."""
        start = RATES.index(self.first) if self.first else 0
        return RATES[start : start + SEARCHED] if self.first else ()

    def searched(self, plan: str) -> list[str]:
        """The plans whose search may give the rate for this one, the nearest first: the next stands in until that is made."""
        return [one for one, globs in self.searches.items() if any(fnmatch.fnmatchcase(plan, glob) for glob in globs)]


_SV = {"budget:23040": ("budget:23040",), "budget:57600": ("budget:57600",)}  # what is compared with the smallest LoRAs
_SV |= {"threshold:0.1": ("*threshold:0.0*", "*threshold:0.1*", "*threshold:0.2*"), "threshold:0.6": ("*",)}
_MANY = (
    "*threshold:0.1*",
    "*threshold:0.2*",
    "*threshold:0.05*",
    "*threshold:0.3*",
    "*threshold:1*",
    "rank:[48]",
    "budget:[0-9]??????*",
)  # from a million on
_FACTORS = {plan: (plan,) for plan in ("threshold:1", "threshold:0.3", "budget:9775680")}
_FACTORS |= {"threshold:0.05": _MANY, "threshold:0.01": ("*",)}
_ROUTED = {"threshold:0.5": ("*",)}
_LORA = {plan: (plan,) for plan in ("r=1,on=v_proj", "r=1,on=q_proj+v_proj", "r=4", "r=32")}
_LORA |= {"r=1": ("r=1", "r=1,*", "r=4"), "r=8": ("*",)}
_ANY = {"": ("*",)}


def _routed(label: str, options: str) -> Method:
    return Method(label, "sarac", 3e-3, _ROUTED, options, "mosara", random=True)


METHODS = {
    "untouched": Method("untouched", "untouched", 0.0, {}),
    "full": Method("full fine-tuning", "full", 1e-5, _ANY),
    "sara": Method("SARA, singular values", "sarac", 3e-3, _SV),
    "sara-absolute": Method("SARA, λ instead of δ = λ/s", "sarac", 1e-2, {"threshold:0.6": ("*",)}, note="scale=1"),
    "sara-materialised": Method("SARA, materialised", "sarac", 3e-3, _SV, note="schedule=materialised"),
    "sara-two-sided": Method("SARA, two-sided", "sarac", 3e-3, _SV, note="schedule=two-sided"),
    "sara-factors-svd": Method("SARA, factors from the SVD", "sarac", 3e-4, _FACTORS, "train=factors,init=svd"),
    "sara-factors-random": Method("SARA, random factors", "sarac", 1e-3, _FACTORS, "train=factors,init=random", random=True),
    "mosara-soft": _routed("Mo-SARA, soft", "sets=5,router=soft"),
    "mosara-topk2": _routed("Mo-SARA, top 2", "sets=5,router=topk:2"),
    "mosara-hard": _routed("Mo-SARA, hard", "sets=5,router=hard"),
    "mosara-uniform": _routed("Mo-SARA, uniform", "sets=5,router=uniform"),
    "mosara-one": _routed("Mo-SARA, one set", "sets=1"),
    "mosara-bottleneck": _routed("Mo-SARA, bottleneck 1", "sets=5,router=soft,bottleneck=1"),
    "lora": Method("LoRA", "peft", 3e-4, _LORA, random=True),
    "pissa": Method("PiSSA", "peft", 1e-4, {"r=8": ("*",)}),
    "adalora": Method("AdaLoRA", "peft", 1e-3, {"r=8": ("*",)}, random=True),
    "ia3": Method("IA3", "peft", 3e-3, _ANY),
    "vera": Method("VeRA", "peft", 3e-3, {"r=256": ("*",)}, random=True),
}
# Variants of one method take its rates: they compute the same, or are compared at the same rate on purpose.
SAME_RATE = {"sara-materialised": "sara", "sara-two-sided": "sara"}


def search_specs(names: set[tuple[str, str]], model: str, task: str = "gsm8k", steps: int = SEARCH_STEPS) -> list[Spec]:
    """The search for these pairs of a method and a searched plan: every rate once."""
    pairs = [(name, plan) for name, method in METHODS.items() for plan in method.searches if (name, plan) in names]
    return [Spec(name, plan, task, SEARCH_SEED, rate, steps, model=model) for name, plan in pairs for rate in METHODS[name].rates]


def searched_by(spec: Spec) -> tuple[str, str] | None:
    """The method and plan of the search that gives this spec its rate; None where it has one, or needs none."""
    if spec.lr != BEST or METHODS[spec.method].family == "untouched":
        return None
    name = SAME_RATE.get(spec.method, spec.method)
    return name, METHODS[name].searched(spec.plan)[0]
