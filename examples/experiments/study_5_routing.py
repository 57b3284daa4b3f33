"""Study 5: what the router of Mo-SARA does, and whether it helps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import plots, routing
from experiments.intervals import paired
from experiments.lines import Entry, Line, Lines, comparison, difference, table
from experiments.methods import METHODS
from experiments.spec import Spec, seeds

TITLE = "Routing"
QUESTION = "Does routing help, and do different inputs take different sets?"
MIX = "gsm8k+svamp+boolq+e2e"
VARIANTS = ("mosara-soft", "mosara-topk2", "mosara-hard", "mosara-uniform", "mosara-one", "mosara-bottleneck")
PLAN, STEPS, A_LAYER = "threshold:0.5", 200, 7
FIGURES: dict[str, Callable[[Line], float]] = {
    "entropy of a token's gates, of log(sets)": lambda found: found["entropy"],
    "what an input tells of its set, of log(sets)": lambda found: found["information"],
    "dead sets": lambda found: found["dead"],
    "how far a task's share of a set is from the mean of the tasks at a site (rms)": lambda found: distance(found),
    "the same, tasks dealt by chance": lambda found: distance(found, "between_by_chance"),
    "of the variance between rows, between tasks": lambda found: explained(found),
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


def distance(found: Line, name: str = "between_tasks") -> float:
    """The root of the mean square, over sites, sets and tasks, of a task's share of a set less the mean of the tasks.

    Set 1 of a site has nothing to do with set 1 of another: a mean over sites would cancel what differs.
    """
    return float((found[name] / (len(found["entropy_by_site"]) * len(found["use"]))) ** 0.5)


def explained(found: Line) -> float:
    """Which part of the variance of rows' mean gates lies between tasks; tasks dealt by chance give (tasks − 1) / (rows − 1)."""
    tasks = len(found["use_by_task"])
    rows = found.get("rows", routing.ROWS * tasks)
    return float(found["between_tasks"] / found["between_by_chance"] * (tasks - 1) / (rows - 1))


def figures(lines: Lines, entry: Entry) -> list[list[str]]:
    """Two rows: the figures of the routers before and after training."""
    rows = []
    for when in ("routing_before", "routing"):

        def get(line: Line, figure: Callable[[Line], float], when: str = when) -> float | None:
            return figure(line[when]) if line.get(when) else None

        found = [lines.mean(entry.spec, lambda line, figure=figure: get(line, figure)) for figure in FIGURES.values()]  # type: ignore[misc]
        if not all(found):
            continue
        ps = lines.values(entry.spec, lambda line, when=when: line.get(when, {}).get("p"))  # type: ignore[misc]
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


def report(lines: Lines, model: str, folder: Path) -> str:
    """The scores of the routers, what they do before and after training, and whether tasks use other sets; entropy by depth."""
    every = entries(model)
    acting = [row for entry in every for row in figures(lines, entry)]
    parts = [f"{every[0].spec.task}, {PLAN}:", comparison(lines, every, every[0])]
    apart = [row for entry in every[1:] for row in by_task(lines, entry, every[0])]
    if apart:
        parts += [f"By task, less {every[0].label} (paired by seed):", table(["", "task", "nll, less"], apart)]
    if acting:
        parts += ["What the routers do on test rows of each task (a router is random before it is trained):"]
        parts += [table(["", *FIGURES, "p that tasks differ, by seed"], acting)]
    depth = {entry.label: by_site(lines, entry) for entry in every}
    parts.append(plots.plain({k: v for k, v in depth.items() if v}, folder / "study_5.png", "layer", "entropy / log(sets)"))
    return "\n\n".join(parts)


def by_site(lines: Lines, entry: Entry) -> list[float]:
    """The entropy in every layer of the model, the mean over its sites and seeds."""
    found = [line["routing"]["entropy_by_site"] for line in lines.of(entry.spec).values() if line.get("routing")]
    sites = [sum(column) / len(column) for column in zip(*found, strict=True)]
    return [sum(sites[i : i + A_LAYER]) / A_LAYER for i in range(0, len(sites), A_LAYER)]
