"""Many adapters on one base, in one run: what a swap costs, what a batch of tenants costs, and how much memory thousands take.

    python tests/benchmarks/swap.py [--device cuda] [--tiny] [--rank 217] [--tenants 64] [--adapters 10000] [--out swap.json]

SmolLM2's shape with random weights and adapters of one rank on every linear weight (217 is their mean at threshold:0.6 there);
float16 on CUDA, float32 on the CPU. `swap` is a run with another adapter than the one before, less one with the same; PEFT's
`adapter_names` serves LoRAs of rank 8 on the same weights in torch, one after the other within a layer.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import torch
from runtime import llama, timed
from torch import Tensor, nn

import sarac
from sarac.backends.onnx import Onnx
from sarac.backends.swap import swap_of
from sarac.ir.inputs import Inputs

SHAPES = ((1, 1), (1, 128), (64, 16), (64, 128))


def opened(model: nn.Module, rank: int, device: str, dtype: torch.dtype, folder: Path, facts: dict[str, Any]) -> sarac.Runtime:
    """The rowwise export of the model with adapters of this rank."""
    adapted = sarac.transform(model, f"rank:{rank}")
    started = time.perf_counter()
    swap = swap_of(adapted, rowwise=True)
    form = Onnx(dtype=dtype, optimize="ort", provider=device, swap=swap)
    form.write(adapted, Inputs((), {"input_ids": torch.randint(0, 100, (2, 16))}), folder / "swap.onnx", {})
    facts["export seconds"] = time.perf_counter() - started
    facts["numbers of an adapter"] = sum(start.numel() for start in swap.starts.values())
    return sarac.Runtime(folder / "swap.onnx", device)


def drawn(runtime: sarac.Runtime, shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def swaps(runtime: sarac.Runtime, device: str, vocabulary: int, tenants: int, tiny: bool) -> list[dict[str, Any]]:
    rows = []
    for shape in SHAPES if not tiny else ((1, 1), (4, 16)):
        ids = torch.randint(0, vocabulary, shape, device=device)
        turn = iter(range(10**9))
        row: dict[str, Any] = {"shape": f"{shape[0]} x {shape[1]}"}
        row["base"] = timed(lambda: runtime(ids, adapter=None), device)  # noqa: B023 - called at once
        row["one"] = timed(lambda: runtime(ids, adapter="t0"), device)  # noqa: B023
        row["another each time"] = timed(lambda: runtime(ids, adapter=f"t{next(turn) % 2}"), device)  # noqa: B023
        row["swap"] = row["another each time"] - row["one"]
        if shape[0] > 1:
            names = [[f"t{(index + step) % tenants}" for index in range(shape[0])] for step in range(2)]
            row["each row its own"] = timed(lambda: runtime(ids, adapter=names[0]), device)  # noqa: B023
            row["others each time"] = timed(lambda: runtime(ids, adapter=names[next(turn) % 2]), device)  # noqa: B023
            row["throughput of tenants"] = row["one"] / row["others each time"]
        rows.append(row)
        print(row, flush=True)
    return rows


def with_peft(model: nn.Module, device: str, dtype: torch.dtype, vocabulary: int, tenants: int, tiny: bool) -> dict[str, Any]:
    """PEFT on the same weights: one LoRA for a batch, and one for each row."""
    config = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    started = time.perf_counter()
    lora = peft.get_peft_model(model, config, adapter_name="t0")
    for index in range(1, tenants):
        lora.add_adapter(f"t{index}", config)
    lora.to(device, dtype).eval()
    shape = (4, 16) if tiny else (64, 128)
    row: dict[str, Any] = {"shape": f"{shape[0]} x {shape[1]}", "PEFT seconds to load": time.perf_counter() - started}
    ids, names = torch.randint(0, vocabulary, shape, device=device), [f"t{index % tenants}" for index in range(shape[0])]
    with torch.no_grad():
        row["PEFT one"] = timed(lambda: lora(input_ids=ids), device)
        row["PEFT each row its own"] = timed(lambda: lora(input_ids=ids, adapter_names=names), device)
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a small model, for a look at the script itself")
    parser.add_argument("--rank", type=int, default=217)
    parser.add_argument("--tenants", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=10000)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    dtype, vocabulary = torch.float16 if given.device == "cuda" else torch.float32, 100
    torch.manual_seed(0)
    model = (llama(5, 48, 96, 3, 1, 100) if given.tiny else llama(30, 576, 1536, 9, 3, 49152)).eval().requires_grad_(False)
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        runtime = opened(model, given.rank, given.device, dtype, Path(folder), facts)
        shapes = runtime.adapters.shapes
        for index in range(given.tenants):
            runtime.adapters.add(f"t{index}", drawn(runtime, shapes, index))
        rows = swaps(runtime, given.device, vocabulary, given.tenants, given.tiny)
        runtime.adapters.reserve(given.adapters)
        many, started = drawn(runtime, shapes, 0), time.perf_counter()
        for index in range(given.tenants, given.adapters):
            runtime.adapters.add(f"t{index}", many)
        facts |= {"adapters": len(runtime.adapters), "GB": runtime.adapters.nbytes / 1e9}
        facts["milliseconds to add one"] = 1e3 * (time.perf_counter() - started) / max(1, given.adapters - given.tenants)
        print(facts, flush=True)
    rows.append(with_peft(model, given.device, dtype, vocabulary, given.tenants, given.tiny))
    if given.out:
        given.out.write_text(json.dumps({"rows": rows, **facts}, indent=1))


if __name__ == "__main__":
    main()
