"""RESULTS.md and its plots, from the lines of results and nothing else.

    PYTHONPATH=examples python -m experiments.report [results.jsonl …]

Conclusions are written by hand, in conclusions.json, and stand above what they are drawn from. Generated texts beside the results
(texts/) are scored against their references first where sacrebleu and rouge-score are there, and the scores become lines.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments import scoring
from experiments.lines import Lines, table
from experiments.methods import METHODS
from experiments.run import BY_VALUE, read, searching, study
from experiments.spec import Spec, merged, missing

HERE = Path(__file__).parent
RESULTS = HERE / "results"  # the committed lines
COMMAND = (
    "PYTHONPATH=examples python -m experiments.run {} --model FOLDER --name {} --tokens tokens.pt "
    "--results examples/experiments/results/runs.jsonl"
)
CONCLUDED = "smollm2"  # the model that conclusions.json is about


def conclusions(model: str = CONCLUDED) -> dict[str, str]:
    """What was concluded of this model, by the study's number."""
    if model != CONCLUDED:
        return {}
    path = HERE / "conclusions.json"
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def section(number: int, lines: Lines, model: str, folder: Path) -> str:
    """A study: its question, its tables and plot, what is concluded, what was not run."""
    module = study(number)
    specs = merged(module.specs(model))
    ready, waiting = lines.search.resolved(specs)
    search = searching(specs, model)
    lacking, unsearched = [*missing(ready, lines.all), *waiting], missing(search, lines.all)
    parts = [f"## {number}. {module.TITLE}", module.QUESTION, conclusions(model).get(str(number), "No conclusion is drawn yet.")]
    parts.append(module.report(lines, model, folder))
    parts.append(f"Made by `{COMMAND.format(number, model)}`.")
    left = [told(*one) for one in ((lacking, specs, "runs"), (unsearched, search, "runs of the search")) if one[0]]
    if left:
        parts.append(f"Not run, and made by the same command: {'; '.join(left)}.")
    return "\n\n".join(part for part in parts if part)


def told(lacking: Sequence[Spec], of: Sequence[Spec], what: str) -> str:
    """How many of these runs are lacking, and which."""
    names = Counter(" ".join(filter(None, (METHODS[s.method].label, s.plan, s.task, s.kind))) for s in lacking)
    return f"{len(lacking)} of {len(of)} {what}: {', '.join(f'{name} ({count})' for name, count in names.items())}"


def about(lines: Sequence[dict[str, Any]], model: str) -> str:
    """What all runs have in common."""
    made = list({line["id"]: line for line in lines if "about" in line and line["spec"]["model"] == model}.values())
    devices = Counter(line["about"]["device"] for line in made)
    versions = sorted({", ".join(f"{name} {v}" for name, v in line["about"]["versions"].items()) for line in made})
    graphs = Counter("as a CUDA graph" if line["graph"] else line["why_eager"] for line in made if "graph" in line)
    if not made:
        return "No run of a model has been made yet: what follows are the questions, and the commands that make the runs."
    rows = [
        f"{len(made)} runs of {model} on {', '.join(f'{name} ({n})' for name, n in devices.items())}; {'; '.join(versions)}.",
        f"Steps were taken {', '.join(f'{how} ({count})' for how, count in graphs.items())}.",
    ]
    chains = Counter(line["why_plain"] or "compiled" for line in made if "why_plain" in line)
    if chains:
        rows.append(f"Chains that all methods share: {', '.join(f'{how} ({count})' for how, count in chains.items())}.")
    failed = Lines(lines).errors
    if failed:
        names = Counter(f"{line['spec']['method']} {line['spec']['plan']}" for line in failed)
        rows.append(f"Failed: {', '.join(f'{name} ({count})' for name, count in names.items())}.")
    return " ".join(rows)


def timings(lines: Sequence[dict[str, Any]], model: str) -> str:
    """What steps took that a method had the machine for alone, the last time each."""
    found = {}
    for line in lines:
        if line["spec"]["kind"] == "timing" and line["spec"]["model"] == model and "error" not in line:
            found[line["id"]] = line
    rows = [
        [METHODS[one["spec"]["method"]].label, one["spec"]["plan"], f"{one['trained']:,}", f"{one['ms_step']:.1f}",
         "" if one["peak_gib"] is None else f"{one['peak_gib']:.1f}", "compiled" if one.get("why_plain") == "" else "as written"]
        for one in sorted(found.values(), key=lambda one: float(one["ms_step"]))
    ]  # fmt: skip
    if not rows:
        return ""
    heads = ["", "plan", "trains", "ms a step", "peak GiB beyond the model", "the shared chains"]
    return f"Steps of 16 rows of gsm8k, alone on the machine:\n\n{table(heads, rows)}"


def scored(paths: Sequence[Path], tokens: Path | None) -> list[dict[str, Any]]:
    """All lines, with BLEU and ROUGE-L of the texts beside them that have none yet; these become lines too."""
    lines = [line for path in paths for line in read(path)]
    references = torch.load(tokens, weights_only=True)["tasks"]["e2e"]["references"] if tokens else []
    for path in paths:
        for text in sorted((path.parent / "texts").glob("*.e2e.txt")) if references else ():
            line = next((one for one in reversed(lines) if one["id"] == text.name.partition(".")[0] and "error" not in one), None)
            if line is None or "bleu" in line["accuracy"]["e2e"]:
                continue
            found = scoring.bleu_and_rouge(text.read_text(encoding="utf-8").splitlines(), references)
            new = {**line, "accuracy": {**line["accuracy"], "e2e": {**line["accuracy"]["e2e"], **found}}}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(new) + "\n")
            lines.append(new)
    return lines


def written(lines: Sequence[dict[str, Any]], model: str, out: Path) -> None:
    """RESULTS.md at `out`, its plots in the folder `plots` beside it."""
    known, folder = Lines(lines), out.parent / "plots"
    head = (out.parent / "settings.md").read_text(encoding="utf-8").strip() if (out.parent / "settings.md").exists() else ""
    parts = ["# Results", "Written by `python -m experiments.report`; conclusions by hand, in conclusions.json.", head]
    parts += [about(lines, model), timings(lines, model), ranks(folder)]
    parts += [section(number, known, model, folder) for number in sorted(BY_VALUE)]
    out.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def ranks(folder: Path) -> str:
    """The section of study 1, which needs no runs."""
    path = RESULTS / "study_1.jsonl"
    if not path.exists():
        return ""
    from experiments import study_1_ranks

    rows = read(path)
    parts = [f"## 1. {study_1_ranks.TITLE}", study_1_ranks.QUESTION, conclusions().get("1", "No conclusion is drawn yet.")]
    return "\n\n".join([*parts, study_1_ranks.report(rows, folder), f"Made by `{study_1_ranks.COMMAND}`."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, default=[RESULTS / "runs.jsonl"])
    parser.add_argument("--name", default="", help="the model; by default the one that most lines are of")
    parser.add_argument("--tokens", type=Path, help="the file of tokens, for the references of generated texts")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    options = parser.parse_args()
    if lacking := [str(path) for path in options.results if not path.exists()]:
        parser.error(f"There are no results at {', '.join(lacking)}: give the file that experiments.run wrote.")
    lines = scored(options.results, options.tokens)
    models = Counter(line["spec"]["model"] for line in lines)
    model = options.name or (models.most_common(1)[0][0] if models else "smollm2")
    written(lines, model, options.out)
    specs = [spec for number in BY_VALUE for spec in study(number).specs(model)]
    left = missing(searching(specs, model), lines)
    print(f"{options.out}: {len(lines)} lines, {len(left)} runs of the search are missing")


if __name__ == "__main__":
    main()
