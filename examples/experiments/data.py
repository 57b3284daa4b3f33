"""The sets of a folder as one small file of tokens, made before any GPU minute is spent.

    PYTHONPATH=examples python -m experiments.data FOLDER MODEL_FOLDER tokens.pt

FOLDER has the layout that README.md names. Of every set: rows that are trained on, rows held out of them (for the search of
rates), test rows, and for those their prompts, references and choices. A row that is longer than its set's length is left out,
as is a row of training whose question stands in the test too; both are counted.
"""

import argparse
import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

from experiments import tiny
from experiments.sets import SETS, Row

TRAIN, VALID, TEST = 4000, 128, 256  # rows of a set at most
GENERATED = 256  # test rows that an answer is generated for, or whose choices are weighed
UNRELATED = 48  # blocks of text that no set has


class Words:
    """A tokenizer of transformers as this harness asks for one."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.inner = AutoTokenizer.from_pretrained(folder)
        self.eos: int = self.inner.eos_token_id
        self.pad = self.eos
        self.name = self.inner.__class__.__name__

    def encode(self, text: str) -> list[int]:
        return self.inner(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=True)


def packed(rows: Sequence[tuple[list[int], list[int]]], length: int, pad: int) -> dict[str, Tensor]:
    """Token rows (rows, length) and, of each, where its answer begins and ends (rows, 2)."""
    ids = torch.full((len(rows), length), pad, dtype=torch.int32)
    bounds = torch.zeros(len(rows), 2, dtype=torch.int32)
    for i, (prompt, answer) in enumerate(rows):
        ids[i, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer], dtype=torch.int32)
        bounds[i] = torch.tensor([len(prompt), len(prompt) + len(answer)])
    return {"ids": ids, "bounds": bounds}


def task(train: list[Row], test: list[Row], length: int, new: int, words: Any, limits: Sequence[int]) -> dict[str, Any]:
    """One set as tokens; `new`: how many an answer that is generated may have."""
    most_train, most_valid, most_test, most_generated = limits
    counts: Counter[str] = Counter()

    def fitting(rows: list[Row], most: int) -> list[tuple[Row, tuple[list[int], list[int]]]]:
        found: list[tuple[Row, tuple[list[int], list[int]]]] = []
        for row in rows:
            pair = (words.encode(row["prompt"]), [*words.encode(row["answer"]), words.eos])
            if len(pair[0]) + len(pair[1]) > length:
                counts["too long"] += 1
            elif len(found) < most:
                found.append((row, pair))
        return found

    draw, tested = random.Random(0), {row["key"] for row in test}
    kept = [row for row in train if row["key"] not in tested]
    counts["in the test too"] = len(train) - len(kept)
    draw.shuffle(kept)
    draw.shuffle(test)
    inner, outer = fitting(kept, most_train + most_valid), fitting(test, most_test)
    pairs = [pair for _, pair in inner]
    made = {
        "valid": packed(pairs[:most_valid], length, words.pad),
        "train": packed(pairs[most_valid:], length, words.pad),
        "test": packed([pair for _, pair in outer], length, words.pad),
    }
    for part, rows in made.items():
        if not len(rows["ids"]):
            raise ValueError(f"A set has no row for {part} that fits into {length} tokens: give it more in sets.py.")
    widest = max(int((part["bounds"][:, 1] - part["bounds"][:, 0]).max()) for part in made.values())
    shown = [row for row, _ in outer][:most_generated]
    return {
        **made, "length": length, "width": widest, "new": new, "counts": dict(counts), "choices": choices(shown, length, words),
        "prompts": [words.encode(row["prompt"]) for row in shown] if new else [],
        "references": [row.get("references", [row["answer"].strip()]) for row in shown] if new else [],
    }  # fmt: skip


def choices(rows: list[Row], length: int, words: Any) -> dict[str, Tensor] | None:
    """Every choice of every row as a row of its own, with the question that it belongs to and whether it is right."""
    pairs, of, right = [], [], []
    for number, row in enumerate(rows):
        for choice in row.get("choices", ()):
            pair = (words.encode(row["prompt"]), [*words.encode(choice), words.eos])
            if len(pair[0]) + len(pair[1]) <= length:
                pairs.append(pair)
                of.append(number)
                right.append(choice == row["answer"])
    return {**packed(pairs, length, words.pad), "of": torch.tensor(of), "right": torch.tensor(right)} if pairs else None


def blocks(text: str, length: int, count: int, words: Any) -> Tensor:
    """Blocks (count, length) of the tokens of a text, spread over it."""
    ids = torch.tensor(words.encode(text), dtype=torch.int32)
    whole = ids[: len(ids) // length * length].reshape(-1, length)
    return whole[torch.linspace(0, len(whole) - 1, min(count, len(whole))).long()]


def digest(made: dict[str, Any]) -> str:
    """A short hash of all tokens."""
    found = hashlib.sha256()
    for name in sorted(made["tasks"]):
        for part in ("train", "valid", "test"):
            found.update(made["tasks"][name][part]["ids"].numpy().tobytes())
    return found.hexdigest()[:16]


def prepare(folder: Path, words: Any) -> dict[str, Any]:
    """All sets that the folder has."""
    made: dict[str, Any] = {"tasks": {}}
    for name, (read, length, new) in SETS.items():
        rows = list(read(folder, "train")), list(read(folder, "test"))
        made["tasks"][name] = task(*rows, length, new, words, (TRAIN, VALID, TEST, GENERATED))
    text = "\n\n".join(topics[name] for name in sorted(topics))
    made["unrelated"] = blocks(text, 256, UNRELATED, words)
    made["about"] = {"digest": digest(made), "tokenizer": words.name, "eos": words.eos, "pad": words.pad}
    return made


def prepare_tiny() -> dict[str, Any]:
    """Three small tasks made in code."""
    words, limits = tiny.Bytes(), (256, 32, 48, 8)
    made: dict[str, Any] = {"tasks": {}}
    for name, (train, test, new) in {
        "sums": (tiny.sums(512, 1), tiny.sums(64, 2), 4),
        "totals": (tiny.sums(512, 3, "Total"), tiny.sums(64, 4, "Total"), 4),
        "larger": (tiny.judgements(512, 3), tiny.judgements(64, 4), 0),
    }.items():
        made["tasks"][name] = task(train, test, 32, new, words, limits)
    made["unrelated"] = blocks(tiny.prose(), 32, 16, words)
    made["about"] = {"digest": digest(made), "tokenizer": words.name, "eos": words.eos, "pad": words.pad}
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("model", type=Path, help="a folder with a tokenizer")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    made = prepare(options.folder, Words(options.model))
    torch.save(made, options.out)
    for name, one in made["tasks"].items():
        rows = {part: len(one[part]["ids"]) for part in ("train", "valid", "test")}
        print(f"{name}: {json.dumps({**rows, 'length': one['length'], 'width': one['width'], **one['counts']})}")
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB, {made['about']}")


if __name__ == "__main__":
    main()
