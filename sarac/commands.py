"""The commands that take an adapted model out: folded, exported and verified there, or in another form."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import transformers
import typer
from torch import nn

from sarac import arguments as take
from sarac import convert as forms
from sarac import diagnosis, emit, onnx_fold, storage, surgery, text, tuning
from sarac.backends import peft
from sarac.ir.cache import store
from sarac.ir.errors import CheckpointError
from sarac.proof import ExportReport
from sarac.shelf import use
from sarac.terminal import busy, show


def fold(
    model: take.Source,
    out: take.FoldOut,
    routing: take.Routing = None,
    calibration: take.Calibration = None,
    tokenizer: take.Tokenizer = None,
    args: take.Args = None,
    factory: take.Factory = None,
    trust_pickle: take.Trust = False,
    as_json: take.Json = False,
) -> None:
    """Write a model's adapters into its weights. What comes out is a plain model of the same class and names."""
    into_file = out.suffix in (".pt", ".pth")
    take.require_place(out) if into_file else take.require_new(out)
    opened = take.opened(model, args, factory, trust_pickle)
    if not into_file and not isinstance(opened, transformers.PreTrainedModel):
        raise typer.BadParameter(f"a {type(opened).__name__} goes into a file: name one, merged.pt.", param_hint="--out")
    merged, report = _folded(opened, routing, calibration, tokenizer)
    if into_file or not isinstance(merged, transformers.PreTrainedModel):
        storage.save(merged, out)
    else:
        _write_folder(merged, out, tokenizer)
    site, lost = report.worst
    facts = {"out": str(out), "sites": len(report.sites), "surviving_delta": {"worst_site": site, "lost": lost}}
    sentence = f"{out}: {len(report.sites)} weights folded; rounding lost at most {lost:.1e} of a delta, at {site}."
    show(as_json, json.dumps({**facts, "approximation": report.approximation}), sentence)


def export(
    model: take.Source,
    onnx: take.OnnxFile,
    merge: take.Merge = None,
    swappable: take.Swappable = None,
    task: take.Task = "forward",
    opset: take.Opset = 20,
    dtype: take.Dtype = None,
    keep_float32: take.KeepFloat32 = None,
    dynamic: take.Dynamic = "auto",
    optimize: take.Optimize = None,
    external_data: take.External = "auto",
    smoke: take.Smoke = False,
    report_file: take.ReportFile = None,
    specs: take.Specs = None,
    provider: take.Provider = "cpu",
    routing: take.Routing = None,
    calibration: take.Calibration = None,
    tokenizer: take.Tokenizer = None,
    engine: take.Engine = "onnx",
    args: take.Args = None,
    factory: take.Factory = None,
    trust_pickle: take.Trust = False,
    as_json: take.Json = False,
) -> None:
    """Write a model as ONNX, checked against torch. By default what can be merged is, and the rest stays routed."""
    take.require_place(onnx if engine == "onnx" else None)
    if routing is not None and merge is False:
        raise typer.BadParameter("--routing merges the routed adapters: leave one of the two out.", param_hint="--routed")
    opened, approximation = _averaged(take.opened(model, args, factory, trust_pickle), routing, calibration, tokenizer)
    form: dict[str, Any] = {"opset": opset, "dtype": dtype, "dynamic": dynamic, "optimize": optimize, "smoke": smoke}
    form |= {"swappable": swappable == "whole" or swappable or False, "engine": engine, "task": task, "provider": provider}
    form |= {"merge": merge if routing is None else None, "external_data": external_data, "keep_float32": keep_float32 or ()}
    form["tokenizer"] = tokenizer if engine == "genai" or routing is None else None
    with busy("Exporting"):
        done = emit.export(opened, onnx, take.spec_of(specs), **form)
    said = json.dumps({**json.loads(done.to_json()), "routing": routing, "approximation": approximation})
    if report_file is not None:
        report_file.write_text(said, encoding="utf-8")
    show(as_json, said, done.table(), _verdict(done, "written and verified"))


def verify(
    model: take.Source,
    onnx: take.OnnxFile,
    specs: take.Specs = None,
    provider: take.Provider = "cpu",
    args: take.Args = None,
    factory: take.Factory = None,
    trust_pickle: take.Trust = False,
    as_json: take.Json = False,
) -> None:
    """Hold an ONNX file against its model again, at unseen shapes."""
    spec = take.spec_of(specs)
    opened = take.opened(model, args, factory, trust_pickle)
    with busy("Verifying"):
        report = emit.verify(opened, onnx, spec, provider=provider)
    show(as_json, report.to_json(), report.table(), _verdict(report, "verified"))


def fold_onnx(
    base: take.OnnxBase,
    adapter: take.AdapterFile,
    out: take.OnnxOut,
    provider: take.Provider = "cpu",
    as_json: take.Json = False,
) -> None:
    """Fold an adapter file into an ONNX export of its base. It needs no model, and rewrites only the weights that change."""
    take.require_place(out)
    with busy("Folding"):
        done = onnx_fold.fold_onnx(base, adapter, out, provider=provider)
    show(as_json, done.to_json(), done.sentence())


def convert(
    source: take.ConvertSource,
    target: take.ConvertTarget,
    base: take.Base = None,
    layout: take.Layout = None,
    max_rank: take.MaxRank = None,
    force: take.Force = False,
    adapter: take.Adapter = None,
    args: take.Args = None,
    factory: take.Factory = None,
    trust_pickle: take.Trust = False,
    as_json: take.Json = False,
) -> None:
    """Write adapters in another form. What is written is read back and compared, and nothing is left where it differs."""
    form, to_be = forms.form_of(Path(source)), forms.form_to_be(target)
    for given, fits, hint, goes in (
        (base is not None, form != "model", "--base", "with a PEFT folder or an adapter file"),
        (force, form == "adapter", "--force", "with an adapter file"),
        (layout is not None, to_be == "peft", "--layout", "into a PEFT folder"),
        (max_rank is not None, to_be == "peft", "--max-rank", "into a PEFT folder"),
    ):
        if given and not fits:
            raise typer.BadParameter(f"it goes {goes}, which is not what {source} to {target} is.", param_hint=hint)
    take.require_new(target) if to_be == "peft" else take.require_place(target)
    model = take.opened(source if form == "model" else _base(source, form, base), args, factory, trust_pickle)
    with busy("Converting"):
        adapted = model if form == "model" else forms.adapt(model, Path(source), force)
        if adapter is not None:
            use(adapted, adapter)
        done = forms.convert(adapted, target, layout=layout or "padded", max_rank=max_rank)
    facts: dict[str, Any] = {"out": str(target), "form": done.form, "sites": done.sites, "rank": done.rank}
    facts |= {"truncation": dict(done.errors), "adapters": done.names}
    show(as_json, json.dumps(facts), done.sentence())


def diagnose(
    model: take.Source,
    data: take.Data,
    sites: take.Sites = False,
    plot: take.SitesPlot = None,
    batch_size: take.BatchSize = 8,
    length: take.Length = 256,
    tokenizer: take.Tokenizer = None,
    args: take.Args = None,
    factory: take.Factory = None,
    trust_pickle: take.Trust = False,
    as_json: take.Json = False,
) -> None:
    """Tell how a model's adapters do on some text. The file's first rows are the batch; findings say what to change."""
    from sarac import finetune as training  # Trainer takes two seconds to import, which no other command is to wait for

    take.require_place(plot)
    opened = take.opened(model, args, factory, trust_pickle)
    words = text.tokenizer_of(opened, tokenizer)
    rows = text.read_rows(data, words, text.longest(opened, length), text.vocabulary_of(opened, words))
    batch = training.batch_of(opened, rows, batch_size)
    labels = batch.pop("labels")
    with busy("Looking"):
        found = diagnosis.diagnose(opened, batch, loss=lambda outputs: training.token_losses(opened, outputs, labels).mean())
    if plot is not None:
        found.plot(plot)
    show(as_json, found.to_json(), found.table(sites))


def tune(device: take.Device = None, check: take.Check = True, as_json: take.Json = False) -> None:
    """Measure what this machine does. By it sarac chooses from then on in which order adapted calls compute while they train."""
    with busy("Measuring"):
        found = tuning.tune(device, check=check)
    kept = f"Kept in {found.path}." if found.path else "Not kept: the cache is off (SARAC_CACHE=off)."
    show(as_json, found.to_json(), *found.tables(), kept)


def cache(clear: take.Clear = False, as_json: take.Json = False) -> None:
    """Show where what was measured is kept, and how much. Or clear it."""
    kept = store()
    if kept is None:
        show(as_json, json.dumps({"folder": None, "entries": 0, "bytes": 0}), "The cache is off (SARAC_CACHE=off).")
        return
    count, size = kept.clear() if clear else (len(kept.entries()), sum(one for _, one, _ in kept.entries()))
    what = "removed" if clear else f"of at most {kept.limit / 1e9:g} GB"
    facts = {"folder": str(kept.folder), "entries": count, "bytes": size, "limit": kept.limit, "cleared": clear}
    show(as_json, json.dumps(facts), f"{kept.folder}: {count} entries, {size / 1e6:,.1f} MB {what}.")


def _base(source: str, form: str, base: str | None) -> str:
    named = peft.base_of(source) if form == "peft" and base is None else base
    if named is None or (base is None and not Path(named).is_dir()):
        known = f" It names {named}, which is no folder here." if named else ""
        raise typer.BadParameter(f"{source} holds adapters alone: name the model under them.{known}", param_hint="--base")
    return named


def _folded(
    model: nn.Module, routing: str | None, calibration: Path | None, tokenizer: str | None
) -> tuple[nn.Module, surgery.FoldReport]:
    if (routing is None) != (calibration is None):
        raise typer.BadParameter("--routing mean and --calibration FILE go together.", param_hint="--calibration")
    calls = None
    if calibration is not None:
        calls = text.read_inputs(calibration, model, functools.cache(lambda: text.tokenizer_of(model, tokenizer)))
    with busy("Folding"):
        return surgery.fold(model, routing=routing, calibration=calls, report=True)


def _averaged(model: nn.Module, routing: str | None, calibration: Path | None, tokenizer: str | None) -> tuple[nn.Module, float]:
    """The model, folded by its mean gates where that is asked for, and what that loses."""
    if routing is None:
        return model, 0.0
    folded, report = _folded(model, routing, calibration, tokenizer)
    return folded, report.approximation


def _write_folder(model: "transformers.PreTrainedModel", folder: Path, tokenizer: str | None) -> None:
    """save_pretrained with the tokenizer beside it; aside first, so that the folder is there whole or not at all."""
    try:
        with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=f".{folder.name}.") as aside:
            made = Path(aside) / folder.name
            model.save_pretrained(made)
            text.copy_tokenizer(model, made, tokenizer)
            if folder.exists():
                folder.rmdir()
            made.rename(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}.") from error


def _verdict(report: ExportReport, what: str) -> str:
    return f"{report.path}: {what}; largest error {report.error:.2e} of the outputs' spread, {report.max_error:.2e} absolute."
