"""Study 8: one adapter for four tasks, routed or not, against one for each."""

from pathlib import Path
from typing import Any

from experiments import plots
from experiments.intervals import mean, paired
from experiments.lines import Entry, Lines, comparison, difference, table
from experiments.methods import METHODS
from experiments.spec import Spec, seeds

TITLE = "Several tasks at once"
QUESTION = "What is routing for: one Mo-SARA on four tasks, four SARA adapters, one LoRA, one SARA?"
MIX, PLAN, STEPS = "gsm8k+svamp+boolq+e2e", "threshold:0.5", 200


def together(model: str) -> list[Entry]:
    """One adapter for all tasks."""
    how: dict[str, Any] = {"task": MIX, "steps": STEPS, "model": model}
    pairs: tuple[tuple[str, str], ...] = (("mosara-soft", PLAN), ("sara", PLAN), ("lora", "r=8"), ("lora", "r=1"))
    if model == "tiny":
        how |= {"task": "sums+larger", "steps": 12, "batch": 8}
        pairs = pairs[:2]
    return [Entry(f"one {METHODS[m].label}, {plan}", Spec(m, plan, **how)) for m, plan in pairs]


def apart(model: str) -> list[Spec]:
    """An adapter for each task, which sees as many rows of it as the mixed runs do."""
    first = together(model)[0].spec
    tasks = first.task.split("+")
    return [Spec("sara", PLAN, task, steps=first.steps // len(tasks), batch=first.batch, model=model) for task in tasks]


def specs(model: str) -> list[Spec]:
    """Three seeds of each."""
    return seeds([*(entry.spec for entry in together(model)), *apart(model)], 2 if model == "tiny" else 3)


def report(lines: Lines, model: str, folder: Path) -> str:
    """The nll of every task, all of them together, and paired differences from one Mo-SARA."""
    every, singles = together(model), apart(model)
    tasks = [spec.task for spec in singles]
    rows, reference = [], lines.values(every[0].spec)
    points: dict[str, list[Any]] = {}
    for entry in every:
        each = [lines.mean(entry.spec, lambda line, t=task: line["nll_by_task"].get(t)) for task in tasks]  # type: ignore[misc]
        if all(each):
            gap = paired(lines.values(entry.spec), reference) if entry != every[0] else None
            trains = next(iter(lines.of(entry.spec).values()))["trained"]
            rows.append([entry.label, f"{trains:,}", *(one.text() for one in each if one), difference(gap)])
            points[entry.label] = list(zip(tasks, each, strict=True))
    alone = [lines.values(spec) for spec in singles]
    shared = sorted(set.intersection(*(set(found) for found in alone)))
    if shared:
        label = f"{len(tasks)} SARA, singular values, {PLAN}"
        each = [mean([found[seed] for seed in shared]) for found in alone]
        total = {seed: sum(found[seed] for found in alone) / len(alone) for seed in shared}
        trained = sum(next(iter(lines.of(spec).values()))["trained"] for spec in singles)
        rows.append([label, f"{trained:,}", *(one.text() for one in each if one), difference(paired(total, reference))])
        points[label] = list(zip(tasks, each, strict=True))
    heads = ["", "trains", *tasks, f"less {every[0].label}"]
    parts = [f"Each task's nll; the difference is of the mean over tasks:\n\n{table(heads, rows)}"]
    parts += [comparison(lines, every, every[0]), plots.grouped(points, folder / "study_8.png", "nll on test rows")]
    return "\n\n".join(parts)
