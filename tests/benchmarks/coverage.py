"""How much of the world sarac adapts rightly: every model type of transformers, every timm family, every plain spelling.

    python tests/benchmarks/coverage.py [--only llama 'plain:*' timm:resnet] [-j 2] [--onnx] [--out coverage.json]

Each case is built tiny and random, then: transform -> the same outputs, the source untouched -> random adapters -> other outputs
-> fold -> the adapters' outputs, the original names and classes -> single adapters have an effect where their weight has.
`right`: all of it. `refused`: `transform` said no. `WRONG`: numbers. `crashed`: any other error. What transformers itself
cannot build or run here is listed apart and does not count. Every case runs in a process of its own with a time limit.
"""

import argparse
import fnmatch
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # `benchmarks` is a folder of `tests`; its own files are not to be found by their bare names
    sys.path = [
        str(Path(__file__).resolve().parents[1]),
        *(p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent),
    ]

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from benchmarks import families, plain, tiny
from benchmarks.judge import CRASHED, REFUSED, RIGHT, UNUSABLE, WRONG, Row, judge, said
from rich.console import Console
from rich.table import Table

OUTCOMES = (RIGHT, REFUSED, WRONG, CRASHED, UNUSABLE)
FAMILIES = ("transformers", "timm", "plain")
MEMORY = 6 * 2**30  # bytes of one case


def cases(only: Sequence[str] = ()) -> list[tuple[str, str]]:
    """(family, name) of every case that one of the globs over `name` or `family:name` takes; of all without globs."""
    every = [("transformers", name) for name in tiny.types()]
    every += [("timm", name) for name in families.names()] + [("plain", name) for name in plain.CASES]
    if not only:
        return every
    return [case for case in every if any(fnmatch.fnmatchcase(text, g) for g in only for text in (case[1], ":".join(case)))]


def run(family: str, name: str, onnx: bool = False, build_only: bool = False) -> Row:
    """One case in this process."""
    row, started = Row(family, name), time.perf_counter()
    torch.manual_seed(0)
    families.timm()  # some types of transformers have their backbones there
    try:
        if family == "plain":
            row = plain.run(row, onnx)
        else:
            built = (tiny if family == "transformers" else families).build(name)
            row.model, row.notes = type(built.model).__name__, [built.rule, _named(built.inputs)]
            row = row if build_only else judge(row, built.model, built.inputs, built.options, onnx)
            row.outcome = RIGHT if build_only else row.outcome
    except (tiny.CannotBuild, families.CannotBuild) as error:
        row.outcome, row.reason = UNUSABLE, str(error)
    except Exception as error:  # noqa: BLE001  a row for everything
        row.outcome, row.reason = CRASHED, said(error)
    row.seconds = round(time.perf_counter() - started, 2)
    return row


def _named(inputs: Any) -> str:
    return "inputs: " + ", ".join(inputs if isinstance(inputs, dict) else [str(tuple(x.shape)) for x in inputs])


def _child(pipe: Any, family: str, name: str, onnx: bool, build_only: bool) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    torch.set_num_threads(1)
    pipe.send(run(family, name, onnx, build_only))


def run_all(todo: Sequence[tuple[str, str]], jobs: int, limit: float, **how: bool) -> Iterator[Row]:
    """Every case in a forked process of its own, `jobs` at a time; a crash or a hang becomes a row."""
    context, waiting, running = multiprocessing.get_context("fork"), list(todo)[::-1], {}
    while waiting or running:
        while waiting and len(running) < jobs:
            family, name = waiting.pop()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(theirs, family, name, *how.values()))
            process.start()
            theirs.close()
            running[ours] = (process, Row(family, name), time.perf_counter())
        ready = wait(list(running), timeout=0.5)
        for pipe, (process, row, started) in list(running.items()):
            spent = time.perf_counter() - started
            if pipe in ready:
                try:
                    row = pipe.recv()
                except EOFError:
                    process.join()
                    row.outcome, row.reason = CRASHED, f"the process died with status {process.exitcode}"
            elif spent > limit:
                row.outcome, row.reason = CRASHED, f"no result after {limit:.0f} s"
            elif _memory(process.pid) > MEMORY:
                row.outcome, row.reason = CRASHED, f"more than {MEMORY / 2**30:.0f} GiB of memory"
            else:
                continue
            process.kill()
            process.join()
            pipe.close()
            del running[pipe]
            row.seconds = row.seconds or round(spent, 2)
            yield row


def _memory(pid: int | None) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):  # gone, or not Linux
        return 0


def share(rows: Sequence[Row]) -> float:
    """Right ones among those that can be built and run."""
    usable = [row for row in rows if row.outcome != UNUSABLE]
    return sum(row.outcome == RIGHT for row in usable) / len(usable) if usable else 1.0


def summary(rows: Sequence[Row]) -> Table:
    table = Table("family", "cases", *OUTCOMES, "share", "sites", "left out")
    for family in FAMILIES:
        own = [row for row in rows if row.family == family]
        counts = [str(sum(row.outcome == outcome for row in own)) for outcome in OUTCOMES]
        if own:
            table.add_row(
                family,
                str(len(own)),
                *counts,
                f"{share(own):.1%}",
                *(str(sum(x)) for x in ([r.sites for r in own], [r.left for r in own])),
            )
    return table


def failures(rows: Sequence[Row]) -> Iterator[str]:
    """A line for every case that is not right, and one for every reason of those that transformers itself cannot run."""
    for row in sorted(rows, key=lambda row: (OUTCOMES.index(row.outcome), row.family, row.name)):
        if row.outcome != RIGHT or row.onnx.startswith("WRONG"):
            yield f"{row.outcome}: {row.family}:{row.name} ({row.model}, {row.sites} sites): {row.reason[:400] or row.onnx}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="globs over NAME or FAMILY:NAME")
    parser.add_argument("-j", "--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds a case")
    parser.add_argument("--onnx", action="store_true", help="export each case as well (slow)")
    parser.add_argument("--build", action="store_true", help="only build the models and run them once")
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    todo, rows, progress = cases(options.only), [], Console(stderr=True)
    started = time.perf_counter()
    for row in run_all(todo, options.jobs, options.limit, onnx=options.onnx, build_only=options.build):
        rows.append(row)
        done = f"{len(rows)}/{len(todo)} {time.perf_counter() - started:.0f} s"
        progress.print(
            f"{done} {row.family}:{row.name} {row.outcome} {row.sites} sites {row.seconds:.1f} s {row.reason[:160]} {row.onnx}",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
        if options.out:
            options.out.write_text(json.dumps([row.as_dict() for row in rows], indent=1) + "\n", encoding="utf-8")
    console = Console(width=200)
    for line in failures(rows):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(summary(rows))


if __name__ == "__main__":
    main()
