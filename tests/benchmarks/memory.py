"""The host memory that an export adds to the process that holds the model: a Llama-shaped one, plain and merged, by dtype.

    python tests/benchmarks/memory.py [--layers 8] [--size 1536] [--out memory.json]

Each export runs in a process of its own; GB are peaks of resident memory above what the process held before. `limit` is
1.3 times the weights in the export's dtype, and 1.5 GB. The check against torch is part of it, on the CPU, where ONNX Runtime
computes half precision in float32 with float32 copies of the weights.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from runtime import llama

import sarac

WAYS = (("plain", "fp32"), ("merged", "fp32"), ("plain", "fp16"), ("merged", "fp16"))
STATUS = Path("/proc/self/status")


def resident(what: str) -> float:
    """GB of this process: VmRSS now, VmHWM at most since it was reset."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024 / 1e9


def measure(way: str, dtype: str, layers: int, size: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = llama(layers, size, 8 * size // 3, size // 128, size // 128, 16000).eval()
    weights = sum(parameter.nbytes for parameter in model.parameters()) / 1e9 / (2 if dtype == "fp16" else 1)
    if way == "merged":
        model = sarac.transform(model, "rank:8")
        for parameter in (one for one in model.parameters() if one.requires_grad):
            parameter.data.normal_(0, 0.05)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    with tempfile.TemporaryDirectory() as folder:
        report = sarac.export(model, Path(folder) / "m.onnx", dtype=dtype)
    added = resident("VmHWM") - before
    row = {"way": way, "dtype": dtype, "weights": weights, "before": before, "added": added, "limit": 1.3 * weights + 1.5}
    return {**row, "seconds": sum(report.seconds.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--size", type=int, default=1536)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "DTYPE"), help="measure this one, in this process")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(*given.one, given.layers, given.size)))
        return
    rows = []
    for way in WAYS:
        own = [sys.executable, __file__, "--layers", str(given.layers), "--size", str(given.size), "--one", *way]
        rows.append(json.loads(subprocess.run(own, capture_output=True, check=True, text=True).stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    table = Table(*rows[0], title="GB of host memory", title_justify="left")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else value for value in row.values()))
    Console().print(table)
    if given.out:
        given.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
