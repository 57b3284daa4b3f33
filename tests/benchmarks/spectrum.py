"""What the spectra cost, side by side in one run: sarac's engine, torch's SVDs, and PEFT's PiSSA initialisation.

    python tests/benchmarks/spectrum.py [shapes] [model] [seven] [folder] [--device cuda] [--model FOLDER] [--out spectrum.json]
    torchrun --nproc-per-node 2 tests/benchmarks/spectrum.py seven          # the same set over the GPUs of one host

shapes: one weight at a time, and whether every way gives the float64 SVD's k. model: all linear weights of SmolLM2-135M, from
--model, else random ones of its shapes. seven: the 224 matrices of Llama-2-7B's shapes in bfloat16, values and factors at 0.6.
folder: `sarac analyze` over a folder of random shards of those shapes (--layers of them), and the peak memory of that process.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn

import sarac
from sarac.ir.certify import certified
from sarac.ir.gram import Wanted, factors, spectrum
from sarac.ir.measure import Weight, measure
from sarac.ir.spectrum import Spectrum
from sarac.recipe import open_model

SHARES = (0.02, 0.05, 0.3, 0.6, 0.9)
SMALL = 0.05
SHAPES = {  # by device
    "cpu": [(576, 576), (1536, 576), (768, 768), (3072, 768), (1536, 1536), (3072, 3072)],
    "cuda": [(1024, 1024), (2048, 2048), (4096, 4096), (11008, 4096)],
}
LAYER = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096)}
LAYER |= {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}
SMOLLM2 = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
SMOLLM2 |= {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}
Rows = list[dict[str, Any]]


def clock(device: str, work: Callable[[], Any], rounds: int = 3) -> float:
    """The shortest of some runs, in milliseconds, after one to warm up."""
    best = math.inf
    for i in range(rounds + 1):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started) if i or rounds == 0 else best
    return 1e3 * best


def drawn(shape: tuple[int, int], kind: str, device: str) -> Tensor:
    """A random weight: of independent entries, or with values that decay as those of trained weights do."""
    weight = torch.randn(shape, device=device) / shape[1] ** 0.5
    if kind == "random":
        return weight
    (u, _), (v, _) = (
        torch.linalg.qr(weight if shape[0] >= shape[1] else weight.T),
        torch.linalg.qr(torch.randn_like(weight[: min(shape), : min(shape)])),
    )
    ranks = torch.arange(1, min(shape) + 1, device=device)
    made = (u * (ranks**-0.3 * (1.0 - 0.95 * ranks / len(ranks)))) @ v
    return (made if shape[0] >= shape[1] else made.T).contiguous()


def pissa(modules: nn.Module, targets: list[str]) -> None:
    get_peft_model(modules, LoraConfig(r=32, target_modules=targets, init_lora_weights="pissa"))


def shapes(device: str, rounds: int) -> Rows:
    """Every way on one weight, and whether the ranks are the float64 SVD's."""
    rows: Rows = []
    for shape in SHAPES[device]:
        for kind in ("random", "decaying"):
            weight = drawn(shape, kind, device)
            true = spectrum_of(torch.linalg.svdvals(weight.double()).cpu(), shape)
            ways: dict[str, tuple[Callable[[], Any], int]] = {
                "svd": (partial(torch.linalg.svd, weight, full_matrices=False), 1),
                "svdvals": (partial(torch.linalg.svdvals, weight), 1),
                "svdvals float64": (partial(torch.linalg.svdvals, weight.double()), 1),
                "PiSSA": (partial(pissa, holder(weight), ["0"]), 0),
                "values": (partial(spectrum, weight), rounds),
                "values and factors": (partial(with_factors, weight), rounds),
                "certified": (partial(certified, weight, SMALL), rounds),
            }
            row: dict[str, Any] = {"shape": list(shape), "kind": kind}
            row |= {name: clock(device, work, n) for name, (work, n) in ways.items() if name != "certified" or device == "cuda"}
            found, sure = spectrum(weight), {t: certified(weight, t) for t in SHARES if t <= SMALL and device == "cuda"}
            row |= {"how": found.how, "k": {t: true.rank_at(t) for t in SHARES}}
            row["k right"] = all(found.rank_at(t) == true.rank_at(t) for t in SHARES)
            row["certified k"] = {t: "undecided" if s is None else s.rank_at(t) == true.rank_at(t) for t, s in sure.items()}
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def spectrum_of(values: Tensor, shape: tuple[int, int]) -> Spectrum:
    return Spectrum(values, max(shape) * torch.finfo(torch.float32).eps * float(values[0]))


def holder(weight: Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    layer.weight.data = weight.clone()
    return nn.Sequential(layer)


def with_factors(weight: Tensor, share: float = 0.6) -> int:
    found = spectrum(weight, keep=lambda one: one.rank_at(share))
    rank = found.rank_at(share)
    factors(weight, rank, basis=found.basis)
    return rank


def model(device: str, folder: str | None) -> Rows:
    """All linear weights of SmolLM2-135M, each way through all of them."""
    if folder:
        opened = open_model(folder)
        graph = sarac.trace(opened)
        found = {site.name: graph.weight(site).to(device) for site in graph.sites.values() if site.default}
    else:
        found = {f"{i}.{name}": drawn(shape, "decaying", device) for i in range(30) for name, shape in SMOLLM2.items()}
    weights = list(found.values())
    layers = nn.ModuleDict({name.replace(".", "_"): holder(weight) for name, weight in found.items()})
    ways = {
        "svd": lambda: [torch.linalg.svd(weight, full_matrices=False) for weight in weights],
        "svdvals": lambda: [torch.linalg.svdvals(weight) for weight in weights],
        "svdvals float64": lambda: [torch.linalg.svdvals(weight.double()) for weight in weights],
        "PiSSA": lambda: pissa(layers, ["0"]),
        "values": lambda: measure([Weight(n, tuple(w.shape), w.dtype, partial(lambda x: x, w)) for n, w in found.items()]),
        "values and factors": lambda: [with_factors(weight) for weight in weights],
    }
    row: dict[str, Any] = {"model": folder or "random weights of SmolLM2-135M's shapes", "weights": len(weights)}
    for name, work in ways.items():
        row[name] = clock(device, work, 0) / 1e3
        print(name, row[name], flush=True)
    row["k wrong"] = []
    for name, weight in found.items():
        true, ours = spectrum_of(torch.linalg.svdvals(weight.double()).cpu(), tuple(weight.shape)), spectrum(weight)
        row["k wrong"] += [f"{name} at {t}" for t in SHARES if ours.rank_at(t) != true.rank_at(t)]
    return [row]


def matrices(layers: int) -> Iterator[tuple[str, tuple[int, int], int]]:
    """Name, shape and seed of every matrix of so many layers of Llama-2-7B's shapes."""
    for i in range(layers):
        for j, (name, shape) in enumerate(LAYER.items()):
            yield f"model.layers.{i}.{name}_proj.weight", shape, i * len(LAYER) + j


def made(shape: tuple[int, int], seed: int, device: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=device) / shape[1] ** 0.5).bfloat16().cpu()


def at_share(found: Spectrum) -> int:
    return found.rank_at(0.6)


def seven(device: str, layers: int) -> Rows:
    """Values and factors at 0.6 of the 7B set on its device, by all processes: seconds until the last factor is there."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    stored = {name: made(shape, seed, device).to(device) for name, shape, seed in matrices(layers)}
    wanted = Wanted(at_share)
    weights = [Weight(n, tuple(one.shape), one.dtype, partial(stored.__getitem__, n), wanted) for n, one in stored.items()]
    measure(weights[:1])  # the libraries load
    if world > 1:
        dist.barrier()
    started = time.perf_counter()
    found = measure(weights, distributed=world > 1)
    measured = time.perf_counter() - started
    mine = {name: one for name, one in found.items() if one.basis is not None}
    held = [factors(stored[name].to(device), at_share(one), name, one.basis)[::2] for name, one in mine.items()]
    if device == "cuda":
        torch.cuda.synchronize()
    if world > 1:
        dist.barrier()
    row = {"weights": len(weights), "processes": world, "measured": measured, "with factors": time.perf_counter() - started}
    row |= {"factors here": len(held), "sum of k": sum(at_share(one) for one in found.values())}
    return [row] if rank == 0 else []


def folder(device: str, layers: int) -> Rows:
    """`sarac analyze` over a folder of random shards, in a process of its own: seconds, and its peak memory."""
    with tempfile.TemporaryDirectory() as place:
        index: dict[str, str] = {}
        for i in range(layers):
            shard = {name: made(shape, seed, device) for name, shape, seed in matrices(layers) if f".{i}." in name}
            file = f"model-{i + 1:05d}-of-{layers:05d}.safetensors"
            save_file(shard, Path(place) / file)
            index |= dict.fromkeys(shard, file)
        Path(place, "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        size = sum(file.stat().st_size for file in Path(place).glob("*.safetensors"))
        started = time.perf_counter()
        done, peak = watched("analyze", place, "--no-cache", "--json")
        spent = time.perf_counter() - started
        _, idle = watched("analyze", place, "--no-cache", "--json", "--where", "model.layers.0.k_proj.weight")
    largest = 8 * max(math.prod(shape) for shape in LAYER.values())
    row = {"bytes": size, "sites": len(json.loads(done)["sites"]), "seconds": spent, "peak": peak, "peak of one weight": idle}
    return [{**row, "largest in float64": largest, "peak in it": peak / largest}]


def watched(*words: str) -> tuple[str, int]:
    """What a command prints, and its peak memory in bytes: of its own pages, ru_maxrss would begin with this process's."""
    code = f"import sys; from sarac.cli import app; app({list(words)!r}, standalone_mode=False); "
    code += "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout, int(done.stderr.split()[-1]) * 1024


def table(rows: Rows, title: str) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    shown = Table(*names, title=title, title_justify="left")
    for row in rows:
        shown.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in (row.get(name, "") for name in names)))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["shapes"], help="shapes, model, seven, folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    ways: dict[str, Callable[[], Rows]] = {
        "shapes": lambda: shapes(given.device, given.rounds),
        "model": lambda: model(given.device, given.model),
        "seven": lambda: seven(given.device, given.layers),
        "folder": lambda: folder(given.device, given.layers),
    }
    results: dict[str, Rows] = {}
    for part in given.parts:
        results[part] = ways[part]()
        if results[part]:
            Console(width=220).print(table(results[part], part))
    if given.out and int(os.environ.get("RANK", 0)) == 0:
        about = {"torch": torch.__version__, "device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu"}
        given.out.write_text(json.dumps({**about, **results}, indent=1))


if __name__ == "__main__":
    main()
