"""The training loop: one step on fixed shapes, replayed as a CUDA graph where there is a GPU, taken as it is elsewhere."""

import gc
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from experiments import compiled

CAUSAL = "causal_alone"  # rows are padded on the right: no answer sees the padding, so no mask is needed
WARM_UP, CLIP = 10, 1.0
PART, PIECE = 128, 4096  # rows of a forward, tokens of a head, where nothing is kept for a backward
TRIED = 3  # steps at a rate of 0 before a capture: kernels load, sarac looks at its factors once, the optimiser makes its state

AttentionInterface.register(CAUSAL, sdpa_attention_forward)


@dataclass
class Trainable:
    """What a method made: the model whose parameters train, the causal model inside, and what goes with a step."""

    model: nn.Module
    inner: Any
    merge: Callable[[], nn.Module]
    penalty: Callable[[], Tensor] | None = None
    after_step: Callable[[int], None] | None = None
    reset: Callable[[], None] | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 on CUDA; float32 on the CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def answers(ids: Tensor, bounds: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows (rows, length): the positions that predict the answer (rows, width), its tokens, and which of them there are."""
    at = bounds[:, :1] - 1 + torch.arange(width, device=ids.device)
    inside = at < bounds[:, 1:] - 1
    at = at.clamp(max=ids.shape[1] - 2)
    return at, ids.gather(1, at + 1), inside


def token_nll(inner: Any, ids: Tensor, bounds: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The nll of every answer token (rows, width), zero where there is none, and which there are; the head is on those alone."""
    at, wanted, inside = answers(ids, bounds, width)
    flat = at + torch.arange(len(ids), device=ids.device).unsqueeze(1) * ids.shape[1]
    with compiled.chains():
        with autocast(ids.device):
            hidden = inner.model(input_ids=ids, use_cache=False).last_hidden_state
            logits = inner.lm_head(hidden.flatten(0, 1).index_select(0, flat.flatten()))
        nll = compiled.take("losses", logits, wanted.flatten()).view_as(inside)
    return nll * inside, inside


@torch.no_grad()
def row_nll(model: nn.Module, inner: Any, rows: Mapping[str, Tensor], width: int) -> tuple[Tensor, Tensor]:
    """The summed nll of every row and how many answer tokens it has.

    Which tokens those are is known on the CPU, so that the head is on no others; a piece at a time, as logits are gigabytes.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    size = PART if device.type == "cuda" else 8
    at, wanted, inside = answers(rows["ids"].long(), rows["bounds"].long(), width)
    sums = torch.zeros(len(inside), dtype=torch.float64, device=device)
    for start in range(0, len(inside), size):
        part = slice(start, start + size)
        there, ids = inside[part], rows["ids"][part].to(device).long()
        row = torch.arange(len(there)).unsqueeze(1).expand_as(there)
        flat, owner, after = ((at[part] + row * ids.shape[1])[there], row[there] + start, wanted[part][there])
        with compiled.chains():
            with autocast(device):
                hidden = inner.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
            for places, of, token in zip(*(one.to(device).split(PIECE) for one in (flat, owner, after)), strict=True):
                with autocast(device):
                    logits = inner.lm_head(hidden.index_select(0, places))
                sums.index_add_(0, of, compiled.take("losses", logits, token).double())
    model.train(training)
    return sums.cpu(), inside.sum(1)


def mean_nll(model: nn.Module, inner: Any, rows: Mapping[str, Tensor], width: int) -> float:
    """The nll per answer token."""
    sums, counts = row_nll(model, inner, rows, width)
    return float(sums.sum() / counts.sum())


def whole(blocks: Tensor) -> dict[str, Tensor]:
    """Text of which every token is predicted, as rows."""
    bounds = torch.tensor([1, blocks.shape[1]]).expand(len(blocks), 2)
    return {"ids": blocks, "bounds": bounds}


def rates(lr: float, steps: int) -> list[float]:
    """The rate of every step: up in a line for 10 of them, then down to 0 along a cosine."""
    rise = min(WARM_UP, max(1, steps // 4))
    return [
        lr * (step + 1) / rise if step < rise else lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))
        for step in range(steps)
    ]


def order(counts: list[int], batch: int, steps: int, seed: int) -> Tensor:
    """Which rows every step takes (steps, batch), of sets that lie behind each other; each has the same share of every batch."""
    generator, start, columns = torch.Generator().manual_seed(1000 + seed), 0, []
    share = batch // len(counts)
    if share * len(counts) != batch:
        raise ValueError(f"A batch of {batch} rows has no equal shares for {len(counts)} sets: take a multiple.")
    for count in counts:
        rounds = -(-steps * share // count)
        drawn = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])
        columns.append(start + drawn[: steps * share].view(steps, share))
        start += count
    return torch.cat(columns, 1)


class Program:
    """One trainable model with its optimiser and its captured step; it serves runs of other seeds and rates after a reset.

    `held`: bytes on the device that are not the method's.
    """

    def __init__(
        self, made: Trainable, rows: Mapping[str, Tensor], width: int, batch: int, balanced: bool, held: int = 0
    ) -> None:
        self.made, self.width, self.balanced = made, width, balanced
        self.params = made.trained
        device = self.params[0].device
        self.device, cuda = device, device.type == "cuda"
        made.model.train()
        self.ids, self.bounds = rows["ids"].to(device).long(), rows["bounds"].to(device).long()
        self.index = torch.zeros(batch, dtype=torch.long, device=device)
        self.lr: Any = torch.zeros((), device=device) if cuda else 0.0
        how = {"capturable": True, "fused": True} if cuda else {"foreach": True}
        self.optimizer = torch.optim.AdamW(self.params, lr=self.lr, weight_decay=0.0, **how)
        self.first = [parameter.detach().clone() for parameter in self.params]
        self.loss = torch.zeros((), device=device)
        self.before: dict[str, Any] = {}  # what was measured at the start
        self.graph: Any = None
        self.why_eager = "" if cuda else "no CUDA"
        self.peak: float | None = None  # GiB beyond `held` and beyond what a reset needs
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            self._capture()
            held += sum(tensor.nbytes for tensor in self.first)
            self.peak = (torch.cuda.max_memory_allocated() - held) / 2**30
            self.reset()

    def _step(self) -> Tensor:
        """Forward, backward, clipping and the optimiser's step; everything stays on the device."""
        nll, inside = token_nll(self.made.inner, self.ids[self.index], self.bounds[self.index], self.width)
        # Of several tasks each row counts the same, or those with long answers would be nearly all of the loss.
        loss = (nll.sum(1) / inside.sum(1)).mean() if self.balanced else nll.sum() / inside.sum()
        goal = loss if self.made.penalty is None else loss + self.made.penalty()
        goal.backward()
        nn.utils.clip_grad_norm_(self.params, CLIP, error_if_nonfinite=False, foreach=True)
        self.optimizer.step()
        return loss.detach()

    def _capture(self) -> None:
        """Three steps at a rate of 0, then one as a graph, all on the process's stream; what cannot be captured runs as it is."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a rate of 0 is meant
            for _ in range(TRIED):
                self._step()
                self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        graph, collecting = torch.cuda.CUDAGraph(), gc.isenabled()
        gc.disable()  # it may find what the device held for an earlier run, whose destruction ends a capture
        try:
            # It waits, and gives back what the steps took. The gradients are None: the capture makes them in its own memory,
            # and every replay writes them anew. The backward runs in a thread of torch's, whose calls are not judged.
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                self.loss = self._step()
            self.graph = graph
        except RuntimeError as error:
            torch.cuda.synchronize()
            self.why_eager = str(error).strip().splitlines()[0][:200]
            self.optimizer.zero_grad(set_to_none=True)
        finally:
            if collecting:
                gc.enable()

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the start: the parameters' first values and an optimiser that has seen nothing."""
        torch._foreach_copy_(self.params, self.first)
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()
        if self.made.reset is not None:
            self.made.reset()

    def _set_rate(self, rate: float) -> None:
        if isinstance(self.lr, Tensor):
            self.lr.fill_(rate)
        else:
            self.optimizer.param_groups[0]["lr"] = rate

    def steps(self, rows: Tensor, lr: float) -> Iterator[Tensor]:
        """Train on these rows (steps, batch); the loss of each step, on the device."""
        rows = rows.to(self.device)
        for step, (rate, chosen) in enumerate(zip(rates(lr, len(rows)), rows, strict=True)):
            self.index.copy_(chosen)
            self._set_rate(rate)
            if self.graph is not None:
                self.graph.replay()
                loss = self.loss
            else:
                self.optimizer.zero_grad(set_to_none=True)
                loss = self._step()
            if self.made.after_step is not None:
                self.made.after_step(step)
            yield loss

    def train(self, rows: Tensor, lr: float) -> tuple[list[float], float]:
        """The losses, and the seconds that the steps took."""
        self._wait()
        started, losses = time.perf_counter(), torch.zeros(len(rows), device=self.device)
        for step, loss in enumerate(self.steps(rows, lr)):
            losses[step] = loss
        self._wait()
        return losses.tolist(), time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
