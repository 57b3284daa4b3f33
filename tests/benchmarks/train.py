"""What a training step costs, side by side in one run: the frozen model (the floor), PEFT's LoRA, SARA and Mo-SARA.

    python tests/benchmarks/train.py [llama llama1b llama8b smollm2] [--device cuda] [--tiny] [--ways sara mosara]
        [--modes eager graphed] [--rows 8] [--length 1024] [--schedules] [--jobs 7] [--out train.json]

A step is forward, backward and the optimiser's (AdamW), on 8 x 1024 tokens (8b: 2 x 1024), in bfloat16 on CUDA and float32 on
the CPU. The floor is the frozen base, forward and backward to the embeddings; adapted models, which need no gradient of the
first layer's input, have 0.6 % fewer operations of it (llama). Milliseconds are medians; `busy` is what of a step the device
worked; GiB is the peak of what torch had allocated. `graphed` is the eager step, captured as a CUDA graph and replayed: what it
costs where the host's Python does not. Models have random weights of the named shapes, the same in every layer, so that one
layer is decomposed. Adapters are on all linear weights of the layers; what sarac chooses by is measured first. `--schedules`
sets each schedule in turn where sarac would choose.
"""

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile

import sarac

Row = dict[str, Any]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SCHEDULES = ("two-sided", "right", "left", "materialised", "rebuilt", "plain")
MODES = ("eager", "graphed", "compiled")
# Layers, width, inner width, heads, groups of keys, words, rows of tokens.
SHAPES = {
    "llama": (8, 2048, 5632, 16, 16, 32000, 8),
    "llama1b": (16, 2048, 8192, 32, 8, 128256, 8),
    "llama8b": (32, 4096, 14336, 32, 8, 128256, 2),
    "smollm2": (30, 576, 1536, 9, 3, 49152, 8),
}
TINY = (2, 256, 704, 4, 2, 100, 2)


def base(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> nn.Module:
    """A Llama of this shape with frozen weights, those of every layer the first one's."""
    layers, size, inner, heads, groups, words, _ = shape
    config = transformers.LlamaConfig(
        hidden_size=size, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=words, max_position_embeddings=2048, use_cache=False,
        tie_word_embeddings=size < 2048,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    first = model.model.layers[0].state_dict()
    for layer in model.model.layers[1:]:
        layer.load_state_dict(first)
    return model.requires_grad_(False).train()


def floor(model: nn.Module) -> nn.Module:
    return model


def lora(rank: int, narrow: bool) -> Callable[[nn.Module], nn.Module]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR, task_type="CAUSAL_LM")
    return lambda model: get_peft_model(model, config, autocast_adapter_dtype=not narrow)


def adapted(plan: str, schedule: str = "auto", **options: Any) -> Callable[[nn.Module], nn.Module]:
    def make(model: nn.Module) -> nn.Module:
        result = sarac.transform(model, plan, **options)
        sarac.schedule(result, schedule)
        return result

    return make


def ways(schedules: bool, width: int) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Every way to train a model of this width, by the name that the table has.

    614 of 2048 is threshold 0.6 where values decay as trained ones may; random weights' take 718 and 950.
    """
    found: dict[str, Callable[[nn.Module], nn.Module]] = {"floor": floor}
    for rank in (8, 32, 128):
        found |= {f"peft lora r={rank}": lora(rank, False), f"peft lora r={rank} narrow": lora(rank, True)}
    fixed = ("rank:32", "rank:614") if width >= 2048 else ("rank:32",)
    for plan in (*fixed, "threshold:0.1", "threshold:0.3", "threshold:0.6"):
        for schedule in ("auto", *(SCHEDULES if schedules else ())):
            found[f"sara {plan}{'' if schedule == 'auto' else f' {schedule}'}"] = adapted(plan, schedule)
    for rank in (8, 32, 128):  # U and V have as many numbers as LoRA's A and B
        found[f"sara factors r={rank}"] = adapted(f"rank:{rank},train=factors")
    for router in ("soft", "topk:2"):
        for schedule in ("auto", *(("two-sided", "right", "plain") if schedules else ())):
            name = f"mosara threshold:0.5 {router}{'' if schedule == 'auto' else f' {schedule}'}"
            found[name] = adapted(f"threshold:0.5,router={router}", schedule, method="mosara")
    return found


def step_of(model: nn.Module, ids: torch.Tensor, mode: str) -> Callable[[], None]:
    """A training step: forward, backward and the optimiser's."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    how = {"fused": ids.is_cuda, "capturable": mode == "graphed"}
    optimizer = torch.optim.AdamW(trained, lr=1e-2, **how) if trained else None
    call = torch.compile(model) if mode == "compiled" else model

    def step() -> None:
        # The frozen model's embeddings are made outside: the hook that would ask for their gradient breaks a compiled graph.
        given = {"input_ids": ids} if trained else {"inputs_embeds": model.get_input_embeddings()(ids).requires_grad_()}
        call(**given, labels=ids).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return replayed(step) if mode == "graphed" else step


def replayed(step: Callable[[], None]) -> Callable[[], None]:
    """A step as a CUDA graph, taken after three that are not."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


class Work(NamedTuple):
    """One way to measure: of which shape, by what, compiled or not."""

    model: str
    way: str
    mode: str
    device: str
    tiny: bool
    rows: int | None
    length: int | None

    def step(self) -> tuple[nn.Module, torch.Tensor, Callable[[], None]]:
        """The model, its tokens and a training step of it that has run three times."""
        shape = TINY if self.tiny else SHAPES[self.model]
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        ids = torch.randint(0, 100, (self.rows or shape[-1], self.length or (64 if self.tiny else 1024)), device=self.device)
        torch._dynamo.reset()
        model = ways(True, shape[1])[self.way](base(shape, self.device, dtype))
        step = step_of(model, ids, self.mode)
        for _ in range(3):
            step()
        return model, ids, step

    def row(self, model: nn.Module, ids: torch.Tensor, step: Callable[[], None]) -> Row:
        """What a step takes: the median over blocks of steps that follow each other as in training, without a wait in between."""
        if ids.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        block, spent = 5 if ids.is_cuda else 1, list[float]()
        while len(spent) < 10 or sum(spent) * block < (2.0 if ids.is_cuda else 0.0):
            started = time.perf_counter()
            for _ in range(block):
                step()
            if ids.is_cuda:
                torch.cuda.synchronize()
            spent.append((time.perf_counter() - started) / block)
        seconds = statistics.median(spent)
        trains = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        # A replay allocates nothing: what it works in belongs to its graph.
        gib = torch.cuda.max_memory_allocated() / 2**30 if ids.is_cuda and self.mode != "graphed" else None
        row = {"ms": 1e3 * seconds, "busy ms": busy(step) if ids.is_cuda else None, "GiB": gib, "tokens/s": ids.numel() / seconds}
        return {"model": self.model, "way": self.way, "mode": self.mode, "trains": trains, **row}


def busy(step: Callable[[], None]) -> float:
    """Milliseconds for which the device worked in a step; the rest of the step it waits for the host."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(2):
            step()
        torch.cuda.synchronize()
    spent = sum(event.device_time for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return float(spent) / 2e3


def measure(works: Sequence[Work]) -> Iterator[Row]:
    """A row for every way, one after another."""
    for work in works:
        gc.collect()
        if work.device == "cuda":
            torch.cuda.empty_cache()
        yield work.row(*work.step())


def measure_together(works: Sequence[Work], jobs: int) -> Iterator[Row]:
    """The same with so many ways made (and compiled) at once, in processes of their own, and then measured one at a time."""
    context = multiprocessing.get_context("spawn")
    for start in range(0, len(works), jobs):
        some = works[start : start + jobs]
        found, ready, alone = context.Queue(), context.Barrier(len(some)), context.Lock()
        children = [context.Process(target=_work, args=(work, found, ready, alone), daemon=True) for work in some]
        for child in children:
            child.start()
        for _ in children:
            row = found.get(timeout=900)
            if isinstance(row, str):
                print(row, flush=True)  # the others are measured all the same
            else:
                yield row
        for child in children:
            child.join()


def _work(work: Work, found: Any, ready: Any, alone: Any) -> None:
    made, told = None, ""
    try:
        made = work.step()
    except Exception:  # noqa: BLE001 - told by the parent
        told = f"{work}: {traceback.format_exc()}"
    ready.wait(900)
    with alone:
        try:
            found.put(told if made is None else work.row(*made))
        except Exception:  # noqa: BLE001 - told by the parent
            found.put(f"{work}: {traceback.format_exc()}")


def compared(rows: list[Row]) -> list[Row]:
    """The rows with their ratios to the floor of the same model and mode."""
    for row in rows:
        own = next((r for r in rows if (r["model"], r["mode"], r["way"]) == (row["model"], row["mode"], "floor")), None)
        for what in ("ms", "busy ms", "GiB"):
            row[f"{what} / floor"] = row[what] / own[what] if own and own[what] else None
    return rows


def table(rows: list[Row]) -> Table:
    """A row a way, eager and compiled beside each other."""
    shown = Table(title="A training step", title_justify="left")
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    for heading in (
        "model",
        "way",
        "trains",
        *(f"{mode} {what}" for mode in modes for what in ("ms", "× floor", "busy", "GiB", "tok/s")),
    ):
        shown.add_column(heading, justify="left" if heading in ("model", "way") else "right")
    for model, way in dict.fromkeys((row["model"], row["way"]) for row in rows):
        found = [row for row in rows if (row["model"], row["way"]) == (model, way)]
        cells = [f"{found[0]['trains']:,}"]
        for row in found:
            ratios = [f"{row[f'{what} / floor']:.2f}" if row[f"{what} / floor"] else "" for what in ("ms", "busy ms")]
            cells += [f"{row['ms']:.1f}", *ratios, f"{row['GiB']:.2f}" if row["GiB"] else "", f"{row['tokens/s']:,.0f}"]
        shown.add_row(model, way, *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["llama"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ways", nargs="*", help="those whose names start like one of these; the floor always")
    parser.add_argument("--tiny", action="store_true", help="shapes for a try")
    parser.add_argument("--rows", type=int, help="rows of tokens")
    parser.add_argument("--length", type=int, help="tokens in a row")
    parser.add_argument("--modes", nargs="*", default=MODES, choices=MODES)
    parser.add_argument("--schedules", action="store_true", help="every schedule, not the chosen one alone")
    parser.add_argument("--jobs", type=int, help="so many ways at once are made and compiled, before they are measured in turn")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    options.modes = [mode for mode in options.modes if mode != "graphed" or options.device == "cuda"]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        if not options.tiny:
            os.environ["SARAC_CACHE"] = folder  # equal layers are decomposed once
            sarac.tune(options.device, dtypes=["bfloat16" if options.device == "cuda" else "float32"], check=False)
        works = [
            Work(name, way, mode, options.device, options.tiny, options.rows, options.length)
            for name in options.models
            for mode in options.modes
            for way in ways(options.schedules, TINY[1] if options.tiny else SHAPES[name][1])
            if way == "floor" or not options.ways or any(way.startswith(start) for start in options.ways)
        ]
        for row in measure_together(works, options.jobs) if options.jobs else measure(works):
            rows.append(row)
            print(row, flush=True)
            if options.out:
                options.out.write_text(json.dumps(compared(rows), indent=1))
    places = [(work.model, work.mode, work.way) for work in works]
    rows.sort(key=lambda row: places.index((row["model"], row["mode"], row["way"])))
    Console(width=160).print(table(compared(rows)))


if __name__ == "__main__":
    main()
