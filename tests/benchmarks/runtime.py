"""What serving costs, side by side in one run: torch, torch.compile, and ONNX Runtime on plain and on sarac's exports.

    python tests/benchmarks/runtime.py [llama smollm2 minilm vit] [--device cuda] [--tiny] [--out runtime.json]

Models have random weights of the named shapes: llama is Llama-shaped, 8 layers of 2048; vit is ViT-B/16. Everything computes in
float16 on CUDA and in float32 on the CPU. Milliseconds are medians, outputs stay on the device; errors are rms over standard
deviation against float32; MB is what a way took of the device, all shapes run. `merged` is the same model with trained adapters,
folded. Shapes that come back run as CUDA graphs where outputs are small, as they do for whoever opens an export.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import sarac
from sarac.backends.onnx import Onnx
from sarac.backends.onnx_file import node_counts
from sarac.ir import check
from sarac.ir.inputs import Inputs

Rows = list[dict[str, Any]]
SHAPES = ((1, 1), (1, 128), (8, 1024))


def llama(layers: int, size: int, inner: int, heads: int, groups: int, words: int) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=size, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=words, max_position_embeddings=2048, use_cache=False,
        tie_word_embeddings=size < 2048,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert(layers: int, size: int) -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=size, intermediate_size=4 * size, num_hidden_layers=layers, num_attention_heads=max(1, size // 32),
        max_position_embeddings=1024,
    )  # fmt: skip
    return transformers.BertModel(config)


def vit(layers: int, size: int) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=size, intermediate_size=4 * size, num_hidden_layers=layers, num_attention_heads=max(1, size // 64)
    )
    return transformers.ViTModel(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "llama": (lambda: llama(8, 2048, 5632, 16, 16, 32000), lambda: llama(5, 64, 96, 4, 4, 100)),
    "smollm2": (lambda: llama(30, 576, 1536, 9, 3, 49152), lambda: llama(5, 48, 96, 3, 1, 100)),
    "minilm": (lambda: bert(6, 384), lambda: bert(5, 32)),
    "vit": (lambda: vit(12, 768), lambda: vit(5, 64)),
}


def inputs(name: str, shape: tuple[int, int], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Token ids of this shape; for a picture, its first size in pictures."""
    if name == "vit":
        return {"pixel_values": torch.randn(shape[0], 3, 224, 224, device=device, dtype=dtype)}
    return {"input_ids": torch.randint(0, 100, shape, device=device)}


def timed(run: Callable[[], Any], device: str, least: float = 0.4) -> float:
    """Milliseconds of one call: the median of at least seven, after three."""
    spent: list[float] = []
    while len(spent) < 10 or sum(spent) < least:
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - started)
    return 1e3 * statistics.median(spent[3:])


def measure(name: str, device: str, tiny: bool) -> Rows:
    """Every way at every shape of one model."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    reference = MODELS[name][tiny]().eval().requires_grad_(False).to(device)
    model = MODELS[name][tiny]().eval().requires_grad_(False).to(device)
    model.load_state_dict(reference.state_dict())
    model.to(dtype)
    shapes = [shape for shape in SHAPES if not (tiny and shape[1] > 128) and not (name == "vit" and shape == (1, 128))]
    shapes = [(shape[0], 512) if name == "minilm" and shape[1] > 512 else shape for shape in shapes]
    rows: Rows = []
    held: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        ways, facts = exported(name, reference, Path(folder), device, dtype)
        ways = {"eager": lambda given: first(model(**given)), **ways}
        compiled = torch.compile(model)
        ways["compile"] = lambda given: first(compiled(**given))
        for shape in shapes:
            given = inputs(name, shape, device, dtype)
            wanted = first(reference(**{key: v.float() if v.is_floating_point() else v for key, v in given.items()}))
            row: dict[str, Any] = {"model": name, "shape": f"{shape[0]} x {shape[1]}" if name != "vit" else str(shape[0])}
            for way, run in ways.items():
                before = taken(device)
                row[way] = timed(lambda: run(given), device)  # noqa: B023
                held[way] = held.get(way, 0.0) + taken(device) - before
                if way != "ort merged":  # another model
                    row[f"{way} error"] = check.difference([run(given).float()], [wanted.float()]).error
            rows.append(row)
            print(row, flush=True)
    weights = sum(parameter.nbytes for parameter in model.parameters()) / 1e6  # of torch's ways, on the device since before
    memory = {f"{way} MB": held[way] + facts.pop(f"{way} MB", weights) for way in ways}
    return [{**row, **facts, **memory} for row in rows]


def exported(
    name: str, model: nn.Module, folder: Path, device: str, dtype: torch.dtype
) -> tuple[dict[str, Callable[[dict[str, Tensor]], Tensor]], dict[str, Any]]:
    """The exports that take every shape, opened; and what they cost to make."""
    facts: dict[str, Any] = {}
    given = Inputs((), {key: value.cpu().float() if value.is_floating_point() else value.cpu()
                        for key, value in inputs(name, (2, 16), device, dtype).items()})  # fmt: skip
    plain = model.cpu()
    adapted = sarac.transform(plain, "rank:8")
    for parameter in (one for one in adapted.parameters() if one.requires_grad):
        parameter.data.normal_(0, 0.05)
    merged = sarac.fold(adapted)
    runtimes = {}
    for way, source, level in (("ort plain", plain, "none"), ("ort sarac", plain, "ort"), ("ort merged", merged, "ort")):
        path = folder / f"{way.replace(' ', '_')}.onnx"
        started = time.perf_counter()
        Onnx(dtype=dtype, optimize=level, provider=device).write(source, given, path, {})
        facts[f"{way} seconds"] = time.perf_counter() - started
        facts[f"{way} nodes"] = sum(node_counts(path).values())
        before = taken(device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sarac.SaracWarning)
            runtimes[way] = sarac.Runtime(path, device)
        facts[f"{way} MB"] = taken(device) - before
        facts[f"{way} elsewhere"] = str(runtimes[way].placement)
    model.to(device)
    return {way: (lambda given, one=one: first(one(**given))) for way, one in runtimes.items()}, facts


def taken(device: str) -> float:
    """MB of the device that are not free, torch's unused ones given back."""
    if device != "cuda":
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 1e6


def first(outputs: Any) -> Tensor:
    return next(iter(outputs.values()))


def table(rows: Rows) -> Table:
    names = list(dict.fromkeys(key for row in rows for key in row))
    title = f"milliseconds; onnxruntime {onnxruntime.__version__}, torch {torch.__version__}"
    shown = Table("", *(f"{row['model']} {row['shape']}" for row in rows), title=title, title_justify="left")
    for name in names[2:]:
        shown.add_row(name, *(f"{v:.3g}" if isinstance(v, float) else str(v) for v in (row.get(name, "") for row in rows)))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small models, for a look at the script itself")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = [row for name in given.models for row in measure(name, given.device, given.tiny)]
    Console(width=260).print(table(rows))
    if given.out:
        given.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
