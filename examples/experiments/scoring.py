"""Scores beside the nll: answers that are generated, choices by likelihood, and texts against their references."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from experiments.training import autocast, row_nll

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def last_number(text: str) -> float | None:
    """The number behind #### where there is one, else the last of all."""
    found = NUMBER.findall(text.partition("####")[2] or text)
    if not found:
        return None
    return float((found[0] if "####" in text else found[-1]).replace(",", ""))


def exact(texts: Sequence[str], references: Sequence[Sequence[str]]) -> list[bool]:
    """Whether each text ends in the number of its reference."""
    pairs = [(last_number(text), last_number(wanted[0])) for text, wanted in zip(texts, references, strict=True)]
    return [a is not None and b is not None and abs(a - b) <= 1e-4 * max(1.0, abs(b)) for a, b in pairs]


@torch.no_grad()
def generated(model: Any, task: Mapping[str, Any], words: Any, size: int = 256) -> list[str]:
    """Greedy answers to the task's prompts, which are padded on the left."""
    model.eval()
    device, texts = next(model.parameters()).device, []
    config = model.config
    before, config._attn_implementation = config._attn_implementation, "sdpa"  # prompts are masked, unlike rows of training
    try:
        for start in range(0, len(task["prompts"]), size):
            prompts = task["prompts"][start : start + size]
            longest = max(len(prompt) for prompt in prompts)
            ids = torch.tensor([[words.pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
            seen = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
            with autocast(device):
                out = model.generate(
                    input_ids=ids, attention_mask=seen, max_new_tokens=task["new"], do_sample=False, use_cache=True,
                    pad_token_id=words.pad, eos_token_id=words.eos,
                )  # fmt: skip
            for row in out[:, longest:].tolist():
                ended = row.index(words.eos) if words.eos in row else len(row)
                texts.append(words.decode(row[:ended]))
    finally:
        config._attn_implementation = before
    return texts


def weighed(model: nn.Module, inner: Any, task: Mapping[str, Any]) -> list[bool]:
    """Whether the right choice of each question is the most likely one, by its summed nll."""
    rows = task["choices"]
    sums, _ = row_nll(model, inner, rows, task["width"])
    right = []
    for question in rows["of"].unique().tolist():
        mine = rows["of"] == question
        right.append(bool(rows["right"][mine][sums[mine].argmin()]))
    return right


def bleu_and_rouge(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU of sacrebleu and the mean ROUGE-L of rouge-score (of each text its best reference), both of 100."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    most = max(len(found) for found in references)
    streams: Any = [[found[i] if i < len(found) else None for found in references] for i in range(most)]
    scorer = RougeScorer(["rougeL"])
    best = [
        max(scorer.score(one, text)["rougeL"].fmeasure for one in found) for text, found in zip(texts, references, strict=True)
    ]
    return {"bleu": sacrebleu.corpus_bleu(list(texts), streams).score, "rouge_l": 100 * sum(best) / len(best)}
