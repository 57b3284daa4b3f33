"""A model and a task that are made in code, for a try on any CPU: a small random Llama that learns to add."""

import random
from typing import Any

import torch
import transformers
from torch import nn

WORDS = "the a big small red cat dog sees likes finds house tree river stone and near under old new".split()


class Bytes:
    """A token a byte; 0 pads and 1 ends a text."""

    eos, pad = 1, 0
    name = "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i > 1).decode(errors="replace")


def model() -> nn.Module:
    """Two layers of width 32 over bytes."""
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, bos_token_id=1, eos_token_id=1, pad_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()


def sums(count: int, seed: int, words: str = "Add") -> list[dict[str, Any]]:
    """Sums of two small numbers, as rows of data.py."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        a, b = draw.randrange(30), draw.randrange(30)
        rows.append({"prompt": f"{words} {a} and {b}:", "answer": f" {a + b}", "key": f"{words} {a} {b}"})
    return rows


def judgements(count: int, seed: int) -> list[dict[str, Any]]:
    """Whether one number is the larger, as rows with choices."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        a, b = draw.sample(range(30), 2)
        answer = " true" if a > b else " false"
        rows.append({"prompt": f"Is {a} above {b}?", "answer": answer, "choices": [" true", " false"], "key": f"{a} {b}"})
    return rows


def prose(length: int = 4000) -> str:
    """Text that has nothing to do with the tasks."""
    draw = random.Random(5)
    return " ".join(draw.choice(WORDS) for _ in range(length // 4))
