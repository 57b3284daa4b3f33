"""Tokens a second with a cache of keys and values, side by side in one run: transformers' generate, and sarac's exports.

    python tests/benchmarks/decode.py [--device cuda] [--tiny] [--new 128] [--rows 1 16] [--out decode.json]

SmolLM2's shape with random weights, prompts of 32 tokens, rows of 1 and 16, float16 on CUDA, float32 on the CPU. `default` is
transformers' growing cache, `static` its static cache with a compiled forward, timed after three runs. Times are medians of
whole calls, prompt included. `same` is the share of tokens that are those of the float32 model in torch.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from runtime import llama
from torch import Tensor, nn

import sarac
from sarac.backends.decoding import Steps
from sarac.backends.onnx import Onnx

PROMPT = 32


def rate(run: Callable[[], Tensor], given: int, device: str, times: int = 5) -> float:
    """New tokens a second over all rows: the median of so many calls, after three."""
    spent = []
    for _ in range(3 + times):
        started = time.perf_counter()
        found = run()
        if device == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - started)
    return found.shape[0] * (found.shape[1] - given) / statistics.median(spent[3:])


def measure(model: nn.Module, runtime: sarac.Runtime, rows: int, new: int, device: str, static: bool) -> dict[str, Any]:
    ids = torch.randint(1, 100, (rows, PROMPT), device=device)
    mask = torch.ones_like(ids)
    choice: dict[str, Any] = {"attention_mask": mask, "do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
    row: dict[str, Any] = {"rows": rows, "new": new}
    row["sarac"] = rate(lambda: runtime.generate(ids, new, eos_token_id=()), PROMPT, device)
    print(row, flush=True)
    row["default"] = rate(lambda: model.generate(ids, **choice), PROMPT, device, times=2)
    print(row, flush=True)
    told = runtime.generate(ids, new, eos_token_id=())
    row["same as torch"] = float((told == model.generate(ids, **choice)).float().mean())
    if static:
        row["static"] = rate(lambda: model.generate(ids, cache_implementation="static", **choice), PROMPT, device, times=3)
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a small model, for a look at the script itself")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    dtype = torch.float16 if given.device == "cuda" else torch.float32
    torch.manual_seed(0)
    model: Any = (llama(5, 48, 96, 3, 1, 100) if given.tiny else llama(30, 576, 1536, 9, 3, 49152)).eval().requires_grad_(False)
    model.config.use_cache = model.generation_config.use_cache = True
    steps = Steps.of(model)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        started = time.perf_counter()
        form = Onnx(dtype=dtype, optimize="ort", provider=given.device, steps=steps)
        form.write(model, steps.inputs(model), Path(folder) / "decode.onnx", {})
        print(f"exported in {time.perf_counter() - started:.1f} s", flush=True)
        runtime = sarac.Runtime(Path(folder) / "decode.onnx", given.device)
        print(repr(str(runtime.placement)), flush=True)
        model.to(given.device, dtype)
        rows = [measure(model, runtime, rows, given.new, given.device, given.device == "cuda") for rows in given.rows]
    if given.out:
        given.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
