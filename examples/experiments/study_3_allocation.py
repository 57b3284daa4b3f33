"""Study 3: at one total of trained numbers, whether it matters that ranks are adaptive and dealt to the right layers."""

from pathlib import Path
from typing import Any

from experiments import plots
from experiments.bench import dealt
from experiments.lines import Entry, Lines, comparison, table
from experiments.methods import METHODS
from experiments.run import read
from experiments.spec import Spec, seeds

TITLE = "Adaptive, fixed and shuffled ranks at one total"
QUESTION = "Is it the allocation of the ranks or their sum that counts?"
VALUES = (0.1, 0.3, 0.6)
FACTORS = {4: "budget:1221960", 8: "budget:2443920"}  # the totals of these fixed ranks, which thresholds do not hit so closely
KINDS = {"adaptive": "{}", "fixed": "uniform:like={}", "shuffled": "{}|shuffled"}
RANKS = Path(__file__).parent / "results" / "study_1.jsonl"
Groups = dict[str, list[Entry]]


def groups(model: str) -> Groups:
    """The three plans of every total, by the table's title."""
    how: dict[str, Any] = {"model": model}
    if model == "tiny":
        how |= {"task": "sums", "steps": 12, "batch": 8}
    found: Groups = {}
    for t in VALUES if model != "tiny" else (0.3,):
        plans = {kind: form.format(f"threshold:{t:g}") for kind, form in KINDS.items()}
        found[f"{METHODS['sara'].label}, {t:g}"] = [Entry(kind, Spec("sara", plan, **how)) for kind, plan in plans.items()]
    name = "sara-factors-svd"
    for rank, budget in FACTORS.items() if model != "tiny" else ():
        plans = {kind: form.format(budget) for kind, form in KINDS.items()} | {"fixed": f"rank:{rank}"}
        found[f"{METHODS[name].label}, {budget}"] = [Entry(kind, Spec(name, plan, **how)) for kind, plan in plans.items()]
    return found


def specs(model: str) -> list[Spec]:
    """Three seeds of each; a shuffle follows the seed, so that three are tried."""
    return seeds([entry.spec for group in groups(model).values() for entry in group], 2 if model == "tiny" else 3)


def report(lines: Lines, model: str, folder: Path) -> str:
    """A table for every total, against the adaptive plan, and a plot."""
    parts, points = [], {}
    for title, group in groups(model).items():
        parts.append(f"{title}:\n\n{comparison(lines, group, group[0])}")
        for entry in group:
            points.setdefault(entry.label, []).append((title.replace(", ", "\n"), lines.mean(entry.spec)))
    parts.append(moves() if model == "smollm2" else "")
    parts.append(plots.grouped(points, folder / "study_3.png", "nll on test rows"))
    return "\n\n".join(part for part in parts if part)


def moves(path: Path = RANKS) -> str:
    """Which part of the ranks each control takes from one weight and gives to another, by the ranks of study 1."""
    rows = [row for row in read(path) if row["model"] == "smollm2"]
    shapes, found = {row["site"]: row["shape"] for row in rows}, []
    for threshold in (f"{value:g}" for value in VALUES) if rows else ():
        ranks = {row["site"]: row["ranks"][threshold] for row in rows}
        fixed = dict.fromkeys(ranks, sum(ranks.values()) // len(ranks))
        plans = [fixed, *(dealt(ranks, shapes, seed) for seed in range(3))]
        shares = [sum(abs(plan[name] - k) for name, k in ranks.items()) / 2 / sum(ranks.values()) for plan in plans]
        found.append([threshold, f"{100 * shares[0]:.1f}", ", ".join(f"{100 * share:.1f}" for share in shares[1:])])
    heads = ["threshold", "fixed, %", "shuffled, % (seeds 0, 1, 2)"]
    told = "What each control moves: half of the sum of the changes of k, of the sum of k. A shuffle deals ranks only"
    return f"{told} among weights of one shape: q and o, k and v, the three of the MLP.\n\n{table(heads, found)}" if found else ""
