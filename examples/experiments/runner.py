"""One run: from a spec to one JSON line with all that repeating it needs."""

import gc
import hashlib
import math
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sarac
from experiments import compiled, data, routing, scoring, tiny
from experiments.bench import Bench, slots
from experiments.making import make, program_key
from experiments.methods import METHODS
from experiments.spec import SEARCH_SEED, Spec
from experiments.training import CAUSAL, Program, Trainable, mean_nll, order, whole
from sarac import backends, passes

TIMED = 20  # steps of a timing, alone on the machine
PACKAGES = ("torch", "transformers", "peft", "sarac")


@dataclass
class Place:
    """Where a process makes its runs, one at a time: the base model on its device, the tokens, the program of the last run."""

    name: str
    bench: Bench
    tokens: dict[str, Any]
    words: Any
    about: dict[str, Any]
    key: tuple[Any, ...] = ()
    program: Program | None = None
    texts: Path | None = None  # where generated texts are appended
    starts: dict[str, dict[str, Any]] = field(default_factory=dict)  # what the base model scores, by task

    @classmethod
    def open(cls, name: str, model: str, tokens: str, device: str, texts: str = "", compiling: bool = False) -> "Place":
        """The model by its folder, or `tiny`; tokens by their file; `compiling`: the chains that every method shares."""
        if device == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream())  # of all that this process does: the default one cannot be captured
        if model == "tiny":
            base, words, made = tiny.model(), tiny.Bytes(), data.prepare_tiny()
        else:
            from transformers import AutoModelForCausalLM

            base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
            words, made = data.Words(Path(model)), torch.load(tokens, weights_only=True)
        base.config._attn_implementation = CAUSAL
        base.config.use_cache = False
        base = base.to(device).eval().requires_grad_(False)
        about = {
            "versions": {package: installed(package) for package in PACKAGES}, "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "revision": revision(), "sources": sources(),
            "data": made["about"],
        }  # fmt: skip
        bench = Bench(base)
        if compiling:
            compiled.install(base.config, torch.device(device))
        return cls(name, bench, made, words, about, texts=Path(texts) if texts else None)

    def tasks(self, spec: Spec) -> dict[str, Any]:
        """The sets that a spec trains on, by name."""
        return {name: self.tokens["tasks"][name] for name in spec.task.split("+")}

    def start(self, spec: Spec) -> dict[str, Any]:
        """What the base model scores, from which every method starts: each is there a no-op, PiSSA up to rounding."""
        if spec.task not in self.starts:
            base = self.bench.base
            self.starts[spec.task] = losses(spec, self, Trainable(base, base, lambda: base), ("test",))
        return {f"{name}_before": value for name, value in self.starts[spec.task].items()}

    def prepared(self, spec: Spec) -> Program:
        """The program that serves this spec, at its start: the last one where it fits, else a new one."""
        key = program_key(spec)
        if self.program is None or self.key != key:
            self.program = None
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            tasks = list(self.tasks(spec).values())
            length, width = max(task["length"] for task in tasks), max(task["width"] for task in tasks)
            rows = joined([task["train"] for task in tasks], length, self.words.pad)
            held = self._held(spec)
            self.program = Program(make(spec, self.bench), rows, width, spec.batch, len(tasks) > 1, held)
            self.key = key
        self.program.reset()
        return self.program

    def _held(self, spec: Spec) -> int:
        """Bytes on the GPU that are there whatever the method: the base model and its copy, all singular vectors."""
        if not torch.cuda.is_initialized():
            return 0
        if METHODS[spec.method].family == "sarac":
            self.bench.decompose()
            return torch.cuda.memory_allocated()
        return torch.cuda.memory_allocated() + sum(parameter.nbytes for parameter in self.bench.base.parameters())


def installed(package: str) -> str:
    """The version of a package, "" for one that runs from its source."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def sources() -> str:
    """A digest of the sources of sarac and of these experiments, which tells them apart where there is no checkout."""
    folders = (Path(__file__).parent, Path(sarac.__file__).parent, *(Path(p) for one in (passes, backends) for p in one.__path__))
    return digest({path for folder in folders for path in folder.rglob("*.py")})


def digest(paths: Iterable[Path]) -> str:
    """A digest of what these files hold, in whatever order and wherever they lie."""
    found = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
    return hashlib.sha256("".join(found).encode()).hexdigest()[:16]


def revision() -> str:
    """The git revision of the checkout, "" where there is none."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def joined(parts: list[Mapping[str, torch.Tensor]], length: int, pad: int) -> dict[str, torch.Tensor]:
    """Rows of several sets behind each other, padded to one length."""
    ids = [nn.functional.pad(part["ids"], (0, length - part["ids"].shape[1]), value=pad) for part in parts]
    return {"ids": torch.cat(ids), "bounds": torch.cat([part["bounds"] for part in parts])}


def run(spec: Spec, place: Place) -> dict[str, Any]:
    """Make one run; its line."""
    started = time.perf_counter()
    line = {"id": spec.identity, "spec": asdict(spec), "about": place.about}
    if METHODS[spec.method].family == "untouched":
        found = {"trained": 0, **measured(spec, place, make(spec, place.bench))}
    else:
        found = _trained(spec, place)
    found["why_plain"] = compiled.why_not()  # of the chains that every method shares; "" where they are compiled
    found |= {} if spec.kind == "timing" else {"total_s": time.perf_counter() - started}
    return {**line, **found}


def _trained(spec: Spec, place: Place) -> dict[str, Any]:
    """What a run of a method that trains adds to its line."""
    program = place.prepared(spec)
    made, counts = program.made, [len(task["train"]["ids"]) for task in place.tasks(spec).values()]
    if "routing" in spec.extras and not program.before:
        program.before["routing_before"] = routing.figures(made.model, made.inner, _routed_tasks(place))
    before = place.start(spec) if spec.kind == "run" else {}
    line = {"trained": sum(parameter.numel() for parameter in program.params), "plan_about": made.about}
    line |= {"graph": program.graph is not None, "why_eager": program.why_eager, "peak_gib": program.peak}
    if spec.kind == "timing":
        rows = order(counts, spec.batch, TIMED, spec.seed)
        program.train(rows, spec.lr)
        _, seconds = program.train(rows, spec.lr)
        return {**line, "ms_step": 1e3 * seconds / TIMED}
    course, seconds = program.train(order(counts, spec.batch, spec.steps, spec.seed), spec.lr)
    line |= {"losses": [round(loss, 4) for loss in course[:: max(1, spec.steps // 20)]], "last_loss": course[-1]}
    line |= {**before, **program.before, "train_s": seconds, "diverged": not math.isfinite(course[-1])}
    return {**line, **measured(spec, place, made)}


def losses(spec: Spec, place: Place, made: Trainable, parts: Sequence[str]) -> dict[str, Any]:
    """The nll on these parts of the task, the mean of several tasks and that of each, and on unrelated text."""
    tasks, found = place.tasks(spec), {}
    for part in parts:
        name = "nll" if part == "test" else f"{part}_nll"
        each = {task: mean_nll(made.model, made.inner, rows[part], rows["width"]) for task, rows in tasks.items()}
        found[name] = sum(each.values()) / len(each)
        if len(each) > 1:
            found[f"{name}_by_task"] = each
    blocks = place.tokens["unrelated"]
    found["unrelated_nll"] = mean_nll(made.model, made.inner, whole(blocks), blocks.shape[1] - 1)
    return found


def measured(spec: Spec, place: Place, made: Trainable) -> dict[str, Any]:
    """The losses, for the search those on rows held out of training too; then what the spec asks for beside them."""
    found = losses(spec, place, made, ("test", "valid") if spec.seed == SEARCH_SEED else ("test",))
    if "routing" in spec.extras:
        found["routing"] = routing.figures(made.model, made.inner, _routed_tasks(place))
    if "orthogonality" in spec.extras:
        found["orthogonality"] = orthogonality(made.model)
    if "accuracy" in spec.extras:
        found["accuracy"] = accuracies(spec, place, made)
    return found


def _routed_tasks(place: Place) -> dict[str, Any]:
    wanted = [name for name in ("gsm8k", "svamp", "boolq", "e2e") if name in place.tokens["tasks"]]
    return {name: place.tokens["tasks"][name] for name in wanted or place.tokens["tasks"]}


def orthogonality(model: nn.Module) -> dict[str, float]:
    """‖Uᵀ U − I‖ / √k and the same of V, the mean over the sites."""
    errors: dict[str, list[float]] = {"u": [], "v": []}
    for _, adapter, tensors in slots(model):
        eye = torch.eye(adapter.rank, device=tensors["u"].device)
        u, v = tensors["u"].detach(), tensors["v"].detach()
        for role, product in (("u", u.T @ u), ("v", v @ v.T)):
            errors[role].append(float((product - eye).norm()) / adapter.rank**0.5)
    return {role: sum(found) / len(found) for role, found in errors.items()}


def accuracies(spec: Spec, place: Place, made: Trainable) -> dict[str, Any]:
    """Of each task what it is scored by; texts that have references are kept for BLEU and ROUGE, which need other packages."""
    found: dict[str, Any] = {}
    tasks = place.tasks(spec)
    for name, task in tasks.items():
        if task["choices"] is not None:
            right = scoring.weighed(made.model, made.inner, task)
            found[name] = {"choices": sum(right) / len(right), "rows": len(right)}
    generating = {name: task for name, task in tasks.items() if task["new"]}
    if generating:
        model = made.merge()
        if METHODS[spec.method].family == "peft":  # merging takes the adapters off the model: the next run makes its own
            place.program, place.key = None, ()
        for name, task in generating.items():
            texts = scoring.generated(model, task, place.words)
            if name != "e2e":
                right = scoring.exact(texts, task["references"])
                found[name] = {"exact": sum(right) / len(right), "rows": len(right)}
            elif place.texts is not None:
                found[name] = {"rows": len(texts), "texts": place.texts.name}
                keep_texts(place.texts, spec, name, texts)
    return found


def keep_texts(folder: Path, spec: Spec, task: str, texts: list[str]) -> None:
    """Write what was generated beside the results."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{spec.identity}.{task}.txt").write_text("\n".join(" ".join(text.split()) for text in texts), encoding="utf-8")
