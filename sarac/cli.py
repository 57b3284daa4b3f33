"""The command line: every command opens a model, calls one function of the face, and says what came of it.

Exit status: 0 done; 1 a check failed, or the data are at fault, and nothing is left at the output path; 2 wrong use, which
a rule, a glob or a plan that does not fit the model is too.
"""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import typer
from rich.table import Table
from torch import nn

from sarac import arguments as take
from sarac import commands, plans, storage, surgery, text
from sarac import doctor as diagnosis
from sarac.checkpoint import tensors_of, written
from sarac.folders import Folder
from sarac.ir.cache import switched
from sarac.ir.processes import first, joined
from sarac.ir.record import record_of
from sarac.passes.choose import chosen_sites
from sarac.scheduling import Schedules
from sarac.terminal import Commands, Swapping, busy, meter, show, width
from sarac.trace import trace

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,  # "[2,16]" is no markup; and the boxes leave the words no room
    add_completion=False,
    pretty_exceptions_enable=False,  # what is not meant to happen keeps its plain traceback
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line of this process."""
    # Python gives a console script its own folder for a path: a factory in the working directory is to be found as well,
    # and last, lest a folder here that is called like a library takes its place.
    sys.path.append("")
    app()


@app.callback()
def _common(version: take.Version = False) -> None:
    """Model surgery for PyTorch: threshold ranks, SARA and Mo-SARA fine-tuning, merged and checked ONNX."""


@app.command(epilog="Example: sarac analyze HuggingFaceTB/SmolLM2-135M --threshold 0.6")
def analyze(
    model: take.Source,
    threshold: take.Threshold = 0.6,
    where: take.Where = None,
    sites: take.Sites = False,
    plot: take.Plot = None,
    report: take.Report = None,
    specs: take.Specs = None,
    args: take.Args = None,
    factory: take.Factory = None,
    trust_pickle: take.Trust = False,
    tokens: take.Tokens = None,
    device: take.RatesOf = "",
    no_cache: take.NoCache = False,
    as_json: take.Json = False,
) -> None:
    """Show the threshold rank k of every linear weight of a model.

    A folder of safetensors is read weight by weight, never the whole model; under torchrun all processes share the work.
    With --input the whole model is captured on such inputs as well: calls, FLOPs and depth come into the JSON.
    """
    take.require_place(plot)
    spec = take.spec_of(specs)
    with joined() as together:
        plain = spec is None and args is None and factory is None and not trust_pickle
        opened = (Folder.at(model) if plain else None) or take.opened(model, args, factory, trust_pickle)
        chosen = opened.chosen(where or None) if isinstance(opened, Folder) else chosen_sites(trace(opened), where or None)
        with meter("Measuring", len(chosen)) as step:
            choice: dict[str, Any] = {"threshold": threshold, "where": where or None, "progress": step, "cache": not no_cache}
            analysis = surgery.analyze(opened, example_inputs=spec and spec.sample(), distributed=together, **choice)
    if not first():
        return
    if plot is not None:
        analysis.plot(plot)
    if report is not None:
        analysis.report(report, command=shlex.join(["sarac", *sys.argv[1:]]))
    document, more = analysis.to_json(), [analysis.left_out_table(sites)] if analysis.left_out else []
    if tokens is not None:
        document, more = _with_schedules(document, more, analysis.schedules(tokens, device), sites)
    show(as_json, document, analysis.table(sites, width()), *more)


app.add_typer(plans.app, name="plan")


@app.command(epilog="Example: sarac transform ./llama --plan threshold:0.6 --out model.pt")
def transform(
    model: take.Source,
    out: take.ModelOut,
    plan: take.Plan = "threshold:0.6",
    method: take.Method = "sara",
    where: take.Where = None,
    overrides: take.Overrides = None,
    also_train: take.AlsoTrain = None,
    seed: take.Seed = 0,
    specs: take.Specs = None,
    plan_out: take.PlanOut = None,
    args: take.Args = None,
    factory: take.Factory = None,
    trust_pickle: take.Trust = False,
    no_cache: take.NoCache = False,
    as_json: take.Json = False,
) -> None:
    """Put adapters on a model's linear weights. Until it is trained it computes the same to the last bit."""
    take.require_place(out, plan_out)
    spec = take.spec_of(specs)
    opened = take.opened(model, args, factory, trust_pickle)
    chosen: dict[str, Any] = {"method": method, "where": where or None, "also_train": also_train or None, "seed": seed}
    chosen["overrides"] = take.overrides_of(overrides)
    with busy("Transforming"), switched(not no_cache):
        result = surgery.transform(opened, plan, example_inputs=spec and spec.sample(), **chosen)
    storage.save(result, out, example_inputs=spec)
    record = record_of(result)
    if plan_out is not None and record is not None:
        written(plan_out, record.plan.save)
    facts = _facts(result, out)
    show(as_json, json.dumps({**facts, "plan": plan, "method": method}), _sentence(facts))


@app.command(epilog="Example: sarac finetune ./llama --data train.jsonl --out model.pt")
def finetune(
    model: take.Source,
    data: take.Data,
    out: take.ModelOut,
    plan: take.NewPlan = None,
    method: take.NewMethod = None,
    where: take.Where = None,
    steps: take.Steps = None,
    epochs: take.Epochs = None,
    batch_size: take.BatchSize = 8,
    length: take.Length = 256,
    lr: take.Rate = None,
    eval_data: take.EvalData = None,
    tokenizer: take.Tokenizer = None,
    seed: take.Seed = 0,
    args: take.Args = None,
    factory: take.Factory = None,
    trust_pickle: take.Trust = False,
    no_cache: take.NoCache = False,
    as_json: take.Json = False,
) -> None:
    """Train a model's adapters on text. A plain model is transformed first; a model.pt with adapters is trained on."""
    from sarac import finetune as training  # Trainer takes two seconds to import, which no other command is to wait for

    take.require_place(out)
    if steps is not None and epochs is not None:
        raise typer.BadParameter("--steps says it already: give one of the two.", param_hint="--epochs")
    opened = take.opened(model, args, factory, trust_pickle)
    training.require_language_model(opened)
    words = text.tokenizer_of(opened, tokenizer)
    vocabulary = text.vocabulary_of(opened, words)
    longest = text.longest(opened, length)
    rows = text.read_rows(data, words, longest, vocabulary)
    evaluation = text.read_rows(eval_data, words, longest, vocabulary) if eval_data else None
    with busy("Preparing"), switched(not no_cache):
        result = training.with_adapters(opened, plan, method, where or None, seed)
    outcome = training.finetune(result, rows, evaluation, training.Options(steps, epochs or 1.0, batch_size, lr, seed), meter)
    storage.save(result, out, example_inputs=text.token_spec(result, vocabulary))
    facts = {**_facts(result, out), **outcome.facts(), "length": longest}
    show(as_json, json.dumps(facts), outcome.table(), _sentence(facts))


app.command(epilog="Example: sarac fold model.pt --out merged/")(commands.fold)
app.command(cls=Swapping, epilog="Example: sarac export --merge model.pt out.onnx")(commands.export)
app.command(epilog="Example: sarac verify model.pt out.onnx")(commands.verify)
app.command(epilog="Example: sarac fold-onnx base.onnx adapter.safetensors out.onnx")(commands.fold_onnx)
app.command(epilog="Example: sarac convert model.pt lora/ --max-rank 64")(commands.convert)


app.command(epilog="Example: sarac diagnose model.pt --data train.jsonl")(commands.diagnose)
app.command(epilog="Example: sarac tune --device cuda")(commands.tune)
app.command(epilog="Example: sarac cache --clear")(commands.cache)


@app.command(epilog="Example: sarac doctor --json")
def doctor(as_json: take.Json = False) -> None:
    """Show versions and which providers really load. What is missing comes with the command that mends it."""
    found = diagnosis.diagnose()
    faults = [f"{fault}: {remedy}" for fault, remedy in found.faults]
    show(as_json, found.to_json(), found.table(), *(faults or [found.verdict]))


def _with_schedules(document: str, tables: list[Table], found: Schedules, by_site: bool) -> tuple[str, list[Table]]:
    said = {**json.loads(document), "schedules": json.loads(found.to_json())}
    return json.dumps(said, indent=1), [*tables, found.table(by_site)]


def _facts(model: nn.Module, out: Path) -> dict[str, Any]:
    record = record_of(model)
    added = sum(tensor.numel() for roles in tensors_of(model).values() for tensor in roles.values())
    return {
        "out": str(out),
        "sites": len(record.plan.sites) if record else 0,
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "parameters": sum(parameter.numel() for parameter in model.parameters()) - added,
        "recommended_lr": surgery.recommended_lr(model),
    }


def _sentence(facts: dict[str, Any]) -> str:
    share = facts["trainable"] / facts["parameters"]
    return (
        f"{facts['out']}: adapters on {facts['sites']} weights; {facts['trainable']:,} numbers train, {share:.2%} of "
        f"{facts['parameters']:,}; recommended rate {facts['recommended_lr']:g}."
    )


if __name__ == "__main__":
    main()
