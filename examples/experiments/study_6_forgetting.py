"""Study 6: what each method learns of a task and forgets of text that has nothing to do with it."""

from pathlib import Path
from typing import Any

from experiments import plots
from experiments.lines import Entry, Line, Lines, comparison, table
from experiments.methods import METHODS
from experiments.spec import SEARCH_SEED, Spec, seeds

TITLE = "Accuracy and forgetting"
QUESTION = "How far from full fine-tuning is it, and what is forgotten?"
TASKS = ("gsm8k", "svamp", "boolq", "e2e", "mawps")
FINALISTS = (
    ("full", ""),
    ("lora", "r=8"),
    ("sara", "threshold:0.6"),
    ("sara-factors-svd", "threshold:0.05"),
    ("mosara-soft", "threshold:0.5"),
)
RUINED = 2.0  # nll above which a run learnt nothing
SCORES = ("exact", "choices", "bleu", "rouge_l")


def groups(model: str) -> dict[str, list[Entry]]:
    """The finalists by task, the untouched model first."""
    how: dict[str, Any] = {"extras": ("accuracy",), "model": model}
    pairs, tasks = (("untouched", ""), *FINALISTS), TASKS
    if model == "tiny":
        how |= {"steps": 12, "batch": 8}
        pairs, tasks = (("untouched", ""), ("sara", "threshold:0.6"), ("lora", "r=1")), ("sums", "larger")
    return {task: [Entry(METHODS[m].label, Spec(m, plan, task, **how)) for m, plan in pairs] for task in tasks}


def specs(model: str) -> list[Spec]:
    """Three seeds of each; the untouched model once."""
    found = [entry.spec for group in groups(model).values() for entry in group]
    trained = seeds([spec for spec in found if spec.method != "untouched"], 1 if model == "tiny" else 3)
    return [*trained, *(spec for spec in found if spec.method == "untouched")]


def score(line: Line, name: str) -> float | None:
    """A score of the line's task in percent."""
    found = line.get("accuracy", {}).get(line["spec"]["task"], {}).get(name)
    return None if found is None else found * (100 if name in SCORES[:2] else 1)


def report(lines: Lines, model: str, folder: Path) -> str:
    """Scores and losses by task, and what was forgotten over what was learnt, by the rate."""
    parts = []
    for task, group in groups(model).items():
        parts.append(f"{task}:\n\n{comparison(lines, group, group[-1])}")
        kinds = [name for name in SCORES if any(lines.values(e.spec, lambda line, n=name: score(line, n)) for e in group)]  # type: ignore[misc]
        rows = []
        for entry in group:
            found = [lines.mean(entry.spec, lambda line, n=name: score(line, n)) for name in kinds]  # type: ignore[misc]
            if any(found):
                rows.append([entry.label, *(one.text(1) if one else "" for one in found)])
        if rows:
            parts.append(table(["", *(f"{name}, %" if name in SCORES[:2] else name for name in kinds)], rows))
    rows, points = by_rate(lines)
    if rows:
        parts += [
            "What the search's short runs forgot, by the rate (held-out nll, unrelated nll):",
            table(["", "plan", "by rate"], rows),
        ]
    parts.append(plots.scatter(points, folder / "study_6.png", "nll on held-out rows, by rate", "nll on unrelated text"))
    return "\n\n".join(parts)


def by_rate(lines: Lines) -> tuple[list[list[str]], dict[str, list[tuple[float, float]]]]:
    """What each searched plan learnt and forgot at each rate, as rows and as points; runs that were ruined are left out."""
    found: dict[tuple[str, str], dict[float, tuple[float, float]]] = {}
    for line in lines.all:
        spec = line["spec"]
        if spec["seed"] == SEARCH_SEED and "error" not in line and line["valid_nll"] < RUINED:
            found.setdefault((spec["method"], spec["plan"]), {})[spec["lr"]] = line["valid_nll"], line["unrelated_nll"]
    names = {pair: f"{METHODS[pair[0]].label} {pair[1]}".strip() for pair in found}
    rows = [
        [METHODS[name].label, plan, ", ".join(f"{rate:g}: {nll:.3f}, {kept:.3f}" for rate, (nll, kept) in sorted(tried.items()))]
        for (name, plan), tried in found.items()
    ]
    shown = [pair for pair in found if pair[0] in {name for name, _ in FINALISTS}]
    return rows, {names[pair]: list(found[pair].values()) for pair in shown}
