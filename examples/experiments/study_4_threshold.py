"""Study 4: which threshold to take, from 0.01 to 1, for both ways to train and on two tasks."""

from pathlib import Path

from experiments import plots
from experiments.lines import Entry, Lines, comparison
from experiments.methods import METHODS
from experiments.spec import Spec, seeds

TITLE = "The threshold"
QUESTION = "Which threshold should be the default?"
THRESHOLDS = {"sara": (0.01, 0.05, 0.1, 0.3, 0.6, 0.8, 1.0), "sara-factors-svd": (0.01, 0.02, 0.05, 0.1, 0.3, 1.0)}
REFERENCE = {"sara": "0.6", "sara-factors-svd": "0.1"}
TASKS = ("gsm8k", "e2e")


def groups(model: str) -> dict[tuple[str, str], list[Entry]]:
    """The entries by method and task."""
    if model == "tiny":
        how = {"task": "sums", "steps": 12, "batch": 8}
        return {("sara", "sums"): [Entry(f"{t:g}", Spec("sara", f"threshold:{t:g}", model=model, **how)) for t in (0.3, 1.0)]}  # type: ignore[arg-type]
    return {
        (method, task): [Entry(f"{t:g}", Spec(method, f"threshold:{t:g}", task, model=model)) for t in thresholds]
        for task in TASKS
        for method, thresholds in THRESHOLDS.items()
    }


def specs(model: str) -> list[Spec]:
    """Three seeds of each."""
    return seeds([entry.spec for group in groups(model).values() for entry in group], 2 if model == "tiny" else 3)


def report(lines: Lines, model: str, folder: Path) -> str:
    """A table a method and task, against the threshold 0.6, of factors 0.1, and curves over the threshold."""
    parts, curves = [], {}
    for (method, task), group in groups(model).items():
        reference = next((entry for entry in group if entry.label == REFERENCE.get(method)), group[-1])
        parts.append(f"{METHODS[method].label}, {task}, by threshold:\n\n{comparison(lines, group, reference)}")
        found = {float(entry.label): lines.mean(entry.spec) for entry in group}
        curves[f"{METHODS[method].label}, {task}"] = {t: one for t, one in found.items() if one}
    parts.append(plots.curves(curves, folder / "study_4.png", "threshold", "nll on test rows", log=True))
    return "\n\n".join(parts)
