"""Run studies: side by side in several processes, in the order of their value, each finished run a line on disk.

    PYTHONPATH=examples python -m experiments.run --model tiny --results out/results.jsonl         (a try on a CPU)
    PYTHONPATH=examples python -m experiments.run 3 2 --model FOLDER --name smollm2 --tokens tokens.pt --seconds 540

A run that the file has already is skipped, so a call that was stopped goes on where it was. First comes the search for learning
rates that the chosen studies need, then their runs, then timings, each alone on the machine. `--dry` prints what would be run.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import queue
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.making import program_key
from experiments.methods import METHODS, search_specs, searched_by
from experiments.search import FURTHER, Search
from experiments.sets import SETS
from experiments.spec import SEARCH_SEED, Spec, merged, missing

BY_VALUE = (3, 2, 4, 5, 6, 8, 7)
FILES = {
    2: "study_2_budgets", 3: "study_3_allocation", 4: "study_4_threshold", 5: "study_5_routing", 6: "study_6_forgetting",
    7: "study_7_start", 8: "study_8_multitask",
}  # fmt: skip
SILENT = 120.0  # seconds after which a process that died is not waited for
TIMING_S = 5.0  # of the time are kept for each timing
TOGETHER = 3  # runs of one program that a process takes at a time, at most
# What a step of 16 x 256 tokens and what goes around a run take of an H200 that eight processes share under MPS, to estimate:
# of the committed lines 194 runs, 22,436 such steps, took 684 s, of which 60 went by before the first.
STEP_S, RUN_S = 0.023, 0.6


def study(number: int) -> Any:
    """The module of a study."""
    return importlib.import_module(f"experiments.{FILES[number]}")


def wanted(numbers: Sequence[int], model: str) -> list[Spec]:
    """The runs of the studies in the order of their value, each once."""
    return merged(spec for number in BY_VALUE if number in numbers for spec in study(number).specs(model))


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results; a last one that was cut off is none."""
    if not path.exists():
        return []
    found = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def groups(specs: Sequence[Spec], size: int = TOGETHER) -> list[list[Spec]]:
    """Runs that can share a program, up to so many together, at their first one's place."""
    found: dict[tuple[Any, ...], list[list[Spec]]] = {}
    ordered: list[list[Spec]] = []
    for spec in specs:
        mine = found.setdefault(program_key(spec), [])
        if not mine or len(mine[-1]) >= size:
            mine.append([])
            ordered.append(mine[-1])
        mine[-1].append(spec)
    return ordered


def estimate(specs: Sequence[Spec]) -> float:
    """GPU seconds of these runs."""
    return sum(RUN_S + STEP_S * spec.steps * spec.batch * length(spec) / (16 * 256) for spec in specs)


def length(spec: Spec) -> int:
    """Tokens of a row of the spec's task."""
    return max(SETS[name][1] if name in SETS else 32 for name in spec.task.split("+"))


def work(options: argparse.Namespace, inbox: Any, outbox: Any) -> None:
    """A process: make the runs that come, until there are none, the time is over, or the device is lost to this process."""
    from experiments.runner import Place, run

    place, lost = None, False
    while not lost and (given := inbox.get()) is not None:
        for spec in given:
            if lost or time.time() > options.until - (options.kept if spec.kind == "run" else 0):
                outbox.put((spec.identity, None))
                continue
            try:
                place = place or Place.open(
                    options.name, options.model, options.tokens, options.device, options.texts, options.compile
                )
                line = run(spec, place)
            except Exception as error:  # noqa: BLE001 - one run that fails is a line; the others go on
                told = "".join(traceback.format_exception(error))
                line = {"id": spec.identity, "spec": vars(spec), "error": told[-1500:]}
                lost = "CUDA error" in told and "out of memory" not in told  # no later run of this process can be made
                if place is not None:
                    place.program, place.key = None, ()
            outbox.put((spec.identity, line))


class Crew:
    """The processes and the file: what they finish is written here, by one writer."""

    def __init__(self, options: argparse.Namespace, context: Any) -> None:
        self.options, self.lines, self.context = options, read(options.results), context
        self.inbox, self.outbox = context.Queue(), context.Queue()
        self.processes: list[Any] = []

    def run(self, specs: Sequence[Spec], count: int) -> None:
        """Have these made by so many processes; returns when all are done, or the time is over."""
        todo = missing(specs, self.lines)
        while todo and len(self.processes) < count:
            self.processes.append(self.context.Process(target=work, args=(self.options, self.inbox, self.outbox)))
            self.processes[-1].daemon = True
            self.processes[-1].start()
        # Few runs are dealt out in smaller groups: to make a program twice is better than a process that has nothing to do.
        for group in groups(todo, max(1, min(TOGETHER, len(todo) // count))):
            self.inbox.put(group)
        left, heard = {spec.identity for spec in todo}, time.time()
        while left and any(process.is_alive() for process in self.processes):
            try:
                identity, line = self.outbox.get(timeout=1.0)
            except queue.Empty:
                if time.time() - heard > SILENT and not all(process.is_alive() for process in self.processes):
                    print(
                        f"A process died, and nothing was heard for {SILENT:.0f} s: {len(left)} runs are left for another call."
                    )
                    break
                continue
            left.discard(identity)
            heard = time.time()
            if line is not None:
                self.keep(line, len(left))

    def keep(self, line: dict[str, Any], left: int) -> None:
        """Append a line."""
        self.options.results.parent.mkdir(parents=True, exist_ok=True)
        with self.options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)
        spec = line["spec"]
        told = line["error"].strip().splitlines()[-1] if "error" in line else f"nll {line.get('nll', line.get('ms_step')):.4f}"
        shown = f"{spec['method']} {spec['plan']} {spec['task']} seed {spec['seed']} lr {spec['lr']:g}: {told}"
        how = "" if line.get("graph", True) else f", eager ({line.get('why_eager')})"
        how += f", chains as written ({line['why_plain']})" if self.options.compile and line.get("why_plain") else ""
        print(
            f"{left} to do, {time.time() - self.options.since:.0f} s: {shown}, {line.get('total_s', 0):.1f} s{how}",
            flush=True,
        )

    def dismiss(self) -> None:
        """Let the processes end."""
        for _ in self.processes:
            self.inbox.put(None)
        for process in self.processes:
            process.join(timeout=20)
            if process.is_alive():
                process.terminate()  # it holds nothing that is not on disk
        self.processes = []


def searching(specs: Sequence[Spec], model: str) -> list[Spec]:
    """The search that these runs need."""
    pairs = {pair for pair in map(searched_by, specs) if pair is not None}
    batch = specs[0].batch if specs else 16
    return [Spec(**{**vars(spec), "batch": batch}) for spec in search_specs(pairs, model, *small(model))]


def small(model: str) -> tuple[Any, ...]:
    """The task and the steps of the search, where the model has others."""
    return ("sums", 12) if model == "tiny" else ()


def conduct(options: argparse.Namespace, context: Any = None) -> None:
    """The search, the runs, the timings; `context` makes processes and queues, by default such that start afresh."""
    specs = wanted(options.studies, options.name)
    crew = Crew(options, context or multiprocessing.get_context("spawn"))
    untimed, timings = ([spec for spec in specs if (spec.kind == "timing") == alone] for alone in (False, True))
    options.kept = TIMING_S * len(timings) if timings else 0.0
    many = options.processes
    crew.run(searching(specs, options.name), many)
    for _ in range(FURTHER):
        crew.run([spec for spec in Search(crew.lines).further() if spec.model == options.name], many)
    ready, waiting = Search(crew.lines).resolved(untimed)
    crew.run(sorted(ready, key=lambda spec: "accuracy" in spec.extras), many)  # texts are generated last: they take longest
    crew.dismiss()
    timed, more = Search(crew.lines).resolved(timings)
    crew.run(timed, 1)
    crew.dismiss()
    left = missing([*ready, *timed], crew.lines)
    print(f"{len(crew.lines)} lines in {options.results}; {len(left) + len(waiting) + len(more)} runs are left.")


def dry(options: argparse.Namespace) -> None:
    """What there is to do, and what it would take."""
    lines = read(options.results)
    specs = wanted(options.studies, options.name)
    search = searching(specs, options.name)
    ready, waiting = Search(lines).resolved(specs)
    todo = [*missing(search, lines), *missing(ready, lines), *waiting]
    for (method, plan, task, steps, kind), count in Counter((s.method, s.plan, s.task, s.steps, s.kind) for s in todo).items():
        print(f"{count:3} x {METHODS[method].label:32} {plan:44} {task:24} {steps:4} steps {kind}")
    searches = sum(spec.seed == SEARCH_SEED for spec in todo)
    print(f"{len(todo)} runs, {searches} of them search; about {estimate(todo):.0f} s of a GPU")


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", type=int, default=list(BY_VALUE), help="by number; all of them by default")
    parser.add_argument("--model", default="tiny", help="a transformers folder, smollm2 (from the package), or tiny")
    parser.add_argument("--name", default="", help="what lines call the model; by default the folder's name")
    parser.add_argument("--tokens", default="", help="the file that experiments.data made; tiny needs none")
    parser.add_argument("--results", type=Path, default=Path("demo-out/experiments/results.jsonl"))
    parser.add_argument("--processes", type=int, default=0, help="8 on CUDA, 1 on the CPU")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="the chains of all methods; by default on CUDA")
    parser.add_argument("--device", default="")
    parser.add_argument("--seconds", type=float, default=1e9, help="after these no new run starts")
    parser.add_argument("--dry", action="store_true", help="print what would be run")
    options = parser.parse_args(arguments)
    if unknown := [str(number) for number in options.studies if number not in FILES]:
        parser.error(
            f"There is no study {', '.join(unknown)} to run: take of {', '.join(map(str, FILES))}; 1 has a command of its own."
        )
    options.since = time.time()
    options.until, options.kept = options.since + options.seconds, 0.0
    if options.model == "smollm2":
        import smollm2  # beside this package in examples/

        options.model = str(smollm2.plain_folder(Path("demo-out/smollm2")))
    options.name = options.name or Path(options.model).name
    options.texts = str(options.results.parent / "texts")
    return options


def main() -> None:
    options = parsed()
    if options.dry:
        dry(options)
        return
    import torch

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cuda = options.device == "cuda"
    options.processes = options.processes or (8 if cuda else 1)
    options.compile = cuda if options.compile is None else options.compile
    os.environ.setdefault("OMP_NUM_THREADS", "2")  # of each process: they share the cores
    if options.model != "tiny" and os.environ.get("SARAC_CACHE") != "off":
        os.environ.setdefault("SARAC_CACHE", str(Path(tempfile.gettempdir()) / "sarac-experiments"))
    conduct(options)


if __name__ == "__main__":
    main()
