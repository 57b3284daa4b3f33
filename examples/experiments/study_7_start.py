"""Study 7: what of start, scale, parametrisation, rate and schedule matters."""

from pathlib import Path

from experiments import plots
from experiments.lines import Entry, Lines, comparison, table
from experiments.methods import METHODS
from experiments.spec import Spec, seeds

TITLE = "Start, parametrisation, learning rate"
QUESTION = "What of init, scale and parametrisation matters, and how narrow is the window of good rates?"
FAMILIES = {
    "sara-factors": "SARA, factors",
    "mosara": "Mo-SARA",
    "sara": "SARA, singular values",
    "lora": "LoRA",
    "": "Other methods",
}


def groups(model: str) -> dict[str, list[Entry]]:
    """The entries of every table."""
    if model == "tiny":
        how = {"task": "sums", "steps": 12, "batch": 8, "model": model}
        names = ("sara", "sara-absolute")
        return {"λ or λ/s": [Entry(METHODS[n].label, Spec(n, "threshold:0.6", **how)) for n in names]}  # type: ignore[arg-type]

    def of(plan: str, *names: str, extras: tuple[str, ...] = ()) -> list[Entry]:
        return [Entry(METHODS[name].label, Spec(name, plan, model=model, extras=extras)) for name in names]

    return {
        "What trains is δ = λ/s, or λ itself": of("threshold:0.6", "sara", "sara-absolute"),
        "Where the factors start, threshold 0.02": of(
            "threshold:0.02", "sara-factors-svd", "sara-factors-random", extras=("orthogonality",)
        ),
        "The order of the sums, under bfloat16": of("threshold:0.6", "sara", "sara-two-sided", "sara-materialised"),
    }


def specs(model: str) -> list[Spec]:
    """Three seeds of each."""
    return seeds([entry.spec for group in groups(model).values() for entry in group], 2 if model == "tiny" else 3)


def report(lines: Lines, model: str, folder: Path) -> str:
    """The tables, how far trained factors are from orthogonal ones, and the nll by rate of every search."""
    parts = [f"{title}:\n\n{comparison(lines, group, group[0])}" for title, group in groups(model).items()]
    rows = []
    for entry in (entry for group in groups(model).values() for entry in group if entry.spec.extras):
        found = [lines.mean(entry.spec, lambda line, role=role: line.get("orthogonality", {}).get(role)) for role in "uv"]  # type: ignore[misc]
        if all(found):
            rows.append([entry.label, *(one.text() for one in found if one)])
    if rows:
        parts += ["‖UᵀU − I‖/√k of the trained factors, and V's:", table(["", "U", "V"], rows)]
    parts.append(searched(lines))
    up = "nll on held-out rows, short runs"
    parts.append(plots.panels(families(lines), folder / "study_7.png", "learning rate", up, log=True))
    return "\n\n".join(parts)


def families(lines: Lines) -> dict[str, dict[str, dict[float, float]]]:
    """The nll by rate of every search, by what the methods have in common."""
    found: dict[str, dict[str, dict[float, float]]] = {title: {} for title in FAMILIES.values()}
    for (name, plan), tried in sorted(lines.search.found.items()):
        title = next(title for start, title in FAMILIES.items() if name.startswith(start))
        label = f"{METHODS[name].label.removeprefix('SARA, ').removeprefix('Mo-SARA, ')} {plan}".strip()
        found[title][label] = dict(sorted(tried.items()))
    return found


def searched(lines: Lines) -> str:
    """The search of every method: the best rate, and over which factor of rates the nll stays within 0.02 of the best."""
    rows = []
    for pair, tried in lines.search.found.items():
        best = lines.search.best(pair)
        assert best is not None
        good = [rate for rate, nll in tried.items() if nll <= tried[best] + 0.02]
        star = "*" if lines.search.at_edge(pair) else ""
        all_of_it = ", ".join(f"{rate:g}: {nll:.3f}" for rate, nll in sorted(tried.items()))
        rows.append([METHODS[pair[0]].label, pair[1], f"{best:g}{star}", f"{max(good) / min(good):.0f}", all_of_it])
    heads = ["", "plan", "best rate", "factor of rates within 0.02", "nll by rate"]
    return f"The search (one seed, short runs, held-out rows of training; * at its edge):\n\n{table(heads, rows)}"
