"""Study 2: SARA against LoRA at equal trained numbers, and Mo-SARA against a LoRA ten and a hundred times as large."""

from pathlib import Path
from typing import Any

from experiments import plots
from experiments.lines import Entry, Lines, comparison
from experiments.methods import METHODS
from experiments.spec import Spec, seeds

TITLE = "SARA and LoRA at equal budgets"
QUESTION = "Which learns more from the same number of trained parameters, and what does a tenth or a hundredth of them lose?"
# LoRA by what trains: rank 1 on some of the weights, or a rank on all of them; SARA's factors have one number more a rank.
LORA = {
    23_040: "r=1,on=v_proj",
    57_600: "r=1,on=q_proj+v_proj",
    305_280: "r=1",
    1_221_120: "r=4",
    2_442_240: "r=8",
    9_768_960: "r=32",
}
RANKS = {305_280: 1, 1_221_120: 4, 2_442_240: 8, 9_768_960: 32}
SITES = 210
ROUTED = {244_224: "budget:244224", 24_422: "budget:24422"}  # a tenth and a hundredth of LoRA's at rank 8
CONTROLS = (("full", ""), ("pissa", "r=8"), ("adalora", "r=8"), ("ia3", ""), ("vera", "r=256"), ("untouched", ""))
TIMED = (
    *CONTROLS[:-1],
    ("lora", "r=8"),
    ("sara", "threshold:0.1"),
    ("sara", "threshold:0.6"),
    ("sara-factors-svd", "threshold:0.02"),
    ("mosara-soft", "threshold:0.5"),
    ("mosara-topk2", "threshold:0.5"),
)
TINY = (("sara", "budget:60"), ("lora", "r=1"), ("sara-factors-svd", "rank:2"), ("mosara-soft", "threshold:0.5"), ("full", ""))


def rivals(budget: int) -> dict[str, str]:
    """SARA's methods and plans for a budget: the singular values where there are as many of them, else the factors."""
    if budget not in RANKS:
        return {"sara": f"budget:{budget}"}
    plan = f"budget:{budget + SITES * RANKS[budget]}"
    random = {"sara-factors-random": plan} if budget in (305_280, 2_442_240) else {}
    return {"sara-factors-svd": plan, **random}


def groups(model: str) -> dict[str, list[Entry]]:
    """The entries of every table."""
    if model == "tiny":
        how: dict[str, Any] = {"task": "sums", "steps": 12, "batch": 8, "model": model}
        return {"All": [Entry(METHODS[m].label, Spec(m, plan, **how)) for m, plan in TINY]}
    found = {}
    for budget, plan in LORA.items():
        entries = [Entry(METHODS[m].label, Spec(m, p, model=model)) for m, p in rivals(budget).items()]
        found[f"{budget:,} trained numbers"] = [Entry(f"LoRA, {plan}", Spec("lora", plan, model=model)), *entries]
    large = Entry("LoRA, r=8", Spec("lora", "r=8", model=model))
    small = [Entry(f"Mo-SARA, soft, {plan}", Spec("mosara-soft", plan, model=model)) for plan in ROUTED.values()]
    found["A tenth and a hundredth of LoRA's 2,442,240"] = [large, *small]
    others = [Entry(METHODS[m].label, Spec(m, plan, model=model)) for m, plan in CONTROLS]
    found["Other methods"] = [large, Entry("SARA, singular values, 0.6", Spec("sara", "threshold:0.6", model=model)), *others]
    return found


def specs(model: str) -> list[Spec]:
    """Three seeds of every entry, then the timings."""
    found = [entry.spec for group in groups(model).values() for entry in group]
    count = 2 if model == "tiny" else 3
    timed = () if model == "tiny" else TIMED
    return [
        *seeds([spec for spec in found if spec.method != "untouched"], count),
        *(spec for spec in found if spec.method == "untouched"),
        *(Spec(method, plan, model=model, kind="timing", steps=20) for method, plan in timed),
    ]


def report(lines: Lines, model: str, folder: Path) -> str:
    """A table for every budget, against LoRA, and the nll over the number of trained parameters."""
    parts, curves = [], {}
    for title, group in groups(model).items():
        parts.append(f"{title}:\n\n{comparison(lines, group, group[0])}")
        for entry in group:
            found = lines.of(entry.spec)
            if found and entry.spec.method != "untouched":
                trained = next(iter(found.values()))["trained"]
                curves.setdefault(METHODS[entry.spec.method].label, {})[trained] = lines.mean(entry.spec)
    parts.append(plots.curves(curves, folder / "study_2.png", "trained parameters", "nll on test rows", log=True))
    return "\n\n".join(parts)
