"""Study 3: at one total of trained numbers, whether it matters that ranks are adaptive and dealt to the right layers."""

from pathlib import Path

from experiments import plots
from experiments.lines import Entry, Lines, comparison
from experiments.methods import METHODS
from experiments.spec import Spec, seeds

TITLE = "Adaptive, fixed and shuffled ranks at one total"
QUESTION = "Is it the allocation of the ranks or their sum that counts?"
VALUES, FACTORS = (0.1, 0.3, 0.6), (0.02, 0.05)
KINDS = {"adaptive": "{}", "fixed": "uniform:like={}", "shuffled": "{}|shuffled"}
Groups = dict[tuple[str, float], list[Entry]]


def groups(model: str) -> Groups:
    """The three plans of every total."""
    pairs = [("sara", t) for t in VALUES] + [("sara-factors-svd", t) for t in FACTORS]
    how: dict[str, object] = {"model": model}
    if model == "tiny":
        pairs, how = [("sara", 0.3)], {"model": model, "task": "sums", "steps": 12, "batch": 8}
    found: Groups = {}
    for method, t in pairs:
        plans = {kind: form.format(f"threshold:{t:g}") for kind, form in KINDS.items()}
        found[method, t] = [Entry(kind, Spec(method, plan, **how)) for kind, plan in plans.items()]  # type: ignore[arg-type]
    return found


def specs(model: str) -> list[Spec]:
    """Three seeds of each; a shuffle follows the seed, so that three are tried."""
    return seeds([entry.spec for group in groups(model).values() for entry in group], 2 if model == "tiny" else 3)


def report(lines: Lines, model: str, folder: Path) -> str:
    """A table for every total, against the adaptive plan, and a plot."""
    parts, points = [], {}
    for (method, t), group in groups(model).items():
        parts.append(f"{METHODS[method].label}, threshold {t:g}:\n\n{comparison(lines, group, group[0])}")
        for entry in group:
            points.setdefault(entry.label, []).append((f"{method}\n{t:g}", lines.mean(entry.spec)))
    parts.append(plots.grouped(points, folder / "study_3.png", "nll on test rows"))
    return "\n\n".join(parts)
