"""Emitting: fold or route, write ONNX aside, hold it against torch at shapes it has not seen, then put it in place."""

import functools
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from sarac import serving
from sarac.backends import genai, onnx, onnx_file, providers, runtime
from sarac.backends.decoding import Steps
from sarac.backends.stack import shortened, stack_of
from sarac.backends.unseen import unseen_inputs
from sarac.checkpoint import adapted_weights, base_hashes
from sarac.generating import stepped, texts
from sarac.ir import check
from sarac.ir.errors import CheckFailed, ExportError, InputError, RewriteError, SaracWarning
from sarac.ir.graph import Folded, ModelGraph
from sarac.ir.inputs import Inputs, InputSpec
from sarac.ir.layers import adapted, evaluating
from sarac.ir.pipeline import run
from sarac.ir.record import __version__, record_of, require_whole
from sarac.onnx_fold import sites_entry
from sarac.passes.fold import Fold
from sarac.placing import aside, free_data, placed
from sarac.precision import kept_float32
from sarac.proof import Comparison, ExportReport, hold, noted
from sarac.swapping import Run, compare_swaps, swap_for
from sarac.text import input_spec
from sarac.trace import trace

_OPSETS = range(18, 26)  # what the exporters underneath can write
_DTYPE = "sarac.dtype"  # the metadata entry with the dtype of the weights
_KEPT = "sarac.float32"  # the metadata entry with the modules that stay in float32
_BREAKING = 23  # ONNX Runtime up to 1.31 fails on its RotaryEmbedding
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OPTIMIZE, EXTERNAL = ("none", "basic", "ort"), ("auto", "always", "never")
TASKS = ("forward", "generate")


def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: Any = None,
    *,
    merge: bool | None = None,
    opset: int = 20,
    provider: str = "cpu",
    dtype: str | None = None,
    keep_float32: Sequence[str] = (),
    dynamic: str = "auto",
    optimize: str | None = None,
    external_data: str = "auto",
    smoke: bool = False,
    swappable: bool | str = False,
    task: str = "forward",
    engine: str = "onnx",
    tokenizer: str | Path | None = None,
) -> ExportReport:
    """Write `model` as ONNX, verified: a failed check raises CheckFailed and leaves nothing at `path`.

    `merge` True folds every adapter (NotFoldable where one is routed), False writes all as subgraphs, None folds what folds.
    Without example inputs the model's input spec serves. `dtype`: "fp32", "fp16", "bf16" or the model's own, folded in float32
    and rounded once; what has to stay in float32 is found, and `keep_float32` (globs) adds to it.
    `dynamic`: "auto", "static", or the free sizes, as in "input_ids[batch,length]". `smoke`: three layers first.
    `optimize`: "none", "basic", or "ort" for `provider`'s own operators (default for "cuda"). `swappable`: the base with its
    adapters open, for files of `save_onnx_adapter`: True, one at a time; "rowwise", one a row. `task` "generate": a step over
    a cache, for `Runtime.generate`. `engine` "genai": a folder for onnxruntime_genai, with `tokenizer`'s files or the model's.
    """
    if engine != "onnx" or tokenizer is not None:
        what: dict[str, Any] = {"merge": merge, "swappable": swappable, "task": task, "smoke": smoke}
        what |= {"opset": opset, "dynamic": dynamic, "optimize": optimize, "external_data": external_data}
        serving.require(engine, tokenizer, example_inputs=example_inputs, keep_float32=tuple(keep_float32), **what)
        return _served(model, Path(path), merge, dtype, provider, tokenizer)
    form = _form(opset, dynamic, dtype, optimize, provider, external_data, check.coarsest(model))
    form = replace(form, swap=swap_for(model, swappable), steps=_steps(model, task, dynamic))
    merge, wide = _unmerged(merge) if form.swap else merge, _widened(model, form.dtype, *_inputs(model, example_inputs))
    emitted = functools.partial(_folded, wide[0], merge, None)
    kept = kept_float32(wide[0], emitted, form.dtype, keep_float32, texts(wide[0]) if form.steps else [wide[1]])
    return _written(Path(path), replace(form, kept=kept), merge, smoke, check.coarsest(model), *wide)


def _widened(model: nn.Module, dtype: torch.dtype | None, inputs: Inputs, spec: InputSpec) -> tuple[nn.Module, Inputs, InputSpec]:
    wide = model if dtype is None else serving.widened(model, dtype)
    if wide is not model:
        inputs = inputs.map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
        spec = InputSpec(tuple(replace(one, dtype="float32") if "float" in one.dtype else one for one in spec.tensors))
    return wide, inputs, spec


def _written(
    target: Path,
    form: onnx.Onnx,
    merge: bool | None,
    smoke: bool,
    own: torch.dtype,
    model: nn.Module,
    inputs: Inputs,
    spec: InputSpec,
) -> ExportReport:
    """Write `model`, whose weights are in the dtype `own` or a wider copy of such, and hold what came out against it."""
    started = time.perf_counter()
    graph = _folded(model, merge, form.dtype, form.kept)
    plan, routed = record_of(model), tuple(slot.site for _, _, s in adapted(graph.module) for slot in s.slots.values())
    metadata, merged = _metadata(model, form.dtype), plan is not None and not routed
    metadata |= sites_entry(graph, own, inputs) if plan is None else {}
    metadata |= {_KEPT: json.dumps(form.kept)} if form.kept else {}
    with aside(target) as folder:
        if smoke:
            _tried(model, graph, folder / target.name, form, spec, inputs, metadata)
        tried = time.perf_counter()
        files = form.write(graph.module, inputs, folder / target.name, metadata, free_data(target), graph.waiting)
        exported = time.perf_counter()
        comparisons = _compared(model, graph, folder / target.name, form, spec, inputs)
        seconds = {"smoke": tried - started, "export": exported - tried, "verify": time.perf_counter() - exported}
        layers = _note(folder / target.name, merged, comparisons, graph.folded)
        places = placed(files, target)
    open_to = "" if not form.swap else "rowwise" if form.swap.rowwise else "whole"
    said = (metadata[_DTYPE], form.kept, layers, open_to)
    return ExportReport(target, places, merged, routed, comparisons, graph.folded, seconds, *said)


def _tried(
    model: nn.Module,
    graph: ModelGraph,
    path: Path,
    form: onnx.Onnx,
    spec: InputSpec,
    inputs: Inputs,
    metadata: Mapping[str, str],
) -> None:
    """The whole way with three layers, if the model is a stack of equal ones."""
    if (stack := stack_of(graph.module)) is not None:
        with shortened(model, stack), shortened(graph.module, stack):
            form.write(graph.module, inputs, path, metadata, waiting=graph.waiting)
            _compared(model, graph, path, form, spec, inputs)


def _served(
    model: nn.Module, folder: Path, merge: bool | None, dtype: str | None, provider: str, tokenizer: str | Path | None
) -> ExportReport:
    own = next((name for name, one in DTYPES.items() if one == check.coarsest(model)), "float64")
    genai.require(model, folder, dtype or own, provider)
    genai.require_provider(provider)
    wanted = DTYPES[dtype or own]
    metadata, wide = _metadata(model, wanted), serving.widened(model, wanted)
    graph = _folded(wide, merge if record_of(model) is None else True, wanted, pending=False)
    return serving.export(wide, graph, folder, dtype=dtype or own, provider=provider, tokenizer=tokenizer, metadata=metadata)


def verify(model: nn.Module, path: str | Path, example_inputs: Any = None, *, provider: str = "cpu") -> ExportReport:
    """Hold an exported file against `model` again, at shapes that its capture did not see; CheckFailed if they differ."""
    target = Path(path)
    metadata = onnx_file.read_metadata(genai.graph(target) if target.is_dir() else target)
    weights = adapted_weights(model)
    base = base_hashes(weights)["float32"] if weights else ""
    # A plain model may be this very one, folded: its outputs tell.
    if weights and metadata.get("sarac.base", "") != base:
        raise CheckFailed(f"{target} was exported from another base than this model's. Export the model again.")
    started, dtype = time.perf_counter(), getattr(torch, metadata.get(_DTYPE, ""), None)
    if target.is_dir():
        serving.require("genai", example_inputs=example_inputs)
        wide = serving.widened(model, dtype or torch.float32)
        comparisons, files = serving.compare(wide, wide, target, provider, dtype), tuple(sorted(target.iterdir()))
    else:
        inputs, spec = _inputs(model, example_inputs)
        plain, form = ModelGraph(model, {}, {}), onnx.Onnx(dtype=dtype, provider=provider)
        comparisons, files = _compared(model, plain, target, form, spec, inputs), (target,)
    merged = bool(json.loads(metadata.get("sarac.verification", "{}")).get("merged"))
    seconds = {"verify": time.perf_counter() - started}
    return ExportReport(target, files, merged, (), comparisons, seconds=seconds)


def _compared(
    model: nn.Module, graph: ModelGraph, path: Path, form: onnx.Onnx, spec: InputSpec, inputs: Inputs
) -> tuple[Comparison, ...]:
    session = runtime.Runtime(path, form.provider, floats=check.coarsest(model) if form.dtype is not None else None)
    run: Run = functools.partial(stepped, session) if session.generates else session.run
    with torch.no_grad(), evaluating(model):
        unseen = texts(model) if session.generates else unseen_inputs(spec, session, inputs, model=model)
    if session.adapters:
        return compare_swaps(model, session.adapters, run, unseen, form.dtype)
    return hold(model, graph, lambda given: run(given, None), unseen, form.dtype)


def _steps(model: nn.Module, task: str, dynamic: str) -> Steps | None:
    if task not in TASKS:
        raise ExportError(f"task={task!r} is not known: give one of {', '.join(TASKS)}.")
    if task == "forward":
        return None
    if dynamic != "auto":
        raise ExportError(f'task="generate" leaves rows, columns and the cache\'s room free: leave dynamic={dynamic!r} out.')
    return Steps.of(model)


def _unmerged(merge: bool | None) -> bool:
    if merge:
        raise ExportError("merge=True leaves no adapter to swap: give merge or swappable, not both.")
    return False


def _form(
    opset: int, dynamic: str, dtype: str | None, optimize: str | None, provider: str, external: str, own: torch.dtype
) -> onnx.Onnx:  # fmt: skip
    """The format asked for, of a model in the dtype `own`; ExportError for an option that does not exist or cannot be."""
    if opset not in _OPSETS:
        raise ExportError(
            f"opset {opset} is not possible: it is one of {_OPSETS.start} to {_OPSETS.stop - 1}; 20 is the default."
        )
    if opset == _BREAKING:
        warnings.warn(
            "opset 23 has a RotaryEmbedding that ONNX Runtime up to 1.31 fails on: leave the default, 20, where you can.",
            SaracWarning,
            stacklevel=4,
        )
    choices = (
        ("dtype", dtype, (None, *DTYPES)),
        ("optimize", optimize, (None, *OPTIMIZE)),
        ("external_data", external, EXTERNAL),
    )
    for name, given, known in choices:
        if given not in known:
            raise ExportError(f"{name}={given!r} is not known: give one of {', '.join(str(one) for one in known if one)}.")
    providers.require(provider)
    if provider == "cpu" and (dtype == "bf16" or (dtype is None and own == torch.bfloat16)):
        raise ExportError(
            "ONNX Runtime has no bfloat16 arithmetic on CPUs, so the file could not be checked here: export on the machine "
            'that will serve it (provider="cuda"), or in fp16 or fp32.'
        )
    level = optimize or ("ort" if provider == "cuda" else "basic")
    return onnx.Onnx(opset, dynamic, DTYPES[dtype] if dtype is not None else None, level, provider, external)


def _note(path: Path, merged: bool, comparisons: tuple[Comparison, ...], folded: Mapping[str, Folded]) -> str:
    """Write down in the file what it was checked for; gives what it says of equal layers."""
    onnx_file.write_metadata(path, noted(merged, comparisons, folded))
    return onnx_file.read_metadata(path)[onnx.LAYERS]


def _folded(
    model: nn.Module, merge: bool | None, dtype: torch.dtype | None, wide: tuple[str, ...] = (), pending: bool = True
) -> ModelGraph:
    graph = ModelGraph(model, trace(model).sites, {})
    require_whole(model, "export")
    if record_of(model) is None:
        if merge is not None:
            raise RewriteError(f"{type(model).__name__} carries no adapters: there is nothing to merge. Leave `merge` out.")
        return graph
    fold = Fold(dtype=dtype, wide=wide, partial=merge is None, pending=pending)
    return graph if merge is False else run(graph, fold, check=False)


def _inputs(model: nn.Module, example: Any) -> tuple[Inputs, InputSpec]:
    """The inputs to capture on and their spec: given ones, those of the model's input spec, or transformers' token ids."""
    if example is not None and not isinstance(example, InputSpec):
        inputs = Inputs.of(example)
        return inputs, InputSpec.of(inputs)
    kept = example or input_spec(model)
    if kept is None:
        raise InputError(
            f"{type(model).__name__} comes without a description of its inputs: give example_inputs, or on the command line "
            "--input name:dtype[sizes], for example --input x:float32[2,16]."
        )
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return kept.sample().to(device), kept


def _metadata(model: nn.Module, dtype: torch.dtype | None) -> dict[str, str]:
    """What an exported file says of itself: the plan with its ranks, the base's hash, the versions."""
    versions = {"sarac": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    record, weights = record_of(model), adapted_weights(model)
    held = str(dtype or check.coarsest(model)).removeprefix("torch.")
    entries = {"sarac.versions": json.dumps(versions), _DTYPE: held}
    if record is not None:
        entries |= {"sarac.plan": record.plan.to_json(), "sarac.base": base_hashes(weights)["float32"]}
    return entries
