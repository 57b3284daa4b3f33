"""What the demo trains on and measures: Python's own language reference, held out by topic, and two objectives on it.

An objective's `measure` takes any function from inputs to the model's first output, so that the same figure is taken
of a torch model and of an ONNX file.
"""

import math
import random
import re
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Inputs = Mapping[str, Tensor]
Forward = Callable[[Inputs], Tensor]

TYPING_ERRORS = 0.2  # the share of letters that Retrieval's queries lose, double or replace
TEMPERATURE = 0.05


def split(held_topics: int, seed: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Paragraphs by topic: to train on, and held out.

    Topics repeat each other (`compound` holds all of `with`), so a paragraph that is held out is taken from the others too.
    """
    names = sorted(topics)
    random.Random(seed).shuffle(names)
    texts = {name: [part.strip("\n") for part in topics[name].split("\n\n")] for name in names}
    held = {name: texts[name] for name in names[:held_topics]}
    secret = {_plain(part) for parts in held.values() for part in parts}
    train = {name: [part for part in texts[name] if _plain(part) not in secret] for name in names[held_topics:]}
    return train, held


@dataclass
class LanguageModelling:
    """Predict the next token; the figure is perplexity on the held-out topics, which falls as the model learns."""

    tokenizer: Any
    batch: int
    length: int
    held_topics: int
    held_windows: int
    seed: int = 0
    figure = "perplexity on held-out topics"
    better = "lower"

    def __post_init__(self) -> None:
        train, held = (self._windows(texts) for texts in split(self.held_topics, self.seed))
        self.train, self.held = train, held[:: max(1, len(held) // self.held_windows)][: self.held_windows]

    def batches(self) -> Iterator[Inputs]:
        """Random windows without end, every one once before any comes again."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            for rows in torch.randperm(len(self.train), generator=generator).split(self.batch):
                yield self._inputs(self.train[rows])

    def loss(self, forward: Forward, inputs: Inputs) -> Tensor:
        """Mean negative log-likelihood a token."""
        logits, ids = forward(inputs), inputs["input_ids"]
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    @torch.no_grad()
    def measure(self, forward: Forward) -> float:
        """Perplexity on the held-out windows."""
        losses = [self.loss(forward, self._inputs(rows)) for rows in self.held.split(self.batch)]
        return math.exp(torch.stack(losses).mean())

    def example(self) -> Inputs:
        """Inputs as the model takes them, for the exporter; short ones, since it checks every logit of them."""
        return self._inputs(self.held[:2, :16])

    def try_out(self, forward: Forward, prompt: str) -> str:
        """The likeliest continuation, twenty tokens, without a cache."""
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(20):
            following = forward(self._inputs(ids))[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, following], 1)
        return self.tokenizer.decode(ids[0])

    def _windows(self, texts: Mapping[str, list[str]]) -> Tensor:
        ids = [self.tokenizer("\n\n".join(parts))["input_ids"] + [self.tokenizer.eos_token_id] for parts in texts.values()]
        flat = torch.tensor([token for topic in ids for token in topic])
        return flat[: len(flat) // self.length * self.length].view(-1, self.length)

    def _inputs(self, ids: Tensor) -> Inputs:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@dataclass
class Retrieval:
    """Find a sentence by a version of it full of typing errors; the figure is how often the right one ranks first, and rises."""

    tokenizer: Any
    batch: int
    length: int
    held_topics: int
    held_windows: int
    seed: int = 0
    figure = "right sentence ranks first, held-out topics"
    better = "higher"

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.train, held = (_sentences(texts) for texts in split(self.held_topics, self.seed))
        self.held = self.random.sample(held, min(self.held_windows, len(held)))
        self.queries = [self._mistyped(text) for text in self.held]

    def batches(self) -> Iterator[list[str]]:
        """Random sentences without end."""
        while True:
            yield self.random.sample(self.train, self.batch)

    def loss(self, forward: Forward, texts: list[str]) -> Tensor:
        """Contrastive: every mistyped sentence against all sentences of the batch."""
        queries, answers = self._embed(forward, [self._mistyped(text) for text in texts]), self._embed(forward, texts)
        return F.cross_entropy(queries @ answers.T / TEMPERATURE, torch.arange(len(texts)))

    @torch.no_grad()
    def measure(self, forward: Forward) -> float:
        """The share of mistyped held-out sentences whose original has the nearest embedding."""
        scores = self._embed(forward, self.queries) @ self._embed(forward, self.held).T
        return float((scores.argmax(1) == torch.arange(len(self.held))).float().mean())

    def example(self) -> Inputs:
        """Inputs as the model takes them, for the exporter."""
        return self._inputs(self.held[:2])

    @torch.no_grad()
    def try_out(self, forward: Forward, prompt: str) -> str:
        """The held-out sentence nearest to a question."""
        nearest = self._embed(forward, self.held) @ self._embed(forward, [prompt]).T
        return f"{prompt} -> {self.held[int(nearest.argmax())]}"

    def _embed(self, forward: Forward, texts: list[str]) -> Tensor:
        rows = []
        for start in range(0, len(texts), self.batch):
            inputs = self._inputs(texts[start : start + self.batch])
            mask = inputs["attention_mask"][..., None]
            rows.append((forward(inputs) * mask).sum(1) / mask.sum(1))
        return F.normalize(torch.cat(rows), dim=1)

    def _inputs(self, texts: list[str]) -> Inputs:
        made = self.tokenizer(texts, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        return {name: made[name] for name in ("input_ids", "attention_mask")}

    def _mistyped(self, text: str) -> str:
        letters = list(text)
        for place in range(len(letters) - 1):
            if letters[place].isalpha() and self.random.random() < TYPING_ERRORS:
                wrong = self.random.choice(["", letters[place + 1], self.random.choice(string.ascii_lowercase)])
                letters[place] = wrong
        return "".join(letters)


def _plain(part: str) -> str:
    return " ".join(part.split())


def _sentences(texts: Mapping[str, list[str]]) -> list[str]:
    """The sentences of prose, 6 to 14 words long, each once; code ends in no full stop."""
    prose = (_plain(part) for parts in texts.values() for part in parts)
    found = (text for part in prose for text in re.split(r"(?<=[.!?]) +(?=[A-Z\"])", part))
    return list(dict.fromkeys(text for text in found if 6 <= len(text.split()) <= 14 and re.match(r"[A-Z][^=>]*[.!?]$", text)))
