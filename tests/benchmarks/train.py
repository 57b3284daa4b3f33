"""What a training step costs, side by side in one run: the frozen model (the floor), PEFT's LoRA, SARA and Mo-SARA.

    python tests/benchmarks/train.py [llama llama1b llama8b smollm2] [--device cuda] [--tiny] [--ways sara mosara]
        [--modes eager] [--rows 8] [--length 1024] [--schedules] [--out train.json]

A step is forward, backward and the optimiser's (AdamW), on 8 x 1024 tokens (8b: 2 x 1024), in bfloat16 on CUDA and float32 on the
CPU. The floor is the frozen base, forward and backward to the embeddings: what any adapter method pays at the least. Milliseconds
are medians; GiB is the peak of what torch had allocated. Models have random weights of the named shapes, the same in every layer,
so that one layer is decomposed. `--schedules` sets each schedule in turn where sarac would choose. Adapters are on all linear
weights of the layers; what sarac chooses by is measured first.
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn

import sarac

Row = dict[str, Any]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SCHEDULES = ("two-sided", "right", "left", "materialised", "rebuilt", "plain")
MODES = ("eager", "compiled")
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
    with torch.device(device), _default(dtype):
        model = transformers.LlamaForCausalLM(config)
    first = model.model.layers[0].state_dict()
    for layer in model.model.layers[1:]:
        layer.load_state_dict(first)
    return model.requires_grad_(False).train()


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def floor(model: nn.Module) -> nn.Module:
    model.enable_input_require_grads()
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


def step_of(model: nn.Module, ids: torch.Tensor, compiled: bool) -> Callable[[], None]:
    """A training step: forward, backward and the optimiser's."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=ids.is_cuda) if trained else None
    call = torch.compile(model) if compiled else model

    def step() -> None:
        call(input_ids=ids, labels=ids).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def measure(
    name: str,
    ways: dict[str, Callable[[nn.Module], nn.Module]],
    device: str,
    tiny: bool,
    modes: Sequence[str],
    size: tuple[int | None, int | None] = (None, None),
) -> list[Row]:
    """A row for every way, eager and compiled; `size`: rows and length of the tokens, where they are not the shape's own."""
    dtype, shape = torch.bfloat16 if device == "cuda" else torch.float32, TINY if tiny else SHAPES[name]
    ids = torch.randint(0, 100, (size[0] or shape[-1], size[1] or (64 if tiny else 1024)), device=device)
    rows: list[Row] = []
    for way, make in ways.items():
        for mode in modes:
            row = one(lambda: make(base(shape, device, dtype)), ids, mode == "compiled")  # noqa: B023
            rows.append({"model": name, "way": way, "mode": mode, **row})
            floors = {row["mode"]: row for row in rows if row["way"] == "floor"}
            for ratio in ("ms", "GiB"):
                least = floors.get(rows[-1]["mode"], {}).get(ratio)
                rows[-1][f"{ratio} / floor"] = rows[-1][ratio] / least if least else None
            print(rows[-1], flush=True)
    return rows


def one(make: Callable[[], nn.Module], ids: torch.Tensor, compiled: bool) -> Row:
    """Milliseconds and GiB of one way."""
    torch._dynamo.reset()
    gc.collect()
    if ids.is_cuda:
        torch.cuda.empty_cache()
    model = make()
    step = step_of(model, ids, compiled)
    for _ in range(3):
        step()
    if ids.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    spent: list[float] = []
    while len(spent) < 10 or sum(spent) < (1.0 if ids.is_cuda else 0.0):
        started = time.perf_counter()
        step()
        if ids.is_cuda:
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - started)
    seconds = statistics.median(spent)
    return {
        "ms": 1e3 * seconds,
        "GiB": torch.cuda.max_memory_allocated() / 2**30 if ids.is_cuda else None,
        "tokens/s": ids.numel() / seconds,
        "trains": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    }


def table(rows: list[Row]) -> Table:
    """A row a way, eager and compiled beside each other."""
    shown = Table(title="A training step", title_justify="left")
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    for heading in (
        "model",
        "way",
        "trains",
        *(f"{mode} {what}" for mode in modes for what in ("ms", "× floor", "GiB", "tok/s")),
    ):
        shown.add_column(heading, justify="left" if heading in ("model", "way") else "right")
    for model, way in dict.fromkeys((row["model"], row["way"]) for row in rows):
        found = [row for row in rows if (row["model"], row["way"]) == (model, way)]
        cells = [f"{found[0]['trains']:,}"]
        for row in found:
            ratio = f"{row['ms / floor']:.2f}" if row["ms / floor"] else ""
            cells += [f"{row['ms']:.1f}", ratio, f"{row['GiB']:.2f}" if row["GiB"] else "", f"{row['tokens/s']:,.0f}"]
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
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        if not options.tiny:
            os.environ["SARAC_CACHE"] = folder  # equal layers are decomposed once
            sarac.tune(options.device, dtypes=["bfloat16" if options.device == "cuda" else "float32"], check=False)
        for name in options.models:
            known = ways(options.schedules, TINY[1] if options.tiny else SHAPES[name][1])
            chosen = {
                way: make
                for way, make in known.items()
                if way == "floor" or not options.ways or any(way.startswith(start) for start in options.ways)
            }
            size = (options.rows, options.length)
            rows += measure(name, chosen, options.device, options.tiny, options.modes, size)
            if options.out:
                options.out.write_text(json.dumps(rows, indent=1))
    Console(width=160).print(table(rows))


if __name__ == "__main__":
    main()
