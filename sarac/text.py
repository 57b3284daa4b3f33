"""Text as data: a model's tokenizer, JSONL rows as tokens with labels, and rows as calls of the model."""

import inspect
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from sarac.ir.errors import InputError, SaracWarning
from sarac.ir.inputs import Inputs, InputSpec, TensorSpec
from sarac.ir.record import inputs_of

IGNORED = -100  # the label of a token that is given and not to be learnt


@dataclass(frozen=True)
class Rows:
    """Tokenised rows (input_ids and labels, equally long), and how many had nothing to learn within the length."""

    items: list[dict[str, list[int]]]
    left_out: int = 0


def tokenizer_of(model: nn.Module, folder: str | None = None) -> Any:
    """The tokenizer in `folder`, or else in what the model was opened from; InputError where there is none."""
    source = folder or str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if not source:
        raise InputError(f"{type(model).__name__} does not say where its tokenizer is: give its folder, --tokenizer FOLDER.")
    try:
        return transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"There is no readable tokenizer in {source} ({reason}): give its folder, --tokenizer FOLDER."
        ) from error


def copy_tokenizer(model: nn.Module, target: Path, folder: str | None = None) -> None:
    """Write the model's tokenizer into `target`; where it has none a warning says so, if it is a model of text."""
    try:
        tokenizer_of(model, folder).save_pretrained(target)
    except InputError as error:
        if folder is not None:
            raise
        if getattr(model, "main_input_name", "") == "input_ids":
            warnings.warn(f"{target.name} gets no tokenizer: {error}", SaracWarning, stacklevel=2)


def vocabulary_of(model: nn.Module, tokenizer: Any) -> int:
    """How many token ids the model knows, by its embedding; by its tokenizer where it does not show one."""
    finder = getattr(model, "get_input_embeddings", None)
    table = finder() if callable(finder) else None
    return table.num_embeddings if isinstance(table, nn.Embedding) else len(tokenizer)


def longest(model: nn.Module, length: int) -> int:
    """So many tokens, or as many as the model takes."""
    return min(length, getattr(getattr(model, "config", None), "max_position_embeddings", None) or length)


def token_spec(model: nn.Module, vocabulary: int) -> InputSpec:
    """The input spec of a language model: token ids below `vocabulary`, and a mask where its forward takes one."""
    tensors = [TensorSpec("input_ids", "int64", (2, 16), vocabulary)]
    if takes_mask(model):
        tensors.append(TensorSpec("attention_mask", "int64", (2, 16)))
    return InputSpec(tuple(tensors))


def input_spec(model: nn.Module) -> InputSpec | None:
    """What the model knows of its inputs: the spec that was kept with it, or transformers' token ids; None for neither."""
    kept = inputs_of(model)
    if kept:
        return InputSpec.from_json(kept)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if isinstance(vocabulary, int) and getattr(model, "main_input_name", "") == "input_ids":
        return token_spec(model, vocabulary)
    return None


def read_rows(path: Path, tokenizer: Any, length: int, vocabulary: int) -> Rows:
    """The rows of a JSONL file as at most `length` tokens each; InputError, with its line, for a row that is not one."""
    items, left_out = [], 0
    for where, row in _jsonl(path):
        tokens, given = _tokens(row, where, tokenizer)
        if tokens and max(tokens) >= vocabulary:
            raise InputError(
                f"{where}: the tokenizer gives the id {max(tokens)}, and the model knows {vocabulary}: they do not belong "
                "together. Give the model's own tokenizer, --tokenizer FOLDER."
            )
        labels = [IGNORED] * given + tokens[given:]
        if set(labels[1:length]) <= {IGNORED}:  # the first token is never predicted
            left_out += 1
        else:
            items.append({"input_ids": tokens[:length], "labels": labels[:length]})
    if not items:
        raise InputError(
            f"No row of {path} has anything to learn within {length} tokens: give longer texts or a larger --length."
        )
    return Rows(items, left_out)


def read_inputs(path: Path, model: nn.Module, tokenizer: Callable[[], Any]) -> list[Inputs]:
    """The rows of a JSONL file as calls of the model: text as tokens, anything else as inputs by name, batch included."""
    kept = InputSpec.from_json(inputs_of(model) or "[]")
    dtypes = {tensor.name: getattr(torch, tensor.dtype) for tensor in kept.tensors}
    calls = []
    for where, row in _jsonl(path):
        if row.keys() & {"text", "prompt"}:
            ids = torch.tensor([_tokens(row, where, tokenizer())[0]])
            mask = {"attention_mask": torch.ones_like(ids)} if takes_mask(model) else {}
            calls.append(Inputs((), {"input_ids": ids, **mask}))
        else:
            try:
                calls.append(Inputs((), {name: torch.tensor(value, dtype=dtypes.get(name)) for name, value in row.items()}))
            except (TypeError, ValueError, RuntimeError) as error:
                raise InputError(f"{where}: {error}. Write every input by its name, as nested lists of numbers.") from error
    return calls


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row with its place; InputError at the first line that is no JSON object, and for a file without any."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}. Give a JSONL file.") from error
    if not any(line.strip() for line in lines):
        raise InputError(f"{path} is empty: give one JSON object a line, with text, or with prompt and completion.")
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{where}: no JSON ({error.msg} at column {error.colno}). Write one object a line.") from error
            if not isinstance(row, dict):
                raise InputError(f"{where}: a JSON {type(row).__name__}, no object. Write one object a line.")
            yield where, row


def _tokens(row: dict[str, Any], where: str, tokenizer: Any) -> tuple[list[int], int]:
    """The tokens of one row, and how many of the first belong to its prompt."""
    keys = ("text",) if "text" in row else ("prompt", "completion")
    odd = next((key for key in keys if not isinstance(row.get(key), str)), None)
    if odd is not None:
        wrong = (
            f"its {odd!r} is of type {type(row[odd]).__name__}"
            if odd in row
            else f"it has {', '.join(map(repr, row)) or 'no keys'}"
        )
        raise InputError(f"{where}: {wrong}. A row has a string `text`, or the strings `prompt` and `completion`.")
    tokens: list[int] = list(tokenizer(row[keys[0]], verbose=False).input_ids)
    given = 0 if len(keys) == 1 else len(tokens)
    if given:
        tokens += tokenizer(row["completion"], add_special_tokens=False, verbose=False).input_ids
    end = tokenizer.eos_token_id
    return (tokens if end is None or tokens[-1:] == [end] else [*tokens, end]), given


def takes_mask(model: nn.Module) -> bool:
    """Whether the model's forward takes an attention mask."""
    parameters = inspect.signature(model.forward).parameters.values()
    return any(parameter.name == "attention_mask" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
