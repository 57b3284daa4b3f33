"""Study 6: what each method learns of a task and forgets of text that has nothing to do with it."""

from pathlib import Path
from typing import Any

from experiments import plots
from experiments.intervals import mean, paired
from experiments.lines import Entry, Line, Lines, comparison, difference, table
from experiments.methods import METHODS
from experiments.spec import SEARCH_SEED, Spec, seeds

TITLE = "Accuracy and forgetting"
QUESTION = "How far from full fine-tuning is it, and what is forgotten?"
TASKS = ("gsm8k", "svamp", "boolq", "e2e", "mawps", "openbookqa", "arc-easy")
FINALISTS = (
    ("full", ""),
    ("lora", "r=8"),
    ("sara", "threshold:0.6"),
    ("sara-factors-svd", "threshold:0.05"),
    ("mosara-soft", "threshold:0.5"),
)
CONTROLS = (("pissa", "r=8"), ("adalora", "r=8"), ("ia3", ""), ("vera", "r=256"))
RUINED = 2.0  # nll above which a run learnt nothing
SCORES = ("exact", "choices", "bleu", "rouge_l")


def groups(model: str) -> dict[str, list[Entry]]:
    """The finalists and the other controls by task, the untouched model first."""
    how: dict[str, Any] = {"extras": ("accuracy",), "model": model}
    pairs, tasks = (("untouched", ""), *FINALISTS, *CONTROLS), TASKS
    if model == "tiny":
        how |= {"steps": 12, "batch": 8}
        pairs, tasks = (("untouched", ""), ("sara", "threshold:0.6"), ("lora", "r=1")), ("sums", "larger")
    return {task: [Entry(METHODS[m].label, Spec(m, plan, task, **how)) for m, plan in pairs] for task in tasks}


def specs(model: str) -> list[Spec]:
    """Three seeds of each; the untouched model once."""
    found = [entry.spec for group in groups(model).values() for entry in group]
    trained = seeds([spec for spec in found if spec.method != "untouched"], 1 if model == "tiny" else 3)
    return [*trained, *(spec for spec in found if spec.method == "untouched")]


def made(lines: Lines, model: str) -> dict[str, list[Entry]]:
    """Of the groups what has been run; all of them where nothing has."""
    found = {task: [entry for entry in group if lines.of(entry.spec)] for task, group in groups(model).items()}
    return {task: group for task, group in found.items() if len(group) > 1} or groups(model)


def score(line: Line, name: str) -> float | None:
    """A score of the line's task in percent."""
    found = line.get("accuracy", {}).get(line["spec"]["task"], {}).get(name)
    return None if found is None else found * (100 if name in SCORES[:2] else 1)


def report(lines: Lines, model: str, folder: Path) -> str:
    """Losses and scores by task, what was forgotten of unrelated text, and that over what was learnt, by the rate."""
    parts: list[str] = []
    points: dict[str, list[Any]] = {}
    for task, group in made(lines, model).items():
        reference = against(group)
        parts += [f"{task}:\n\n{comparison(lines, group, reference)}", scores(lines, group, reference)]
        for entry in group:
            points.setdefault(entry.label, []).append((task, lines.mean(entry.spec, "unrelated_nll")))
    parts.append(forgotten(lines, model))
    parts.append(plots.grouped(points, folder / "study_6_unrelated.png", "nll on unrelated text", log=True))
    rows, curves = by_rate(lines)
    if rows:
        parts += [
            "What the search's short runs forgot, by the rate (held-out nll, unrelated nll):",
            table(["", "plan", "by rate"], rows),
        ]
    across = "nll on held-out rows, by rate (lowest first)"
    parts.append(plots.paths(curves, folder / "study_6.png", across, "nll on unrelated text"))
    return "\n\n".join(part for part in parts if part)


def against(group: list[Entry]) -> Entry:
    """What a group is compared with: full fine-tuning where it is there, else the last."""
    return next((entry for entry in group if entry.spec.method == "full"), group[-1])


def scores(lines: Lines, group: list[Entry], reference: Entry) -> str:
    """The scores of a task and, paired by seed, what they are above the reference's."""
    values = {name: {e.label: lines.values(e.spec, lambda line, n=name: score(line, n)) for e in group} for name in SCORES}  # type: ignore[misc]
    kinds = [name for name in SCORES if any(values[name].values())]
    gap_of = f"less that of {reference.label}"
    heads = [head for name in kinds for head in (f"{name}, %" if name in SCORES[:2] else name, gap_of)]
    rows = []
    for entry in group:
        cells = []
        for name in kinds:
            found, base = values[name][entry.label], values[name][reference.label]
            gap = paired(found, base) if entry != reference else None
            cells += [mean(list(found.values())).text(1) if found else "", difference(gap, 1)]
        if any(cells):
            rows.append([entry.label, *cells])
    return table(["", *heads], rows) if rows else ""


def forgotten(lines: Lines, model: str) -> str:
    """How much further than the reference each method went from unrelated text, by task."""
    found: dict[str, dict[str, str]] = {}
    for task, group in made(lines, model).items():
        reference = against(group)
        base = lines.values(reference.spec, "unrelated_nll")
        for entry in group:
            if entry != reference and entry.spec.method != "untouched":
                gap = paired(lines.values(entry.spec, "unrelated_nll"), base)
                found.setdefault(entry.label, {})[task] = difference(gap)
    tasks = list(made(lines, model))
    rows = [[label, *(gaps.get(task, "") for task in tasks)] for label, gaps in found.items() if any(gaps.values())]
    if not rows:
        return ""
    return f"Nll on unrelated text, less that of {reference.label} (paired by seed):\n\n{table(['', *tasks], rows)}"


def by_rate(lines: Lines) -> tuple[list[list[str]], dict[str, list[tuple[float, float]]]]:
    """What each searched plan learnt and forgot at each rate, as rows, and the finalists' as points; ruined runs are left out."""
    found: dict[tuple[str, str], dict[float, tuple[float, float]]] = {}
    for line in lines.all:
        spec = line["spec"]
        if spec["seed"] == SEARCH_SEED and "error" not in line and line["valid_nll"] < RUINED:
            found.setdefault((spec["method"], spec["plan"]), {})[spec["lr"]] = line["valid_nll"], line["unrelated_nll"]
    rows = [
        [METHODS[name].label, plan, ", ".join(f"{rate:g}: {nll:.3f}, {kept:.3f}" for rate, (nll, kept) in sorted(tried.items()))]
        for (name, plan), tried in found.items()
    ]
    names = {pair: f"{METHODS[pair[0]].label} {pair[1]}".strip() for pair in FINALISTS if pair in found}
    return rows, {label: [found[pair][rate] for rate in sorted(found[pair])] for pair, label in names.items()}
