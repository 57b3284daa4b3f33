"""What the commands take: their options, each with its help, and what becomes of the words: a model, an input spec."""

import json
import os
from pathlib import Path
from typing import Annotated, Literal

import typer
from torch import nn

from sarac import storage
from sarac.ir.errors import CheckpointError, InputError
from sarac.ir.inputs import InputSpec
from sarac.ir.record import __version__
from sarac.planning import schema
from sarac.recipe import open_model

_MODEL = "A transformers folder or hub name, timm:NAME, package.module:factory, or a model.pt of sarac's."
_ARGS = "Keyword arguments for what builds MODEL, for example '{\"width\": 8}'."
_FACTORY = "The factory behind a model.pt: opening a file must not run code that you did not name."
_TRUST = "Open MODEL even if it is a pickled module, which runs code that stands in the file."
_WHERE = "Only weights of these names, such as '*.q_proj.weight'; repeatable. Default: all but output heads and embeddings."
_ALSO = "Further parameters that train whole, such as '*norm*'; repeatable."
_PLAN = "threshold:0.6, energy:0.9, rank:16, budget:0.5% or budget:1000, options behind (',min=4'); or a plan's JSON file."
_RULE = "threshold:0.6, energy:0.9, rank:16, budget:0.5%, budget:1000 or uniform:like=RULE. Default: threshold:0.6."
_OVERRIDE = "GLOB=RULE: a rule of their own, or none, for weights of these names; repeatable, the last that matches holds."
_METHOD = "sara trains a shift for each singular value; mosara several, and a router that mixes them."
_SPECS = "An input of the model, name:dtype[sizes], such as x:float32[2,16] or ids:int64[2,16]<100; repeatable."
_ROUTING = "mean: fix the gates of routed adapters at their mean over --calibration, an approximation."
_CALIBRATION = "JSONL for --routing: rows with text, or a call's inputs by name."
_TOKENIZER = "The tokenizer's folder, where MODEL or its recipe names none."
_DATA = "JSONL: rows with text, or with prompt and completion, of which the completion alone is learnt."
_EVAL = "JSONL on which the loss is measured before and after."
_LR = "Default: what sarac.recommended_lr gives for the adapters."
_SOURCE = "A model.pt, a PEFT folder, or an adapter file of sarac.save_adapter's (.safetensors)."
_TARGET = "Its name says the form: .pt a model, .safetensors its adapters, .onnx_adapter those for ONNX Runtime, else PEFT."
_BASE = "The model under a PEFT folder or an adapter file. Default: the folder that a PEFT folder names, if it is here."
_LAYOUT = "padded: one rank, which every server reads rightly; pattern: each weight's own, smaller. Default: padded."
_MAX_RANK = "Cut larger adapters of a PEFT folder to this rank by SVD; what that loses is told."
_ADAPTER = "Which of the adapters in a model.pt. Default: the one that was live."
_NO_CACHE = "Measure anew what was measured before, and keep nothing. The cache: sarac cache."
_FORCE = "Load an adapter file onto another base than it was trained on."
_KEEP = "Modules or weights that stay in float32 in fp16 and bf16, beside those that have to. Again for more."
_DYNAMIC = 'Which sizes stay free: all that can, none, or by name as in "input_ids[batch,length]".'
_OPTIMIZE = "Operators that ONNX Runtime alone knows (ort), folded constants (basic). Default: ort for cuda, else basic."
_SWAPPABLE = "Leave the adapters open, to swap in at run time: one at a time, or with =rowwise one for each row of a batch."
_ENGINE = "genai: the merged model as a folder that onnxruntime_genai generates from, with --tokenizer's files."
_TASK = "generate: a causal language model's step over a cache of keys and values, for sarac.Runtime's generate."
_OPSET = "The ONNX operator set to write."


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sarac {__version__}")
        raise typer.Exit


def _print_schema(wanted: bool) -> None:
    if wanted:
        typer.echo(schema().rstrip())
        raise typer.Exit


_SCHEMA = typer.Option("--schema", callback=_print_schema, is_eager=True, help="Print the JSON Schema of a plan and leave.")
Schema = Annotated[bool, _SCHEMA]
_VERSION = typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
Version = Annotated[bool, _VERSION]

Source = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL)]
Args = Annotated[str | None, typer.Option("--args", metavar="JSON", help=_ARGS)]
Factory = Annotated[str | None, typer.Option("--model", metavar="MODULE:FACTORY", help=_FACTORY)]
Trust = Annotated[bool, typer.Option("--trust-pickle", help=_TRUST)]
NoCache = Annotated[bool, typer.Option("--no-cache", help=_NO_CACHE)]
Clear = Annotated[bool, typer.Option("--clear", help="Remove all that is kept.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
ModelOut = Annotated[Path, typer.Option("--out", metavar="FILE", help="The model.pt to write.")]
FoldOut = Annotated[Path, typer.Option("--out", metavar="PATH", help="A new folder (transformers models), or a .pt file.")]
PlanOut = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the plan as JSON too, to read and to edit.")]
OnnxFile = Annotated[Path, typer.Argument(metavar="ONNX", help="The ONNX file; the folder, of the engine genai.")]
OnnxBase = Annotated[Path, typer.Argument(metavar="BASE", help="An ONNX file that sarac exported from the base model.")]
AdapterFile = Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter file of sarac's, .safetensors.")]
OnnxOut = Annotated[Path, typer.Argument(metavar="OUT", help="The ONNX file to write.")]
Engine = Annotated[Literal["onnx", "genai"], typer.Option(help=_ENGINE)]
Where = Annotated[list[str] | None, typer.Option(metavar="GLOB", help=_WHERE)]
AlsoTrain = Annotated[list[str] | None, typer.Option(metavar="GLOB", help=_ALSO)]
Plan = Annotated[str, typer.Option(metavar="RULE", help=_PLAN)]
NewPlan = Annotated[str | None, typer.Option(metavar="RULE", help=f"{_PLAN} Default for a plain MODEL: threshold:0.6.")]
Rule = Annotated[str | None, typer.Option(metavar="RULE", help=_RULE)]
Overrides = Annotated[list[str] | None, typer.Option("--override", metavar="GLOB=RULE", help=_OVERRIDE)]
Least = Annotated[int | None, typer.Option("--min", help="No rank below this one.")]
Most = Annotated[int | None, typer.Option("--max", help="No rank above this one.")]
Multiple = Annotated[int | None, typer.Option(help="Round every rank up to a multiple of this, such as 8 for matrix units.")]
PlanFile = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="The JSON file to write.")]
PlanSites = Annotated[bool, typer.Option("--sites", help="A row for each weight.")]
PlanA = Annotated[Path, typer.Argument(metavar="A", help="A plan's JSON file.")]
PlanB = Annotated[Path, typer.Argument(metavar="B", help="Another one.")]
Method = Annotated[Literal["sara", "mosara"], typer.Option(help=_METHOD)]
NewMethod = Annotated[Literal["sara", "mosara"] | None, typer.Option(help=f"{_METHOD} Default for a plain MODEL: sara.")]
Specs = Annotated[list[str] | None, typer.Option("--input", metavar="SPEC", help=_SPECS)]
Seed = Annotated[int, typer.Option(help="Where all that is random starts.")]
Routing = Annotated[Literal["mean"] | None, typer.Option(help=_ROUTING)]
Calibration = Annotated[Path | None, typer.Option(metavar="FILE", exists=True, dir_okay=False, help=_CALIBRATION)]
Tokenizer = Annotated[str | None, typer.Option(metavar="FOLDER", help=_TOKENIZER)]
Provider = Annotated[Literal["cpu", "cuda"], typer.Option(help="Where ONNX Runtime runs the file that is checked.")]
Merge = Annotated[bool | None, typer.Option("--merge/--routed", help="Insist on merging all; or write all as subgraphs.")]
Dtype = Annotated[Literal["fp32", "fp16", "bf16"] | None, typer.Option(help="Of the weights in the file; else the model's.")]
KeepFloat32 = Annotated[list[str] | None, typer.Option(metavar="GLOB", help=_KEEP)]
Dynamic = Annotated[str, typer.Option(metavar="auto|static|SIZES", help=_DYNAMIC)]
Optimize = Annotated[Literal["none", "basic", "ort"] | None, typer.Option(help=_OPTIMIZE)]
External = Annotated[Literal["auto", "always", "never"], typer.Option(help="Whether the weights lie in a file beside.")]
Swappable = Annotated[Literal["whole", "rowwise"] | None, typer.Option("--swappable", metavar="[=rowwise]", help=_SWAPPABLE)]
Task = Annotated[Literal["forward", "generate"], typer.Option(help=_TASK)]
Smoke = Annotated[bool, typer.Option("--smoke", help="Export and check three layers first: seconds.")]
ReportFile = Annotated[Path | None, typer.Option("--report", metavar="FILE", dir_okay=False, help="What came out, as JSON.")]
Opset = Annotated[int, typer.Option(min=18, max=25, help=_OPSET)]
Tokens = Annotated[int | None, typer.Option(min=1, help="Show which schedule training takes for calls of so many tokens.")]
Device = Annotated[str | None, typer.Option(help="The device to measure: cpu or cuda. Default: cuda where there is one.")]
RatesOf = Annotated[str, typer.Option("--device", help="With --tokens: the name of a device that sarac tune has measured.")]
Check = Annotated[bool, typer.Option("--check/--no-check", help="Hold the predictions against whole calls as well.")]
Threshold = Annotated[float, typer.Option(help="The share of the singular values' sum that k reaches, in (0, 1].")]
Sites = Annotated[bool, typer.Option("--sites", help="A row for each weight, and the reason for each left out.")]
Report = Annotated[Path | None, typer.Option(metavar="DIR", file_okay=False, help="Write a page, DIR/index.html.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw ranks, curves and budget to a .png, .svg or .pdf.")]
SitesPlot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the figures by layer.")]
Data = Annotated[Path, typer.Option(metavar="FILE", exists=True, dir_okay=False, help=_DATA)]
EvalData = Annotated[Path | None, typer.Option(metavar="FILE", exists=True, dir_okay=False, help=_EVAL)]
Steps = Annotated[int | None, typer.Option(min=1, help="How many steps; else --epochs says it.")]
Epochs = Annotated[float | None, typer.Option(min=0.001, help="How many times through the data. Default: 1.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows a step.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens of a row that are kept, at most what the model takes.")]
Rate = Annotated[float | None, typer.Option(min=0.0, help=_LR)]
ConvertSource = Annotated[str, typer.Argument(metavar="SOURCE", help=_SOURCE)]
ConvertTarget = Annotated[Path, typer.Argument(metavar="TARGET", help=_TARGET)]
Base = Annotated[str | None, typer.Option(metavar="MODEL", help=_BASE)]
Layout = Annotated[Literal["padded", "pattern"] | None, typer.Option(help=_LAYOUT)]
MaxRank = Annotated[int | None, typer.Option(min=1, help=_MAX_RANK)]
Adapter = Annotated[str | None, typer.Option(metavar="NAME", help=_ADAPTER)]
Force = Annotated[bool, typer.Option("--force", help=_FORCE)]


def opened(source: str, args: str | None, factory: str | None, trust_pickle: bool) -> nn.Module:
    """The model that the words name; BadParameter where they do not go together."""
    arguments = _object(args)
    if storage.stored(source):
        if arguments is not None and factory is None:
            raise typer.BadParameter(f"{source} knows its arguments itself: leave it out, or name --model.", param_hint="--args")
        model = factory if factory is None or arguments is None else open_model(factory, arguments)
        return storage.load(source, model, trust_pickle=trust_pickle)
    if factory is not None:
        raise typer.BadParameter(f"it goes with a model.pt: name {factory} in place of {source}.", param_hint="--model")
    return open_model(source, arguments)


def overrides_of(texts: list[str] | None) -> dict[str, str]:
    """The overrides by glob, the last one of a glob at its place; BadParameter for what is no GLOB=RULE."""
    found: dict[str, str] = {}
    for text in texts or []:
        glob, equals, rule = text.partition("=")
        if not glob or not equals or not rule:
            raise typer.BadParameter(f"{text!r} is no GLOB=RULE: write '*.o_proj.weight=rank:8'.", param_hint="--override")
        found.pop(glob, None)
        found[glob] = rule
    return found


def spec_of(texts: list[str] | None) -> InputSpec | None:
    """The input spec that the texts describe; None without any."""
    try:
        return InputSpec.parse(texts) if texts else None
    except InputError as error:
        raise typer.BadParameter(str(error), param_hint="--input") from error


def require_place(*paths: Path | None) -> None:
    """Refuse output files that cannot be written before the work, and not after an hour of it."""
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder: name a file, for example {path / 'model.pt'}.")
        if not os.access(path.parent, os.W_OK):
            raise CheckpointError(f"{path} cannot be written: choose a folder that exists and is yours.")


def require_new(folder: Path) -> None:
    """Refuse an output folder that has something in it."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is no empty folder: name a new one, so that nothing in it is lost.")
    if not os.access(folder.absolute().parent, os.W_OK):
        raise CheckpointError(f"{folder} cannot be written: choose a place that exists and is yours.")


def _object(text: str | None) -> dict[str, object] | None:
    if text is None:
        return None
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"no JSON ({error}): write an object, '{{\"width\": 8}}'.", param_hint="--args") from error
    if not isinstance(found, dict):
        raise typer.BadParameter(f"a JSON {type(found).__name__}: write an object, '{{\"width\": 8}}'.", param_hint="--args")
    return found
