"""Study 5: what the router of Mo-SARA does, and whether it helps."""

from pathlib import Path
from typing import Any

from experiments import plots
from experiments.intervals import paired
from experiments.lines import Entry, Line, Lines, comparison, difference, table
from experiments.methods import METHODS
from experiments.spec import Spec, seeds

TITLE = "Routing"
QUESTION = "Does routing help, and do different inputs take different sets?"
MIX = "gsm8k+svamp+boolq+e2e"
VARIANTS = ("mosara-soft", "mosara-topk2", "mosara-hard", "mosara-uniform", "mosara-one", "mosara-bottleneck")
PLAN, STEPS, A_LAYER = "threshold:0.5", 200, 7
FIGURES = {
    "entropy of a token's gates, of log(sets)": "entropy",
    "what an input tells of its set, of log(sets)": "information",
    "dead sets": "dead",
    "squared distance between tasks": "between_tasks",
    "the same, tasks dealt by chance": "between_by_chance",
}


def entries(model: str) -> list[Entry]:
    """Every router on four tasks at once, and SARA of the same plan beside them."""
    how: dict[str, Any] = {"task": MIX, "steps": STEPS}
    if model == "tiny":
        how = {"task": "sums+larger", "steps": 12, "batch": 8}
    names = ("mosara-soft", "mosara-uniform") if model == "tiny" else (*VARIANTS, "sara")
    return [Entry(METHODS[n].label, Spec(n, PLAN, model=model, extras=extras(n), **how)) for n in names]


def extras(name: str) -> tuple[str, ...]:
    """The routers' figures where there are routers."""
    return () if name in ("sara", "mosara-one", "mosara-uniform") else ("routing",)


def specs(model: str) -> list[Spec]:
    """Three seeds of each."""
    return seeds([entry.spec for entry in entries(model)], 2 if model == "tiny" else 3)


def figures(lines: Lines, entry: Entry) -> list[list[str]]:
    """Two rows: the figures of the routers before and after training."""
    rows = []
    for when in ("routing_before", "routing"):

        def get(line: Line, name: str, when: str = when) -> Any:
            return line.get(when, {}).get(name)

        found = [lines.mean(entry.spec, lambda line, name=name: get(line, name)) for name in FIGURES.values()]  # type: ignore[misc]
        if not all(found):
            continue
        ps = lines.values(entry.spec, lambda line: get(line, "p"))
        label = f"{entry.label}, {'before' if when.endswith('before') else 'after'}"
        rows.append([label, *(one.text(4) for one in found if one), ", ".join(f"{p:.3f}" for p in ps.values())])
    return rows


def by_task(lines: Lines, entry: Entry, reference: Entry) -> list[list[str]]:
    """The paired difference in the nll of every task, and of unrelated text."""
    values: list[tuple[str, Any]] = [
        (task, lambda line, task=task: line["nll_by_task"].get(task)) for task in entry.spec.task.split("+")
    ]
    pairs = [(name, lines.values(entry.spec, get), lines.values(reference.spec, get)) for name, get in values]
    pairs.append(("unrelated text", *(lines.values(one.spec, "unrelated_nll") for one in (entry, reference))))
    return [[entry.label, name, difference(paired(ours, theirs))] for name, ours, theirs in pairs if ours and theirs]


def use(lines: Lines, entry: Entry) -> list[list[str]]:
    """How much each task uses each set, the mean over sites and seeds."""
    rows = []
    found = [line["routing"] for line in lines.of(entry.spec).values() if line.get("routing")]
    for task in found[0]["use_by_task"] if found else ():
        shares = [sum(one["use_by_task"][task][i] for one in found) / len(found) for i in range(len(found[0]["use"]))]
        rows.append([entry.label, task, *(f"{share:.3f}" for share in shares)])
    return rows


def report(lines: Lines, model: str, folder: Path) -> str:
    """The scores of the routers, what they do before and after training, and which sets the tasks use; entropy by depth."""
    every = entries(model)
    acting = [row for entry in every for row in figures(lines, entry)]
    shares = [row for entry in every for row in use(lines, entry)]
    parts = [f"{every[0].spec.task}, {PLAN}:", comparison(lines, every, every[0])]
    apart = [row for entry in every[1:] for row in by_task(lines, entry, every[0])]
    if apart:
        parts += [f"By task, less {every[0].label} (paired by seed):", table(["", "task", "nll, less"], apart)]
    if acting:
        parts += ["What the routers do on test rows of each task (a router is random before it is trained):"]
        parts += [table(["", *FIGURES, "p that tasks differ, by seed"], acting)]
    if shares:
        sets = [f"set {i + 1}" for i in range(len(shares[0]) - 2)]
        parts += ["Use of the sets by task, after training:", table(["", "task", *sets], shares)]
    depth = {entry.label: by_site(lines, entry) for entry in every}
    parts.append(plots.plain({k: v for k, v in depth.items() if v}, folder / "study_5.png", "layer", "entropy / log(sets)"))
    return "\n\n".join(parts)


def by_site(lines: Lines, entry: Entry) -> list[float]:
    """The entropy in every layer of the model, the mean over its sites and seeds."""
    found = [line["routing"]["entropy_by_site"] for line in lines.of(entry.spec).values() if line.get("routing")]
    sites = [sum(column) / len(column) for column in zip(*found, strict=True)]
    return [sum(sites[i : i + A_LAYER]) / A_LAYER for i in range(0, len(sites), A_LAYER)]
