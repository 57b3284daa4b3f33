"""The pilot behind the default parametrisation and `recommended_lr`: perplexity after a short run, by rate.

    python tests/benchmarks/learning_rate.py MODEL_FOLDER [--steps 60] [--out pilot.json]

MODEL_FOLDER is a causal language model of transformers. Text: the language reference that every CPython carries; the last tenth
of its topics is held out. Every run starts from the same model, data and seed; AdamW without decay, no warm-up.
"""

import argparse
import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import sarac
from sarac.ir.layers import adapted

RATES = {
    "δ = λ/s": ("threshold:0.6", "sara", [2e-3, 5e-3, 1e-2, 2e-2, 3e-2, 5e-2, 1e-1]),
    "λ": ("threshold:0.6", "sara", [2e-3, 1e-2, 2e-2, 5e-2, 1e-1, 3e-1]),
    "factors, random": ("threshold:0.01,train=factors,init=random", "sara", [1e-3, 3e-3, 1e-2, 2e-2, 5e-2]),
    "factors, svd": ("threshold:0.01,train=factors,init=svd", "sara", [3e-4, 1e-3, 3e-3, 1e-2, 2e-2]),
    "Mo-SARA, 5 sets": ("threshold:0.6", "mosara", [1e-2, 2e-2, 5e-2, 1e-1]),
}


def blocks(tokenizer: Any, length: int, held_out: bool) -> Tensor:
    """Blocks of `length` tokens of the training or the held-out topics, shape (blocks, length)."""
    names = sorted(topics)
    cut = len(names) * 9 // 10
    text = "\n\n".join(topics[name] for name in (names[cut:] if held_out else names[:cut]))
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    return ids[: len(ids) // length * length].reshape(-1, length)


@torch.no_grad()
def perplexity(model: nn.Module, rows: Tensor, batch: int) -> float:
    """exp of the mean loss over all predicted tokens."""
    model.eval()
    losses = [model(input_ids=part, labels=part).loss.float() for part in rows.split(batch)]
    return math.exp(float(torch.stack(losses).mean()))


def batches(rows: Tensor, batch: int, steps: int) -> Iterator[Tensor]:
    """Random batches, the same ones for every run."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        yield rows[torch.randint(0, len(rows), (batch,), generator=generator)]


def start(base: nn.Module, name: str) -> nn.Module:
    """The adapted model that every rate of a method starts from."""
    plan, method, _ = RATES[name]
    model = sarac.transform(base, plan, method=method)
    if name == "λ":  # a scale of 1 makes the shift λ itself
        for _, module, state in adapted(model):
            for slot in state.slots.values():
                slot.tensors(module)["scale"].data.fill_(1.0)
    return model


def run(first: nn.Module, name: str, rate: float, rows: Tensor, held: Tensor, steps: int, batch: int) -> dict[str, Any]:
    """One run: the perplexity on the held-out part after `steps` steps at `rate`."""
    model = copy.deepcopy(first)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    model.train()
    for part in batches(rows, batch, steps):
        loss = model(input_ids=part, labels=part).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    count = sum(parameter.numel() for parameter in trained)
    return {"method": name, "rate": rate, "trainable": count, "perplexity": perplexity(model, held, batch)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--held", type=int, default=48, help="held-out blocks")
    parser.add_argument("--only", nargs="*", default=list(RATES), choices=list(RATES))
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device)
    rows = blocks(tokenizer, options.length, held_out=False).to(device)
    held = blocks(tokenizer, options.length, held_out=True)[: options.held].to(device)
    found = [{"method": "untouched", "rate": 0.0, "trainable": 0, "perplexity": perplexity(base, held, options.batch)}]
    console = Console()
    for name in options.only:
        first = start(base, name)
        for rate in RATES[name][2]:
            found.append(run(first, name, rate, rows, held, options.steps, options.batch))
            console.print(found[-1])
    table = Table(
        "method", "rate", "trainable", "perplexity", title=f"{options.steps} steps of {options.batch} x {options.length}"
    )
    for row in found:
        table.add_row(row["method"], f"{row['rate']:g}", f"{row['trainable']:,}", f"{row['perplexity']:.3f}")
    console.print(table)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
