"""The public data sets as rows: a prompt, the answer to be learnt, and what tells two rows of a set apart."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
CHOICES = re.compile(r"Answer format: ([\w/]+)")
INFIX = {"+", "-", "*", "/"}


def normal(text: str) -> str:
    """Letters and digits alone: two rows with the same are the same question."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def plain(text: str) -> str:
    """Numbers such as 22.0 as 22."""
    return re.sub(r"(\d+)\.0+\b", r"\1", str(text))


def problem(question: str, answer: str) -> Row:
    """A problem in words and its worked answer."""
    return {"prompt": f"Question: {question.strip()}\nAnswer:", "answer": f" {answer.strip()}", "key": normal(question)}


def solved(equation: str, answer: Any) -> str:
    """The answer of a problem that one equation solves, ended as GSM8K's are."""
    equation, value = plain(equation).replace("( ", "(").replace(" )", ")"), plain(answer)
    return f"{equation} = {value}\n#### {value}"


def gsm8k(folder: Path, part: str) -> Iterator[Row]:
    for line in (folder / "gsm8k" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield problem(row["question"], row["answer"])


def mawps(folder: Path, part: str) -> Iterator[Row]:
    """The number alone: its test rows have no equation."""
    for row in json.loads((folder / "mawps" / f"{part}.json").read_text(encoding="utf-8")):
        question, answer = (row["original_text"], row["ans"]) if part == "train" else (row["instruction"], row["answer"])
        yield problem(question, f"#### {plain(answer)}")


def infix(equation: str, numbers: list[str]) -> str:
    """`- * number0 number1 number2` as (number0 * number1) - number2, with the numbers in their places."""
    stack: list[str] = []
    for token in reversed(equation.split()):
        if token in INFIX:
            left, right = stack.pop(), stack.pop()
            stack.append(f"({left} {token} {right})")
        else:
            index = re.fullmatch(r"number(\d+)", token)
            stack.append(plain(numbers[int(index[1])] if index else token))
    return stack.pop()


def svamp(folder: Path, part: str) -> Iterator[Row]:
    """Trained on its MAWPS/ASDiv split, tested on SVAMP."""
    if part == "test":
        for row in json.loads((folder / "svamp" / "SVAMP.json").read_text(encoding="utf-8")):
            question = f"{row['Body'].rstrip('. ')}. {row['Question']}"
            yield problem(question, solved(row["Equation"], row["Answer"]))
        return
    with (folder / "svamp" / "data_mawps-asdiv-a_svamp_train.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            numbers = row["Numbers"].split()
            question = re.sub(r"number(\d+)", lambda found: plain(numbers[int(found[1])]), row["Question"])  # noqa: B023
            yield problem(question, solved(infix(row["Equation"], numbers), row["Answer"]))


def commonsense(name: str, folder: Path, part: str) -> Iterator[Row]:
    for row in json.loads((folder / "commonsense" / name / f"{part}.json").read_text(encoding="utf-8")):
        found = CHOICES.search(row["instruction"])
        assert found is not None
        choices = [f" the correct answer is {choice}" for choice in found[1].split("/")]
        prompt = f"{row['instruction'].strip()}\n"
        yield {"prompt": prompt, "answer": f" {row['output'].strip()}", "choices": choices, "key": normal(prompt)}


def e2e(folder: Path, part: str) -> Iterator[Row]:
    """Trained on the devset (there is no train file), tested on the test set with all references of each meaning."""
    name = "devset" if part == "train" else "testset_w_refs"
    with (folder / "e2e" / f"{name}.csv").open(encoding="utf-8-sig") as file:
        rows = [(row["mr"].strip(), row["ref"].strip()) for row in csv.DictReader(file)]
    texts: dict[str, list[str]] = {}
    for meaning, text in rows:
        texts.setdefault(meaning, []).append(text)
    for meaning, text in rows if part == "train" else [(meaning, found[0]) for meaning, found in texts.items()]:
        row = {"prompt": f"Data: {meaning}\nText:", "answer": f" {text}", "key": normal(meaning)}
        yield row if part == "train" else {**row, "references": texts[meaning]}


# By name: the reader, tokens of a row, tokens that a generated answer may have (0: none is generated).
SETS = {
    "gsm8k": (gsm8k, 256, 200),
    "mawps": (mawps, 128, 16),
    "svamp": (svamp, 128, 48),
    "e2e": (e2e, 144, 80),
    "boolq": (lambda folder, part: commonsense("boolq", folder, part), 80, 0),
    "openbookqa": (lambda folder, part: commonsense("openbookqa", folder, part), 144, 0),
    "arc-easy": (lambda folder, part: commonsense("ARC-Easy", folder, part), 160, 0),
}
